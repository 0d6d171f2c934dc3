"""Small sources for tests: wheels built as zip files, and text without meaning."""

from __future__ import annotations

import hashlib
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path

from nexus_ray.config.tree import DataConfig, DomainConfig, FilesSource, RunConfig, StageConfig, WheelSource

WORDS = [
    *("the", "king", "spoke", "and", "night", "fell", "over", "old", "hills"),
    *("while", "rivers", "ran", "to", "sea", "where", "ships", "lay", "still"),
]


def write_wheel(
    folder: Path, members: Mapping[str, str | bytes], *, package: str = "plays", version: str = "1.0"
) -> WheelSource:
    """A wheel that pip accepts, in `folder`, and a source that pins it."""
    info = f"{package}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\nLicense: MIT\nAuthor: A. Nonymous\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {**members, f"{info}/METADATA": metadata, f"{info}/WHEEL": tags, f"{info}/RECORD": ""}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(zipfile.ZipInfo(name), text)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return WheelSource(kind="wheel", package=package, version=version, sha256=digest, members=["*/*.md"])


def sentences(count: int, *, seed: int = 0) -> list[str]:
    """Distinct short texts."""
    chosen = random.Random(seed)
    return [f"{' '.join(chosen.choices(WORDS, k=12))} {seed} {number}." for number in range(count)]


def files_config(storage: Path, folders: dict[str, Path], **data: int) -> RunConfig:
    """A run with one stage per folder of text files, each line a document."""
    domains = {
        name: DomainConfig(
            source=FilesSource(kind="files", paths=[str(folder)], split_on=r"(?m)^", license="CC0-1.0"),
            held_out_fraction=0.2,
        )
        for name, folder in folders.items()
    }
    stages = [StageConfig(name=name, domains={name: 1.0}) for name in folders]
    settings = {"tokenizer": {"vocab_size": 320}}
    return RunConfig.model_validate(
        {
            "name": "test",
            "storage": str(storage),
            "model": settings,
            "domains": domains,
            "stages": stages,
            "data": DataConfig(**data),
        }
    )
