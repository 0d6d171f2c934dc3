"""The pages in a real browser: no error on the console, everything drawn, the tooltip works."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from nexus_ray.report.compare import compare_runs
from nexus_ray.report.page import write_report
from tests.record_fixture import write_record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (apt-get install chromium)"),
]
_POINT = """<script>addEventListener("load", () => {
  const svg = document.querySelector("figure.chart svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 90 }));
  document.title = "tip:" + document.getElementById("tip").textContent;
  document.querySelector(".key").click();
});</script></body>"""


def _browse(page: Path, folder: Path) -> tuple[str, list[str]]:
    """The page's DOM after its scripts ran, and what it put on the console; leaves a screenshot in `folder`."""
    common = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    common += ["--disable-component-update", "--disable-sync", "--no-first-run", "--enable-logging=stderr"]
    common += ["--virtual-time-budget=3000", "--window-size=1240,2400", "--hide-scrollbars"]
    shot = [f"--user-data-dir={folder / 'profile-shot'}", f"--screenshot={folder / 'page.png'}", page.as_uri()]
    subprocess.run([*common, *shot], capture_output=True, timeout=90, check=True)
    dump = [f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run([*common, *dump], capture_output=True, text=True, timeout=90, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def _drawn(dom: str) -> list[str]:
    return re.findall(r'<path d="(M[^"]{20,})"', dom)


def test_report(tmp_path: Path) -> None:
    page = Path(write_report(str(write_record(tmp_path / "demo", steps=200))))
    page.write_text(page.read_text().replace("</body>", _POINT))
    dom, console = _browse(page, tmp_path)
    assert console == []
    assert len(_drawn(dom)) >= 12 and dom.count("<circle") == 12 and dom.count("<svg") == 7
    assert dom.count("background:color-mix") == 9
    title = re.search(r"<title>(tip:.*?)</title>", dom, re.DOTALL)
    assert title and "encyclopedia" in title[1] and "shakespeare: 2." in title[1]
    assert 'class="key c0" data-s="0" aria-pressed="false"' in dom and "series line c0 off" in dom
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_report_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    page = write_report(str(write_record(tmp_path / "demo", stages=0, outcome="running")))
    assert _browse(Path(page), tmp_path)[1] == []


def test_comparison(tmp_path: Path) -> None:
    folders = [write_record(tmp_path / name, steps=50, shift=shift) for name, shift in (("a", 0.0), ("b", 0.2))]
    page = compare_runs(folders, console=Console(file=io.StringIO()))
    dom, console = _browse(Path(page), tmp_path)
    assert console == []
    assert len(_drawn(dom)) == 2 and dom.count("<circle") == 2 and dom.count('class="whisker"') == 2
