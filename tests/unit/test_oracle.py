"""The oracle: exact without noise; with noise, its AUC is the one asked for, and its draws never change."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.models_fixtures import FakeItem, make_item
from unime_ray.corpus.truth import Truth
from unime_ray.models.oracle import OracleJudge

TRUTH = Truth(by_image={}, by_text={"fox": "A", "wolf": "B", "cup": "C"}, pairs={("A", "B"): 0.6, ("B", "A"): 0.6})


def test_scores_are_relevance() -> None:
    verdicts = OracleJudge(TRUTH).score(make_item("fox"), [make_item(text) for text in ("fox", "wolf", "cup")])
    assert [v.score for v in verdicts] == pytest.approx([1, 0.6, 0], abs=1e-3)


def test_unknown_items_are_errors() -> None:
    oracle, stranger = OracleJudge(TRUTH), make_item("stranger")
    (first, second), (third,) = oracle.score_groups(
        [(make_item("fox"), [stranger, make_item("cup")]), (stranger, [make_item("cup")])]
    )
    assert first.score is None and stranger.item_id.hex() in (first.error or "")
    assert second.error is None and third.error is not None


@pytest.mark.parametrize("auc", [0.9, 0.7, 0.6])
def test_noise_gives_the_asked_auc(auc: float) -> None:
    names = {f"text {number}": str(number % 2) for number in range(4000)}
    oracle = OracleJudge(Truth({}, names, {}), noise_auc=auc)
    scores = np.array([v.score for v in oracle.score(make_item("text 1"), [make_item(name) for name in names])])
    relevant, others = scores[1::2], scores[0::2]
    measured = (relevant[:, None] > others[None, :]).mean()
    assert measured == pytest.approx(auc, abs=0.02)


def test_noise_is_a_function_of_the_pair_and_the_seed() -> None:
    def score(query: FakeItem, candidate: FakeItem, seed: int = 0) -> float | None:
        return OracleJudge(TRUTH, noise_auc=0.8, seed=seed).score(query, [make_item("cup"), candidate])[1].score

    fox, wolf = make_item("fox"), make_item("wolf")
    assert score(fox, wolf) == score(fox, wolf)
    assert len({score(fox, wolf), score(wolf, fox), score(fox, wolf, seed=1)}) == 3


def test_auc_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_auc"):
        OracleJudge(TRUTH, noise_auc=0.5)
