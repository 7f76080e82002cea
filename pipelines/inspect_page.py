"""A page about a cache: what `inspect` tells with plots, and a gallery of what compression lost.

The teacher's own features are not in the cache. They are computed again, for the gallery's few samples, as the audit does.
"""

import html
import os
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from PIL import Image

from pipelines.inspect import Measured, measure, summarise
from pipelines.page import document, picture, png, settings_table, text_table
from pipelines.verify import VerifyConfig, embed_again, extraction_of
from sami_cache.cache_figures import GalleryRow, bytes_figure, error_figure, gallery_figure, spectrum_figure
from sami_cache.data.images import decode_image
from sami_cache.data.sources import Source, open_source
from sami_cache.errors import ImageError, SamiCacheError
from sami_cache.report import pca_rgb
from sami_cache.store.cache import Cache
from sami_cache.store.commits import OK, Sample
from sami_cache.store.files import as_damage, digest, disk_full_as_error, write_durably
from sami_cache.store.places import AnyPath

EACH = 3
"""Samples a kind in the gallery: the worst, median ones, and some drawn by their keys."""
SIDE = 256
BLOCK = 65536


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """A page, and what it may use beside the cache."""

    cache: AnyPath
    page: Path
    """An .html file; one that is there is replaced."""
    data: Path | None = None
    """Where the images are; by default where they were at extraction."""
    weights: str | None = None
    device: str = "auto"
    teacher: bool = True
    """Run the teacher again on the samples of the gallery."""


def inspect_to_page(config: PageConfig) -> dict[str, Any]:
    """Write the page; returns what `inspect_cache` does, with `report`: its `page`, `samples` and why there is no teacher.

    Raises SamiCacheError for a name that cannot be written or where there is no cache, DamageError if what is shown is damaged.
    That the teacher or images are not to be had is no error: the page says so.
    """
    _check_name(config)
    cache = Cache(config.cache)
    measured = measure(cache)
    found = summarise(cache, measured)
    gallery = _Gallery(config, cache, choose(cache, measured))
    text = _page(found, gallery)
    temporary = config.page.with_name(f".{config.page.name}.{secrets.token_hex(8)}")
    try:
        with disk_full_as_error(config.page.parent, "writing the page"):
            write_durably(temporary, text.encode(errors="backslashreplace"))  # names may be no UTF-8
        os.replace(temporary, config.page)
    finally:
        temporary.unlink(missing_ok=True)
    told = {"page": str(config.page), "samples": len(gallery.picks), "without_teacher": gallery.without_teacher}
    return {**found, "report": told}


