"""Whole data sets by the numbers: bytes, files, GPU-hours, metadata, verification, requests, break-even, for docs/scale.md.

    python benchmarks/plan_scale.py [--write]

Prints the tables; --write puts them into the page, between their markers. Nothing in them is typed by hand: what is measured is
read from the page that holds it, shards and chunks are the ones that `choose_layout` chooses, the teacher's multiplications are
counted by torch on tensors without memory. What is assumed is a constant of this file, and the page says so.
"""

import argparse
import re
from dataclasses import dataclass
from functools import cache
from math import ceil, expm1
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from sami_cache.store.cache import choose_layout
from sami_cache.store.head import STATIC_FILES
from sami_cache.store.shards import ShardLayout

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scale.md"
DATA_SETS = {"ImageNet-1K": 1_281_167, "ImageNet-21K": 14_197_122, "SA-1B": 11_185_362}
CHANNELS, GRID, BLOCK, SIZE, VIEW = 256, 32, 8, 1024, 224
"""SAM's neck, the grid and the codec's block by default; pixels of the teacher's input, and of a view of an online teacher."""
PEAK, SHARES = 780e12, (0.3, 0.6)
DISKS, CORES, EPOCHS = (1e9, 2e9, 5e9), 16, 400
BITS = (2.0, 4.0)
"""Around the measured one, which is another teacher's."""


def figure(page: str, pattern: str) -> float:
    """The number that `pattern` captures in a page of this repository. Raises ValueError unless it is there once."""
    found = set(re.findall(pattern, (ROOT / page).read_text()))
    if len(found) != 1:
        raise ValueError(f"{page}: {pattern!r} is there {len(found)} times, expected one figure")
    return float(found.pop().replace(",", ""))


def newest(topic: str) -> str:
    """The latest result page of a topic, relative to the repository."""
    return str(max((ROOT / "benchmarks" / "results").glob(f"{topic}-2cpu-*.md")).relative_to(ROOT))


RESULTS, CODEC, SPEED = "docs/results.md", "docs/codec.md", "docs/performance.md"
SCALE, VERIFY, TRAIN = newest("scale"), newest("verify"), newest("train")
# What is measured: the words for it, its page, where in the page, its unit.
MEASURED = {
    "bits": ("codes at an error of 1 % (`efficientnet_lite0`)", RESULTS, r"40\.0 KB, ([\d.]+) bits a value", "bits a value"),
    "jpeg": ("JPEG of short side 256", RESULTS, r"short side 256\) \| ([\d.]+) KB", "KB"),
    "source": ("source JPEG", RESULTS, r"source JPEG \| ([\d.]+) KB", "KB"),
    "records": ("commit records", SCALE, r"records (\d+) bytes a sample", "bytes a sample"),
    "manifest": ("manifest.parquet", SCALE, r"the manifest takes ([\d.]+) bytes a sample", "bytes a sample"),
    "listing": ("listing.parquet, kept twice", SCALE, r"\(([\d.]+) at 1,280,000\)", "bytes a sample"),
    "cat": ("`verify`, of what `cat` reads, files in memory", VERIFY, r"\| warm \|.* (\d+)% \|", "%"),
    "blake3": ("BLAKE3, two cores", VERIFY, r"BLAKE3 alone reads (\d+) GB/s", "GB/s"),
    "commit": ("committing 512 samples of 112 x 32 x 32", VERIFY, r"512 samples is committed in ([\d.]+) s", "s of a core"),
    "decode": (
        "codes unpacked and checked, one core",
        CODEC,
        r"machine that made these figures: ([\d.]+) GB/s of codes",
        "GB/s",
    ),
    "prepare": ("images and codes prepared, one core", SPEED, r"cores prepares ([\d,]+) images a second", "a second"),
    "vit_t": ("SAMI step of `vit_t` at 224 px", SPEED, r"GFLOP an image, forward and backward \| ([\d.]+)", "GFLOP an image"),
    "vit_s": ("SAMI step of `vit_s` at 224 px", SPEED, r"GFLOP an image.*\| [\d.]+ \| ([\d.]+) \|", "GFLOP an image"),
    "slow": ("ViT-H at 1024 px, two cores", TRAIN, r"\n\| 1024 \| ([\d.]+) \| 1 \|", "images/s"),
    "fast": ("ViT-H at 224 px, two cores", TRAIN, r"\n\| 224 \| ([\d.]+) \| 1 \|", "images/s"),
}


