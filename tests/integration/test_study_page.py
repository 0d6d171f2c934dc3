"""The page of a study in a real browser: no script error, no request, every mark reachable by keyboard."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import CHROMIUM, open_browser
from tests.study_views import full_view, write_page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (apt-get install chromium)"),
]


def test_the_page_opens_and_its_marks_speak(tmp_path: Path) -> None:
    file = write_page(tmp_path, full_view())
    with open_browser(tmp_path) as page:
        page.call("Page.navigate", url=file.as_uri())
        page.wait_for("document.readyState === 'complete' && document.querySelectorAll('figure.chart').length > 5")
        assert page.value("performance.getEntriesByType('resource').length") == 0
        page.value("document.querySelector('.parallel .wins').focus()")
        page.wait_for("!document.getElementById('tip').hidden")
        assert "replay_ratio=0.25" in page.value("document.getElementById('tip').textContent")
        page.press("Tab")  # off the last line of the drawing
        page.wait_for("!document.activeElement.closest('.parallel')")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        names = " ".join(str(node.get("name", {}).get("value", "")) for node in nodes)
        assert "All points, knobs and objectives" in names and "on the front: yes" in names
        before = page.value("document.querySelectorAll('.series.off').length")
        page.value("document.querySelector('#curves .key').click()")
        assert page.value("document.querySelectorAll('.series.off').length") == before + 1
        assert page.value("document.documentElement.scrollWidth <= innerWidth")
        assert page.console == []
