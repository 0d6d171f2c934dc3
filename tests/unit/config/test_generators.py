"""Sections of generators: told apart by kind, closed, and no place for keys."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from nexus_ray.config.generators import Generator, OpenAIGenerator, ThrottleConfig, looks_like_key

ADAPTER: TypeAdapter[Any] = TypeAdapter(Generator)
SECRETS = (
    "sk-proj-4fJ2kQ9vX7bN1mZ5",
    "sk-ant-api03-abcdefghijkl",
    "hf_abcdefghijklmnop",
    "AKIAIOSFODNN7EXAMPLE",
    "0f3c9a1be57d4286903cf1ab77e0d2c4",
)


def test_kinds() -> None:
    kinds = {
        kind: ADAPTER.validate_python({"kind": kind, "model": "m"})
        for kind in ("openai", "anthropic", "local", "served")
    }
    assert {name: section.kind for name, section in kinds.items()} == {name: name for name in kinds}
    assert kinds["openai"].api_key_env is None and kinds["anthropic"].api_key_env == "ANTHROPIC_API_KEY"
    assert kinds["local"].batch_size == 32 and kinds["served"].server == "vllm"


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("field", ["api_key_env", "api_key", "model", "base_url", "token"])
def test_keys_are_refused_and_not_shown(field: str, secret: str) -> None:
    with pytest.raises(ValidationError) as caught:
        OpenAIGenerator.model_validate({"kind": "openai", "model": "m", field: secret})
    assert secret not in str(caught.value)
    assert {error["type"] for error in caught.value.errors()} == {"value_error"}, "of these the loader shows no input"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("api_key", "hello", "put the key into an environment variable"),
        ("api_key_env", "teacher key", "NAME of an environment variable"),
        ("base_url", "ftp://x", "must start with http"),
        ("base_url", "http://host:abc/v1", "a port from 1 to 65535"),
        ("base_url", "http://host:99999/v1", "a port from 1 to 65535"),
        ("base_url", "http://[host/v1", "must start with http"),
        ("base_url", "https://user:pass@host/v1", "must not hold a user"),
        ("base_url", "https://host/v1?api_key=x", "must not hold a user"),
        ("modle", "m", "Extra inputs"),
    ],
)
def test_faults(field: str, value: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        OpenAIGenerator.model_validate({"kind": "openai", "model": "m", field: value})
    assert value not in str(caught.value) or value == "m"


@pytest.mark.parametrize(
    "name",
    [
        "gpt-4o-2024-08-06",
        "claude-opus-4-20250514",
        "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8",
        "meta-llama/Meta-Llama-3.1-70B-Instruct",
        "ft:gpt-4o-mini-2024-07-18:org::9abcDEF1",
        "/data/models/smollm2-1.7b",
        "/mnt/models/Qwen3/8B/checkpoint500",
        "TEACHER_KEY",
        "2026-10-21",
    ],
)
def test_names_of_models_are_no_keys(name: str) -> None:
    assert not looks_like_key(name)


@pytest.mark.parametrize("digits", [40, 64])
def test_a_commit_is_no_key(digits: int) -> None:
    commit = ("93efa2f097d58c2a74874c7e644dbc9b0cee75a2" * 2)[:digits]
    assert OpenAIGenerator.model_validate({"kind": "openai", "model": "m", "revision": commit}).revision == commit
    with pytest.raises(ValidationError, match="looks like a key"):
        OpenAIGenerator.model_validate({"kind": "openai", "model": "m", "revision": "K7" + commit[2:]})


def test_the_start_lies_below_the_ceiling() -> None:
    assert ThrottleConfig(max_in_flight=4, start_in_flight=4).start_in_flight == 4
    with pytest.raises(ValidationError, match="lower the one or raise the other"):
        ThrottleConfig(max_in_flight=4, start_in_flight=5)