# Stages of the result page, and what they are called in its table of what has changed since.
SINCE = {
    "list the samples": "`Cache.table`",
    "`verify --quick`": "checked with `--quick`",
    "the loader's table": "`CacheSamples`",
}


@cache
def measured(name: str) -> float:
    _, page, pattern, _ = MEASURED[name]
    return figure(page, pattern)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What benchmarks/scale.py measured of a stage."""

    seconds: float
    """By the clock, a sample, in the largest cache."""
    memory: float
    """Bytes a sample; where the page says that it has become less since the run, that."""


@cache
def stage(title: str) -> Stage:
    """The row of the result page that begins with `title`."""
    (row,) = [line for line in (ROOT / SCALE).read_text().splitlines() if line.startswith(f"| {title}")]
    (head,) = [line for line in (ROOT / SCALE).read_text().splitlines() if line.startswith("|  |")]
    largest = max(int(cell.replace(",", "")) for cell in head.split(" | ") if re.fullmatch(r"[\d,]+", cell))
    seconds = float(re.findall(r"\| ([\d.e-]+) s[,( \d.e+)-]*\d+ MiB", row)[-1])
    memory = float(re.findall(r"\| (\d+) B \|$", row)[0])
    if title in SINCE:
        memory = figure(SCALE, rf"\n\| {re.escape(SINCE[title])} \|.*\| (\d+) B \|")
    return Stage(seconds=seconds / largest, memory=memory)


@cache
def multiplications(size: int) -> float:
    """Of SAM's ViT-H for one image of `size` pixels a side."""
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model: Any = timm.create_model("samvit_huge_patch16", img_size=size).eval()
        model.forward_features(torch.empty(1, 3, size, size))
    return counter.get_total_flops() / 2


