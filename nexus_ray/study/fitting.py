"""Robust fits of small non-linear laws from many starts at once: Levenberg-Marquardt on Huber's loss, in plain numpy.

All starts (and all resamples of the data) are one batch, so that a fit from a hundred starts costs hardly more than
one. Parameters are held inside a box; one that ends on its wall was not determined by the data.

Legend: S members of the batch, P parameters, M measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Curve = Callable[[Floats], Floats]
"""Parameters [S, P] to values [S, M]."""
_STEP = 1e-6
_TOLERANCE = 1e-7
"""Relative fall of the loss in one step below which a member has arrived."""
_STUCK = 1e6
"""Damping at which no step lowers a member's loss."""


@dataclass(frozen=True)
class Fits:
    """Where each member of the batch ended."""

    parameters: Floats
    """[S, P]"""
    losses: Floats
    """[S] mean Huber loss of the scaled residuals."""

    def best(self) -> Floats:
        """Parameters [P] of the lowest loss."""
        return np.asarray(self.parameters[int(self.losses.argmin())])


def huber(residuals: Floats, delta: float) -> Floats:
    """Mean over the last axis of Huber's (1964) loss: a parabola up to `delta`, a line beyond."""
    size = np.abs(residuals)
    return np.asarray(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).mean(axis=-1))


def fit(
    curve: Curve, starts: Floats, target: Floats, scale: Floats, box: Floats, *, delta: float, steps: int = 100
) -> Fits:
    """Lower Huber's loss of `(curve - target) / scale` from every start.

    `starts` [S, P]; `target` and `scale` [M] or [S, M]; `box` [P, 2] lowest and highest value. Each step solves the
    damped normal equations with Huber's weights; a step that does not lower the loss is not taken. A parameter on its
    wall that would leave the box stays there and the others move without it.
    """
    theta = np.clip(starts, box[:, 0], box[:, 1])
    target = np.broadcast_to(target, (len(theta), target.shape[-1]))
    scale = np.broadcast_to(scale, target.shape)
    loss = huber((curve(theta) - target) / scale, delta)
    damping, moving = np.full(len(theta), 1e-2), np.arange(len(theta))
    for _ in range(steps):
        here = theta[moving]
        tried = _step(curve, here, target[moving], scale[moving], damping[moving], box, delta)
        lower = huber((curve(tried) - target[moving]) / scale[moving], delta)
        before, better = loss[moving], lower < loss[moving]
        theta[moving] = np.where(better[:, None], tried, here)
        loss[moving] = np.where(better, lower, before)
        damping[moving] *= np.where(better, 0.25, 5.0)
        settled = np.where(better, before - lower < _TOLERANCE * before, damping[moving] > _STUCK)
        moving = moving[~settled]
        if not len(moving):
            break
    return Fits(theta, loss)


def _step(
    curve: Curve, theta: Floats, target: Floats, scale: Floats, damping: Floats, box: Floats, delta: float
) -> Floats:
    """Where one damped step leads, inside the box: [S, P]."""
    low, high = box[:, 0], box[:, 1]
    value = curve(theta)
    residual = (value - target) / scale
    jacobian = _jacobian(curve, theta, value, scale, high)
    weight = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
    weighted = np.swapaxes(jacobian * weight[..., None], 1, 2)  # [S, P, M]
    gradient = (weighted @ residual[..., None])[..., 0]
    free = (~(((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0)))).astype(float)
    gradient, normal = gradient * free, (weighted @ jacobian) * free[:, :, None] * free[:, None, :]
    diagonal = np.einsum("spp->sp", normal)
    damped = normal + (damping[:, None] * diagonal + 1e-12)[..., None] * np.eye(theta.shape[1])
    return np.clip(theta - np.linalg.solve(damped, gradient[..., None])[..., 0], low, high)


def _jacobian(curve: Curve, theta: Floats, value: Floats, scale: Floats, high: Floats) -> Floats:
    """[S, M, P] by forward differences, backward at the upper wall."""
    columns = []
    for place in range(theta.shape[1]):
        moved = theta.copy()
        sign = np.where(theta[:, place] + _STEP > high[place], -_STEP, _STEP)
        moved[:, place] += sign
        columns.append((curve(moved) - value) / sign[:, None] / scale)
    return np.stack(columns, axis=-1)
