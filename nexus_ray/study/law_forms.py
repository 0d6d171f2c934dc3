"""The forms of the laws, with weak priors on their parameters.

D: tokens of the stage over a unit; r: replay ratio; x = 1 - r. The model's size is fixed.

    new        d-cpt     E + B x^eta / D^b + C / (x + eps)^g     Que et al. 2024 (arXiv:2406.01375), model size fixed
               tokens    E + B / (x D)^b                         only the new tokens count: what d-cpt has to beat
    forgetting injected  E + A D^b / (1 + B r)^g                 after Bethune et al. 2025 (arXiv:2502.06042)
               replayed  E + A D^b / (1 + B r D^k)^g             replay that also grows with the budget

Amplitudes are in units of the fitted values, so that a prior means the same for nats and for bits per byte.

Legend: P parameters, M settings (budget, ratio), S members of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nexus_ray.study.replicates import Floats

Quantity = Literal["new", "forgetting"]


@dataclass(frozen=True)
class Prior:
    """Where a parameter is expected: its median and, in logarithms, the standard deviation around it."""

    median: float
    spread: float
    amplitude: bool = False
    """Measured in units of the fitted values (their lowest for losses, their largest for forgetting)."""
    signed: bool = False
    """May be negative: `median` and `spread` are those of the parameter itself."""


@dataclass(frozen=True)
class Law:
    name: str
    of: Quantity
    formula: str
    priors: Mapping[str, Prior]
    value: Callable[[Mapping[str, Floats], Floats, Floats], Floats]
    """(parameters [S, 1], budget over unit [M], ratio [M]) -> [S, M]"""

    def curve(self, theta: Floats, budget: Floats, ratio: Floats) -> Floats:
        """Values [S, M] for parameters [S, P], logarithms of those that are positive."""
        named = {
            key: theta[:, at, None] if prior.signed else np.exp(theta[:, at, None])
            for at, (key, prior) in enumerate(self.priors.items())
        }
        return self.value(named, budget, ratio)

    def centre(self) -> tuple[Floats, Floats]:
        """Mean and standard deviation [P] of the priors of the transformed parameters."""
        priors = self.priors.values()
        return np.array([p.median if p.signed else np.log(p.median) for p in priors]), np.array(
            [p.spread for p in priors]
        )


_EXPONENT = Prior(0.3, 0.5)
"""Of the budget: 95 % between 0.11 and 0.8; Hoffmann et al. 2022 (arXiv:2203.15556) find 0.28, others 0.1 to 0.5."""
_NEW = {"E": Prior(0.6, 0.5, amplitude=True), "B": Prior(0.4, 0.8, amplitude=True)}
_FORGETTING = {
    "E": Prior(0.0, 0.3, amplitude=True, signed=True),
    "A": Prior(1.0, 0.5, amplitude=True),
    "b": _EXPONENT,
    "B": Prior(100.0, 2.0),
    "g": Prior(0.4, 0.7),
}
LAWS: Mapping[str, Law] = {
    law.name: law
    for law in (
        Law(
            "tokens",
            "new",
            "E + B / (x D)^b",
            {**_NEW, "b": _EXPONENT},
            lambda p, d, r: p["E"] + p["B"] * np.maximum((1 - r) * d, 1e-9) ** -p["b"],
        ),
        Law(
            "d-cpt",
            "new",
            "E + B x^eta / D^b + C / (x + eps)^g",
            {
                **_NEW,
                "eta": Prior(0.3, 1.0),
                "b": _EXPONENT,
                "C": Prior(0.1, 1.0, amplitude=True),
                "eps": Prior(0.1, 1.0),
                "g": Prior(0.5, 1.0),
            },
            lambda p, d, r: p["E"] + p["B"] * (1 - r) ** p["eta"] / d ** p["b"] + p["C"] / (1 - r + p["eps"]) ** p["g"],
        ),
        Law(
            "injected",
            "forgetting",
            "E + A D^b / (1 + B r)^g",
            _FORGETTING,
            lambda p, d, r: p["E"] + p["A"] * d ** p["b"] / (1 + p["B"] * r) ** p["g"],
        ),
        Law(
            "replayed",
            "forgetting",
            "E + A D^b / (1 + B r D^k)^g",
            {**_FORGETTING, "k": Prior(0.5, 0.7)},
            lambda p, d, r: p["E"] + p["A"] * d ** p["b"] / (1 + p["B"] * r * d ** p["k"]) ** p["g"],
        ),
    )
}
