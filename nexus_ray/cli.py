"""`nexus-ray VERB CONFIG [path=value ...] [--dry-run]`: the verbs, their exit codes, and errors without tracebacks.

Exit codes: 0 done; 2 bad configuration (all faults, by path); 1 failed; 130 interrupted with a checkpoint.
Heavy libraries are imported inside the verbs, so that `--help` and configuration faults answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import getpass
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nexus_ray import __version__
from nexus_ray.config import RunConfig, detect_hardware, json_schema, load_config, resolve
from nexus_ray.errors import ConfigError, NexusError

if TYPE_CHECKING:
    from nexus_ray.session import Demand

DONE, FAILED, BAD_CONFIG, INTERRUPTED = 0, 1, 2, 130


# --- verbs -------------------------------------------------------------------------------------------------------


def _load(args: argparse.Namespace) -> RunConfig:
    """The resolved config of the command line."""
    from nexus_ray.session import check_job_storage

    config = load_config(args.config, args.overrides)
    check_job_storage(config.storage)
    return resolve(config, detect_hardware())


def _say(message: str) -> None:
    print(message, flush=True)


@contextlib.contextmanager
def _started(config: RunConfig, demands: list[Demand] | None = None) -> Iterator[None]:
    """Storage proved writable and Ray running."""
    from nexus_ray.session import ray_session
    from nexus_ray.storage import Storage

    Storage(config.storage).check_writable()
    with ray_session(config, demands):
        yield


def prepare(args: argparse.Namespace) -> int:
    """fetch the corpora, train or fetch the tokenizer, write token shards"""
    config = _load(args)
    if args.dry_run:
        return _show_plan(config)
    from nexus_ray.corpora.prepare import check_prepared, find_prepared
    from nexus_ray.corpora.prepare import prepare as build
    from nexus_ray.models.local import with_local_model

    config = with_local_model(config, progress=_say)
    prepared = find_prepared(config)
    if prepared is None:
        with _started(config):
            prepared = build(config, progress=_say)
    prepared = check_prepared(prepared, config.data.on_corrupt, progress=_say)
    for name, domain in prepared.domains.items():
        documents = f"{domain.train.documents:,} + {domain.held_out.documents:,} held-out documents"
        answers = ""
        if domain.train.seq_len is not None:
            filled = f"rows of {domain.train.seq_len} are {domain.train.packing_efficiency:.1%} full"
            answers = f", {domain.train.targets:,} of them in answers, {filled},"
        _say(f"{name}: {domain.train.tokens:,} training tokens{answers} in {documents} ({domain.source})")
    return DONE


def synthesize(args: argparse.Namespace) -> int:
    """write the text of synthetic domains with their generators, filter it and check it"""
    config = _load(args)
    if not config.synthesis:
        raise ConfigError(f"synthesis: {args.config} has no job; add `synthesis: {{DOMAIN: {{generator: ...}}}}`")
    domains = args.domain.split(",") if args.domain else list(config.synthesis)
    if unknown := [name for name in domains if name not in config.synthesis]:
        raise ConfigError(f"--domain {unknown[0]}: no such job; jobs of {args.config}: {', '.join(config.synthesis)}")
    from nexus_ray.session import job_demand

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray complains of every actor pool of its own Ray Data
    with _started(config, [job_demand(config.synthesis[name]) for name in domains]):
        from nexus_ray.synthesis.show import show_outcome, show_plan

        for name in domains:
            if args.dry_run:
                show_plan(config, name)
                continue
            from nexus_ray.synthesis.job import synthesize as run

            show_outcome(name, run(config, name, progress=_say))
    return DONE


def review(args: argparse.Namespace) -> int:
    """decide on flagged rows of a synthesis job in a local page"""
    from nexus_ray.report.desk import review_ledger

    folder = _ledger_folder(args)
    if args.dry_run:
        _say(f"would serve the review queue of {folder}")
        return DONE
    review_ledger(folder, who=args.who or getpass.getuser(), port=args.port, say=_say)
    return DONE


def lineage(args: argparse.Namespace) -> int:
    """tell where a synthetic row comes from, or which documents a stage was trained on"""
    from nexus_ray.report.lineage import show_lineage

    show_lineage(_run_folder(args.config, ()), args.what, out=args.out, say=_say)
    return DONE


def _ledger_folder(args: argparse.Namespace) -> str:
    """The folder of a ledger: itself, or that of a config's job."""
    if "://" in args.config or Path(args.config).is_dir():
        return str(args.config)
    config = resolve(load_config(args.config, args.overrides), detect_hardware())
    jobs = list(config.synthesis)
    if args.domain is None and len(jobs) != 1:
        raise ConfigError(f"{args.config} has the jobs {', '.join(jobs) or 'none'}; name one with --domain")
    return f"{config.storage}/{config.name}/synthesis/{args.domain or jobs[0]}"


