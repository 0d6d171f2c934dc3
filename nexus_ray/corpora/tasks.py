"""Work items on Ray Data: each task writes its own files, whole and under a name of its own, so a retry is harmless.

Results come back in the order of the work items, whatever the parallelism. Ray Data's own progress bars and notices
are kept out of the user's sight.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from nexus_ray.errors import NexusError

Spec = TypeVar("Spec")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Spec], Result],
    specs: Sequence[Spec],
    *,
    cost: Callable[[Spec], float],
    progress: Callable[[str], None],
    label: str,
) -> list[Result]:
    """`[function(spec) for spec in specs]` on the cluster, one CPU each, the costliest first.

    `label` starts the progress lines. Results stand in the order of `specs`.

    Raises the NexusError of the first item that raised one; RuntimeError if Ray was not started by the caller.
    """
    if not specs:
        return []
    import ray

    if not ray.is_initialized():
        raise RuntimeError(f"{label}: Ray is not initialised; call ray.init first (the command line does)")
    import ray.data

    for name in ("ray.data", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        order = sorted(range(len(specs)), key=lambda index: -cost(specs[index]))
        rows = [{"index": index, "spec": pickle.dumps(specs[index])} for index in order]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(_Guarded(function))
        outcomes: list[Any] = [None] * len(rows)
        for done, row in enumerate(dataset.iter_rows(), start=1):
            outcomes[row["index"]] = pickle.loads(row["outcome"])
            if len(rows) >= 10 and done * 10 // len(rows) > (done - 1) * 10 // len(rows):
                progress(f"{label}: {done} of {len(rows)} parts")
    for outcome in outcomes:
        if isinstance(outcome, NexusError):
            raise outcome
    return outcomes


class _Guarded:
    """Runs the function and hands errors meant for the user back as values, so that Ray adds no traceback to them."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self.__name__ = getattr(function, "__name__", "task")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            outcome: Any = self.function(pickle.loads(row["spec"]))
        except NexusError as error:
            outcome = error
        return {"index": row["index"], "outcome": pickle.dumps(outcome)}
