"""What of the vLLM engines shows without vLLM: the refusal when it is missing, and a front end without weights."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.unit.models_fixtures import make_item, picture, save_checkpoint
from unime_ray.config import EmbedConfig, JudgeConfig, RunConfig
from unime_ray.config_vllm import VllmConfig
from unime_ray.errors import ConfigError, EngineDied, ModelError
from unime_ray.models import vllm_engine
from unime_ray.models.embedder_vllm import VllmEmbedder
from unime_ray.models.judge_vllm import VllmJudge
from unime_ray.models.vllm_engine import Frontend, has_vllm
from unime_ray.models.vllm_process import tell_of_death
from unime_ray.preflight import check_vllm


@pytest.mark.skipif(has_vllm(), reason="vLLM is installed here")
def test_a_missing_vllm_is_one_clear_error(tmp_path: Path) -> None:
    model = str(save_checkpoint(tmp_path))
    with pytest.raises(ModelError, match=r"vLLM is not installed; pip install .*docs/vllm\.md"):
        VllmJudge.load(JudgeConfig(model=model))
    with pytest.raises(ModelError, match="vLLM is not installed"):
        VllmEmbedder.load(EmbedConfig(model=model))
    with pytest.raises(ModelError, match="use `logits`"):
        VllmJudge.load(JudgeConfig(model=model, vllm=VllmConfig(tensor_parallel_size=2, head="classify")))


@pytest.mark.skipif(has_vllm(), reason="vLLM is installed here")
def test_a_run_that_asks_for_vllm_is_stopped_before_it_starts() -> None:
    check_vllm(RunConfig())
    for section in ({"embed": {"engine": "vllm"}}, {"judges": {"fast": {"engine": "vllm"}}}):
        with pytest.raises(ModelError, match=r"^(embed|judges\.fast): vLLM is not installed; pip install"):
            check_vllm(RunConfig.model_validate(section))


def test_a_model_on_more_gpus_than_its_actor_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "has_vllm", lambda: True)
    split = {"engine": "vllm", "vllm": {"tensor_parallel_size": 2}}
    with pytest.raises(ConfigError, match=r"set judges\.fast\.resources\.num_gpus to as many"):
        check_vllm(RunConfig.model_validate({"judges": {"fast": split | {"resources": {"num_gpus": 1}}}}))
    check_vllm(RunConfig.model_validate({"judges": {"fast": split | {"resources": {"num_gpus": 2}}}}))


def test_positions_that_vllm_would_read_otherwise_are_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, "qwen3_vl")
    Frontend.load(str(folder))
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"mrope_interleaved": true', '"mrope_interleaved": false'))
    with pytest.raises(ModelError, match="mrope_interleaved: true"):
        Frontend.load(str(folder))


def test_the_death_of_an_engines_process_reaches_who_waits() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    answers: queue.Queue[object] = queue.Queue()
    manager = SimpleNamespace(processes=[SimpleNamespace(sentinel=os.pidfd_open(process.pid))])
    client = SimpleNamespace(outputs_queue=answers, resources=SimpleNamespace(engine_manager=manager))
    tell_of_death(SimpleNamespace(engine_core=client))
    tell_of_death(SimpleNamespace(engine_core=object()))  # an engine in this process
    assert answers.empty()
    process.kill()
    assert isinstance(answers.get(timeout=30), EngineDied) and process.wait(30) < 0


PARENT = """
import importlib, multiprocessing, sys, time
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=importlib.import_module, args=(sys.argv[1],))
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start(), other.start()
    print(child.pid, other.pid, flush=True)
    time.sleep(60)
"""


def test_an_engine_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "watching.py").write_text("import time, unime_ray.models.vllm_process\ntime.sleep(60)\n")
    (tmp_path / "parent.py").write_text(PARENT)
    paths = [str(tmp_path), str(Path(__file__).parents[2])]
    command = [sys.executable, str(tmp_path / "parent.py"), "watching"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    assert parent.stdout is not None
    engine, other = (psutil.Process(int(pid)) for pid in parent.stdout.readline().split())
    while not any(thread.id != engine.pid for thread in engine.threads()):
        time.sleep(0.05)  # it has not begun to watch
    parent.kill()
    psutil.wait_procs([engine], timeout=30)
    assert not engine.is_running() and other.is_running()
    other.kill()
    parent.wait(30)


def test_the_frontend_loads_no_weights(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    frontend = Frontend.load(str(folder))
    assert frontend.max_tokens == 1024
    kinds = frontend.pictures([make_item("a"), make_item(None, picture(1)), make_item(None, b"GIF89a")])
    assert [type(kind).__name__ for kind in kinds] == ["NoneType", "Picture", "RejectedRow"]
