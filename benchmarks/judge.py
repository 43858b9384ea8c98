"""The judge against other ways of scoring the same pairs: what sharing a query's prefix is worth.

    python benchmarks/judge.py                                   # a random model, prompts as long as a real one's
    python benchmarks/judge.py --vllm                            # vLLM too, in an environment that has it
    python benchmarks/judge.py --model tiny
    python benchmarks/judge.py --model Qwen/Qwen2-VL-7B-Instruct --dtype bfloat16 --queries 8
    python benchmarks/judge.py --shape 7B --dtype bfloat16       # random weights of that size: nothing to download

All ways are timed in turn within each repeat, so that a busy machine slows all of them; figures are medians over
`--repeats`. On a CPU, time is CPU time of this process; on a GPU, wall time.

    naive         one pair at a time through transformers' own `generate`, its own image processor and attention
    batched       whole prompts in batches, our forward: each pair pays for its query again
    shared        what `unime-ray` runs: a query's prefix once for all its candidates
    turned        the same with `prompt_order: candidate_first`: a candidate's prefix once for all its queries
    vllm ...      see judge_vllm.py

`text -> picture` comes three times: neighbouring queries that share most candidates, every picture new, and pictures
that earlier queries have shown already (`--reuse` pairs a picture), their features in the cache. naive has no cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from engines import FIND, NAME, BenchItem, demo, make  # first: it puts the checkout on the path
from judge_cost import Groups, Sizes, Work, extrapolate, flops_of, sizes_of, work_of
from judge_ways import Naive, Way, achievable, rates, transformers_ways
from random_model import PUBLISHED, SHAPES, save_random_model, small_shape

from unime_ray.config import PixelBudget
from unime_ray.models.backbone import Backbone
from unime_ray.models.names import resolve_model

SAME_ENGINE = ("vllm random", "vllm embeds")
"""Ways that the engine of `vllm` runs."""
REUSE = 7.0
"""Pairs a picture among the demo's text queries: 23,250 pairs over 3,333 pictures."""


@dataclass
class Scene:
    """What is judged, and the items whose pictures were met before."""

    groups: Groups
    known: list[BenchItem] = field(default_factory=list)


def report(direction: str, found: dict[str, list[float]], ways: list[Way], works: dict[str, Work], sizes: Sizes,
           peak: float) -> None:  # fmt: skip
    work = works["query_first"]
    print(f"\n{direction}: {work.prefix:.0f} tokens before the candidate, {work.suffix:.0f} from it on, "
          f"{work.pictures:.2f} pictures a pair ({work.distinct:.2f} distinct)")  # fmt: skip
    print(f"{'':<14}{'pairs/s':>10}{'spread':>9}{'x naive':>9}{'x batched':>11}{'MFLOP':>9}{'of peak':>9}{'hits':>7}")
    hits = {way.name: way.hit_rate for way in ways}
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, rate in medians.items():
        spread = (max(found[name]) - min(found[name])) / rate
        flops = flops_of(name, works, sizes, hits[name])
        hit = "" if hits[name] is None else f"{hits[name]:.0%}"
        ratios = [f"{rate / medians[other]:.2f}" if other in medians else "" for other in ("naive", "batched")]
        print(f"{name:<14}{rate:>10.1f}{spread:>9.0%}{ratios[0]:>9}{ratios[1]:>11}{flops / 1e6:>9.0f}"
              f"{rate * flops / peak:>9.1%}{hit:>7}", flush=True)  # fmt: skip


