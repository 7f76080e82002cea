"""Every benchmark for a GPU that has no result for the GPU at hand yet, most wanted first; writes the result files.

    python benchmarks/gpu.py        (or: make bench-gpu)

One after the other, so that it can be cut off at any time: what was written stays, and the next run goes on.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
VIT_H = ("--device", "cuda", "--teachers", "vit_h", "--sizes")
# (topic, script, arguments), most wanted first. A script prints Markdown and writes it to --out once it is done.
WANTED = (
    ("train-vit_s", "train.py", ("--students", "vit_s", "--device", "cuda")),
    ("extract-vit_h-1024", "extract.py", (*VIT_H, "1024", "--compile-pipeline")),
    ("train-vit_t", "train.py", ("--students", "vit_t", "--device", "cuda")),
    ("train-vit_b", "train.py", ("--students", "vit_b", "--device", "cuda")),
    ("train-vit_s-compiled", "train.py", ("--students", "vit_s", "--compile", "--device", "cuda")),
    (
        "extract-vit_h-1024-modes",
        "extract.py",
        (*VIT_H, "1024", "--parts", "encoders", "--ways", "folded", "flex", "--modes", "default", "reduce-overhead"),
    ),
    ("extract-vit_h-224", "extract.py", (*VIT_H, "224", "--samples", "16384", "--compile-pipeline")),
    ("targets", "targets.py", ("--device", "cuda")),
    ("train-online", "train.py", ("--online", "1024", "224", "--device", "cuda")),
    ("extract-vit_l-vit_b", "extract.py", ("--teachers", "vit_l", "vit_b", "--samples", "8192", "--device", "cuda")),
    ("targets-112-channels", "targets.py", ("--device", "cuda", "--channels", "112")),
)


def main() -> int:
    """Run what lacks a result. Returns 0, 1 if a benchmark failed, 2 without a GPU."""
    if not torch.cuda.is_available():
        print("no CUDA device: these benchmarks are about one. Those for the CPU are the other scripts of this folder.")
        return 2
    hardware = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    failed = 0
    for topic, script, arguments in WANTED:
        if found := sorted((HERE / "results").glob(f"{topic}-{hardware}-[0-9]*.md")):
            print(f"{topic}: there already ({found[-1].name})")
            continue
        page = HERE / "results" / f"{topic}-{hardware}-{time.strftime('%Y%m%d')}.md"
        print(f"{topic}: {script} -> {page.name}", flush=True)
        failed += subprocess.run([sys.executable, HERE / script, *arguments, "--out", page], check=False).returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
