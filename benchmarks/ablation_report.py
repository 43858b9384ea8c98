"""The ablation's tables and plots from its result files: paired differences over queries and seeds, and small SVGs.

An arm's value is the mean over the test sets of the artist adapted to (unweighted) of the mean over seeds and queries;
the tests of another artist stand beside it, for what adaptation costs elsewhere. A difference is taken query
by query and seed by seed against another arm; its 95 % interval comes from resampling queries (within each test set)
and seeds together. With one seed only queries are resampled, so such an interval is too narrow; the table says so.

Shapes: S seeds, Q queries of one test set, B bootstrap samples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ablation_arms import BASE, INFONCE, Arm
from ablation_plots import Point, dots_with_intervals, scatter

SAMPLES = 2000
METRICS = ("hit@1", "mrr")
ADAPTED, ELSEWHERE = ("queries", "concepts", "compositions"), ("artist",)
"""Kinds of test sets: what adaptation is for, and what it may cost."""
TRAINED = ("t2i", "i2t")
"""Kinds of the test sets of split train: a sample of the queries trained with."""
KINDS = {"test": ADAPTED, "dev": ADAPTED, "train": TRAINED}
SHOWN_ON = {"dev": ("losses", "judges"), "train": ("losses",)}
"""Groups of arms that are shown on other splits, too."""
GROUPS = {
    "losses": "Losses and negatives",
    "judges": "Judges",
    "negatives": "Number of negatives",
    "temperature": "Judge temperature",
    "selection": "Selection",
    "rerankers": "Rerankers",
}


@dataclass(frozen=True)
class Result:
    """One arm: per test set the values (S, Q) of each metric, and what each run wrote down about itself."""

    arm: Arm
    values: dict[str, dict[str, np.ndarray]]
    facts: list[dict[str, Any]]

    @property
    def seeds(self) -> int:
        return len(self.facts)

    def mean(self, metric: str, kinds: Sequence[str] = ADAPTED) -> float:
        """In percent, over the test sets of these kinds."""
        found = [values.mean() for name, values in self.values[metric].items() if of_kind(name, kinds)]
        return 100 * float(np.mean(found))


def of_kind(dataset: str, kinds: Sequence[str]) -> bool:
    return dataset.rpartition("_")[2] in kinds


def mean_hit(table: pa.Table, kinds: Sequence[str] = ADAPTED) -> float:
    """Mean hit@1 over the test sets of these kinds, unweighted."""
    names = np.array(table["dataset"].to_pylist())
    hits = table["hit@1"].to_numpy()
    return float(np.mean([hits[names == name].mean() for name in np.unique(names) if of_kind(name, kinds)]))


def file_name(arm: str) -> str:
    return arm.replace("/", "__")


def result_path(out: Path, arm: str, seed: int | str, split: str) -> Path:
    return out / ("results" if split == "test" else f"results_{split}") / f"{file_name(arm)}-{seed}.parquet"


def load_results(out: Path, arms: Sequence[Arm], split: str = "test") -> dict[str, Result]:
    """The arms that have results on a split, by name. Seeds are counted from 0 without a gap."""
    found = {}
    for arm in arms:
        paths = []
        while (path := result_path(out, arm.name, len(paths), split)).exists():
            paths.append(path)
        if paths:
            found[arm.name] = _result(arm, paths)
    return found


def _result(arm: Arm, paths: Sequence[Path]) -> Result:
    tables = [pq.read_table(path).sort_by([("dataset", "ascending"), ("query_id", "ascending")]) for path in paths]
    names = np.array(tables[0]["dataset"].to_pylist())
    values: dict[str, dict[str, np.ndarray]] = {}
    for metric in METRICS:
        columns_SQ = np.stack([table[metric].to_numpy() for table in tables])
        values[metric] = {str(name): columns_SQ[:, names == name] for name in np.unique(names)}
    return Result(arm, values, [json.loads(table.schema.metadata[b"facts"]) for table in tables])


@dataclass(frozen=True)
class Gain:
    """A difference in percentage points with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def gain(a: Result, b: Result, metric: str = "hit@1", kinds: Sequence[str] = ADAPTED) -> Gain:
    """`a` minus `b` over the test sets of these kinds, seed by seed (base has one, the same for all)."""
    rng = np.random.default_rng(0)
    seeds = max(a.seeds, b.seeds) if BASE in (a.arm.name, b.arm.name) else min(a.seeds, b.seeds)
    drawn_BS = rng.multinomial(seeds, [1 / seeds] * seeds, SAMPLES) / seeds
    values, samples = [], []
    for name in a.values[metric]:
        if not of_kind(name, kinds):
            continue
        delta_SQ = _seeds(a.values[metric][name], seeds) - _seeds(b.values[metric][name], seeds)
        queries = delta_SQ.shape[1]
        drawn_BQ = rng.multinomial(queries, [1 / queries] * queries, SAMPLES) / queries
        values.append(delta_SQ.mean())
        samples.append(np.einsum("bs,sq,bq->b", drawn_BS, delta_SQ, drawn_BQ, optimize=True))
    low, high = np.quantile(np.mean(samples, axis=0), [0.025, 0.975])
    return Gain(100 * float(np.mean(values)), 100 * float(low), 100 * float(high))


