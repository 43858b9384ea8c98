"""The ablation on the demo corpus: what the judge, its scores, the negatives and the loss are each worth.

    python benchmarks/ablation.py --seeds 3 --out runs/ablation
    python benchmarks/ablation.py --seeds 3 --out runs/ablation --groups losses judges
    python benchmarks/ablation.py --quick --out /tmp/quick      two steps an arm: does everything run

Mining runs once, by the stages, on a local Ray; then every (arm, seed) is trained and measured in this process, one
after the other, each arm with seed 0 before any with seed 1. A result is a Parquet file, so a run that was cut off goes
on where it was. Learning rates are chosen on the dev split, once a family of arms, on the same ladder;
no other choice looks at dev, and none at test. `--report` draws the tables and plots again from what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow.parquet as pq
from ablation_arms import BASE, JUDGE_MODELS, LEARNING_RATES, Arm, arms
from ablation_lab import Lab, mine
from ablation_report import KINDS, SHOWN_ON, file_name, mean_hit, result_path, write_report

import unime_ray
from unime_ray.artifacts import Run
from unime_ray.config import JudgeConfig, RunConfig, load_config
from unime_ray.preflight import resolve_demo

KEPT = ["dataset", "split", "query_id", "hit@1", "recall@10", "mrr"]
QUICK_STEPS = 2
BUNDLED = Path(unime_ray.__file__).parent / "data"


def main() -> None:
    options = _options()
    out = Path(options.out).resolve()
    wanted = [arm for arm in arms() if _wanted(arm, options)]
    missing = [name for name in JUDGE_MODELS if not (BUNDLED / name).is_dir()]
    wanted = [arm for arm in wanted if arm.judge not in missing]
    if not options.report:
        lab = _lab(out, options, wanted)
        rates = tune(lab, wanted, options) if not options.quick else {}
        for seed in range(0 if options.tune else options.seeds):
            for arm in wanted:
                if seed == 0 or arm.name != BASE:
                    _one(lab, arm, seed, rates.get(arm.tuned_as), options.quick)
    write_report(out, arms())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the mined run, results, tables and plots")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", help="only these arms")
    parser.add_argument("--groups", nargs="*", help="only arms of these groups")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two steps an arm, no choice of learning rates")
    parser.add_argument("--tune", action="store_true", help="only choose learning rates, on dev")
    parser.add_argument("--report", action="store_true", help="only draw tables and plots of what is there")
    return parser.parse_args()


def _wanted(arm: Arm, options: argparse.Namespace) -> bool:
    if options.arms:
        return arm.name in options.arms
    return not options.groups or arm.group in options.groups


def _lab(out: Path, options: argparse.Namespace, wanted: Sequence[Arm]) -> Lab:
    """The mined run (made unless it is there) and the judges that have judged it."""
    config = resolve_demo(load_config("demo", [f"run={out / 'run'}"]))
    every_query = config.evaluate.model_copy(update={"max_queries": None})
    config = config.model_copy(update={"judges": _judges(config), "evaluate": every_query})
    run = Run(config.run)
    mine(run, config, [name for name in config.judges if any(arm.judge == name for arm in wanted)])
    return Lab(run, config, out, options.threads)


def _judges(config: RunConfig) -> dict[str, JudgeConfig]:
    """A model judge for each bundled checkpoint there is, by its name; oracles are asked by the lab itself."""
    settings = next(judge for judge in config.judges.values() if judge.engine == "transformers")
    there = [name for name in JUDGE_MODELS if (BUNDLED / name).is_dir()]
    return {name: settings.model_copy(update={"model": str(BUNDLED / name)}) for name in there}


def tune(lab: Lab, wanted: Sequence[Arm], options: argparse.Namespace) -> dict[str, float]:
    """The learning rate of each family of arms: the best mean hit@1 on dev (see `mean_hit`), first seed."""
    by_name = {arm.name: arm for arm in arms()}
    rates: dict[str, float] = {}
    for family in dict.fromkeys(arm.tuned_as for arm in wanted if arm.name != BASE and arm.rerank is None):
        rates[family] = best_rate(lambda rate, arm=by_name[family]: _tried(lab, arm, rate))
    return rates


def best_rate(tried: Callable[[float], float]) -> float:
    """The rate with the highest `tried`: the middle three, then outwards as long as the outermost one is best."""
    found = {rate: tried(rate) for rate in LEARNING_RATES[1:-1]}
    for place in (0, -1):
        inner = LEARNING_RATES[1:-1][place]
        if max(found, key=lambda rate: found[rate]) == inner:
            found[LEARNING_RATES[place]] = tried(LEARNING_RATES[place])
    return max(found, key=lambda rate: found[rate])


def _tried(lab: Lab, arm: Arm, rate: float) -> float:
    path = _tried_path(lab, arm, rate)
    if not path.exists():
        _run_arm(lab, arm, 0, rate, {"dev": path})
    return mean_hit(pq.read_table(path))


def _tried_path(lab: Lab, arm: Arm, rate: float) -> Path:
    return lab.out / "dev" / f"{file_name(arm.name)}-{rate:g}.parquet"


def _one(lab: Lab, arm: Arm, seed: int, rate: float | None, quick: bool) -> None:
    """Results of one arm and seed on test, and where its group is shown on dev and train; what is there stays."""
    paths = {split: result_path(lab.out, arm.name, seed, split) for split in _splits(arm)}
    if rate is not None and seed == 0 and "dev" in paths:
        _take_over(_tried_path(lab, arm, rate), paths["dev"])
    paths = {split: path for split, path in paths.items() if not path.exists()}
    if paths:
        _run_arm(lab, arm, seed, rate, paths, QUICK_STEPS if quick else None)


def _splits(arm: Arm) -> tuple[str, ...]:
    return ("test", *(split for split, groups in SHOWN_ON.items() if arm.group in groups))


def _take_over(tried: Path, path: Path) -> None:
    """The choice of a rate has trained this arm with this seed already."""
    if tried.exists() and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tried, path)


def _run_arm(
    lab: Lab, arm: Arm, seed: int, rate: float | None, paths: Mapping[str, Path], steps: int | None = None
) -> None:
    """Train, and measure on the splits of `paths`; a table is written last and whole, so that it is there or not."""
    began, facts = time.perf_counter(), {"arm": arm.name, "seed": seed, "learning_rate": rate}
    backbone = lab.reference
    if arm.name != BASE:
        config = arm.reranker(seed, steps) if arm.rerank else arm.config(seed, rate, steps)
        examples, counts = lab.negatives(arm.judge, arm.selection(lab.config.select), arm.hard_labels)
        setting, cost = lab.train(config, examples)
        backbone = setting.backbone
        facts |= cost | {"judge": lab.judge_figures(arm.judge), "selected": dict(counts)}
    for split, path in paths.items():
        if arm.rerank is None:
            table = lab.retrieve(backbone, split)
        else:
            table = lab.rerank(backbone, lab.retrieve(lab.reference, split), *arm.rerank)
        facts["seconds"] = round(time.perf_counter() - began, 1)
        _save(path, table.select(KEPT), facts)
        print(
            f"{split} {arm.name} seed {seed} lr {rate}: hit@1 {100 * mean_hit(table, KINDS[split]):.2f} "
            f"in {facts['seconds']} s",
            flush=True,
        )


def _save(path: Path, table: Any, facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(f".{os.getpid()}.tmp")
    pq.write_table(table.replace_schema_metadata({"facts": json.dumps(facts)}), half)
    os.replace(half, path)


if __name__ == "__main__":
    main()
