"""The ablation's arms are configs that the library takes, and its differences are paired over queries and seeds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import ablation
import ablation_arms
import ablation_report
from ablation_plots import Point, dots_with_intervals, scatter

from unime_ray.config import SelectConfig

ARMS = {arm.name: arm for arm in ablation_arms.arms()}
JUDGE = {"hidden_auc": 0.9, "precision": 1.0, "recall": 0.5}


def save(out: Path, name: str, seed: int, hits: np.ndarray, split: str = "test") -> None:
    """One result file: as many test sets of as many queries each."""
    sets = [f"emoji_t2i_{kind}" for kind in (*ablation_report.ADAPTED, *ablation_report.ELSEWHERE)]
    count = len(hits)
    table = pa.table(
        {
            "dataset": [sets[index * len(sets) // count] for index in range(count)],
            "query_id": [f"{index:04d}" for index in range(count)],
            "hit@1": hits.astype(float),
            "mrr": hits.astype(float),
        }
    )
    facts = {"arm": name, "seed": seed, "learning_rate": 1e-4, "items": 1000, "judge": JUDGE}
    path = ablation_report.result_path(out, name, seed, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"facts": json.dumps(facts)}), path)


def test_every_arm_is_a_valid_config_and_takes_its_rate_from_an_arm():
    for arm in ARMS.values():
        assert ARMS[arm.tuned_as].tuned_as == arm.tuned_as
        assert arm.selection(SelectConfig()).num_negatives >= 8
        if arm.rerank is None and arm.name != ablation_arms.BASE:
            assert arm.config(seed=2, learning_rate=1e-5).learning_rate == 1e-5
        else:
            assert arm.reranker(seed=2, steps=1).steps == 1


def test_arms_of_one_table_differ_from_each_other():
    configs = [
        (
            arm.judge,
            arm.hard_labels,
            arm.config(0, None).model_dump_json(),
            arm.selection(SelectConfig()).model_dump_json(),
        )
        for arm in ARMS.values()
        if arm.rerank is None and arm.name != ablation_arms.BASE
    ]
    assert len(set(configs)) == len(configs)


@pytest.mark.parametrize(
    ("peak", "asked"),
    [(8e-4, (3e-4, 8e-4, 1.5e-3)), (3e-3, (3e-4, 8e-4, 1.5e-3, 3e-3)), (1e-4, (3e-4, 8e-4, 1.5e-3, 1e-4))],
)
def test_rates_are_tried_outwards_while_the_outermost_is_best(peak, asked):
    tried = []

    def value(rate):
        tried.append(rate)
        return -abs(np.log(rate / peak))

    assert ablation.best_rate(value) == peak
    assert tuple(tried) == asked


def test_a_gain_is_paired_over_queries_and_seeds(tmp_path):
    rng = np.random.default_rng(0)
    base = (rng.random(300) < 0.4).astype(int)
    save(tmp_path, "base", 0, base)
    for seed in range(3):
        better = base.copy()
        better[np.flatnonzero(base == 0)[seed::6]] = 1
        save(tmp_path, "infonce", seed, better)
        save(tmp_path, "hybrid", seed, better)
    results = ablation_report.load_results(tmp_path, list(ARMS.values()))
    found = ablation_report.gain(results["infonce"], results["base"])
    assert found.value == pytest.approx(100 * (0.6 / 6), abs=2.0)
    assert 0 < found.low < found.value < found.high
    same = ablation_report.gain(results["hybrid"], results["infonce"])
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_what_adaptation_costs_elsewhere_is_not_in_the_mean():
    table = pa.table({"dataset": ["emoji_t2i_queries", "emoji_i2t_artist"], "hit@1": [1.0, 0.0]})
    assert ablation_report.mean_hit(table) == 1.0
    assert ablation_report.mean_hit(table, ablation_report.ELSEWHERE) == 0.0


def test_the_rates_tried_on_dev_are_in_the_report(tmp_path):
    for rate, hits in ((3e-4, [1.0, 0.0]), (8e-4, [1.0, 1.0])):
        table = pa.table({"dataset": ["emoji_t2i_queries", "emoji_t2i_artist"], "hit@1": hits})
        facts = {"arm": "infonce", "seed": 0, "learning_rate": rate}
        path = tmp_path / "dev" / f"infonce-{rate:g}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table.replace_schema_metadata({"facts": json.dumps(facts)}), path)
    lines = ablation_report.dev_table(tmp_path)
    assert "| `infonce` | 100.0 (0.0) | 100.0 (100.0) |" in lines


def test_seeds_that_disagree_widen_the_interval(tmp_path):
    base = np.zeros(300, dtype=int)
    save(tmp_path, "base", 0, base)
    for seed in range(3):
        steady, shaky = base.copy(), base.copy()
        steady[::10] = 1
        shaky[:: (5 if seed == 0 else 20)] = 1
        save(tmp_path, "infonce", seed, steady)
        save(tmp_path, "hybrid", seed, shaky)
    results = ablation_report.load_results(tmp_path, list(ARMS.values()))
    widths = {}
    for name in ("infonce", "hybrid"):
        found = ablation_report.gain(results[name], results["base"])
        assert found.value == pytest.approx(10.0, abs=0.5)
        widths[name] = found.high - found.low
    assert widths["hybrid"] > 1.3 * widths["infonce"]


def test_differences_are_shown_on_each_split_and_on_both_together(tmp_path):
    base = np.zeros(300, dtype=int)
    hits = {"test": base.copy(), "dev": base.copy()}
    hits["test"][::10] = 1
    hits["dev"][::5] = 1
    for split, better in hits.items():
        for name, values in (("infonce", base), ("hybrid", better)):
            save(tmp_path, name, 0, values, split)
    found = {split: ablation_report.load_results(tmp_path, list(ARMS.values()), split) for split in (*hits, "train")}
    (row,) = [line for line in ablation_report.pairs_table(found) if "`hybrid` - `infonce`" in line]
    shown = [cell.split(" (")[0].strip() for cell in row.split("|")[3:-1]]
    assert shown == ["+10.2", "+20.0", "+15.1", ""]


def test_the_report_has_a_row_an_arm_and_plots_that_parse(tmp_path):
    base = np.zeros(300, dtype=int)
    save(tmp_path, "base", 0, base)
    for name in ("infonce", "hybrid", "hybrid/oracle@0.8", "unime_v2"):
        hits = base.copy()
        hits[::7] = 1
        save(tmp_path, name, 0, hits)
    ablation_report.write_report(tmp_path, list(ARMS.values()))
    table = (tmp_path / "table.md").read_text()
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == [
        "base",
        "infonce",
        "unime_v2",
        "hybrid",
        "hybrid/oracle@0.8",
    ]
    for name in ("losses.svg", "judges.svg"):
        assert ElementTree.parse(tmp_path / name).getroot().tag.endswith("svg")


def test_plots_escape_names_and_show_every_point():
    points = [Point("a<b", 0.6, 1.0, 0.5, 1.5), Point("c", 0.9, -1.0, -2.0, 0.0)]
    for text in (dots_with_intervals(points, "gain"), scatter({"one": points}, 0.5, ("x", "y", "line"))):
        root = ElementTree.fromstring(text)
        assert len(root.findall("{http://www.w3.org/2000/svg}circle")) >= 2
