"""Checkpoints of a stage: DeepSpeed's shards plus our manifest, which is written last and is the commit.

A checkpoint is valid if its manifest exists and every file it lists has the listed SHA-256. What Ray was told about
it does not matter. The same worker count, ZeRO stage and precision load DeepSpeed's shards as they are (bit-exact);
anything else goes through fp32 weights and moments by parameter name. Checkpoint files are unpickled, so they are
only ever read from the run's own storage, never from data.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import io
import itertools
import os
import secrets
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nexus_ray.errors import CheckpointError
from nexus_ray.storage import Storage
from nexus_ray.train.agree import gather
from nexus_ray.train.committed import MANIFEST, Checkpoint, CheckpointInfo, committed, read_manifest
from nexus_ray.train.engine import MOMENTS, Engine, full_shape

TAG = "deepspeed"
BUFFERS = "buffers.safetensors"
"""What DeepSpeed's conversion leaves out."""
FULL_BYTES = 1 << 24
"""A write that failed with less disk than this left has failed for want of it."""


# --- finding -------------------------------------------------------------------------------------------------------


def newest_valid(folder: Storage, *, rank: int, world: int, on_bad: Any = lambda text: None) -> Checkpoint | None:
    """The newest checkpoint whose files all verify; each rank checks its share, all ranks get the same answer."""
    names = [checkpoint.folder.uri for checkpoint in committed(folder)] if rank == 0 else []
    for uri in _from_rank_zero(names, world):
        checkpoint = read_manifest(Storage(uri))
        fault = _fault(checkpoint, rank, world)
        faults = gather(fault, world)
        if not any(faults):
            return checkpoint
        if rank == 0:
            on_bad(f"checkpoint {uri} is set aside: {next(text for text in faults if text)}")
    return None


def _fault(checkpoint: Checkpoint, rank: int, world: int) -> str | None:
    for name in sorted(checkpoint.files)[rank::world]:
        expected = checkpoint.files[name]
        if not checkpoint.folder.exists(name):
            return f"{name} is missing"
        if _sha256(checkpoint.folder, name) != expected["sha256"]:
            return f"{name} differs from its manifest"
    return None


def _sha256(folder: Storage, name: str) -> str:
    digest = hashlib.sha256()
    with folder.filesystem.open_input_file(folder.path(name)) as source:
        while block := source.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# --- saving --------------------------------------------------------------------------------------------------------


def save(
    engine: Engine, folder: Storage, info: CheckpointInfo, *, rank: int, keep: int, protect: str = ""
) -> Checkpoint:
    """Write a checkpoint into `folder` (the stage's `checkpoints/`) and commit it; collective.

    Older checkpoints beyond `keep` are deleted after the commit.
    """
    world = engine.shape.world
    name = _from_rank_zero(f"step-{info.step:08d}-{secrets.token_hex(3)}" if rank == 0 else None, world)
    target = folder.child(name)
    with target.write_errors():
        files = _write_part(engine, target, rank)
    everything = {key: value for share in gather(files, world) for key, value in share.items()}
    checkpoint = Checkpoint(target, info, everything)
    if rank == 0:
        target.write_json({"info": asdict(info), "files": everything}, MANIFEST)
        for old in committed(folder)[keep:]:
            if old.folder.name != protect:
                old.folder.delete(MANIFEST)  # first, so that a half-deleted checkpoint is not a checkpoint
                old.folder.delete()
    _barrier(world)
    return checkpoint


def _write_part(engine: Engine, target: Storage, rank: int) -> dict[str, dict[str, Any]]:
    """This rank's files in place, with sizes and hashes; raises OSError if they cannot be written."""
    local = target.is_local
    part = Path(target.uri) / f".rank-{rank:05d}" if local else Path(tempfile.mkdtemp(prefix="nexus-checkpoint-"))
    part.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()), _os_errors(part):
        engine.engine.save_checkpoint(str(part), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    if rank == 0 and (buffers := _buffers(engine.module)):
        save_file(buffers, part / TAG / BUFFERS)
    (part / TAG / f"rng-{rank:05d}.txt").write_text(base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode())
    files = {}
    for path in sorted(p for p in (part / TAG).rglob("*") if p.is_file()):
        relative = str(path.relative_to(part))
        files[relative] = {"bytes": path.stat().st_size, "sha256": _file_sha256(path)}
        if local:
            destination = Path(target.uri) / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, destination)
    if not local:
        target.upload(part / TAG, TAG)
    shutil.rmtree(part)
    return files


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state, on the CPU."""
    kept = model.state_dict().keys()
    return {name: value.cpu().contiguous() for name, value in model.named_buffers() if name in kept}


@contextlib.contextmanager
def _os_errors(folder: Path) -> Iterator[None]:
    """The OSError behind what torch reports of a failed write without its reason."""
    try:
        yield
    except RuntimeError as error:
        if not any(part in str(error) for part in ("PytorchStreamWriter", "inline_container", "iostream")):
            raise
        number = errno.ENOSPC if shutil.disk_usage(folder).free < FULL_BYTES else errno.EIO
        raise OSError(number, os.strerror(number)) from error


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def frozen_sha256(model: nn.Module, trained: Collection[str] | None = None) -> str:
    """Hash of all parameters that are not trained, in their order and precision; collective under ZeRO-3.

    `trained`: names of the trained ones; default: those that require a gradient.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad if trained is None else name in trained):
            digest.update(name.encode())
            with _gathered(parameter):
                digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def _gathered(parameter: nn.Parameter) -> Iterator[None]:
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


