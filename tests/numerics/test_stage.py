"""Training is exact: however a batch is cut, wherever a run stopped, on however many workers it goes on.

Everything here is the real worker loop over DeepSpeed and gloo, without Ray. The bounds are those of fp32 rounding on
this model: losses are near 5, and a wrong row, weight or moment moves them by 1e-3 or more within a step or two.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_ray.config.tree import RunConfig
from tests.lab import ALIKE, HASHES, LOSSES, MOVED, Lab, losses_agree
from tests.stage import (
    STEPS,
    changed,
    checkpoints,
    column,
    manifest,
    metrics,
    rewound,
    run_folder,
    stage_folder,
)

SLOW = pytest.mark.slow
ZERO_STAGES = [0, pytest.param(1, marks=SLOW), 2, 3]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("lab"))
    yield made
    made.close()


# --- the update does not depend on how the batch is cut -------------------------------------------------------------


@pytest.mark.parametrize("rows", [12, 11, pytest.param(10, marks=SLOW)])
@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 4), (3, 2), (3, 4)])
def test_accumulation_and_worker_count_do_not_change_the_update(lab: Lab, rows: int, world: int, micro: int) -> None:
    """One forward pass of all rows, accumulation, two and three workers: the same rows, losses and gradient norms,
    also where the batch divides neither by the workers nor by the micro-batch."""
    alone, _ = lab.whole(rows=rows, training__micro_batch_size=rows)
    cut, _ = lab.whole(rows=rows, training__micro_batch_size=micro, world=world)
    assert column(cut, HASHES) == column(alone, HASHES) and len(set(column(cut, HASHES))) == STEPS
    losses_agree(cut, alone, ALIKE)
    assert column(cut, "train/grad_norm") == pytest.approx(column(alone, "train/grad_norm"), rel=1e-5)
    assert column(cut, "train/targets") == column(alone, "train/targets")


@pytest.mark.parametrize("stage", ZERO_STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_zero_stages_agree(lab: Lab, stage: int, world: int) -> None:
    """Sharding is bookkeeping: in fp32 every ZeRO stage trains the same model."""
    plain, _ = lab.whole()
    sharded, _ = lab.whole(world=world, training__zero_stage=stage)
    assert column(sharded, HASHES) == column(plain, HASHES)
    losses_agree(sharded, plain, ALIKE)
    assert column(sharded, "train/grad_norm") == pytest.approx(column(plain, "train/grad_norm"), rel=1e-5)


def test_bf16_stays_near_fp32(lab: Lab) -> None:
    """bf16 forward passes with fp32 masters: the same rows, losses within bf16's three digits."""
    plain, _ = lab.whole()
    half, _ = lab.whole(training__zero_stage=1, training__precision="bf16")
    assert column(half, HASHES) == column(plain, HASHES)
    assert column(half, LOSSES) != column(plain, LOSSES)
    losses_agree(half, plain, 2e-3)


def test_activation_checkpointing_changes_no_loss(lab: Lab) -> None:
    """Recomputed activations are the same activations."""
    plain, before = lab.whole()
    again, after = lab.whole(training__activation_checkpointing=True)
    assert column(again, LOSSES) == column(plain, LOSSES)
    assert after["weights"] == before["weights"]


# --- the update is that of bare PyTorch -----------------------------------------------------------------------------