def train(args: argparse.Namespace) -> int:
    """train a config of one stage"""
    config = _load(args)
    if len(config.stages) > 1:
        names = ", ".join(stage.name for stage in config.stages)
        raise ConfigError(
            f"stages: `train` runs one stage, and {args.config} has {len(config.stages)} ({names}); "
            f"run them in turn with `nexus-ray roadmap {args.config}`"
        )
    return _run(config, args)


def roadmap(args: argparse.Namespace) -> int:
    """train the stages in turn, score every domain at each transition, write the report"""
    return _run(_load(args), args)


def _run(config: RunConfig, args: argparse.Namespace) -> int:
    if args.dry_run:
        return _show_plan(config)
    with _started(config):
        from nexus_ray.report.page import write_report
        from nexus_ray.roadmap import run_roadmap

        run_roadmap(config, report=write_report)
    return DONE


def evaluate(args: argparse.Namespace) -> int:
    """score the models of a run again on the held-out documents"""
    config = _load(args)
    if args.dry_run:
        return _show_plan(config)
    with _started(config):
        from nexus_ray.report.page import write_report
        from nexus_ray.roadmap import evaluate_run

        evaluate_run(config, report=write_report)
    return DONE


def report(args: argparse.Namespace) -> int:
    """write report.html from a run's record (names a config or a run's folder)"""
    from nexus_ray.report.page import write_report

    folder = _run_folder(args.config, args.overrides)
    if args.dry_run:
        _say(f"would write report.html in {folder}")
        return DONE
    from nexus_ray.storage import Storage

    _say(f"report: {write_report(Storage(folder))}")
    return DONE


def compare(args: argparse.Namespace) -> int:
    """put several runs side by side, or show a study (names folders, or configs)"""
    from nexus_ray.report.compare import compare_runs
    from nexus_ray.storage import Storage

    if (study := _study_folder(args.runs[0])) is not None:
        if len(args.runs) > 1:
            raise ConfigError(f"{args.runs[0]} is a study, which is shown by itself; drop {' '.join(args.runs[1:])}")
        from nexus_ray.report.study_folder import show_study

        show_study(Storage(study), args.out)
        return DONE
    runs = [Storage(_run_folder(run, ())) for run in args.runs]
    compare_runs(runs, out=args.out)
    return DONE


def _study_folder(target: str) -> str | None:
    """Folder of a study: the folder itself, or where the study file of that name puts it; None if it is neither."""
    from nexus_ray.config.source import read_yaml

    if "://" in target or Path(target).is_dir():
        from nexus_ray.storage import Storage

        return target if Storage(target).exists("study.json") else None
    if not {"base", "space"} <= set(read_yaml(Path(target))):
        return None
    from nexus_ray.study.load import load_study

    return load_study(Path(target)).folder.uri


def _run_folder(target: str, overrides: Sequence[str]) -> str:
    """Folder or URI of a run: the folder itself, or where the config of that name puts it."""
    if "://" in target or Path(target).is_dir():
        if overrides:
            raise ConfigError(
                f"{target} is a run's folder, so overrides ({' '.join(overrides)}) have no effect; drop them"
            )
        return target
    config = resolve(load_config(target, overrides), detect_hardware())
    return f"{config.storage}/{config.name}"


def doctor(args: argparse.Namespace) -> int:
    """check this machine and say the remedy for what is missing"""
    from nexus_ray.doctor import run_doctor

    config = load_config(args.config, args.overrides) if args.config else None
    return run_doctor(config, deep=args.deep)


def schema(args: argparse.Namespace) -> int:
    """print the JSON schema of config files, for editors"""
    _say(json.dumps(json_schema(), indent=2))
    return DONE


def grid(args: argparse.Namespace) -> int:
    """run a grid of configs and seeds one after the other, skipping what is done"""
    from nexus_ray.grid import run_grid

    only = args.only.split(",") if args.only else ()
    return run_grid(Path(args.config), overrides=args.overrides, only=only, dry_run=args.dry_run)


def tune(args: argparse.Namespace) -> int:
    """search settings: run a study's trials on Ray Tune, stop the poor ones early, go on with what is not done"""
    from nexus_ray.report.page import write_report
    from nexus_ray.report.study_folder import write_study
    from nexus_ray.tune import run_study

    return run_study(
        Path(args.config),
        args.overrides,
        dry_run=args.dry_run,
        retry=args.retry,
        say=_say,
        report=write_report,
        summarise=write_study,
    )


