"""What all tests share: golden files, and an environment in which nothing of the user's own leaks in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nexus_ray.session import quiet_environment

GOLDEN = Path(__file__).parent / "golden"

quiet_environment()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files anew instead of comparing")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "NEXUS_DEBUG", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: the text equals the file of that name under tests/golden (or becomes it)."""

    def check(name: str, text: str) -> None:
        file = GOLDEN / name
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.exists(), f"{file} is missing; write it with pytest --update-golden"
        assert text == file.read_text(encoding="utf-8"), (
            f"{file} differs; if meant, refresh with pytest --update-golden"
        )

    return check
