"""Every fault of a config is named by path, value, rule and way out, all in one report."""

from __future__ import annotations

import pytest

from nexus_ray.config.paths import keys_at, nearest_path, setting_paths
from nexus_ray.errors import ConfigError
from tests.configs import TWO_STAGES, two_stages


def faults(*overrides: str, text: str = TWO_STAGES) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        two_stages(*overrides, text=text)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("two.yaml: ") and f"{len(lines)} fault" in head
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainin={}", "trainin={}: unknown key; did you mean training?"),
        ("training.seqlen=3", "training.seqlen=3: unknown key; did you mean training.seq_len?"),
        ("learning_rate=3", "learning_rate=3: unknown key; did you mean training.learning_rate?"),
        ("training.learning_rate=3e-4", "training.learning_rate='3e-4': YAML reads this as text, not as a number; "
         "write 3.0e-4"),
        ("training.token_budget=1e6", "write 1.0e+6"),
        ("training.token_budget=1,000,000", "write 1000000"),
        ("training.learning_rate=.nan", "training.learning_rate=nan: must be a finite number"),
        ("continual.replay_ratio=1.5", "continual.replay_ratio=1.5: must be at most 1; write a number in that range"),
        ("continual.replay_ratio=10%", "continual.replay_ratio='10%': must be a number"),
        ("cluster.num_workers=0", "cluster.num_workers=0: must be at least 1"),
        ("cluster.num_workers=1.5", "cluster.num_workers=1.5: must be a whole number"),
        ("cluster.use_gpu=1", "cluster.use_gpu=1: must be true or false"),
        ("name=3", "name=3: must be text; put it in quotes: '3'"),
        ("name=a/b", "name='a/b': a name has letters, digits"),
        ("continual.curriculum=sequentiel", "must be one of sequential, interleaved, progressive; did you mean "
         "'sequential'?"),
        ("training.zero_stage=4", "training.zero_stage=4: must be one of auto, 0, 1, 2, 3"),
        ("training=5", "training=5: must be a section"),
        ("stages=[]", "stages=[]: must not be empty"),
        ("anchors=code", "anchors='code': must be a list, such as [a, b]"),
        ("domains.code.source.kind=stdlibb", "domains.code.source.kind='stdlibb' is no kind of source; did you mean "
         "'stdlib'?"),
        ("domains.code.source={}", "domains.code.source.kind is missing; set it to one of files, wheel, hub, stdlib"),
        ("domains.code={}", "domains.code.source is missing; say where the text comes from"),
        ("domains.letters.source.path=x", "domains.letters.source.path='x': unknown key; did you mean "
         "domains.letters.source.paths?"),
        ("domains.letters.source.split_on=(", "'(' is no regular expression"),
        ("domains.a b.source={kind: stdlib}", "domains.a b is no valid name"),
        ("stages.0.domains.code=-1", "stages.0.domains.code=-1: must be more than 0"),
        ("training.seq_len=100", "training: global_batch_tokens=8192 is not a multiple of seq_len=100; use 8100"),
        ("training.precision=bf16", None),
    ],
)  # fmt: skip
def test_a_fault_names_path_value_rule_and_way_out(override: str, expected: str | None) -> None:
    if expected is None:
        two_stages(override)
        return
    found = faults(override)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["anchors=[codee]"], "anchors.0: no domain 'codee' is declared under `domains`; did you mean 'code'?"),
        (["stages.0.domains={lettters: 1}"], "stages.0.domains.lettters: no domain"),
        (
            ["stages.1.replay={x: 1}"],
            "stages.1.replay.x: no domain 'x' is declared under `domains`; declared are:",
        ),
        (["model.tokenizer.train_on=[x]"], "model.tokenizer.train_on.0: no domain"),
        (["report.prompts.x=hello"], "report.prompts.x: no domain"),
        (["stages.1.name=letters"], "stages.1.name='letters' is also the name of stage 0; rename one"),
        (["anchors=[code]"], "anchors.0='code' is trained on in stage 1"),
        (["stages.1.replay={code: 1}"], "stages.1.replay.code is also a new domain of this stage"),
        (["domains.code.held_out_fraction=0"], "domains.code.held_out_fraction=0 leaves nothing to evaluate on"),
        (["training.seq_len=4096"], "training.seq_len=4096 is beyond model.architecture.max_seq_len=2048"),
        (["continual.use_lora=true", "continual.expand_blocks=2"], "and continual.expand_blocks exclude each other"),
        (
            ["continual.expand_blocks=2", "continual.expansion.positions=[1]"],
            "continual.expansion.positions=[1] names 1 places for continual.expand_blocks=2",
        ),
        (
            ["continual.keep.kl=0.1", "continual.replay_ratio=0"],
            "continual.keep.kl=0.1 acts on replayed rows, and continual.replay_ratio is 0; set a ratio",
        ),
        (["continual.use_lora=true", "continual.keep.l2=1"], "continual.keep.l2=1.0 does not combine with"),
        (
            ["continual.expand_blocks=1", "continual.keep.interpolate=[0.5]"],
            "continual.keep.interpolate=[0.5] does not combine with continual.expand_blocks",
        ),
        (["continual.use_osft=true", "training.freeze=[norm]"], "training.freeze=['norm'] does not combine with"),
        (["model.source=wheel", "model.tokenizer.source=model"], "model.wheel says no package"),
        (["model.source=a/b"], "model.source='a/b' has its own vocabulary; set model.tokenizer.source: model"),
        (["model.tokenizer.source=model"], "a scratch model brings no tokenizer"),
        (
            ["model.source=a/b", "model.tokenizer.source=model", "model.init_from=x"],
            "model.init_from='x' and model.source",
        ),
        (["model.attention=flash_attention_2"], "needs GPUs; set cluster.use_gpu: true"),
        (
            ["cluster.gpus_per_worker=0.5"],
            "=0.5 is a share of a GPU, and cluster.use_gpu is false",
        ),
        (
            ["cluster.gpus_per_worker=0.5", "cluster.use_gpu=true", "cluster.num_workers=2"],
            "two workers of one run on one GPU, which NCCL refuses; set cluster.num_workers: 1",
        ),
        (["continual.alpha=0.5", "continual.replay_ratio=0"], "continual: alpha=0.5 weighs a replay loss"),
        (["stages.1.override={training.seq_len: 128}"], "must be the same in all stages"),
        (["stages.1.override={seed: 3}"], "stages.1.override.seed=3: cannot differ between stages"),
        (["stages.1.override={training.lerning_rate: 1}"], "did you mean training.learning_rate?"),
        (["stages.1.override={learning_rate: 1}"], "unknown setting; did you mean training.learning_rate?"),
        (
            ["stages.1.override={training: {learning_rate: 1}}"],
            "is a section; name a value inside it",
        ),
        (
            ["stages.1.override={training.learning_rate: -1}"],
            "stages.1.override.training.learning_rate=-1: must be",
        ),
        (
            ["stages.1.override={training.token_budget: 10}"],
            "stages.1.override.training: token_budget=10 is less",
        ),
        (
            ["continual.use_osft=true", "stages.1.override={continual.use_lora: true}"],
            "stages.1.override.continual.use_lora and continual.use_osft exclude each other",
        ),
        (["stages.1.override={report.prompts: {x: hi}}"], "stages.1.override.report.prompts.x: no domain 'x'"),
    ],
)
def test_rules_between_fields(overrides: list[str], expected: str) -> None:
    found = faults(*overrides)
    assert len(found) == 1, found
    assert expected in found[0]


