"""What `inspect` tells of a cache, and its page, against numbers taken from the cache in other ways."""

import html
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from blake3 import blake3
from conftest import fill_shard, full_cache, keys_of, make_identity, make_samples, new_cache, reseal_head, teacher_like
from photos import photo_folder
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from pipelines import inspect, inspect_page
from pipelines.extract import extract
from pipelines.inspect import inspect_cache
from pipelines.inspect_page import PageConfig, inspect_to_page
from pipelines.jobs import ExtractConfig
from sami_cache.cache_figures import bytes_figure, error_figure, gallery_figure, spectrum_figure
from sami_cache.data.images import decode_image
from sami_cache.errors import DamageError, SamiCacheError
from sami_cache.store.cache import Cache, choose_layout
from sami_cache.store.commits import TABLE_SCHEMA, FileEntry, root_fields
from sami_cache.store.creation import create_cache
from sami_cache.store.files import canonical_json, seal
from sami_cache.store.fitting import fit_codec
from sami_cache.store.head import CODEC_ARRAYS, array_file
from sami_cache.store.writing import seal_cache, write_shard

LITE0 = {"teacher": "efficientnet_lite0", "grid": 8, "shard_samples": 16, "device": "cpu"}
HOSTILE = "<img src=x onerror=alert(1)>&$\\frac$.jpg"


def told(*arguments: object) -> str:
    """What `sami-cache inspect ARGUMENTS` prints."""
    done = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


# The numbers


@pytest.fixture
def stretched(tmp_path):
    """(cache, embeddings): 80 samples, sample 21 failed, samples 5 and 40 so far out that codes are clipped."""
    embeddings = teacher_like(80)
    codec = fit_codec("pca", embeddings, error=0.01)
    embeddings[5] = codec.mean[:, None, None] + 4 * (embeddings[5] - codec.mean[:, None, None])
    embeddings[40] = codec.mean[:, None, None] + 9 * (embeddings[40] - codec.mean[:, None, None])
    cache = new_cache(tmp_path / "stretched.zarr", samples=80)
    for shard in range(cache.shards):
        numbers, bad = cache.shard_samples(shard), (5,) if shard == 1 else ()
        samples = make_samples(keys_of(cache, shard), bad)
        jpegs = [None if index in bad else f"jpeg of {number}".encode() for index, number in enumerate(numbers)]
        write_shard(cache, shard, embeddings[numbers.start : numbers.stop], samples, jpegs)
    seal_cache(cache)
    return cache, embeddings


def test_errors_are_those_of_an_own_decoding(stretched):
    cache, embeddings = stretched
    found = inspect_cache(cache.path)
    good = [number for number in range(80) if number != 21]
    decoded = np.stack([cache.read_embedding(number) for number in good]).astype(np.float64)
    lost = ((decoded - embeddings[good]) ** 2).sum((1, 2, 3))
    power = ((embeddings[good] - cache.codec.mean[:, None, None]).astype(np.float64) ** 2).sum((1, 2, 3))
    errors = lost / power
    assert found["error"]["overall"] == pytest.approx(lost.sum() / power.sum(), rel=1e-4)
    assert found["error"]["median"] == pytest.approx(np.sort(errors)[39], rel=1e-4)
    assert found["error"]["p99"] == pytest.approx(np.percentile(errors, 99), rel=1e-4)
    assert found["error"]["max"] == pytest.approx(errors.max(), rel=1e-4)
    expected = [f"class/{good[place]:04d}.jpg" for place in np.argsort(-errors)[:5]]
    assert [entry["key"] for entry in found["error"]["worst"]] == expected
    assert [entry["sample"] for entry in found["error"]["worst"]] == [int(key[6:10]) for key in expected]
    counts, edges = found["error"]["histogram"]["counts"], found["error"]["histogram"]["edges"]
    assert sum(counts) == 79
    assert counts == np.histogram(pq.read_table(cache.path / "manifest.parquet")["error"].drop_null(), edges)[0].tolist()


