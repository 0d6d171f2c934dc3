"""The standard library as a corpus."""

from __future__ import annotations

import platform

from nexus_ray.config.tree import StdlibSource
from nexus_ray.corpora.sources.stdlib import StdlibCorpus


def test_python_source_of_this_python() -> None:
    source = StdlibCorpus("code", StdlibSource(kind="stdlib", exclude=["test", "tests", "site-packages", "email"]))
    items = source.items()
    names = [item.name for item in items]
    assert names == sorted(names) and len(names) > 200
    assert "textwrap.py" in names and "json/decoder.py" in names
    assert not [name for name in names if {"test", "site-packages", "email"} & set(name.split("/")[:-1])]
    [document] = source.read(items[names.index("json/decoder.py")])
    assert "class JSONDecoder" in document.text
    assert document.provenance["python"].endswith(platform.python_version())
    assert source.credits[0] == "PSF-2.0"
