"""The training step: it never waits for the device, and bfloat16 and torch.compile give the losses of the plain one."""

import shutil
from itertools import cycle

import pytest
import torch
from photos import photo_folder
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.extract import extract
from pipelines.jobs import ExtractConfig
from pipelines.train import TrainingConfig, prepare
from sami_cache.training import Trainer

CPU = torch.device("cpu")
LITE0 = {"teacher": "efficientnet_lite0", "grid": 4, "shard_samples": 16, "device": "cpu"}
SMALL = {"student": "vit_t", "decoder_depth": 1, "decoder_width": 64, "batch_size": 4, "holdout": 0.1, "clip_grad": 1.0}
VARIANTS = {
    "SAMI": {},
    "cosine": {"loss": "cosine"},
    "MAE": {"target": "pixels"},
    "teacher online": {"teacher_online": True},
    "CrossMAE": {"keys_values": "visible", "reconstruct": 0.25},
    "micro-batches": {"micro_batch": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    photo_folder(folder / "photos", 32)
    extract(ExtractConfig(data=folder / "photos", cache=folder / "cache.zarr", **LITE0))
    return folder


def trainer_of(folder, run, device=CPU, **changes):
    """A trainer at step 0, and its first batches, taken beforehand: what the loader does on the host is not the step's."""
    config = TrainingConfig(
        **{"run": run, "cache": folder / "cache.zarr", "device": str(device), "steps": 20, **SMALL, **changes}
    )
    prepared = prepare(config, device)
    trainer = Trainer(prepared.task, prepared.train, run, device)
    batches = prepared.task.batches(0)
    taken = [next(batches) for _ in range(4)]
    batches.close()
    prepared.task.model.train()
    return trainer, cycle(taken)


class WaitingError(AssertionError):
    pass


class Watch(TorchDispatchMode):
    """Raises at every operation that would make the host wait, were the tensors on a GPU.

    Also at tensors made from Python's numbers: a copy from memory that is not pinned waits too.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "lift_fresh")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        if masks or name.startswith(self.WAITING):
            raise WaitingError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class WatchCopies(TorchFunctionMode):
    """Raises where a tensor is fetched to the host; on the CPU such a call is no operation, and `Watch` does not see it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("cpu", "numpy", "tolist", "item", "__array__"):
            raise WaitingError(f"Tensor.{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_step_never_waits_for_the_device(folder, tmp_path, variant, precision):
    trainer, batches = trainer_of(folder, tmp_path / "run", precision=precision, **VARIANTS[variant])
    for trainer.step in range(2):  # the optimizer makes its state in the first
        with WatchCopies(), Watch():
            metrics, _ = trainer._train_step(trainer.task.model, batches, 1e-3)
    assert metrics["loss"].isfinite()


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 0).nonzero(),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.__setitem__(x > 0, torch.ones(2)),
    ],
)
def test_the_watch_sees_what_waits(act):
    with pytest.raises(WaitingError), WatchCopies(), Watch():
        act(torch.ones(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_step_never_waits_for_a_gpu(folder, tmp_path, variant):
    device = torch.device("cuda", 0)
    trainer, batches = trainer_of(folder, tmp_path / "run", device, **VARIANTS[variant])
    for trainer.step in range(3):
        # The first step builds what later ones use: cuBLAS handles, the optimizer's state.
        torch.cuda.set_sync_debug_mode("error" if trainer.step else "default")
        try:
            metrics, _ = trainer._train_step(trainer.task.model, batches, 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert metrics["loss"].isfinite()


def first_gradient(trainer) -> list[torch.Tensor]:
    """Filled in the first step, after clipping, with the whole gradient as one vector."""
    seen: list[torch.Tensor] = []

    def look(*_):
        if not seen:
            parts = [p.grad.flatten() for p in trainer.task.model.parameters() if p.grad is not None]
            seen.append(torch.cat(parts))

    trainer.optimizer.register_step_pre_hook(look)
    return seen


@pytest.mark.parametrize("variant", ["SAMI", "cosine", "CrossMAE"])
def test_bfloat16_trains_as_float32_does(folder, tmp_path, variant):
    """Measured: first loss to 0.03 %, gradient to 0.8 %, those of twenty steps, falling by 60 %, to 0.12 %."""
    losses, gradients = {}, {}
    for precision in ("float32", "bfloat16"):
        trainer, batches = trainer_of(folder, tmp_path / precision, precision=precision, **VARIANTS[variant])
        seen, losses[precision] = first_gradient(trainer), []
        for trainer.step in range(20):
            metrics, _ = trainer._train_step(trainer.task.model, batches, 2.5e-4 * min(4, trainer.step + 1))
            losses[precision].append(metrics["loss"].item())
        gradients[precision] = seen[0].double()
    exact, rounded = losses["float32"], losses["bfloat16"]
    assert rounded[0] != exact[0]
    assert rounded[0] == pytest.approx(exact[0], rel=1e-3)
    assert (gradients["bfloat16"] - gradients["float32"]).norm() < 0.02 * gradients["float32"].norm()
    assert exact[-1] < 0.75 * exact[0]
    assert rounded == pytest.approx(exact, rel=5e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_run_is_the_plain_one(folder, tmp_path):
    """Nothing is compiled twice: evaluation, whose last batch is smaller, takes the model as it is."""
    lines = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        lines[compiled] = []
        config = TrainingConfig(
            run=tmp_path / str(compiled),
            cache=folder / "cache.zarr",
            device="cpu",
            steps=3,
            log_every=1,
            evaluate_every=1,
            compile=compiled,
            **SMALL,
        )
        prepared = prepare(config, CPU)
        blocks = prepared.task.model.encoder.blocks
        prepared.task.model.encoder.blocks = blocks[:1]  # twelve alike only take longer to compile
        Trainer(prepared.task, prepared.train, config.run, CPU, on_log=lines[compiled].append).fit()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == int(compiled)
    for name in ("loss", "grad_norm", "heldout_loss"):
        plain, found = ([line[name] for line in lines[compiled] if name in line] for compiled in (False, True))
        assert len(plain) >= 3
        assert found == pytest.approx(plain, rel=1e-4)
