"""A checkpoint is what its manifest says, or it is none; conversions and checks at load, without DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nexus_ray.errors import CheckpointError
from nexus_ray.storage import Storage
from nexus_ray.train import checkpoint as ckpt
from nexus_ray.train.engine import full_shape
from tests.unit.test_storage import RemoteStorage

INFO = ckpt.CheckpointInfo(
    fingerprint="f",
    stage="one",
    stage_index=0,
    attempt=0,
    step=3,
    world_size=1,
    zero_stage=0,
    precision="fp32",
    optimizer_step=3,
    parameters=[["weight"], ["bias"]],
    frozen_sha256="0" * 32,
    probe_loss=2.0,
)


class FakeEngine:
    """Saves files that say their step, as DeepSpeed would its shards."""

    shape = SimpleNamespace(world=1)
    module = torch.nn.Linear(2, 2)

    def __init__(self, say: Callable[[], str] = lambda: "weights") -> None:
        self._say = say
        self.engine = self

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        assert exclude_frozen_parameters and not save_latest
        place = Path(folder) / tag
        place.mkdir(parents=True)
        (place / "model.pt").write_text(self._say())
        (place / "deep").mkdir()
        (place / "deep" / "optimizer.pt").write_text("moments")


@pytest.fixture(params=["local", "remote"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    (tmp_path / "root").mkdir()
    uri = str(tmp_path / "root")
    return Storage(uri) if request.param == "local" else RemoteStorage(f"remote://{uri}")


def save(folder: Storage, step: int, *, keep: int = 2, **changes: Any) -> ckpt.Checkpoint:
    info = replace(INFO, step=step)
    return ckpt.save(FakeEngine(lambda: f"step {step}"), folder, info, rank=0, keep=keep, **changes)  # type: ignore[arg-type]


def newest(folder: Storage) -> tuple[ckpt.Checkpoint | None, list[str]]:
    said: list[str] = []
    found = ckpt.newest_valid(folder, rank=0, world=1, on_bad=said.append)
    return found, said


def local(folder: Storage) -> Path:
    return Path(folder.uri.removeprefix("remote://"))


@pytest.fixture(autouse=True)
def _remote_folders_reopen(monkeypatch: pytest.MonkeyPatch) -> None:
    """`newest_valid` names folders by URI; those of the test's object store open as such."""

    def opened(uri: str) -> Storage:
        return RemoteStorage(uri) if uri.startswith("remote://") else Storage(uri)

    monkeypatch.setattr(ckpt, "Storage", opened)


# --- committing -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_lists_every_file_with_its_hash(folder: Storage) -> None:
    """Nothing beside the listed files is left in its folder but the manifest itself."""
    checkpoint = save(folder, 3)
    place = local(checkpoint.folder)
    there = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert there == {*checkpoint.files, "MANIFEST.json"}
    assert set(checkpoint.files) == {
        "deepspeed/model.pt",
        "deepspeed/deep/optimizer.pt",
        "deepspeed/rng-00000.txt",
    }
    assert ckpt.committed(folder) == [checkpoint]
    assert newest(folder) == (checkpoint, [])


