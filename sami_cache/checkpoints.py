"""Checkpoints of a training run: safetensors and JSON, never pickles; whole or not there.

    RUN/checkpoints/step-00000123/
        model.safetensors       the model's parameters and buffers, by name
        optimizer.safetensors   AdamW's state, as "<parameter>/<key>"
        state.json              step, configuration, size and BLAKE3 digest of the two; sealed by a digest of its own

`step` counts the optimizer steps that are done. A directory is written under another name, made durable and renamed.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sami_cache.errors import DamageError, DiskFullError, IdentityError, SamiCacheError, one_line
from sami_cache.store.files import open_to_read, read_file

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_UNFINISHED = ".unfinished-"


class NotFiniteError(SamiCacheError):
    """A loss or a weight became NaN or infinite."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was read back, on the CPU; every byte has been checked against its digest."""

    step: int
    config: dict[str, Any]
    progress: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    config: Mapping[str, Any],
    progress: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-<step>` durably, then remove all but the newest `keep`. `config` and `progress` must fit into JSON.

    Raises `NotFiniteError` where a weight is not finite and `DiskFullError` when the disk is full; the checkpoints that
    were there before are then untouched.
    """
    if bad := [name for name, tensor in model.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]:
        raise NotFiniteError(f"no checkpoint written at step {step}: {len(bad)} weights are not finite, first {bad[0]}")
    final, unfinished = checkpoint_path(folder, step), folder / f"{_UNFINISHED}{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for name, tensors in ((MODEL, model), (OPTIMIZER, optimizer)):
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, unfinished / name)
        files = {name: _fingerprint(unfinished / name) for name in (MODEL, OPTIMIZER)}
        state = {"step": step, "config": dict(config), "progress": dict(progress), "files": files}
        (unfinished / STATE).write_text(json.dumps({"state": state, "blake3": _digest_json(state)}, indent=1))
        for path in (*unfinished.iterdir(), unfinished):
            fsync(path)
        unfinished.rename(final)
        fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        where = f"checkpoint of step {step} not written to {folder}"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error).lower():
            raise DiskFullError(f"{where}: the disk is full. Free some space and continue the run with --resume") from error
        raise SamiCacheError(f"{where}: {error}") from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check one checkpoint. Raises `DamageError` naming the file that is missing or not as it was written."""
    try:
        sealed = json.loads(read_file(path / STATE))
        state = sealed["state"]
        if sealed["blake3"] != _digest_json(state):
            raise DamageError(f"{path / STATE}: the content is not what its digest says")
        if not (isinstance(state["step"], int) and isinstance(state["config"], dict) and isinstance(state["progress"], dict)):
            raise TypeError("step, config or progress of another type")
        for name in (MODEL, OPTIMIZER):
            os.close(open_to_read(path / name))  # a pipe in its place would be waited for
            if (found := _fingerprint(path / name)) != state["files"][name]:
                raise DamageError(f"{path / name}: expected {one_line(state['files'][name])}, found {found}")
        return Checkpoint(
            step=state["step"],
            config=state["config"],
            progress=state["progress"],
            # A copy of its own for every tensor: slices of the file are not aligned as torch aligns, and arithmetic may follow.
            model={name: tensor.clone() for name, tensor in load_file(path / MODEL).items()},
            optimizer={name: tensor.clone() for name, tensor in load_file(path / OPTIMIZER).items()},
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise DamageError(f"{path}: not a readable checkpoint ({type(error).__name__}: {one_line(error)})") from error


def load_newest(folder: Path, on_damage: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
    """The newest checkpoint that is intact, or None where there is none at all; `on_damage` hears of every one passed over.

    Raises `DamageError` where there are checkpoints but none can be used.
    """
    messages = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path)
        except DamageError as error:
            messages.append(str(error))
            on_damage(f"checkpoint damaged, falling back to the one before: {error}")
    if messages:
        raise DamageError("no intact checkpoint; start anew in another directory. " + "; ".join(messages))
    return None


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in a run's `checkpoints/`."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.name[5:].isdecimal())


def set_aside_after(folder: Path, step: int) -> None:
    """Clear the way for a run that goes on at `step`: newer checkpoints (damaged ones) are renamed, unfinished ones removed."""
    for path in list_checkpoints(folder):
        if int(path.name[5:]) > step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def load_weights(model: nn.Module, path: Path) -> None:
    """Start from these weights: strictly, into `model`, in place.

    `path` is a safetensors file, a checkpoint directory, or a run's directory (its newest intact checkpoint).
    Raises `IdentityError` listing the parameters that are missing, left over or of another shape; `DamageError` where the
    file cannot be read. Pickles (`.pth`, `.pt`, `.bin`) are refused.
    """
    put_weights(model, _read_weights(Path(path)), str(path))


def put_weights(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Copy `weights` into `model`, strictly. Raises `IdentityError` that lists up to eight parameters that do not fit."""
    own = model.state_dict()
    problems = [f"missing: {name}" for name in own if name not in weights]
    problems += [f"not in the model: {name}" for name in weights if name not in own]
    problems += [
        f"{name}: expected {tuple(own[name].shape)}, found {tuple(weights[name].shape)}"
        for name in own
        if name in weights and own[name].shape != weights[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise IdentityError(
            f"{origin} holds the weights of another model ({'; '.join(problems[:8])}{more}). "
            "Give the file of the same student, decoder and target"
        )
    model.load_state_dict(dict(weights))


def _read_weights(path: Path) -> dict[str, Tensor]:
    if (path / STATE).is_file():
        return load_checkpoint(path).model
    if path.is_dir():
        newest = load_newest(path / "checkpoints")
        if newest is None:
            raise SamiCacheError(f"{path} holds no checkpoint: give a run, one of its checkpoints, or a .safetensors file")
        return newest.model
    if path.suffix != ".safetensors":
        raise SamiCacheError(f"{path}: expected a .safetensors file; pickles can run code and are not read")
    try:
        os.close(open_to_read(path))
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DamageError(f"{path}: not readable as safetensors ({one_line(error)})") from error


def fsync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "blake3": blake3().update_mmap(path).hexdigest()}


def _digest_json(value: Any) -> str:
    return blake3(json.dumps(value, sort_keys=True).encode()).hexdigest()