def test_clipped_codes_are_counted_as_a_stock_reader_counts_them(stretched):
    cache, _ = stretched
    clipped = inspect_cache(cache.path)["clipped"]
    group = zarr.open_group(cache.path, mode="r")
    stored, index, step = (np.asarray(group[name][:]) for name in ("codes", "index", "step"))
    # Of a coefficient that is stored in several rows, the coarsest is at its end when the value is.
    coarsest = [np.flatnonzero(index == number)[step[index == number].argmax()] for number in np.unique(index)]
    per_sample = (np.abs(stored[:, coarsest].astype(int)) == 127).sum((1, 2, 3))
    assert clipped["codes"] == per_sample.sum() > 0
    assert clipped["samples"] == np.count_nonzero(per_sample) > 0
    assert clipped["share"] == pytest.approx(per_sample.sum() / (79 * len(coarsest) * np.prod(stored.shape[2:])))
    assert clipped["worst"][0] == {"sample": 40, "key": "class/0040.jpg", "codes": per_sample[40]}
    assert [entry["codes"] for entry in clipped["worst"]] == sorted(per_sample[per_sample > 0], reverse=True)[:5]
    text = told(cache.path)
    assert f"{clipped['codes']} codes (" in text
    assert f"in {clipped['samples']} samples; most in class/0040.jpg ({per_sample[40]})" in text


def test_bytes_are_those_on_the_disk(stretched):
    cache, _ = stretched
    (cache.path / "codes" / "77.0.0.0").write_bytes(b"a stray file")  # counted, but not as codes
    (cache.path / "tmp" / "x").write_bytes(b"not counted")
    count = inspect_cache(cache.path)["bytes"]
    sizes = {str(path.relative_to(cache.path)): path.stat().st_size for path in cache.path.rglob("*") if path.is_file()}
    shards = [sizes[f"codes/{cache.layout.file_name(shard)}"] for shard in range(cache.shards)]
    assert count["total"] == sum(sizes.values()) - len(b"not counted")
    assert count["codes"] == sum(shards)
    assert count["jpeg"] == sum(size for name, size in sizes.items() if name.startswith("images/"))
    assert count["records"] == sum(s for n, s in sizes.items() if n.startswith(("commits/", "manifest", "ROOT")))
    assert count["codes"] + count["jpeg"] + count["records"] + count["other"] == count["total"]
    assert count["bits_per_value"] == pytest.approx(8 * sum(shards) / 79 / (24 * 8 * 8))
    assert count["float16_per_sample"] == np.float16(0).nbytes * 24 * 8 * 8
    assert count["float16_to_codes"] == pytest.approx(79 * count["float16_per_sample"] / sum(shards))
    assert count["missing_files"] == 0
    assert f"{count['bits_per_value']:.2f} bits a value, {count['float16_to_codes']:.1f} x smaller than float16" in told(
        cache.path
    )
    (cache.path / cache.shard_files(2)[0]).unlink()
    assert "1 files are missing: sami-cache verify" in told(cache.path)


def test_the_spectrum_in_words(cache):
    found = inspect_cache(cache.path)["spectrum"]
    values = np.array(cache.attributes["codec"]["spectrum"])
    shares = [values[: count + 1].sum() / values.sum() for count in range(len(values))]
    for share in (90, 99):
        count = found[f"directions_for_{share}"]
        assert shares[count - 1] >= share / 100 > shares[count - 2]
    assert found["noise"] == pytest.approx(cache.codec.step.min() ** 2 / 12)
    assert f"{found['directions_for_90']} of 24 principal directions hold 90 % of the variance" in told(cache.path)


def test_kept_coefficients(tmp_path):
    cache = new_cache(tmp_path / "cache.zarr", error=1e-5)  # so small that some coefficients take two rows
    codes = inspect_cache(cache.path)["codes"]
    group = zarr.open_group(cache.path, mode="r")
    block = group["dct"].shape[0]
    assert (codes["rows"], codes["kept"]) == (group["codes"].shape[1], len(set(group["index"][:].tolist())))
    assert codes["rows"] > codes["kept"]
    assert (codes["block"], codes["coefficients"]) == (block, 24 * block**2)
    text = f"{codes['kept']} of {codes['coefficients']} coefficients kept (24 directions x {block} x {block} frequencies), int8"
    text += f" in {codes['rows']} rows"
    assert text in told(cache.path)


