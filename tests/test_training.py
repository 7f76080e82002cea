"""The trainer on a task of a few hundred weights. Run as a script, this file is the process that the tests kill."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sami_cache.checkpoints import NotFiniteError, list_checkpoints, load_checkpoint, load_weights, save_checkpoint
from sami_cache.errors import DamageError, DiskFullError, IdentityError, SamiCacheError
from sami_cache.optimizer import NamedAdamW
from sami_cache.peers import PeerError, leave
from sami_cache.processes import Interrupted, distributed, rank_and_world
from sami_cache.training import TrainConfig, Trainer, learning_rate

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


class Toy(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 8))
        self.body = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 4))

    def forward(self, rows):
        return self.body(rows + self.cls_token)


class ToyTask:
    """Rows are a function of the step; ranks and micro-batches cut them up."""

    steps_per_epoch = 10.0

    def __init__(self, config: TrainConfig, *, dropout=0.2, delay=0.0, poison_at=None, poison="loss", at_step=None):
        torch.manual_seed(config.seed)
        self.model, self.config, self.delay, self.poison_at, self.poison = Toy(dropout), config, delay, poison_at, poison
        self.at_step = at_step or (lambda step: None)
        self.asked: list[int] = []
        self.closed = False

    def batches(self, start_step):
        self.asked.append(start_step)
        rank, world = rank_and_world()
        try:
            for step in range(start_step, self.config.steps):
                self.at_step(step)
                time.sleep(self.delay)
                generator = torch.Generator().manual_seed(step)
                rows = torch.randn(self.config.batch_size, 8, generator=generator)
                target = torch.sin(rows[:, :4] * 2) + 0.5
                for part in zip(*(t.chunk(self.config.accumulate * world) for t in (rows, target)), strict=True):
                    if rank == 0 or world == 1:
                        yield step, *part
                    rank = (rank - 1) % world
        finally:
            self.closed = True

    def loss(self, model, batch, device):
        step, rows, target = batch
        loss = (model(rows.to(device)) - target.to(device)).square().mean()
        if step == self.poison_at:
            loss = loss * math.nan if self.poison == "loss" else loss + (model(rows) * 0).sqrt().sum() * 0
        return {"loss": loss, "twice": 2 * loss.detach()}

    def evaluate(self, model):
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"held_out": (torch.rand(3).sum() * 0 + next(model.parameters()).sum()).item()}


def configure(**changes) -> TrainConfig:
    fields = {"steps": 40, "batch_size": 16, "lr": 1e-2, "seed": 5, "warmup_steps": 4, "log_every": 1, "checkpoint_every": 10}
    return TrainConfig(**(fields | changes))


def train(run, config, *, resume=False, trainer_options=None, **task_options):
    task = ToyTask(config, **task_options)
    final = Trainer(task, config, run, CPU, resume=resume, **(trainer_options or {})).fit()
    return task, final


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    steps = [line["step"] for line in lines(run)]
    assert steps == sorted(set(steps)), "every step once"
    return {line["step"]: line["loss"] for line in lines(run) if "loss" in line}


def weights(run, step=40):
    return load_checkpoint(run / "checkpoints" / f"step-{step:08d}").model


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes started below: the number of threads may change the last bit of a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    task, final = train(run, configure())
    return run, task, final


def test_a_linear_schedule_falls_by_equal_steps():
    config = configure(steps=100, warmup_steps=10, lr=2.0, min_lr=0.2, schedule="linear")
    assert learning_rate(9, config) == learning_rate(10, config) == 2.0
    assert learning_rate(55, config) == pytest.approx(1.1)
    assert learning_rate(100, config) == pytest.approx(0.2)
    assert learning_rate(30, config) - learning_rate(31, config) == pytest.approx(1.8 / 90)
    poly = configure(steps=100, warmup_steps=10, lr=2.0, min_lr=0.2, schedule="poly")
    assert learning_rate(55, poly) == pytest.approx(0.2 + 1.8 * 0.5**0.9)
    with pytest.raises(SamiCacheError, match="schedule is 'step': expected 'cosine', 'linear' or 'poly'"):
        configure(schedule="step")


def test_runs_from_before_there_was_a_choice_of_schedule_go_on(tmp_path):
    assert "schedule" not in Trainer(ToyTask(configure()), configure(), tmp_path / "cosine", CPU).settings["train"]
    linear = Trainer(ToyTask(configure()), configure(schedule="linear"), tmp_path / "linear", CPU)
    assert linear.settings["train"]["schedule"] == "linear"


def test_learning_rate_at_its_corners():
    config = configure(steps=100, warmup_steps=10, lr=2.0, min_lr=0.5)
    assert learning_rate(0, config) == pytest.approx(0.2)
    assert learning_rate(9, config) == learning_rate(10, config) == 2.0
    assert learning_rate(55, config) == pytest.approx(1.25)
    assert learning_rate(100, config) == pytest.approx(0.5)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, configure(steps=1, warmup_steps=0)) == 1e-2
    assert learning_rate(1, configure(steps=2, warmup_steps=2)) == 1e-2


def test_a_run_learns_and_leaves_its_records(undisturbed):
    run, task, final = undisturbed
    assert losses(run)[40] < 0.6 * losses(run)[1]
    assert list(losses(run)) == list(range(1, 41))
    assert final == lines(run)[-1]
    assert task.asked == [0]
    assert task.closed
    last = lines(run)[-1]
    assert last["twice"] == pytest.approx(2 * last["loss"])
    assert last["epoch"] == 4.0
    assert last["lr"] == learning_rate(39, configure())
    assert 0 <= last["data_wait_percent"] <= 100
    assert last["images_per_s"] > 0
    config = json.loads((run / "config.json").read_text())
    assert config["config"]["train"]["lr"] == 1e-2
    assert config["versions"]["torch"] == torch.__version__
    assert list((run / "tensorboard").glob("events*"))
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000030", "step-00000040"]
    assert not list((run / "checkpoints").glob(".unfinished*"))


def test_weight_decay_spares_vectors_and_tokens():
    optimizer = NamedAdamW(Toy(0.0), lr=1.0, betas=(0.9, 0.95), weight_decay=0.05)
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert optimizer.names[: len(decayed["params"])] == ["body.0.weight", "body.4.weight"]
    assert optimizer.names[2:] == ["cls_token", "body.0.bias", "body.1.weight", "body.1.bias", "body.4.bias"]


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    train(tmp_path / "one", configure(clip_grad=0.5), dropout=0.0)
    train(tmp_path / "four", configure(clip_grad=0.5, accumulate=4), dropout=0.0)
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    for name in one:
        torch.testing.assert_close(four[name], one[name], atol=1e-5, rtol=1e-4)
    assert losses(tmp_path / "four")[1] == pytest.approx(losses(tmp_path / "one")[1], rel=1e-6)
    assert all(line["grad_norm"] > 0 for line in lines(tmp_path / "four"))


def test_evaluating_and_logging_do_not_shift_the_training(tmp_path, undisturbed):
    _, final = train(tmp_path / "run", configure(evaluate_every=3, log_every=7, checkpoint_every=50))
    assert same(weights(tmp_path / "run"), weights(undisturbed[0]))
    assert [line["step"] for line in lines(tmp_path / "run") if "held_out" in line] == [0, *range(3, 40, 3), 40]
    assert "held_out" in final


def test_bfloat16_trains(tmp_path):
    train(tmp_path / "run", configure(precision="bfloat16"))
    assert losses(tmp_path / "run")[40] < 0.6 * losses(tmp_path / "run")[1]
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_in_hand_and_the_run_goes_on(tmp_path, undisturbed, number, code):
    before = signal.getsignal(number)
    stopper = {"on_log": lambda line: line["step"] == 17 and os.kill(os.getpid(), number)}
    with pytest.raises(Interrupted, match=rf"{number.name} after step 18 of 40.*--resume") as caught:
        train(tmp_path / "run", configure(), trainer_options=stopper)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000018"
    task, _ = train(tmp_path / "run", configure(), resume=True)
    assert task.asked == [18]
    assert losses(tmp_path / "run") == losses(undisturbed[0])
    assert same(weights(tmp_path / "run"), weights(undisturbed[0]))


def test_a_second_signal_abandons_at_once(tmp_path):
    def stop_twice(line):
        if line["step"] == 13:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("went on after the second signal")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="last checkpoint: step 10") as caught:
        train(tmp_path / "run", configure(), trainer_options={"on_log": stop_twice})
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000010"]


def test_fits_outside_the_main_thread(tmp_path, undisturbed):
    thread = threading.Thread(target=train, args=(tmp_path / "run", configure()))
    thread.start()
    thread.join()
    assert same(weights(tmp_path / "run"), weights(undisturbed[0]))


def test_killed_twice_it_is_bit_equal_to_the_undisturbed_run(tmp_path, undisturbed):
    run = tmp_path / "run"
    for at_least in (15, 27):
        child = subprocess.Popen([sys.executable, __file__, run, "{}", "0.03"], cwd=ROOT, env=ONE_THREAD)
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes().splitlines()) < at_least:
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.005)
        child.kill()
        assert child.wait() == -signal.SIGKILL
    task, _ = train(run, configure(), resume=True)
    assert task.asked[0] >= 20
    assert losses(run) == losses(undisturbed[0])
    assert same(weights(run), weights(undisturbed[0]))
    optimizer = [load_checkpoint(each / "checkpoints" / "step-00000040").optimizer for each in (run, undisturbed[0])]
    assert same(*optimizer)
    assert len(optimizer[0]) == 3 * 7


def test_killed_before_the_first_checkpoint_it_starts_again(tmp_path, undisturbed, caplog):
    def crash(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", configure(), trainer_options={"on_log": crash})
    task, _ = train(tmp_path / "run", configure(), resume=True)
    assert task.asked == [0]
    assert "no checkpoint yet: starting at step 0" in caplog.text
    assert losses(tmp_path / "run") == losses(undisturbed[0])
    assert len(lines(tmp_path / "run")) == 40


def test_resuming_a_finished_run_returns_its_last_line(tmp_path):
    _, final = train(tmp_path / "run", configure(steps=6))
    task, again = train(tmp_path / "run", configure(steps=6), resume=True)
    assert again == final
    assert task.asked == []


def test_resume_in_an_empty_directory_starts(tmp_path):
    assert train(tmp_path, configure(steps=5), resume=True)[0].asked == [0]


def test_a_torn_metrics_line_is_dropped(tmp_path, undisturbed):
    stopper = {"on_log": lambda line: line["step"] == 10 and signal.raise_signal(signal.SIGTERM)}
    with pytest.raises(Interrupted):
        train(tmp_path / "run", configure(), trainer_options=stopper)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "loss": 0.1}\n{"step": 1')
    train(tmp_path / "run", configure(), resume=True)
    assert losses(tmp_path / "run") == losses(undisturbed[0])


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def stop_at_25(tmp_path):
    run = tmp_path / "run"
    stopper = {"on_log": lambda line: line["step"] == 24 and signal.raise_signal(signal.SIGTERM)}
    with pytest.raises(Interrupted):
        train(run, configure(), trainer_options=stopper)
    return run


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, undisturbed, caplog, damage, file):
    run = stop_at_25(tmp_path)
    damage(run / "checkpoints" / "step-00000025" / file)
    (run / "checkpoints" / ".unfinished-00000026").mkdir()
    task, _ = train(run, configure(), resume=True)
    assert task.asked == [20]
    assert "falling back to the one before" in caplog.text
    assert "step-00000025" in caplog.text
    assert losses(run) == losses(undisturbed[0])
    assert same(weights(run), weights(undisturbed[0]))
    assert (run / "checkpoints" / "damaged-step-00000025").exists()
    assert not list((run / "checkpoints").glob(".unfinished*"))


def test_a_forged_step_is_found(tmp_path):
    run = stop_at_25(tmp_path)
    state = run / "checkpoints" / "step-00000025" / "state.json"
    state.write_text(state.read_text().replace('"step": 25', '"step": 35'))
    with pytest.raises(DamageError, match="not what its digest says"):
        load_checkpoint(state.parent)


def test_no_intact_checkpoint_is_an_error(tmp_path):
    run = stop_at_25(tmp_path)
    for path in list_checkpoints(run / "checkpoints"):
        cut(path / "model.safetensors")
    with pytest.raises(DamageError, match=r"no intact checkpoint.*step-00000025.*step-00000020"):
        train(run, configure(), resume=True)


# --- refusing -------------------------------------------------------------------------------------------------------


def test_a_used_directory_is_refused_with_both_ways_out(undisturbed):
    with pytest.raises(SamiCacheError, match=r"not empty: --resume continues.*--run DIR starts.*remove"):
        train(undisturbed[0], configure())


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(SamiCacheError, match=r"holds photo\.jpg but no run"):
        train(tmp_path, configure(), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_two_trainers_cannot_share_a_directory(tmp_path):
    task = ToyTask(configure())
    trainer = Trainer(task, configure(), tmp_path / "run", CPU)
    with pytest.raises(SamiCacheError, match="another process is training"):
        train(tmp_path / "run", configure(), resume=True)
    trainer.fit()


def test_other_settings_are_refused_field_by_field_and_free_ones_are_not(tmp_path):
    settings = {"cache_id": "abc", "loader": {"workers": 2, "window": 4}, "removed": None}
    options = {"settings": settings, "free_fields": ("loader.workers",), "on_log": lambda line: signal.raise_signal(15)}
    with pytest.raises(Interrupted):
        train(tmp_path / "run", configure(), trainer_options=options)
    changed = {"cache_id": "xyz", "loader": {"workers": 3, "window": 5}, "added": 1}
    with pytest.raises(IdentityError) as caught:
        train(tmp_path / "run", configure(steps=50), resume=True, trainer_options=options | {"settings": changed})
    for difference in ("cache_id: 'abc' in the run, 'xyz' now", "loader.window: 4", "train.steps: 40", "added", "removed"):
        assert difference in str(caught.value)
    assert "workers" not in str(caught.value)
    settings["loader"]["workers"] = 7
    free = configure(log_every=5, checkpoint_every=7, keep_checkpoints=1, evaluate_every=20)
    trainer_options = {"settings": settings, "free_fields": ("loader.workers",)}
    train(tmp_path / "run", free, resume=True, trainer_options=trainer_options)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["loader"]["workers"] == 7
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1


@pytest.mark.parametrize(("poison", "log_every"), [("loss", 1), ("loss", 100), ("gradient", 1)])
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path, poison, log_every):
    config = configure(checkpoint_every=5, log_every=log_every)
    with pytest.raises(NotFiniteError, match=r"loss of step (17|18) \(.*last checkpoint is of step 15"):
        train(tmp_path / "run", config, poison_at=17, poison=poison)
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000015"
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run", 15).values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss of the step is finite, its gradient is not, and the checkpoint is due at once."""
    with pytest.raises(NotFiniteError, match="no checkpoint written at step 10"):
        train(tmp_path / "run", configure(), poison_at=9, poison="gradient")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0: expected 1 or more"),
        ({"warmup_steps": 41}, "warmup_steps is 41 of 40"),
        ({"min_lr": 1.0}, "expected 0 <= min_lr <= lr"),
        ({"precision": "fp8"}, "expected 'auto', 'float32' or 'bfloat16'"),
        ({"seed": -1}, "expected 0 or more"),
        ({"accumulate": 3}, "batch_size 16 is no multiple of 1 processes x 3 micro-batches"),
    ],
)
def test_configurations_that_cannot_work(tmp_path, changes, message):
    with pytest.raises(SamiCacheError, match=message):
        train(tmp_path / "run", configure(**changes))
    assert not (tmp_path / "run").exists()


