"""The review server over real HTTP: decisions arrive in order, and nobody but the page gets in."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from nexus_ray.errors import DataError
from nexus_ray.report.review import ReviewServer, serve_review

ROWS = [
    {"id": "r0", "text": "First <b>text</b>.", "reason": "pii: a phone number", "scores": {"pii.phones": 1.0}},
    {"id": "r1", "text": "Second text.", "reason": "safety: a word", "scores": {"x": float("nan")}},
    {"id": "r2", "text": "Third text."},
]


@dataclass
class Desk:
    """A server, what it handed over, and a client with the page's cookie and token."""

    server: ReviewServer
    decisions: list[tuple[str, str, str | None]]
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        status, headers, page = self.ask("GET", self.server.url.partition(f":{self.server.port}")[2])
        assert status == 200
        token = re.search(r'name="page-token" content="([^"]+)"', page)
        assert token
        self.page, self.policy = page, headers["Content-Security-Policy"]
        self.cookie = headers["Set-Cookie"]
        self.headers = {
            "Cookie": self.cookie.partition(";")[0],
            "Origin": f"http://127.0.0.1:{self.server.port}",
            "X-Review-Token": token[1],
            "Content-Type": "application/json",
        }

    def ask(self, method: str, path: str, body: str | None = None, **changes: str) -> tuple[int, dict[str, str], str]:
        headers = {**self.headers, **{name.replace("_", "-"): value for name, value in changes.items()}}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=10)
        try:
            connection.request(method, path, body, {name: value for name, value in headers.items() if value != "-"})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()
        finally:
            connection.close()

    def decide(self, place: int, action: str, text: str | None = None, /, **more: Any) -> tuple[int, dict[str, Any]]:
        data = {"place": place, "id": f"r{place}", "action": action, "text": text, **more}
        status, _, body = self.ask("POST", "/decisions", json.dumps(data))
        return status, json.loads(body)

    def row(self, place: int) -> dict[str, Any]:
        return dict(json.loads(self.ask("GET", f"/rows/{place}")[2]))


@pytest.fixture
def desk() -> Iterator[Desk]:
    decisions: list[tuple[str, str, str | None]] = []
    with serve_review(ROWS, lambda *decision: decisions.append(decision)) as server:
        yield Desk(server, decisions)


def test_decisions_arrive_in_order_and_the_end_is_known(desk: Desk) -> None:
    assert desk.row(0) == {**ROWS[0], "place": 0, "count": 3, "decided": 0, "action": None, "edited": None}
    assert not desk.server.wait(0)
    assert desk.decide(0, "accept") == (200, {"count": 3, "decided": 1, "place": 0})
    assert desk.decide(1, "edit", "Better text.\n")[0] == 200
    assert desk.decide(2, "reject")[0] == 200
    assert desk.decisions == [("r0", "accept", None), ("r1", "edit", "Better text.\n"), ("r2", "reject", None)]
    assert desk.row(1)["edited"] == "Better text.\n" and desk.row(1)["scores"] == {"x": "nan"}
    assert desk.server.wait(0) and desk.server.decided == 3


def test_undo_takes_back_the_latest_decision_and_then_the_one_before(desk: Desk) -> None:
    desk.decide(2, "reject")
    desk.decide(0, "accept")
    places = [json.loads(desk.ask("POST", "/undo", "{}")[2]) for _ in range(3)]
    assert [answer.get("place") for answer in places] == [0, 2, None]
    assert places[2] == {"error": "There is nothing to undo."}
    assert desk.decisions[2:] == [("r0", "undo", None), ("r2", "undo", None)]
    assert desk.server.decided == 0 and desk.row(0)["action"] is None


