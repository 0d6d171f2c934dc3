"""How training workers find each other: PyTorch's process group, set up by Ray Train's controller.

Ray's own `TorchConfig` does the same, and lies in a module that imports PyTorch; the controller reads it before it
starts the workers, in a process of its own, so that PyTorch is loaded twice before a stage begins. Here only workers
import it.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig

TIMEOUT_S = 1800
"""How long a worker waits for the others, when they meet and in any exchange."""
SHUTDOWN_S = 30


@dataclass
class ProcessGroup(BackendConfig):
    """Extension point of Ray Train: what joins the workers of a stage."""

    backend: str
    """`gloo`, or `nccl` where every worker has a GPU."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Joined


class _Joined(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Have all workers join, at an address of the first."""
        address, port = worker_group.execute_single(0, _free_address)
        size = len(worker_group)
        named = {"backend": backend_config.backend, "address": address, "port": port, "world": size}
        ray.get([worker_group.execute_single_async(number, _join, number=number, **named) for number in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) > 1:
            ray.wait(worker_group.execute_async(_leave), num_returns=len(worker_group), timeout=SHUTDOWN_S)


def _free_address() -> tuple[str, int]:
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind(("", 0))
        return address, probe.getsockname()[1]


def _join(*, backend: str, number: int, world: int, address: str, port: int) -> None:
    """Set what torchrun would set, then join."""
    import ray.train
    import torch.distributed

    here = ray.train.get_context()
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(number),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(here.get_local_rank()),
        LOCAL_WORLD_SIZE=str(here.get_local_world_size()),
        NODE_RANK=str(here.get_node_rank()),
    )
    torch.distributed.init_process_group(
        backend=backend, rank=number, world_size=world, timeout=timedelta(seconds=TIMEOUT_S)
    )


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
