"""How to run a teacher on the device at hand: what is chosen by measuring, with pictures of noise, before an extraction."""

import time
from collections.abc import Callable, Iterable

import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM

from pipelines.encoding import Encoder
from sami_cache.models.fast_attention import ATTENTIONS, use_attention
from sami_cache.models.teachers import Teacher

MEMORY_SHARE = 0.5
"""Of a GPU's free memory, what a batch may take: extraction has three batches of pixels and results there besides."""
GAIN = 1.03
"""A larger batch must bring so many times the images a second, or it only takes memory and room in a shard."""
MOST = 256
TRIED = 4
"""Pictures at once where ways of computing attention are compared."""


def tune(
    teacher: Teacher,
    *,
    grid: int,
    precision: str,
    device: torch.device,
    attention: str | None,
    batch_size: int | None,
    limit: int,
) -> tuple[str, int]:
    """(way of computing attention, batch size) for a teacher, which attends in that way from now on.

    attention, batch_size: None where they are to be chosen: on the CPU timm's and 8, on a GPU by measuring, in seconds.
    limit: the largest batch to choose.
    """
    if device.type != "cuda":
        attention, batch_size = attention or "timm", batch_size or 8
    ways = [attention] if attention else list(ATTENTIONS) if isinstance(teacher.encoder, VisionTransformerSAM) else ["timm"]
    if len(ways) == 1 and batch_size:
        use_attention(teacher.encoder, ways[0])
        return ways[0], batch_size
    encoder = Encoder(teacher, grid=grid, precision=precision, device=device)

    def rate_of(way: str) -> float:
        use_attention(teacher.encoder, way)
        return images_per_second(encoder, min(batch_size or TRIED, TRIED))

    way = fastest(ways, rate_of) if len(ways) > 1 else ways[0]
    use_attention(teacher.encoder, way)
    return way, batch_size or batch_for_gpu(encoder, min(limit, MOST))


def compile_mode(device: torch.device, image_size: int) -> str:
    """The mode of torch.compile for a teacher's input of that size: not measured on a GPU yet, so by reasoning.

    At 224 pixels ViT-H's some 1500 kernels a batch take as long to launch as to run: one CUDA graph launches them all. At
    1024 they run twenty times as long, a graph would hold memory for nothing, and it pays to try matrix products out.
    """
    if device.type != "cuda":
        return "default"
    return "reduce-overhead" if image_size < 512 else "max-autotune-no-cudagraphs"


def fastest(ways: Iterable[str], rate_of: Callable[[str], float]) -> str:
    """The way with the most images a second. Ways that fail on this device are out; if all do, the last error is raised."""
    rates: dict[str, float] = {}
    failure: Exception | None = None
    for way in ways:
        try:
            rates[way] = rate_of(way)
        # Compilers and kernels fail in many ways, none of which is a reason not to take another way.
        except Exception as error:
            failure = error
    if not rates:
        raise failure or ValueError("no way to choose from")
    return max(rates, key=lambda way: rates[way])


def choose_batch(measure: Callable[[int], tuple[float, float]], *, room: float, limit: int = MOST) -> int:
    """The smallest power of two up to `limit` that is as fast as any that fits, within `GAIN`.

    Args:
        measure: of a batch, (images a second, bytes that it takes); may raise torch.OutOfMemoryError.
        room: bytes that a batch may take. One of 1 is not refused.
    """
    size, rates = 1, {}
    rates[1], taken = measure(1)
    while 2 * size <= limit and 2 * taken <= room:
        size *= 2
        try:
            rate, taken = measure(size)
        except torch.OutOfMemoryError:
            break
        if taken <= room:
            rates[size] = rate
    best = max(rates.values())
    return min(size for size, rate in rates.items() if GAIN * rate >= best)


def images_per_second(encoder: Encoder, batch_size: int, *, least_seconds: float = 0.3) -> float:
    """Of batches of noise that lie on the device, once it is warm."""
    size = encoder.teacher.info.image_size
    pixels = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8, device=encoder.device)
    sizes = torch.full((batch_size, 2), size, dtype=torch.int32, device=encoder.device)
    done, began = 0, 0.0
    for turn in range(1000):
        encoder.encode(pixels, sizes)
        if encoder.device.type == "cuda":
            torch.cuda.synchronize(encoder.device)
        if not turn:
            began = time.perf_counter()
            continue
        done = turn
        if time.perf_counter() - began > least_seconds:
            break
    return done * batch_size / (time.perf_counter() - began)


def measure_on_gpu(encoder: Encoder, batch_size: int) -> tuple[float, float]:
    """(images a second, bytes of the GPU's memory that the batch takes beyond what is taken already)."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(encoder.device)
    before = torch.cuda.memory_allocated(encoder.device)
    rate = images_per_second(encoder, batch_size)
    return rate, torch.cuda.max_memory_allocated(encoder.device) - before


def batch_for_gpu(encoder: Encoder, limit: int) -> int:
    """`choose_batch` on the GPU of an encoder that is not compiled, because that takes minutes for each size."""
    torch.cuda.empty_cache()
    room = MEMORY_SHARE * torch.cuda.mem_get_info(encoder.device)[0]
    size = choose_batch(lambda size: measure_on_gpu(encoder, size), room=room, limit=limit)
    torch.cuda.empty_cache()
    return size
