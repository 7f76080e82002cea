"""The whole way on photographs that Python packages ship: what `make demo` runs. Needs no network and no GPU."""

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.export import export
from pipelines.extract import extract
from pipelines.jobs import ExtractConfig, Progress
from pipelines.report import ReportResult, report
from pipelines.running import Prepared
from pipelines.train import TrainingConfig, train
from pipelines.verify import VerifyConfig, verify
from sami_cache.checkpoints import checkpoint_path
from sami_cache.errors import DamageError, SamiCacheError

# Package, file and about how large the tiles are, in pixels. Only pictures that a camera, a telescope or a microscope took;
# the two that show least get large tiles, so that they do not outnumber the others. The right half of the stereo pair
# (motorcycle_right) would show again what the left one does.
PHOTOS = (
    ("skimage", "data/astronaut.png", 128),
    ("skimage", "data/brick.png", 160),
    ("skimage", "data/camera.png", 128),
    ("skimage", "data/chelsea.png", 112),
    ("skimage", "data/coffee.png", 112),
    ("skimage", "data/coins.png", 112),
    ("skimage", "data/grass.png", 160),
    ("skimage", "data/gravel.png", 160),
    ("skimage", "data/hubble_deep_field.jpg", 240),
    ("skimage", "data/ihc.png", 160),
    ("skimage", "data/moon.png", 160),
    ("skimage", "data/motorcycle_left.png", 128),
    ("skimage", "data/retina.jpg", 320),
    ("skimage", "data/rocket.jpg", 112),
    ("sklearn", "datasets/images/china.jpg", 112),
    ("sklearn", "datasets/images/flower.jpg", 112),
)
JITTER = 0.2
# An early stage of the teacher (stride 8, averaged to 14 x 14), because a few thousand views teach a new student more about
# local features than about deep ones: held-out cosine 0.45 after 4000 views, with the default layer 0.32 after 3840 (decoder
# 256 x 2, grid 16; 0.36 at grid 7 with this decoder, 4000 views).
EXTRACTION: dict[str, Any] = {"teacher": "efficientnet_lite0", "layer": "2", "image_size": 224, "grid": 14}
# The published decoder, 8 blocks of 512, would be most of the work; and 200 images want small batches and a high rate.
TRAINING: dict[str, Any] = {
    "holdout": 0.15,
    "decoder_width": 128,
    "decoder_depth": 1,
    "batch_size": 8,
    "base_lr": 0.032,
    "steps": 700,
    "log_every": 10,
    "evaluate_every": 100,
}


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Where everything lies, and what came out."""

    photos: Path
    images: int
    cache: Path
    run: Path
    encoder: Path
    """The student for stock timm."""
    report: ReportResult
    seconds: float


def demo(out: Path, say: Callable[[str], None] = print) -> DemoResult:
    """Cut photographs into `out`/photos, then extract, verify, train, export and report, all below `out`.

    What an earlier demo finished is not done again, and what it left unfinished is continued. Raises SamiCacheError where
    scikit-image or scikit-learn is missing, and whatever the stages raise.
    """
    started = time.perf_counter()
    photos, cache, run = out / "photos", out / "cache.zarr", out / "runs" / "vit_t"
    count = cut_photos(photos)
    say(f"{count} images in {photos}: tiles that do not overlap, of {len(PHOTOS)} photographs in scikit-image and scikit-learn")

    extraction = {**EXTRACTION, "data": photos, "cache": cache}
    say(_command("extract", extraction))
    summary = extract(ExtractConfig(**extraction), _extraction_lines(say))
    samples = summary.root["ok"]
    say(
        f"  {samples} embeddings, {summary.bytes / samples / 1e3:.1f} KB each with JPEG and records, in {summary.seconds:.1f} s"
        if summary.samples_done
        else f"  {samples} embeddings, all there already"
    )

    say(_command("verify", {"cache": cache}))
    checked = verify(VerifyConfig(cache=cache)).report
    if not checked.clean:
        raise DamageError(
            f"{cache}: {checked.findings[0].path}: {checked.findings[0].what}. `sami-cache verify --cache {cache} --repair` "
            "mends it; then run the demo again."
        )
    say(f"  clean: {checked.samples} samples, {checked.bytes_read / 1e6:.1f} MB read, root {checked.root}")

    _train(run, cache, say)

    say(_command("export", {}, run))
    exported = export(run)
    say(f"  {exported.path}: {exported.parameters / 1e6:.1f} M parameters, loads strictly into timm's {exported.timm_name}")

    say(_command("report", {}, run))
    result = DemoResult(
        photos=photos,
        images=count,
        cache=cache,
        run=run,
        encoder=exported.path,
        report=report(run),
        seconds=time.perf_counter() - started,
    )
    say(_closing_words(result))
    return result


def cut_photos(out: Path) -> int:
    """Cut the photographs into JPEGs out/<photograph>/<row>-<column>.jpg; how many there are. The same bytes every time.

    The tiles of a photograph do not overlap and differ in size and shape. Files that are there already are left as they
    are. Raises SamiCacheError where the packages that ship the photographs are not installed.
    """
    count = 0
    for package, file, size in PHOTOS:
        path = _package_folder(package) / file
        if not path.exists():
            raise SamiCacheError(
                f"{path} is missing: this version of {package} ships other photographs. pip install 'sami-cache[demo]' "
                "installs one that the demo knows."
            )
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        folder = out / path.stem
        folder.mkdir(parents=True, exist_ok=True)
        for name, tile in _tiles(photo, size):
            _write_once(folder / f"{name}.jpg", tile)
            count += 1
    return count


def _package_folder(package: str) -> Path:
    found = find_spec(package)  # where it lies, without running it: importing scikit-image may go looking for a network
    if found is None or not found.submodule_search_locations:
        raise SamiCacheError(
            "the demo's photographs come with scikit-image and scikit-learn, which are not installed: "
            "pip install 'sami-cache[demo]'"
        )
    return Path(found.submodule_search_locations[0])


def _tiles(photo: Image.Image, size: int) -> list[tuple[str, Image.Image]]:
    """The photograph cut into rows, and each row, differently, into tiles of about `size` x `size` pixels."""
    rng = np.random.default_rng([photo.width, photo.height, size])
    tiles = []
    rows = _cuts(rng, photo.height, size)
    for row, (top, bottom) in enumerate(pairwise(rows)):
        columns = _cuts(rng, photo.width, size)
        for column, (left, right) in enumerate(pairwise(columns)):
            tiles.append((f"{row:02d}-{column:02d}", photo.crop((left, top, right, bottom))))
    return tiles


def _cuts(rng: np.random.Generator, length: int, size: int) -> list[int]:
    """Where to cut `length` pixels into parts of about `size`: the two ends, and places a little off even ones."""
    parts = max(1, round(length / size))
    places = np.arange(1, parts) + rng.uniform(-JITTER, JITTER, parts - 1)
    return [0, *(places * length / parts).astype(int).tolist(), length]


def _write_once(path: Path, tile: Image.Image) -> None:
    if path.exists():
        return
    encoded = BytesIO()
    tile.save(encoded, "JPEG", quality=92)
    # Under another name first: a file that an interrupted demo left half written would be taken for a finished one.
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_bytes(encoded.getvalue())
    unfinished.rename(path)


def _train(run: Path, cache: Path, say: Callable[[str], None]) -> None:
    started = (run / "config.json").exists()
    settings: dict[str, Any] = {"student": "vit_t", "cache": cache, "run": run, **TRAINING}
    say(_command("train", settings | ({"resume": True} if started else {})))
    if checkpoint_path(run / "checkpoints", TRAINING["steps"]).exists():
        say("  finished already")
        return

    def on_start(prepared: Prepared) -> None:
        counts = prepared.settings["samples"]
        say(f"  {counts['train']} images to train on, {counts['held_out']} held out. Those are pieces of the same photographs:")
        say("  the held-out figures say whether the student learns, not how it would do on pictures of other things.")

    def on_log(line: dict[str, Any]) -> None:
        if "heldout_cosine" in line:
            loss = f"loss {line['loss']:.4f}, " if "loss" in line else ""
            speed = f", {line['images_per_s']:.0f} images/s" if "loss" in line else ""
            held = f"held out: loss {line['heldout_loss']:.4f}, cosine {line['heldout_cosine']:.4f}"
            say(f"  step {line['step']}/{TRAINING['steps']}: {loss}{held}{speed}")

    train(TrainingConfig(**settings, resume=started), on_log, on_start)


def _extraction_lines(say: Callable[[str], None]) -> Callable[[Progress], None]:
    """Says how far an extraction is, every ten seconds."""
    last = time.monotonic()

    def on_progress(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last > 10:
            what = "sample the codec is fitted on" if progress.stage == "fit" else "cache"
            say(f"  {what}: {progress.done}/{progress.total} images")
            last = time.monotonic()

    return on_progress


def _command(name: str, options: dict[str, Any], *arguments: Path) -> str:
    words = [name, *map(str, arguments)]
    for option, value in options.items():
        words += [f"--{option.replace('_', '-')}", *([] if value is True else [f"{value}"])]
    return f"\n$ sami-cache {shlex.join(words)}"


def _closing_words(demo: DemoResult) -> str:
    found, before, after = demo.report, demo.report.before, demo.report.after
    return "\n".join(
        [
            f"  {found.page}",
            "",
            f"Done in {demo.seconds:.0f} s.",
            f"  training loss                            {found.loss_first:.3f} -> {found.loss_last:.3f}   (of one batch each)",
            f"  loss on held-out images                  {before['heldout_loss']:.3f} -> {after['heldout_loss']:.3f}   "
            f"({after['heldout_loss_of_mean']:.3f} is had by always predicting the mean)",
            f"  cosine to the teacher on these           {before['heldout_cosine']:.3f} -> {after['heldout_cosine']:.3f}   "
            f"(between features less their mean; {TRAINING['steps']} steps)",
            "",
            "So short a training gets right what the student saw; hidden cells are still much like the picture's average.",
            f"  picture   {found.reconstruction_picture}   image | teacher's features | student's reconstruction",
            f"  curve     {found.loss_picture}",
            f"  page      {found.page}   both, with all settings",
            f"  cache     {demo.cache}",
            f"  run       {demo.run}   checkpoints, metrics.jsonl, TensorBoard",
            f"  encoder   {demo.encoder}   for stock timm",
            "",
            "Next, your own images in data/, and SAM itself as the teacher. --weights is Meta's file of 2.4 GB, from",
            "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth (without it the hub is asked):",
            "  sami-cache extract --teacher vit_h --data data --weights sam_vit_h_4b8939.pth",
            "  sami-cache verify",
            "  sami-cache train --student vit_s",
            "`sami-cache extract --teacher vit_h --data data --weights ... --plan` says first what it takes.",
        ]
    )
