"""The loader's order, joins and restarts, on a real small cache."""

import numpy as np
import pytest
import torch
from photos import photo_folder, picture
from PIL import Image

from pipelines.extract import extract
from pipelines.jobs import ExtractConfig
from sami_cache.batches import on_device
from sami_cache.data.sources import open_source
from sami_cache.data.views import crop_embeddings, crop_image, mirror
from sami_cache.errors import DamageError, IdentityError, ImageError, SamiCacheError
from sami_cache.loader import Loader, LoaderConfig
from sami_cache.order import epoch_order, split_held_out
from sami_cache.samples import CacheSamples, SourceSamples
from sami_cache.store.cache import Cache

LITE0 = {"teacher": "efficientnet_lite0", "grid": 4, "shard_samples": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    photo_folder(folder / "photos", 90)
    (folder / "photos" / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    extract(ExtractConfig(data=folder / "photos", cache=folder / "cache.zarr", **LITE0))
    return folder


@pytest.fixture(scope="module")
def samples(folder):
    return CacheSamples(Cache(folder / "cache.zarr"))


def loader(samples, **changes):
    world = {name: changes.pop(name) for name in ("rank", "world") if name in changes}
    chosen = changes.pop("chosen", samples.usable)
    return Loader(samples, chosen, LoaderConfig(**{"batch_size": 16, "threads": 2, "open_shards": 2, **changes}), **world)


def take(batches, count):
    return [batch for batch, _ in zip(batches, range(count), strict=False)]


def same(a, b):
    assert a.keys == b.keys
    for name in ("pixels", "codes", "boxes", "flips", "ids_shuffle"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_an_epoch_serves_every_sample_once_in_an_order_of_its_own(samples):
    orders = [epoch_order(samples.usable, 16, seed=1, epoch=epoch, open_shards=2) for epoch in (0, 0, 1)]
    assert (orders[0] == orders[1]).all()
    assert (orders[0] != orders[2]).any()
    assert sorted(orders[0].tolist()) == np.flatnonzero(samples.usable).tolist()
    assert len(orders[0]) == 90  # the torn image is not among them
    for start in range(0, 90, 32):  # never more than two shards at a time
        assert len(set((orders[0][start : start + 32] // 16).tolist())) <= 3


def test_the_order_is_well_mixed_across_open_shards():
    orders = [epoch_order(np.ones(512 * 64, bool), 512, seed=0, epoch=epoch, open_shards=8) for epoch in range(20)]
    order = orders[0]
    batches = (order[: len(order) // 256 * 256] // 512).reshape(-1, 256)
    assert min(len(set(batch)) for batch in batches.tolist()) >= 7
    # A permutation of 8 windows alone would give a standard deviation of 0.38 a single epoch, 0.08 for the mean of 20.
    assert abs(np.mean([np.corrcoef(order.argsort(), np.arange(len(order)))[0, 1] for order in orders])) < 0.25


@pytest.mark.parametrize("threads", [1, 5])
def test_batches_do_not_depend_on_threads(samples, threads):
    for a, b in zip(take(loader(samples).batches(), 8), take(loader(samples, threads=threads).batches(), 8), strict=True):
        same(a, b)


def test_batches_resume_at_any_step(samples):
    whole = take(loader(samples).batches(), 12)
    for start in (1, 5, 7, 11):
        for a, b in zip(whole[start:], take(loader(samples).batches(start), 12 - start), strict=True):
            same(a, b)


def test_batches_end_where_they_are_to(samples):
    whole = take(loader(samples).batches(), 12)
    assert loader(samples).steps_per_epoch == 5
    for start, stop in ((0, 1), (0, 5), (3, 7), (5, 10), (4, 12), (6, 9)):
        found = list(loader(samples).batches(start, stop))
        assert len(found) == stop - start
        for a, b in zip(whole[start:stop], found, strict=True):
            same(a, b)
    assert list(loader(samples).batches(5, 5)) == []


def test_ranks_and_micro_batches_cut_the_same_steps(samples):
    whole = take(loader(samples).batches(), 6)
    parts = [take(loader(samples, rank=rank, world=2, micro_batches=2).batches(), 12) for rank in range(2)]
    for step, batch in enumerate(whole):
        pieces = [parts[rank][2 * step + micro] for rank in range(2) for micro in range(2)]
        assert [key for piece in pieces for key in piece.keys] == batch.keys
        assert torch.equal(torch.cat([piece.pixels for piece in pieces]), batch.pixels)
        assert torch.equal(torch.cat([piece.ids_shuffle for piece in pieces]), batch.ids_shuffle)


def test_pixels_and_targets_are_those_of_the_key(folder, samples):
    """Each batch row against the cache's own records, looked up by key: image, codes, view."""
    cache = samples.cache
    rows = {row["key"]: number for number, row in enumerate(cache.table().to_pylist())}
    codes = np.concatenate([cache.read_codes(shard) for shard in range(cache.shards)])
    for batch in take(loader(samples).batches(), 5):
        for index, key in enumerate(batch.keys):
            assert (batch.codes[index].numpy() == codes[rows[key]]).all()
            x0, y0, x1, y1 = batch.boxes[index].tolist()
            image = Image.open(folder / "photos" / key).convert("RGB")
            box = (x0 * image.width, y0 * image.height, x1 * image.width, y1 * image.height)
            crop = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC, box=box)).astype(float)
            assert np.abs(batch.pixels[index].permute(1, 2, 0).numpy() - crop).mean() < 8  # a second JPEG lies between


def test_a_bright_spot_is_where_the_features_say(tmp_path):
    """End to end: a view's pixels and its features show the object in the same place, mirrored or not."""
    rng = np.random.default_rng(0)
    for index in range(32):
        image = Image.new("RGB", (256, 192))
        patch = picture("chelsea").crop((100, 50, 180, 130))
        image.paste(patch, (int(rng.integers(0, 176)), int(rng.integers(0, 112))))
        image.save(tmp_path / f"{index:02d}.png")
    extract(ExtractConfig(data=tmp_path, cache=tmp_path / "c.zarr", **{**LITE0, "grid": 16}))
    samples = CacheSamples(Cache(tmp_path / "c.zarr"))
    codec = samples.cache.codec
    agree = {False: [], True: []}
    for batch in take(loader(samples, batch_size=8).batches(), 8):
        maps = torch.from_numpy(codec.decode(batch.codes.numpy())) - torch.from_numpy(codec.mean)[:, None, None]
        maps = crop_embeddings(maps, batch.boxes, batch.flips, 14)
        background = maps.flatten(2).median(2).values[..., None, None]
        energy = (maps - background).square().sum(1).flatten(1)
        seen = mirror(batch.pixels, batch.flips)
        bright = torch.nn.functional.avg_pool2d(seen.float().mean(1), 16).flatten(1)
        for row in range(8):
            if bright[row].std() > 15:
                agree[False].append(float(torch.corrcoef(torch.stack([energy[row], bright[row]]))[0, 1]))
                mirrored = bright[row].reshape(14, 14).flip(1).flatten()
                agree[True].append(float(torch.corrcoef(torch.stack([energy[row], mirrored]))[0, 1]))
    assert np.mean(agree[False]) > 0.4
    assert np.mean(agree[False]) > np.mean(agree[True]) + 0.25


def test_replay_batches_carry_the_recorded_views(tmp_path):
    photo_folder(tmp_path / "photos", 48)
    first = open_source(tmp_path / "photos").keys[0]
    (tmp_path / "photos" / first).write_bytes(b"\xff\xd8\xff torn")  # a shard begins with it
    extract(ExtractConfig(data=tmp_path / "photos", cache=tmp_path / "replay.zarr", views=2, **{**LITE0, "grid": 14}))
    samples = CacheSamples(Cache(tmp_path / "replay.zarr"))
    rows = samples.cache.table().to_pylist()
    assert rows[0]["status"] != "ok"
    for batch in take(loader(samples).batches(), 3):
        assert not batch.whole  # the codes are cut already
        for index, number in enumerate(batch.samples.tolist()):
            *box, flip = rows[number]["view"]
            assert bool(batch.flips[index]) == bool(flip)
            assert batch.boxes[index].tolist() == pytest.approx(box)
            image = Image.open(tmp_path / "photos" / rows[number]["key"]).convert("RGB")
            from sami_cache.data.views import View

            crop = crop_image(image, View(tuple(box)), 224).astype(float)
            assert np.abs(batch.pixels[index].permute(1, 2, 0).numpy() - crop).mean() < 8


def test_images_may_come_from_their_source_and_must_be_the_same(folder, samples):
    import shutil

    photos = folder / "copy"
    shutil.copytree(folder / "photos", photos)
    extract(ExtractConfig(data=photos, cache=folder / "bare.zarr", images=False, **LITE0))
    cache = Cache(folder / "bare.zarr")
    with pytest.raises(SamiCacheError, match="--no-images: give the images it was made from with --data"):
        CacheSamples(cache)
    given = CacheSamples(cache, open_source(photos))
    (batch,) = take(loader(given).batches(), 1)
    assert len(batch.keys) == 16
    file = photos / batch.keys[0]
    Image.open(file).rotate(180).save(file)
    with pytest.raises(IdentityError, match=r"is not the one the cache was made from"):
        take(loader(given).batches(), 1)
    file.unlink()
    with pytest.raises((IdentityError, ImageError)):
        take(loader(CacheSamples(cache, open_source(photos))).batches(), 1)


def test_a_damaged_shard_stops_training_instead_of_teaching_nonsense(folder, tmp_path):
    import shutil

    target = tmp_path / "c.zarr"
    for name in ("codes/1.0.0.0", "images/000001.arrow"):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder / "cache.zarr", target)
        data = bytearray((target / name).read_bytes())
        data[len(data) // 2] ^= 4
        (target / name).write_bytes(data)
        with pytest.raises(DamageError, match=name.replace(".", r"\.")):
            take(loader(CacheSamples(Cache(target))).batches(), 6)
    (target / "codes/2.0.0.0").unlink()
    with pytest.raises(DamageError, match=r"codes/2\.0\.0\.0: missing"):
        take(loader(CacheSamples(Cache(target))).batches(), 6)


def test_an_unfinished_cache_is_not_trained_on(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "cache.zarr", tmp_path / "c.zarr")
    (tmp_path / "c.zarr" / "commits" / "000003.json").unlink()
    with pytest.raises(SamiCacheError, match=r"is not complete: 1 of 6 shards are missing"):
        CacheSamples(Cache(tmp_path / "c.zarr"))


def test_a_source_without_a_cache_serves_the_teachers_view_too(folder):
    samples = SourceSamples(open_source(folder / "photos" / "coffee"))
    (batch,) = take(loader(samples, batch_size=8, teacher_size=96).batches(), 1)
    assert batch.codes is None
    assert batch.teacher_pixels.shape == (8, 3, 96, 96)
    seen = mirror(batch.pixels, batch.flips)
    small = torch.nn.functional.interpolate(seen.float(), (96, 96), mode="bilinear", antialias=True)
    assert (small - batch.teacher_pixels.float()).abs().mean() < 4
    with pytest.raises(ImageError, match=r"'torn\.jpg'"):
        take(loader(SourceSamples(open_source(folder / "photos"))).batches(), 20)


def test_the_held_out_split_follows_the_keys(samples):
    train, held = split_held_out(samples.keys, samples.usable, 0.3)
    assert not (train & held).any()
    assert ((train | held) == samples.usable).all()
    assert 15 < held.sum() < 40
    again = split_held_out(samples.keys[::-1], samples.usable[::-1], 0.3)[1][::-1]
    assert (again == held).all()
    assert split_held_out(samples.keys, samples.usable, 0.0)[1].sum() == 0


def test_sizes_that_do_not_fit_are_explained(samples):
    with pytest.raises(SamiCacheError, match="--batch-size 16 cannot be cut into 3 equal parts"):
        loader(samples, micro_batches=3)
    with pytest.raises(SamiCacheError, match="--batch-size 128 is more than the 90 samples"):
        loader(samples, batch_size=128)


def test_what_is_served_may_leave_the_images_out(folder, samples):
    full, bare, files = (take(loader(samples, images=images).batches(), 7) for images in ("pixels", "none", "encoded"))
    rows = {row["key"]: number for number, row in enumerate(samples.cache.table().to_pylist())}
    for a, b, c in zip(full, bare, files, strict=True):
        assert a.keys == b.keys == c.keys
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.codes, c.codes)
        assert (b.pixels, b.encoded, a.encoded, c.pixels) == (None, None, None, None)
        for key, data in zip(c.keys, c.encoded, strict=True):
            shard, place = divmod(rows[key], 16)
            assert [data] == samples.cache.read_jpegs(shard, [place])


def test_every_chunk_is_decompressed_once(samples, monkeypatch):
    from sami_cache.samples import _CacheShard

    read, real = [], _CacheShard.read_codes

    def counting(self, chunk, wanted):
        read.append((self._first, chunk))
        real(self, chunk, wanted)

    monkeypatch.setattr(_CacheShard, "read_codes", counting)
    served = sum(len(batch.keys) for batch in loader(samples, images="none").evaluation(7))
    assert served == 90
    assert len(read) == len(set(read)) == -(-90 // samples.chunk_samples)


def test_memory_is_bounded_by_the_open_shards(samples):
    """Two windows of samples are in preparation at most, however long the loader is left alone."""
    from sami_cache import loader as module

    alive, most, real = 0, 0, module._Draft

    class Draft(real):
        def __init__(self, *arguments):
            nonlocal alive, most
            super().__init__(*arguments)
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    module._Draft = Draft
    try:
        batches = loader(samples, batch_size=4, open_shards=2, images="none").batches()
        for _ in range(100):
            next(batches)
            assert alive <= (2 * 2 * 16) // 4 + 8
        batches.close()
    finally:
        module._Draft = real
    assert most > 4


def test_batches_reach_a_device_unchanged_and_the_loader_is_closed_with_them(samples):
    import threading

    plain = take(loader(samples).batches(), 3)
    given = on_device(loader(samples).batches(), torch.device("cpu"))
    for a, b in zip(plain, take(given, 3), strict=True):
        same(a, b)
    given.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader-") and thread.is_alive()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_reach_cuda_through_pinned_memory(samples):
    device = torch.device("cuda")
    plain = take(loader(samples).batches(), 12)
    for a, b in zip(plain, take(on_device(loader(samples, pin_memory=True).batches(), device), 12), strict=True):
        assert b.codes.device.type == b.pixels.device.type == "cuda"
        same(a, b.to(torch.device("cpu")))