def test_a_repeated_decision_is_one_and_a_changed_mind_is_taken_back_first(desk: Desk) -> None:
    for action in ("accept", "accept", "reject"):
        assert desk.decide(0, action)[0] == 200
    assert desk.decisions == [("r0", "accept", None), ("r0", "undo", None), ("r0", "reject", None)]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        ({"action": "delete"}, 400),
        ({"action": "edit", "text": " \n"}, 400),
        ({"action": "edit", "text": None}, 400),
        ({"action": "override", "text": None}, 400),
        ({"action": "edit", "text": "\ud800"}, 400),
        ({"action": "edit", "text": "x" * 1_000_001}, 400),
        ({"action": "accept", "id": "r1"}, 409),
        ({"action": "accept", "place": 3}, 404),
        ({"action": "accept", "place": -1}, 404),
        ({"action": "accept", "place": "0"}, 400),
        ({"action": "accept", "place": True}, 400),
        ({"action": "undo"}, 409),
    ],
)
def test_a_decision_that_is_none_is_refused(desk: Desk, data: dict[str, Any], status: int) -> None:
    found, answer = desk.decide(0, "", **data)
    assert found == status and answer["error"] and desk.decisions == []


def test_a_ledger_that_refuses_is_heard_and_nothing_counts_as_decided() -> None:
    def decide(row_id: str, action: str, text: str | None) -> None:
        raise DataError("review/part-3 is gone")

    with serve_review(ROWS, decide) as server:
        desk = Desk(server, [])
        assert desk.decide(0, "accept") == (409, {"error": "Not saved: review/part-3 is gone"})
        assert server.decided == 0 and desk.row(0)["action"] is None


def test_decisions_of_many_tabs_are_handed_over_one_at_a_time() -> None:
    inside, most = 0, 0
    lock = threading.Lock()

    def decide(row_id: str, action: str, text: str | None) -> None:
        nonlocal inside, most
        with lock:
            inside, most = inside + 1, max(most, inside + 1)
        threading.Event().wait(0.01)
        with lock:
            inside -= 1

    with serve_review([{"id": f"r{i}", "text": "x"} for i in range(20)], decide) as server:
        desk = Desk(server, [])
        threads = [threading.Thread(target=desk.decide, args=(place, "accept")) for place in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.wait(5) and most == 1


# --- who gets in -------------------------------------------------------------------------------------------------


def test_it_is_bound_to_the_loopback_address_alone(desk: Desk) -> None:
    assert desk.server._http.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "change",
    [
        {"Cookie": "-"},
        {"Cookie": "nexus-review-1=x"},
        {"Cookie": "{name}=wrong"},
        {"Cookie": "{name}=%C3%A9"},
        {"Cookie": ";;=;\x7f"},
        {"Host": "evil.example"},
        {"Host": "evil.example:{port}"},
        {"Host": "127.0.0.1"},
        {"Origin": "-"},
        {"Origin": "null"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"X_Review_Token": "-"},
        {"X_Review_Token": "wrong"},
        {"X_Review_Token": "é"},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
    ],
)
def test_only_the_page_may_decide(desk: Desk, change: dict[str, str]) -> None:
    port = desk.server.port
    filled = {k: v.replace("{port}", str(port)).replace("{name}", f"nexus-review-{port}") for k, v in change.items()}
    body = json.dumps({"place": 0, "id": "r0", "action": "accept"})
    for path in ("/decisions", "/undo"):
        status, _, answer = desk.ask("POST", path, body, **filled)
        assert status in (403, 415, 421) and json.loads(answer)["error"]
    assert desk.decisions == []
    assert desk.ask("POST", "/decisions", body)[0] == 200


@pytest.mark.parametrize(
    "others",
    ['prefs={"theme":"dark"}; {ours}', "x=a b; {ours}", "a[b]=c; {ours}", "{ours}; é=\x7f;;=", "{name}=old; {ours}"],
)
def test_cookies_of_other_local_servers_do_no_harm(desk: Desk, others: str) -> None:
    ours = desk.headers["Cookie"]
    cookies = others.replace("{ours}", ours).replace("{name}", ours.partition("=")[0])
    assert desk.ask("GET", "/rows/0", Cookie=cookies)[0] == 200
    assert desk.ask("GET", "/rows/0", Cookie=cookies.replace(ours, f"{ours}x"))[0] == 403