@pytest.mark.parametrize("codec", ["pca", "int8", "float16"])
def test_dead_channels(tmp_path, codec):
    embeddings = teacher_like(32)
    embeddings[:, [3, 17]] = np.array([2.7, 0.0], np.float32)[:, None, None]
    fitted = fit_codec(codec, embeddings, error=0.01)
    keys = [f"{index}.jpg" for index in range(32)]
    cache = create_cache(
        tmp_path / "dead.zarr",
        identity=make_identity(codec={"name": codec, "error": fitted.error}),
        codec=fitted,
        layout=choose_layout(fitted, 8, 32, 16),
        keys=keys,
        labels=[None] * 32,
        class_names=None,
        provenance={},
    )
    found = inspect_cache(cache.path)
    assert found["spectrum"]["dead_channels"] == (None if codec == "float16" else [3, 17])
    assert ("2 of 24 channels hardly vary" in told(cache.path)) == (codec != "float16")
    assert ("no code is at the end" in told(cache.path)) == (codec != "float16")


def test_failures_are_counted_by_reason_and_listed_up_to_a_bound(tmp_path, monkeypatch):
    cache = new_cache(tmp_path / "cache.zarr", samples=64)
    for shard in range(cache.shards):
        samples = make_samples(keys_of(cache, shard), tuple(range(shard * 4)))
        if shard == 3:
            samples[0].status = "too \x1b[2J large"
        write_shard(cache, shard, teacher_like(16), samples, [None] * 16)
    seal_cache(cache)
    monkeypatch.setattr(inspect, "LISTED", 10)
    found = inspect_cache(cache.path)
    assert (found["usable"], found["failed"], found["failures_left_out"]) == (40, 24, 14)
    expected = [f"class/{n:04d}.jpg" for n in (*range(16, 20), *range(32, 38))]
    assert [failure["key"] for failure in found["failures"]] == expected
    first = {"reason": "truncated file", "count": 23, "keys": expected[:3]}
    assert found["failure_reasons"] == [first, {"reason": "too \x1b[2J large", "count": 1, "keys": ["class/0048.jpg"]}]
    text = told(cache.path)
    assert "23 x truncated file: class/0016.jpg, class/0017.jpg, class/0018.jpg, ..." in text
    assert "1 x too \\x1b[2J large: class/0048.jpg" in text  # not what would clear the screen
    assert "--json (10 listed, 14 left out)" in text
    monkeypatch.setattr(inspect, "REASONS", 1)
    assert "... and 1 more reasons" in told(cache.path)


def test_a_cache_where_every_sample_failed(tmp_path):
    cache = new_cache(tmp_path / "cache.zarr", samples=16)
    write_shard(cache, 0, teacher_like(16), make_samples(keys_of(cache, 0), tuple(range(16))), [None] * 16)
    seal_cache(cache)
    text = told(cache.path, "--report", tmp_path / "page.html", "--no-teacher")
    assert "no sample has an embedding" in text
    assert "smaller than float16" not in text
    sizes = json.loads(told(cache.path, "--json"))["bytes"]
    assert sizes["codes"] > 0
    assert {name for name, value in sizes.items() if value is None} == {
        *("per_sample", "codes_per_sample", "jpeg_per_sample", "records_per_sample"),
        *("bits_per_value", "float16_to_codes"),
    }


# Caches without a manifest, and big ones


