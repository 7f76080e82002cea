"""Run as a script, perhaps by torchrun: the real `sami-cache train` with a tiny student: notes samples, dies where it is told.

`rank.py OPTIONS ARGUMENT...`, where OPTIONS is JSON: {"journal": file, "rank": 1, "step": 7, "how": "SIGKILL"}.
"""

import json
import os
import signal
import sys
from functools import partial

import torch

import cli.main
import pipelines.train
from sami_cache import training
from sami_cache.errors import SamiCacheError
from sami_cache.tasks.sami import SAMITask


def act(how: str) -> None:
    if how == "exit":
        os._exit(7)
    elif how == "bug":
        raise ValueError("a bug of a step")
    elif how == "loader":
        raise SamiCacheError("sample 'photo-7' did not come")
    else:
        os.kill(os.getpid(), signal.Signals[how])


def main() -> None:
    options = json.loads(sys.argv[1])
    sys.argv = ["sami-cache", *sys.argv[2:]]
    rank = int(os.environ.get("RANK", "0"))
    real_step, real_loss, real_evaluate = training.Trainer._train_step, SAMITask.loss, SAMITask.evaluate
    at = [-1]

    def meet(place: str, step: int) -> None:
        if "how" in options and (rank, place, step) == (options["rank"], options.get("place", "step"), options["step"]):
            act(options["how"])

    def train_step(self, *rest):
        at[0] = self.step
        meet("step", self.step)
        return real_step(self, *rest)

    def loss(self, model, batch, device):
        line = {"rank": rank, "step": at[0], "samples": batch.samples.tolist()}
        descriptor = os.open(options["journal"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(descriptor, json.dumps(line).encode() + b"\n")
        os.close(descriptor)
        return real_loss(self, model, batch, device)

    def evaluate(self, model):
        meet("evaluation", at[0] + 1)
        return real_evaluate(self, model)

    training.Trainer._train_step, SAMITask.loss, SAMITask.evaluate = train_step, loss, evaluate
    small = {"depth": 2, "embed_dim": 24, "num_heads": 3}
    pipelines.train.create_encoder = partial(pipelines.train.create_encoder, **small)  # type: ignore[assignment]
    torch.set_num_threads(1)
    cli.main.main()


if __name__ == "__main__":
    main()