def layout(samples: int, kept: float = 1.0) -> ShardLayout:
    """Of a cache of SAM's neck, `kept` of whose coefficients are stored."""
    rows = round(kept * CHANNELS * BLOCK**2)
    codec = SimpleNamespace(channels=CHANNELS, dtype="int8", sample_shape=lambda grid: (rows, grid // BLOCK, grid // BLOCK))
    return choose_layout(cast(Any, codec), GRID, samples)


def teacher_seconds(share: float, size: int = SIZE) -> float:
    """Of a GPU, for one image."""
    return 2 * multiplications(size) / (share * PEAK)


def step_seconds(student: str, share: float) -> float:
    """The same, for a step of training."""
    return measured(student) * 1e9 / (share * PEAK)


def code_bytes(bits: float) -> float:
    return bits / 8 * CHANNELS * GRID**2


def sample_bytes(bits: float) -> float:
    """Everything a cache holds of a sample."""
    rest = measured("records") + measured("manifest") + 2 * measured("listing")
    return code_bytes(bits) + 1e3 * measured("jpeg") + rest


def break_even(extraction: float, online: float, overhead: float = 0.0) -> float:
    """Epochs after which an extraction of `extraction` seconds an image has paid for itself against `online` more seconds an
    image and epoch, where a step from the cache takes `overhead` seconds an image longer: E with e + E o = E t."""
    return extraction / (online - overhead)


def lost(deaths: float) -> float:
    """The share of all teacher time that is lost to `deaths` for every shard, each of which begins a shard anew."""
    return 1 - deaths / expm1(deaths)


def size(count: float) -> str:
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} KB"


def span(seconds: float) -> str:
    for unit, scale in (("days", 172_800.0), ("h", 7200.0), ("min", 120.0)):
        if seconds >= scale:
            return f"{seconds / (86_400 if unit == 'days' else scale / 2):.3g} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def table(rows: list[tuple[str, Any]], head: str = "") -> list[str]:
    """Lines of Markdown, a column a data set; a row's second entry is called with the data set's number of images."""
    lines = [f"| {head} | " + " | ".join(DATA_SETS) + " |", "|---" * (1 + len(DATA_SETS)) + "|"]
    return lines + [f"| {title} | " + " | ".join(cell(count) for count in DATA_SETS.values()) + " |" for title, cell in rows]


def figures() -> list[str]:
    lines = ["| measured here | | where |", "|---|---|---|"]
    for name, (words, page, _, unit) in MEASURED.items():
        link = page.removeprefix("docs/") if page.startswith("docs/") else f"../{page}"
        lines.append(f"| {words} | {measured(name):,g} {unit} | [{Path(page).name}]({link}) |")
    return lines


def space() -> list[str]:
    bits = measured("bits")
    return table(
        [
            ("images", lambda n: f"{n:,}"),
            ("float16, not compressed", lambda n: size(n * code_bytes(16))),
            *((f"codes at {b:g} bits a value", lambda n, b=b: size(n * code_bytes(b))) for b in sorted((bits, *BITS))),
            ("JPEGs of short side 256", lambda n: size(n * 1e3 * measured("jpeg"))),
            ("commit records", lambda n: size(n * measured("records"))),
            ("`manifest.parquet`", lambda n: size(n * measured("manifest"))),
            ("`listing.parquet`, twice", lambda n: size(2 * n * measured("listing"))),
            (f"**the cache at {bits:g} bits**", lambda n: f"**{size(n * sample_bytes(bits))}**"),
            *((f"at {b:g} bits", lambda n, b=b: size(n * sample_bytes(b))) for b in BITS),
        ]
    )


def shards(samples: int) -> int:
    return ceil(samples / layout(samples).shard_samples)


def files(shards: int) -> int:
    """Codes, images and record of each shard; head, static files, copies, manifest, root."""
    return 3 * shards + len(STATIC_FILES) + 4


def chunks(samples: int) -> int:
    return ceil(samples / layout(samples).chunk_samples)


def counts() -> list[str]:
    return table(
        [
            ("samples a shard, a chunk", lambda n: f"{layout(n).shard_samples}, {layout(n).chunk_samples}"),
            ("shards", lambda n: f"{shards(n):,}"),
            ("files = PUTs of an extraction, each on condition", lambda n: f"{files(shards(n)):,}"),
            (
                "the same if under half of the coefficients are kept",
                lambda n: f"{files(ceil(n / layout(n, 0.5).shard_samples)):,}",
            ),
            (
                "bytes of a shard's codes and images, mean",
                lambda n: size(layout(n).shard_samples * sample_bytes(measured("bits"))),
            ),
            ("LISTs to see what is committed", lambda n: f"{ceil(shards(n) / 1000):,}"),
            ("GETs of a whole verification", lambda n: f"{files(shards(n)):,}"),
            ("GETs of `verify --quick` (and HEADs)", lambda n: f"{files(shards(n)) - 2 * shards(n):,} ({2 * shards(n):,})"),
            ("GETs of an epoch, whole files", lambda n: f"{2 * shards(n):,}"),
            ("GETs of an epoch, chunk by chunk and JPEG by JPEG", lambda n: f"{chunks(n) + n:,}"),
        ]
    )


def extraction() -> list[str]:
    commit = measured("commit") / 512 * CHANNELS / 112
    rows: list[tuple[str, Any]] = []
    for share in SHARES:
        seconds = teacher_seconds(share)
        rows += [
            (f"GPU-hours at {percent(share)}", lambda n, s=seconds: f"{n * s / 3600:,.1f}"),
            (f"of 8 GPUs at {percent(share)}", lambda n, s=seconds: span(n * s / 8)),
        ]
    rows += [
        (
            f"images/s of a GPU, {' / '.join(map(percent, SHARES))}",
            lambda n: " / ".join(f"{1 / teacher_seconds(s):.0f}" for s in SHARES),
        ),
        (
            "a death loses at most a shard: GPU seconds",
            lambda n: " / ".join(f"{layout(n).shard_samples * teacher_seconds(s):.1f}" for s in SHARES),
        ),
        (
            "lost to a death of each worker every hour",
            lambda n: " / ".join(f"{100 * lost(layout(n).shard_samples * teacher_seconds(s) / 3600):.2f} %" for s in SHARES),
        ),
        (
            "committing, cores that keep up with a GPU",
            lambda n: " / ".join(f"{commit / teacher_seconds(s):.2f}" for s in SHARES),
        ),
        ("reading and comparing the images on resume, 1 GB/s", lambda n: span(n * 1e3 * measured("source") / 1e9)),
    ]
    return table(rows)


def metadata() -> list[str]:
    rows = []
    for words, title in (
        ("create", "create"),
        ("seal", "seal (`seal_cache`)"),
        ("list the images", "list the images"),
        ("list the samples (`Cache.table()`)", "list the samples"),
        ("`inspect`", "`inspect`"),
        ("`verify --quick`", "`verify --quick`"),
        ("`verify --deep`, all but the codes", "`verify --deep`"),
        ("an epoch's order", "shuffle"),
        ("the loader's table", "the loader's table"),
    ):
        of = stage(title)
        rows.append((words, lambda n, of=of: f"{span(n * of.seconds)}, {size(n * of.memory)}"))
    return table(rows, "time, memory")


def verification() -> list[str]:
    whole = sample_bytes(measured("bits"))
    rows = [
        (f"`verify`, disk of {rate / 1e9:g} GB/s", lambda n, rate=rate: span(n * whole / (rate * measured("cat") / 100)))
        for rate in DISKS
    ]
    codes = CHANNELS * GRID**2 / (1e9 * measured("decode")) + whole / (1e9 * measured("blake3") / 2)
    rows += [
        (f"`verify --deep`, {CORES} cores: decoding and BLAKE3", lambda n: span(n * codes / CORES)),
        ("`verify --deep`: records and manifest, one core", lambda n: span(n * stage("`verify --deep`").seconds)),
    ]
    return table(rows)


def pay_off() -> list[str]:
    lines = [
        "| extraction | teacher online | online at 1024 px | online at 224 px | 224 px, `vit_s` 3 % slower from the cache |"
    ]
    lines += ["|---|---|---|---|---|"]
    for own in SHARES:
        for theirs in SHARES:
            cells = [break_even(teacher_seconds(own), teacher_seconds(theirs, size)) for size in (SIZE, VIEW)]
            late = 0.03 * step_seconds("vit_s", theirs)
            cells.append(break_even(teacher_seconds(own), teacher_seconds(theirs, VIEW), late))
            lines.append(f"| {percent(own)} | {percent(theirs)} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    slow, fast = measured("slow"), measured("fast")
    lines.append(
        f"| measured on two CPU cores | | {break_even(1 / slow, 1 / slow):.1f} | {break_even(1 / slow, 1 / fast):.1f} | |"
    )
    return lines


def campaign() -> list[str]:
    """GPU-hours of pretraining on ImageNet-1K."""
    count = DATA_SETS["ImageNet-1K"]
    head = [
        f"{EPOCHS} epochs of ImageNet-1K, GPU-hours",
        "the steps",
        "with the extraction",
        "online at 224 px",
        "online at 1024 px",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for student in ("vit_t", "vit_s"):
        for share in SHARES:
            steps = EPOCHS * count * step_seconds(student, share) / 3600
            once = count * teacher_seconds(share) / 3600
            online = [steps + EPOCHS * count * teacher_seconds(share, size) / 3600 for size in (VIEW, SIZE)]
            cells = [steps, steps + once, *online]
            times = ["", "", *(f" ({hours / (steps + once):.1f} x)" for hours in online)]
            texts = [f"{hours:,.1f}{more}" for hours, more in zip(cells, times, strict=True)]
            lines.append(f"| `{student}` at {percent(share)} | " + " | ".join(texts) + " |")
    return lines


def feeding() -> list[str]:
    lines = ["| a GPU that trains | images/s | codes and JPEGs read | cores that prepare them |", "|---|---|---|---|"]
    codes = CHANNELS * GRID**2
    # Prepared were 51 KB of codes an image; what is more has to be unpacked, too.
    core = 1 / measured("prepare") + (codes - 51_200) / (1e9 * measured("decode"))
    for student in ("vit_t", "vit_s"):
        for share in SHARES:
            rate = 1 / step_seconds(student, share)
            read = rate * (code_bytes(measured("bits")) + 1e3 * measured("jpeg"))
            lines.append(f"| `{student}` at {percent(share)} | {rate:,.0f} | {size(read)}/s | {rate * core:.1f} |")
    return lines


TABLES = {
    "figures": figures,
    "space": space,
    "counts": counts,
    "extraction": extraction,
    "metadata": metadata,
    "verification": verification,
    "pay-off": pay_off,
    "campaign": campaign,
    "feeding": feeding,
}


def filled(page: str) -> str:
    """The page with its tables made anew. Raises ValueError where a marker is missing."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"{begin.strip()} and {end} must stand once in the page")
        page = page[: page.index(begin) + len(begin)] + "\n".join(make()) + "\n" + page[page.index(end) :]
    return page


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/scale.md")
    given = parser.parse_args(arguments)
    for name, make in TABLES.items():
        print(f"\n{name}\n", *make(), sep="\n")
    if given.write:
        PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
