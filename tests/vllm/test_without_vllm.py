"""What of the vLLM engines shows without vLLM: the refusal when it is missing, and a front end without weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.models_fixtures import make_item, picture, save_checkpoint
from unime_ray.config import EmbedConfig, JudgeConfig, RunConfig
from unime_ray.config_vllm import VllmConfig
from unime_ray.errors import ConfigError, ModelError
from unime_ray.models import vllm_engine
from unime_ray.models.embedder_vllm import VllmEmbedder
from unime_ray.models.judge_vllm import VllmJudge
from unime_ray.models.vllm_engine import Frontend, has_vllm
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


def test_the_frontend_loads_no_weights(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    frontend = Frontend.load(str(folder))
    assert frontend.max_tokens == 1024
    kinds = frontend.pictures([make_item("a"), make_item(None, picture(1)), make_item(None, b"GIF89a")])
    assert [type(kind).__name__ for kind in kinds] == ["NoneType", "Picture", "RejectedRow"]
