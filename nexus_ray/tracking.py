"""Mirror a run to Weights & Biases: one W&B run per stage in one group, tokens on the x axis, the scores as a table.

TensorBoard's event files are written beside it, by `tracking_board`.

The run record is the truth and this only a copy, so nothing here may stop or delay training: a missing package, login
or network, or any failure inside `wandb`, ends in one warning and silence. Configuration is sent without secrets.
"""

from __future__ import annotations

import logging
import netrc
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from nexus_ray.config.tree import RunConfig, WandbConfig
from nexus_ray.storage import Storage
from nexus_ray.tracking_board import Board

_LOG = logging.getLogger(__name__)
INIT_TIMEOUT_S = 20.0
"""How long the start of a W&B run may wait for the server."""
FINISH_TIMEOUT_S = 30.0
"""How long its end may wait for uploads; what is left stays on disk, for `wandb sync`."""
_HIDDEN = "(hidden)"
_SECRET_KEY = re.compile(
    r"(^|[_.-])(api_?key|access_?key(_id)?|secret(_?key)?|password|passwd|credentials?|token|authorization)$",
    re.IGNORECASE,
)
_SECRET_LINE = re.compile(
    r"(?im)^(\s*(?:[\w-]*[_-])?(?:api_?key|access_?key(?:_id)?|secret(?:_?key)?|password|passwd|credentials?|token"
    r"|authorization)\s*:[ \t]+)(?!null\b|~)(\S.*)$"
)
_USER_INFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@'\"<>\\]+@", re.IGNORECASE)
_SECRET_QUERY = re.compile(
    r"((?:[?&]|&amp;|\\u0026)(?:access_?key|secret_?key|session_?token|token|key|sig|signature|x-amz-[a-z-]+|api_?key)=)[^&\s'\"<>\\,;)]+",
    re.IGNORECASE,
)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested mapping by dotted path; lists are leaves."""
    out: dict[str, Any] = {}
    for key, part in value.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(part, Mapping) and part:
            out.update(flatten(part, path))
        else:
            out[path] = part
    return out


def redact_text(text: str) -> str:
    """The text without credentials inside URLs or behind YAML keys that name a secret."""
    return _SECRET_LINE.sub(rf"\1{_HIDDEN}", redact_addresses(text))


def redact_addresses(text: str) -> str:
    """The text without credentials inside URLs; HTML stays whole."""
    return _SECRET_QUERY.sub(rf"\1{_HIDDEN}", _USER_INFO.sub(rf"\1{_HIDDEN}@", text))


def public_config(config: RunConfig) -> dict[str, Any]:
    """The configuration by dotted path, without secrets."""
    return public_values(config.model_dump(mode="json"))


def public_values(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested mapping by dotted path, without secrets."""
    out: dict[str, Any] = {}
    for path, value in flatten(tree).items():
        if value is not None and _SECRET_KEY.search(path):
            value = _HIDDEN
        out[path] = public_value(value)
    return out


def public_value(value: Any) -> Any:
    """Plain data without the credentials inside its texts."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {key: public_value(part) for key, part in value.items()}
    return [public_value(part) for part in value] if isinstance(value, list | tuple) else value


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def has_login(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether W&B credentials can be found without asking anybody: in the environment or in a netrc file."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    given = environment.get("NETRC")
    for path in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if netrc.netrc(path).authenticators(host):
                return True
    return False


class StageTracker:
    """The W&B run of one stage; `log` does nothing once the tracker has gone quiet."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Send one line of metrics: its numbers, over its `tokens`."""
        self._tracker._log_line(metrics)


