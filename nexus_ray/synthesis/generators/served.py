"""A teacher behind a server that we start ourselves: vLLM on GPUs, `transformers serve`, or any other command.

It is asked through the client of `openai_chat`, by the rules of `remote`; this module adds the server's life.
Invariant: no call is sent while the server is down: the gate holds callers until it is healthy again. What was in
flight when it died counts as sent and comes back as a connection error, to be retried. Whoever owns a `ServedTeacher`,
a Ray actor with `num_gpus` say, owns the server: it sees that process's GPUs and ends with it, however that ends.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path

from nexus_ray.config.generators import OpenAIGenerator, ServedGenerator, ServerCommand
from nexus_ray.config.tree import ModelConfig
from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.generators.gate import Gate, LocalGate, Permit, Settled, Tokens
from nexus_ray.synthesis.generators.health import CallStats
from nexus_ray.synthesis.generators.protocol import OnSent
from nexus_ray.synthesis.generators.remote import RemoteTeacher, connector
from nexus_ray.synthesis.generators.server import Server
from nexus_ray.synthesis.generators.server_process import HOST, Launch, free_port
from nexus_ray.synthesis.rows import Answer, Failure, Request, content_id
from nexus_ray.synthesis.throttle import Throttle

VLLM_KEY = "VLLM_API_KEY"
"""Where `vllm serve` finds its key when no `--api-key` stands on the command line, which every user could read, and
which it would print among its non-default arguments (vllm/envs.py)."""
_SETTINGS = ("server", "options", "api", "max_tokens_field", "omit", "send_seed")
"""What decides answers beside the model; a command counts with its port left open."""
_DECIDING = (".json", ".jinja", ".txt", ".model")
"""Files beside the weights that decide answers: tokenizer, chat template, sampling defaults."""


class ServedTeacher:
    """A `Generator` that owns its server; made by `served_teacher`. Close it, or use it in a `with`."""

    def __init__(self, remote: RemoteTeacher, server: Server) -> None:
        self._remote = remote
        self._server = server

    def __repr__(self) -> str:
        return f"ServedTeacher({self.revision}, {self._server!r})"

    def __enter__(self) -> ServedTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def revision(self) -> str:
        """Model, its commit or content, and how it is served; neither port nor machine."""
        return self._remote.revision

    @property
    def stats(self) -> CallStats:
        """Calls so far."""
        return self._remote.stats

    @property
    def restarts(self) -> int:
        """Times that the server had to be started again."""
        return self._server.restarts

    def start(self) -> None:
        """Start the server now and wait until it is healthy; else the first `generate` does. Raises SynthesisError
        with the end of what the server printed if it is not."""
        self._server.start()

    def generate(self, requests: Iterable[Request], on_sent: OnSent | None = None) -> AsyncIterator[Answer | Failure]:
        """See `dispatch`. Raises SynthesisError too if the server does not start, or dies too often."""
        self._server.begin()
        return self._remote.generate(requests, on_sent)

    async def aclose(self) -> None:
        """Close the connections; the server stays, for the next call."""
        await self._remote.aclose()

    def close(self) -> None:
        """End the server and all that it started."""
        self._server.stop()


class ServedGate:
    """Another gate, shut while the server is down."""

    def __init__(self, gate: Gate, server: Server) -> None:
        self._gate = gate
        self._server = server

    async def exchange(self, settled: Sequence[Settled], wanted: Sequence[Tokens], holder: str) -> Permit:
        """See `Gate`. Raises SynthesisError once the server will not come back."""
        if any(call.outcome.kind in ("error", "timeout") for call in settled):
            await self._server.check()
        if self._server.up or not wanted:
            return await self._gate.exchange(settled, wanted, holder)
        if settled:
            await self._gate.exchange(settled, [], holder)
        await self._server.until_up()
        return await self._gate.exchange([], wanted, holder)


def served_teacher(config: ServedGenerator, *, gate: Gate | None = None, holder: str = "") -> ServedTeacher:
    """The generator of a config section; its server is not started yet. `gate` and `holder` as for `remote_teacher`.

    Raises:
        ConfigError: the server's program, or the client's package, is not installed; the model cannot be found.
    """
    gate = gate or LocalGate(Throttle(config.throttle, clock=time.monotonic), model=config.model)
    place = Path(config.model).expanduser()
    if place.exists():
        config = config.model_copy(update={"model": str(place.absolute())})
    port, key = free_port(), secrets.token_urlsafe(32)
    commit, content = model_content(config)
    launch = launch_of(config, port=port, key=key, commit=commit)
    asked = openai_section(config, port=port, commit=commit)
    connect = connector(asked)
    server = Server(launch, start_timeout_s=config.start_timeout_s, max_restarts=config.max_restarts)
    remote = RemoteTeacher(
        asked,
        lambda _: connect(launch.key),
        gate=ServedGate(gate, server),
        holder=holder,
        revision=served_revision(config, content),
    )
    return ServedTeacher(remote, server)


def served_revision(config: ServedGenerator, content: str) -> str:
    """`served:NAME:12 hexadecimal digits` of the model's content and all settings that decide its answers; the same
    wherever a folder lies."""
    settings = config.model_dump(mode="json", include=set(_SETTINGS))
    name = Path(config.model).name if Path(config.model).is_absolute() else config.model
    return f"served:{name}:{content_id('generator', [name, settings, content])[:12]}"


def openai_section(config: ServedGenerator, *, port: int, commit: str | None = None) -> OpenAIGenerator:
    """How the server is asked."""
    shared = set(OpenAIGenerator.model_fields) & set(ServedGenerator.model_fields) - {"kind", "model"}
    model = _asked_model(config, commit)
    return OpenAIGenerator(
        kind="openai", model=model, base_url=f"http://{HOST}:{port}/v1", **config.model_dump(include=shared)
    )


# --- command lines: the only place that knows them ----------------------------------------------------------------


def launch_of(config: ServedGenerator, *, port: int, key: str, commit: str | None = None) -> Launch:
    """What is started for a section. Raises ConfigError if the program is not installed."""
    log = Path(config.log).expanduser().absolute() if config.log is not None else None
    if log is not None and not log.parent.is_dir():
        raise ConfigError(f"generator.log={config.log}: there is no folder {log.parent}; make it, or name another file")
    if isinstance(config.server, ServerCommand):
        custom, key_env = config.server, config.server.key_env
        command = tuple(_filled(part, config, port) for part in custom.command)
        _require(command[0], "name a program that is installed, with its path if it is not on PATH")
        environment = {key_env: key} if key_env is not None else {}
        name = f"{Path(command[0]).name} {config.model}"
        return Launch(name, command, port, custom.health, key if key_env else None, environment, log)
    if config.server == "vllm":
        command = vllm_command(config, port=port, commit=commit)
        return Launch(f"vllm {config.model}", command, port, "/health", key, {VLLM_KEY: key}, log)
    command = transformers_command(config, port=port, commit=commit)
    quiet = {"HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    return Launch(f"transformers serve {config.model}", command, port, "/health", None, quiet, log)


def vllm_command(config: ServedGenerator, *, port: int, commit: str | None = None) -> tuple[str, ...]:
    """`vllm serve`, as in https://docs.vllm.ai/en/latest/cli/serve/ and vllm/entrypoints/openai/cli_args.py (read at
    0052233); `/health` answers 503 once the engine is dead. Without an access log, it prints no line per call."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    program = config.program or shutil.which("vllm", path=beside) or "vllm"
    _require(
        program,
        "vLLM pins versions of its own: install it into an environment of its own (python -m venv /opt/vllm; "
        "/opt/vllm/bin/pip install vllm) and set generator.program=/opt/vllm/bin/vllm",
    )
    command = [program, "serve", config.model, "--host", HOST, "--port", str(port)]
    command += ["--served-model-name", config.model, "--disable-uvicorn-access-log"]
    command += ["--revision", commit] if commit else []
    command += ["--tensor-parallel-size", str(config.gpus)] if config.gpus else []
    return (*command, *_flags(config.options))


