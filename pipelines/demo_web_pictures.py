"""The pictures that people of `sami-cache demo-web` look at: held, encoded and asked about, with bounded memory and time."""

import base64
import io
import queue
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from sami_cache.data.images import decode_image
from sami_cache.errors import SamiCacheError
from sami_cache.inference.mask_generator import MaskGenerator, MaskGeneratorConfig
from sami_cache.inference.predictor import SamPredictor
from sami_cache.inference.rle import decode_mask
from sami_cache.models.segment_anything import Masks, SegmentAnything


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the demo takes on."""

    bytes: int = 32 << 20
    """Of a file."""
    pixels: int = 40_000_000
    pictures: int = 4
    """Held at once; then the one unused for longest goes. A page that still shows it sends it again."""
    waiting: int = 8
    """Requests that wait for the model."""
    points: int = 100
    """Clicks in one question."""
    side: int = 640
    """Longest side, in pixels, at which masks are sent; the model's own have 256. Downloads are as large as the picture."""
    photo_side: int = 2048
    """Longest side at which the picture itself is shown."""


# A quarter of the points of the command line: a page is waited for.
EVERYTHING = MaskGeneratorConfig(points_per_side=16, pred_iou_thresh=0.7, stability_score_thresh=0.9)


class Refused(SamiCacheError):
    """A request that is not answered. `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Worker:
    """One thread that does one thing after another, with a bounded queue.

    OpenMP keeps threads for every thread that calls it; in a thread of their own requests would start them anew.
    """

    def __init__(self, waiting: int) -> None:
        self._queue: queue.Queue[tuple[Future, Callable[[], Any]] | None] = queue.Queue(waiting)
        self._urgent: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._closed = False
        self._thread.start()

    def do(self, work: Callable[[], Any], *, urgent: bool = False) -> Any:
        """What `work` returns or raises. Refused where too many wait already.

        `urgent`: also in the middle of other work, where that allows for it by `do_urgent`.
        """
        future: Future = Future()
        item = (future, work)
        if urgent:
            self._urgent.append(item)
        try:
            self._queue.put_nowait((Future(), self.do_urgent) if urgent else item)
        except queue.Full:
            with suppress(ValueError):
                self._urgent.remove(item)
            raise Refused(503, "The model has too much to do at the moment. Try again in a little while.") from None
        return future.result()

    def close(self) -> None:
        """Finish what is in hand, and nothing more: a thread that is inside torch when Python ends aborts the process."""
        self._closed = True
        self._queue.put(None)
        self._thread.join()

    def do_urgent(self) -> None:
        """Do all that is urgent. Called by long work, in the worker's own thread."""
        while self._urgent:
            self._finish(*self._urgent.popleft())

    def _work(self) -> None:
        while item := self._queue.get():
            self._finish(*item)
            del item  # while waiting for more, nothing of this is to be held
        self.do_urgent()

    def _finish(self, future: Future, work: Callable[[], Any]) -> None:
        try:
            if self._closed:
                raise Refused(503, "The demo was ended.")
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)


class _Patient(SamPredictor):
    """A predictor that calls `between` every so often in long answers."""

    def __init__(self, model: SegmentAnything, between: Callable[[], None]) -> None:
        super().__init__(model)
        self._between = between

    def decode(self, *prompts: Any, **options: Any) -> Iterator[Masks]:
        for part in super().decode(*prompts, **options):
            self._between()
            yield part


@dataclass(kw_only=True)
class Picture:
    """What is held of a picture."""

    id: str
    data: bytes = field(repr=False)
    """The file as it came."""
    photo: bytes = field(repr=False)
    """A JPEG to show."""
    width: int
    height: int
    predictor: SamPredictor | None = None
    """Once it is encoded."""
    seconds: float = 0.0
    """That encoding took."""
    labels: np.ndarray | None = None
    """Of everything mode: uint16 [h, w], the number of the mask at each pixel, 0 none."""

    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return np.asarray(decode_image(self.data))