# --- loading -------------------------------------------------------------------------------------------------------


def load_native(engine: Engine, checkpoint: Checkpoint, *, rank: int) -> None:
    """DeepSpeed's own shards into an engine of the same layout; bit-exact."""
    settings = engine.settings()
    with _local_copy(checkpoint.folder) as path, contextlib.redirect_stdout(io.StringIO()):
        loaded, _ = engine.engine.load_checkpoint(
            str(path), tag=TAG, load_lr_scheduler_states=False, load_module_strict=False
        )
    if loaded is None:
        raise CheckpointError(f"checkpoint {checkpoint.folder.uri}: DeepSpeed found nothing to load in {TAG}/")
    engine.set_settings(settings)  # a stage's own, not those of the stage that wrote the checkpoint
    engine.engine.micro_steps = 0
    engine.engine.global_steps = checkpoint.info.step


def restore_rng(checkpoint: Checkpoint, *, rank: int) -> None:
    """The generator state that this rank had, where it had one."""
    name = f"{TAG}/rng-{rank:05d}.txt"
    if name in checkpoint.files:
        raw = base64.b64decode(checkpoint.folder.read_text(name))
        torch.set_rng_state(torch.frombuffer(bytearray(raw), dtype=torch.uint8))


class PortableStates(Mapping[str, dict[str, Tensor]]):
    """fp32 weights and Adam moments by parameter name, one parameter in memory at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "zero"
        self._names = sorted(path.name for path in self._folder.iterdir())

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        state = {}
        for key in ("fp32", *MOMENTS):
            path = self._folder / name / f"{key}.pt"
            if path.exists():
                value = torch.load(path, map_location="cpu", weights_only=True)
                state[key] = value["param"] if isinstance(value, dict) else value
        if "fp32" not in state:
            raise KeyError(name)
        return state

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextlib.contextmanager
def portable(checkpoint: Checkpoint, *, rank: int, world: int) -> Iterator[PortableStates]:
    """The checkpoint's weights and moments in full shape; rank 0 converts where the storage is shared."""
    shared = checkpoint.folder.is_local
    with contextlib.ExitStack() as stack:
        if shared:
            place = Path(checkpoint.folder.uri) / ".portable"
            stack.callback(_clear, place, rank, world)
        else:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nexus-portable-")))
        if rank == 0 or not shared:
            with _local_copy(checkpoint.folder) as source:
                shutil.rmtree(place, ignore_errors=True)
                _convert(checkpoint.info, source / TAG, place)
        _barrier(world)
        yield PortableStates(place)


def _clear(place: Path, rank: int, world: int) -> None:
    _barrier(world)
    if rank == 0:
        shutil.rmtree(place, ignore_errors=True)


def _convert(info: CheckpointInfo, source: Path, place: Path) -> None:
    _convert_trained(info, source, place)
    if (source / BUFFERS).exists():
        for name, value in load_file(source / BUFFERS).items():
            _write(place / "zero" / name / "fp32.pt", value)


def _convert_trained(info: CheckpointInfo, source: Path, place: Path) -> None:
    if info.zero_stage:
        from deepspeed.checkpoint.ds_to_universal import main

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main(
                Namespace(
                    input_folder=str(source),
                    output_folder=str(place),
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,
                )
            )
        return
    saved = torch.load(source / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    for name, value in saved["module"].items():
        _write(place / "zero" / name / "fp32.pt", value.float())
    order = [name for group in info.parameters for name in group]
    for number, state in saved["optimizer"]["state"].items():
        for key in MOMENTS:
            _write(place / "zero" / order[number] / f"{key}.pt", state[key])


def _write(path: Path, value: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"param": value.clone()}, path)


def load_weights(model: nn.Module, states: PortableStates) -> None:
    """fp32 weights, and buffers, into a model that DeepSpeed does not have yet; what the states lack stays as built."""
    with torch.no_grad():
        for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
            if name in states:
                value.copy_(full_shape(states[name]["fp32"], value))


def verify(checkpoint: Checkpoint, *, frozen: str, probe_loss: float, exact: bool, precision: str) -> None:
    """The frozen weights and the probe loss must be what was saved.

    `exact`: same layout, so the loss must agree to rounding of the sum; otherwise to the training precision.
    """
    info = checkpoint.info
    if frozen != info.frozen_sha256:
        raise CheckpointError(
            f"checkpoint {checkpoint.folder.uri}: the frozen weights differ from those it was trained with "
            f"(sha256 {frozen[:12]} instead of {info.frozen_sha256[:12]}); model.source or model.init_from changed. "
            f"Restore the base model, or start under another name"
        )
    tolerance = 1e-6 if exact else (1e-4 if precision == "fp32" else 3e-2)
    if not abs(probe_loss - info.probe_loss) <= tolerance * max(1.0, abs(info.probe_loss)):
        raise CheckpointError(
            f"checkpoint {checkpoint.folder.uri}: the probe batch has loss {probe_loss:.6f} after loading, but had "
            f"{info.probe_loss:.6f} when it was saved; delete this checkpoint's folder to use the one before it"
        )


@contextlib.contextmanager
def _local_copy(folder: Storage) -> Iterator[Path]:
    if folder.is_local:
        yield folder.local_path
        return
    with tempfile.TemporaryDirectory(prefix="nexus-checkpoint-") as place:
        folder.download(Path(place))
        yield Path(place)


# --- collectives on Python objects -----------------------------------------------------------------------------------


def _from_rank_zero(value: Any, world: int) -> Any:
    if world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _barrier(world: int) -> None:
    if world > 1:
        dist.barrier()
