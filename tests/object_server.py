"""An S3 server for the tests, moto's, and a proxy in front of it that does to requests what networks do."""

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

BUCKET = "bucket"
FAULTS = ("refused", "answer lost", "late", "slow", "truncated", "twice", "busy")


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of a running server with one empty bucket."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object) -> None:
            pass

    app, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_at_a_time(environ, start_response):
        with lock:  # moto looks for the object and then writes it: two threads could both create it, which S3 excludes
            return app(environ, start_response)

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()


def use_server(patch: pytest.MonkeyPatch, port: int) -> None:
    """Have this process, and the children it spawns, take the server at `port` for S3."""
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    from sami_cache.store import objects

    objects._store.cache_clear()


class HostileProxy(ThreadingHTTPServer):
    """Forwards to a server, and does something else to every request with the probability `share`."""

    daemon_threads = True

    def __init__(self, port: int, *, seed: int, share: float, faults: tuple[str, ...] = FAULTS) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.seed, self.share, self.faults = port, seed, share, faults
        self.met: Counter[str] = Counter()
        """How often each fault was done, and `none`."""
        self._lock = threading.Lock()

    def draw(self, method: str) -> str:
        """The next request's fault; seeded, though threads may take turns in another order."""
        with self._lock:
            rng = random.Random(f"{self.seed} {self.met.total()}")
            fault = rng.choice(self.faults) if rng.random() < self.share else "none"
            if fault == "late" and method != "PUT":
                fault = "refused"  # a delete that comes when the name is taken again is what no condition guards against
            self.met[fault] += 1
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that has gone


@contextmanager
def hostile_proxy(port: int, **options) -> Iterator[HostileProxy]:
    proxy = HostileProxy(port, **options)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HostileProxy

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.draw(self.command)
        if fault == "refused":
            return self._hang_up()
        if fault == "late":  # it arrives when the client has long tried again
            threading.Timer(0.3, self._forward, (body,)).start()
            return self._hang_up()
        if fault == "busy":
            return self._answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
        if fault == "slow":
            time.sleep(0.3)
        if fault == "twice":
            self._forward(body)
        status, headers, data = self._forward(body)
        if fault == "answer lost":
            return self._hang_up()
        return self._answer(status, headers, data, cut=fault == "truncated")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), data

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        named = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(data)))
        self.send_header("Content-Length", length if "content-length" in named else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
