"""The web demo: its server by HTTP, and its page in a real browser with real clicks."""

import base64
import http.client
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from photos import picture
from PIL import Image

from pipelines.demo_web import demo_web
from pipelines.demo_web_pictures import Limits, Pictures, Refused, Worker, bits, runs
from pipelines.demo_web_server import PAGE, DemoServer
from sami_cache.errors import SamiCacheError
from sami_cache.inference.mask_generator import MaskGenerator, MaskGeneratorConfig
from sami_cache.inference.predictor import SamPredictor
from sami_cache.inference.rle import decode_mask
from sami_cache.models.segment_anything import SegmentAnything, SegmentAnythingConfig
from sami_cache.models.segment_anything_weights import save_segment_anything

# Of random weights nothing would pass.
EVERYTHING = MaskGeneratorConfig(points_per_side=2, pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1)
LIMITS = Limits(bytes=4 << 20, pixels=3_000_000, pictures=3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(4)
    return SegmentAnything(SegmentAnythingConfig(encoder="vit_t", depth=1, image_size=128)).eval()


@pytest.fixture(scope="module")
def server(model):
    with DemoServer(Pictures(model, LIMITS, EVERYTHING), "127.0.0.1", 0, "tiny & small") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def coffee(width: int = 240, height: int = 160) -> Image.Image:
    return picture("coffee").resize((width, height))


def call(server, path: str, body=None, **headers: str) -> tuple[int, bytes]:
    """A POST where there is a body: bytes as a file, all else as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", path, data, {"Content-Type": kind} | given)
    reply = connection.getresponse()
    return reply.status, reply.read()


def ask(server, path: str, body) -> dict:
    status, said = call(server, path, body)
    assert status == 200, said
    return json.loads(said)


def opened(server, image: Image.Image) -> str:
    key = ask(server, "/api/picture", png(image))["id"]
    assert ask(server, "/api/encode", {"id": key})["seconds"] > 0
    return key


def unpacked(found: dict, mask: list[int] | str) -> np.ndarray:
    """Runs, or bits in base64."""
    size = found["height"] * found["width"]
    if isinstance(mask, str):
        values = np.unpackbits(np.frombuffer(base64.b64decode(mask), np.uint8), count=size)
    else:
        values = np.repeat(np.array(mask[::2]), mask[1::2])
    return values.reshape(found["height"], found["width"])


def predicted(model, image: Image.Image, question: dict) -> tuple[np.ndarray, np.ndarray]:
    """What the page is to show: masks [3, H, W] and IoU [3]."""
    predictor = SamPredictor(model)
    predictor.set_image(np.asarray(image))
    masks, iou, _ = predictor.predict(question["points"] or None, question["labels"] or None, question["box"])
    return masks, iou


QUESTIONS = [
    {"points": [[100, 60]], "labels": [1], "box": None},
    {"points": [[100, 60], [20, 20]], "labels": [1, 0], "box": None},
    {"points": [], "labels": [], "box": [30, 20, 180, 130]},
    {"points": [[239, 159]], "labels": [0], "box": [0, 0, 239, 159]},
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_gets_the_masks_of_the_predictor(server, model, question):
    found = ask(server, "/api/predict", {"id": opened(server, coffee()), **question})
    masks, iou = predicted(model, coffee(), question)
    assert 0 < masks.mean() < 1
    assert (found["width"], found["height"]) == (240, 160)
    np.testing.assert_allclose(found["iou"], iou, atol=1e-4)
    for given, mask in zip(found["masks"], masks, strict=True):
        np.testing.assert_array_equal(unpacked(found, given), mask)


def test_a_big_picture_is_shown_small_and_downloaded_whole(server, model):
    image = coffee(1600, 1200)
    key = opened(server, image)
    question = {"points": [[1200, 300]], "labels": [1], "box": None}
    found = ask(server, "/api/predict", {"id": key, **question})
    assert (found["width"], found["height"]) == (640, 480)
    status, said = call(server, "/api/mask", {"id": key, "choice": 2, **question})
    mask = np.asarray(Image.open(io.BytesIO(said)))
    assert status == 200
    np.testing.assert_array_equal(mask, predicted(model, image, question)[0][2])
    status, said = call(server, "/api/cutout", {"id": key, "choice": 2, **question})
    cutout = np.asarray(Image.open(io.BytesIO(said)))
    assert status == 200
    np.testing.assert_array_equal(cutout[..., 3], mask * np.uint8(255))
    np.testing.assert_array_equal(cutout[..., :3], np.asarray(image) * mask[..., None])
    status, said = call(server, f"/api/picture/{key}.jpg")
    assert Image.open(io.BytesIO(said)).size == (1600, 1200)


def test_everything_gives_the_generators_masks(server, model):
    key = opened(server, coffee())
    found = ask(server, "/api/everything", {"id": key})
    labels = unpacked(found, found["runs"])
    masks = MaskGenerator(SamPredictor(model), EVERYTHING).generate(np.asarray(coffee()))
    assert found["masks"] == len(masks) > 1
    expected = np.zeros((160, 240), int)
    for number, mask in enumerate(sorted(masks, key=lambda mask: -mask["area"]), 1):
        expected[decode_mask(mask["segmentation"])] = number
    np.testing.assert_array_equal(labels, expected)
    status, said = call(server, "/api/labels", {"id": key})
    image = Image.open(io.BytesIO(said))
    assert (status, image.mode) == (200, "P")
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_files_that_are_no_pictures_are_refused(server):
    assert call(server, "/api/picture", b"%PDF-1.7 no picture") == (
        400,
        b'{"error":"not an image: expected JPEG, PNG, WebP, BMP or TIFF, found bytes that start with \'%PDF-1.7\'"}',
    )
    status, said = call(server, "/api/picture", png(Image.new("RGB", (2000, 1501))))
    assert (status, json.loads(said)["error"]) == (400, "too many pixels: expected at most 3000000, found 2000x1501")
    status, said = call(server, "/api/picture", bytes(LIMITS.bytes + 1))
    assert (status, json.loads(said)["error"]) == (413, "Too large: 4194305 bytes, at most 4194304 are taken.")


POINT = {"points": [[10, 10]], "labels": [1]}


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/api/predict", {"points": [[240, 10]], "labels": [1]}, 400, r"\(240, 10\) lies outside the picture"),
        ("/api/predict", {"points": [[float("nan"), 10]], "labels": [1]}, 400, "no place"),
        ("/api/predict", {"points": [[1, 2]], "labels": [5]}, 400, "label 5"),
        ("/api/predict", {"points": [[1]], "labels": [1]}, 400, "points: expected"),
        ("/api/predict", {"points": {"a": 1}, "labels": [1]}, 400, "points: expected"),
        ("/api/predict", {"points": [[1, 1]] * 101, "labels": [1] * 101}, 400, "101 points: at most 100"),
        ("/api/predict", {"box": [30, 30, 30, 60]}, 400, "is empty"),
        ("/api/predict", {}, 400, "no prompt at all"),
        ("/api/mask", {**POINT, "choice": 3}, 400, "choice is 3"),
        ("/api/cutout", {**POINT, "choice": [0]}, 400, "choice is"),
        ("/api/labels", {}, 400, "was not run"),
        ("/api/predict", {**POINT, "id": "unknown"}, 410, "no longer held"),
        ("/api/predict", {**POINT, "id": ["unknown"]}, 410, "no longer held"),
        ("/api/nothing", {}, 404, "no such page"),
        ("/api/predict", {"padding": "x" * 70_000}, 413, "Too large"),
    ],
)
def test_questions_that_cannot_be_meant_are_refused_by_name(server, path, body, status, text):
    key = opened(server, coffee())
    found, said = call(server, path, {"id": key, **body})
    assert found == status
    assert re.search(text, json.loads(said)["error"])


def test_what_is_no_question_is_refused(server):
    for body, kind, status in (
        (b"{", "application/json", 400),
        (b"[" * 60_000, "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"{}", "text/plain", 415),
    ):
        assert call(server, "/api/predict", body, Content_Type=kind)[0] == status
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest("POST", "/api/predict")
    connection.putheader("Content-Type", "application/json")
    connection.endheaders()
    assert connection.getresponse().status == 411


def test_a_mask_is_not_asked_before_the_picture_is_encoded(server):
    key = ask(server, "/api/picture", png(coffee()))["id"]
    assert call(server, "/api/predict", {"id": key, **POINT})[0] == 409


def test_no_path_leads_to_other_files(server):
    for path in (
        "/../pyproject.toml",
        "/demo_web.py",
        "//etc/passwd",
        "/%2e%2e/pyproject.toml",
        "/api/picture/../../setup.cfg",
    ):
        assert call(server, path)[0] in (404, 410)
    assert call(server, "/")[0] == call(server, "/demo_web.js")[0] == call(server, "/demo_web.css")[0] == 200


def test_other_sites_are_not_answered(server):
    here = f"127.0.0.1:{server.server_port}"
    for headers in (
        {"Host": "evil.example"},
        {"Host": f"evil.example:{server.server_port}"},
        {"Host": "localhost.evil.example"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ):
        assert call(server, "/api/about", **headers)[0] == 403, headers
        assert call(server, "/api/picture", png(coffee()), **headers)[0] == 403, headers
    for headers in (
        {"Host": here, "Origin": f"http://{here}", "Sec_Fetch_Site": "same-origin"},
        {"Host": "localhost:9000", "Origin": "http://localhost:9000"},  # ssh -L 9000:localhost:8000
        {"Host": "[::1]:8000"},
    ):
        assert call(server, "/api/about", **headers)[0] == 200, headers
    assert call(server, "/", Sec_Fetch_Site="cross-site")[0] == 200  # a link to the page


def test_only_a_few_pictures_are_held_and_the_one_unused_for_longest_goes(model):
    pictures = Pictures(model, Limits(pictures=2))
    keys = [pictures.add(png(coffee(40 + n, 40))).id for n in range(2)]
    pictures.get(keys[0])
    keys.append(pictures.add(png(coffee(50, 40))).id)
    assert pictures.get(keys[0]).width == 40
    assert pictures.get(keys[2]).width == 50
    with pytest.raises(Refused, match="no longer held"):
        pictures.get(keys[1])


def test_one_encoder_runs_at_a_time_and_few_wait(model, monkeypatch):
    pictures, running, most = Pictures(model), [], []
    encode = SegmentAnything.encode

    def slow(self, pixels):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return encode(self, pixels)

    monkeypatch.setattr(SegmentAnything, "encode", slow)
    keys = [pictures.add(png(coffee(40 + n, 40))).id for n in range(3)]
    threads = [threading.Thread(target=pictures.encode, args=(key,)) for key in keys * 2]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most == [1, 1, 1]  # and none twice

    worker, gate, begun = Worker(1), threading.Event(), threading.Event()
    threading.Thread(target=worker.do, args=(lambda: begun.set() or gate.wait(),), daemon=True).start()
    assert begun.wait(10)
    waiting = threading.Thread(target=worker.do, args=(lambda: None,), daemon=True)
    waiting.start()
    while not worker._queue.full():
        time.sleep(0.001)
    with pytest.raises(Refused, match="too much to do"):
        worker.do(lambda: None)
    gate.set()
    waiting.join(10)


def test_who_opens_a_picture_does_not_wait_for_everything(model, monkeypatch):
    pictures = Pictures(model, LIMITS, EVERYTHING)
    first, second = (pictures.add(png(coffee(40 + n, 40))).id for n in range(2))
    decode, begun, gate, order = SamPredictor.decode, threading.Event(), threading.Event(), []

    def slow(self, *prompts, **options):
        for part in decode(self, *prompts, **options):
            begun.set()
            assert gate.wait(20)
            yield part

    monkeypatch.setattr(SamPredictor, "decode", slow)
    everything = threading.Thread(target=lambda: (pictures.everything(first), order.append("everything")))
    everything.start()
    assert begun.wait(20)
    encoding = threading.Thread(target=lambda: (pictures.encode(second), order.append("encode")))
    encoding.start()
    while not pictures._encoder._urgent:
        time.sleep(0.001)
    gate.set()
    encoding.join(20)
    everything.join(20)
    assert order == ["encode", "everything"]
    pictures.close()


def test_a_port_is_free_again_at_once(model):
    with DemoServer(Pictures(model, LIMITS, EVERYTHING), "127.0.0.1", 0, "tiny") as first:
        threading.Thread(target=first.serve_forever, daemon=True).start()
        assert call(first, "/api/about")[0] == 200
        port = first.server_port
        first.shutdown()
    with DemoServer(Pictures(model, LIMITS, EVERYTHING), "127.0.0.1", port, "tiny") as again:
        assert again.server_port == port


def test_ctrl_c_ends_it_also_in_the_middle_of_everything(tmp_path):
    torch.manual_seed(0)
    tiny = SegmentAnything(SegmentAnythingConfig(encoder="vit_t", depth=1))
    save_segment_anything(tiny, tmp_path / "tiny.pt")
    command = [sys.executable, "-u", "-m", "cli.main", "demo-web", str(tmp_path / "tiny.pt"), "--port", "0", "--no-open"]
    with subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout
            found = re.search(r"vit_t, sam, 1024 px: http://127\.0\.0\.1:(\d+)/", child.stdout.readline())
            assert found
            there = SimpleNamespace(server_port=int(found[1]))
            key = ask(there, "/api/picture", png(coffee()))["id"]

            # 256 queries at 1024 px: many seconds. The connection is gone before they are answered.
            def ask_everything() -> None:
                with suppress(http.client.HTTPException, OSError):
                    call(there, "/api/everything", {"id": key})

            asking = threading.Thread(target=ask_everything, daemon=True)
            asking.start()
            time.sleep(1)
            assert asking.is_alive()
            child.send_signal(signal.SIGINT)
            said, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert (child.returncode, said, errors) == (0, "ended.\n", "")


def test_runs_hold_every_value():
    values = np.array([[3, 3, 0], [0, 0, 7]])
    assert runs(values) == [3, 2, 0, 3, 7, 1]
    assert runs(np.zeros((2, 2), bool)) == [0, 4]


def test_bits_hold_a_mask_of_any_size():
    mask = np.random.default_rng(0).random((5, 7)) > 0.5
    np.testing.assert_array_equal(unpacked({"height": 5, "width": 7}, bits(mask)), mask)


def test_the_page_is_installed_with_the_package():
    root = Path(__file__).parent.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    assert set(settings["tool"]["setuptools"]["package-data"]["pipelines"]) == {file for file, _ in PAGE.values()}


def test_an_address_that_is_taken_is_named(server, model, tmp_path):
    save_segment_anything(model, tmp_path / "tiny.pt")
    with pytest.raises(SamiCacheError, match=rf"cannot listen on 127.0.0.1, port {server.server_port}: Address"):
        demo_web(tmp_path / "tiny.pt", port=server.server_port, device="cpu")


# ---- in a browser


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="the page's test needs playwright (the test extra)")
    with playwright.sync_playwright() as started:
        own = started.chromium.executable_path
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if found is None and not Path(own).exists():
            pytest.skip("the page's test needs Chromium: apt install chromium, or playwright install chromium")
        browser = started.chromium.launch(executable_path=found or own, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """The open page, what it asked for, and what it shows."""

    def __init__(self, page, server, model):
        self.page, self.server, self.model = page, server, model
        self.requests, self.errors, self.image = [], [], coffee()
        page.on("request", self.note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.goto(server.url)

    def note(self, request) -> None:  # playwright takes no built-in function such as a list's append
        self.requests.append(request)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where on the page the middle of a pixel of the picture is."""
        box = self.page.locator("#stage").bounding_box()
        return box["x"] + box["width"] * (x + 0.5) / self.image.width, box["y"] + box["height"] * (y + 0.5) / self.image.height

    def question(self) -> dict:
        """The last that was asked."""
        asked = [each for each in self.requests if each.url.endswith("/api/predict")]
        return json.loads(asked[-1].post_data) if asked else {"points": [], "labels": [], "box": None}

    def alpha(self) -> np.ndarray:
        """uint8 [h, w] of the canvas."""
        width, height, data = self.page.evaluate(
            """() => {
                const { width, height } = document.getElementById('mask');
                const { data } = document.getElementById('mask').getContext('2d').getImageData(0, 0, width, height);
                return [width, height, Array.from(data.filter((value, index) => index % 4 === 3))];
            }"""
        )
        return np.array(data, np.uint8).reshape(height, width)

    def shows(self, mask: np.ndarray) -> None:
        """Wait until the canvas shows exactly this mask."""
        for _ in range(100):
            shown = self.alpha() > 0
            if shown.shape == mask.shape and (shown == mask).all():
                return
            self.page.wait_for_timeout(50)
        assert shown.shape == mask.shape, self.page.inner_text("body")
        np.testing.assert_array_equal(shown, mask)

    def shows_prediction(self, points: list, labels: list[int], box: list | None = None) -> np.ndarray:
        """Wait for the best of the masks for these prompts, which are what was asked, give or take a pixel; returns it."""
        for _ in range(100):
            if len(self.question()["labels"]) == len(labels) and bool(self.question()["box"]) == bool(box):
                break
            self.page.wait_for_timeout(50)
        asked = self.question()
        assert asked["labels"] == labels
        np.testing.assert_allclose(np.array(asked["points"]).reshape(-1, 2), np.array(points).reshape(-1, 2), atol=1)
        if box is not None:
            np.testing.assert_allclose(asked["box"], box, atol=1)
        masks, iou = predicted(self.model, self.image, asked)
        self.shows(masks[iou.argmax()])
        return masks[iou.argmax()]


@pytest.fixture
def page(chromium, server, model):
    found = Page(chromium.new_page(viewport={"width": 1100, "height": 900}), server, model)
    yield found
    assert found.errors == []
    elsewhere = [each.url for each in found.requests if not each.url.startswith((server.url, "data:", f"blob:{server.url}"))]
    assert elsewhere == []
    found.page.close()


def drop(page, data: bytes, name: str = "cup.png") -> None:
    transfer = page.page.evaluate_handle(
        """([data, name]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(atob(data), (char) => char.charCodeAt(0))], name));
            return transfer;
        }""",
        [base64.b64encode(data).decode(), name],
    )
    page.page.dispatch_event("body", "drop", {"dataTransfer": transfer})


def ready(page, data: bytes | None = None) -> None:
    from playwright.sync_api import expect

    drop(page, data or png(page.image))
    expect(page.page.locator("#state")).to_contain_text("Encoded in")


def test_clicks_boxes_undo_and_downloads(page, tmp_path):
    from playwright.sync_api import expect

    ready(page)
    mouse, keyboard = page.page.mouse, page.page.keyboard
    mouse.click(*page.at(100, 60))
    first = page.shows_prediction([[100, 60]], [1])
    expect(page.page.locator("#state")).to_contain_text("IoU estimate")
    mouse.click(*page.at(40, 120), button="right")
    second = page.shows_prediction([[100, 60], [40, 120]], [1, 0])
    assert (first != second).any()
    keyboard.down("Shift")
    mouse.click(*page.at(200, 20))
    keyboard.up("Shift")
    page.shows_prediction([[100, 60], [40, 120], [200, 20]], [1, 0, 0])
    page.page.click("#undo")
    page.page.click("#undo")
    page.shows_prediction([[100, 60]], [1])

    mouse.move(*page.at(180, 130))
    mouse.down()
    mouse.move(*page.at(90, 90), steps=4)
    mouse.move(*page.at(30, 20), steps=4)
    mouse.up()
    page.shows_prediction([[100, 60]], [1], [30, 20, 180, 130])

    masks, iou = predicted(page.model, page.image, page.question())
    worst = int(iou.argmin())
    page.page.click(f"#choices label:nth-of-type({worst + 1})")
    page.shows(masks[worst])
    for button, name, shown in (("#download", "cup-mask.png", masks[worst]), ("#cutout", "cup-cutout.png", masks[worst])):
        with page.page.expect_download() as download:
            page.page.click(button)
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
        pixels = np.asarray(Image.open(tmp_path / name))
        np.testing.assert_array_equal((pixels if pixels.ndim == 2 else pixels[..., 3]) > 0, shown)

    before = page.alpha().copy()
    page.page.fill("#opacity", "90")
    assert int(page.alpha().sum()) > int(before.sum())
    page.page.click("#clear")
    page.shows(np.zeros((1, 1), bool))


def test_clicks_before_the_picture_is_encoded_are_answered_then(page, monkeypatch):
    from playwright.sync_api import expect

    gate, encode = threading.Event(), SegmentAnything.encode
    monkeypatch.setattr(SegmentAnything, "encode", lambda self, pixels: (gate.wait(20), encode(self, pixels))[1])
    ready_to_click = page.page.locator("#busy")
    drop(page, png(page.image))
    expect(ready_to_click).to_contain_text("Encoding")
    page.page.mouse.click(*page.at(100, 60))
    expect(page.page.locator("#state")).to_contain_text("as soon as the picture is encoded")
    assert [each for each in page.requests if each.url.endswith("/api/predict")] == []
    gate.set()
    page.shows_prediction([[100, 60]], [1])


def test_what_the_server_let_go_is_sent_again(page, server, tmp_path):
    from playwright.sync_api import expect

    ready(page)
    page.page.click("#everything")
    expect(page.page.locator("#state")).to_contain_text("masks in")
    shown = page.alpha() > 0
    for number in range(LIMITS.pictures):  # others come, and the page's goes
        ask(server, "/api/picture", png(coffee(30 + number, 20)))
    with page.page.expect_download() as download:
        page.page.click("#download")
    download.value.save_as(tmp_path / "masks.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "masks.png")) > 0, shown)
    page.errors.clear()  # the browser reports every answer 410


def test_keys_do_what_the_mouse_does(page):
    ready(page)
    page.page.focus("#stage")
    for key in ("ArrowLeft", "ArrowLeft", "ArrowUp", "Enter"):  # 5 pixels each, from the middle
        page.page.keyboard.press(key)
    page.shows_prediction([[110, 75]], [1])
    page.page.keyboard.press("Control+ArrowRight")
    page.page.keyboard.press("Shift+Enter")
    page.shows_prediction([[110, 75], [111, 75]], [1, 0])
    for key in ("c", "b", "ArrowRight", "ArrowDown", "b"):
        page.page.keyboard.press(key)
    page.shows_prediction([], [], [111, 75, 116, 80])
    masks, iou = predicted(page.model, page.image, page.question())
    page.page.keyboard.press(str(int(iou.argmin()) + 1))
    page.shows(masks[iou.argmin()])


def test_everything_is_drawn_and_a_click_starts_anew(page, tmp_path):
    from playwright.sync_api import expect

    ready(page)
    page.page.click("#everything")
    expect(page.page.locator("#state")).to_contain_text("masks in")
    labels = np.zeros((160, 240), bool)
    for mask in MaskGenerator(SamPredictor(page.model), EVERYTHING).generate(np.asarray(page.image)):
        labels |= decode_mask(mask["segmentation"])
    page.shows(labels)
    with page.page.expect_download() as download:
        page.page.click("#download")
    download.value.save_as(tmp_path / "masks.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "masks.png")) > 0, labels)
    page.page.mouse.click(*page.at(100, 60))
    page.shows_prediction([[100, 60]], [1])


def test_what_cannot_be_opened_is_said_and_the_page_goes_on(page):
    from playwright.sync_api import expect

    problem = page.page.locator("#problem")
    expect(page.page.locator("#model")).to_have_text("tiny & small")
    drop(page, bytes(LIMITS.bytes + 1), "huge.png")
    expect(problem).to_have_text("huge.png is too large: 4 MiB, at most 4 MiB.")
    drop(page, b"%PDF-1.7", "paper.pdf")
    expect(problem).to_contain_text("not an image: expected JPEG, PNG")
    page.errors.clear()  # the browser notes the 400 in its console
    page.page.set_input_files("#file", {"name": "cup.png", "mimeType": "image/png", "buffer": png(page.image)})
    expect(page.page.locator("#state")).to_contain_text("Encoded in")
    expect(problem).to_be_hidden()
    for n in range(LIMITS.pictures):  # others push the picture out; the page sends it again
        page.server.pictures.add(png(coffee(30 + n, 30)))
    page.page.mouse.click(*page.at(100, 60))
    page.shows_prediction([[100, 60]], [1])
    page.errors.clear()  # and the 410


def test_the_page_fits_a_phone(page):
    page.page.set_viewport_size({"width": 360, "height": 740})
    ready(page)
    page.page.mouse.click(*page.at(100, 60))
    page.shows_prediction([[100, 60]], [1])
    assert page.page.evaluate("document.documentElement.scrollWidth") == 360
