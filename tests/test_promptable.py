"""Training a promptable model: losses, prompts, rounds, and a tiny model that learns two pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sami_cache.data.annotations import open_annotations
from sami_cache.errors import SamiCacheError
from sami_cache.inference.measuring import ModelSegmenter, measure_objects
from sami_cache.inference.protocols import PROTOCOLS
from sami_cache.mask_losses import iou_loss, mask_iou, mask_loss
from sami_cache.models.segment_anything import SegmentAnythingConfig
from sami_cache.prompts import (
    PromptConfig,
    augmentation,
    collate,
    first_prompts,
    noisy_box,
    tight_box,
    to_cells,
    uniform_points,
)
from sami_cache.steps import PictureSteps, prepared
from sami_cache.tasks.promptable import PromptableTask, RoundsConfig, TrainedSegmentAnything, error_points
from sami_cache.training import TrainConfig, Trainer
from sami_cache.workers import LoaderError

CPU = torch.device("cpu")


def tiny(family="sam", size=64, seed=0) -> TrainedSegmentAnything:
    torch.manual_seed(seed)
    return TrainedSegmentAnything(SegmentAnythingConfig(family=family, encoder="vit_t", depth=1, image_size=size))


def write_pictures(folder, count=2, width=64, height=48, whole=True):
    """Two bright ellipses a picture, as polygons; a crowd, and if `whole` an object as large as the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    y, x = np.mgrid[:height, :width]
    for number in range(count):
        pixels = np.full((height, width, 3), 30, np.uint8)
        for part in range(2):
            cx, cy = 16 + 32 * part, 14 + 8 * ((number + part) % 3)
            a, b = 9 + number % 3, 11 - part
            pixels[((x + 0.5 - cx) / a) ** 2 + ((y + 0.5 - cy) / b) ** 2 < 1] = (220, 200 - 90 * part, 90)
            angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            polygon = np.stack([cx + a * np.cos(angles), cy + b * np.sin(angles)], 1).ravel().round(2).tolist()
            annotations.append({"id": len(annotations), "image_id": number, "segmentation": [polygon], "category_id": 1})
        annotations.append(annotations[-1] | {"id": len(annotations), "iscrowd": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]})
        if whole:
            corners = [[0, 0, width, 0, width, height, 0, height]]
            annotations.append({"id": len(annotations), "image_id": number, "segmentation": corners, "category_id": 1})
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_mask_loss_is_the_formula():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(3, 4, 6)) * 2, rng.random((4, 6)) < 0.4
    inside = np.zeros((4, 6), bool)
    inside[:3, :5] = True
    given = torch.tensor(logits)[None], torch.tensor(target)[None], torch.tensor(inside)
    found, lighter = mask_loss(*given), mask_loss(*given, focal_weight=3)
    for mask in range(3):
        focal, overlap, both = 0.0, 0.0, 0.0
        for i, j in np.argwhere(inside):
            p = 1 / (1 + np.exp(-logits[mask, i, j]))
            right, alpha = (p, 0.25) if target[i, j] else (1 - p, 0.75)
            focal -= alpha * (1 - right) ** 2 * np.log(right) / inside.sum()
            overlap += p * target[i, j]
            both += p + target[i, j]
        dice = 1 - (2 * overlap + 1) / (both + 1)
        assert float(found[0, mask]) == pytest.approx(20 * focal + dice, rel=1e-5)
        assert float(lighter[0, mask]) == pytest.approx(3 * focal + dice, rel=1e-5)


