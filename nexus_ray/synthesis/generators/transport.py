"""What both clients send the same way."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

import httpx2

from nexus_ray.config.generators import RemoteGenerator
from nexus_ray.synthesis.rows import Sampling

INDEX_HEADER = "x-rollout-index"
"""Which of the several times that a prompt is asked; proxies that cache must tell them apart."""
CONNECT_S = 10.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Never reached through the proxy that the environment may name: it would read prompts, and find nothing there."""
POOL_CALLS = 16


def http_clients(config: RemoteGenerator) -> list[httpx2.AsyncClient]:
    """Pools to be used in turn, so many that each holds about `POOL_CALLS` calls when all are in flight.

    A pool looks at each of its connections twice per call, which takes a fifth of a call's processor time at 64 in
    flight. No redirects are followed: a key would travel along.
    """
    most = config.throttle.max_in_flight
    verify = httpx2.create_ssl_context()
    return [
        httpx2.AsyncClient(
            verify=verify,
            timeout=httpx2.Timeout(config.timeout_s, connect=min(CONNECT_S, config.timeout_s)),
            limits=httpx2.Limits(max_connections=most, max_keepalive_connections=2 * POOL_CALLS),
            follow_redirects=False,
            trust_env=urlsplit(config.base_url).hostname not in LOOPBACK,
        )
        for _ in range(math.ceil(most / POOL_CALLS))
    ]


def sampling_fields(sampling: Sampling, omit: Collection[str]) -> dict[str, Any]:
    """Temperature, top_p and stop, as far as they are to be sent."""
    fields: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    return {name: value for name, value in fields.items() if name not in omit}