def test_batches_that_end_early(tmp_path):
    task = ToyTask(configure(steps=8))
    with pytest.raises(SamiCacheError, match="batches ended at step 8 of 40"):
        Trainer(task, configure(), tmp_path / "run", CPU).fit()


def test_a_full_disk_is_typed_and_keeps_the_last_checkpoint(tmp_path, undisturbed, monkeypatch):
    saved = load_checkpoint(undisturbed[0] / "checkpoints" / "step-00000040")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    options = {"optimizer": {}, "config": {}, "progress": {}, "keep": 1}
    save_checkpoint(tmp_path, 1, model=saved.model, **options)
    monkeypatch.setattr("sami_cache.checkpoints.save_file", full)
    with pytest.raises(DiskFullError, match=r"step 2 not written.*disk is full"):
        save_checkpoint(tmp_path, 2, model=saved.model, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert same(load_checkpoint(tmp_path / "step-00000001").model, saved.model)


# --- starting from weights ------------------------------------------------------------------------------------------


def test_start_from_a_run_a_checkpoint_or_a_file(tmp_path, undisturbed):
    run = undisturbed[0]
    save_file(weights(run), tmp_path / "weights.safetensors")
    checkpoint = run / "checkpoints" / "step-00000040"
    for path in (run, checkpoint, tmp_path / "weights.safetensors", checkpoint / "model.safetensors"):
        model = Toy(0.0)
        load_weights(model, path)
        assert same(model.state_dict(), weights(run))


def test_other_weights_are_refused_by_name(tmp_path, undisturbed):
    tensors = load_file(undisturbed[0] / "checkpoints" / "step-00000040" / "model.safetensors")
    tensors["extra"] = tensors.pop("cls_token")
    tensors["body.4.weight"] = torch.zeros(5, 32)
    save_file(tensors, tmp_path / "other.safetensors")
    expected = r"missing: cls_token; not in the model: extra; body\.4\.weight: expected \(4, 32\), found \(5, 32\)"
    with pytest.raises(IdentityError, match=expected):
        load_weights(Toy(0.0), tmp_path / "other.safetensors")


def test_pickles_and_rubbish_are_refused(tmp_path):
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(SamiCacheError, match="pickles can run code"):
        load_weights(Toy(0.0), tmp_path / "weights.pth")
    (tmp_path / "weights.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(DamageError, match="not readable as safetensors"):
        load_weights(Toy(0.0), tmp_path / "weights.safetensors")
    with pytest.raises(SamiCacheError, match="holds no checkpoint"):
        load_weights(Toy(0.0), tmp_path)


# --- several processes ----------------------------------------------------------------------------------------------


def torchrun(run, changes, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, __file__, run, json.dumps(changes), "0", *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=ONE_THREAD,
        check=False,
    )


def test_two_processes_equal_one_and_stop_together(tmp_path):
    """Only rank 1 gets the signal, in step 4; both stop where they next meet, and go on to the same weights."""
    changes = {"accumulate": 2, "log_every": 3, "clip_grad": 0.5, "checkpoint_every": 100}
    train(tmp_path / "one", configure(**changes), dropout=0.0)
    stopped = torchrun(tmp_path / "two", changes, "4")
    assert re.search(r"stopped by SIGTERM after step [5-7] of 40", stopped.stderr)
    assert stopped.returncode != 0
    assert len(list_checkpoints(tmp_path / "two" / "checkpoints")) == 1
    finished = torchrun(tmp_path / "two", changes)
    assert finished.returncode == 0, finished.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)
    for step, loss in losses(tmp_path / "one").items():
        assert losses(tmp_path / "two")[step] == pytest.approx(loss, rel=1e-4)
    refused = torchrun(tmp_path / "two", changes | {"lr": 1.0})
    assert refused.returncode != 0
    assert "train.lr: 0.01 in the run, 1.0 now" in refused.stderr


def main() -> None:
    run, changes, delay, *signal_at = sys.argv[1:]
    config = configure(**json.loads(changes))
    with distributed("cpu") as device:
        rank, world = rank_and_world()

        def at_step(step):
            if signal_at and rank == 1 and step == int(signal_at[0]):
                signal.raise_signal(signal.SIGTERM)

        task = ToyTask(config, dropout=0.0 if world > 1 else 0.2, delay=float(delay), at_step=at_step)
        Trainer(task, config, Path(run), device, resume=True).fit()


if __name__ == "__main__":
    try:
        main()
    except PeerError as error:
        leave(error.exit_code)
    except (SamiCacheError, Interrupted) as error:
        print(error, file=sys.stderr)
        leave(error.exit_code)
    leave(0)