def choose(cache: Cache, measured: Measured, each: int = EACH) -> dict[int, tuple[str, float]]:
    """Samples for a gallery: {number: (why, error)}, the worst first, then median ones, then some drawn by their keys.

    The draw takes the smallest digests of key and view, so that another cache of the same images shows the same ones.
    """
    order = np.argsort(-measured.error, kind="stable")
    middle = max(0, len(order) // 2 - each // 2)
    places = {int(place): "worst" for place in order[:each]}
    places |= {int(place): "median" for place in order[middle : middle + each] if int(place) not in places}
    smallest: list[tuple[bytes, int]] = []
    for start in range(0, len(order), BLOCK):
        rows = measured.good[start : start + BLOCK]
        views = measured.numbers[rows] % max(1, cache.views)
        names = zip(measured.keys_of(rows), views.tolist(), strict=True)
        digests = [blake3(f"{view} {key}".encode(errors="surrogatepass")).digest() for key, view in names]
        smallest = sorted([*smallest, *zip(digests, range(start, start + len(rows)), strict=True)])[: 3 * each]
    drawn = [place for _, place in smallest if place not in places][:each]
    places |= dict.fromkeys(drawn, "drawn")
    numbers = measured.numbers[measured.good]
    return {int(numbers[place]): (why, float(measured.error[place])) for place, why in places.items()}


class _Gallery:
    """The gallery's samples: what is stored of them, and what can still be had of their origin."""

    def __init__(self, config: PageConfig, cache: Cache, picks: dict[int, tuple[str, float]]) -> None:
        self.config, self.cache, self.picks = config, cache, picks
        self.places = {number: divmod(number, cache.layout.shard_samples) for number in picks}
        self.samples: dict[int, Sample] = {
            number: cache.record(shard).samples[index] for number, (shard, index) in self.places.items()
        }
        self.decoded = {number: cache.read_embedding(number) for number in picks}
        self.without_teacher = ""
        self.fresh = self._ask_teacher()
        self.images = {number: self._image(number) for number in picks}

    def _ask_teacher(self) -> dict[int, np.ndarray]:
        """The teacher's features of the samples whose images are still those that were extracted."""
        if not self.picks:
            return {}
        if not self.config.teacher:
            self.without_teacher = (
                "What compression lost is not shown, because of --no-teacher: without it the teacher is run on these images."
            )
            return {}
        settings = VerifyConfig(
            cache=self.cache.path, data=self.config.data, weights=self.config.weights, device=self.config.device
        )
        try:
            again = list(embed_again(extraction_of(settings), self.picks))
        except SamiCacheError as error:
            self.without_teacher = (
                "What compression lost is not shown, because the teacher cannot be asked again; --data (where the images are) "
                f"and --weights (the teacher's checkpoint) bring it. The reason: {error}"
            )
            return {}
        fresh = {n: values for n, sample, values in again if sample.status == OK and sample.source == self.samples[n].source}
        if len(fresh) < len(self.picks):
            self.without_teacher = (
                f"{len(self.picks) - len(fresh)} images are no longer those that were extracted; for them it is not shown what "
                "compression lost. --data names the folder that holds the right ones."
            )
        return fresh

    @cached_property
    def _source(self) -> tuple[Source | None, dict[str, int]]:
        """The images as they lie outside of the cache, if they do, and the place of each of ours."""
        try:
            with as_damage(self.cache.path, "does not say where the images lay"):
                data = self.config.data or Path(self.cache.attributes["provenance"]["data"])
                source = open_source(data, kind=self.cache.identity["source_kind"])
        except SamiCacheError:
            return None, {}
        wanted = {sample.key for sample in self.samples.values()}
        return source, {key: index for index, key in enumerate(source.keys) if key in wanted}

    def _image(self, number: int) -> np.ndarray | None:
        """uint8 [h, w, 3] of what the embedding is of; None where neither the cache nor the source has it."""
        shard, index = self.places[number]
        sample = self.samples[number]
        try:
            if self.cache.has_images:
                data = self.cache.read_jpegs(shard, [index])[0]
            else:
                source, where = self._source
                data = source.read(where[sample.key]) if source and sample.key in where else None
                if data is not None and digest(data) != sample.source:
                    return None
            if data is None:
                return None
            image = decode_image(data)
        except ImageError:
            return None
        if sample.view is not None:
            from sami_cache.data.views import View, crop_image

            with as_damage(self.cache.record_path(shard), f"the view of {sample.key!r}"):
                x0, y0, x1, y1, flip = sample.view
                return crop_image(image, View((x0, y0, x1, y1), bool(flip)), SIDE)
        image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
        return np.array(image)

    def lost(self, number: int) -> np.ndarray | None:
        """float64 [grid, grid]: squared error of each cell; its mean is the sample's relative squared error."""
        if number not in self.fresh:
            return None
        fresh = self.fresh[number].astype(np.float64)
        energy = np.square(fresh - self.cache.codec.mean[:, None, None]).sum(0).mean()
        return np.square(self.decoded[number] - fresh).sum(0) / max(energy, np.finfo(float).tiny)

    def rows(self) -> list[GalleryRow]:
        """As pictures; one set of colours for all, the teacher's where it could be asked."""
        decoded = _cells(self.decoded)
        fresh = _cells(self.fresh) if self.fresh else None
        teacher = {} if fresh is None else dict(zip(self.fresh, pca_rgb(fresh), strict=True))
        ours = pca_rgb(decoded, like=fresh)
        return [
            GalleryRow(
                name=_name(self.cache, number, self.samples[number]),
                note=f"{why}, {error:.3%}",
                image=self.images[number],
                teacher=teacher.get(number),
                decoded=picture,
                lost=self.lost(number),
            )
            for (number, (why, error)), picture in zip(self.picks.items(), ours, strict=True)
        ]


def _cells(embeddings: dict[int, np.ndarray]) -> np.ndarray:
    """[C, grid, grid] each -> [n, grid, grid, C]."""
    return np.moveaxis(np.stack(list(embeddings.values())), 1, -1)


def _name(cache: Cache, number: int, sample: Sample) -> str:
    return f"{sample.key} (view {number % cache.views})" if cache.views else sample.key


def _check_name(config: PageConfig) -> None:
    page = config.page
    if page.is_dir():
        raise SamiCacheError(f"--report {page}: is a folder; name a file in it, such as {page / 'cache.html'}.")
    if page.suffix.lower() not in (".html", ".htm"):
        raise SamiCacheError(f"--report {page}: expected a name that ends in .html; what is there is replaced.")
    if not page.parent.is_dir():
        raise SamiCacheError(f"--report {page}: there is no folder {page.parent}. Make it first, or name another.")
    if config.cache.resolve() in page.resolve().parents:
        raise SamiCacheError(f"--report {page}: lies in the cache, which holds only what was committed. Name another place.")


def _page(found: dict[str, Any], gallery: _Gallery) -> str:
    # Text of the cache reaches the page through text_table, settings_table and html.escape alone.
    state = f"Sealed, root {found['root']}." if found["sealed"] else "Not sealed: extraction has not finished."
    read, count, lost = found["read"], found["bytes"], found["error"]
    if read["records"] is not None:
        state += (
            f" Read: {read['records']} of {read['of_records']} commit records, spread evenly, with {read['samples']} samples."
        )
    counts = [
        ("usable", found["usable"]),
        ("failed", found["failed"]),
        ("missing", found["samples"] - found["committed"]),
        ("shards", found["shards"]),
        ("files missing", count["missing_files"]),
    ]
    parts = [f"<p>{html.escape(state)}</p>", text_table((), counts)]
    if found["failed"]:
        reasons = [(r["count"], r["reason"], ", ".join(r["keys"])) for r in found["failure_reasons"]]
        parts += ["<h2>Failures</h2>", text_table(("samples", "reason", "such as"), reasons)]
        if found["failure_reasons_left_out"]:
            parts.append(f"<p>And {found['failure_reasons_left_out']} more reasons.</p>")
    parts += ["<h2>Bytes</h2>", *_bytes(found)]
    if lost["histogram"]:
        parts += ["<h2>What the codec lost</h2>", *_errors(found)]
    parts += ["<h2>Spectrum</h2>", *_spectrum(found)]
    if gallery.picks:
        parts += ["<h2>Samples</h2>", *_samples(gallery)]
    settings = {name: found[name] for name in ("cache_id", "identity", "provenance")}
    parts += ["<h2>Identity and provenance</h2>", settings_table(settings)]
    return document(found["cache"], "".join(parts))


def _kilobytes(count: float) -> str:
    return f"{count / 1000:,.1f} KB"


def _bytes(found: dict[str, Any]) -> list[str]:
    count = found["bytes"]
    rows = [
        (name, f"{count[key] / 1e6:,.1f} MB")
        for name, key in (
            ("codes", "codes"),
            ("JPEG", "jpeg"),
            ("records and manifest", "records"),
            ("head and copies", "other"),
            ("all", "total"),
        )
    ]
    if count["per_sample"] is None:
        return [text_table((), rows)]
    unit = "a view" if found["identity"]["view"]["mode"] == "replay" else "an image"
    bars = [
        ("embedding as float16", count["float16_per_sample"], _kilobytes(count["float16_per_sample"])),
        (
            "codes",
            count["codes_per_sample"],
            f"{_kilobytes(count['codes_per_sample'])}, {count['bits_per_value']:.2f} bits a value",
        ),
        ("JPEG", count["jpeg_per_sample"], _kilobytes(count["jpeg_per_sample"])),
        ("all of the cache", count["per_sample"], _kilobytes(count["per_sample"])),
    ]
    return [f"<p>For {unit} with an embedding:</p>", picture("bytes", png(bytes_figure(bars))), text_table((), rows)]


def _errors(found: dict[str, Any]) -> list[str]:
    lost, clipped = found["error"], found["clipped"]
    marks = {"median": lost["median"], "99th percentile": lost["p99"], "worst": lost["max"]}
    asked = f", {lost['asked']:.2%} was asked for" if lost["asked"] else ""
    text = (
        f"Squared error over variance: {lost['overall']:.3%} of the whole set{asked}. "
        "Below, of each sample: squared error over its own squared distance from the mean embedding."
    )
    histogram = error_figure(lost["histogram"]["edges"], lost["histogram"]["counts"], marks)
    worst = [(entry["key"], entry.get("view", ""), f"{entry['error']:.3%}") for entry in lost["worst"]]
    if not clipped["possible"]:
        saturation = "The codes are floats: none is clipped."
    else:
        saturation = (
            f"{clipped['codes']} codes ({clipped['share']:.2g} of all) in {clipped['samples']} samples are at the end of "
            "their range: clipped, or just not."
        )
    parts = [f"<p>{text}</p>", picture("error", png(histogram)), text_table(("worst", "view", "error"), worst)]
    parts.append(f"<p>{saturation}</p>")
    if clipped["worst"]:
        most = [(entry["key"], entry.get("view", ""), entry["codes"]) for entry in clipped["worst"]]
        parts.append(text_table(("most clipped", "view", "codes"), most))
    return parts


def _spectrum(found: dict[str, Any]) -> list[str]:
    spectrum, codes = found["spectrum"], found["codes"]
    block, grid = codes["block"], codes["grid"]
    text = f"{codes['kept']} of {codes['coefficients']} coefficients are kept as {codes['dtype']}"
    if block > 1:
        text += f", by {codes['channels']} directions and {block} x {block} frequencies in blocks of {block} x {block} cells"
    text += f"; the grid has {grid} x {grid} cells."
    if spectrum["dead_channels"]:
        text += f" Channels that hardly vary, and of which nothing is stored: {', '.join(map(str, spectrum['dead_channels']))}."
    if not spectrum["directions_for_90"]:
        return [f"<p>{html.escape(text)} This codec records no spectrum.</p>"]
    text += (
        f" {spectrum['directions_for_90']} of {codes['channels']} principal directions hold 90 % of the variance, "
        f"{spectrum['directions_for_99']} hold 99 %."
    )
    marks = {spectrum["directions_for_90"]: "90 % of the variance", spectrum["directions_for_99"]: "99 %"}
    figure = spectrum_figure(spectrum["variance"], spectrum["noise"], marks)
    return [f"<p>{html.escape(text)}</p>", picture("spectrum", png(figure))]


def _samples(gallery: _Gallery) -> list[str]:
    text = (
        "The worst, median ones, and some drawn by their keys. Features as RGB: their first three principal components, the "
        "same colours in all rows."
    )
    rows = [
        (why, _name(gallery.cache, number, gallery.samples[number]), f"{error:.3%}", gallery.samples[number].clipped or 0)
        for number, (why, error) in gallery.picks.items()
    ]
    parts = [f"<p>{text}</p>"]
    if gallery.without_teacher:
        parts.append(f"<p>{html.escape(gallery.without_teacher)}</p>")
    parts.append(picture("gallery", png(gallery_figure(gallery.rows()))))
    return [*parts, text_table(("", "sample", "error", "clipped codes"), rows)]
