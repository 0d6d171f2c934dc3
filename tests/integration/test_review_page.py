"""The review page in a real browser, worked by keyboard: accept, reject, edit, undo, move; nothing on the console."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.errors import DataError
from nexus_ray.report.desk import review_ledger
from nexus_ray.report.review import ReviewServer, serve_review
from tests.browser import CHROMIUM, Page, open_browser
from tests.ledger_job import Duplicates
from tests.unit.report.test_desk import flagged

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (apt-get install chromium)"),
]
ATTACK = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
ROWS: list[dict[str, Any]] = [
    {
        "id": f"row{place}",
        "text": f"Story {place}. Call Ann at 555-0100. {ATTACK}",
        "reason": f"personal_data: a phone number {ATTACK}",
        "scores": {"personal_data.phones": 1.0, "repetition.top_2gram": 0.123456},
        "prompt": [
            {"role": "system", "content": "You write."},
            {"role": "user", "content": f"Write {place}. {ATTACK}"},
        ],
        "parameters": {"noun": "fox", "style": ATTACK},
        "generator": "smollm2@abc",
        "parents": ["doc1", "doc2"],
        "source": "The source." if place else None,
    }
    for place in range(4)
]
Decision = tuple[str, str, str | None]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with open_browser(tmp_path) as page:
        yield page


def visit(page: Page, server: ReviewServer) -> None:
    page.call("Page.navigate", url=server.url)
    page.wait_for("document.getElementById('title')?.textContent.startsWith('Row 1 of')")


def at(page: Page, title: str) -> None:
    page.wait_for(f"document.getElementById('title')?.textContent === {title!r}")


def text_of(page: Page, place: str) -> str:
    return str(page.value(f"document.getElementById({place!r}).textContent"))


def test_a_queue_is_worked_through_by_keyboard(page: Page, tmp_path: Path) -> None:
    decisions: list[Decision] = []
    with serve_review(ROWS, lambda *decision: decisions.append(decision)) as server:
        visit(page, server)
        assert page.value("location.href") == f"http://127.0.0.1:{server.port}/"
        assert text_of(page, "text") == ROWS[0]["text"] and page.value("document.title") == "1/4 – review"
        assert "phone number" in text_of(page, "reason") and "0.1235" in text_of(page, "scores")
        assert "smollm2@abc" in text_of(page, "history") and "doc1, doc2" in text_of(page, "history")
        assert "fox" in text_of(page, "parameters") and "Write 0." in text_of(page, "prompt")

        page.press("a")
        at(page, "Row 2 of 4")
        assert text_of(page, "status").startswith("Row 1 accepted. Row 2: personal_data")
        page.press("r")
        at(page, "Row 3 of 4")

        page.press("e")
        page.wait_for("document.activeElement.id === 'edit'")
        page.call("Input.insertText", text="Better: ")
        for key in "arujk":  # letters of a text are no commands
            page.press(key)
        page.press("Enter")
        page.press("Enter", ctrl=True)
        at(page, "Row 4 of 4")
        edited = str(ROWS[2]["text"]) + "Better: arujk\n"
        assert decisions == [("row0", "accept", None), ("row1", "reject", None), ("row2", "edit", edited)]

        page.press("u")
        at(page, "Row 3 of 4")
        assert decisions[-1] == ("row2", "undo", None) and text_of(page, "text") == ROWS[2]["text"]
        page.press("k")
        at(page, "Row 2 of 4 (rejected)")
        page.press("k")
        at(page, "Row 1 of 4 (accepted)")
        page.press("k")
        page.wait_for("document.getElementById('problem').textContent === 'This is the first row.'")
        page.screenshot(tmp_path / "review.png")
        for row in (2, 3, 4):
            page.press("j")
            page.wait_for(f"document.getElementById('title').textContent.startsWith('Row {row} of')")
        page.press("a")
        page.wait_for("document.getElementById('progress').textContent === '3 of 4 decided'")
        page.press("k")
        at(page, "Row 3 of 4")
        assert not server.wait(0)
        page.press("a")
        page.wait_for("document.getElementById('status').textContent.includes('All 4 rows are decided')")
        assert server.wait(5) and decisions[-2:] == [("row3", "accept", None), ("row2", "accept", None)]
        assert page.value("document.title") != "owned"
        assert page.console == []


def test_escape_leaves_a_text_as_it_was_and_a_reload_stays_signed_in(page: Page) -> None:
    decisions: list[Decision] = []
    with serve_review(ROWS, lambda *decision: decisions.append(decision)) as server:
        visit(page, server)
        page.press("e")
        page.wait_for("document.activeElement.id === 'edit'")
        assert page.value("document.getElementById('actions').hidden")
        page.call("Input.insertText", text="Not this.")
        page.press("Escape")
        page.wait_for("document.getElementById('editor').hidden")
        assert text_of(page, "text") == ROWS[0]["text"] and page.value("document.activeElement.id") == "title"
        page.press("r")
        at(page, "Row 2 of 4")
        page.call("Page.reload")
        at(page, "Row 1 of 4 (rejected)")
        assert decisions == [("row0", "reject", None)] and page.console == []


def test_what_went_wrong_is_said_and_the_row_stays(page: Page) -> None:
    def decide(row_id: str, action: str, text: str | None) -> None:
        raise DataError("the ledger is read-only")

    with serve_review(ROWS, decide) as server:
        visit(page, server)
        page.press("a")
        page.wait_for("document.getElementById('problem').textContent === 'Not saved: the ledger is read-only'")
        at(page, "Row 1 of 4")
    page.press("a")
    page.wait_for("document.getElementById('problem').textContent.includes('does not answer; nothing was saved')")


def test_a_screen_reader_finds_names_roles_and_news_and_can_turn_the_keys_off(page: Page) -> None:
    decisions: list[Decision] = []
    with serve_review(ROWS, lambda *decision: decisions.append(decision)) as server:
        visit(page, server)
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        found = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if "role" in node}
        for name in ("Accept a", "Reject r", "Edit e", "Undo last u", "Previous k", "Next j"):
            assert ("button", name) in found
        assert {("group", "Decision"), ("heading", "Row 1 of 4"), ("article", "Row 1 of 4")} <= found
        assert {role for role, _ in found} >= {"main", "status", "alert", "checkbox"}
        assert page.value("document.documentElement.lang") == "en"
        assert page.value("document.activeElement.id") == "title"

        page.value("document.getElementById('keys').click()")
        page.press("a")
        page.value("document.querySelector('[data-key=\"r\"]').click()")
        at(page, "Row 2 of 4")
        assert decisions == [("row0", "reject", None)]
        assert page.value("document.querySelector('[data-key=\"r\"]').getAttribute('aria-pressed')") == "false"


def test_an_empty_queue_says_so(page: Page) -> None:
    with serve_review([], lambda *_: None) as server:
        page.call("Page.navigate", url=server.url)
        page.wait_for("document.getElementById('title')?.textContent === 'Nothing to review'")


def test_the_verb_puts_what_was_pressed_into_the_ledger(page: Page, tmp_path: Path) -> None:
    """`nexus-ray review` on a real ledger in a browser: one row accepted, one rejected, one edited."""
    ledger = flagged(tmp_path / "ledger")
    with ledger.review() as review:
        waiting = list(review.queue())
    said: list[str] = []
    done = threading.Event()
    settings = {"who": "ann", "say": said.append, "until": done.is_set}
    served = threading.Thread(target=review_ledger, args=(ledger.folder.uri,), kwargs=settings, daemon=True)
    served.start()
    while not said:
        done.wait(0.05)
    page.call("Page.navigate", url=said[0].partition("open ")[2].split()[0])
    page.wait_for(f"document.getElementById('title')?.textContent === 'Row 1 of {len(waiting)}'")
    assert text_of(page, "text") == waiting[0].text and "Write about" in text_of(page, "prompt")
    page.press("a")
    at(page, f"Row 2 of {len(waiting)}")
    page.press("r")
    at(page, f"Row 3 of {len(waiting)}")
    page.press("e")
    page.wait_for("document.activeElement.id === 'edit'")
    page.call("Input.insertText", text="Better: ")
    page.press("Enter", ctrl=True)
    at(page, f"Row 4 of {len(waiting)}")
    done.set()
    served.join(20)
    with ledger.committer(Duplicates()) as committer:  # the job, whose filters judge what was written
        committer.fold_decisions()
    accepted = {row.text: row for row in ledger.rows("accepted") if "review" in row.provenance}
    assert set(accepted) == {waiting[0].text, f"{waiting[2].text}Better: "}
    assert [row.id for row in ledger.rows("rejected") if "review" in row.provenance] == [waiting[1].id]
    assert page.console == []
