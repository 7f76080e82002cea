"""The loader without a cache: what is served when, and what happens when a read is slow, fails or never returns."""

import threading
import time

import numpy as np
import pytest
import torch

from sami_cache.batches import on_device
from sami_cache.loader import Loader, LoaderConfig
from sami_cache.workers import LoaderError


class Stub:
    """Codes say which sample they are of."""

    codes_shape, codes_dtype, shard_samples, chunk_samples, whole = (1, 2, 2), np.dtype("int8"), 16, 4, True

    def __init__(self, count, read=lambda number: None, see=lambda number: None):
        self.keys, self.labels, self.usable = [f"s{n}" for n in range(count)], [None] * count, np.ones(count, bool)
        self.opens, self.expected, self.read, self.see = [], [], read, see
        self.expect = self.expected.append

    def open(self, shard):
        self.opens.append(shard)
        return Shard(self, shard * 16)


class Shard:
    def __init__(self, stub, first):
        self.stub, self.first = stub, first

    def expect(self, *, images):
        self.stub.expect(self.first // 16)

    def read_codes(self, chunk, wanted):
        self.stub.read(self.first + 4 * chunk)
        for place, out in wanted.items():
            out[:] = (self.first + 4 * chunk + place) % 100

    def pixels(self, place):
        self.stub.see(self.first + place)
        return np.full((32, 48, 3), (self.first + place) % 100, np.uint8)

    def view(self, place):
        return None


def loader(stub, chosen=None, rank=0, world=1, **changes):
    config = {"batch_size": 8, "threads": 2, "image_size": 32, "open_shards": 2, "timeout": 1.0, **changes}
    return Loader(stub, stub.usable if chosen is None else chosen, LoaderConfig(**config), rank=rank, world=world)


def first(given, count):
    batches = given.batches()
    try:
        return [batch for batch, _ in zip(batches, range(count), strict=False)]
    finally:
        batches.close()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("count", [24, 400])
def test_reads_that_never_return_end_in_an_error_however_small_the_set(count):
    with pytest.raises(LoaderError, match=r"did not come.* at chunk \d"):
        first(loader(Stub(count, read=lambda number: threading.Event().wait())), 1)


def test_slow_images_are_progress():
    batches = first(loader(Stub(64, see=lambda number: time.sleep(0.2)), threads=1, timeout=0.5), 1)
    assert len(batches[0].keys) == 8


def test_no_batch_before_its_codes():
    gate, came = threading.Event(), threading.Event()
    batches = loader(Stub(64, read=lambda number: gate.wait()), images="none", timeout=30).batches()
    threading.Thread(target=lambda: (next(batches), came.set()), daemon=True).start()
    assert not came.wait(0.3)
    gate.set()
    assert came.wait(5)


def test_an_image_that_fails_is_the_one_that_is_named():
    def see(number):
        if number == 37:
            raise ValueError("pixels")

    with pytest.raises(LoaderError, match=r"failed at sample 's37' \(ValueError: pixels\)"):
        list(loader(Stub(64, see=see)).evaluation(32))


def test_slow_codes_are_waited_for():
    for batch in first(loader(Stub(64, read=lambda number: time.sleep(0.02))), 8):
        assert (batch.codes[:, 0, 0, 0].numpy() == batch.samples % 100).all()


def test_a_chunk_that_fails_ends_a_later_batch_too_not_only_the_first():
    def read(number):
        if number == 20:
            raise ValueError("chunk")

    served = []
    with pytest.raises(LoaderError, match=r"failed at chunk 1 of shard 1 \(ValueError: chunk\)"):
        served.extend(batch.samples.max() for batch in loader(Stub(32, read=read), timeout=0.6).evaluation(2))
    assert max(served, default=0) < 20
    many = loader(Stub(32, read=read), batch_size=1, timeout=0.6)
    with pytest.raises(LoaderError, match="ValueError: chunk"):
        first(many, 32)


def test_evaluation_is_whole_unflipped_the_chosen_and_always_masked_alike():
    stub = Stub(40)
    chosen = np.arange(40) % 3 == 0
    runs = [list(loader(stub, chosen).evaluation(5)) for _ in range(2)]
    assert np.concatenate([b.samples for b in runs[0]]).tolist() == np.flatnonzero(chosen).tolist()
    for a, b in zip(*runs, strict=True):
        assert a.boxes.tolist() == [[0, 0, 1, 1]] * len(a.keys)
        assert not a.flips.any()
        assert torch.equal(a.ids_shuffle, b.ids_shuffle)
        assert (a.pixels[:, 0, 0, 0].numpy() == a.samples % 100).all()


def test_views_masks_and_order_depend_on_seed_and_epoch_and_not_on_each_other():
    def seen(seed, step):  # by sample: a whole epoch
        batches = loader(Stub(32), batch_size=32, seed=seed).batches(step)
        batch = next(batches)
        batches.close()
        return batch.boxes, batch.ids_shuffle

    one, again, epoch, seed = seen(0, 0), seen(0, 0), seen(0, 1), seen(1, 0)
    for a, b, c, d in zip(one, again, epoch, seed, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert not torch.equal(a, d)
    orders = [np.concatenate([b.samples for b in first(loader(Stub(64), seed=s), 8)]).tolist() for s in (0, 1)]
    assert orders[0] != orders[1]


def test_masks_are_not_drawn_from_the_words_of_the_view():
    from sami_cache.data.views import VIEW_DRAWS
    from sami_cache.order import random_words

    (batch,) = first(loader(Stub(64)), 1)
    words = random_words(0, 0, batch.samples, VIEW_DRAWS + 196)[:, VIEW_DRAWS:]
    assert (batch.ids_shuffle.numpy() == words.argsort(1)).all()


def test_every_shard_is_opened_once_also_where_few_samples_are_chosen():
    stub = Stub(16 * 60)
    list(loader(stub, np.arange(16 * 60) % 16 == 3).evaluation(4))
    assert sorted(stub.opens) == list(range(60))
    assert not stub.expected  # a sixteenth of each: the rest is not to be read
    stub = Stub(16 * 60)
    list(loader(stub, open_shards=1).evaluation(4))
    assert sorted(stub.opens) == sorted(stub.expected) == list(range(60))


@pytest.mark.parametrize("expect", [lambda shard: 1 / 0, lambda shard: threading.Event().wait()])
def test_reading_ahead_may_fail_or_stand_still(expect):
    """It only saves time: who needs the bytes reads them, and says what is wrong with them."""
    stub = Stub(16 * 12)
    stub.expect = expect
    served = [number for batch in loader(stub).evaluation(8) for number in batch.samples.tolist()]
    assert served == list(range(16 * 12))


def test_files_are_let_go():
    import weakref

    stub, alive = Stub(16 * 60), weakref.WeakSet()
    real, most = stub.open, 0

    def opening(number):
        shard = real(number)
        alive.add(shard)
        return shard

    stub.open = opening
    for _ in loader(stub).evaluation(4):
        most = max(most, len(alive))
    assert most <= 4 * 2 + 2


def test_a_device_s_batches_close_the_loader_when_the_consumer_leaves():
    batches = loader(Stub(64)).batches()
    given = on_device(batches, torch.device("cpu"))
    next(given)
    given.close()
    with pytest.raises(StopIteration):
        next(batches)
