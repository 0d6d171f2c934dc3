"""What the page says of a run's synthetic domains: figures from the ledger's summary."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from nexus_ray.report.page import write_report
from nexus_ray.storage import Storage
from tests.record_fixture import write_record


def test_the_page_shows_what_of_unseen_text_was_accepted(tmp_path: Path) -> None:
    folder = write_record(tmp_path / "demo", steps=4)
    ledger = tmp_path / "ledger"
    ledger.mkdir()
    overlap = {"unseen": "gsm8k", "items": 1319, "too_short": 2, "touched": 3, "touched_share": 0.002274, "rows": 7}
    summary = {"stats": {"planned": 8, "answered": 8, "accepted": 61}, "diversity": [], "overlap": [overlap]}
    (ledger / "summary.json").write_text(json.dumps(summary))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    source = {"kind": "synthesis", "ledger": str(ledger), "entries": 1, "fingerprint": "0" * 16}
    config["domains"]["stories"] = {**next(iter(config["domains"].values())), "source": source}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    page = Path(write_report(Storage(str(folder)))).read_text(encoding="utf-8")
    section = page[page.index("What was written for this run") :]
    assert "<th>touched share</th>" in section and "<td>gsm8k</td><td>1319</td><td>2</td><td>3</td><td>0.002" in section
