"""What writes synthetic text, how hard it may be pressed, and what it may cost: sections of a synthesis job.

Keys never stand in a config: a section names the environment variable that holds one, and whatever looks like a key
itself is refused, without being shown.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator, model_validator

from nexus_ray.config.methods import Section

_KEY_START = re.compile(r"(sk|pk|rk)[-_]|AIza|AKIA|gsk_|hf_|xai-|gh[pousr]_|Bearer\s", re.ASCII)
_KEY_BODY = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9+/=]{28,}", re.ASCII)
_KEY_FIELDS = re.compile(r"(api_?)?(key|token|secret|password|authorization)", re.IGNORECASE)
_ENVIRONMENT_NAME = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*", re.ASCII)


def looks_like_key(text: str) -> bool:
    """Whether a text has the form of a secret: a known prefix, or 28 and more letters and digits without a break."""
    return bool(_KEY_START.match(text) or _KEY_BODY.fullmatch(text))


class ThrottleConfig(Section):
    """How many requests are in flight at one endpoint, over the whole cluster: additive increase, multiplicative
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
            if not isinstance(value, str):
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
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("base_url must start with http:// or https:// and name a host")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "base_url must not hold a user, a password or a query, where keys hide; name an environment variable "
                "in api_key_env instead"
            )
        return value.rstrip("/")

    @field_validator("api_key_env", check_fields=False)
    @classmethod
    def _names_a_variable(cls, value: str | None) -> str | None:
        if value is not None and not _ENVIRONMENT_NAME.fullmatch(value):
            raise ValueError(
                "api_key_env is the NAME of an environment variable, such as TEACHER_KEY (capitals, digits, single "
                "underscores), not the key itself"
            )
        return value


class OpenAIGenerator(_RemoteGenerator):
    """Any server that speaks OpenAI's protocol: OpenAI, vLLM, TensorRT-LLM, llama.cpp, Ollama, `transformers serve`."""

    kind: Literal["openai"]
    base_url: str = "https://api.openai.com/v1"
    """Address up to and including the version."""
    api_key_env: str | None = None
    """Name of the environment variable with the key; default: none is sent."""
    api: Literal["chat", "completion"] = "chat"
    """`chat`: conversations, and plain text as one user turn; `completion`: plain text to be continued."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the server calls the limit; OpenAI's own newer models want `max_completion_tokens`."""
    omit: list[Literal["temperature", "top_p", "stop"]] = Field(default_factory=list)
    """Sampling settings that the server refuses and that are therefore not sent."""
    send_seed: bool = False
    """Send a seed drawn from prompt and index, for servers that can repeat themselves (vLLM, llama.cpp, Ollama)."""


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
    """A Hugging Face model in this cluster's own processes."""

    kind: Literal["local"]
    revision: str | None = None
    """Commit of a hub model."""
    gguf: str | None = None
    """File inside `model` with its weights as GGUF; default: safetensors, or `model` itself is a GGUF file."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and arithmetic."""
    batch_size: int = Field(32, ge=1)
    """Answers written at once by one process."""


class VllmGenerator(_Generator):
    """A model run by vLLM on this cluster's GPUs."""

    kind: Literal["vllm"]
    revision: str | None = None
    """Commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: int = Field(256, ge=1)
    """Answers written at once by one engine."""
    gpus_per_engine: int = Field(1, ge=1)
    """GPUs over which one copy of the model is split (tensor parallelism)."""


RemoteGenerator = OpenAIGenerator | AnthropicGenerator
Generator = Annotated[
    OpenAIGenerator | AnthropicGenerator | LocalGenerator | VllmGenerator, Field(discriminator="kind")
]
