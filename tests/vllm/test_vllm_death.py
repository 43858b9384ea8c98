"""A real engine of vLLM, in a process of its own, that dies while it judges; and the actor that owns it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow.dataset as pads
import pytest
from ray import cloudpickle

from tests.synthetic_run import SyntheticRun
from unime_ray.artifacts import Run
from unime_ray.config import JudgeConfig, RunConfig
from unime_ray.corpus.payload import PayloadStore
from unime_ray.models.judge import Judge, load_judge
from unime_ray.models.judge_vllm import VllmJudge
from unime_ray.models.vllm_engine import has_vllm
from unime_ray.stages.judge import run_judge
from unime_ray.stages.judge_known import Pair
from unime_ray.stages.judge_watch import POISON

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: see docs/vllm.md"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("ray_cluster"),
]
APART = {"in_process": False, "max_num_batched_tokens": 4096, "max_num_seqs": 64, "max_model_len": 512}
TOP_K = 6
ROOT = Path(__file__).parents[2]


def load_dying(config: JudgeConfig, log: str, victim: str, poison: Pair | None = None) -> Judge:
    """vLLM as judge; its engine's process, or this one, is killed with requests in flight: whenever it has the pair
    `poison` in hand, or without one just once. Each process writes the engine's process id into the folder `log`."""
    judge = VllmJudge.load(config)
    (engine,) = multiprocessing.active_children()
    Path(log, str(engine.pid)).touch()
    step, score_groups = judge.engine._engine.step, judge.score_groups
    doomed = False

    def dying_step() -> Any:
        if doomed:
            Path(log, "died").touch()
            os.kill(engine.pid if victim == "engine" else os.getpid(), signal.SIGKILL)
        return step()

    def score(groups: Any) -> Any:
        nonlocal doomed
        shown = {(query.item_id, candidate.item_id) for query, candidates in groups for candidate in candidates}
        doomed = poison in shown if poison else victim != "nobody" and not Path(log, "died").exists()
        return score_groups(groups)

    judge.engine._engine.step, judge.score_groups = dying_step, score  # type: ignore[method-assign]
    return judge


def load_slow(config: JudgeConfig, log: str, seconds: float) -> Judge:
    """vLLM as judge, slowed down; it writes how many pairs it scores."""
    judge = load_dying(config, log, "nobody")
    score_groups = judge.score_groups

    def score(groups: Any) -> Any:
        time.sleep(seconds)
        with open(Path(log, "pairs"), "a") as file:
            file.write(f"{sum(len(candidates) for _, candidates in groups)}\n")
        return score_groups(groups)

    judge.score_groups = score  # type: ignore[method-assign]
    return judge


def drive(root: str, log: str, seconds: str) -> None:
    """What a driver of its own does: `driver` judges on a cluster of its own."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    run = Run(root)
    run_judge(run, config_of(run), "driver", load=partial(load_slow, log=log, seconds=float(seconds)))


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[Pair, float | None]]:
    """A run with text and picture queries, and what transformers says of its pairs."""
    run = SyntheticRun(tmp_path_factory.mktemp("mined"), num_concepts=16).corpus().mining(TOP_K).run
    rows = run.artifact("candidates", "base").read().to_pylist()
    pairs = [(row["query_id"], item) for row in rows for item in row["positive_ids"] + row["candidate_ids"]]
    store = PayloadStore(run.artifact("images").data_uri, run.artifact("items").data_uri)
    items = dict(zip(keys := sorted({one for pair in pairs for one in pair}), store.items(keys), strict=True))
    judge = load_judge(JudgeConfig())
    return run, {(query, item): judge.score(items[query], [items[item]])[0].score for query, item in pairs}


def config_of(run: Run) -> RunConfig:
    vllm = {"engine": "vllm", "vllm": APART, "queries_per_batch": 1, "max_error_rate": 0.5}
    return RunConfig.model_validate({"run": run.root, "judges": {"actor": vllm, "poison": vllm, "driver": vllm}})


def assert_scored(run: Run, name: str, expected: dict[Pair, float | None], failed: Pair | None = None) -> None:
    """All pairs are there, with the scores of transformers; `failed` has its error instead."""
    rows = run.artifact("judgements", name).read().to_pylist()
    found = {(row["query_id"], row["candidate_id"]): row for row in rows}
    assert found.keys() == expected.keys()
    assert {pair: row["error"] for pair, row in found.items() if row["error"]} == ({failed: POISON} if failed else {})
    gaps = [abs(row["score"] - (expected[pair] or 0)) for pair, row in found.items() if pair != failed]
    assert max(gaps) <= 1e-4


def engines(log: Path) -> list[int]:
    return [int(file.name) for file in log.iterdir() if file.name.isdigit()]


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, f"engines without an actor still run: {pids}"
        time.sleep(0.2)


def test_an_engine_ends_with_its_actor_and_the_job_goes_on(mined: tuple[Run, dict], tmp_path: Path) -> None:
    run, expected = mined
    run_judge(run, config_of(run), "actor", load=partial(load_dying, log=str(tmp_path), victim="actor"))
    assert_scored(run, "actor", expected)
    assert len(engines(tmp_path)) == 2
    assert_gone(engines(tmp_path))


def test_a_dead_engine_is_replaced_and_a_pair_that_kills_it_twice_is_its_own_error(
    mined: tuple[Run, dict], tmp_path: Path
) -> None:
    run, expected = mined
    poison = sorted(expected)[len(expected) // 2]
    load = partial(load_dying, log=str(tmp_path), victim="engine", poison=poison)
    manifest = run_judge(run, config_of(run), "poison", load=load)
    assert_scored(run, "poison", expected, failed=poison)
    assert manifest.counts["errors"] == 1
    assert len(engines(tmp_path)) == 4  # with its query, twice alone, without it


def start(run: Run, log: Path, seconds: float) -> subprocess.Popen:
    code = f"from tests.vllm.test_vllm_death import drive; drive({run.root!r}, {str(log)!r}, {seconds!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("RAY_ADDRESS", None)
    with open(log / "output", "a") as output:
        command = [sys.executable, "-c", code]
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def end_session(session: int) -> None:
    """Kill what is left of a driver's own cluster."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session:
                process.kill()
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue


def test_a_killed_driver_judges_only_what_is_missing(mined: tuple[Run, dict], tmp_path: Path) -> None:
    run, expected = mined
    checkpoints = Path(run.artifact("judgements", "driver").child("checkpoint"))
    driver = start(run, tmp_path, 0.5)
    try:
        while len([path for path in checkpoints.glob("*.parquet") if "pending" not in path.name]) < 4:
            assert driver.poll() is None, (tmp_path / "output").read_text()[-3000:]
            time.sleep(0.05)
        driver.kill()
        driver.wait()
        assert_gone(engines(tmp_path))
    finally:
        end_session(driver.pid)
    kept = pads.dataset([str(path) for path in checkpoints.glob("*.parquet") if "pending" not in path.name])
    queries = set(kept.to_table().column(0).to_pylist())
    missing = [pair for pair in expected if pair[0] not in queries]
    assert 0 < len(missing) < len(expected) and run.artifact("judgements", "driver").manifest() is None
    (tmp_path / "pairs").unlink()
    driver = start(run, tmp_path, 0.0)
    try:
        assert driver.wait(300) == 0, (tmp_path / "output").read_text()[-3000:]
    finally:
        end_session(driver.pid)
    assert sum(int(line) for line in (tmp_path / "pairs").read_text().split()) == len(missing)
    assert_scored(run, "driver", expected)