def _seeds(values_SQ: np.ndarray, seeds: int) -> np.ndarray:
    return np.repeat(values_SQ, seeds, axis=0) if len(values_SQ) == 1 else values_SQ[:seeds]


def dev_table(out: Path) -> list[str]:
    """hit@1 of the rates tried on dev: the mean, and in brackets the mean over tests of another artist."""
    found: dict[str, dict[float, str]] = {}
    for path in sorted((out / "dev").glob("*.parquet")):
        table = pq.read_table(path)
        facts = json.loads(table.schema.metadata[b"facts"])
        cell = f"{100 * mean_hit(table):.1f} ({100 * mean_hit(table, ELSEWHERE):.1f})"
        found.setdefault(facts["arm"], {})[facts["learning_rate"]] = cell
    rates = sorted({rate for cells in found.values() for rate in cells})
    lines = ["| arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---|" + "---|" * len(rates)]
    return lines + [
        f"| `{arm}` | " + " | ".join(cells.get(rate, "") for rate in rates) + " |" for arm, cells in found.items()
    ]


PAIRS = (
    ("hard_filtered", "infonce"),
    ("hybrid", "infonce"),
    ("hard_filtered", "hard_unjudged"),
    ("hybrid", "hard_filtered"),
    ("hard_filtered_wide", "infonce_wide"),
    ("hybrid_wide", "infonce_wide"),
    ("infonce_wide", "hard_filtered"),
)
"""Differences that the claim is about: judged negatives at equal queries, the filter, the scores; equal items."""


