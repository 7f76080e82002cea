"""The directory of a training run: who may write there, what was configured, what was measured.

RUN/config.json       the configuration, which a resumed run must bring again; versions, hardware and the steps at which it was
                      started, by how many processes: only recorded
RUN/metrics.jsonl     one JSON object a logged step, every step once, also after a crash
RUN/tensorboard/      the same for the eyes
RUN/checkpoints/      see checkpoints.py
"""

import fcntl
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from logging import getLogger
from pathlib import Path
from typing import IO, Any

import torch

from sami_cache.checkpoints import Checkpoint, fsync, load_newest, set_aside_after
from sami_cache.errors import DamageError, IdentityError, SamiCacheError
from sami_cache.store.files import read_file

_log = getLogger(__name__)
_HIDDEN = (".lock", "config.json.unfinished")


def open_run(
    run_dir: Path, settings: Mapping[str, Any], surroundings: Mapping[str, Any], *, resume: bool, free_fields: Sequence[str]
) -> tuple[Checkpoint | None, IO[str]]:
    """Claim `run_dir` and write its configuration. Returns where to go on from (None: at the start) and the lock to hold.

    `surroundings` is recorded beside `settings`, and never compared. Raises
    `SamiCacheError` where the directory is taken or is none of ours, `IdentityError` listing the settings that differ,
    `DamageError` where no checkpoint is intact.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise SamiCacheError(f"{run_dir} is a file: give a directory with --run")
    there = sorted(path.name for path in run_dir.iterdir() if path.name not in _HIDDEN) if run_dir.exists() else []
    if there and not resume:
        raise SamiCacheError(
            f"{run_dir} is not empty: --resume continues the run in it, --run DIR starts one in another directory "
            f"(or remove {run_dir} to start anew)"
        )
    if there and "config.json" not in there:
        raise SamiCacheError(f"{run_dir} holds {', '.join(there[:3])} but no run to continue: give the run's directory")
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = _lock(run_dir)
    try:
        checkpoint = load_newest(run_dir / "checkpoints", on_damage=_log.warning)
        if there:
            _compare(checkpoint.config if checkpoint else _read_settings(run_dir), settings, free_fields, run_dir)
            if checkpoint is None:
                _log.warning("%s has no checkpoint yet: starting at step 0", run_dir)
            set_aside_after(run_dir / "checkpoints", checkpoint.step if checkpoint else -1)
        step = checkpoint.step if checkpoint else 0
        parts = settings.get("train", {}).get("accumulate")
        start = {"step": step, "processes": surroundings.get("processes"), "accumulate": parts}
        starts = [*(earlier for earlier in _read_starts(run_dir) if earlier["step"] < step), start]
        unfinished = run_dir / "config.json.unfinished"
        unfinished.write_text(json.dumps({"config": settings, **surroundings, "starts": starts}, indent=2) + "\n")
        fsync(unfinished)
        unfinished.rename(run_dir / "config.json")
        fsync(run_dir)
    except BaseException:
        lock.close()
        raise
    return checkpoint, lock


def surroundings(device: torch.device, processes: int) -> dict[str, Any]:
    """What a result may depend on besides its settings: versions and hardware."""
    packages = {package: version(package) for package in ("timm", "numpy", "safetensors")}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), **packages},
        "hardware": {"device": str(device), "gpu": gpu, "machine": platform.machine(), "cpus": os.cpu_count()},
        "processes": processes,
        "threads": torch.get_num_threads(),
    }


class RunLog:
    """`metrics.jsonl` and TensorBoard of a run that goes on after `step` (0: starts). Lines after `step` are dropped."""

    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter  # a second to import, and only rank 0 needs it

        path = run_dir / "metrics.jsonl"
        kept = [line for line in _read_lines(path) if line["step"] <= step] if step else []
        self.last: dict[str, Any] = kept[-1] if kept else {}
        rewritten = path.with_suffix(".unfinished")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept))
        rewritten.replace(path)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else 0)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; numbers that are not finite become null, which JSON can say."""
        clean = {key: value if not isinstance(value, float) or math.isfinite(value) else None for key, value in line.items()}
        self._file.write(json.dumps(clean) + "\n")
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                self._board.add_scalar(key, value, line["step"])

    def sync(self) -> None:
        """Make what was written durable: called before a checkpoint, whose steps must be found in the log."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _lock(run_dir: Path) -> IO[str]:
    lock = (run_dir / ".lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise SamiCacheError(f"another process is training in {run_dir}: wait for it, or give another --run DIR") from error
    return lock


def _read_settings(run_dir: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_file(run_dir / "config.json"))["config"]
        if isinstance(config, dict):
            return config
        raise TypeError("config is no object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamageError(f"{run_dir / 'config.json'} cannot be read ({error}): start in another directory") from error


def _read_starts(run_dir: Path) -> list[dict[str, int]]:
    """From which step on the run was computed by how many processes, in how many parts; only recorded, so never refused."""
    try:
        return [start for start in json.loads(read_file(run_dir / "config.json"))["starts"] if isinstance(start["step"], int)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SamiCacheError):
        return []


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:  # a crash tears the line that was being written, and nothing after it counts
            break
    return lines


def _compare(saved: Mapping[str, Any], present: Mapping[str, Any], free_fields: Sequence[str], run_dir: Path) -> None:
    before, now = _flatten(saved), _flatten(present)
    differences = [
        f"{name}: {before.get(name, 'absent')!r} in the run, {now.get(name, 'absent')!r} now"
        for name in sorted(before | now)
        if before.get(name, ...) != now.get(name, ...) and not any(f"{name}.".startswith(f"{free}.") for free in free_fields)
    ]
    if differences:
        raise IdentityError(
            f"{run_dir} was started with other settings and cannot be continued with these: {'; '.join(differences)}. "
            "Give the run's own (config.json has them), or start a new run with --run DIR"
        )


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