def test_the_manifest_is_written_last(folder: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies while it saves leaves no checkpoint, and the one before stays the newest."""
    before = save(folder, 3)
    for point in ("write_json", "upload" if not folder.is_local else "child"):

        def dies(self: Storage, *args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(type(folder), point, dies)
            save(folder, 6)
        assert newest(folder) == (before, [])
    assert save(folder, 6).info.step == 6


def test_two_saves_of_one_step_do_not_mix(folder: Storage) -> None:
    """A repeated save (a step done again after a restart) has a folder of its own; both are whole."""
    first, second = save(folder, 3), save(folder, 3)
    assert first.folder != second.folder
    assert len(ckpt.committed(folder)) == 2


def test_older_checkpoints_are_deleted_after_the_commit(folder: Storage) -> None:
    """`keep` newest stay; a protected one stays whatever its age."""
    first = save(folder, 3, keep=2)
    for step in (6, 9, 12):
        save(folder, step, keep=2, protect=first.folder.name)
    assert [checkpoint.info.step for checkpoint in ckpt.committed(folder)] == [12, 9, 3]
    save(folder, 15, keep=1)
    assert [checkpoint.info.step for checkpoint in ckpt.committed(folder)] == [15]
    assert len(folder.list()) == 1


# --- finding --------------------------------------------------------------------------------------------------------


def test_no_folder_and_no_checkpoint_are_the_same(folder: Storage) -> None:
    assert ckpt.committed(folder.child("nothing")) == [] and newest(folder.child("nothing")) == (None, [])


def test_steps_are_ordered_as_numbers(folder: Storage) -> None:
    """Step 10 is newer than step 9."""
    for step in (9, 10, 100, 99):
        save(folder, step, keep=9)
    assert [checkpoint.info.step for checkpoint in ckpt.committed(folder)] == [100, 99, 10, 9]


@pytest.mark.parametrize(
    "manifest", [None, "", "{", "[]", "null", '{"files": {}}', '{"info": {"step": 9}, "files": {}}'], ids=repr
)
def test_a_missing_torn_or_foreign_manifest_is_no_checkpoint(folder: Storage, manifest: str | None) -> None:
    """Whatever else lies in the folder: the manifest is the commit."""
    good, torn = save(folder, 3), save(folder, 6)
    file = local(torn.folder) / "MANIFEST.json"
    if manifest is None:
        file.unlink()
    else:
        file.write_text(manifest)
    assert newest(folder) == (good, [])


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_file_falls_back_to_the_checkpoint_before(folder: Storage, damage: str) -> None:
    """Every listed file is read and hashed; the culprit is named, once."""
    good, bad = save(folder, 3), save(folder, 6)
    file = local(bad.folder) / "deepspeed" / "deep" / "optimizer.pt"
    content = file.read_bytes()
    if damage == "flip":
        file.write_bytes(content[:3] + bytes([content[3] ^ 1]) + content[4:])
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    found, said = newest(folder)
    assert found == good
    what = "is missing" if damage == "delete" else "differs from its manifest"
    assert said == [f"checkpoint {bad.folder.uri} is set aside: deepspeed/deep/optimizer.pt {what}"]


def test_if_all_are_damaged_there_is_none(folder: Storage) -> None:
    for step in (3, 6):
        (local(save(folder, step).folder) / "deepspeed" / "model.pt").write_text("x")
    found, said = newest(folder)
    assert found is None and len(said) == 2


def test_a_stray_file_is_ignored(folder: Storage) -> None:
    """Files of an older, larger world or of an editor belong to no manifest."""
    checkpoint = save(folder, 3)
    (local(checkpoint.folder) / "deepspeed" / "zero_pp_rank_7.pt").write_text("stale")
    (local(folder) / "notes.txt").write_text("x")
    assert newest(folder) == (checkpoint, [])


# --- what is checked at load ----------------------------------------------------------------------------------------


def verify(folder: Storage, **changes: Any) -> None:
    found = ckpt.Checkpoint(folder, INFO, {})
    values = {"frozen": INFO.frozen_sha256, "probe_loss": INFO.probe_loss, "exact": True, "precision": "fp32"}
    ckpt.verify(found, **(values | changes))


@pytest.mark.parametrize(
    ("exact", "precision", "bound"),
    [(True, "fp32", 1e-6), (True, "bf16", 1e-6), (False, "fp32", 1e-4), (False, "bf16", 3e-2)],
)
def test_the_probe_loss_must_be_what_was_saved(tmp_path: Path, exact: bool, precision: str, bound: float) -> None:
    """To rounding in the same layout, to the training precision otherwise; NaN is never equal."""
    folder = Storage(str(tmp_path))
    verify(folder, exact=exact, precision=precision, probe_loss=2.0 * (1 + 0.9 * bound))
    for loss in (2.0 * (1 + 1.1 * bound), 2.0 * (1 - 1.1 * bound), float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match="delete this checkpoint's folder to use the one before it"):
            verify(folder, exact=exact, precision=precision, probe_loss=loss)


def test_changed_frozen_weights_are_refused(tmp_path: Path) -> None:
    """Training would go on with parts of two models; the message says what may have changed."""
    with pytest.raises(CheckpointError, match=r"frozen weights differ .* model\.source or model\.init_from changed"):
        verify(Storage(str(tmp_path)), frozen="1" * 32)


def test_the_hash_of_frozen_weights_sees_names_bytes_and_nothing_trained() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    before = ckpt.frozen_sha256(model)
    with torch.no_grad():
        model.weight.add_(1)
    assert ckpt.frozen_sha256(model) == before
    with torch.no_grad():
        model.bias[0] = torch.nextafter(model.bias[0], torch.tensor(9.0))
    assert ckpt.frozen_sha256(model) != before
    model.requires_grad_(False)
    assert len({before, ckpt.frozen_sha256(model), ckpt.frozen_sha256(model.bfloat16())}) == 3


def test_the_generator_state_of_a_rank_comes_back(folder: Storage) -> None:
    """Where the rank had none (more workers than before), its generator is left alone."""
    torch.manual_seed(5)
    checkpoint = save(folder, 3)
    expected = torch.rand(3)
    torch.manual_seed(99)
    ckpt.restore_rng(checkpoint, rank=0)
    assert torch.equal(torch.rand(3), expected)
    state = torch.get_rng_state()
    ckpt.restore_rng(checkpoint, rank=1)
    assert torch.equal(torch.get_rng_state(), state)


# --- portable states ------------------------------------------------------------------------------------------------


def _plain(folder: Storage, model: nn.Module) -> ckpt.Checkpoint:
    """A ZeRO-0 checkpoint of a model after one step, in DeepSpeed's file format."""
    optimizer = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}])  # type: ignore[list-item]
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint = save(folder, 3)
    saved = {"module": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, local(checkpoint.folder) / "deepspeed" / "mp_rank_00_model_states.pt")
    return checkpoint