def pairs_table(found: dict[str, dict[str, Result]]) -> list[str]:
    """Differences of `PAIRS` on each split of `found`, and on the sets of test and dev together."""
    both = {name: _together(found["test"][name], found["dev"][name]) for name in found["test"] if name in found["dev"]}
    columns = {"test": (found["test"], ADAPTED), "dev": (found["dev"], ADAPTED), "test and dev": (both, ADAPTED)}
    columns["queries trained with"] = found["train"], TRAINED
    lines = ["| arms | seeds | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for a, b in PAIRS:
        if a in both and b in both:
            cells = [
                str(gain(results[a], results[b], kinds=kinds)) if a in results and b in results else ""
                for results, kinds in columns.values()
            ]
            lines.append(f"| `{a}` - `{b}` | {min(both[a].seeds, both[b].seeds)} | " + " | ".join(cells) + " |")
    return lines


def _together(test: Result, dev: Result) -> Result:
    """The sets of two splits as one result, of the seeds that both have."""
    seeds = min(test.seeds, dev.seeds)
    values = {
        metric: {
            f"{split}_{name}": rows[:seeds]
            for split, one in (("test", test), ("dev", dev))
            for name, rows in one.values[metric].items()
        }
        for metric in METRICS
    }
    return Result(test.arm, values, test.facts[:seeds])


def write_report(out: Path, arms: Sequence[Arm]) -> None:
    """`table.md`, `losses.svg` and `judges.svg` in `out`."""
    results = load_results(out, arms)
    if BASE not in results or INFONCE not in results:
        print(f"no report yet: it needs the arms {BASE} and {INFONCE}")
        return
    shown = {"test": results} | {split: load_results(out, arms, split) for split in SHOWN_ON}
    lines = ["### Differences", "", *pairs_table(shown), "", *_tables(results)]
    for split in SHOWN_ON:
        if {BASE, INFONCE} <= shown[split].keys():
            lines += _tables(shown[split], f", on {split}", KINDS[split])
    lines += ["### Rates tried on dev", "", *dev_table(out), ""]
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    losses = [result for result in results.values() if result.arm.group == "losses" and result.arm.name != BASE]
    points = [_point(result, results[BASE]) for result in losses]
    (out / "losses.svg").write_text(dots_with_intervals(points, "hit@1 gained over base, points"), encoding="utf-8")
    series = {name: _judge_points(results, name) for name in ("hybrid", "unime_v2")}
    line = gain(results[INFONCE], results[BASE])
    drawn = scatter({name: points for name, points in series.items() if points}, line.value, _AXES)
    (out / "judges.svg").write_text(drawn, encoding="utf-8")
    print(f"{out / 'table.md'}: {len(results)} arms")


_AXES = ("the judge's AUC over the mined candidates", "hit@1 gained over base, points", "InfoNCE")


def _point(result: Result, base: Result, x: float = 0.0) -> Point:
    found = gain(result, base)
    return Point(result.arm.name, x, found.value, found.low, found.high)


def _judge_points(results: dict[str, Result], family: str) -> list[Point]:
    """The family's arms by the AUC of their judge on hidden positives, best last."""
    mine = [
        results[name] for name in results if name == family or name.startswith((f"{family}/oracle@", f"{family}/tiny"))
    ]
    points = [
        _point(result, results[BASE], result.facts[0]["judge"]["hidden_auc"])
        for result in mine
        if result.arm.group in ("losses", "judges")
    ]
    return sorted(points, key=lambda point: point.x)


def _tables(results: dict[str, Result], where: str = "", kinds: Sequence[str] = ADAPTED) -> list[str]:
    lines: list[str] = []
    for group, title in GROUPS.items():
        members = [result for result in results.values() if result.arm.group == group]
        if members:
            lines += [f"### {title}{where}", "", *_table(members, results, kinds), ""]
    return lines


def _table(members: Sequence[Result], results: dict[str, Result], kinds: Sequence[str]) -> list[str]:
    """hit@1 over `kinds` and its gains; beside them the tests of another artist, of which train has none."""
    judged, beside = members[0].arm.group == "judges", ELSEWHERE if kinds == ADAPTED else ()
    heads = ["arm", "what", "seeds", "lr", "items", *kinds, "mean", "- base", "- infonce"]
    heads += [*beside, "- base"] if beside else []
    heads[5:5] = ["judge's AUC", "filter: precision, recall"] if judged else []
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for result in members:
        facts = result.facts[0]
        cells = [f"`{result.arm.name}`", result.arm.what, str(result.seeds), _rate(facts), f"{facts.get('items', 0):,}"]
        cells += _judge_cells(facts["judge"]) if judged else []
        cells += [f"{result.mean('hit@1', [kind]):.1f}" for kind in kinds] + [f"{result.mean('hit@1', kinds):.1f}"]
        cells += [_against(result, results[name], kinds) for name in (BASE, INFONCE)]
        if beside:
            cells += [f"{result.mean('hit@1', beside):.1f}", _against(result, results[BASE], beside)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _rate(facts: dict[str, Any]) -> str:
    rate = facts.get("learning_rate")
    return f"{rate:g}" if rate else "-"


def _judge_cells(judge: dict[str, Any]) -> list[str]:
    precision, recall = (judge[name] if judge[name] is not None else float("nan") for name in ("precision", "recall"))
    return [f"{judge['hidden_auc']:.2f}", f"{precision:.2f}, {recall:.2f}"]


def _against(result: Result, other: Result, kinds: Sequence[str]) -> str:
    return "" if result.arm.name == other.arm.name else str(gain(result, other, kinds=kinds))
