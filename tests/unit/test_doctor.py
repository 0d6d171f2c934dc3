"""The doctor names what is wrong and the remedy, and sees all patients."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from nexus_ray import doctor
from nexus_ray.config import load_config
from tests.configs import two_stages

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_sound_machine_is_ready() -> None:
    console = Console(record=True, width=160)
    assert doctor.run_doctor(two_stages(), console=console) == 0
    text = console.export_text()
    assert "ready" in text and "FAIL" not in text
    assert all(word in text for word in ("python", "ray", "deepspeed", "torch", "storage", "disk", "hub"))


def test_a_missing_hub_fails_only_where_it_is_needed() -> None:
    assert doctor.check_hub(None).level == "note"
    finding = doctor.check_hub(load_config(ROOT / "configs/roadmap-hub.yaml"))
    assert finding.level == "fail" and "domains.stories" in finding.remedy


def test_unwritable_storage_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = doctor.check_storage(two_stages(f"storage={tmp_path / 'file'}"))
    assert finding.level == "fail" and "storage" in finding.found


def test_a_full_disk_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "MIN_DISK_BYTES", 1 << 62)
    finding = doctor.check_disk(two_stages(f"storage={tmp_path / 'new' / 'runs'}"))
    assert finding.level == "fail" and "larger disk" in finding.remedy


def test_missing_and_untested_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.TESTED, "no-such-package", "1.")
    monkeypatch.setitem(doctor.TESTED, "pydantic", "99.")
    assert doctor.check_package("no-such-package").level == "fail"
    finding = doctor.check_package("pydantic")
    assert finding.level == "note" and "pip install -c constraints.txt" in finding.remedy


def test_a_breaking_check_is_a_finding_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_python() -> doctor.Finding:
        raise RuntimeError("broken")

    monkeypatch.setattr(doctor, "check_python", check_python)
    console = Console(record=True, width=160)
    assert doctor.run_doctor(console=console) == 1
    assert "1 to mend: python" in console.export_text()
