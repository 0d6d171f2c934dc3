"""Mirror a run to TensorBoard: event files in `<run>/tensorboard/`, one folder per stage, tokens on the x axis.

Written by tensorboardX, which Ray Tune brings along. As with W&B, the run record is the truth and this a copy: what
goes wrong here ends it with one warning.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_ray.storage import Storage

_LOG = logging.getLogger(__name__)
FOLDER = "tensorboard"


class Board:
    """Event files of one run; does nothing unless `enabled`. No method raises."""

    def __init__(self, folder: Storage, *, enabled: bool) -> None:
        self._storage = folder
        self._enabled = enabled
        self._writer: Any = None
        self._root: Path | None = None

    def open(self, label: str) -> None:
        """The files of the stage `label`, in a folder of their own."""
        self.close()
        self._quietly(lambda: self._open(label))

    def log(self, metrics: Mapping[str, Any]) -> None:
        """The numbers of one line of metrics, over its `tokens`."""
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        step = numbers.pop("tokens", None)
        if self._writer is not None and step is not None:
            self._quietly(lambda: [self._writer.add_scalar(key, value, step) for key, value in numbers.items()])

    def scores(self, scores: Mapping[str, Any]) -> None:
        """The content of `scores.json`: each domain's bits per byte over the number of the stage, 0 before training."""
        self.open("scores")
        for row, values in enumerate(scores.get("bits_per_byte") or []):
            for domain, value in zip(scores.get("domains") or [], values, strict=False):
                if self._writer is not None and value is not None:
                    self._quietly(lambda d=domain, v=value, r=row: self._writer.add_scalar(f"bits_per_byte/{d}", v, r))
        self.close()

    def close(self) -> None:
        """Write what is left; in an object store, put the files beside the record."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._quietly(writer.close)
            if self._root is not None and not self._storage.is_local:
                root = self._root
                self._quietly(lambda: self._storage.upload(root, FOLDER))

    def _open(self, label: str) -> None:
        from tensorboardX import SummaryWriter

        if self._root is None:
            local = self._storage.is_local
            self._root = (
                self._storage.local_path / FOLDER if local else Path(tempfile.mkdtemp(prefix="nexus-ray-tensorboard-"))
            )
        self._writer = SummaryWriter(str(self._root / label), flush_secs=10)

    def _quietly(self, action: Any) -> None:
        if not self._enabled:
            return
        try:
            action()
        except Exception as error:  # a copy must not stop the run, whatever its library raises
            self._enabled, self._writer = False, None
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            _LOG.warning(
                f"tracking.tensorboard=true: {reason}; it is off for the rest of this run (training goes on, the run "
                "record has everything)"
            )