def test_iou_and_its_estimate():
    true = torch.zeros(2, 4, 4, dtype=torch.bool)
    true[0, :2] = True
    logits = torch.full((2, 3, 4, 4), -1.0)
    logits[0, 0, :, :2] = 1.0  # 4 of 12
    logits[0, 1, :2] = 1.0  # all of it
    inside = torch.ones(4, 4, dtype=torch.bool)
    assert mask_iou(logits > 0, true[:, None]).tolist() == [[pytest.approx(1 / 3), 1, 0], [1, 1, 1]]
    found = iou_loss(torch.full((2, 3), 0.5), logits, true, inside)
    assert found.flatten().tolist() == pytest.approx([1 / 36, 0.25, 0.25, 0.25, 0.25, 0.25])
    inside[2:] = False  # what is answered outside of the picture does not count
    assert float(iou_loss(torch.full((2, 3), 0.5), logits, true, inside)[0, 0]) == pytest.approx(0)


class Canned(TrainedSegmentAnything):
    """Answers every query with given logits and estimates."""

    def decode(self, embeddings, points, labels, masks=None):
        self.asked.append((points, labels, masks))
        return self.answer


def canned(target, box: bool):
    from sami_cache.models.segment_anything import Masks
    from sami_cache.prompts import Prompted

    torch.manual_seed(0)
    model = Canned(SegmentAnythingConfig(encoder="vit_t", depth=1, image_size=64))
    logits = torch.randn(1, 1, 4, 16, 16, requires_grad=True)
    with torch.no_grad():
        logits[0, 0, 2] += 3 * (target * 2.0 - 1)  # the second of the three is best
    model.answer, model.asked = Masks(logits, torch.tensor([[[0.1, 0.2, 0.3, 0.9]]])), []
    batch = Prompted(
        pixels=torch.zeros(1, 3, 64, 64),
        inside=torch.ones(1, 16, 16, dtype=torch.bool),
        targets=target[None, None],
        points=torch.tensor([[[[4.0, 4.0], [50.0, 50.0]]]]),
        labels=torch.tensor([[[2, 3] if box else [1, -1]]]),
        real=torch.ones(1, 1, dtype=torch.bool),
        draws=torch.full((1, 1, 3), 0.5),
    )
    return model, batch, logits


@pytest.mark.parametrize(("box", "focal_weight"), [(False, 20.0), (True, 20.0), (True, 3.0)])
def test_the_best_of_three_is_trained_and_token_0_by_boxes_and_later_rounds(box, focal_weight):
    target = torch.zeros(16, 16, dtype=torch.bool)
    target[3:9, 4:12] = True
    model, batch, logits = canned(target, box)
    scores = mask_loss(logits[0, 0], target, batch.inside[0], focal_weight)
    values = model(batch, [], False, focal_weight)
    assert scores[1:].argmin() == 1
    estimates = iou_loss(model.answer.iou[0, 0], logits[0, 0], target, batch.inside[0])
    best, single = scores[2] + estimates[1:].mean(), scores[0] + estimates[0]
    assert float(values["loss"]) == pytest.approx(((best + single) / 2 if box else best).item())
    values["loss"].backward()
    assert logits.grad is not None
    taught = logits.grad[0, 0].abs().sum((1, 2)) > 0
    assert taught.tolist() == [box, False, True, False]
    # What is shown, and prompts the next round, is the one that the decoder rates highest.
    assert float(values["iou_first"]) == pytest.approx(float(mask_iou(logits[0, 0, 3] > 0, target)))
    logits.grad = None
    values = model(batch, [True, False], False, focal_weight)
    assert torch.equal(model.asked[-2][2][:, :, 0], logits[:, :, 3])
    assert torch.equal(model.asked[-1][2][:, :, 0], logits[:, :, 0])
    assert [asked[1].shape[2] for asked in model.asked[1:]] == [2, 3, 3]
    assert float(values["loss_last"]) == pytest.approx(single.item())
    values["loss"].backward()
    assert (logits.grad[0, 0, 0] != 0).any()