@pytest.mark.parametrize(
    "path", ["/", "/rows/0", "/?token=", "/?token=wrong", "/?token=%C3%A9", "/rows/0?token={token}"]
)
def test_without_the_token_nothing_is_read(desk: Desk, path: str) -> None:
    path = path.replace("{token}", desk.server.url.partition("=")[2])
    status, headers, body = desk.ask("GET", path, Cookie="-")
    assert (
        status == 403
        and "Set-Cookie" not in headers
        and "text" not in body
        and desk.headers["X-Review-Token"] not in body
    )


def test_a_foreign_name_for_this_address_reads_nothing_even_with_the_cookie(desk: Desk) -> None:
    for host in ("evil.example", f"127.0.0.1.evil.example:{desk.server.port}", f"127.0.0.1:{desk.server.port}@evil"):
        assert desk.ask("GET", "/rows/0", Host=host)[0] == 421
    assert desk.ask("GET", "/rows/0", Host=f"localhost:{desk.server.port}")[0] == 200


def raw(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_broken_requests_are_refused_and_the_server_goes_on(desk: Desk) -> None:
    port = desk.server.port
    host = f"Host: 127.0.0.1:{port}\r\n".encode()
    assert b" 421 " in raw(port, b"GET / HTTP/1.1\r\n" + host + b"Host: evil.example\r\n\r\n").partition(b"\r\n")[0]
    assert b" 421 " in raw(port, b"GET / HTTP/1.1\r\n\r\n").partition(b"\r\n")[0]
    assert b" 403 " in raw(port, b"GET //[x HTTP/1.1\r\n" + host + b"\r\n").partition(b"\r\n")[0]
    assert b"not understood" in raw(port, b"PUT /<b> HTTP/1.1\r\n" + host + b"\r\n")
    assert b"not understood" in raw(port, b"\x16\x03\x01<b>\x02\r\n\r\n")
    for length in ("-1", "9" * 5000, str(5 * 2**20), "1_0"):
        assert desk.ask("POST", "/undo", "{}", Content_Length=length)[0] == 413
    for body in ("", "[]", "{", "[" * 100_000):
        assert desk.ask("POST", "/undo", body)[0] == 400
    assert desk.ask("GET", "/rows/0")[0] == 200


def test_headers_close_the_page(desk: Desk) -> None:
    assert "HttpOnly" in desk.cookie and "SameSite=Strict" in desk.cookie
    policy = dict(part.strip().partition(" ")[::2] for part in desk.policy.split(";"))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'" == policy["form-action"]
    assert policy["script-src"].startswith("'nonce-") and policy["script-src"] == policy["style-src"]
    assert policy["script-src"] not in desk.ask("GET", "/")[1]["Content-Security-Policy"]
    for path in ("/", "/rows/0", "/nothing"):
        headers = desk.ask("GET", path)[1]
        assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
        assert "Python" not in headers["Server"]
    assert not re.search(r"(?:src|href)=(?!\"data:,)", desk.page) and "@import" not in desk.page
    assert "url(" not in desk.page and "//" not in re.sub(r"// .*", "", desk.page).replace("-//", "")


def test_the_token_stays_out_of_the_log(desk: Desk, capfd: pytest.CaptureFixture[str]) -> None:
    desk.ask("GET", desk.server.url.partition(f":{desk.server.port}")[2])
    desk.ask("GET", "/nothing")
    assert capfd.readouterr() == ("", "")


def test_closing_frees_the_port() -> None:
    with serve_review(ROWS, lambda *_: None) as server:
        port = server.port
    with serve_review([], lambda *_: None, port=port) as again:
        assert again.port == port and again.wait(0)
        assert Desk(again, []).ask("GET", "/rows/0")[0] == 404