def test_an_unsealed_cache_is_told_from_its_records(tmp_path, monkeypatch):
    cache = new_cache(tmp_path / "cache.zarr", samples=100)
    assert "0 usable, 0 failed, 100 missing" in told(cache.path)
    for shard in (0, 1, 2, 4, 5):
        fill_shard(cache, shard, bad=(3,) if shard == 4 else ())
    found = inspect_cache(cache.path)
    assert (found["sealed"], found["committed"], found["usable"], found["failed"]) == (False, 80, 79, 1)
    assert [failure["key"] for failure in found["failures"]] == ["class/0067.jpg"]
    whole = told(cache.path)
    assert "79 usable, 1 failed, 20 missing" in whole
    assert "not sealed" in whole
    monkeypatch.setattr(inspect, "RECORDS", 3)
    part = inspect_cache(cache.path)
    assert part["read"] == {"samples": 48, "records": 3, "of_records": 5}
    assert part["bytes"] == pytest.approx(found["bytes"], rel=0.02)  # bytes are of all shards, whatever was read
    assert "Read: 3 of 5 commit records, spread evenly, with 48 samples (48 usable, 0 failed)" in told(cache.path)
    measured = inspect.measure(cache)
    assert measured.numbers.tolist() == [*range(16), *range(32, 48), *range(80, 96)]
    assert measured.keys.to_pylist() == [f"class/{number:04d}.jpg" for number in measured.numbers]
    for worst in part["error"]["worst"]:
        assert worst["key"] == f"class/{worst['sample']:04d}.jpg"
        assert cache.record(worst["sample"] // 16).samples[worst["sample"] % 16].error == worst["error"]


def test_of_many_samples_neither_records_nor_codes_are_opened(tmp_path, monkeypatch):
    """Here they could not even be read: nothing is in them. Only the few keys that are shown become Python objects."""
    count = 50_000
    codec = fit_codec("pca", teacher_like(16))
    keys = [f"n{index // 1300:08d}/{index}.jpg" for index in range(count)]
    cache = create_cache(
        tmp_path / "big.zarr",
        identity=make_identity(),
        codec=codec,
        layout=choose_layout(codec, 8, count, 512),
        keys=keys,
        labels=[None] * count,
        class_names=None,
        provenance={},
    )
    for shard in range(cache.shards):
        cache.record_path(shard).touch()
        for name in cache.shard_files(shard):
            (cache.path / name).touch()
    errors = np.random.default_rng(0).lognormal(-4.6, 0.3, count)
    status = np.array(["ok"] * count, object)
    status[::10] = [f"reason {index % 3}" for index in range(count // 10)]
    bad = status != "ok"
    values = {"key": keys, "status": status, "error": pa.array(errors, mask=bad), "energy": pa.array(np.ones(count), mask=bad)}
    values |= {"clipped": pa.array(np.zeros(count, int), mask=bad), "shard": np.arange(count) // 512}
    columns = [pa.array(values[f.name], f.type) if f.name in values else pa.nulls(count, f.type) for f in TABLE_SCHEMA]
    pq.write_table(pa.table(columns, schema=TABLE_SCHEMA), cache.path / "manifest.parquet")
    entry = FileEntry.of((cache.path / "manifest.parquet").read_bytes())
    root = root_fields(cache.cache_id, [("0" * 64, "0" * 64)] * cache.shards, count, int(bad.sum()), entry)
    (cache.path / "ROOT.json").write_bytes(canonical_json(seal(root)))

    opened, objects, plain_open = [], [], os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: opened.append(str(path)) or plain_open(path, *rest, **more))
    taken = inspect.Measured.keys_of
    monkeypatch.setattr(inspect.Measured, "keys_of", lambda self, rows: objects.append(len(rows)) or taken(self, rows))
    found = inspect_cache(cache.path)
    names = {os.path.relpath(path, cache.path) for path in opened}
    whole = {"zarr.json", "ROOT.json", "manifest.parquet"}
    assert whole <= names <= whole | {array_file(name) for name in CODEC_ARRAYS}
    assert sum(objects) <= inspect.LISTED + 2 * inspect.WORST + 3 * inspect.EXAMPLES
    good = errors[~bad]
    assert (found["usable"], found["failed"], found["failures_left_out"]) == (45_000, 5_000, 4_000)
    assert found["error"]["p99"] == pytest.approx(np.percentile(good, 99))
    assert found["error"]["worst"][0] == {
        "sample": int(np.argmax(errors * ~bad)),
        "key": keys[np.argmax(errors * ~bad)],
        "error": good.max(),
    }
    assert sorted(reason["count"] for reason in found["failure_reasons"]) == [1666, 1667, 1667]


def test_inspecting_loads_neither_torch_nor_matplotlib(cache):
    code = f"import sys; from cli.main import app; app(['inspect', {str(cache.path)!r}], standalone_mode=False);"
    code += "print([name for name in ('torch', 'matplotlib', 'PIL') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_manifest_that_lies_is_damage(cache):
    table = pq.read_table(cache.path / "manifest.parquet")
    at = table.schema.get_field_index("error")
    for wrong in (None, float("nan"), -1.0):
        values = [wrong, *table["error"].to_pylist()[1:]]
        pq.write_table(table.set_column(at, table.field(at), pa.array(values, pa.float64())), cache.path / "manifest.parquet")
        root = {n: v for n, v in Cache(cache.path).root().items() if n != "blake3"}
        root["manifest"] = vars(FileEntry.of((cache.path / "manifest.parquet").read_bytes()))
        (cache.path / "ROOT.json").write_bytes(canonical_json(seal(root)))
        with pytest.raises(DamageError, match=r"manifest\.parquet: a sample is `ok` and has no error"):
            inspect_cache(cache.path)


# The page


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """photos/ with a hostile name and a broken picture, and a cache of them."""
    home = tmp_path_factory.mktemp("inspect")
    photo_folder(home / "photos", 30)
    (home / "photos" / "coffee" / "0002.jpg").rename(home / "photos" / HOSTILE.replace("\\", "_"))
    (home / "photos" / "<b>torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    extract(ExtractConfig(data=home / "photos", cache=home / "cache.zarr", **LITE0))
    return home


@pytest.fixture
def shown(monkeypatch):
    """The rows that the last gallery was drawn from."""
    rows: list = []
    monkeypatch.setattr(
        inspect_page, "gallery_figure", lambda given: rows.__setitem__(slice(None), given) or gallery_figure(given)
    )
    return rows


def page_of(home, tmp_path, **changes):
    given = {"cache": home / "cache.zarr", "page": tmp_path / "page.html", "device": "cpu", **changes}
    found = inspect_to_page(PageConfig(**given))
    return found["report"], given["page"].read_text()


def test_the_page_says_what_inspect_says_and_asks_nobody(home, tmp_path, shown):
    gallery, page = page_of(home, tmp_path)
    found = inspect_cache(home / "cache.zarr")
    assert gallery == {"page": str(tmp_path / "page.html"), "samples": 9, "without_teacher": ""}
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    for text in (
        found["root"],
        found["cache_id"],
        found["identity"]["teacher"]["weights_sha256"],
        f"{found['error']['overall']:.3%}",
    ):
        assert text in page
    assert re.findall(r'<img alt="(\w+)" src="data:image/png;base64,', page) == ["bytes", "error", "spectrum", "gallery"]
    assert page.count("<img ") == 4
    # Any four letters stand somewhere in a megabyte of base64.
    without_pictures = re.sub("base64,[A-Za-z0-9+/=]+", "", page)
    for outside in ("http:", "https:", 'src="/', "url(", "<link", "<script", "@import", "href"):
        assert outside not in without_pictures
    assert "&lt;b&gt;torn.jpg" in page
    assert "<b>" not in page
    # The picture is the number: its cells average to the sample's recorded error.
    table = pq.read_table(home / "cache.zarr" / "manifest.parquet")
    recorded = dict(zip(table["key"].to_pylist(), table["error"].to_pylist(), strict=True))
    for row in shown:
        assert row.lost.mean() == pytest.approx(recorded[row.name], rel=0.01)
        assert f"{recorded[row.name]:.3%}" in row.note
    assert [row.note.split(",")[0] for row in shown] == ["worst"] * 3 + ["median"] * 3 + ["drawn"] * 3
    ordered = sorted((error for error in recorded.values() if error is not None), reverse=True)
    assert [recorded[row.name] for row in shown[:6]] == ordered[:3] + ordered[14:17]


def test_hostile_keys_are_text(home, tmp_path, shown, monkeypatch):
    monkeypatch.setattr(inspect_page, "EACH", 40)
    monkeypatch.setattr(inspect_page, "choose", lambda cache, measured: inspect_page_choose(cache, measured, 40))
    gallery, page = page_of(home, tmp_path, teacher=False)
    assert gallery["samples"] == 30
    key = HOSTILE.replace("\\", "_")
    assert key in [row.name for row in shown]
    assert html.escape(key) in page
    assert "<img src=x" not in page


inspect_page_choose = inspect_page.choose


def test_formulas_and_control_characters_in_keys_can_be_drawn():
    """To matplotlib `$\\frac$` is a broken formula."""
    cells = np.zeros((4, 4, 3), np.uint8)
    row = inspect_page.GalleryRow(name="$\\frac$\n\x00", note="worst", image=None, teacher=None, decoded=cells, lost=None)
    gallery_figure([row]).canvas.draw()


def test_large_errors_are_seen(home, tmp_path, shown):
    """With an error of 0.3 the decoded features look different from the teacher's; with 0.001 they do not."""
    differences, losses = {}, {}
    for error in (0.3, 0.001):
        cache = tmp_path / f"{error}.zarr"
        extract(ExtractConfig(data=home / "photos", cache=cache, **LITE0, error=error))
        page_of(home, tmp_path, cache=cache)
        assert len(shown) == 9
        differences[error] = np.mean([np.abs(row.teacher.astype(int) - row.decoded).mean() for row in shown])
        losses[error] = np.mean([row.lost.mean() for row in shown])
    assert differences[0.3] > 10
    assert differences[0.001] < 3
    assert losses[0.3] > 0.15
    assert losses[0.001] < 0.005


def test_without_the_teacher_the_page_says_why_and_what_to_do(home, tmp_path, shown):
    gallery, page = page_of(home, tmp_path, teacher=False)
    assert "because of --no-teacher" in gallery["without_teacher"]
    assert html.escape(gallery["without_teacher"]) in page
    assert all(row.teacher is None and row.lost is None and row.image is not None for row in shown)
    assert all(row.decoded.std() > 10 for row in shown)
    gallery, page = page_of(home, tmp_path, data=tmp_path / "nowhere")
    assert re.search(r"--data .* --weights .* The reason: .*nowhere", gallery["without_teacher"])
    assert html.escape(gallery["without_teacher"]) in page
    gallery, _ = page_of(home, tmp_path, weights="random")
    assert "teacher.weights_sha256" in gallery["without_teacher"]
    text = told(home / "cache.zarr", "--report", tmp_path / "page.html", "--data", tmp_path / "nowhere")
    assert "--weights" in text
    assert "page: " in text


def test_an_edited_image_is_not_compared(home, tmp_path, shown):
    page_of(home, tmp_path)
    victim = shown[0].name
    shutil.copytree(home / "photos", tmp_path / "photos")
    with Image.open(tmp_path / "photos" / victim) as image:
        image.rotate(90).save(tmp_path / "photos" / victim)
    gallery, _ = page_of(home, tmp_path, data=tmp_path / "photos")
    assert gallery["without_teacher"].startswith("1 images are no longer those")
    assert [row.name for row in shown if row.teacher is None] == [victim]
    assert shown[0].lost is None


def test_random_weights_are_made_again(home, tmp_path, shown):
    extract(ExtractConfig(data=home / "photos", cache=tmp_path / "r.zarr", **LITE0, weights="random", seed=7))
    gallery, _ = page_of(home, tmp_path, cache=tmp_path / "r.zarr")
    assert gallery["without_teacher"] == ""
    assert all(row.lost.mean() < 0.05 for row in shown)


def test_a_view_is_shown_as_the_teacher_saw_it(home, tmp_path, shown):
    cache = extract(ExtractConfig(data=home / "photos", cache=tmp_path / "v.zarr", **LITE0, views=2)).cache
    page_of(home, tmp_path, cache=cache)
    assert len(shown) == 9
    recorded = {
        f"{sample.key} (view {index % 2})": (sample, number)
        for number in Cache(cache).committed()
        for index, sample in enumerate(Cache(cache).record(number).samples)
    }
    for row in shown:
        sample, shard = recorded[row.name]
        index = [f"{s.key} (view {i % 2})" for i, s in enumerate(Cache(cache).record(shard).samples)].index(row.name)
        image = decode_image(Cache(cache).read_jpegs(shard, [index])[0])
        x0, y0, x1, y1, flip = sample.view
        box = (x0 * image.width, y0 * image.height, x1 * image.width, y1 * image.height)
        expected = np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC, box=box))
        assert np.array_equal(row.image, expected[:, ::-1] if flip else expected)
        assert row.lost.mean() == pytest.approx(sample.error, rel=0.02)
    assert "a view: codes" in told(cache)


def test_images_come_from_the_source_where_the_cache_has_none(home, tmp_path, shown):
    cache = extract(ExtractConfig(data=home / "photos", cache=tmp_path / "n.zarr", **LITE0, images=False)).cache
    page_of(home, tmp_path, cache=cache, teacher=False)
    for row in shown:
        with Image.open(home / "photos" / row.name) as image:
            image.thumbnail((256, 256), Image.Resampling.BICUBIC)
            assert np.array_equal(row.image, np.asarray(image.convert("RGB")))
    page_of(home, tmp_path, cache=cache, data=tmp_path / "nowhere")
    assert all(row.image is None for row in shown)


def test_the_draw_is_by_keys_alone(home, tmp_path):
    """Of other caches of the same images, the same ones are drawn, but for those shown already."""
    extract(ExtractConfig(data=home / "photos", cache=tmp_path / "o.zarr", **LITE0, codec="int8"))
    kinds = []
    for path in (home / "cache.zarr", tmp_path / "o.zarr"):
        cache = Cache(path)
        measured = inspect.measure(cache)
        keys = dict(zip(measured.numbers.tolist(), measured.keys.to_pylist(), strict=True))
        picks = inspect_page.choose(cache, measured, each=2)
        assert [why for why, _ in picks.values()] == ["worst"] * 2 + ["median"] * 2 + ["drawn"] * 2
        assert len(inspect_page.choose(cache, measured, each=40)) == 30
        kinds.append({why: [keys[n] for n in picks if picks[n][0] == why] for why in ("worst", "median", "drawn")})
    shown = {key for kind in kinds for why in ("worst", "median") for key in kind[why]}
    free = [key for key in kinds[0]["drawn"] if key not in shown]
    assert free
    assert set(free) <= set(kinds[1]["drawn"])
    order = sorted(keys.values(), key=lambda key: blake3(f"0 {key}".encode()).digest())
    first = [key for key in order if key not in kinds[0]["worst"] + kinds[0]["median"] and "torn" not in key]
    assert kinds[0]["drawn"] == first[:2]


def test_names_that_cannot_be_written(home, tmp_path):
    def refuse(page, match):
        with pytest.raises(SamiCacheError, match=match):
            page_of(home, tmp_path, page=page)

    refuse(tmp_path, r"is a folder; name a file in it, such as .*cache\.html")
    refuse(tmp_path / "page.txt", r"expected a name that ends in \.html")
    refuse(tmp_path / "no" / "page.html", "there is no folder")
    refuse(home / "cache.zarr" / "page.html", "lies in the cache")
    done = CliRunner().invoke(app, ["inspect", str(home / "cache.zarr"), "--no-teacher"])
    assert "go with --report" in str(done.exception)
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "no.zarr"), "--report", str(tmp_path / "x.html")])
    assert isinstance(done.exception, SamiCacheError)
    assert list(tmp_path.iterdir()) == []