def scenes_of(options: argparse.Namespace) -> dict[str, Scene]:
    """Groups of each direction; neighbouring queries share all but `--stride` of their candidates."""
    pictures, names = demo(options.pool)
    asked = [make(name, None, FIND) for name in names]
    seen = [make("", image, NAME) for image in pictures]
    named = [make(name) for name in names]
    shown = [make("", image, "Represent the given picture.") for image in pictures]

    def groups(queries: list[BenchItem], pool: list[BenchItem], stride: int) -> Groups:
        places = range(options.candidates)
        return [
            (queries[q], [pool[(q * stride + place) % len(pool)] for place in places]) for q in range(options.queries)
        ]

    apart = groups(asked, shown, options.candidates)
    met = list({item.item_id: item for _, candidates in apart for item in candidates}.values())
    share = 1 / options.reuse
    known = [item for index, item in enumerate(met) if int((index + 1) * share) == int(index * share)]
    return {
        "picture -> text": Scene(groups(seen, named, options.stride)),
        "text -> picture": Scene(groups(asked, shown, options.stride)),
        "text -> picture, all new": Scene(apart),
        "text -> picture, met before": Scene(apart, known),
        "picture -> picture": Scene(groups(seen, shown, options.stride)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: a small random model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--pool", type=int, default=512, help="distinct items the candidates are taken from")
    parser.add_argument("--stride", type=int, default=7, help="candidates that the next query does not share")
    parser.add_argument("--reuse", type=float, default=REUSE, help="pairs a picture where pictures were met before")
    parser.add_argument("--vllm", action="store_true", help="vLLM too")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of a published model's size")
    parser.add_argument("--layers", type=int, default=None, help="of the random model's language part")
    parser.add_argument("--vocabulary", type=int, default=None, help="of the random model: rows of its language head")
    parser.add_argument("--picture-tokens", type=int, default=64, help="of the random model: 64 is 224x224 pixels")
    parser.add_argument("--hidden", type=int, default=128, help="width of the random model, a multiple of 128")
    parser.add_argument("--batch-tokens", type=int, default=None, help="default: the engine's own")
    parser.add_argument("--max-pixels", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of the ways to run")
    parser.add_argument("--directions", nargs="*", help="for instance 'picture -> text'")
    parser.add_argument("--kept-up", type=float, default=4e14, help="FLOP/s of a GPU, for the extrapolation alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        shape = PUBLISHED.get(options.shape) or small_shape(options.hidden, vocabulary=options.vocabulary)
        shape = replace(shape, layers=options.layers or shape.layers)
        model = options.model or save_random_model(Path(folder), options.picture_tokens, shape, options.dtype)
        compare(options, model)
    extrapolate(options.kept_up)


def compare(options: argparse.Namespace, model: str) -> None:
    pixels = PixelBudget(max_pixels=options.max_pixels, min_pixels=options.max_pixels)
    backbone = Backbone.load(model, dtype=options.dtype, pixels=pixels)
    scenes = {name: scene for name, scene in scenes_of(options).items() if name in (options.directions or [name])}
    works = {name: works_of(backbone, scene) for name, scene in scenes.items()}
    ways = ways_of(options, model, backbone, pixels, longest_prompt(works))
    peak = achievable(backbone.device, options.dtype)
    parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
    print(f"{options.model or options.shape or 'random'}: {parameters / 1e6:.1f}M parameters, {options.dtype}, "
          f"{backbone.device}, {options.threads} threads, {options.queries} queries x {options.candidates} candidates, "
          f"median of {options.repeats}; matrix product {peak / 1e9:.0f} GFLOP/s")  # fmt: skip
    for direction, scene in scenes.items():
        items = [item for query, candidates in scene.groups for item in (query, *candidates)]
        picture = next(p for p in backbone.pictures(items) if p is not None)
        sizes = sizes_of(backbone, len(picture.patches))  # type: ignore[union-attr]
        found = rates(ways, scene.groups, options.repeats, backbone.device, scene.known)
        report(direction, found, ways, works[direction], sizes, peak)


def works_of(backbone: Backbone, scene: Scene) -> dict[str, Work]:
    return {order: work_of(backbone, scene.groups, order, scene.known) for order in ("query_first", "candidate_first")}


def longest_prompt(works: dict[str, dict[str, Work]]) -> float:
    """Tokens, of the direction with the longest ones."""
    return max(work.prefix + work.suffix for orders in works.values() for work in orders.values())


def ways_of(
    options: argparse.Namespace, model: str, backbone: Backbone, pixels: PixelBudget, prompt_tokens: float
) -> list[Way]:
    """All ways that were asked for; an engine of vLLM starts only if one of its ways was."""
    ways = []
    if not options.only or set(options.only) & {"naive", "batched", "shared", "turned"}:
        naive = Naive(resolve_model(model), options.dtype, backbone.device, pixels)
        ways = transformers_ways(backbone, naive, options.batch_tokens)
    starts: dict[str, Callable[[], list[Way]]] = {}
    if options.vllm:
        from judge_vllm import vllm_ways

        starts = vllm_ways(model, backbone, options.dtype, pixels, prompt_tokens)
    for name, start in starts.items():
        if not options.only or any(one == name or (name == "vllm" and one in SAME_ENGINE) for one in options.only):
            ways += start()
    return [way for way in ways if not options.only or way.name in options.only]


if __name__ == "__main__":
    main()
