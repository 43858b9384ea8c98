"""A driver killed, or interrupted, half-way: the same command again finishes with the same tables.

Each driver runs in a session of its own with its own local cluster, so that only its processes are touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mining_run import model_folder, rows_by_id, word_run

from unime_ray.artifacts import Run

HERE = Path(__file__).parent
KEYS = {"embed": ("item_id",), "judge": ("query_id", "candidate_id", "is_positive")}
OUTPUT = {"embed": ("embeddings", "base"), "judge": ("judgements", "tiny")}
TOTAL = {"embed": 150, "judge": 60}
"""Items, queries."""
PER_FILE = {"embed": 6, "judge": 2}
SECONDS_PER_UNIT = {"embed": 0.1, "judge": 0.3}
"""So slow that writing keeps up with the actors, and a stop after a few files comes half-way."""
FILES_BEFORE_STOP = 4
TIMEOUT = 240


def start(run: Path, model: str, stages: list[str], seconds_per_unit: float, trace: Path) -> subprocess.Popen:
    environment = os.environ | {
        "MINING_TEST_SECONDS_PER_UNIT": str(seconds_per_unit),
        "MINING_TEST_TRACE": str(trace),
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
    }
    environment.pop("RAY_ADDRESS", None)
    with open(f"{trace}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, str(HERE / "mining_driver.py"), str(run), model, *stages],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(driver: subprocess.Popen, trace: Path) -> None:
    try:
        status = driver.wait(TIMEOUT)
    finally:
        end_session(driver.pid)
    assert status == 0, Path(f"{trace}.log").read_text()[-3000:]


def processes_of(session: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.getsid(int(folder.name)) == session:
                    found.append(int(folder.name))
            except (ProcessLookupError, PermissionError):
                continue
    return found


def end_session(session: int) -> None:
    """Kill what is left of a driver's own cluster, and wait until it is gone."""
    for _ in range(100):
        left = processes_of(session)
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    raise AssertionError(f"processes of session {session} do not end")


def committed(run: Path, stage: str) -> int:
    folder = run.joinpath(*OUTPUT[stage], "checkpoint")
    return sum(not path.name.endswith(".pending.parquet") for path in folder.glob("*.parquet"))


def wait_for_files(run: Path, stage: str, driver: subprocess.Popen, count: int, log: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while committed(run, stage) < count:
        assert driver.poll() is None, f"the driver ended too soon:\n{Path(log).read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"too slow:\n{Path(log).read_text()[-3000:]}"
        time.sleep(0.02)


def units(trace: Path) -> int:
    """Items embedded, or queries judged, by all attempts that wrote to `trace`."""
    return sum(int(line) for line in trace.read_text().split())


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
@pytest.mark.parametrize("stage", ["embed", "judge"])
@pytest.mark.timeout(900)
def test_same_table_after(tmp_path: Path, undisturbed: tuple[Path, str], stage: str, stop: signal.Signals) -> None:
    whole, model = undisturbed
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run.joinpath(OUTPUT[stage][0]))
    trace = tmp_path / "trace"
    driver = start(run, model, [stage], SECONDS_PER_UNIT[stage], trace)
    try:
        wait_for_files(run, stage, driver, FILES_BEFORE_STOP, log=f"{trace}.log")
        driver.send_signal(stop)
        assert driver.wait(TIMEOUT) != 0
    finally:
        end_session(driver.pid)
    kept = committed(run, stage) * PER_FILE[stage]
    assert FILES_BEFORE_STOP * PER_FILE[stage] <= kept < TOTAL[stage], "the stop must come half-way"
    assert not run.joinpath(*OUTPUT[stage], "manifest.json").exists()
    before = units(trace)
    finish(start(run, model, [stage], 0.0, trace), trace)
    assert units(trace) - before == TOTAL[stage] - kept, "what was written is not done again, all the rest is"
    compare(Run(str(whole)), Run(str(run)), stage)


def compare(whole: Run, run: Run, stage: str) -> None:
    table, name = OUTPUT[stage]
    expected, found = (rows_by_id(each, table, name, KEYS[stage]) for each in (whole, run))
    assert len(found) == len(expected)
    for a, b in zip(expected, found, strict=True):
        assert all(a[key] == b[key] for key in KEYS[stage])
        if stage == "embed":
            assert a["embedding"] == pytest.approx(b["embedding"], abs=1e-5)
        else:
            assert a["score"] == pytest.approx(b["score"], abs=1e-5) and a["error"] == b["error"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run taken to the judgements without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    run = word_run(folder / "run")
    model = model_folder(folder / "model")
    trace = folder / "trace"
    finish(start(folder / "run", model, ["embed", "retrieve", "judge"], 0.0, trace), trace)
    assert Run(run.root).artifact("judgements", "tiny").require().rows == 60 * 13
    return folder / "run", model
