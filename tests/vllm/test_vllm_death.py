"""A real engine of vLLM in a process of its own, whose actor is killed while it judges."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
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


def load_dying(config: JudgeConfig, log: str) -> Judge:
    """vLLM as judge, whose actor is killed once with requests in flight. Each actor writes the process id of its engine
    into the folder `log`."""
    judge = VllmJudge.load(config)
    (engine,) = multiprocessing.active_children()
    Path(log, str(engine.pid)).touch()
    step = judge.engine._engine.step

    def dying_step() -> Any:
        if not Path(log, "died").exists():
            Path(log, "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step()

    judge.engine._engine.step = dying_step
    return judge


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
    return RunConfig.model_validate({"run": run.root, "judges": {"actor": vllm}})


def assert_scored(run: Run, name: str, expected: dict[Pair, float | None]) -> None:
    """All pairs are there, with the scores of transformers."""
    rows = run.artifact("judgements", name).read().to_pylist()
    found = {(row["query_id"], row["candidate_id"]): row for row in rows}
    assert found.keys() == expected.keys()
    assert not any(row["error"] for row in found.values())
    assert max(abs(row["score"] - (expected[pair] or 0)) for pair, row in found.items()) <= 1e-4


def engines(log: Path) -> list[int]:
    return [int(file.name) for file in log.iterdir() if file.name.isdigit()]


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, f"engines without an actor still run: {pids}"
        time.sleep(0.2)


def test_an_engine_ends_with_its_actor_and_the_job_goes_on(mined: tuple[Run, dict], tmp_path: Path) -> None:
    run, expected = mined
    run_judge(run, config_of(run), "actor", load=partial(load_dying, log=str(tmp_path)))
    assert_scored(run, "actor", expected)
    assert len(engines(tmp_path)) == 2
    assert_gone(engines(tmp_path))
