"""Teachers on the network: from a config section to a generator.

The key is read from the environment variable that the config names, handed to the official client, and kept nowhere
else. The clients' loggers below WARNING are silenced: at DEBUG they write whole prompts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable

from nexus_ray.config.generators import AnthropicGenerator, OpenAIGenerator, RemoteGenerator
from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.generators.dispatch import Endpoint, Site, dispatch
from nexus_ray.synthesis.generators.gate import Gate, LocalGate
from nexus_ray.synthesis.generators.health import CallStats, Health
from nexus_ray.synthesis.generators.protocol import OnSent
from nexus_ray.synthesis.rows import Answer, Failure, Request, content_id
from nexus_ray.synthesis.throttle import Throttle

_CLIENT_LOGGERS = ("openai", "anthropic", "httpx2", "httpcore2")
_LATE_LOGGERS = tuple(f"httpcore2.{part}" for part in ("connection", "http11", "http2", "proxy", "socks"))
"""Made only when a connection needs them."""
Connect = Callable[[str | None], Endpoint]
"""Makes the client, given the key."""


class RemoteTeacher:
    """A `Generator` behind one endpoint; made by `remote_teacher`."""

    def __init__(
        self,
        config: RemoteGenerator,
        connect: Connect,
        *,
        gate: Gate,
        holder: str,
        revision: str | None = None,
        proven: bool = False,
    ) -> None:
        self._config = config
        self.revision = revision or remote_revision(config)
        """Endpoint, model name, and the settings that change what is sent; or what the maker knows of the model."""
        self._connect = connect
        self._gate = gate
        self._holder = holder
        name = f"{config.kind} {config.model} at {config.base_url}"
        self._health = Health(config, name=name, proven=proven)
        self._open: tuple[asyncio.AbstractEventLoop, Endpoint] | None = None

    def __repr__(self) -> str:
        return f"RemoteTeacher({self._config.kind}, {self._config.model}, {self._config.base_url})"

    @property
    def stats(self) -> CallStats:
        """Calls so far."""
        return self._health.stats

    def generate(self, requests: Iterable[Request], on_sent: OnSent | None = None) -> AsyncIterator[Answer | Failure]:
        """See `dispatch`. Connections stay open for the next call in the same event loop, until `aclose`."""
        site = Site(self._endpoint(), self._config, self._gate, self._health, self.revision, self._holder)
        return dispatch(site, requests, on_sent)

    async def aclose(self) -> None:
        """Close the connections."""
        opened, self._open = self._open, None
        if opened is not None and opened[0] is asyncio.get_running_loop():
            await opened[1].close()

    def _endpoint(self) -> Endpoint:
        loop = asyncio.get_running_loop()
        if self._open is None or self._open[0] is not loop:
            self._open = loop, self._connect(read_key(self._config.api_key_env))
            silence_clients()
        return self._open[1]


def remote_teacher(
    config: RemoteGenerator, *, gate: Gate | None = None, holder: str = "", proven: bool = False
) -> RemoteTeacher:
    """The generator of a config section. `gate` is the endpoint's door; default: one of this process, without caps.
    `proven`: it has answered before, so that a refusal is a request's own.

    Raises ConfigError if the client's package is missing (it names the extra), or the key's variable is not set.
    """
    connect = connector(config)
    read_key(config.api_key_env)
    gate = gate or LocalGate(Throttle(config.throttle, clock=time.monotonic), model=config.model)
    return RemoteTeacher(config, connect, gate=gate, holder=holder, proven=proven)


def remote_revision(config: RemoteGenerator) -> str:
    """`openai:MODEL:12 hexadecimal digits` of address, revision and all settings that change what is sent."""
    sent = config.model_dump(
        mode="json",
        include={
            "kind",
            "base_url",
            "model",
            "revision",
            "api",
            "max_tokens_field",
            "omit",
            "send_seed",
            "api_version",
        },
    )
    return f"{config.kind}:{config.model}:{content_id('generator', sent)[:12]}"


def read_key(variable: str | None) -> str | None:
    """The key in an environment variable; None without a name. Raises ConfigError, which never holds the value."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"api_key_env={variable}: this environment variable is not set; export {variable}=... where the job runs, "
            f"or set api_key_env to null for a server without keys"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"api_key_env={variable}: the variable's value has characters that no key has; set it anew")
    return key


def silence_clients() -> None:
    """Drop what the clients and their transport log below WARNING, whatever level the application has set."""
    known = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in _CLIENT_LOGGERS]
    for name in {*known, *_CLIENT_LOGGERS, *_LATE_LOGGERS}:
        logger = logging.getLogger(name)
        if _from_warning not in logger.filters:
            logger.addFilter(_from_warning)


def _from_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def connector(config: RemoteGenerator) -> Connect:
    """What makes the client of a section. Raises ConfigError if its package is missing."""
    try:
        if isinstance(config, OpenAIGenerator):
            from nexus_ray.synthesis.generators.openai_chat import OpenAIEndpoint

            return lambda key: OpenAIEndpoint(config, key)
        if isinstance(config, AnthropicGenerator):
            from nexus_ray.synthesis.generators.anthropic_chat import AnthropicEndpoint

            return lambda key: AnthropicEndpoint(config, key)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"kind={config.kind} needs the package {error.name}, which is not installed; "
            f"run `pip install 'nexus-ray[{config.kind}]'`"
        ) from None
    raise ConfigError(f"kind={config!r} is no teacher on the network; use openai or anthropic")