OWN_TEXT = "domains.own={source: {kind: synthesis}, held_out_fraction: 0.1}"


def scored_by(model: str, *, revision: str = "null") -> str:
    job = "generator: {kind: local, model: teacher}, recipe: r.yaml, anchor: code"
    return f"synthesis.own={{{job}, filters: {{perplexity: {{model: {model}, revision: {revision}}}}}}}"


@pytest.mark.parametrize(
    ("student", "reference"),
    [
        (["model.init_from=runs/a/model"], "runs/a/model"),
        (["model.init_from=runs/a/model"], "./runs/b/../a/model/"),
        (["model.source=org/small", "model.tokenizer.source=model"], "org/small"),
    ],
)
def test_a_reference_model_is_not_the_student(student: list[str], reference: str) -> None:
    path = student[0].partition("=")[0]
    (found,) = faults(OWN_TEXT, *student, scored_by(reference))
    assert found.startswith(f"synthesis.own.filters.perplexity.model={reference!r} is {path} too, the model that is tr")
    two_stages(OWN_TEXT, *student, scored_by("teacher"))


def test_another_revision_of_the_student_may_be_the_reference() -> None:
    student = ["model.source=org/small", "model.tokenizer.source=model", "model.revision=main"]
    two_stages(OWN_TEXT, *student, scored_by("org/small", revision="old"))
    two_stages(OWN_TEXT, scored_by("scratch"))


def test_all_faults_come_at_once_and_none_twice() -> None:
    found = faults(
        "trainig.seq_len=3",
        "continual.replay_ratio=1.5",
        "training.precision=bf17",
        "training.global_batch_tokens=1000",
        "anchors=[codee]",
        "stages.0.name=code",
        "stages.1.override={training.learning_rate: x, training.seq_len: 3}",
        "domains.code.source.kind=x",
        "continual.expand_blocks=1",
        "continual.expansion.positions=[0, 1]",
    )
    paths = [line.split("=")[0].split(":")[0] for line in found]
    assert sorted(paths) == [
        "anchors.0",
        "continual.expansion.positions",
        "continual.replay_ratio",
        "domains.code.source.kind",
        "stages.1.name",
        "stages.1.override.training.learning_rate",
        "stages.1.override.training.seq_len",
        "trainig",
        "training",
        "training.precision",
    ]


def test_missing_sections_say_how_they_look() -> None:
    found = faults(text="seed: 1\n")
    assert [line.split(" is missing")[0] for line in found] == ["name", "domains", "stages"]
    assert all("such as" in line for line in found)


def test_a_repaired_value_raises_no_second_fault() -> None:
    # 8192 is no multiple of what `seq_len` falls back to only if the fallback were compared.
    assert len(faults("training.seq_len=x", "training.global_batch_tokens=1000")) == 1
    assert len(faults("model.architecture.max_seq_len=x", "training.seq_len=8192")) == 1


def test_paths_of_the_tree() -> None:
    assert "training.schedule.kind" in setting_paths() and "training.schedule" not in setting_paths()
    assert "report.prompts" in setting_paths()
    data = {"domains": {"x": {"source": {"kind": "stdlib"}}}}
    assert keys_at(("domains", "x", "source"), data) == ["license", "attribution", "max_documents", "kind", "exclude"]
    assert "name" in keys_at(("stages", 0), {"stages": [{}]})
    assert keys_at(("stages", 0, "domains"), {}) == []
    assert nearest_path("traning.seq_len") == "training.seq_len"
