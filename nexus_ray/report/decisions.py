"""Decisions of a person on flagged rows: taken one at a time, handed over before they count, and taken back again.

Invariant: what `decided` counts is what was handed over and not undone, in the order in which it was made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from nexus_ray.errors import NexusError

MAX_EDIT_CHARACTERS = 1_000_000

Action = Literal["accept", "reject", "edit", "override", "undo"]
Decide = Callable[[str, Action, str | None], None]
"""`decide(row_id, action, text)`: `text` is the new text of an `edit`, or of an `override` (an edit that counts
whatever the filters say), else None. `undo` takes the row's last decision back; a changed mind arrives as `undo` and
then the new decision. A NexusError is shown on the page, and the decision counts as not made."""


class ReviewQueue(Protocol):
    """Flagged rows by place: a list of dicts, or anything that reads them when asked.

    A row has `id` and `text`, and what there is of `reason`, `scores` (by name), `prompt` (text, or turns with role
    and content), `parameters` (by name), `generator`, `source`, `parents` and `refused` (an earlier edit that the
    filters did not let pass, for the editor to begin with). Rows keep their places while the page is
    open, decided or not; new ones may come at the end.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Mapping[str, Any]: ...


class Refused(Exception):
    """A request that is not done: status and a sentence for the page."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ReviewDesk:
    """Rows and the decisions on them. Requests come in threads; decisions are handed over one at a time."""

    def __init__(self, queue: ReviewQueue, decide: Decide) -> None:
        self._queue = queue
        self._decide = decide
        self._lock = threading.Lock()
        self._made: dict[int, tuple[Action, str | None]] = {}
        """Decision by place, in the order in which they were made."""
        self.finished = threading.Event()
        self._note()

    @property
    def decided(self) -> int:
        return len(self._made)

    def drain(self) -> None:
        """Return once no decision is under way."""
        with self._lock:
            pass

    def row(self, place: int) -> dict[str, Any]:
        """What the page shows."""
        with self._lock:
            row = dict(self._row(place))
            action, text = self._made.get(place, (None, None))
            return {**row, **self._counts(), "place": place, "action": action, "edited": text}

    def decide(self, place: int, row_id: object, action: object, text: object) -> dict[str, Any]:
        """Hand a decision over; the same one again changes nothing. Returns the counts."""
        with self._lock:
            row = self._row(place)
            if row["id"] != row_id:
                raise Refused(409, "The queue has changed; reload the page.")
            if action == "undo":
                self._undo(place)
            else:
                self._take(place, *_decision(action, text))
            return {**self._counts(), "place": place}

    def undo_last(self) -> dict[str, Any]:
        """Take the latest decision back. Returns its place and the counts."""
        with self._lock:
            if not self._made:
                raise Refused(409, "There is nothing to undo.")
            place = next(reversed(self._made))
            self._undo(place)
            return {**self._counts(), "place": place}

    def _take(self, place: int, action: Action, text: str | None) -> None:
        if self._made.get(place) == (action, text):
            return
        if place in self._made:
            self._undo(place)
        self._hand_over(place, action, text)
        self._made[place] = action, text
        self._note()

    def _undo(self, place: int) -> None:
        if place not in self._made:
            raise Refused(409, "This row is not decided.")
        self._hand_over(place, "undo", None)
        del self._made[place]
        self._note()

    def _hand_over(self, place: int, action: Action, text: str | None) -> None:
        try:
            self._decide(self._row(place)["id"], action, text)
        except NexusError as error:
            raise Refused(409, f"Not saved: {error}") from None

    def _row(self, place: int) -> Mapping[str, Any]:
        if not 0 <= place < len(self._queue):
            raise Refused(404, "There is no such row.")
        return self._queue[place]

    def _counts(self) -> dict[str, int]:
        return {"count": len(self._queue), "decided": len(self._made)}

    def _note(self) -> None:
        if len(self._made) == len(self._queue):
            self.finished.set()
        else:
            self.finished.clear()


def _decision(action: object, text: object) -> tuple[Action, str | None]:
    if action == "accept" or action == "reject":
        return action, None
    if action != "edit" and action != "override":
        raise Refused(400, "An action is accept, reject, edit, override or undo.")
    if not isinstance(text, str) or not text.strip():
        raise Refused(400, "An edited row needs text; reject the row instead.")
    if len(text) > MAX_EDIT_CHARACTERS or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Refused(400, f"An edited row is text of at most {MAX_EDIT_CHARACTERS} characters.")
    return action, text