class Pictures:
    """A few pictures, and one model that answers about them. Safe to call from several threads."""

    def __init__(
        self, model: SegmentAnything, limits: Limits | None = None, everything: MaskGeneratorConfig = EVERYTHING
    ) -> None:
        self.model, self.limits, self.config = model, limits or Limits(), everything
        self._held: OrderedDict[str, Picture] = OrderedDict()
        self._lock = threading.Lock()
        self._decoding = threading.Lock()
        self._ended = threading.Event()
        # Two, so that a click need not wait for the encoder to be through with another picture.
        self._encoder, self._decoder = Worker(self.limits.waiting), Worker(self.limits.waiting)

    def close(self) -> None:
        """Finish what is in hand: within about a second, or an encoder's run."""
        self._ended.set()
        self._encoder.close()
        self._decoder.close()

    def add(self, data: bytes) -> Picture:
        """Hold a picture: a file's bytes. Raises ImageError for what is none, or too large."""
        with self._decoding:  # a file of a megabyte can be a hundred of pixels
            image = decode_image(data, max_pixels=self.limits.pixels)
            width, height = image.size
            image.thumbnail((self.limits.photo_side, self.limits.photo_side))
            sink = io.BytesIO()
            image.save(sink, "JPEG", quality=92)
        # The name is the key: nobody guesses 128 bits.
        picture = Picture(id=secrets.token_urlsafe(16), data=data, photo=sink.getvalue(), width=width, height=height)
        with self._lock:
            self._held[picture.id] = picture
            while len(self._held) > self.limits.pictures:
                self._held.popitem(last=False)
        return picture

    def get(self, key: object) -> Picture:
        """The picture of this id. Refused if it is not held."""
        with self._lock:
            picture = self._held.get(key) if isinstance(key, str) else None
            if picture is None:
                raise Refused(410, "This picture is no longer held. Open it again.")
            self._held.move_to_end(picture.id)
            return picture

    def encode(self, key: object) -> float:
        """Run the encoder, one picture at a time; the seconds it took. A second time it does nothing."""
        picture = self.get(key)

        def work() -> None:
            if picture.predictor is None:
                started = time.perf_counter()
                predictor = SamPredictor(self.model)
                with self._decoding:
                    pixels = picture.pixels()
                predictor.set_image(pixels)
                picture.seconds = time.perf_counter() - started
                picture.predictor = predictor

        self._encoder.do(work, urgent=True)
        return picture.seconds

    def predict(self, key: object, prompts: dict[str, Any]) -> dict[str, Any]:
        """Three masks for a question {points, labels, box} in pixels of the picture, as bits, at most `side` pixels a side."""
        picture = self.get(key)
        height, width = self._shown_size(picture)
        started = time.perf_counter()
        masks, iou = self._masks(picture, prompts, height, width)
        return {
            "width": width,
            "height": height,
            "iou": [round(float(value), 4) for value in iou],
            "masks": [bits(mask) for mask in masks],
            "milliseconds": round(1000 * (time.perf_counter() - started), 1),
        }

    def mask(self, key: object, prompts: dict[str, Any]) -> bytes:
        """Mask number `prompts["choice"]` of the same question, as a black and white PNG of the picture's size."""
        return _png(Image.fromarray(self._chosen(self.get(key), prompts)))

    def cutout(self, key: object, prompts: dict[str, Any]) -> bytes:
        """The picture where the mask is, transparent elsewhere: a PNG of the picture's size."""
        picture = self.get(key)
        mask = self._chosen(picture, prompts)
        with self._decoding:
            pixels = picture.pixels()
        colours = pixels * mask[..., None]  # what is not seen is not in the file either
        return _png(Image.fromarray(np.dstack([colours, mask * np.uint8(255)])))

    def everything(self, key: object) -> dict[str, Any]:
        """All masks, large below small, as runs of their numbers, with the seconds it took."""
        picture = self.get(key)
        height, width = self._shown_size(picture)

        def work() -> tuple[np.ndarray, int, float]:
            started = time.perf_counter()
            with self._decoding:
                image = Image.fromarray(picture.pixels()).resize((width, height), Image.Resampling.BILINEAR)
            found = MaskGenerator(_Patient(self.model, self._let_others), self.config).generate(np.asarray(image))
            labels = np.zeros((height, width), np.uint16)
            for number, mask in enumerate(sorted(found, key=lambda mask: -mask["area"]), 1):
                labels[decode_mask(mask["segmentation"])] = number
            return labels, len(found), time.perf_counter() - started

        labels, count, seconds = self._encoder.do(work)
        picture.labels = labels
        return {"width": width, "height": height, "runs": runs(labels), "masks": count, "seconds": seconds}

    def _let_others(self) -> None:
        """In the middle of everything mode: who opens a picture does not wait for it, and the demo may end."""
        if self._ended.is_set():
            raise Refused(503, "The demo was ended.")
        self._encoder.do_urgent()

    def labels(self, key: object) -> bytes:
        """The last answer of everything mode, of the picture's size: a PNG in colours, whose values are the masks' numbers.

        More than 255 masks have no colours: then it is 16-bit grey.
        """
        picture = self.get(key)
        if picture.labels is None:
            raise Refused(400, "Everything mode was not run for this picture.")
        numbers = picture.labels if picture.labels.max(initial=0) > 255 else picture.labels.astype(np.uint8)
        image = Image.fromarray(numbers).resize((picture.width, picture.height), Image.Resampling.NEAREST)
        if numbers.dtype == np.uint8:
            palette = np.random.default_rng(0).integers(60, 256, (256, 3), dtype=np.uint8)
            palette[0] = 0
            image.putpalette(palette.tobytes())
        return _png(image)

    def _shown_size(self, picture: Picture) -> tuple[int, int]:
        scale = min(1.0, self.limits.side / max(picture.width, picture.height))
        return max(1, round(picture.height * scale)), max(1, round(picture.width * scale))

    def _masks(
        self, picture: Picture, prompts: dict[str, Any], height: int, width: int, chosen: slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `chosen` of three masks, bool [M, height, width], and the model's estimates of all their IoU [3]."""
        points, labels, box = (prompts.get(name) for name in ("points", "labels", "box"))
        predictor = picture.predictor
        if predictor is None:
            raise Refused(409, "The picture is not encoded yet.")
        if isinstance(points, list) and len(points) > self.limits.points:
            raise SamiCacheError(f"{len(points)} points: at most {self.limits.points} are taken.")

        def work() -> tuple[np.ndarray, np.ndarray]:
            queries = (None if not value else [value] for value in (points, labels, box))
            with torch.inference_mode():
                answer = next(iter(predictor.decode(*queries)))
                masks = self.model.to_picture(answer.logits[:, chosen], height, width)[0] > 0
            return masks.cpu().numpy(), answer.iou[0].float().cpu().numpy()

        return self._decoder.do(work)

    def _chosen(self, picture: Picture, prompts: dict[str, Any]) -> np.ndarray:
        choice = prompts.get("choice")
        if choice not in (0, 1, 2):
            raise SamiCacheError(f"choice is {choice!r}: expected 0, 1 or 2")
        only = slice(int(choice), int(choice) + 1)  # at 40 megapixels each takes 160 MB on its way
        return self._masks(picture, prompts, picture.height, picture.width, only)[0][0]


def bits(mask: np.ndarray) -> str:
    """A bool array row by row, eight pixels a byte, the first the highest bit, in base64.

    Always as long, unlike runs: of a ragged mask, as a model gives it where nothing is clear, these are ten times longer.
    """
    return base64.b64encode(np.packbits(mask).tobytes()).decode()


def runs(values: np.ndarray) -> list[int]:
    """Equal neighbours of an array, row by row, as [value, how many, value, how many, ...]."""
    flat = values.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    return np.stack([flat[starts[:-1]].astype(np.int64), np.diff(starts)], axis=1).ravel().tolist()


def _png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG", compress_level=3)
    return sink.getvalue()
