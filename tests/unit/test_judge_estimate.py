"""`unime-ray judge --estimate` from the command line to the printed lines; Ray's one task runs in this process."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lance
import pyarrow as pa
import pytest

from tests.unit.models_fixtures import FakeItem, make_item, picture, save_checkpoint
from unime_ray.artifacts import Manifest, Run
from unime_ray.cli import main
from unime_ray.models.backbone import Backbone
from unime_ray.models.judge_transformers import TransformersJudge
from unime_ray.schemas import CANDIDATES, IMAGES, ITEMS

QUERIES, CANDIDATES_EACH = 12, 6


def groups() -> list[tuple[FakeItem, list[FakeItem]]]:
    """Texts of different lengths that ask for pictures, which come back under other queries."""
    pictures = [make_item(None, picture(seed)) for seed in range(9)]
    asked = [make_item("a fox " + "and a hare " * (index % 3), instruction=f"Find {index}") for index in range(QUERIES)]
    return [
        (query, [pictures[(index + place) % len(pictures)] for place in range(CANDIDATES_EACH)])
        for index, query in enumerate(asked)
    ]


def mined_run(folder: Path) -> Run:
    """What ingest and retrieve would have written; the first candidate is the positive."""
    run, found = Run(str(folder)), groups()
    items = {item.item_id: item for query, candidates in found for item in (query, *candidates)}
    images = {item.image_id: item.image for item in items.values() if item.image_id is not None}
    lists = [
        {
            "query_id": query.item_id,
            "candidate_ids": [one.item_id for one in candidates[1:]],
            "similarities": [0.5] * (len(candidates) - 1),
            "positive_ids": [candidates[0].item_id],
            "positive_similarities": [0.5],
        }
        for query, candidates in found
    ]
    texts = [
        {"item_id": one.item_id, "rendered": one.rendered, "text": one.text, "image_id": one.image_id, "source": "made"}
        for one in items.values()
    ]
    shown = [{"image_id": key, "bytes": data, "width": 1, "height": 1} for key, data in images.items()]
    for name, rows, schema in (("items", texts, ITEMS), ("images", shown, IMAGES)):
        lance.write_dataset(pa.Table.from_pylist(rows, schema), run.artifact(name).data_uri)
    candidates = run.artifact("candidates", "base")
    candidates.write(pa.Table.from_pylist(lists, CANDIDATES), CANDIDATES)
    candidates.finish(Manifest(table="candidates", stage="retrieve", fingerprint="made", rows=len(lists)))
    return run


@pytest.fixture
def ray_here(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Ray tasks run where they are asked for; the options each was given."""
    import ray

    asked: list[dict[str, Any]] = []

    plain = ray.remote

    def remote(*function: Any, **given: Any) -> Any:
        if not function or function[0].__module__.startswith("ray."):  # Ray's own, made while parts of it are imported
            return plain(*function, **given)
        (task,) = function
        return SimpleNamespace(options=lambda **given: asked.append(given) or SimpleNamespace(remote=task))

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.remote", remote)
    monkeypatch.setattr("ray.get", lambda result: result)
    return asked


def test_the_command_says_what_judging_all_of_it_takes(
    tmp_path: Path, ray_here: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, model, corpus = mined_run(tmp_path / "run"), str(save_checkpoint(tmp_path / "judge")), tmp_path / "pairs.jsonl"
    corpus.touch()
    sections = {"corpus": {"sources": [{"format": "jsonl", "path": str(corpus)}]}, "judges": {"mine": {"model": model}}}
    (tmp_path / "mine.yaml").write_text(json.dumps({"run": run.root} | sections))
    with pytest.raises(SystemExit) as done:
        main(["judge", "--config", str(tmp_path / "mine.yaml"), "--name", "mine", "--estimate"])
    assert done.value.code in (0, None) and len(ray_here) == 1
    told = " ".join(capsys.readouterr().out.split())
    pairs = QUERIES * CANDIDATES_EACH
    assert f"mine: {QUERIES} queries, {pairs} pairs; about 0 known, {pairs} to judge" in told
    assert "pictures: 9 different ones" in told
    assert re.search(rf"expected: [\d.]+ s on 1 actor \(measured on {QUERIES - 1} queries, ", told)
    tokens = re.search(r"tokens: ([\d,]+) if every pair ran whole, ([\d,]+) with shared prefixes", told)
    assert tokens is not None, told
    judge = TransformersJudge(Backbone.load(model, device="cpu"))
    judge.score_groups(groups())
    # The first query only warms up; the others stand for it.
    expected = [judge.usage.prompt_tokens, judge.usage.computed_tokens]
    assert [int(number.replace(",", "")) for number in tokens.groups()] == pytest.approx(expected, rel=0.05)
    assert run.artifact("judgements", "mine").manifest() is None and not Path(run.child("judgements")).exists()
