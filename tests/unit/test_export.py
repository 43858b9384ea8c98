"""Exported folders: weights that plain transformers loads, templates that say what our prompts say, a true card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoModelForImageTextToText

from tests.export_run import trained_run
from tests.unit.models_fixtures import make_item, picture
from unime_ray import prompts
from unime_ray.artifacts import Manifest, read_text
from unime_ray.errors import ConfigError
from unime_ray.export import export_run
from unime_ray.export.card import model_card
from unime_ray.export.layout import QWEN_PICTURE, embedder_template, pair_template
from unime_ray.models.backbone import Backbone
from unime_ray.models.embedder import Embedder
from unime_ray.models.names import resolve_model
from unime_ray.models.reranker import Reranker

ITEMS = [
    make_item("red heart"),
    make_item(None, picture(1)),
    make_item("a fox", picture(2, 90, 40), "Represent the given image."),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    adapter = _adapter(root / "adapter")
    export_run(trained_run(root / "run", adapter), str(root / "out"))
    return root / "out"


def _adapter(folder: Path) -> Path:
    model = AutoModelForImageTextToText.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def rendered(template: str, messages: list[dict]) -> str:
    # As transformers compiles chat templates.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages)


def parts(item: object) -> list[dict]:
    head, found, tail = item.rendered.partition(f"{prompts.IMAGE_MARKER}\n")  # type: ignore[attr-defined]
    if not found:
        return [{"type": "text", "text": head}]
    return [{"type": "text", "text": head}, {"type": "image"}, {"type": "text", "text": tail}]


def shown(text: str) -> str:
    return text.replace(prompts.IMAGE_MARKER, QWEN_PICTURE)


def test_exported_embedder_gives_the_same_vectors(exported: Path) -> None:
    before = Embedder(Backbone.load("tiny", device="cpu")).embed(ITEMS)
    after = Embedder(Backbone.load(str(exported / "adapted"), device="cpu")).embed(ITEMS)
    np.testing.assert_allclose(after, before, atol=1e-7)


def test_adapter_is_exported_for_peft(exported: Path) -> None:
    base = AutoModelForImageTextToText.from_pretrained(resolve_model("tiny"))
    assert peft.PeftModel.from_pretrained(base, exported / "adapted" / "adapter").peft_config["default"].r == 4
    assert not (exported / "reordered" / "adapter").exists()


@pytest.mark.parametrize("item", ITEMS, ids=["text", "picture", "both"])
def test_embedder_template_lays_a_message_out_as_an_item_is_rendered(item: object) -> None:
    message = {"role": "user", "content": parts(item)}
    assert rendered(embedder_template(QWEN_PICTURE), [message]) == shown(item.rendered)  # type: ignore[attr-defined]


def test_pair_template_is_the_judges_prompt() -> None:
    before, after = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    query, candidate = ITEMS[0], ITEMS[2]
    messages = [{"role": "query", "content": parts(query)}, {"role": "document", "content": parts(candidate)}]
    wanted = shown(before + prompts.judge_prefix(query.rendered) + candidate.rendered + after)
    template = pair_template(QWEN_PICTURE, before, after, "{{ messages[0]['content'] }}!")
    assert rendered(template, messages) == wanted
    assert rendered(template, [{"role": "user", "content": "other roles as before"}]) == "other roles as before!"


def test_exported_reranker_is_still_a_reranker_for_us(exported: Path) -> None:
    query, candidates = ITEMS[0], ITEMS[1:]
    before = Reranker(Backbone.load("tiny", device="cpu")).pointwise_scores(query, candidates)
    after = Reranker(Backbone.load(str(exported / "reordered"), device="cpu")).pointwise_scores(query, candidates)
    np.testing.assert_allclose(after, before, atol=1e-7)


def test_sentence_transformers_files_name_only_its_own_modules(exported: Path) -> None:
    for name in ("adapted", "reordered"):
        modules = json.loads((exported / name / "modules.json").read_text())
        assert all(module["type"].startswith("sentence_transformers.") for module in modules)
        for module in modules[1:]:
            assert (exported / name / module["path"] / "config.json").is_file()
    pooling = json.loads((exported / "adapted" / "1_Pooling" / "config.json").read_text())
    assert pooling["embedding_dimension"] == Backbone.load("tiny", device="cpu").hidden_size


def test_card_holds_what_the_run_knows(exported: Path) -> None:
    text = (exported / "adapted" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "sentence-transformers" and "license" not in front
    assert "judge_kl" in text and "50.0 (40.0-60.0)" in text and "60.0 (50.0-70.0)" in text
    assert "10.0 (0.0-20.0)" not in text  # another model's figures
    assert str(Path(resolve_model("tiny")).parent) not in text  # nobody's paths
    assert "Not stated" in text


def test_what_a_corpus_calls_its_datasets_does_not_break_the_cards_table() -> None:
    shared = {"split": "te\\st", "metric": "hit@1", "queries": 5, "value": 0.5, "low": None, "high": None}
    rows = [shared | {"dataset": "a|b\n| c <img src=x> [x](y)", "model": arm} for arm in ("base", "adapted")]
    manifest = Manifest(table="embedder", name="adapted", stage="train_embedder", fingerprint="0")
    text = model_card("embedder", "adapted", (), manifest, None, rows, {})
    lines = [line for line in text.split("## Metrics")[1].splitlines() if line.startswith("|")]
    assert len(lines) == 3 and {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {7}
    assert lines[2].startswith(r"| a\|b \| c &lt;img src=x> \[x](y) | te\\st | hit@1 | 5 | 50.0 |")


def test_licence_is_stated_when_given(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run")
    export_run(run, str(tmp_path / "out"), "adapted", "cc-by-sa-4.0")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapted"]
    assert "license: cc-by-sa-4.0" in (read_text(str(tmp_path / "out" / "adapted" / "README.md")) or "")


def test_a_folder_that_holds_a_model_is_not_written_over(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run")
    export_run(run, str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="already holds a model"):
        export_run(run, str(tmp_path / "out"))


def test_an_unknown_name_gives_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no trained model called 'adaptd'.*adapted"):
        export_run(trained_run(tmp_path / "run"), str(tmp_path / "out"), "adaptd")


def test_an_embedder_and_a_reranker_of_one_name_get_a_folder_each(tmp_path: Path) -> None:
    made = export_run(trained_run(tmp_path / "run", reranker="adapted"), str(tmp_path / "out"))
    assert {(one.kind, Path(one.uri).name) for one in made} == {
        ("embedder", "adapted"),
        ("reranker", "adapted-reranker"),
    }
    for folder, task in (("adapted", "feature-extraction"), ("adapted-reranker", "text-ranking")):
        assert f"pipeline_tag: {task}" in (tmp_path / "out" / folder / "README.md").read_text()
    assert not (tmp_path / "out" / "adapted" / "1_LogitScore").exists()


def test_two_models_are_never_written_to_one_folder(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", reranker="adapted")
    shutil.copytree(run.artifact("reranker", "adapted").uri, run.artifact("embedder", "adapted-reranker").uri)
    with pytest.raises(ConfigError, match=r"reranker/adapted and .*embedder/adapted-reranker both go to"):
        export_run(run, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
