"""Micro-batches, in-batch identities, prefetching, and the lists a reranker learns from."""

from __future__ import annotations

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from tests.unit.models_fixtures import make_item, picture, save_checkpoint
from unime_ray.config import RerankerConfig
from unime_ray.errors import TrainingError
from unime_ray.losses import PADDING_KEY
from unime_ray.models.backbone import Backbone
from unime_ray.train.collate import SegmentStore, embedder_micro_batch, in_batch_info, pack, prefetch, split
from unime_ray.train.data import Example
from unime_ray.train.reranker_objective import ranking_task

BROKEN = make_item(None, b"no picture")
ITEMS = [make_item(f"text {n}") for n in range(6)] + [make_item(None, picture(n, 32, 32)) for n in range(3)]
BY_ID = {item.item_id: item for item in [*ITEMS, BROKEN]}


def example(row: int, query: int, positive: int, *negatives: int) -> Example:
    ids = [item.item_id for item in ITEMS]
    scores = tuple(round(0.1 * (slot + 1), 2) for slot in range(len(negatives)))
    return Example(row, ids[query], ids[positive], 0.9, tuple(ids[n] for n in negatives), scores)


class FakePayload:
    """Counts what is asked for."""

    def __init__(self) -> None:
        self.asked: Counter[bytes] = Counter()

    def items(self, ids):
        self.asked.update(ids)
        return [BY_ID[identifier] for identifier in ids]


class FakeExamples(list):
    known: dict[bytes, tuple[bytes, ...]] = {}

    def known_positives(self, found):
        return (found.positive_id, *self.known.get(found.query_id, ()))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Backbone:
    return Backbone.load(str(save_checkpoint(tmp_path_factory.mktemp("model"))), device="cpu")


def test_items_that_repeat_are_encoded_once(backbone):
    rows = [example(0, 0, 6, 7, 1), example(1, 1, 7, 6, 2), example(2, 0, 6, 7, 8)]
    micro = embedder_micro_batch(rows, 2, SegmentStore(FakePayload(), backbone), backbone)
    assert micro.num_items == 6  # 0, 6, 7, 1, 2, 8
    assert micro.query_B[0] == micro.query_B[2]
    assert micro.candidate_BK[0, 0] == micro.candidate_BK[1, 1] == micro.candidate_BK[2, 0]
    assert len(set(micro.candidate_BK.flatten().tolist()) | set(micro.query_B.tolist())) == 6
    assert micro.scores_BK[0].tolist() == pytest.approx([0.9, 0.1, 0.2])
    assert sum(len(batch.pictures) for batch in micro.inputs.batches) == 3