def test_a_plain_checkpoint_becomes_weights_and_moments_by_name(folder: Storage) -> None:
    """Each parameter with its own moments, frozen ones without; nothing is left behind in the storage."""
    model = nn.Linear(3, 2)
    checkpoint = _plain(folder, model)
    before = sorted(path for path in local(folder).rglob("*"))
    with ckpt.portable(checkpoint, rank=0, world=1) as states:
        assert sorted(states) == ["bias", "weight"] and len(states) == 2
        assert torch.equal(states["weight"]["fp32"], model.weight)
        assert states["weight"]["exp_avg"].shape == (2, 3) and states["bias"]["exp_avg"].shape == (2,)
        assert torch.equal(states["weight"]["exp_avg"], 0.1 * model.weight.grad)
        assert "absent" not in states
        other = nn.Linear(3, 2)
        ckpt.load_weights(other, states)
        assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)
    assert sorted(path for path in local(folder).rglob("*")) == before


def test_what_the_states_lack_stays_as_built(folder: Storage) -> None:
    """A block that a later stage adds is not in an earlier checkpoint."""
    checkpoint = _plain(folder, nn.Linear(3, 2))
    model = nn.ModuleDict({"weight": nn.Linear(1, 1)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ckpt.portable(checkpoint, rank=0, world=1) as states:
        ckpt.load_weights(model, states)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_flat_padded_tensors_take_the_shape_of_their_parameter() -> None:
    """ZeRO-3's come flat with padding behind; its parameters know their full shape."""
    value = torch.arange(8.0)
    assert torch.equal(full_shape(value, nn.Parameter(torch.zeros(2, 3))), value[:6].view(2, 3))
    empty = nn.Parameter(torch.zeros(0))
    empty.ds_shape = torch.Size([3, 2])  # type: ignore[attr-defined]
    assert full_shape(value, empty).shape == (3, 2)


def test_a_manifest_is_plain_json(folder: Storage) -> None:
    """Readable by a person and by any tool, with the units of `CheckpointInfo`."""
    checkpoint = save(folder, 3)
    record = json.loads((local(checkpoint.folder) / "MANIFEST.json").read_text())
    assert record["info"] == json.loads(json.dumps(asdict(replace(INFO, step=3))))
    assert set(record["files"]["deepspeed/model.pt"]) == {"bytes", "sha256"}
