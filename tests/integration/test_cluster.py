"""A roadmap as a submitted job: on a local cluster of two nodes it ends as it does when run directly.

The cluster's processes are this test's own, on ports of their own; nothing else on the machine is touched.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.config import to_yaml
from tests.roadmaps import tiny_roadmap

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 400


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class TwoNodes:
    """A head with its dashboard and one more node."""

    dashboard: str
    client: Any

    def submit(self, *words: str, submission_id: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- python jobs/roadmap.py ...` from the repository's root, to its end.

        The interpreter is named: a bare `python` would be whatever the head's PATH finds first.
        """
        ray = Path(sys.executable).with_name("ray")
        options = ["--address", self.dashboard, "--submission-id", submission_id, "--working-dir", "."]
        return subprocess.run(
            [str(ray), "job", "submit", *options, "--", sys.executable, "jobs/roadmap.py", *words],
            cwd=ROOT,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    from ray.cluster_utils import Cluster
    from ray.job_submission import JobSubmissionClient

    head = {"include_dashboard": True, "dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **head})
    try:
        # Two nodes on one machine share a folder otherwise, and Ray unpacks a job's files anew for every node:
        # under the feet of the driver that runs in them.
        nodes.add_node(num_cpus=2, runtime_env_dir_name="runtime_resources_of_node_2")
        address = f"http://{nodes.webui_url}"
        deadline = time.monotonic() + 120
        while True:
            try:
                client = JobSubmissionClient(address)
                client.list_jobs()
                break
            except (ConnectionError, RuntimeError):
                assert time.monotonic() < deadline, "the dashboard does not answer"
                time.sleep(0.5)
        yield TwoNodes(address, client)
    finally:
        nodes.shutdown()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    small = tiny_roadmap(folder, name="job", stages=1, evaluation__every_steps=None, report__sample_tokens=0)
    file = folder / "run.yaml"
    file.write_text(to_yaml(small))
    return file


def test_a_submitted_roadmap_ends_with_the_same_scores_as_run_directly(
    cluster: TwoNodes, config: Path, tmp_path: Path
) -> None:
    """Byte for byte, from a copy of the working directory, on whichever node its workers land."""
    done = cluster.submit(str(config), f"storage={tmp_path / 'cluster'}", submission_id="roadmap")
    assert done.returncode == 0, done.stdout + done.stderr
    info = cluster.client.get_job_info("roadmap")
    assert (info.status, info.driver_exit_code) == ("SUCCEEDED", 0)
    assert "Traceback" not in done.stdout

    direct = subprocess.run(
        [sys.executable, "jobs/roadmap.py", str(config), f"storage={tmp_path / 'direct'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert direct.returncode == 0, direct.stdout + direct.stderr
    for file in ("scores.json", "plan.jsonl"):
        assert (tmp_path / "cluster" / "job" / file).read_bytes() == (tmp_path / "direct" / "job" / file).read_bytes()


@pytest.mark.parametrize(
    ("name", "words", "code", "message"),
    [
        ("bad-config", ["storage=/tmp/x", "continual.replay_ratio=2"], 2, "continual.replay_ratio=2"),
        ("relative", ["storage=runs"], 2, "storage='runs'"),
        ("crowded", ["cluster.num_workers=9", "storage=TMP"], 2, "cluster.num_workers=9"),
    ],
)
def test_the_exit_code_of_a_job_is_handed_on(
    cluster: TwoNodes, config: Path, tmp_path: Path, name: str, words: list[str], code: int, message: str
) -> None:
    """A mistake ends the job at once with the verb's own code, and `ray job submit` fails with its message."""
    done = cluster.submit(str(config), *(word.replace("TMP", str(tmp_path)) for word in words), submission_id=name)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr and "Traceback" not in done.stdout
    info = cluster.client.get_job_info(name)
    assert (info.status, info.driver_exit_code) == ("FAILED", code)