def test_packed_rows_are_of_similar_length_and_know_their_place(backbone):
    texts = ["x" * (1 + 7 * (n % 9)) for n in range(60)]
    segments = [backbone.tokens.text(text) for text in texts]
    packed = pack(segments, backbone)
    assert len(packed) == len(segments)
    assert packed.num_tokens == sum(map(len, segments))
    rows = [
        ids[mask.bool()].tolist()
        for batch in packed.batches
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    assert [rows[place] for place in packed.place] == [segment.ids.tolist() for segment in segments]
    assert len(packed.batches) > 1
    padded = sum(batch.input_ids.numel() for batch in packed.batches)
    assert padded < 0.8 * len(segments) * max(map(len, segments))


def test_only_the_first_k_negatives_are_taken(backbone):
    micro = embedder_micro_batch([example(0, 0, 6, 1, 2, 3)], 1, SegmentStore(FakePayload(), backbone), backbone)
    assert micro.candidate_BK.shape == micro.scores_BK.shape == (1, 2)
    assert micro.num_items == 3


def test_an_item_is_read_once_over_many_steps(backbone):
    payload = FakePayload()
    store = SegmentStore(payload, backbone)
    for _ in range(3):
        embedder_micro_batch([example(0, 0, 6, 7)], 1, store, backbone)
    assert set(payload.asked.values()) == {1}


def test_an_item_that_cannot_be_used_is_named(backbone):
    broken = Example(0, ITEMS[0].item_id, BROKEN.item_id, 0.5, (), ())
    with pytest.raises(TrainingError, match=f"item {BROKEN.item_id.hex()} cannot be trained on"):
        embedder_micro_batch([broken], 0, SegmentStore(FakePayload(), backbone), backbone)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_in_batch_identities_agree_over_ranks(world):
    rows = FakeExamples([example(0, 0, 6, 7), example(1, 1, 7, 6), example(2, 2, 8, 6), example(3, 3, 6, 8)])
    batch = np.array([3, 0, 2, 1])
    infos = [in_batch_info(batch, rank, world, rows, 1, torch.device("cpu")) for rank in range(world)]
    assert all(info.keys_M.tolist() == infos[0].keys_M.tolist() for info in infos)
    assert len(infos[0].keys_M) == sum(infos[0].rows_per_rank) == 8
    targets = [target for info in infos for target in info.targets_B.tolist()]
    assert targets == [0, 2, 4, 6]
    for info in infos:  # each query's target is its own positive
        assert (info.keys_M[info.targets_B] == info.known_BP[:, 0]).all()


def test_other_positives_of_a_query_are_known():
    rows = FakeExamples([example(0, 0, 6), example(1, 1, 7)])
    rows.known = {ITEMS[0].item_id: (ITEMS[7].item_id, ITEMS[8].item_id)}
    info = in_batch_info(np.array([0, 1]), 0, 1, rows, 0, torch.device("cpu"))
    assert info.known_BP.tolist() == [[0, 1], [1, PADDING_KEY]]  # item 8 is not in this batch


def test_prefetch_keeps_order_and_stays_ahead_by_its_depth():
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    steps = prefetch(make, range(3, 9), depth=2)
    assert next(steps) == 9
    time.sleep(0.1)
    assert made == [3, 4, 5]
    assert list(steps) == [16, 25, 36, 49, 64]


def test_prefetch_raises_at_the_step_an_error_belongs_to_and_stops_its_thread():
    def make(step: int) -> int:
        if step == 2:
            raise TrainingError("payload gone")
        return step

    steps = prefetch(make, range(5))
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(TrainingError, match="payload gone"):
        next(steps)
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_split_leaves_a_short_last_part():
    assert [len(part) for part in split(range(7), 3)] == [3, 3, 1]


LONG = Example(
    5, b"q" * 16, b"p" * 16, 0.9, tuple(bytes([n]) * 16 for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 9)),
    (0.1, 0.5, 0.3, 0.2, 0.9, 0.4, 0.6, 0.7, 0.8, 0.8),
)  # fmt: skip


def test_a_list_holds_the_hardest_negatives_in_order_around_the_positive():
    task = ranking_task(LONG, step=0, config=RerankerConfig())
    assert task.hardest_id == bytes([5]) * 16
    assert task.list_ids[task.gold] == LONG.positive_id
    negatives = [identifier[0] for identifier in task.list_ids if identifier != LONG.positive_id]
    assert negatives == [5, 9, 8, 7, 2, 6, 3, 4, 1][: len(negatives)]
    assert ranking_task(LONG, step=0, config=RerankerConfig()) == task


def test_length_and_slot_of_the_positive_are_uniform():
    tasks = [ranking_task(LONG, step, RerankerConfig(max_list_length=6)) for step in range(4000)]
    lengths = Counter(len(task.list_ids) for task in tasks)
    assert set(lengths) == {2, 3, 4, 5, 6}
    assert max(lengths.values()) - min(lengths.values()) < 160
    slots = Counter(task.gold for task in tasks if len(task.list_ids) == 6)
    assert set(slots) == set(range(6))
    assert max(slots.values()) < 1.5 * min(slots.values())


def test_published_slots_favour_the_front():
    config = RerankerConfig(max_list_length=6, gold_position="published")
    tasks = [ranking_task(LONG, step, config) for step in range(4000)]
    slots = Counter(task.gold for task in tasks if len(task.list_ids) == 6)
    total = sum(slots.values())
    assert slots[5] == 0
    assert [slots[slot] / total for slot in range(5)] == pytest.approx([0.32, 0.32, 0.20, 0.11, 0.05], abs=0.06)


def test_fewer_negatives_make_a_shorter_list():
    short = Example(0, b"q" * 16, b"p" * 16, 0.9, (b"n" * 16,) * 3, (0.2, 0.2, 0.2))
    for step in range(10):
        assert sorted(ranking_task(short, step, RerankerConfig()).list_ids) == [b"n" * 16, b"p" * 16]
