"""`ray job submit` against a real head: the same entry points, the same artifacts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import stranger

from unime_ray.artifacts import Run

REPOSITORY = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head():
    """A head started as a person would, in a process group of its own; yields the job server's address."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as scratch:
        command = [
            str(RAY), "start", "--head", "--block", f"--port={port}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", "--num-cpus=4", f"--temp-dir={scratch}", "--disable-usage-stats",
            "--object-store-memory=200000000", f"--dashboard-agent-listen-port={agent}",
        ]  # fmt: skip
        log = Path(scratch) / "head.log"
        with log.open("w") as sink:
            process = subprocess.Popen(
                command, env=ENVIRONMENT, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )
        address = f"http://127.0.0.1:{dashboard}"
        try:
            wait_for(f"{address}/api/version", process, log)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def wait_for(url: str, process: subprocess.Popen, log: Path, limit: float = 90) -> None:
    start = time.monotonic()
    while time.monotonic() - start < limit:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
    raise AssertionError(f"{url} did not answer in {limit} s: {log.read_text()}")


@pytest.mark.timeout(400)
def test_a_stage_runs_as_a_submitted_job(head, tmp_path):
    config = stranger.write_corpus(tmp_path / "corpus")
    command = [str(RAY), "job", "submit", "--address", head, "--working-dir", str(REPOSITORY)]
    entry = [sys.executable, "jobs/ingest.py", "--config", str(config)]
    # The job agent comes up after the server that this talks to, so the first call may come too early.
    for attempt in range(10):
        done = subprocess.run(
            [*command, "--", *entry], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode == 0 or "agent" not in done.stdout + done.stderr:
            break
        time.sleep(3 * (attempt + 1))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    manifest = Run(str(tmp_path / "corpus" / "run")).artifact("items").require()
    assert manifest.stage == "ingest"
    assert manifest.rows > 150
