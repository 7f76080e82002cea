"""In a child process: the real command line with a teacher that costs nothing, for campaigns that are about storage."""

import json
import sys

import torch
from torch.nn.functional import avg_pool2d, pixel_unshuffle

from sami_cache.models.teachers import Teacher, TeacherInfo
from sami_cache.store.files import exists


class Pooled(torch.nn.Module):
    """48 channels at stride 16, different and smooth, as a teacher's are: the means of every fourth pixel."""

    def forward_intermediates(self, pixels: torch.Tensor, **_: object) -> list[torch.Tensor]:
        return [avg_pool2d(pixel_unshuffle(pixels, 4), 4)]


def pooled_teacher(name: str, grid: int = 4, **_: object) -> Teacher:
    info = TeacherInfo(
        name=name,
        layer="pooled",
        weights="random:0",
        weights_sha256="0" * 64,
        image_size=grid * 16,
        stride=16,
        channels=48,
        mean=(127.0,) * 3,
        std=(128.0,) * 3,
        interpolation="bilinear",
    )
    return Teacher(Pooled(), info, index=0, norm=False)


def command_line(arguments: list[str], log: str) -> None:
    """Run `sami-cache`, noting in `log` each shard that is about to be written, and whether it was committed already."""
    import cli.main
    import pipelines.extract
    import pipelines.jobs

    torch.set_num_threads(1)
    real = pipelines.extract.write_shard

    def noted(cache, shard, *rest):
        with open(log, "a") as file:
            file.write(json.dumps([shard, exists(cache.record_path(shard))]) + "\n")
        return real(cache, shard, *rest)

    pipelines.extract.write_shard = noted
    pipelines.jobs.load_teacher = pooled_teacher
    sys.argv = ["sami-cache", *arguments]
    cli.main.main()
