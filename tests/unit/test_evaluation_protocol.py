"""Which queries are measured, in which pool, and what counts as wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from unime_ray import schemas
from unime_ray.artifacts import Manifest, Run
from unime_ray.config import CorpusConfig, RunConfig
from unime_ray.errors import EvaluationError
from unime_ray.evaluation.protocol import Protocol, load_protocol
from unime_ray.evaluation.reranking import reranked_row, to_rerank
from unime_ray.evaluation.retrieval import search
from unime_ray.evaluation.tables import per_query_schema

KS = (1, 5)


def item(letter: str) -> bytes:
    return letter.encode() * 16


def load(
    tmp_path: Path,
    qrels: list[tuple[str, str, str, str]],
    pools: list[tuple[str, str, str]],
    candidates: list[tuple[str, str, str, str]] = [],  # noqa: B006 - only read
    **evaluate: object,
) -> Protocol:
    """A protocol from (dataset, split, query, item), (dataset, split, items) and (dataset, split, query, items)."""
    run = Run(str(tmp_path / "run"))
    rows = [
        {"dataset": d, "split": s, "query_id": item(q), "item_id": item(i), "relevance": 1.0} for d, s, q, i in qrels
    ]
    _write(run, "qrels", rows, schemas.QRELS)
    rows = [{"dataset": d, "split": s, "item_id": item(i)} for d, s, letters in pools for i in letters]
    _write(run, "pools", rows, schemas.POOLS)
    if candidates:
        listed = [
            {"dataset": d, "split": s, "query_id": item(q), "candidate_ids": [item(i) for i in letters]}
            for d, s, q, letters in candidates
        ]
        _write(run, "eval_candidates", listed, schemas.EVAL_CANDIDATES)
    limit = evaluate.pop("max_error_rate", 0.0)
    return load_protocol(run, RunConfig(evaluate=evaluate, corpus=CorpusConfig(max_error_rate=limit)))  # type: ignore[arg-type]


def _write(run: Run, table: str, rows: list[dict], schema: pa.Schema) -> None:
    artifact = run.artifact(table)
    artifact.write(pa.Table.from_pylist(rows, schema), schema)
    artifact.finish(Manifest(table=table, stage="ingest", fingerprint=table, rows=len(rows)))


def ranks(protocol: Protocol, similarity: dict[str, float], query: str = "q") -> dict[str, int]:
    """Ranks of the golds of `query` when each item has the given cosine with every query."""
    one = protocol.sets[0]
    vectors = {i: np.array([0.0, 0.0, 0.0]) for i in one.pool}
    vectors |= {item(k): np.array([v, np.sqrt(1 - v * v), 0.0]) for k, v in similarity.items()}
    vectors |= {asked.query_id: np.array([1.0, 0.0, 0.0]) for asked in one.queries}
    row = next(row for row in search(one, vectors, KS, top_k=10) if row["query_id"] == item(query))
    return {gold[:1].decode(): rank for gold, rank in zip(row["gold_ids"], row["gold_ranks"], strict=True)}


def test_each_test_set_has_its_own_pool(tmp_path: Path) -> None:
    protocol = load(
        tmp_path,
        [("a", "test", "q", "x"), ("b", "test", "r", "y"), ("a", "train", "s", "z")],
        [("a", "test", "xm"), ("b", "test", "yn"), ("a", "train", "z")],
    )
    assert [(one.dataset, [i[:1] for i in one.pool]) for one in protocol.sets] == [
        ("a", [b"m", b"x"]),
        ("b", [b"n", b"y"]),
    ]
    assert set(protocol.item_ids()) == {item(letter) for letter in "qrxymn"}


def test_a_dataset_without_pool_searches_all_of_its_split(tmp_path: Path) -> None:
    protocol = load(tmp_path, [("a", "test", "q", "x")], [("b", "test", "xy"), ("c", "train", "z")])
    assert [i[:1] for i in protocol.sets[0].pool] == [b"x", b"y"]


def test_positives_known_from_elsewhere_are_passed_over(tmp_path: Path) -> None:
    qrels = [("a", "test", "q", "x"), ("b", "train", "q", "y")]
    protocol = load(tmp_path, qrels, [("a", "test", "xyz"), ("b", "train", "y")])
    assert ranks(protocol, {"x": 0.5, "y": 0.9, "z": 0.1}) == {"x": 1}
    assert ranks(protocol, {"x": 0.5, "y": 0.1, "z": 0.9}) == {"x": 2}


def test_the_query_itself_is_no_wrong_answer(tmp_path: Path) -> None:
    protocol = load(tmp_path, [("a", "test", "q", "x")], [("a", "test", "qxz")])
    assert ranks(protocol, {"x": 0.5, "z": 0.1}) == {"x": 1}


def test_listed_candidates_replace_the_pool(tmp_path: Path) -> None:
    protocol = load(tmp_path, [("a", "test", "q", "x")], [("a", "test", "xyz")], [("a", "test", "q", "xxzw")])
    assert ranks(protocol, {"x": 0.5, "y": 0.9, "z": 0.8, "w": 0.7}) == {"x": 3}, "y is not listed, w only there"


def test_a_positive_that_is_nowhere_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=f"1 of 2 .*query {item('r').hex()}: positive {item('y').hex()}"):
        load(tmp_path, [("a", "test", "q", "x"), ("a", "test", "r", "y")], [("a", "test", "xz")])


def test_few_of_them_are_counted(tmp_path: Path) -> None:
    qrels = [("a", "test", "q", "x"), ("a", "test", "r", "y")]
    protocol = load(tmp_path, qrels, [("a", "test", "xz")], max_error_rate=0.5)
    assert protocol.num_queries == 1
    assert [reject["source"] for reject in protocol.rejects] == ["a/test"]


def test_a_split_without_queries_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no query in split test; the corpus has dev, train"):
        load(tmp_path, [("a", "dev", "q", "x"), ("a", "train", "r", "x")], [("a", "dev", "x")])


def test_the_sample_is_fixed(tmp_path: Path) -> None:
    qrels = [("a", "test", letter, "x") for letter in "bcdefghij"]
    first = load(tmp_path / "1", qrels, [("a", "test", "xz")], max_queries=4)
    second = load(tmp_path / "2", qrels, [("a", "test", "xz")], max_queries=4)
    assert [one.query_id for one in first.sets[0].queries] == [one.query_id for one in second.sets[0].queries]
    assert first.num_queries == 4


def test_top_of_a_query_has_its_golds_after_what_they_tie_with(tmp_path: Path) -> None:
    protocol = load(tmp_path, [("a", "test", "q", "b")], [("a", "test", "abcd")])
    vectors = {item(letter): np.array([1.0, 0.0]) for letter in "abcdq"}
    row = next(iter(search(protocol.sets[0], vectors, KS, top_k=3)))
    assert [i[:1] for i in row["top_ids"]] == [b"a", b"c", b"d"]
    assert row["gold_ranks"] == [4] and row["hit@1"] == 0.0


def reranked(top: str, golds: dict[str, int], order: list[int]) -> dict:
    row = {"dataset": "a", "split": "test", "meta_task": None, "query_id": item("q"), "top_scores": [0.5] * len(top)}
    row |= {"gold_ids": [item(gold) for gold in golds], "gold_ranks": list(golds.values())}
    row |= {"gold_relevances": [1.0] * len(golds), "gold_scores": [0.5] * len(golds)}
    return reranked_row(row | {"top_ids": [item(letter) for letter in top]}, order, KS)


def test_reranking_moves_only_what_it_was_shown() -> None:
    row = reranked("abc", {"c": 3, "z": 40}, [2, 0, 1])
    assert row["gold_ranks"] == [1, 40] and row["hit@1"] == 1.0
    assert [i[:1] for i in row["top_ids"]] == [b"c", b"a", b"b"]


def test_reranked_golds_do_not_push_each_other_down() -> None:
    assert reranked("abc", {"a": 1, "c": 2}, [2, 0, 1])["gold_ranks"] == [1, 1]
    assert reranked("abc", {"a": 1, "c": 2}, [1, 2, 0])["gold_ranks"] == [2, 2]


def test_the_same_order_changes_no_metric() -> None:
    row = reranked("abc", {"b": 2}, [0, 1, 2])
    assert (row["hit@1"], row["mrr"], row["gold_ranks"]) == (0.0, 0.5, [2])


def test_queries_that_cannot_change_are_not_sent() -> None:
    rows = [reranked("abc", {"b": 2}, [0, 1, 2]), reranked("abc", {"z": 9}, [0, 1, 2]), reranked("b", {"b": 1}, [0])]
    assert to_rerank(pa.Table.from_pylist(rows, per_query_schema(KS))) == [0]
