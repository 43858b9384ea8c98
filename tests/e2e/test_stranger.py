"""A corpus nobody has seen goes through the whole recipe with the command a user would type, twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping

import pytest
import stranger

from unime_ray.artifacts import Run

LIMIT = 420


def unime(
    *arguments: str, environment: Mapping[str, str] = os.environ, limit: float = LIMIT
) -> subprocess.CompletedProcess:
    """Run the command line in a process group of its own, so that a stuck run can be ended whole."""
    command = [sys.executable, "-m", "unime_ray.cli", *arguments]
    environment = dict(environment) | {"RAY_AUTH_MODE": "disabled", "COLUMNS": "200"}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.timeout(2 * LIMIT)
def test_a_strangers_corpus_from_pictures_to_report(tmp_path):
    config = stranger.write_corpus(tmp_path / "corpus")
    checked = unime("validate", "--config", str(config))
    assert checked.returncode == 0, checked.stderr
    done = unime("run", "--config", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(str(tmp_path / "corpus" / "run"))
    rejects = run.artifact("rejects", "ingest").read().to_pylist()
    assert len(rejects) == stranger.NUM_BROKEN
    assert all(reject["reason"] and reject["source"].endswith(".jsonl") for reject in rejects)
    assert "absent.png" in " ".join(reject["reason"] for reject in rejects)
    metrics = {(row["model"], row["stage"]) for row in run.artifact("metrics").read().to_pylist()}
    assert {"base", "mine"} <= {model for model, _ in metrics}
    assert {stage for _, stage in metrics} == {"retrieve", "rerank"}
    page = (tmp_path / "corpus" / "run" / "report" / "report.html").read_text()
    assert "absent.png" in page
    assert page.count("data:image/") > 10

    made = {artifact.key: artifact.require() for artifact in run.artifacts()}
    again = unime("run", "--config", str(config))
    assert again.returncode == 0, again.stderr[-3000:]
    assert {artifact.key: artifact.require() for artifact in run.artifacts()} == made, "nothing is done twice"
    looked = unime("inspect", run.root)
    assert "embedder/mine" in looked.stdout
    assert looked.returncode == 0