def test_error_points_lie_where_the_answer_is_wrong():
    torch.manual_seed(0)
    targets = torch.zeros(1, 3, 16, 16, dtype=torch.bool)
    targets[0, :, 4:10, 4:10] = True
    answer = torch.where(targets, 1.0, -1.0)
    answer[0, 0, 4:6, 4:10] = -1  # missed
    answer[0, 1, 12, 2:9] = 1  # too much
    inside = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    inside[..., :13, :] = True
    answer[0, :, 14:] = 1  # outside of the picture: nobody can point there
    seen = [set(), set(), set()]
    for _ in range(200):
        points, labels = error_points(answer, targets, inside, torch.rand(1, 3))
        assert points.shape == (1, 3, 1, 2)
        for query, (x, y) in enumerate(points[0, :, 0].tolist()):
            column, row = (x - 1.5) / 4, (y - 1.5) / 4
            assert labels[0, query, 0] == targets[0, query, int(row), int(column)]
            seen[query].add((int(row), int(column)))
    assert seen[0] == {(row, column) for row in (4, 5) for column in range(4, 10)}
    assert seen[1] == {(12, column) for column in range(2, 9)}
    assert len(seen[2]) > 100  # nothing is wrong: anywhere in the picture
    assert max(row for row, _ in seen[2]) <= 12


def test_noise_of_boxes_is_bounded_and_a_tenth():
    rng, config = np.random.default_rng(0), PromptConfig()
    box = np.array([[100.0, 200.0], [180.0, 800.0]])
    noise = np.array([noisy_box(box, config, rng) - box for _ in range(4000)])
    assert np.abs(noise).max() == 20.0
    assert noise[..., 0].std() == pytest.approx(8, rel=0.06)  # a tenth of 80, hardly cut
    assert (np.abs(noise[..., 1]) == 20).mean() == pytest.approx(0.739, abs=0.03)  # |N(0, 60)| > 20
    tiny_box = np.array([noisy_box(np.array([[5.0, 5.0], [6.0, 6.0]]), PromptConfig(box_noise=3.0), rng) for _ in range(99)])
    assert (tiny_box[:, 1] >= tiny_box[:, 0]).all()


def test_points_are_uniform_inside_the_mask():
    mask = np.zeros((20, 30), bool)
    mask[3:6, 4:9] = mask[15, 20:25] = True
    rng = np.random.default_rng(0)
    points = np.concatenate([uniform_points(mask, 1, rng) for _ in range(4000)])
    hits = np.zeros_like(mask, int)
    np.add.at(hits, (points[:, 1], points[:, 0]), 1)
    assert (hits[~mask] == 0).all()
    assert hits[mask].min() > 140
    assert hits[mask].max() < 260
    assert tight_box(mask) == (4, 3, 25, 16)


@pytest.mark.parametrize(("covered", "shape"), [((48, 64), (48, 64)), ((48, 64), (480, 640)), ((37, 64), (41, 71))])
def test_targets_are_the_low_resolution_masks(covered, shape):
    y, x = np.mgrid[: shape[0], : shape[1]]
    mask = ((x / shape[1] - 0.5) / 0.3) ** 2 + ((y / shape[0] - 0.6) / 0.35) ** 2 < 1
    found = to_cells(mask, covered, 16)
    # Every cell against the share of it that the mask takes, counted on a fine lattice.
    fine = (np.arange(16 * 40) + 0.5) / 10
    rows, columns = np.floor(fine * shape[0] / covered[0]).astype(int), np.floor(fine * shape[1] / covered[1]).astype(int)
    padded = np.zeros((shape[0] * 3, shape[1] * 3), bool)
    padded[: shape[0], : shape[1]] = mask
    share = padded[rows][:, columns].reshape(16, 40, 16, 40).mean((1, 3))
    clear = np.abs(share - 0.5) > 0.05
    assert np.array_equal(found[clear], share[clear] > 0.5)
    assert found.any()


