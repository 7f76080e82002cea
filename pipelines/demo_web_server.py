"""The HTTP side of `sami-cache demo-web`: a page of three files, and a few questions that it may ask.

It is reached by whoever can open a connection, which on 127.0.0.1 includes every page in the user's browser. So it answers
only to its own names (a name that an attacker's DNS turns to 127.0.0.1 is none), nothing that another site's page asks,
and it opens no file by a name from a request.
"""

import ipaddress
import json
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import SplitResult, urlsplit

from pipelines.demo_web_pictures import Pictures, Refused
from sami_cache.errors import SamiCacheError, one_line

PAGE = {
    "/": ("demo_web.html", "text/html; charset=utf-8"),
    "/demo_web.css": ("demo_web.css", "text/css; charset=utf-8"),
    "/demo_web.js": ("demo_web.js", "text/javascript; charset=utf-8"),
}
JSON, PNG, JPEG = "application/json", "image/png", "image/jpeg"
CONNECTIONS = 32
"""At once; a browser opens up to six."""
UPLOADS = 2
"""Files that are received at once, each held in memory."""
MAX_QUESTION = 64 << 10
"""Bytes of JSON."""
IDLE = 30.0
"""Seconds that a connection may say nothing."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class DemoServer(ThreadingHTTPServer):
    """Serves one `Pictures`, and closes it in the end. Raises OSError where it cannot listen."""

    daemon_threads = True

    def __init__(self, pictures: Pictures, host: str, port: int, model: str) -> None:
        self.pictures, self.host, self.model = pictures, host, model
        self.page = {
            path: (resources.files("pipelines").joinpath(file).read_bytes(), kind) for path, (file, kind) in PAGE.items()
        }
        self.uploads = threading.BoundedSemaphore(UPLOADS)
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        # Without the base class's look-up of the host's full name, which asks the network. What was closed a moment ago
        # keeps the port for a minute, and Ctrl-C and the same command again is what people do.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.host, self.server_address[1]

    def server_close(self) -> None:
        super().server_close()
        self.pictures.close()

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a browser that went away is none of our errors
            traceback.print_exc()

    def is_called(self, host: str | None) -> bool:
        """Whether a Host header is a name of this server: the one it listens on, this machine's, or an address.

        The port may differ (`ssh -L`). Pages of other sites can bring a browser here under a name of theirs alone.
        """
        try:
            name = (urlsplit(f"//{host}").hostname or "") if host else ""
        except ValueError:
            return False
        if name in ("localhost", self.host.lower(), socket.gethostname().lower()):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: DemoServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = IDLE
    wbufsize = -1  # head and body in one packet: Nagle's algorithm would hold the body back for 40 ms
    server_version, sys_version = "sami-cache", ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, find: Callable[[str], tuple[bytes, str]]) -> None:
        status = 200
        try:
            path = _split(self.path).path
            self._check_caller(path)
            body, kind = find(path)
        except SamiCacheError as error:
            status = error.status if isinstance(error, Refused) else 400
            body, kind = _json({"error": str(error)}), JSON
        except OSError:
            raise
        except Exception:
            traceback.print_exc()
            status, kind = 500, JSON
            body = _json({"error": "This is a bug in sami-cache; the terminal in which it runs shows more."})
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if status != 200:
            self._forget_body()

    def _check_caller(self, path: str) -> None:
        host = self.headers.get("Host")
        if not self.server.is_called(host):
            raise Refused(403, f"{one_line(host, 100)} is no name of this server. Open {self.server.url} instead.")
        origin = self.headers.get("Origin")
        if origin is not None and (origin == "null" or _split(origin).netloc.lower() != str(host).lower()):
            raise Refused(403, "Pages of other sites may not ask this server.")
        # Absent for programs. To follow a link to the page is no harm.
        if path.startswith("/api/") and self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise Refused(403, "Pages of other sites may not ask this server.")

    def _get(self, path: str) -> tuple[bytes, str]:
        if path in self.server.page:
            return self.server.page[path]
        if path == "/api/about":
            limits = self.server.pictures.limits
            return _json(
                {
                    "model": self.server.model,
                    "formats": "JPEG, PNG, WebP, BMP or TIFF",
                    "max_bytes": limits.bytes,
                    "max_pixels": limits.pixels,
                }
            ), JSON
        if path.startswith("/api/picture/"):
            return self.server.pictures.get(path.removeprefix("/api/picture/").removesuffix(".jpg")).photo, JPEG
        raise Refused(404, "There is no such page.")

    def _post(self, path: str) -> tuple[bytes, str]:
        pictures = self.server.pictures
        if path == "/api/picture":
            if not self.server.uploads.acquire(timeout=IDLE):
                raise Refused(503, "Too many pictures are being sent. Try again in a little while.")
            try:
                picture = pictures.add(self._body("application/octet-stream", pictures.limits.bytes))
            finally:
                self.server.uploads.release()
            return _json({"id": picture.id, "width": picture.width, "height": picture.height}), JSON
        files = {"/api/mask": pictures.mask, "/api/cutout": pictures.cutout}
        if path not in (*files, "/api/encode", "/api/predict", "/api/everything", "/api/labels"):
            raise Refused(404, "There is no such page.")
        question = self._question()
        key = question.get("id")
        if path in files:
            return files[path](key, question), PNG
        if path == "/api/labels":
            return pictures.labels(key), PNG
        if path == "/api/encode":
            return _json({"seconds": pictures.encode(key)}), JSON
        return _json(pictures.predict(key, question) if path == "/api/predict" else pictures.everything(key)), JSON

    def _question(self) -> dict[str, Any]:
        try:
            question = json.loads(self._body(JSON, MAX_QUESTION))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"expected JSON: {one_line(error)}") from error
        if not isinstance(question, dict):
            raise Refused(400, f"expected a JSON object, found {type(question).__name__}")
        return question

    def _body(self, kind: str, limit: int) -> bytes:
        # Neither type can be sent by another site's page without asking first, which nobody answers here.
        if self.headers.get_content_type() != kind:
            raise Refused(415, f"expected Content-Type {kind}")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refused(411, "expected a Content-Length")
        if int(length) > limit:
            raise Refused(413, f"Too large: {int(length)} bytes, at most {limit} are taken.")
        body = self.rfile.read(int(length))
        if len(body) != int(length):
            raise ConnectionError("the sender stopped")
        return body

    def _forget_body(self) -> None:
        """Read what a refused sender goes on to send: a connection closed in its face hides the reason from it."""
        self.wfile.flush()
        left = 4 * self.server.pictures.limits.bytes
        self.connection.shutdown(socket.SHUT_WR)
        while left > 0 and (chunk := self.connection.recv(1 << 16)):
            left -= len(chunk)


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError as error:
        raise Refused(400, f"{one_line(address, 100)} is no address.") from error


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
