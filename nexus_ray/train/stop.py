"""How a running stage is asked to stop: a file in the run's folder, which works across machines."""

from __future__ import annotations

import threading
import time

from nexus_ray.storage import Storage

STOP_FILE = ("control", "stop")


class StopWatch:
    """Looks twice a second, beside the training, whether the run was asked to stop."""

    def __init__(self, run: Storage) -> None:
        self.asked = False
        self._run = run
        threading.Thread(target=self._look, daemon=True, name="stop-watch").start()

    def _look(self) -> None:
        while not self.asked:
            self.asked = self._run.exists(*STOP_FILE)
            time.sleep(0.5)
