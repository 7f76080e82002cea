"""What commands print: progress on standard error, results on standard output."""

import re
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sami_cache.errors import SamiCacheError

if TYPE_CHECKING:
    from pipelines.jobs import Progress

STAGES = {
    "wait": "waiting for a worker",
    "check": "checking committed images",
    "copy": "copying what is there",
    "fit": "fitting the codec",
    "extract": "extracting",
    "stop": "stopping after the shard in hand (signal again to stop now),",
    "seal": "sealing",
}


def size(count: float) -> str:
    """Bytes for people: 53.2 KB, 47.8 MB, 2.70 TB."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def parse_size(text: str, option: str) -> int:
    """Bytes from `50GB`, `800 MB` or a number. Raises SamiCacheError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|B|KB|MB|GB|TB)\s*", text, re.IGNORECASE)
    if match is None:
        raise SamiCacheError(f"{option} {text}: expected a number of bytes, such as 800MB or 50GB.")
    return int(float(match[1]) * {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[match[2].upper()])


def duration(seconds: float) -> str:
    """1.2 s, 4 min 10 s, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {seconds % 60:02.0f} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class ProgressLine:
    """One line that is rewritten on a terminal, and repeated every ten seconds elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.terminal = quiet, sys.stderr.isatty()
        self._last = 0.0
        self._stage: str | None = None
        self._open = False

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._open:
            print(file=sys.stderr)

    def show(self, text: str, *, stage: str = "", last: bool = False) -> None:
        now = time.monotonic()
        due = now - self._last >= (0.1 if self.terminal else 10.0)
        if self.quiet or not (due or last or stage != self._stage):
            return
        if self.terminal:
            if stage != self._stage and self._open:
                print(file=sys.stderr)
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
            self._open = True
        else:
            print(text, file=sys.stderr, flush=True)
        self._last, self._stage = now, stage

    def note(self, text: str) -> None:
        """Say something above the line."""
        if not self.quiet:
            print(f"{chr(10) if self._open else ''}{text}", file=sys.stderr, flush=True)
            self._open, self._stage = False, None

    def extraction(self, progress: "Progress") -> None:
        """Show a moment of an extraction."""
        if progress.note:
            self.note(progress.note)
        parts = [f"{STAGES[progress.stage]} {progress.done}/{progress.total}" if progress.total else STAGES[progress.stage]]
        if progress.workers is not None:
            parts.append(f"{progress.workers} workers")
        if progress.per_second:
            parts.append(f"{progress.per_second:.1f} images/s")
        if progress.eta_seconds:
            parts.append(f"{duration(progress.eta_seconds)} left")
        if progress.stage == "extract":
            expected = f" of {size(progress.expected_bytes)}" if progress.expected_bytes else ""
            parts.append(f"{size(progress.bytes)}{expected}")
        if progress.failures:
            parts.append(f"{progress.failures} failed")
        self.show(", ".join(parts), stage=progress.stage, last=progress.done == progress.total)

    def verification(self, done: int, total: int, count: int) -> None:
        """Show a moment of a verification."""
        self.show(f"verifying shard {done}/{total}, {size(count)} read", stage="verify", last=done == total)


class TrainingLines:
    """One line a logged step, with the time that is left."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, line: dict[str, Any]) -> None:
        text = f"step {line['step']}/{self.steps}"
        if "epoch" in line:
            text += f"  epoch {line['epoch']:.2f}"
        if "loss" in line:
            text += f"  loss {line['loss']:.4f}"
            if "loss_visible" in line:
                text += f" (visible {line['loss_visible']:.4f}, masked {line['loss_masked']:.4f})"
            if "iou_first" in line:
                text += f" (IoU {line['iou_first']:.3f} at the first prompt, {line['iou_last']:.3f} after the last)"
            text += f"  {line['images_per_s']:.1f} images/s  data wait {line['data_wait_percent']:.1f} %"
        if "heldout_cosine" in line:
            text += f"  held-out loss {line['heldout_loss']:.4f}, cosine {line['heldout_cosine']:.4f}"
        if "heldout_box_miou" in line:
            text += f"  held-out mIoU: box {line['heldout_box_miou']:.3f}, 1 click {line['heldout_click_miou']:.3f}"
        if "heldout_box_AP" in line:
            text += f"  held-out AP: box {100 * line['heldout_box_AP']:.1f}, mask {100 * line['heldout_mask_AP']:.1f}"
        if "heldout_top1" in line:
            text += f"  held-out top-1 {100 * line['heldout_top1']:.2f} %, loss {line['heldout_loss']:.4f}"
        if "heldout_miou" in line:
            text += f"  held-out mIoU {100 * line['heldout_miou']:.1f}"
        if line["step"] and line["step"] < self.steps:
            text += f"  {duration(line['seconds'] / line['step'] * (self.steps - line['step']))} left"
        print(text, file=sys.stderr, flush=True)


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns, the first as wide as its longest entry."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
