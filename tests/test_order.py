"""The order of an epoch, how ranks share it, and the random numbers of a sample."""

import numpy as np
import pytest

from sami_cache.order import Course, deal, epoch_order, random_words, uniform


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_ranks_share_the_steps_of_one_order(world):
    order = np.random.default_rng(0).permutation(500)
    parts = [deal(order, 24, rank, world) for rank in range(world)]
    assert {part.shape for part in parts} == {(20, 24 // world)}
    for step in range(20):
        together = np.concatenate([part[step] for part in parts])
        assert sorted(together.tolist()) == sorted(order[24 * step : 24 * step + 24].tolist())


def test_a_rank_reads_its_share_of_the_chunks_and_little_more():
    """Dealt as they come, eight ranks would each read nearly every chunk of 16 samples."""
    order = epoch_order(np.ones(64 * 512, bool), 512, seed=0, epoch=0, open_shards=8)
    for batch_size, most in ((256, 0.35), (4096, 0.15)):
        read = [len(np.unique(deal(order, batch_size, rank, 8) // 16)) / 2048 for rank in range(8)]
        assert sum(read) >= 1
        assert max(read) < most
    as_they_come = [len(np.unique(order.reshape(-1, 256)[:, 32 * rank : 32 * rank + 32] // 16)) / 2048 for rank in range(8)]
    assert min(as_they_come) > 0.85


@pytest.mark.parametrize(("count", "size", "chunk"), [(96, 8, 4), (90, 16, 16), (7, 32, 2), (64, 1, 8)])
def test_a_course_asks_for_every_chunk_once_when_it_is_first_needed(count, size, chunk):
    numbers = np.random.default_rng(1).permutation(200)[:count]
    course = Course(3, numbers, size, chunk, 2 * chunk)
    served, asked = [], []
    for part in range(len(course)):
        for group in course.first_needed(part):
            wanted = course.chunk(group)
            assert wanted.parts[0] == part
            assert wanted.parts == sorted(wanted.parts)
            assert wanted.parts[-1] == course.last_part(group)
            assert len(wanted.places) == (numbers // chunk == wanted.number).sum()  # all of the chunk's
            for place, where, row in zip(wanted.places, wanted.parts, wanted.rows, strict=True):
                assert course.part(where)[row] == wanted.number * chunk + place
            asked.append(wanted.number)
        shards = list(dict.fromkeys(number // 2 for number in asked))
        assert course.shards[: course.shards_until(part)] == shards
        served += course.part(part).tolist()
    assert served == numbers.tolist()
    assert sorted(asked) == sorted(set((numbers // chunk).tolist()))


def test_chunks_for_one_batch_are_asked_for_as_they_lie_on_the_disk():
    course = Course(0, np.random.default_rng(2).permutation(4096), 512, 16, 512)
    first = [course.chunk(group).number for group in course.first_needed(0)]
    assert len(first) > 200
    assert first == sorted(first)


def test_random_words_belong_to_the_sample_not_to_its_batch():
    numbers = np.array([5, 1_000_000, 7, 0])
    words = random_words(1, 2, numbers, 40)
    assert (random_words(1, 2, numbers[2:3], 40) == words[2]).all()
    assert (random_words(1, 2, numbers, 12) == words[:, :12]).all()
    others = [random_words(*seed_and_epoch, numbers, 40) for seed_and_epoch in ((1, 3), (2, 2), (2, 1))]
    assert len(np.unique(np.concatenate([words, *others]))) == 4 * 4 * 40
    # What a run of today draws, a later version must draw again.
    assert words[0, :2].tolist() == WORDS


WORDS = [12612039537528388161, 6480615117133641331]


def test_random_words_are_uniform_and_independent():
    words = random_words(0, 0, np.arange(4096), 64)
    values = uniform(words)
    assert values.min() >= 0
    assert values.max() < 1
    # Of 262,144 values: mean within 4 standard errors, every bit set half of the time.
    assert abs(values.mean() - 0.5) < 4 / np.sqrt(12 * values.size)
    bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 64).mean(0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / np.sqrt(values.size)
    # Neither neighbouring samples nor neighbouring draws have anything in common.
    assert np.abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.01
    assert np.abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.01
    ranks = values.argsort(1)
    assert np.abs(np.bincount(ranks[:, 0], minlength=64) - 64).max() < 45  # 5.6 standard deviations
