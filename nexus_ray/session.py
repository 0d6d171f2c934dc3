"""Ray for the command line and the jobs: a local head or a running cluster, quiet, and refused where it would starve.

The library itself never calls `ray.init`. Invariant: inside `ray_session`, the cluster holds every stage's training
workers and at least one more CPU for data tasks (with none left, Ray Data waits for ever).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from nexus_ray.config import Hardware, RunConfig, detect_hardware, resolve, stage_config
from nexus_ray.config.synthesis import SynthesisConfig
from nexus_ray.errors import ConfigError

DATA_CPUS = 2
"""Logical CPUs of a local head beyond those of the training workers, for data tasks."""
SPARE_CPUS = 1
"""CPUs that an existing cluster must have beyond those of the training workers."""
MAX_OVERSUBSCRIPTION = 4
"""Most training threads per core that a local head accepts."""
CONNECT_TIMEOUT_S = 5.0
SMALL_MACHINE_BYTES = 64 << 30
OBJECT_STORE_BYTES = 1 << 30
"""Object store of a local head on a machine with less memory than SMALL_MACHINE_BYTES; the stream needs far less."""

QUIET = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1.0",  # how soon a dead or finished worker is seen
    "RAY_TRAIN_METRICS_ENABLED": "0",  # we keep our own
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers keep the user's folder, so relative paths mean the same
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray will default to; unset, it warns
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives its session must not start a Ray of its own
    "TOKENIZERS_PARALLELISM": "false",  # the cores belong to the training threads
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_SILENT": "true",
}
"""Environment of the driver and of every worker. What the user has set stays."""
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",  # training runs in a thread, whose own arena would map large blocks all the same
}
"""Environment of workers that train on CPUs: glibc keeps what is freed (mallopt(3)). Every step allocates the tensors
that the last one freed; handed back to the kernel in between, they are faulted in again page by page (14 %)."""
LOCAL_HEAD = "NEXUS_RAY_LOCAL_HEAD"
"""Set where Ray was started by this process and ends with it."""


@dataclass(frozen=True)
class Demand:
    """What the hungriest stage needs."""

    workers: int
    cpus_per_worker: int
    gpus: float
    """Of all workers together."""

    @property
    def cpus(self) -> int:
        return self.workers * self.cpus_per_worker


def quiet_environment() -> None:
    """Put QUIET into this process's environment, before ray is imported."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


