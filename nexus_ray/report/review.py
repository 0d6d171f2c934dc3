"""The review page: flagged rows one after another on a small local page; decisions go to whoever asked for them.

    with serve_review(rows, decide) as server:
        print(server.url)
        server.wait()

Flagged text is untrusted (a model wrote it) and a decision changes what is trained on, so the page is closed on all
sides: bound to the loopback address; a random token in the first URL becomes a cookie; the Host header must be this
server's (a name that someone points at 127.0.0.1 is refused); decisions need the page's own origin and a second token
that only the page knows; a strict content policy, no assets from elsewhere, and text is only ever set as text.
Invariant: every decision is handed over before the page says so, one at a time, in the order in which it was made.
"""

from __future__ import annotations

import hmac
import json
import math
import re
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from nexus_ray.report.decisions import Decide, Refused, ReviewDesk, ReviewQueue
from nexus_ray.report.page import environment

HOST = "127.0.0.1"
MAX_BODY_BYTES = 4 * 2**20
_TIMEOUT_S = 30


class ReviewServer:
    """A running review page; close it, or use it as a context."""

    def __init__(self, queue: ReviewQueue, decide: Decide, *, port: int = 0) -> None:
        self._desk = ReviewDesk(queue, decide)
        self._token, self._page_token = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        self._http = _Server((HOST, port), _handler(self._desk, self._token, self._page_token))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    @property
    def url(self) -> str:
        """Opens the page; holds the token, so it is for the user's eyes only."""
        return f"http://{HOST}:{self.port}/?token={self._token}"

    @property
    def decided(self) -> int:
        """Rows decided so far."""
        return self._desk.decided

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until every row of the queue is decided; whether that is so."""
        return self._desk.finished.wait(timeout_s)

    def close(self) -> None:
        """Stop serving, once the decision under way is handed over."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        self._desk.drain()

    def __enter__(self) -> ReviewServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve_review(queue: ReviewQueue, decide: Decide, *, port: int = 0) -> ReviewServer:
    """Serve the review page on the loopback address, in threads of its own; port 0 takes a free one.

    Raises OSError if the port is taken.
    """
    return ReviewServer(queue, decide, port=port)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # of the default 5, many tabs at once overflow it and wait seconds for another try
    block_on_close = False  # a browser's idle connection must not hold up the end

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # the browser went away
            super().handle_error(request, client_address)


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), secret.encode())


def _handler(desk: ReviewDesk, token: str, page_token: str) -> type[BaseHTTPRequestHandler]:
    """The request handler of one server."""

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "nexus-ray", ""
        timeout = _TIMEOUT_S

        def do_GET(self) -> None:
            self._answer(self._get)

        def do_POST(self) -> None:
            self._answer(self._post)

        def _answer(self, work: Callable[[], None]) -> None:
            try:
                self._check_host()
                work()
            except Refused as refused:
                self._send_json(refused.status, {"error": str(refused)})

        def _get(self) -> None:
            path, _, query = self.path.partition("?")
            if path == "/" and _same(parse_qs(query).get("token", [""])[0], token):
                self._send_page()
                return
            self._check_cookie()
            if path == "/":
                self._send_page()
            elif path.startswith("/rows/"):
                self._send_json(200, desk.row(_place(path.removeprefix("/rows/"))))
            else:
                raise Refused(404, "There is nothing here.")

        def _post(self) -> None:
            self._check_cookie()
            if self.headers.get("Origin") != f"http://{self.headers['Host']}":
                raise Refused(403, "Only the review page itself may decide.")
            if not _same(self.headers.get("X-Review-Token", ""), page_token):
                raise Refused(403, "The page is of another session; reload it.")
            data = self._body()
            if self.path == "/undo":
                self._send_json(200, desk.undo_last())
            elif self.path == "/decisions":
                place = data.get("place")
                if type(place) is not int:
                    raise Refused(400, "A decision names the place of its row.")
                self._send_json(200, desk.decide(place, data.get("id"), data.get("action"), data.get("text")))
            else:
                raise Refused(404, "There is nothing here.")

        def _check_host(self) -> None:
            port = self.connection.getsockname()[1]
            names = self.headers.get_all("Host", [])
            if len(names) != 1 or names[0] not in (f"{HOST}:{port}", f"localhost:{port}"):
                raise Refused(421, "This server answers only to its own address.")

        def _check_cookie(self) -> None:
            # by hand: SimpleCookie drops every cookie if it dislikes one, and other local servers' come along
            pairs = (pair.strip().partition("=") for pair in self.headers.get("Cookie", "").split(";"))
            if not any(_same(value, token) for name, _, value in pairs if name == self._cookie_name()):
                raise Refused(403, "Open the page with the link that was printed.")

        def _cookie_name(self) -> str:
            return f"nexus-review-{self.connection.getsockname()[1]}"  # cookies do not tell ports apart

        def _body(self) -> dict[str, Any]:
            size = self.headers.get("Content-Length", "")
            if not re.fullmatch(r"[0-9]{1,9}", size) or int(size) > MAX_BODY_BYTES:
                raise Refused(413, f"A request has a length of at most {MAX_BODY_BYTES} bytes.")
            if self.headers.get_content_type() != "application/json":
                raise Refused(415, "A decision is JSON.")
            try:
                data = json.loads(self.rfile.read(int(size)))
            except (ValueError, RecursionError):
                raise Refused(400, "A decision is JSON.") from None
            if not isinstance(data, dict):
                raise Refused(400, "A decision is a JSON object.")
            return data

        def _send_page(self) -> None:
            nonce = secrets.token_urlsafe(16)
            page = environment().get_template("review.html.j2").render(nonce=nonce, page_token=page_token)
            policy = (
                f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
                "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
                "require-trusted-types-for 'script'; trusted-types 'none'"
            )
            cookie = f"{self._cookie_name()}={token}; HttpOnly; SameSite=Strict; Path=/"
            headers = {"Content-Security-Policy": policy, "Set-Cookie": cookie}
            self._send(200, "text/html; charset=utf-8", page.encode(), headers)

        def _send_json(self, status: int, data: dict[str, Any]) -> None:
            headers = {"Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"}
            self._send(status, "application/json", json.dumps(_plain(data), default=str).encode(), headers)

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            """What the library says of a request that it cannot read, without its page."""
            self._send_json(code, {"error": "This request is not understood."})

        def _send(self, status: int, kind: str, body: bytes, headers: Mapping[str, str]) -> None:
            common = {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
                "Referrer-Policy": "same-origin",  # `no-referrer` would blank the Origin of older browsers' requests
                "Cross-Origin-Opener-Policy": "same-origin",
                "Cross-Origin-Resource-Policy": "same-origin",
            }
            self.send_response(status)
            for name, value in {**common, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the first request's line holds the token."""

    return Handler


def _place(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Refused(404, "There is no such row.")
    return int(text)


def _plain(value: Any) -> Any:
    """The value as JSON knows it: NaN and infinity are text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
