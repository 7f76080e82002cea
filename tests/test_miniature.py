"""The miniature runs end to end on a few images: in its order, over an interruption, to a page."""

import io
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sami_cache.errors import Interrupted, SamiCacheError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    import miniature as script
    import miniature_stages

    monkeypatch.setitem(miniature_stages.STUDENTS, "small", SMALL)
    yield script
    for name in set(sys.modules) - before:  # names such as `train` are to stay free
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__ or "").parent == BENCHMARKS:
            del sys.modules[name]


def write_images(path: Path, count: int, seed: int) -> None:
    """Pictures of two classes: bright above, or bright below."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        pixels = rng.integers(0, 128, (32, 32, 3), np.uint8)
        pixels[16 * (number % 2) :][:16] += 100
        jpeg = io.BytesIO()
        Image.fromarray(pixels).save(jpeg, "JPEG")
        rows.append({"image": {"bytes": jpeg.getvalue(), "path": f"{number}.jpg"}, "label": number % 2})
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def place(miniature, tmp_path: Path):
    write_images(tmp_path / "train.parquet", 48, 0)
    write_images(tmp_path / "test.parquet", 24, 1)
    (tmp_path / "photos").mkdir()
    for number in range(8):
        Image.effect_noise((96, 80), 40 + number).convert("RGB").save(tmp_path / "photos" / f"{number}.jpg")
    sizes = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "fit_images": 16, "heldout": 8, "views": 1}
    recipe = miniature.Recipe(steps=4, fine_steps=4, batch_size=8, photo_views=2, **sizes)
    return miniature.Place(cifar=tmp_path, photos=tmp_path / "photos", work=tmp_path / "work", recipe=recipe, device="cpu")


def run(miniature, place, names: tuple[str, ...], seconds: float = 100.0, seeds: int = 1):
    arms = {name: arm for name, arm in miniature.ARMS.items() if name in names}
    return miniature.work_off(place, arms, seeds, processes=0, seconds=seconds)


def test_what_was_interrupted_goes_on_and_ends_as_if_it_had_not_been(miniature, place, monkeypatch: pytest.MonkeyPatch):
    import miniature_stages as stages

    assert len(run(miniature, place, ("sami",), seconds=0)) == 4
    whole = replace(place, work=place.work.with_name("whole"))
    assert run(miniature, whole, ("sami",)) == []

    real = stages.SAMITask.loss
    calls = []

    def interrupted(self, *arguments):
        calls.append(self)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments)

    monkeypatch.setattr(stages.SAMITask, "loss", interrupted)
    with pytest.raises(Interrupted, match="after step 3 of 4"):
        run(miniature, place, ("sami",))
    assert run(miniature, place, ("sami",)) == []
    assert len(calls) == 4
    for stage in ("pretrain", "probe", "finetune"):
        ours, theirs = (json.loads(miniature.result_path(at, "sami", 0, stage).read_text()) for at in (place, whole))
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    written = miniature.result_path(place, "sami", 0, "finetune").stat().st_mtime_ns
    assert run(miniature, place, ("sami",)) == []
    assert len(calls) == 4
    assert miniature.result_path(place, "sami", 0, "finetune").stat().st_mtime_ns == written


def test_arms_differ_by_what_they_say_and_a_page_compares_them(miniature, place, tmp_path: Path):
    names = ("teacher", "scratch", "sami", "mae", "online", "all-token", "photos-replay")
    assert run(miniature, place, names) == []
    found = {name: json.loads(miniature.result_path(place, name, 0, "pretrain").read_text()) for name in names[2:]}
    # The same features but for the codec's error, the measured scale, and the mirrored pixels that the teacher saw online.
    assert found["sami"]["loss"] == pytest.approx(found["online"]["loss"], rel=0.1)
    assert len({run["loss"] for run in found.values()}) == len(found)
    page = miniature.write_report(place, miniature.ARMS, tmp_path / "out")
    text = page.read_text()
    knn = {name: 100 * json.loads(miniature.result_path(place, name, 0, "probe").read_text())["knn"] for name in names}
    assert f"| MAE (pixels) | 1 | {knn['mae']:.2f} |  |" in text
    assert f"| scratch | 1 | {knn['scratch']:.2f} | {knn['scratch'] - knn['mae']:+.2f} |" in text
    assert f"teacher's own pooled features: k-NN {knn['teacher']:.2f} %" in text
    assert "Not run:" in text
    assert "vit_t-mae" in text.split("Not run:")[1]
    assert page.with_name(f"{page.stem}-table-1.png").stat().st_size > 1000
    assert "## Is a cache as good as the teacher online?" in text
    assert "MAE, all-token" not in text  # no row for what was not run
    assert "codec's error cost" not in text  # nor a question with one arm


def test_no_image_that_is_judged_is_learnt_from(miniature, place):
    import miniature_stages as stages

    heldout = replace(place, judge="heldout")
    learn, judged = (stages.labelled(heldout, part, 0, 64) for part in ("learn", "judge"))
    assert not set(np.flatnonzero(learn.chosen)) & set(np.flatnonzero(judged.chosen))
    assert judged.count == 8
    assert learn.count == 40
    train, test = (pq.read_table(place.cifar / f"{part}.parquet") for part in ("train", "test"))
    pq.write_table(pa.concat_tables([train, test.slice(5, 1)]), place.cifar / "train.parquet")
    with pytest.raises(SamiCacheError, match=r"1 images of test\.parquet are in train\.parquet too"):
        stages.make_cache(place, "whole-0.01")
    leaky = replace(place, cifar=place.photos.parent / "other")
    leaky.cifar.mkdir()
    pq.write_table(train, leaky.cifar / "train.parquet")
    pq.write_table(test.slice(0, 4), leaky.cifar / "test.parquet")
    assert stages.make_cache(leaky, "whole-0.01")["failures"] == 0
    stages.check_cache(leaky, stages.Cache(leaky.cache("whole-0.01")))
    pq.write_table(train.slice(0, 20), leaky.cifar / "train.parquet")
    with pytest.raises(SamiCacheError, match=r"holds images that are not of train\.parquet"):
        stages.check_cache(leaky, stages.Cache(leaky.cache("whole-0.01")))


def test_the_most_important_comes_first_and_what_it_needs_before_it(miniature):
    jobs = miniature.plan(miniature.ARMS, 3)
    assert len(set(jobs)) == len(jobs)
    places = {job: number for number, job in enumerate(jobs)}
    assert all(places[need] < places[job] for job in jobs for need in miniature.needs(job, miniature.ARMS))
    main = [number for number, job in enumerate(jobs) if job.arm in miniature.MAIN]
    assert max(main) < min(number for number, job in enumerate(jobs) if job.arm in ("cosine", "error10", "vit_t-mae"))
    assert miniature.seconds_of("1.5h") == 5400


def test_every_stage_has_a_result_of_its_own(miniature, place):
    """Caches of 10 % and 30 % error once shared one file, and the second was taken for made."""
    import miniature_stages as stages

    jobs = miniature.plan(miniature.ARMS, 3)
    files = [stages.result_path(place, job.arm, job.seed, job.stage) for job in jobs]
    assert len(set(files)) == len(jobs)