def _show_plan(config: RunConfig) -> int:
    from nexus_ray.dry_run import print_plan

    print_plan(config)
    return DONE


# --- the command line --------------------------------------------------------------------------------------------

VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    verb.__name__: verb
    for verb in (
        prepare,
        synthesize,
        review,
        lineage,
        train,
        roadmap,
        evaluate,
        report,
        compare,
        grid,
        tune,
        doctor,
        schema,
    )
}


class _Parser(argparse.ArgumentParser):
    """Usage faults in the house's words: the value, and what was probably meant."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"nexus-ray: {message}", file=sys.stderr)
        raise SystemExit(BAD_CONFIG)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = difflib.get_close_matches(str(value), list(action.choices), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"verbs are {', '.join(action.choices)}"
            raise argparse.ArgumentError(None, f"no verb {value!r}; {hint}")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(prog="nexus-ray", description="Teach a language model new material without losing the old.")
    parser.add_argument("--version", action="version", version=f"nexus-ray {__version__}")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        command = commands.add_parser(name, help=verb.__doc__, description=verb.__doc__)
        if name == "compare":
            command.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run or study, or its config")
            command.add_argument("--out", type=Path, help="also write the comparison as a page")
        elif name == "doctor":
            command.add_argument("config", nargs="?", help="also check what this config needs")
            command.add_argument("--deep", action="store_true", help="also start Ray and run a task (seconds)")
        elif name != "schema":
            what = "YAML file, or folder of a run" if name in ("report", "review", "lineage") else "YAML file"
            command.add_argument("config", metavar="CONFIG", help=what)
            command.add_argument("--dry-run", action="store_true", help="print what would be done, do nothing")
            if name in ("synthesize", "review"):
                command.add_argument("--domain", metavar="NAME", help="only this job of the config")
            if name == "review":
                command.add_argument("--who", help="name that stands with the decisions; default: the user's")
                command.add_argument("--port", type=int, default=0, help="port on this machine; default: any free one")
            if name == "lineage":
                command.add_argument("what", metavar="WHAT", help="id of a row or of a document, or name of a stage")
                command.add_argument("--out", type=Path, help="write all of it as JSON lines to this file")
            if name == "tune":
                command.add_argument("--retry", action="store_true", help="run failed trials again")
            if name == "grid":
                command.add_argument("--only", metavar="ARM,ARM", help="run these arms; other processes may run others")
        if name not in ("compare", "schema", "lineage"):
            command.add_argument(
                "overrides", nargs="*", default=[], metavar="path=value", help="such as training.seq_len=128"
            )
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the command line, with overrides allowed before and after options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"{args.verb}: unknown option {unknown[0]}; `nexus-ray {args.verb} --help` lists them")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    from nexus_ray.session import quiet_environment

    quiet_environment()
    try:
        return VERBS[args.verb](args)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print("nexus-ray: interrupted before a checkpoint was due; run the same command again", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    """Print what happened, without a traceback unless NEXUS_DEBUG is set; returns the exit code."""
    if os.environ.get("NEXUS_DEBUG"):
        traceback.print_exception(error)
    known = find_nexus_error(error)
    if known is not None:
        print(f"nexus-ray: {known}", file=sys.stderr)
        return known.exit_code
    first = next(iter(str(error).strip().splitlines()), "")
    print(f"nexus-ray: failed with {type(error).__name__}: {first}", file=sys.stderr)
    print(f"  full log: {_save_traceback(error)} (NEXUS_DEBUG=1 shows it here)", file=sys.stderr)
    return FAILED


def find_nexus_error(error: BaseException) -> NexusError | None:
    """The NexusError that an error is, or that Ray wrapped (task, worker group, controller errors); outermost first."""
    queue: list[BaseException] = [error]
    seen: set[int] = set()
    while queue:
        current = queue.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        inner = [current.__cause__, getattr(current, "cause", None), getattr(current, "controller_failure", None)]
        inner += [] if current.__suppress_context__ else [current.__context__]
        failures = getattr(current, "worker_failures", None)
        inner += list(failures.values()) if isinstance(failures, dict) else []
        # Ray's task errors also inherit the class of their cause, with a traceback as message: prefer the cause.
        if isinstance(current, NexusError) and not isinstance(getattr(current, "cause", None), BaseException):
            return current
        queue += [item for item in inner if isinstance(item, BaseException)]
    return None


def _save_traceback(error: Exception) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="nexus-ray-", suffix=".log", delete=False) as file:
        file.writelines(traceback.format_exception(error))
    return file.name


if __name__ == "__main__":
    sys.exit(main())
