"""One storage for all faults, with the uninterrupted run that they are compared to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.runs import Runs

REFERENCE = "whole"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("faults"))
    try:
        made.complete(REFERENCE)
        yield made
    finally:
        made.close()


@pytest.fixture
def begun(runs: Runs, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a run of its own, whose first stage is done; what it started is gone afterwards."""
    test, _, case = request.node.name.removeprefix("test_").partition("[")
    name = f"{test[:40].rstrip('_')}-{case.rstrip(']')}".rstrip("-")
    runs.begun(name, REFERENCE)
    yield name
    runs.close()
