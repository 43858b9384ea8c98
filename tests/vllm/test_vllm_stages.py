"""The stages with vLLM as their engine, on Ray: the same tables as with transformers, and no start on drift."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.synthetic_run import SyntheticRun
from unime_ray.artifacts import Run
from unime_ray.config import RunConfig
from unime_ray.errors import CanaryError
from unime_ray.models.vllm_engine import has_vllm
from unime_ray.stages.embed import run_embed
from unime_ray.stages.judge import run_judge
from unime_ray.stages.retrieve import run_retrieve

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: see docs/vllm.md"),
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("ray_cluster"),
]
SETTINGS = {"max_num_batched_tokens": 4096, "max_num_seqs": 64}


def config_of(run: Run) -> RunConfig:
    engines = {"vllm": {"engine": "vllm", "vllm": SETTINGS}, "plain": {}}
    return RunConfig.model_validate(
        {"run": run.root, "embed": {"vllm": SETTINGS}, "retrieve": {"top_k": 8}, "judges": engines}
    )


def column(run: Run, table: str, name: str, value: str, *keys: str) -> dict[tuple[bytes, ...], object]:
    rows = run.artifact(table, name).read().to_pylist()
    return {tuple(row[key] for key in keys): row[value] for row in rows}


def test_both_engines_write_the_same_tables(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, num_concepts=12).corpus().run
    config = config_of(run)
    run_embed(run, config)
    faster = config.model_copy(update={"embed": config.embed.model_copy(update={"engine": "vllm"})})
    run_embed(run, faster, "vllm")
    plain, found = (column(run, "embeddings", name, "embedding", "item_id") for name in ("base", "vllm"))
    assert plain.keys() == found.keys() and len(plain) >= 12
    for key, vector in plain.items():
        np.testing.assert_allclose(found[key], vector, atol=1e-5)

    run_retrieve(run, config)
    manifest = run_judge(run, config, "vllm")
    run_judge(run, config, "plain")
    keys = ("query_id", "candidate_id")
    plain, found = (column(run, "judgements", name, "score", *keys) for name in ("plain", "vllm"))
    assert plain.keys() == found.keys() and manifest.counts["errors"] == 0 and len(plain) >= 50
    assert max(abs(found[key] - score) for key, score in plain.items()) <= 1e-4  # type: ignore[operator]

    (canary,) = Path(run.child("canaries")).iterdir()
    stored = json.loads(canary.read_text())
    assert stored["engine"] == "transformers"  # whichever engine judges
    stored["scores"][0] += 0.01
    canary.write_text(json.dumps(stored))
    Path(run.child("judgements", "vllm", "manifest.json")).unlink()
    with pytest.raises(CanaryError, match="largest difference 0.01"):
        run_judge(run, config.model_copy(update={"judges": {"vllm": changed(config)}}), "vllm")


def changed(config: RunConfig) -> object:
    """The judge under another fingerprint, so that its work is to be done again."""
    return config.judges["vllm"].model_copy(update={"noise_auc": 0.9})