@contextmanager
def ray_session(config: RunConfig, demands: list[Demand] | None = None) -> Iterator[None]:
    """Ray, connected: `cluster.address`, else $RAY_ADDRESS, else a local head that ends with the session.

    `demands`: what will be asked of the cluster; default: what each stage asks.

    A Ray that this process already uses is checked and left running. Raises ConfigError if no cluster answers, or
    if it cannot hold the workers of every stage plus a data task.
    """
    hardware = detect_hardware()
    demands = stage_demands(resolve(config, hardware)) if demands is None else demands
    quiet_environment()
    import ray

    if ray.is_initialized():
        _check_cluster(demands)
        yield
        return
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    own = {} if any(demand.gpus for demand in demands) else KEEP_MEMORY
    if address and address != "local":
        _join(address, {**{key: os.environ[key] for key in QUIET}, **own})
    else:
        with _environment(own):
            _start_local(demands, hardware)
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        _check_cluster(demands)
        yield
    finally:
        ray.shutdown()
        os.environ.pop(LOCAL_HEAD, None)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes started inside; what the user has set stays."""
    added = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


def stage_demands(config: RunConfig) -> list[Demand]:
    """What each stage of a resolved config asks of the cluster."""
    demands = []
    for index in range(len(config.stages)):
        cluster = stage_config(config, index).cluster
        gpus = cluster.num_workers * cluster.gpus_per_worker if cluster.use_gpu else 0
        demands.append(Demand(cluster.num_workers, cluster.cpus_per_worker or 1, gpus))
    return demands


def job_demand(job: SynthesisConfig) -> Demand:
    """What a synthesis job asks of the cluster."""
    return Demand(job.workers, job.cpus_per_worker, job.workers * job.worker_gpus)


def _join(address: str, environment: Mapping[str, str]) -> None:
    import ray

    check_address(address)
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": dict(environment)},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _unreachable(address, next(iter(str(error).strip().splitlines()), type(error).__name__)) from None


def check_address(address: str) -> None:
    """Raise ConfigError unless something listens at an address; Ray itself would end the process after a minute."""
    if address == "auto":
        return
    if address.startswith(("ray://", "http://", "https://")):
        raise ConfigError(
            f"cluster.address={address!r} is the address of Ray's client or job server, and Ray Train does not run "
            "through either; give host:port of the cluster (head's port 6379), or submit the verb as a job: "
            "`ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/VERB.py ...`"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise _unreachable(address, "it is not of the form host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _unreachable(address, str(error)) from None


def _unreachable(address: str, reason: str) -> ConfigError:
    return ConfigError(
        f"cluster.address={address!r}: no Ray cluster could be joined ({reason}); start one with `ray start --head`, "
        "correct the address, or leave cluster.address and $RAY_ADDRESS unset to run on this machine alone "
        "(a cluster with token authentication also wants RAY_AUTH_MODE=token and its token in RAY_AUTH_TOKEN)"
    )


def _start_local(demands: list[Demand], hardware: Hardware) -> None:
    import ray

    check_local(demands, hardware)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody reclaims this machine
    # Ray would have its workers, the training ones too, give way to all else; data tasks do so by themselves.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_enable_metrics_collection", "false")  # nobody scrapes a head without a dashboard
    os.environ.setdefault("RAY_metrics_report_interval_ms", "60000")
    os.environ[LOCAL_HEAD] = "1"
    cpus = max(demand.cpus for demand in demands) + DATA_CPUS
    with _own_process_groups():
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_object_store_bytes(),
        )
    _end_idlers()


@contextmanager
def _own_process_groups() -> Iterator[None]:
    """Ray's processes get process groups of their own: a SIGTERM to all of the driver's group, as `timeout` and
    shells send it, must not end Ray before the driver has had a checkpoint written."""
    from ray._private import services

    popen = getattr(services, "ConsolePopen", None)  # private to Ray; should it change, they stay in the driver's
    if popen is None or os.name != "posix":
        yield
        return
    services.ConsolePopen = partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def _end_idlers() -> None:
    """End the processes that carry logs to a driver and ask for more nodes: here nobody listens, and each takes one
    percent of a core."""
    from ray._private import worker

    for name in ("kill_log_monitor", "kill_monitor"):
        with contextlib.suppress(AttributeError, TypeError):  # private to Ray; should it change, they run on
            getattr(worker._global_node, name)(check_alive=False)


def check_local(demands: list[Demand], hardware: Hardware) -> None:
    """Raise ConfigError if the training threads of a stage crowd this machine."""
    limit = MAX_OVERSUBSCRIPTION * hardware.cpus
    for demand in demands:
        if demand.cpus > limit:
            fitting = max(1, hardware.cpus // demand.cpus_per_worker)
            raise ConfigError(
                f"cluster.num_workers={demand.workers} x cluster.cpus_per_worker={demand.cpus_per_worker} asks for "
                f"{demand.cpus} training threads, but this machine has {hardware.cpus} cores (at most {limit} threads "
                f"are accepted); lower cluster.num_workers to {fitting}, or name a larger cluster in cluster.address"
            )


def _object_store_bytes() -> int | None:
    """Size of a local object store; None leaves it to Ray (large machines, and those without /dev/shm)."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        shared = shutil.disk_usage("/dev/shm").free
    except (OSError, ValueError):
        return None
    if memory >= SMALL_MACHINE_BYTES:
        return None
    return max(128 << 20, min(OBJECT_STORE_BYTES, shared * 8 // 10))


def _check_cluster(demands: list[Demand]) -> None:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for demand in demands:
        check_fits(demand, nodes)


def check_fits(demand: Demand, nodes: list[dict[str, float]]) -> None:
    """Raise ConfigError if a cluster of `nodes` (their resources) cannot hold the workers and a data task."""
    cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    asked = f"cluster.num_workers={demand.workers} with cluster.cpus_per_worker={demand.cpus_per_worker}"
    has = f"the cluster has {cpus} CPUs and {gpus} GPUs on {len(nodes)} node{'s' if len(nodes) != 1 else ''}"
    if demand.gpus > gpus:
        way_out = f"lower cluster.num_workers to {gpus}" if gpus else "set cluster.use_gpu: false"
        raise ConfigError(
            f"cluster.use_gpu=True and {asked} need {demand.gpus:g} GPUs, but {has}; {way_out}, or add GPU nodes"
        )
    if demand.cpus + SPARE_CPUS > cpus:
        fitting = max(0, cpus - SPARE_CPUS) // demand.cpus_per_worker
        way_out = (
            f"lower cluster.num_workers to {fitting}"
            if fitting
            else f"lower cluster.cpus_per_worker to {max(1, cpus - SPARE_CPUS)}"
        )
        raise ConfigError(
            f"{asked} needs {demand.cpus} CPUs for training and {SPARE_CPUS} more for data tasks, but {has}; "
            f"{way_out}, or add nodes"
        )
    found = sum(_places(demand, node) for node in nodes)
    if found < demand.workers:
        raise ConfigError(
            f"{asked}: only {found} such workers find room, since one worker stays on one node and {has}; "
            "lower cluster.cpus_per_worker or cluster.num_workers, or add nodes"
        )


def _places(demand: Demand, node: dict[str, float]) -> int:
    return places(node, int(node.get("CPU", 0)), demand.cpus_per_worker, demand.gpus / demand.workers)


def places(node: Mapping[str, float], cpus: int, cpus_per_worker: int, gpus_per_worker: float) -> int:
    """Workers that find room on a node of which so many CPUs are whole; those with a share of a GPU stay on one."""
    by_cpu = max(0, cpus) // cpus_per_worker
    if not gpus_per_worker:
        return by_cpu
    gpus = int(node.get("GPU", 0))
    if gpus_per_worker >= 1:
        return min(by_cpu, int(gpus // gpus_per_worker))
    return min(by_cpu, gpus * int(1 / gpus_per_worker + 1e-9))


def in_ray_job() -> bool:
    """Whether this process is the entry point of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_job_storage(storage: str) -> None:
    """Raise ConfigError if a job would write into the temporary copy of its working directory."""
    if in_ray_job() and "://" not in storage and not storage.startswith(("/", "~")):
        raise ConfigError(
            f"storage={storage!r} is relative, but a submitted job runs in a temporary copy of its working directory, "
            "where results are lost; add storage=/shared/folder or storage=s3://bucket/runs to the job's command"
        )
