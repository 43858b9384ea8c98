"""Calibration: the fitted maps against closed forms and known probabilities, monotone, and read back as written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from unime_ray.calibration import Calibration, fit_calibration
from unime_ray.config import RunConfig
from unime_ray.errors import ConfigError
from unime_ray.preflight import check_truth


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def test_platt_finds_the_slope_and_intercept_that_made_the_labels() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3.0, size=40_000)
    relevant = rng.random(len(logits)) < sigmoid(0.5 * logits - 1.2)
    found = fit_calibration("platt", sigmoid(logits), relevant)
    assert found.slope == pytest.approx(0.5, abs=0.02) and found.intercept == pytest.approx(-1.2, abs=0.05)
    assert found.apply(sigmoid(np.array([2.0]))) == pytest.approx(sigmoid(0.5 * 2.0 - 1.2), abs=0.01)
    assert (found.pairs, found.positives) == (40_000, int(relevant.sum()))


def test_platt_keeps_separable_pairs_finite_and_orders_what_it_is_given() -> None:
    found = fit_calibration("platt", [0.1, 0.2, 0.8, 0.9], [False, False, True, True])
    values = found.apply(np.linspace(0, 1, 101))
    assert np.isfinite([found.slope, found.intercept]).all() and (np.diff(values) > 0).all()
    assert 0 < values[0] < 0.5 < values[-1] < 1


def test_isotonic_pools_what_falls() -> None:
    scores, relevant = [0.1, 0.2, 0.3, 0.3, 0.9], [False, True, False, False, True]
    found = fit_calibration("isotonic", scores, relevant)
    # 0.2 (true) and 0.3 (twice false) fall, so they become one block of one in three at their mean 0.8/3.
    assert found.scores == pytest.approx([0.1, 0.8 / 3, 0.9]) and found.probabilities == pytest.approx([0, 1 / 3, 1])
    assert found.apply([0.0, 0.1, 0.9, 1.0]) == pytest.approx([0, 0, 1, 1])
    assert np.isnan(found.apply(np.nan)) and found.one(None) is None


def test_isotonic_is_calibrated_where_platt_cannot_be() -> None:
    rng = np.random.default_rng(1)
    scores = rng.random(20_000)
    truth = np.where(scores < 0.5, 0.1, 0.6)
    relevant = rng.random(len(scores)) < truth
    step = fit_calibration("isotonic", scores, relevant).apply(scores)
    smooth = fit_calibration("platt", scores, relevant).apply(scores)
    assert np.abs(step - truth).mean() < 0.03 < np.abs(smooth - truth).mean()


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_it_reads_back_as_written_and_refuses_what_it_cannot_fit(method: str) -> None:
    found = fit_calibration(method, [0.1, 0.4, 0.6, np.nan, 0.9], [False, True, False, True, True], "targets")
    assert Calibration.from_json(found.to_json()) == found and found.pairs == 4 and found.use == "targets"
    with pytest.raises(ValueError, match="0 of 2 labelled pairs are relevant"):
        fit_calibration(method, [0.1, 0.2], [False, False])


def test_a_judge_that_is_wrong_way_round_is_not_turned() -> None:
    with pytest.raises(ValueError, match="scores fall where relevance rises"):
        fit_calibration("platt", [0.1, 0.2, 0.8, 0.9], [True, True, False, False])


def test_labels_that_are_not_there_are_told_before_work_starts(tmp_path: Path) -> None:
    judge = {"calibration": "platt", "calibration_labels": str(tmp_path / "none.csv")}
    with pytest.raises(ConfigError, match=r"judges.j.calibration_labels: no such file or folder: .*none.csv"):
        check_truth(RunConfig.model_validate({"judges": {"j": judge}}))
