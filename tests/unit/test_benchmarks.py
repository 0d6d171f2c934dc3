"""The benchmarks import, understand their arguments and compute what they claim; their figures are `make bench`'s."""

from __future__ import annotations

import inspect
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from nexus_ray.corpora.reader import TokenReader
from nexus_ray.train.agree import WorkerContext
from tests.benchmarks.__main__ import NAMES, load, machine, parse, settings_of
from tests.benchmarks.contestants import PausingHooks, await_baton, serve, write_baton
from tests.benchmarks.figures import Bar, Outcome, Segment, growth, paired_ratio, table, write_record
from tests.benchmarks.material import EOS, bench_config, bench_stream, write_corpus
from tests.benchmarks.processes import Watch, descendants


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_takes_its_settings(name: str) -> None:
    module = load(name)
    wanted = set(inspect.signature(module.run).parameters) - {"folder"}
    assert set(module.SETTINGS) == set(module.QUICK) == wanted


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse([]).names == list(NAMES)
    asked = parse(["precision", "tax", "--quick"])
    assert asked.names == ["tax", "precision"] and asked.quick and asked.out is None
    with pytest.raises(SystemExit):
        parse(["taxes"])
    assert "no benchmark is called taxes" in capsys.readouterr().err


def test_settings_change_where_they_are_known() -> None:
    module = load("tax")
    changed = settings_of(module, quick=False, changes=["rounds=9", 'shapes=["1 worker, 1 thread"]', "stages=1"])
    assert changed == module.SETTINGS | {"rounds": 9, "shapes": ["1 worker, 1 thread"]}


def test_interleaved_ratios_do_not_see_a_drift() -> None:
    """A machine that loses a tenth a segment, and a stage that costs nothing."""
    outer, inner = [100.0, 80.0, 60.0], [90.0, 70.0]
    assert paired_ratio(inner, outer) == [1.0, 1.0]
    with pytest.raises(ValueError, match="between 3 others"):
        paired_ratio(inner, inner)


def test_bars_have_a_direction() -> None:
    assert Bar("share", 0.25, 0.25).met and not Bar("share", 0.24, 0.25).met
    assert Bar("seconds", 14.0, 15.0, at_most=True).met and not Bar("seconds", 16.0, 15.0, at_most=True).met
    assert str(Bar("seconds", 16.0, 15.0, at_most=True)) == "MISS  seconds: 16.000 (at most 15)"


def test_growth_is_of_what_both_have() -> None:
    assert growth({"a": 100.0, "b": 1.0}, {"a": 110.0, "c": 5.0}) == pytest.approx({"a": 0.1})


def test_a_segment_is_timed_by_the_clock() -> None:
    assert Segment(4, 2.0).tokens_per_second(100) == 200.0


def test_the_record_holds_every_sample(tmp_path: Path) -> None:
    outcome = Outcome("t", ("", "rate"), [("a", 12345.6), ("b", None)], [Bar("x", 1.0, 0.5)], ["n"], {"raw": [1, 2]})
    text = table(outcome)
    assert "12,346" in text and "ok    x: 1.000" in text and "note: n" in text
    path = write_record(outcome, what="tax", folder=tmp_path, machine=machine(), settings={"rounds": 1})
    record = json.loads(path.read_text())
    assert path.name.endswith("-tax.json") and record["samples"] == {"raw": [1, 2]}
    assert record["versions"]["torch"] and record["hardware"]["cpus"] >= 1 and record["bars"][0]["met"]


def test_synthetic_shards_read_as_ours(tmp_path: Path) -> None:
    manifests = [write_corpus(tmp_path, name, 70_000, seed=i) for i, name in enumerate(("new", "old"))]
    reader = TokenReader(manifests[0], 256)
    rows = reader.read(np.arange(reader.num_rows))
    ends = np.flatnonzero(rows[:-1, :-1].ravel() == EOS)
    assert manifests[0].tokens == 70_000 and len(ends) >= manifests[0].documents - 2
    config = bench_config(tmp_path, ("new", "old"), "training.token_budget=81920")
    stream = bench_stream(config, manifests)
    drawn = stream.sequences(0, stream.steps)
    assert stream.steps == 10 and int(drawn.replayed.sum()) == 32


def test_batons_pass_from_hand_to_hand(tmp_path: Path) -> None:
    """The hooks of a stage stop after a segment until told to go on; a process serves segments until the end."""

    context = WorkerContext(0, 1, torch.device("cpu"))
    stage = threading.Thread(target=PausingHooks(str(tmp_path)).during, args=(None, context))
    stage.start()
    told = await_baton(tmp_path, "done-0")
    assert told["ended"] > 0 and told["peak_memory_bytes"] > 1e8 and stage.is_alive()
    write_baton(tmp_path, "go-1")
    stage.join(timeout=10)
    assert not stage.is_alive()

    folder = tmp_path / "process"
    folder.mkdir()
    server = threading.Thread(target=serve, args=(folder, lambda: [0.5]), kwargs={"rank": 0})
    server.start()
    assert await_baton(folder, "done-0") == {"step_seconds": [0.5]}
    write_baton(folder, "end")
    server.join(timeout=10)
    assert not server.is_alive()
    with pytest.raises(RuntimeError, match="has ended"):
        await_baton(folder, "done-9", lambda: False)


def test_processes_are_watched() -> None:
    with Watch() as watch:
        assert descendants() is not None
    assert all(peak > 0 for peak in watch.peaks.values())