def bare_losses(job: Any, steps: int) -> list[float]:
    """The same stage as a loop that anybody would write: one batch, one weighted mean, AdamW."""
    from nexus_ray.models.build import build_model, parameter_groups
    from nexus_ray.models.score import decode_rows, token_nll
    from nexus_ray.train.schedule import factor

    config, training = job.config, job.config.training
    model = build_model(config.model, vocab_size=job.vocab_size, eos_id=job.eos_id, seed=config.seed)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, training.weight_decay),
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
    )
    ratio, alpha, losses = config.continual.replay_ratio, config.continual.alpha, []
    for step in range(steps):
        rows = job.stream.part(step, 1, rank=0, rows_per_rank=training.rows_per_step)
        batch = decode_rows(rows.tokens)
        targets = (batch.targets >= 0).sum()
        nll_B = token_nll(model, batch).sum(dim=1)
        losses.append(float(nll_B.detach().double().sum() / targets))
        replayed = torch.from_numpy(rows.replayed)
        weight_B = torch.ones(len(rows))
        if alpha is not None:
            weight_B = torch.where(replayed, (1 - alpha) / ratio, alpha / (1 - ratio))
        optimizer.zero_grad()
        ((nll_B * weight_B).sum() / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * factor(
                step, total_steps=STEPS, warmup_steps=config.continual.warmup_steps, config=training.schedule
            )
        optimizer.step()
    return losses


@pytest.mark.parametrize("alpha", [None, 0.4, 1.0])
def test_a_stage_with_replay_trains_as_a_bare_loop_does(lab: Lab, alpha: float | None) -> None:
    """Accumulation, two workers, ZeRO and the weights of new and replayed rows add up to the textbook update; the
    logged loss is the plain token mean whatever the weights."""
    settings: dict[str, Any] = {"stages__0__replay": {"two": 1.0}, "continual__alpha": alpha}
    config, _ = lab.whole(world=2, training__zero_stage=2, **settings)
    assert {line["train/replay_fraction"] for line in metrics(config).values()} == {0.25}
    assert column(config, LOSSES) == pytest.approx(bare_losses(lab.job(config), STEPS), rel=ALIKE)


def test_alpha_changes_what_is_learned_not_what_is_read(lab: Lab) -> None:
    """The same rows whatever the weights; the more weight on the new domain, the more is learned of it."""
    replay: dict[str, Any] = {"stages__0__replay": {"two": 1.0}}
    curves = {
        alpha: lab.whole(world=2, training__zero_stage=2, **replay, continual__alpha=alpha)[0]
        for alpha in (None, 0.75, 1.0, 0.4)
    }
    assert len({tuple(column(config, HASHES)) for config in curves.values()}) == 1
    new, old = ({a: column(c, f"{LOSSES}/{d}")[-1] for a, c in curves.items()} for d in ("one", "two"))
    assert new[1.0] < new[None] - 0.01 < new[0.4] - 0.02 and old[0.4] < old[None] - 0.01
    losses_agree(curves[0.75], curves[None], ALIKE)  # 1 - replay_ratio, the default


# --- resuming where a run stopped -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (0, "fp32"),
        pytest.param(1, "fp32", marks=SLOW),
        (2, "fp32"),
        (3, "fp32"),
        (1, "bf16"),
        pytest.param(2, "bf16", marks=SLOW),
        pytest.param(3, "bf16", marks=SLOW),
    ],
)
def test_a_resume_in_the_same_layout_is_bit_exact(lab: Lab, stage: int, precision: str, world: int) -> None:
    """Losses, gradient norms, rows and final weights equal those of the run that never stopped."""
    changes: dict[str, Any] = {"training__zero_stage": stage}
    changes |= {} if precision == "fp32" else {"training__precision": precision}
    whole, before = lab.whole(world=world, **changes)
    resumed = rewound(whole, f"{whole.name}-resumed", to_step=3)
    assert sorted(metrics(resumed)) == [1, 2, 3]
    after = lab.run(resumed, world=world)
    for key in (HASHES, LOSSES, "train/lr", "train/grad_norm", "train/replay_fraction"):
        assert column(resumed, key) == column(whole, key), key
    assert after["weights"] == before["weights"]


def test_a_stop_that_was_asked_for_ends_with_a_checkpoint(lab: Lab) -> None:
    """`control/stop` ends the stage after a step, with that step saved; the same command goes on there, bit for bit."""
    whole, before = lab.whole()
    stopped = lab.config("stopped")
    job = lab.job(stopped)
    job.run.write_text("SIGTERM", "control", "stop")
    result = lab.run_job(job)
    assert result["interrupted"] and 1 <= result["step"] < STEPS, "the stop did not come before the stage's end"
    assert max(checkpoints(stopped)) == result["step"] == max(metrics(stopped))
    job.run.delete("control", "stop")
    after = lab.run(stopped)
    assert column(stopped, LOSSES) == column(whole, LOSSES) and after["weights"] == before["weights"]


def test_a_finished_stage_is_not_trained_again(lab: Lab) -> None:
    """Its last checkpoint is its end: only the hooks run once more."""
    whole, before = lab.whole()
    done = rewound(whole, "done", to_step=STEPS)
    lines = (run_folder(done) / "metrics.jsonl").read_bytes()
    assert lab.run(done)["weights"] == before["weights"]
    assert (run_folder(done) / "metrics.jsonl").read_bytes() == lines
    assert len(checkpoints(done)) == len(checkpoints(whole))


FREEZE = ["embed_tokens", r"layers\.0\..*norm"]


