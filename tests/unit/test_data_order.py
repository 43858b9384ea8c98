"""The order rows are trained in, and the file they are read from."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from unime_ray.artifacts import Artifact, Manifest, Run
from unime_ray.errors import ArtifactError, TrainingError
from unime_ray.schemas import HARD_NEGATIVES
from unime_ray.train.data import ROWS_PER_CHUNK, BatchOrder, Examples, prepare_examples


def identifier(number: int) -> bytes:
    return number.to_bytes(16, "big")


def write_negatives(run: Run, queries: list[int], negatives: int = 3) -> Artifact:
    """Hard negatives of `queries` (may repeat: several positives), in the order given."""
    rows = []
    for row, query in enumerate(queries):
        ids = [identifier(10_000 + 10 * row + slot) for slot in range(negatives)]
        rows.append({
            "query_id": identifier(query), "positive_id": identifier(5_000 + row), "positive_score": 0.9,
            "negative_ids": ids, "negative_scores": [0.1] * negatives, "negative_similarities": [0.5] * negatives,
            "negative_reasons": ["kept"] * negatives,
        })  # fmt: skip
    artifact = run.artifact("hard_negatives", "judge")
    artifact.write(pa.Table.from_pylist(rows, schema=HARD_NEGATIVES), HARD_NEGATIVES)
    artifact.finish(Manifest(table="hard_negatives", name="judge", stage="select", fingerprint="abc", rows=len(rows)))
    return artifact


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order():
    order = BatchOrder(num_rows=64, batch_queries=8, seed=3)
    first = np.concatenate([order.batch_rows(step) for step in range(8)])
    second = np.concatenate([order.batch_rows(step) for step in range(8, 16)])
    assert sorted(first) == sorted(second) == list(range(64))
    assert first.tolist() != second.tolist()
    assert order.position(9) == (1, 1)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_a_batch_without_loss_or_overlap(world):
    order = BatchOrder(num_rows=100, batch_queries=10, seed=0)
    parts = [order.rank_rows(4, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(parts)) == sorted(order.batch_rows(4))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_order_depends_on_the_step_alone_not_on_what_was_read_before():
    one, other = BatchOrder(50, 7, seed=5), BatchOrder(50, 7, seed=5)
    skipped = [one.batch_rows(step).tolist() for step in (11, 3, 20)]
    assert skipped == [other.batch_rows(step).tolist() for step in (11, 3, 20)]
    assert one.batch_rows(3).tolist() != BatchOrder(50, 7, seed=6).batch_rows(3).tolist()


def test_a_corpus_smaller_than_a_batch_is_one_batch():
    order = BatchOrder(num_rows=5, batch_queries=512, seed=0)
    assert sorted(order.batch_rows(0)) == sorted(order.batch_rows(1)) == list(range(5))


def test_more_workers_than_queries_is_an_error():
    with pytest.raises(TrainingError, match="4 workers share a batch of 3"):
        BatchOrder(num_rows=3, batch_queries=8, seed=0).rank_rows(0, 0, 4)


def test_rows_are_sorted_by_id_and_read_by_number(tmp_path):
    count = ROWS_PER_CHUNK + 7
    artifact = write_negatives(Run(str(tmp_path)), list(reversed(range(count))))
    examples = Examples(prepare_examples(artifact))
    assert len(examples) == count
    for row in (0, ROWS_PER_CHUNK - 1, ROWS_PER_CHUNK, count - 1):
        example = examples[row]
        assert example.query_id == identifier(row)
        assert example.row == row
        assert len(example.negative_ids) == 3
        assert example.positive_score == pytest.approx(0.9)
    with pytest.raises(IndexError):
        examples[count]


def test_the_file_is_prepared_once_per_fingerprint(tmp_path):
    artifact = write_negatives(Run(str(tmp_path)), [1, 2])
    first = prepare_examples(artifact)
    assert prepare_examples(artifact) == first
    newer = artifact.require().model_copy(update={"fingerprint": "def"})
    artifact.finish(newer)
    assert prepare_examples(artifact) != first


def test_known_positives_are_all_rows_of_the_query(tmp_path):
    artifact = write_negatives(Run(str(tmp_path)), [4, 7, 4, 9, 4])
    examples = Examples(prepare_examples(artifact))
    by_query = {example.query_id: example for example in (examples[row] for row in range(5))}
    assert set(examples.known_positives(by_query[identifier(4)])) == {identifier(5_000 + row) for row in (0, 2, 4)}
    assert examples.known_positives(by_query[identifier(7)]) == (identifier(5_001),)


def test_a_list_shorter_than_k_names_its_query(tmp_path):
    examples = Examples(prepare_examples(write_negatives(Run(str(tmp_path)), [1, 2], negatives=3)))
    examples.require_negatives(3)
    with pytest.raises(TrainingError, match=f"{identifier(1).hex()} has 3 hard negatives, training wants 4"):
        examples.require_negatives(4)


def test_missing_and_empty_negatives_are_errors(tmp_path):
    run = Run(str(tmp_path))
    with pytest.raises(ArtifactError, match="hard_negatives/judge"):
        prepare_examples(run.artifact("hard_negatives", "judge"))
    with pytest.raises(TrainingError, match="no hard negatives to train on"):
        prepare_examples(write_negatives(run, []))
