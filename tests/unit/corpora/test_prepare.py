"""Preparation as a whole: built once, found again, extended by new files; one test on a real Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexus_ray.config.tree import RunConfig
from nexus_ray.corpora import build as build_module
from nexus_ray.corpora import prepare as prepare_module
from nexus_ray.corpora import tasks
from nexus_ray.corpora.build import append_documents
from nexus_ray.corpora.documents import iter_documents
from nexus_ray.corpora.prepare import Made, find_prepared, prepare, shared_storage
from nexus_ray.corpora.sources import RawDocument
from nexus_ray.corpora.verify import verify_shard
from nexus_ray.errors import ConfigError, DataError
from tests.corpus import files_config, sentences


def run_here(function, specs, *, cost, progress, label):
    """Stands in for `run_tasks`: the same work items, in this process."""
    return [function(spec) for spec in specs]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (build_module, prepare_module):
        monkeypatch.setattr(module, "run_tasks", run_here)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    folders = {}
    for seed, name in enumerate(("sea", "hill")):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        for part in range(2):
            lines = "\n".join(sentences(150, seed=10 * seed + part))
            (folders[name] / f"{part}.txt").write_text(lines)
    return files_config(tmp_path / "runs", folders, shard_tokens=1024)


def files_below(config: RunConfig) -> dict[str, bytes]:
    root = shared_storage(config).local_path
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.parquet"))}


@pytest.mark.usefixtures("without_ray")
def test_built_once_and_found_again(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_prepared(config) is None
    data = prepare(config)
    splits = [manifest for domain in data.domains.values() for manifest in (domain.train, domain.held_out)]
    assert data.made == Made(documents=600, tokens=sum(manifest.tokens for manifest in splits))
    monkeypatch.setattr(prepare_module, "run_tasks", None)  # nothing is left to do
    assert prepare(config) == find_prepared(config) == data and prepare(config).made == Made()
    sea = data.domains["sea"]
    assert (sea.license, sea.source) == ("CC0-1.0", f"files {config.domains['sea'].source.paths[0]}")
    assert sea.stats["documents"] == sea.train.documents + sea.held_out.documents == 300
    assert sea.stats["tokens_dropped"] == sea.stats["eos_in_text"] == 0
    assert len(sea.train.shards) > 1 and sea.train.tokenizer == data.tokenizer_fingerprint
    assert (data.tokenizer_dir() / "tokenizer.json").exists() and data.vocab_size == 320
    for domain in data.domains.values():
        for manifest in (domain.train, domain.held_out):
            for shard in manifest.shards:
                verify_shard(manifest, shard)


@pytest.mark.usefixtures("without_ray")
def test_new_files_are_appended(config: RunConfig, tmp_path: Path) -> None:
    before, files = prepare(config), files_below(config)
    (tmp_path / "sea" / "2.txt").write_text("\n".join([*sentences(40, seed=77), sentences(1, seed=0)[0]]))
    assert find_prepared(config) is None
    after = prepare(config)
    old, new = before.domains["sea"], after.domains["sea"]
    assert {name: data for name, data in files_below(config).items() if name in files} == files
    assert after.tokenizer_fingerprint == before.tokenizer_fingerprint
    assert new.documents == old.documents and new.stats["documents"] == 341  # 40, and one with a line break more
    assert new.train.prefix(len(old.train.shards)).fingerprint == old.train.fingerprint != new.train.fingerprint
    assert {shard.batch for shard in new.train.shards} == {0, 1}
    more = (new.train.tokens - old.train.tokens) + (new.held_out.tokens - old.held_out.tokens)
    assert after.made == Made(documents=41, tokens=more)
    assert after.domains["hill"] == before.domains["hill"]
    (tmp_path / "sea" / "2.txt").unlink()  # the earlier corpus is a prefix of the folder, and found as such
    assert prepare(config).domains["sea"].train.fingerprint == old.train.fingerprint


@pytest.mark.usefixtures("without_ray")
def test_a_changed_file_makes_a_new_corpus(config: RunConfig, tmp_path: Path) -> None:
    before = prepare(config)
    (tmp_path / "sea" / "0.txt").write_text("\n".join(sentences(200, seed=5)))
    after = prepare(config)
    assert after.domains["sea"].documents != before.domains["sea"].documents
    assert before.domains["sea"].documents.exists("manifest.json")
    content = after.domains["hill"].manifest
    assert content == before.domains["hill"].manifest


@pytest.mark.usefixtures("without_ray")
def test_a_touched_file_gives_the_same_fingerprints(config: RunConfig, tmp_path: Path) -> None:
    before = prepare(config)
    os.utime(tmp_path / "sea" / "0.txt", ns=(1, 1))
    after = prepare(config)
    for name in before.domains:
        assert after.domains[name].train.fingerprint == before.domains[name].train.fingerprint


@pytest.mark.usefixtures("without_ray")
def test_documents_from_elsewhere_are_appended(config: RunConfig) -> None:
    before = prepare(config)
    manifest = before.domains["sea"].manifest
    assert manifest is not None
    append_documents(manifest, [RawDocument(text, {"source": "elsewhere"}) for text in sentences(30, seed=99)])
    after = prepare(config).domains["sea"]
    assert after.stats["documents"] == 330
    assert after.train.prefix(len(before.domains["sea"].train.shards)).fingerprint == (
        before.domains["sea"].train.fingerprint
    )


@pytest.mark.usefixtures("without_ray")
def test_max_documents_and_duplicates_across_parts(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "FILE_BYTES", 1)  # every file a part of its own
    (tmp_path / "sea" / "2.txt").write_bytes((tmp_path / "sea" / "0.txt").read_bytes())
    (tmp_path / "sea" / "3.txt").write_text("\n".join(sentences(10, seed=3)) + "\n" + sentences(1)[0] + "\n")
    sea = prepare(config).domains["sea"]
    assert sea.manifest is not None
    texts = [row["text"] for row in iter_documents(sea.manifest)]
    assert len(texts) == len(set(texts)) == sea.stats["documents"] == 310
    assert sea.stats["exact_duplicates"] == 151 and sea.stats["documents_in"] == 461
    assert not sea.documents.exists("documents-000-00002-00000.parquet")
    source = config.domains["sea"].source.model_copy(update={"max_documents": 160})
    domains = {**config.domains, "sea": config.domains["sea"].model_copy(update={"source": source})}
    few = prepare(config.model_copy(update={"domains": domains})).domains["sea"]
    assert few.manifest is not None
    assert [row["text"] for row in iter_documents(few.manifest)] == texts[:160]


def with_domain(config: RunConfig, **change: object) -> RunConfig:
    return config.model_copy(
        update={"domains": {**config.domains, "sea": config.domains["sea"].model_copy(update=change)}}
    )


@pytest.mark.usefixtures("without_ray")
def test_user_mistakes(config: RunConfig, tmp_path: Path) -> None:
    for fraction, message in (
        (0.0, "holds out none of its 300 documents; raise it"),
        (0.9999, "leaves none of its 300"),
    ):
        with pytest.raises(DataError, match=rf"domains.sea.held_out_fraction={fraction} {message}"):
            prepare(with_domain(config, held_out_fraction=fraction))
    with pytest.raises(ConfigError, match=r"storage: .* cannot be written"):
        prepare(config.model_copy(update={"storage": "/proc/nowhere"}))
    (tmp_path / "sea" / "0.txt").write_text(" \n")
    (tmp_path / "sea" / "1.txt").write_text("")
    with pytest.raises(DataError, match=r"domains.sea.source: files .* gives no document \(2 files or members"):
        prepare(config)
    (tmp_path / "sea" / "1.txt").unlink()
    (tmp_path / "sea" / "0.txt").unlink()
    with pytest.raises(DataError, match="matches no file"):
        prepare(config)


@pytest.mark.usefixtures("without_ray")
def test_texts_on_both_sides_of_two_domains_are_reported(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "hill" / "9.txt").write_bytes((tmp_path / "sea" / "0.txt").read_bytes())
    said: list[str] = []
    prepare(config, progress=said.append)
    assert not [line for line in said if line.startswith("warning")]
    prepare(with_domain(config, held_out_fraction=0.5), progress=said.append)
    [warning] = [line for line in said if line.startswith("warning")]
    assert "texts held out of sea are trained on in hill; give both domains the same held_out_fraction" in warning


def test_ray_must_be_started_by_the_caller(config: RunConfig) -> None:
    with pytest.raises(RuntimeError, match=r"documents: Ray is not initialised; call ray.init first"):
        prepare(config)


# --- on a cluster --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_same_bytes_on_a_cluster(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data, files = prepare(config), files_below(config)
    assert capfd.readouterr().err == ""
    for module in (build_module, prepare_module):
        monkeypatch.setattr(module, "run_tasks", run_here)
    elsewhere = config.model_copy(update={"storage": str(tmp_path / "elsewhere")})
    here = prepare(elsewhere)
    assert files_below(elsewhere) == files
    assert here.tokenizer_fingerprint == data.tokenizer_fingerprint
    (tmp_path / "sea" / "0.txt").write_bytes(b"\xff")
    monkeypatch.setattr(build_module, "run_tasks", tasks.run_tasks)
    with pytest.raises(DataError, match=r"0.txt: byte 0 \(0xff\) is not UTF-8"):
        prepare(config)