@pytest.mark.parametrize("freeze", [False, True], ids=["all trained", "partly frozen"])
@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_one_worker_two_and_one_again_give_the_same_curve(lab: Lab, stage: int, freeze: bool) -> None:
    """Rows go on where they stopped, weights and moments come along, frozen weights keep their bytes."""
    changes: dict[str, Any] = {"training__zero_stage": stage}
    changes |= {"training__freeze": FREEZE} if freeze else {}
    whole, _ = lab.whole(**changes)
    moved = rewound(whole, f"{whole.name}-moved", to_step=3)
    lab.run(moved, world=2)
    back = rewound(moved, f"{moved.name}-back", to_step=6)
    lab.run(back, world=1)
    assert column(back, "world_size") == [1, 1, 1, 2, 2, 2, 1, 1]
    assert column(back, HASHES) == column(whole, HASHES)
    losses_agree(back, whole, MOVED)
    infos = [manifest(place) for place in checkpoints(back).values()]
    assert [info["world_size"] for info in infos] == [1, 2, 1]
    assert [info["optimizer_step"] for info in infos] == [3, 6, 8]
    frozen = {info["frozen_sha256"] for info in infos}
    assert len(frozen) == 1
    assert (frozen != {manifest(checkpoints(lab.whole()[0])[3])["frozen_sha256"]}) == freeze


def test_bf16_goes_on_with_two_workers(lab: Lab) -> None:
    """Masters and moments are carried over in fp32, so that only the rounding of the forward pass differs."""
    whole, _ = lab.whole(training__zero_stage=1, training__precision="bf16")
    moved = rewound(whole, f"{whole.name}-moved", to_step=3)
    lab.run(moved, world=2)
    assert column(moved, HASHES) == column(whole, HASHES)
    losses_agree(moved, whole, 1e-3)


def test_three_workers_take_over_a_batch_that_does_not_divide(lab: Lab) -> None:
    """One worker, then three with a padded part, then one."""
    whole, _ = lab.whole(rows=11, training__micro_batch_size=11)
    moved = rewound(whole, "eleven-moved", to_step=3)
    lab.run(moved, world=3)
    back = rewound(moved, "eleven-back", to_step=6)
    lab.run(back)
    assert column(back, "world_size") == [1, 1, 1, 3, 3, 3, 1, 1]
    assert column(back, HASHES) == column(whole, HASHES)
    losses_agree(back, whole, MOVED)


# --- from one stage to the next -------------------------------------------------------------------------------------


def second(
    lab: Lab, first: RunConfig, name: str, *, world: int = 1, **changes: Any
) -> tuple[RunConfig, dict[str, Any]]:
    """The second stage after a copy of the first."""
    config = rewound(first, name, to_step=STEPS, **changes)
    return config, lab.run(config, stage=1, world=world)


@pytest.fixture(scope="module")
def first(lab: Lab) -> RunConfig:
    return lab.two_stages()


RESET, KEEP = {"continual__optimizer_state": "reset"}, {"continual__optimizer_state": "keep"}


def test_moments_are_reset_or_kept(lab: Lab, first: RunConfig) -> None:
    """Both start from the first stage's weights; after the first update they differ; the manifest says which."""
    reset, _ = second(lab, first, "reset", **RESET)
    keep, _ = second(lab, first, "keep", **KEEP)
    assert column(reset, HASHES, 1) == column(keep, HASHES, 1)
    assert column(reset, LOSSES, 1)[0] == column(keep, LOSSES, 1)[0]
    assert column(reset, LOSSES, 1)[1] != pytest.approx(column(keep, LOSSES, 1)[1], rel=1e-5)
    for config, seen in ((reset, 0), (keep, STEPS)):
        steps = [manifest(place)["optimizer_step"] for place in checkpoints(config, 1).values()]
        assert steps == [seen + 3, seen + 6, seen + 8]


@pytest.mark.parametrize("mode", [RESET, KEEP], ids=["reset", "keep"])
@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 1), (2, 2), pytest.param(3, 1, marks=SLOW), (3, 2)])
def test_a_stage_may_go_on_in_another_layout(
    lab: Lab, first: RunConfig, mode: dict[str, Any], stage: int, world: int
) -> None:
    """Another ZeRO stage by override, another worker count: the same second stage as in the first one's layout."""
    name = mode["continual__optimizer_state"]
    same, _ = second(lab, first, f"{name}-same-{stage}-{world}", **mode)
    override = {"training.zero_stage": stage}
    other, _ = second(lab, first, f"{name}-{stage}-{world}", world=world, stages__1__override=override, **mode)
    assert column(other, HASHES, 1) == column(same, HASHES, 1)
    losses_agree(other, same, MOVED, stage=1)
    assert {manifest(place)["zero_stage"] for place in checkpoints(other, 1).values()} == {stage}


