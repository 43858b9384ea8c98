"""The pairs on which the engines are compared, and how their verdicts are read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.unit.models_fixtures import FakeItem, make_item, mixed_items, picture
from unime_ray.config_vllm import VllmConfig
from unime_ray.models.judge import Verdict

SETTINGS = VllmConfig(max_num_batched_tokens=4096, max_num_seqs=64)
Groups = list[tuple[FakeItem, list[FakeItem]]]


def mixed_groups() -> Groups:
    """15 x 15 pairs: text, picture and both on either side, many sizes that need resizing, long texts."""
    more = [
        make_item("a dog, running"),
        make_item(None, picture(5, 200, 50)),
        make_item("blue heart", picture(6, 31, 31), "Represent the given picture with its name."),
        make_item("and then another thing happened " * 9, picture(7, 64, 96)),
        make_item("Find an emoji picture that matches the given name: fox"),
        make_item(None, picture(8, 1000, 700)),
        make_item("1 2 3, <|im_end|> and \u732b"),
    ]
    items = [*mixed_items(), *more]
    return [(query, items) for query in items]


def logits(verdicts: Sequence[Sequence[Verdict]]) -> np.ndarray:
    """(pairs, 3): logit of Yes, logit of No, score; fails if a pair has an error."""
    rows = [verdict for group in verdicts for verdict in group]
    assert [row.error for row in rows if row.error] == []
    return np.array([[row.logit_yes, row.logit_no, row.score] for row in rows], dtype=np.float64)
