"""A screenshot of the demo's page with a photo and a mask, and how long the mask takes from the click to the canvas.

    python tests/demo_web_screenshot.py MODEL PHOTO OUT.png [--point X,Y ...] [--negative X,Y ...] [--box X0,Y0,X1,Y1]

Coordinates are pixels of the photo; without any, a click in its middle. Needs playwright and Chromium.
"""

import argparse
import shutil
import statistics
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from pipelines.demo_web_pictures import Pictures
from pipelines.demo_web_server import DemoServer
from pipelines.promptable import open_promptable

CLICKS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "photo", "out"):
        parser.add_argument(name, type=Path)
    for name in ("--point", "--negative"):
        parser.add_argument(name, action="append", default=[])
    parser.add_argument("--box")
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    width, height = Image.open(given.photo).size
    points = given.point or ([] if given.box else [f"{width // 2},{height // 2}"])

    model = open_promptable(given.model)
    about = f"{model.config.encoder}, {model.config.family}, {model.config.image_size} px"
    with DemoServer(Pictures(model), "127.0.0.1", 0, about) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        chromium = shutil.which("chromium") or playwright.chromium.executable_path
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        scheme = "dark" if given.dark else "light"
        page = browser.new_page(viewport={"width": 1100, "height": 860}, device_scale_factor=1, color_scheme=scheme)
        page.goto(server.url)
        page.set_input_files("#file", given.photo)
        state = page.locator("#state")
        expect(state).to_contain_text("Encoded in", timeout=600_000)
        print(state.inner_text())
        area = page.locator("#stage").bounding_box()
        assert area is not None

        def at(text: str) -> tuple[float, float]:
            x, y = (float(number) for number in text.split(","))
            return area["x"] + area["width"] * (x + 0.5) / width, area["y"] + area["height"] * (y + 0.5) / height

        def click(place: tuple[float, float], **options: str) -> int:
            """Milliseconds until the canvas showed the mask."""
            page.evaluate("delete document.body.dataset.milliseconds")
            page.mouse.click(*place, **options)  # type: ignore[arg-type]
            page.wait_for_selector("body[data-milliseconds]", state="attached")
            return int(page.get_attribute("body", "data-milliseconds") or 0)

        times = []
        for number in range(CLICKS):
            times.append(click((area["x"] + area["width"] * (number + 1) / (CLICKS + 1), area["y"] + area["height"] / 2)))
            page.click("#clear")
        middle = statistics.median(times)
        print(f"{CLICKS} clicks, to the canvas: median {middle:.0f} ms, fastest {min(times)}, slowest {max(times)}")

        if given.box:
            corners = given.box.split(",")
            page.mouse.move(*at(",".join(corners[:2])))
            page.mouse.down()
            page.mouse.move(*at(",".join(corners[2:])), steps=5)
            page.mouse.up()
        for point in points:
            click(at(point))
        for point in given.negative:
            click(at(point), button="right")
        page.mouse.move(5, 5)
        expect(state).to_contain_text("IoU")
        page.wait_for_timeout(300)
        page.screenshot(path=given.out)
        browser.close()
        server.shutdown()


if __name__ == "__main__":
    main()