def transformers_command(config: ServedGenerator, *, port: int, commit: str | None = None) -> tuple[str, ...]:
    """`transformers serve`, as in https://huggingface.co/docs/transformers/serving and transformers/cli/serve.py
    (5.23.0). It knows no keys."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"kind=served with server=transformers needs the package {missing[0]}, which is not installed; run "
            f"`pip install 'nexus-ray[serve]'`"
        )
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", _asked_model(config, commit)]
    return (*command, "--host", HOST, "--port", str(port), *_flags(config.options))


def _asked_model(config: ServedGenerator, commit: str | None) -> str:
    """Name under which the server knows the model; `transformers serve` wants exactly the one it was started with."""
    return f"{config.model}@{commit}" if config.server == "transformers" and commit else config.model


def _flags(options: Mapping[str, str | int | float | bool]) -> list[str]:
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def _filled(part: str, config: ServedGenerator, port: int) -> str:
    return part.replace("{model}", config.model).replace("{host}", HOST).replace("{port}", str(port))


def _require(program: str, way_out: str) -> None:
    if shutil.which(program) is None:
        raise ConfigError(f"kind=served needs the program {program}, which is not to be found here; {way_out}")


# --- what is served -----------------------------------------------------------------------------------------------


def model_content(config: ServedGenerator) -> tuple[str | None, str]:
    """Commit of a hub model, to be served and no other; and a digest of what decides the model's answers.

    Of a folder: its weights and all small files beside them (chat template, sampling defaults); of a file: itself; of
    a name that only a server of one's own understands: nothing but the section's `revision`. Raises ConfigError if
    `vllm` or `transformers` are to serve a model that is neither here nor on the hub.
    """
    place = Path(config.model)
    if place.is_file():
        return None, _digest(place)
    if place.is_dir():
        from nexus_ray.models.fingerprint import model_fingerprint

        weights = model_fingerprint(ModelConfig(source=config.model), vocab_size=0, eos_id=0, seed=0)
        beside = {file.name: _digest(file) for file in place.iterdir() if file.suffix in _DECIDING}
        return None, content_id("model", [weights, beside])
    if isinstance(config.server, ServerCommand):
        return None, config.revision
    from nexus_ray.models.build import model_config

    commit = model_config(ModelConfig(source=config.model, revision=config.revision or None))._commit_hash
    return commit or config.revision or None, commit or config.revision


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