def test_first_prompts_follow_seed_epoch_and_picture(tmp_path):
    annotations = open_annotations(write_pictures(tmp_path), tmp_path)
    model = tiny()
    make = first_prompts(annotations, model, PromptConfig(), 3)
    one, again, other = make(0, 1), make(0, 1), make(1, 1)
    assert all(torch.equal(*pair) for pair in zip(one, again, strict=True))
    assert not torch.equal(one.points, other.points)
    assert one.targets.shape == (2, 16, 16)  # neither the crowd nor what fills the picture
    assert one.inside.sum() == 12 * 16
    kinds = set()
    for epoch in range(12):
        found = make(epoch, 0)
        for points, labels, target in zip(found.points.tolist(), found.labels.tolist(), found.targets, strict=True):
            kinds.add(tuple(labels))
            if labels == [1, -1]:
                x, y = points[0]
                near = target[max(0, int(y) // 4 - 1) : int(y) // 4 + 2, max(0, int(x) // 4 - 1) : int(x) // 4 + 2]
                assert near.any()
            else:
                assert min(map(min, points)) >= 0
                assert points[1][0] <= 64
                assert points[1][1] <= 48
    assert kinds == {(1, -1), (2, 3)}
    few = first_prompts(annotations, model, PromptConfig(max_objects=1), 3)
    drawn = {tuple(few(epoch, 0).targets[0].flatten().tolist()) for epoch in range(9)}
    assert drawn == {tuple(target.flatten().tolist()) for target in make(0, 0).targets}
    batch = collate([few(0, 0), make(0, 1)])
    assert batch.real.tolist() == [[True, False], [True, True]]
    assert batch.labels[0, 1].tolist() == [-1, -1]


def test_pictures_and_masks_are_cut_and_mirrored_alike(tmp_path):
    annotations = open_annotations(write_pictures(tmp_path), tmp_path)
    image, mask = annotations.read_image(0), annotations.objects(0)[0].mask()
    rng, config = np.random.default_rng(0), PromptConfig(flip=True, crop=0.4)
    # The mask as a colour of its own: wherever the picture goes, it goes.
    marked = np.concatenate([image, mask[..., None] * np.uint8(255)], axis=2)
    shapes, mirrored = set(), 0
    for _ in range(40):
        augment = augmentation(*mask.shape, config, rng)
        both, alone = augment(marked), augment(mask)
        assert np.array_equal(both[..., 3] > 0, alone)
        assert min(alone.shape[0] / mask.shape[0], alone.shape[1] / mask.shape[1]) >= 0.4 - 1 / min(mask.shape)
        shapes.add(alone.shape)
        mirrored += alone.strides[1] < 0
    assert len(shapes) > 20
    assert 10 < mirrored < 30
    plain = augmentation(*mask.shape, PromptConfig(), np.random.default_rng(0))
    assert np.array_equal(plain(image), image)
    # Through the whole: what is asked lies in what is left.
    make = first_prompts(annotations, tiny(), config, 0)
    for epoch in range(12):
        found = make(epoch, 0)
        assert found.targets.any((1, 2)).all()
        for point, labels, target in zip(found.points, found.labels, found.targets, strict=True):
            if labels[0] == 1:
                column, row = (point[0] / 4).long().tolist()
                assert target[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].any()


@pytest.mark.parametrize("family", ["sam", "efficientsam"])
def test_recomputing_changes_nothing_and_fillers_count_for_nothing(tmp_path, family):
    annotations = open_annotations(write_pictures(tmp_path), tmp_path)
    model = tiny(family)
    make = first_prompts(annotations, model, PromptConfig(), 0, 2)
    rounds = [True, False] if family == "sam" else [True, True]
    batch = collate([make(0, 0)])
    grads = []
    for recompute in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        values = model(batch, rounds, recompute)
        values["loss"].backward()
        grads.append([values["loss"].detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    more = batch._replace(
        targets=batch.targets.repeat(1, 2, 1, 1),
        points=batch.points.repeat(1, 2, 1, 1),
        labels=batch.labels.repeat(1, 2, 1),
        real=torch.tensor([[True, True, False, False]]),
    )
    assert float(model(more, [], False)["loss"]) == pytest.approx(float(model(batch, [], False)["loss"]), rel=1e-5)
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []  # several processes would wait for it


def test_rounds_as_published():
    rng = np.random.default_rng(0)
    drawn = [RoundsConfig().draw(rng) for _ in range(300)]
    assert {len(rounds) for rounds in drawn} == {10}
    assert all(sum(rounds) == 8 and not rounds[-1] for rounds in drawn)
    assert {rounds.index(False) for rounds in drawn} == set(range(9))
    RoundsConfig(error_points=4, mask_rounds=0).check("efficientsam")
    for bad in (RoundsConfig(error_points=5, mask_rounds=0), RoundsConfig(error_points=4, mask_rounds=1)):
        with pytest.raises(SamiCacheError, match="expected up to 4 and 0, since a decoder of family efficientsam"):
            bad.check("efficientsam")


def make_task(folder, family="sam", *, batch_size=2, accumulate=1, seed=0, rounds=None) -> PromptableTask:
    path = folder / "instances.json"
    annotations = open_annotations(path if path.exists() else write_pictures(folder), folder)
    model = tiny(family, seed=seed)
    rounds = rounds or RoundsConfig(error_points=1, mask_rounds=1 if family == "sam" else 0)
    make = first_prompts(annotations, model, PromptConfig(), seed, rounds.error_points)
    steps = PictureSteps(len(annotations), make, batch_size=batch_size, accumulate=accumulate, seed=seed, threads=1)
    return PromptableTask(model, steps, rounds, held_out=annotations, numbers=[0, 1], device=CPU)


def config(**changes) -> TrainConfig:
    fields = {"steps": 6, "batch_size": 2, "lr": 1e-3, "seed": 0, "log_every": 1, "checkpoint_every": 3, "schedule": "linear"}
    return TrainConfig(**(fields | {"betas": (0.9, 0.999), "precision": "float32"} | changes))


def test_two_pictures_are_learnt(tmp_path):
    write_pictures(tmp_path / "data", whole=False)
    task = make_task(tmp_path / "data", rounds=RoundsConfig(error_points=1, mask_rounds=0))
    last = Trainer(task, config(steps=70, evaluate_every=70, checkpoint_every=70), tmp_path / "run", CPU).fit()
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert last["loss"] < 0.2 * logged[1]["loss"]
    assert last["iou_last"] > 0.9
    # The box alone: pi / 4 for an ellipse.
    assert 0.7 < last["heldout_box_itself_miou"] < 0.9
    assert last["heldout_box_miou"] > logged[0]["heldout_box_miou"] + 0.2
    assert last["heldout_click_miou"] > logged[0]["heldout_click_miou"] + 0.1


def test_what_a_run_logs_is_what_evaluation_measures(tmp_path):
    task = make_task(tmp_path / "data")
    with torch.no_grad():
        logged = task.evaluate(task.model.eval())
    annotations = open_annotations(tmp_path / "data" / "instances.json", tmp_path / "data")
    segmenter, found = ModelSegmenter(task.model), {"1": [], "box": []}
    for number in range(len(annotations)):
        segmenter.set_image(annotations.read_image(number))
        objects = [one for one in annotations.objects(number) if not one.crowd]
        for prompt, values in measure_objects(segmenter, objects, PROTOCOLS["efficientsam"], ("1", "box")).items():
            found[prompt] += values
    assert logged["heldout_click_miou"] == pytest.approx(np.mean(found["1"]), abs=1e-6)
    assert logged["heldout_box_three_miou"] == pytest.approx(np.mean(found["box"]), abs=1e-6)


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    write_pictures(tmp_path / "data", 5)
    options = {"batch_size": 2, "accumulate": 2}
    whole = make_task(tmp_path / "data", **options)
    Trainer(whole, config(accumulate=2), tmp_path / "whole", CPU).fit()

    class Stopped(PromptableTask):
        def batches(self, start_step):
            for number, batch in enumerate(super().batches(start_step)):
                if number == 2 * 4 + 1:
                    raise RuntimeError("pulled the plug")
                yield batch

    part = make_task(tmp_path / "data", **options)
    part.__class__ = Stopped
    with pytest.raises(RuntimeError, match="pulled the plug"):
        Trainer(part, config(accumulate=2), tmp_path / "part", CPU).fit()
    resumed = make_task(tmp_path / "data", **options, seed=0)
    trainer = Trainer(resumed, config(accumulate=2), tmp_path / "part", CPU, resume=True)
    assert trainer.step == 3
    trainer.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("family", ["sam", "efficientsam"])
def test_a_step_may_be_cut_into_any_parts(tmp_path, family):
    """Pictures with unequal numbers of objects, and rounds whose points are drawn: the same weights however it is cut."""
    path = write_pictures(tmp_path / "data", 4)
    data = json.loads(path.read_text())
    few = data["images"][0]["id"]
    first = next(one["id"] for one in data["annotations"] if one["image_id"] == few and not one.get("iscrowd"))
    data["annotations"] = [one for one in data["annotations"] if one["image_id"] != few or one["id"] == first]
    path.write_text(json.dumps(data))
    gradients = []
    for parts in (1, 2, 4):
        rounds = RoundsConfig(error_points=2, mask_rounds=0)
        task = make_task(tmp_path / "data", family, batch_size=4, accumulate=parts, rounds=rounds)
        assert len({len(task.steps.make(0, number).real) for number in range(4)}) > 1
        trainer = Trainer(task, config(steps=1, batch_size=4, accumulate=parts), tmp_path / str(parts), CPU)
        trainer.fit()
        gradients.append({name: one for name, one in trainer.optimizer.named_state().items() if name.endswith("/exp_avg")})
    for cut in gradients[1:]:
        for name, value in gradients[0].items():
            assert float((value - cut[name]).norm()) <= 1e-3 * float(value.norm()) + 1e-8, name


def test_steps_deal_every_picture_once_an_epoch_to_some_rank():
    made = lambda epoch, number: (epoch, number)  # noqa: E731
    options = {"batch_size": 4, "seed": 1, "threads": 2}
    whole = PictureSteps(11, made, **options)
    assert whole.steps_per_epoch == 2
    batches = whole.batches(0)
    seen = [next(batches) for _ in range(6)]
    batches.close()
    for epoch in range(3):
        numbers = [number for batch in seen[2 * epoch : 2 * epoch + 2] for at, number in batch if at == epoch]
        assert len(set(numbers)) == 8
    later = whole.batches(3)
    assert next(later) == seen[3]
    later.close()
    shares = [PictureSteps(11, made, **options, rank=rank, world=2, accumulate=2).batches(3) for rank in (0, 1)]
    dealt = [item for share in shares for _ in range(2) for item in next(share)]
    for share in shares:
        share.close()
    assert sorted(dealt) == sorted(seen[3])
    with pytest.raises(SamiCacheError, match="--batch-size 12 is more than the 11 pictures"):
        PictureSteps(11, made, batch_size=12)


def test_a_picture_that_never_comes_ends_the_run():
    import threading

    never = threading.Event()
    with pytest.raises(LoaderError, match=r"no picture came for 0\.1 s \(picture-0 at picture 0"):
        list(prepared(lambda number: never.wait(), [(0,)], threads=1, timeout=0.1))
    never.set()
    with pytest.raises(SamiCacheError, match="sa_7"):
        list(prepared(_fail, [(7,)], threads=1))


def _fail(number):
    raise SamiCacheError(f"sa_{number} is damaged")


def test_coordinates_are_not_rounded_under_autocast():
    model = tiny()
    points, labels = torch.tensor([[[40.3, 21.7]]]), torch.tensor([[1]])
    want = model.embed_prompts(points, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.embed_prompts(points, labels), want)
        assert model._image_positions(torch.zeros(1, 256, 4, 4)).dtype == torch.float32