class Mirror:
    """One W&B run at a time, in one group; whatever goes wrong ends the mirror with one warning, never the work."""

    def __init__(self, settings: WandbConfig, folder: Storage | str | Path, *, group: str, stats: bool = False) -> None:
        self._settings, self._group, self._stats = settings, group, stats
        self._mode: str = self._settings.mode
        self._storage = folder if isinstance(folder, Storage) else Storage(str(folder))
        self._wandb: Any = None
        self._run: Any = None
        self._folder: Path | None = None
        self._identity = ""
        self._warned = False

    @property
    def active(self) -> bool:
        """Whether anything is still being sent or written."""
        return self._mode != "disabled"

    def _quietly(self, action: Any, what: str) -> bool:
        """Do something with wandb; whatever goes wrong there ends the mirror, never the run."""
        if not self.active:
            return False
        try:
            action()
        except Exception as error:  # wandb raises many kinds, none of which may reach training
            self._give_up(f"could not {what}: {_reason(error)}")
            return False
        return True

    def _give_up(self, reason: str) -> None:
        self._warn(
            f"tracking.wandb.mode={self._settings.mode}: {reason}; W&B is off for the rest of this run "
            "(training goes on, the run record has everything)"
        )
        self._mode, run, self._run = "disabled", self._run, None
        if run is not None:
            with suppress(Exception):  # already failed and reported; this only lets go of its process
                run.finish(exit_code=1)

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            _LOG.warning(message)

    def _prepare(self) -> None:
        """Import wandb, find a place for its files and the identity that makes W&B ids stable over restarts."""
        if self._wandb is not None:
            return
        os.environ.setdefault("WANDB_SILENT", "true")  # read when wandb is set up, before any settings of ours
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # offline means offline
        import wandb

        logging.getLogger("wandb").setLevel(logging.CRITICAL)
        folder = (
            self._storage.local_path if self._storage.is_local else Path(tempfile.mkdtemp(prefix="nexus-ray-wandb-"))
        )
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        if not os.access(folder / "wandb", os.W_OK):
            raise PermissionError(f"{folder / 'wandb'} is not writable")
        if self._storage.exists("wandb", "identity.json"):
            self._identity = str(self._storage.read_json("wandb", "identity.json")["identity"])
        else:
            self._identity = secrets.token_hex(4)
            self._storage.write_json({"identity": self._identity}, "wandb", "identity.json")
        self._wandb, self._folder = wandb, folder

    def _open(self, label: str, **described: Any) -> None:
        """Start the W&B run `label`, described by `job_type`, `name` and `config`."""
        if self._mode == "online" and not has_login():
            self._warn(
                "tracking.wandb.mode=online, but there is no W&B login (WANDB_API_KEY, or `wandb login`); "
                "writing offline instead, `wandb sync RUN/wandb/offline-*` uploads it later"
            )
            self._mode = "offline"
        if not self.active or not self._quietly(self._prepare, "be prepared"):
            return
        try:
            self._run = self._init(label, **described)
        except Exception as error:  # wandb raises many kinds, none of which may reach training
            if self._mode != "online":
                self._give_up(f"could not start a W&B run: {_reason(error)}")
                return
            self._warn(
                f"tracking.wandb.mode=online: no W&B run could be started ({_reason(error)}); "
                f"writing offline instead, `wandb sync` uploads it later"
            )
            self._mode = "offline"
            if self._quietly(lambda: self._wandb.teardown(exit_code=1), "let go of a failed start"):
                self._open(label, **described)  # the service had kept the id

    def _init(self, label: str, **described: Any) -> Any:
        """A W&B run; its id depends on the folder and the label alone."""
        run = self._wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            group=self._group,
            id=f"{self._identity}-{label}",
            resume="allow" if self._mode == "online" else None,
            dir=str(self._folder),
            mode=self._mode,
            reinit="finish_previous",
            settings=self._client_settings(),
            **described,
        )
        run.define_metric("tokens", hidden=True)
        run.define_metric("*", step_metric="tokens")
        return run

    def _client_settings(self) -> Any:
        """Silent, short-tempered, and looking at nothing but what it is given."""
        wanted = {
            "silent": True,
            "quiet": True,
            "show_info": False,
            "show_warnings": False,
            "console": "off",
            "init_timeout": INIT_TIMEOUT_S,
            "finish_timeout": FINISH_TIMEOUT_S,
            "login_timeout": 5.0,
            "disable_git": True,
            "disable_code": True,
            "x_disable_meta": True,  # would record the command line, which may hold secrets
            "x_disable_stats": not self._stats,
            "x_graphql_retry_max": 3,
            "x_file_stream_retry_max": 10,
            "x_file_transfer_retry_max": 5,
        }
        known = self._wandb.Settings.model_fields
        return self._wandb.Settings(**{key: value for key, value in wanted.items() if key in known})

    def _log(self, metrics: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        self._quietly(lambda: self._run.log(numbers), "log metrics")

    def _log_scores(self, scores: Mapping[str, Any]) -> None:
        domains = [str(name) for name in scores.get("domains") or []]
        rows = zip(scores.get("stages") or [], scores.get("bits_per_byte") or [], strict=False)
        table = self._wandb.Table(columns=["stage", *domains], data=[[stage, *values] for stage, values in rows])
        self._run.log({"scores/bits_per_byte": table})
        forgetting = scores.get("forgetting") or {}
        summary = {f"forgetting/{key}": forgetting.get(key) for key in ("mean", "max")}
        summary["backward_transfer"] = scores.get("backward_transfer")
        self._run.summary.update({key: value for key, value in summary.items() if value is not None})

    def _log_report(self, page: Path, name: str) -> None:
        artifact = self._wandb.Artifact(name, type="report")
        artifact.add_file(str(page))
        self._run.log_artifact(artifact)

    def _copy_out(self) -> None:
        """Put the files beside a record in an object store, as they would be in a local one."""
        if self._folder is not None and not self._storage.is_local:
            folder = self._folder
            self._quietly(lambda: self._storage.upload(folder / "wandb", "wandb"), "copy its files to the storage")

    def _close(self, *, exit_code: int = 0) -> None:
        run, self._run = self._run, None
        if run is not None:
            self._quietly(lambda: run.finish(exit_code=exit_code), "end a W&B run")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._close(exit_code=int(error is not None))


class Tracker(Mirror):
    """Mirror of one run, used by the roadmap driver alone (never by workers).

        tracker = Tracker(config, run_dir)
        with tracker.stage("stories", 1) as stage:
            stage.log({"tokens": 8192, "train/loss": 3.2})
        tracker.finish(scores)

    No method raises. A stage's W&B run stays open after its block, so that `finish` can add the scores to the last one.
    """

    def __init__(self, config: RunConfig, run_dir: Storage | str | Path) -> None:
        super().__init__(config.tracking.wandb, run_dir, group=config.name, stats=config.cluster.use_gpu)
        self._config = config
        self._board = Board(self._storage, enabled=config.tracking.tensorboard)

    @contextmanager
    def stage(self, name: str, index: int) -> Iterator[StageTracker]:
        """The W&B run of one stage: a new one, or the same again after an interruption."""
        label = f"{index:02d}-{re.sub(r'[^A-Za-z0-9_-]', '-', name)[:40]}"
        self._close()
        self._board.open(label)
        self._open(
            label,
            job_type="stage",
            name=f"{self._group}/{index:02d}-{name}",
            config={**public_config(self._config), "stage": name, "stage_index": index},
        )
        try:
            yield StageTracker(self)
        except BaseException:
            self._close(exit_code=1)
            self._board.close()
            raise

    def _log_line(self, metrics: Mapping[str, Any]) -> None:
        self._log(metrics)
        self._board.log(metrics)

    def finish(self, scores: Mapping[str, Any] | None = None, report: str | Path | None = None) -> None:
        """Add the score matrix (the content of `scores.json`) and, if given, the report page; end the last W&B run."""
        if self._run is not None:
            if scores:
                self._quietly(lambda: self._log_scores(scores), "log the scores")
            if report is not None and Path(report).is_file():
                self._quietly(lambda: self._log_report(Path(report), f"report-{self._identity}"), "store the report")
        if scores:
            self._board.scores(scores)
        self._board.close()
        self._close()
        self._copy_out()
