"""Models of `finetune detection` and `finetune semantic`: found in a run, written to one file, and read from it again."""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from sami_cache import __version__
from sami_cache.checkpoints import load_newest
from sami_cache.errors import SamiCacheError
from sami_cache.models.weights import State
from sami_cache.store.files import fsync_directory, write_durably

Kind = Literal["detector", "semantic"]
_COMMANDS = {"detector": "detection", "semantic": "semantic"}


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """What is needed to build one."""

    settings: dict[str, Any]
    """The run's own of this kind: student, shape, sizes, and `categories` or `classes` by their numbers."""
    state: State
    source: str
    """For messages."""
    step: int


def find_task_model(run_or_file: Path, kind: Kind) -> TaskModel:
    """The newest intact checkpoint of a run, or what `write_task_model` made of one. SamiCacheError where it is neither."""
    path = run_or_file
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise SamiCacheError(f"{path}: damaged, or no safetensors ({error})") from error
        if found.get("task") != kind:
            raise SamiCacheError(f"{path}: expected an export of a `finetune {_COMMANDS[kind]}` run, found another file")
        settings, step = json.loads(found["settings"]), int(found["step"])
        return TaskModel(settings=settings, state=state, source=str(path), step=step)
    checkpoint = load_newest(path / "checkpoints") if (path / "checkpoints").is_dir() else None
    if checkpoint is None or kind not in checkpoint.config:
        raise SamiCacheError(f"{path}: no run of `sami-cache finetune {_COMMANDS[kind]}` with a checkpoint is there")
    source = f"the checkpoint of step {checkpoint.step} of {path}"
    return TaskModel(settings=checkpoint.config[kind], state=checkpoint.model, source=source, step=checkpoint.step)


def write_task_model(run: Path, path: Path, kind: Kind) -> TaskModel:
    """Write a run's model as safetensors, float32, with its settings as metadata; returns what was written.

    Raises SamiCacheError where something is there already, or the place cannot be written to.
    """
    model = find_task_model(run, kind)
    if path.exists():
        raise SamiCacheError(f"{path} is there: nothing was overwritten. Remove it, or write to another file with --out FILE.")
    metadata = {"format": "pt", "task": kind, "settings": json.dumps(model.settings), "step": str(model.step)}
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(temporary, save(model.state, metadata | {"sami_cache": __version__}))
        temporary.rename(path)
        fsync_directory(path.parent)
    except OSError as error:
        raise SamiCacheError(f"{path}: not written ({error.strerror}). Give another place with --out FILE.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return model
