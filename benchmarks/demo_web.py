"""From click to mask in the web demo: real clicks in headless Chromium on a server of its own process.

    python benchmarks/demo_web.py [MODEL] [--family sam] [--image-size 1024] [--clicks 60] [--against TREE]

Without MODEL, a `vit_t` with random weights, whose masks are as ragged as masks get; the photo is scikit-image's `coffee`,
enlarged. `--against`: another checkout of this repository, served beside this one. They are clicked in turn, in a random order
within each pair, so that what else the machine does is done to both. One server works at a time; the other waits.

Milliseconds, from the click's event: until the answer has arrived, until the canvas is drawn (as the page itself counts), and
until the frame with the mask has been handed to the screen. Needs playwright and Chromium.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sami_cache.models.segment_anything import SegmentAnything, SegmentAnythingConfig
from sami_cache.models.segment_anything_weights import save_segment_anything

HERE = Path(__file__).parent.parent
WIDTH, HEIGHT = 2400, 1600
WARM_UP = 5
# The page writes how long a click took when the canvas is drawn; what the next frame's callback posts comes after its paint.
OBSERVE = """
addEventListener('pointerup', (event) => { window.clicked = event.timeStamp; }, true);
addEventListener('DOMContentLoaded', () => new MutationObserver(() => {
  if (!document.body.dataset.milliseconds) return;
  const drawn = performance.now() - clicked;
  const reply = performance.getEntriesByType('resource').filter((each) => each.name.endsWith('/api/predict')).at(-1);
  requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => {
      document.body.dataset.shown = JSON.stringify([reply.responseEnd - clicked, drawn, performance.now() - clicked]);
    };
    channel.port2.postMessage(0);
  });
}).observe(document.body, { attributes: true, attributeFilter: ['data-milliseconds'] }));
"""
CLEAR = "delete document.body.dataset.milliseconds; delete document.body.dataset.shown; performance.clearResourceTimings()"


class Demo:
    """One tree's server, and a page on it with the photo encoded."""

    def __init__(self, browser: Any, tree: Path, model: Path, photo: Path) -> None:
        from playwright.sync_api import expect

        command = [
            sys.executable,
            "-u",
            "-m",
            "cli.main",
            "demo-web",
            str(model),
            "--port",
            "0",
            "--no-open",
            "--device",
            "cpu",
        ]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        self.server = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout
        said = self.server.stdout.readline()
        address = re.search(r"http://\S+", said)
        assert address, said
        self.page = browser.new_page(viewport={"width": 1100, "height": 860}, device_scale_factor=1)
        self.page.add_init_script(OBSERVE)
        self.page.goto(address[0])
        self.page.set_input_files("#file", photo)
        expect(self.page.locator("#state")).to_contain_text("Encoded in", timeout=600_000)
        self.encoded = self.page.locator("#state").inner_text()
        self.area = self.page.locator("#stage").bounding_box()

    def click(self, x: float, y: float) -> list[float]:
        """Milliseconds until the answer, the canvas and the frame. `x`, `y`: shares of the photo's width and height."""
        self.page.bring_to_front()
        self.page.evaluate(CLEAR)
        self.page.mouse.click(self.area["x"] + self.area["width"] * x, self.area["y"] + self.area["height"] * y)
        found = self.page.wait_for_selector("body[data-shown]", state="attached").get_attribute("data-shown")
        self.page.click("#clear")
        return json.loads(found)

    def close(self) -> None:
        self.page.close()
        self.server.terminate()
        self.server.wait()


def line(name: str, values: list[float]) -> str:
    nine_tenths = statistics.quantiles(values, n=10, method="inclusive")[-1]
    return f"| {name} | {min(values):.0f} | {statistics.median(values):.0f} | {nine_tenths:.0f} | {max(values):.0f} |"


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--family", default="sam")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--clicks", type=int, default=60)
    parser.add_argument("--against", type=Path)
    given = parser.parse_args()
    trees = {"this": HERE} | ({"other": given.against.resolve()} if given.against else {})
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        import skimage.data

        photo, model = Path(folder) / "photo.jpg", given.model or Path(folder) / "model.pt"
        Image.fromarray(skimage.data.coffee()).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(photo, quality=92)
        if given.model is None:
            torch.manual_seed(0)
            config = SegmentAnythingConfig(family=given.family, encoder="vit_t", image_size=given.image_size)
            save_segment_anything(SegmentAnything(config), model)
        chromium = shutil.which("chromium") or playwright.chromium.executable_path
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        load = os.getloadavg()[0]
        demos = {name: Demo(browser, tree, model, photo) for name, tree in trees.items()}
        print(f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}", end=", ")
        print(f"torch {torch.__version__}, Chromium {browser.version}; load {load:.1f} before; {given.clicks} clicks each")
        print(*(f"{name}: {demo.encoded}" for name, demo in demos.items()), sep="\n")
        draws = random.Random(0)
        times: dict[str, list[list[float]]] = {name: [] for name in demos}
        for number in range(WARM_UP + given.clicks):
            x, y = draws.uniform(0.05, 0.95), draws.uniform(0.05, 0.95)
            for name in draws.sample(sorted(demos), len(demos)):
                taken = demos[name].click(x, y)
                if number >= WARM_UP:
                    times[name].append(taken)
        print("\n| milliseconds after the click | fastest | median | 90 % | slowest |\n|---|---|---|---|---|")
        for name, rows in times.items():
            for part, values in zip(
                ("the answer is there", "the canvas is drawn", "shown"), zip(*rows, strict=True), strict=True
            ):
                print(line(f"{name}: {part}", list(values)))
        if "other" in times:
            ratios = [ours[1] / theirs[1] for ours, theirs in zip(times["this"], times["other"], strict=True)]
            print(f"\ncanvas, this / other, median of the pairs: {statistics.median(ratios):.2f}")
        for demo in demos.values():
            demo.close()
        browser.close()


if __name__ == "__main__":
    main()