@pytest.mark.parametrize("mode", [RESET, KEEP], ids=["reset", "keep"])
def test_a_stage_may_go_on_in_another_precision(lab: Lab, first: RunConfig, mode: dict[str, Any]) -> None:
    """fp32, then bf16 by override, within bf16's rounding."""
    name = mode["continual__optimizer_state"]
    same, _ = second(lab, first, f"{name}-fp32", **mode)
    override = {"training.precision": "bf16", "training.zero_stage": 1}
    half, _ = second(lab, first, f"{name}-bf16", stages__1__override=override, **mode)
    losses_agree(half, same, 2e-3, stage=1)


@pytest.mark.parametrize("mode", [RESET, KEEP], ids=["reset", "keep"])
@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_a_stage_s_own_optimizer_settings_hold(lab: Lab, mode: dict[str, Any], stage: int) -> None:
    """Weight decay, betas and epsilon are the stage's, not those of the checkpoint it starts from."""
    override = {"training.weight_decay": 0.5, "training.beta2": 0.9, "training.epsilon": 1.0e-5}
    before = lab.two_stages(training__zero_stage=stage)
    config, result = second(lab, before, f"{before.name}-settings", stages__1__override=override, **mode)
    assert [group["weight_decay"] for group in result["settings"]] == [0.5, 0.0]
    assert {(tuple(group["betas"]), group["eps"]) for group in result["settings"]} == {((0.9, 0.9), 1.0e-5)}
    resumed = rewound(config, f"{config.name}-resumed", to_step=3, stage=1)
    again = lab.run(resumed, stage=1)
    assert again["weights"] == result["weights"] and again["settings"] == result["settings"]
    moved, _ = second(lab, before, f"{before.name}-moved", world=2, stages__1__override=override, **mode)
    losses_agree(moved, config, MOVED, stage=1)


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_what_one_stage_freezes_the_next_one_still_has(lab: Lab, stage: int) -> None:
    """Trained, then frozen, then trained again, with a resume on other workers while frozen: each stage begins with
    the weights its predecessor ended with, also where DeepSpeed's conversion drops frozen ones."""

    def roadmap(name: str, zero_stage: int) -> RunConfig:
        override = {"stages__1__override": {"training.freeze": FREEZE}}
        return lab.config(
            name, stages=3, training__zero_stage=zero_stage, continual__optimizer_state="keep", **override
        )

    plain = roadmap(f"plain-{stage}", 0)
    for index in range(3):
        lab.run(plain, stage=index)
    config = roadmap(f"thaw-{stage}", stage)
    for index in range(2):
        lab.run(config, stage=index)
    frozen = rewound(config, f"{config.name}-2", to_step=3, stage=1)
    lab.run(frozen, stage=1, world=2)
    lab.run(frozen, stage=2, world=1)
    for index in range(3):
        assert column(frozen, HASHES, index) == column(plain, HASHES, index)
        losses_agree(frozen, plain, MOVED, stage=index)


# --- what must not be trained on ------------------------------------------------------------------------------------


def error(lab: Lab, job: Any, world: int = 1) -> tuple[str, str]:
    result = lab.run_job(job, world)
    assert "error" in result, "it trained on"
    return result["error"]["kind"], result["error"]["message"]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "fp32"), (1, "bf16")])
@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_no_number_stops_with_a_diagnosis(lab: Lab, stage: int, precision: str, world: int) -> None:
    """The step, the losses by domain, the learning rate, the rows, and the checkpoint to go on from."""
    changes = {"training__zero_stage": stage, "training__precision": precision}
    config = lab.config(f"overflow-{stage}-{precision}-{world}", training__learning_rate=1.0e30, **changes)
    kind, message = error(lab, lab.job(config), world)
    assert kind == "TrainingError"
    for words in ("stage 'one', step 2: the ", "'one': ", "learning rate 1e+30", "rows 12 to 23", "no checkpoint yet"):
        assert words in message
    assert "Lower training.learning_rate, raise continual.warmup_steps" in message
    assert not checkpoints(config)


def test_the_diagnosis_names_the_last_good_checkpoint(lab: Lab) -> None:
    """What was saved before is left as it is, and can be gone on from with other settings under another name."""
    whole, _ = lab.whole()
    config = rewound(whole, "blown", to_step=3, training__learning_rate=1.0e30)
    kind, message = error(lab, lab.job(config))
    assert kind == "TrainingError" and "step 5" in message
    assert f"the last good checkpoint is {checkpoints(config)[3]}" in message
    assert set(checkpoints(config)) == {3}
    assert max(metrics(config)) == 4, "the bad step is not in the record"