def test_a_page_appears_whole_or_not_at_all(home, tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("the last one")

    def torn(path, data):
        path.write_bytes(data[:10])
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(inspect_page, "write_durably", torn)
        with pytest.raises(OSError, match="Input/output"):
            page_of(home, tmp_path, teacher=False)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "the last one"
    page_of(home, tmp_path, teacher=False)
    assert "the last one" not in (tmp_path / "page.html").read_text()


def test_damage_in_what_is_shown_is_damage(home, tmp_path):
    shutil.copytree(home / "cache.zarr", tmp_path / "cache.zarr")
    for path in (tmp_path / "cache.zarr" / "codes").glob("*.0.0.0"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamageError, match="codes/"):
        page_of(tmp_path, tmp_path, teacher=False)


def test_a_name_that_is_no_utf_8_can_be_told(tmp_path):
    cache = full_cache(tmp_path / "cache.zarr")
    reseal_head(cache.path, provenance=cache.attributes["provenance"] | {"data": os.fsdecode(b"/photos/\xff")})
    _, page = page_of(tmp_path, tmp_path, cache=cache.path)
    assert "/photos/\\udcff" in page


def test_synthetic_caches_have_a_page(tmp_path):
    """Whose pictures are none, and whose teacher nobody knows."""
    cache = full_cache(tmp_path / "cache.zarr")
    gallery, page = page_of(tmp_path, tmp_path, cache=cache.path)
    assert "--data" in gallery["without_teacher"]
    assert "class/" in page


@pytest.mark.parametrize(
    "figure",
    [
        bytes_figure([("a", 10.0, "10 KB"), ("b", 0.0, "none")]),
        error_figure([0.01, 0.0101], [3], {"median": 0.01, "99th percentile": 0.01, "worst": 0.01}),
        error_figure([1e-9, 1e-5, 0.3], [3, 9], {"median": 1e-6, "99th percentile": 0.1, "worst": 0.3}),
        spectrum_figure([4.0, 1.0, 0.0], 0.1, {1: "90 %", 3: "99 %"}),
    ],
    ids=["bytes", "equal errors", "wide errors", "spectrum"],
)
def test_nothing_is_cut_off(figure):
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    assert pixels.std() > 10
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()


def test_every_bar_ends_within_the_axes():
    axes = bytes_figure([("a", 10.0, "10 KB"), ("b", 20.0, "20 KB")]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [10.0, 20.0]  # type: ignore[attr-defined]
    assert axes.get_xlim()[1] > 20.0
    assert [text.get_text() for text in axes.texts] == ["10 KB", "20 KB"]
