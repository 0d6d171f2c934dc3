"""What became of the answers that a run's synthetic domains are made of, from the ledgers' `summary.json`."""

from __future__ import annotations

import json
from typing import Any

from nexus_ray.report.record import RunRecord, number
from nexus_ray.storage import Storage

SUMMARY_FILE = "summary.json"


def jobs(record: RunRecord) -> list[dict[str, Any]]:
    """One per synthetic domain whose ledger is still there: `domain`, `entries` read, `funnel` (label, count), `per`
    accepted row (label, figure), `diversity` rows, `overlap` rows
    (what should be unseen, and how much of it accepted text holds), `stopped`."""
    found = []
    for domain, section in (record.config.get("domains") or {}).items():
        source = section.get("source") or {} if isinstance(section, dict) else {}
        if source.get("kind") != "synthesis" or not source.get("ledger"):
            continue
        summary = _summary(Storage(str(source["ledger"])))
        if summary is not None:
            found.append(_job(str(domain), source, summary))
    return found


def _summary(ledger: Storage) -> dict[str, Any] | None:
    try:
        summary = ledger.read_json(SUMMARY_FILE) if ledger.exists(SUMMARY_FILE) else None
    except (OSError, json.JSONDecodeError):
        return None
    return summary if isinstance(summary, dict) and isinstance(summary.get("stats"), dict) else None


def _job(domain: str, source: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    stats = summary["stats"]
    funnel = [(label, stats.get(key)) for label, key in (("requests planned", "planned"), ("answered", "answered"))]
    funnel += [(label, stats.get(key)) for label, key in (("failed", "failed"), ("rows accepted", "accepted"))]
    funnel += [("rows flagged for a person", stats.get("flagged")), ("rows rejected", stats.get("rejected"))]
    by = sorted((stats.get("rejected_by") or {}).items(), key=lambda item: -item[1])
    per = summary.get("per_accepted") or {}
    return {
        "domain": domain,
        "ledger": source["ledger"],
        "entries": source.get("entries"),
        "funnel": [(label, count) for label, count in funnel if number(count) is not None],
        "rejected_by": by,
        "per": [(name, f"{value:,.3g}") for name, value in per.items() if number(value) is not None],
        "diversity": [row for row in summary.get("diversity") or [] if isinstance(row, dict)],
        "overlap": [row for row in summary.get("overlap") or [] if isinstance(row, dict)],
        "stopped": str(summary.get("stopped") or ""),
    }