def test_a_torn_checkpoint_is_passed_over(lab: Lab) -> None:
    """No manifest, or a flipped byte in any listed file: training goes on from the one before, to the same end."""
    whole, before = lab.whole(world=2, training__zero_stage=2)
    for name, tear in (("unsigned", _unsign), ("flipped", _flip)):
        torn = rewound(whole, f"torn-{name}", to_step=6)
        tear(checkpoints(torn)[6])
        after = lab.run(torn, world=2)
        assert column(torn, LOSSES) == column(whole, LOSSES) and after["weights"] == before["weights"]
        lines = (run_folder(torn) / "metrics.jsonl").read_text().count('"step": 4,')
        assert lines == 2, "step 4 was done again"


def _unsign(place: Path) -> None:
    (place / "MANIFEST.json").unlink()


def _flip(place: Path) -> None:
    file = sorted(place.rglob("*optim_states.pt"))[-1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_checkpoint_of_another_config_is_refused(lab: Lab) -> None:
    """Its fingerprint says whose it is."""
    whole, _ = lab.whole()
    foreign = rewound(whole, "foreign", to_step=3)
    kind, message = error(lab, replace(lab.job(foreign), fingerprint="another"))
    assert kind == "DataError" and "was made by config test, this is another; start under another name" in message


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_a_base_that_changed_under_a_run_is_refused(lab: Lab, stage: int) -> None:
    """A checkpoint holds what was trained and a hash of the rest: another base is told, not trained on."""
    whole, _ = lab.whole(training__zero_stage=stage, training__freeze=FREEZE)
    for world in (1, 2):
        config = rewound(whole, f"{whole.name}-other-{world}", to_step=3)
        result = lab.run_job(changed(lab.job(config), seed=7), world)  # the seed of the weights from scratch
        assert "the frozen weights differ" in result["error"]["message"]


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [("frozen_sha256", "0" * 32, "the frozen weights differ"), ("probe_loss", 5.0, "the probe batch has loss")],
)
@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_that_does_not_reproduce_itself_is_refused(
    lab: Lab, entry: str, value: Any, words: str, world: int
) -> None:
    """Frozen weights or losses other than those the manifest vouches for: no step is trained on them."""
    whole, _ = lab.whole(training__zero_stage=2, training__freeze=FREEZE)
    config = rewound(whole, f"{whole.name}-{entry}-{world}", to_step=3)
    file = checkpoints(config)[3] / "MANIFEST.json"
    record = json.loads(file.read_text())
    record["info"][entry] = value
    file.write_text(json.dumps(record))
    kind, message = error(lab, lab.job(config), world)
    assert kind == "CheckpointError" and words in message
    assert max(metrics(config)) == 3


def test_a_stage_without_its_predecessor_is_refused(lab: Lab, first: RunConfig) -> None:
    """Its checkpoints are gone: the message says what to delete to train it again."""
    config = rewound(first, "orphan", to_step=STEPS)
    shutil.rmtree(stage_folder(config, 0) / "checkpoints")
    kind, message = error(lab, lab.job(config, 1), 2)
    assert kind == "DataError" and "no valid checkpoint of the stage before; delete that stage's folder" in message


def test_a_model_that_one_worker_cannot_build_stops_all_workers(lab: Lab) -> None:
    """A file that one machine lacks is everybody's error before anybody waits for that machine."""
    job = lab.job(lab.config("unbuilt"))
    there = job.config.training.model_copy(update={"freeze": ["no such parameter"]})
    result = lab.run_job(job, 2, changed(job, training=there))
    assert result["error"]["kind"] == "ConfigError" and "'no such parameter' matches" in result["error"]["message"]


def test_an_unreadable_row_stops_all_workers(lab: Lab) -> None:
    """One worker's corrupt shard is everybody's error, not a hang of the others."""
    config = lab.config("unreadable")
    job = lab.job(config)
    manifests = {name: replace(m, root=str(lab.root / "broken" / name)) for name, m in lab.manifests.items()}
    shutil.copytree(lab.root / "tokens", lab.root / "broken")
    shard = next((lab.root / "broken" / "one" / "train").glob("tokens-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:200])
    broken = replace(job.stream, manifests=manifests)
    kind, message = error(lab, replace(job, stream=broken), 2)
    assert kind == "DataError" and str(shard) in message


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The bare loop runs with as many threads as the workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
