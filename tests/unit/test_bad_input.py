"""User mistakes end with the right exit code and a message that names field, value and way out. No Ray is started.

Mistakes that only a running cluster or a corpus can show are in the integration tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nexus_ray.cli import main
from tests.configs import TWO_STAGES, write_two_stages


@dataclass(frozen=True)
class Mistake:
    """A command line (CONFIG and TMP are filled in), its exit code, and words of the message."""

    name: str
    argv: list[str]
    words: list[str]
    code: int = 2
    text: str = TWO_STAGES
    environment: dict[str, str] = field(default_factory=dict)


RUN = ["roadmap", "CONFIG"]
PLAN = [*RUN, "--dry-run"]
WHEEL = "{kind: wheel, package: p, version: '1', sha256: x, members: [a]}"
MISTAKES = [
    Mistake("unknown verb", ["trian", "CONFIG"], ["'trian'", "did you mean 'train'?"]),
    Mistake("unknown option", [*RUN, "--dryrun"], ["--dryrun", "--help"]),
    Mistake("no config", ["roadmap"], ["CONFIG"]),
    Mistake("missing file", ["roadmap", "TMP/twoo.yaml"], ["TMP/twoo.yaml", "does not exist", "two.yaml"]),
    Mistake("a folder", ["roadmap", "TMP"], ["TMP", "is a folder", "name a YAML file"]),
    Mistake("broken YAML", RUN, ["line 3"], text="name: x\ndomains: {\n"),
    Mistake("empty file", RUN, ["must be a mapping"], text=""),
    Mistake("duplicate key", RUN, ["'name'", "twice"], text=TWO_STAGES + "name: again\n"),
    Mistake("a key YAML reads as false", RUN, ["no", "'no' in quotes"], text=TWO_STAGES + "no: 1\n"),
    Mistake("missing sections", RUN, ["name is missing", "domains is missing"], text="seed: 1\n"),
    Mistake("override without =", [*RUN, "training"], ["'training'", "path=value"]),
    Mistake("override beyond a list", [*RUN, "stages.5.name=x"], ["stages.5.name=x", "entries 0 to 1"]),
    Mistake("unknown key", [*RUN, "training.seqlen=128"], ["training.seqlen=128", "did you mean training.seq_len?"]),
    Mistake("unknown section", [*RUN, "trainng.seq_len=128"], ["trainng", "did you mean training?"]),
    Mistake("wrong type", [*RUN, "cluster.use_gpu=maybe"], ["cluster.use_gpu='maybe'", "true or false"]),
    Mistake("3e-4 is text to YAML", [*RUN, "training.learning_rate=3e-4"], ["'3e-4'", "write 3.0e-4"]),
    Mistake("ratio above 1", [*RUN, "continual.replay_ratio=1.5"], ["continual.replay_ratio=1.5", "at most 1"]),
    Mistake("negative budget", [*RUN, "training.token_budget=-1"], ["training.token_budget=-1", "at least 1"]),
    Mistake("infinite rate", [*RUN, "training.learning_rate=.inf"], ["training.learning_rate=inf", "finite"]),
    Mistake("bad choice", [*RUN, "training.schedule.kind=cosin"], ["'cosin'", "did you mean 'cosine'?"]),
    Mistake("bad source kind", [*RUN, "domains.code.source.kind=wheels"], ["'wheels'", "did you mean 'wheel'?"]),
    Mistake("bad regular expression", [*RUN, "domains.letters.source.split_on=("], ["'('", "no regular expression"]),
    Mistake("bad checksum", [*RUN, f"domains.code.source={WHEEL}"], ["domains.code.source.sha256='x'", "64 hex"]),
    Mistake("domain not declared", [*RUN, "stages.1.domains={cod: 1}"], ["'cod'", "did you mean 'code'?"]),
    Mistake("stage named twice", [*RUN, "stages.1.name=letters"], ["'letters'", "rename one"]),
    Mistake("anchor trained on", [*RUN, "anchors=[code]"], ["anchors.0='code'", "drop it"]),
    Mistake("nothing held out", [*RUN, "domains.code.held_out_fraction=0"], ["held_out_fraction=0", "0.05"]),
    Mistake("row beyond the model's", [*RUN, "training.seq_len=4096"], ["training.seq_len=4096", "max_seq_len=2048"]),
    Mistake("batch of half rows", [*RUN, "training.seq_len=100"], ["global_batch_tokens=8192", "use 8100"]),
    Mistake("budget below a step", [*RUN, "training.token_budget=10"], ["token_budget=10", "raise the budget"]),
    Mistake("stage overrides the fixed", [*RUN, "stages.0.override={training.seq_len: 64}"], ["same in all stages"]),
    Mistake("two methods", [*RUN, "continual.use_lora=true", "continual.use_osft=true"], ["exclude each other"]),
    Mistake("KL on nothing", [*RUN, "continual.keep.kl=1", "continual.replay_ratio=0"], ["keep.kl=1", "kl: 0"]),
    Mistake("expansion with LoRA", [*RUN, "continual.use_lora=true", "continual.expand_blocks=2"],
            ["exclude", "override"]),
    Mistake("rank above dimensions", [*PLAN, "continual.use_lora=true", "continual.lora_rank=4000"],
            ["lora_rank=4000", "use at most"]),
    Mistake("positions out of range", [*PLAN, "continual.expand_blocks=1", "continual.expansion.positions=[99]"],
            ["99", "continual.expansion.positions"]),
    Mistake("positions not counted", [*RUN, "continual.expand_blocks=2", "continual.expansion.positions=[1]"],
            ["names 1 places", "make them agree"]),
    Mistake("targets nobody has", [*PLAN, "continual.use_lora=true", "continual.lora.targets=[query]"],
            ["continual.lora.targets", "query"]),
    Mistake("unknown architecture", [*PLAN, "continual.expand_blocks=1", "model.source=TMP/gpt2",
            "model.tokenizer.source=model"], ["gpt2", "expand_blocks"]),
    Mistake("bf16 without ZeRO", [*RUN, "training.precision=bf16", "training.zero_stage=0"], ["zero_stage: 1"]),
    Mistake("several stages in train", ["train", "CONFIG"], ["2 (letters, code)", "nexus-ray roadmap"]),
    Mistake("storage in a file", [*RUN, "storage=TMP/two.yaml"], ["storage", "TMP/two.yaml"]),
    Mistake("more workers than cores", [*RUN, "cluster.num_workers=999", "cluster.cpus_per_worker=1"],
            ["cluster.num_workers=999", "cores", "lower cluster.num_workers to"]),
    Mistake("no cluster there", [*RUN, "cluster.address=127.0.0.1:1"], ["cluster.address='127.0.0.1:1'", "ray start"]),
    Mistake("Ray client address", [*RUN, "cluster.address=ray://head:10001"], ["ray://head:10001", "ray job submit"]),
    Mistake("relative storage in a job", [*RUN, "storage=runs"], ["storage='runs'", "s3://bucket/runs"],
            environment={"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}),
    Mistake("report of no run", ["report", "TMP"], ["TMP"]),
    Mistake("report with idle overrides", ["report", "TMP", "name=x"], ["name=x", "no effect"]),
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_explained(
    mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_two_stages(tmp_path)
    if mistake.text != TWO_STAGES:
        config.write_text(mistake.text)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2}')
    for key, value in mistake.environment.items():
        monkeypatch.setenv(key, value)

    code = main([str(config) if word == "CONFIG" else word.replace("TMP", str(tmp_path)) for word in mistake.argv])
    message = capsys.readouterr().err
    assert code == mistake.code, message
    assert "Traceback" not in message
    for word in mistake.words:
        assert word.replace("TMP", str(tmp_path)) in message
