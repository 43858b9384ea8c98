"""The judge against other ways of scoring the same pairs: what sharing a query's prefix is worth.

    python benchmarks/judge.py                                   # a random model, prompts as long as a real one's
    python benchmarks/judge.py --model tiny
    python benchmarks/judge.py --model Qwen/Qwen2-VL-7B-Instruct --dtype bfloat16 --queries 8

All ways are timed in turn within each repeat, so that a busy machine slows all of them; figures are medians over
`--repeats`. On a CPU, time is CPU time of this process; on a GPU, wall time.

    naive         one pair at a time through transformers' own `generate`, its own image processor and attention
    batched       whole prompts in batches, our forward: each pair pays for its query again
    shared        what `unime-ray` runs: a query's prefix once for all its candidates
    turned        the same with `prompt_order: candidate_first`: a candidate's prefix once for all its queries
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engines import FIND, NAME, BenchItem, demo, make  # first: it puts the checkout on the path
from judge_cost import Groups, Sizes, Work, extrapolate, flops_of, sizes_of, work_of
from PIL import Image
from random_model import save_random_model
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from unime_ray import prompts
from unime_ray.config import PixelBudget
from unime_ray.models.backbone import Backbone
from unime_ray.models.judge_transformers import TransformersJudge
from unime_ray.models.names import resolve_model

NAIVE_PAIRS = 40
MATMUL = 1024


@dataclass
class Way:
    """One way of scoring: `run` returns how many pairs it scored."""

    name: str
    run: Callable[[Groups], int]
    forget: Callable[[], object] = lambda: None
    """Called before each repeat: no cache survives from the last."""


class Naive:
    """Pairs one at a time, as evaluation code is commonly written."""

    def __init__(self, path: str, dtype: str, device: torch.device, pixels: PixelBudget) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        size = {"size": {"shortest_edge": pixels.max_pixels, "longest_edge": pixels.max_pixels}}
        self.processor = AutoImageProcessor.from_pretrained(path, backend="pil", **(size if pixels.max_pixels else {}))
        loaded = AutoModelForImageTextToText.from_pretrained(path, dtype=getattr(torch, dtype))
        self.model = loaded.eval().to(device)
        self.answers = [self.tokenizer.encode(word, add_special_tokens=False)[0] for word in (prompts.YES, prompts.NO)]

    def __call__(self, groups: Groups) -> int:
        pairs = [(query, candidate) for query, candidates in groups for candidate in candidates][:NAIVE_PAIRS]
        for query, candidate in pairs:
            self.score(query, candidate)
        return len(pairs)

    @torch.no_grad()
    def score(self, query: BenchItem, candidate: BenchItem) -> float:
        text = prompts.judge_prefix(query.rendered) + candidate.rendered
        turn = [{"role": "user", "content": text}]
        whole = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        images = [Image.open(io.BytesIO(i.image)).convert("RGB") for i in (query, candidate) if i.image is not None]
        inputs: dict[str, Any] = dict(self.processor(images=images, return_tensors="pt")) if images else {}
        for grid in inputs.get("image_grid_thw", []):
            marks = "<|image_pad|>" * int(grid.prod() // self.processor.merge_size**2)
            whole = whole.replace(prompts.IMAGE_MARKER, f"<|vision_start|>{marks}<|vision_end|>", 1)
        inputs |= self.tokenizer(whole, return_tensors="pt", add_special_tokens=False)
        image_id = self.model.config.image_token_id
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_id).int()
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        made = self.model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        return float(made.scores[0][0, self.answers].float().softmax(-1)[0])


def transformers_ways(backbone: Backbone, naive: Naive, batch_tokens: int | None) -> list[Way]:
    tokens = {} if batch_tokens is None else {"batch_tokens": batch_tokens}
    ways = [Way("naive", naive)]
    kinds = (("batched", False, "query_first"), ("shared", True, "query_first"), ("turned", True, "candidate_first"))
    for name, share, order in kinds:
        judge = TransformersJudge(backbone, share_prefix=share, prompt_order=order, **tokens)
        ways.append(Way(name, lambda groups, judge=judge: _count(judge.score_groups(groups)), backbone.forget_features))
    return ways


def _count(verdicts: list[list[Any]]) -> int:
    failed = [verdict.error for group in verdicts for verdict in group if verdict.error]
    assert not failed, failed[0]
    return sum(len(group) for group in verdicts)


def rates(ways: list[Way], groups: Groups, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Pairs per second of every way, one figure per repeat; the first round warms up and is not counted."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found: dict[str, list[float]] = {way.name: [] for way in ways}
    for repeat in range(repeats + 1):
        for way in ways:
            way.forget()
            started = clock()
            pairs = way.run(groups)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                found[way.name].append(pairs / (clock() - started))
    return found


def achievable(device: torch.device, dtype: str) -> float:
    """Floating-point operations per second of a plain matrix product, median of five."""
    size = 8 * MATMUL if device.type == "cuda" else MATMUL
    left = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = []
    for _ in range(6):
        started = clock()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return 2 * size**3 / statistics.median(seconds[1:])


def report(direction: str, found: dict[str, list[float]], ways: list[Way], works: dict[str, Work], sizes: Sizes,
           peak: float) -> None:  # fmt: skip
    work = works["query_first"]
    print(f"\n{direction}: {work.prefix:.0f} tokens before the candidate, {work.suffix:.0f} from it on, "
          f"{work.pictures:.2f} pictures a pair ({work.distinct:.2f} distinct)")  # fmt: skip
    print(f"{'':<14}{'pairs/s':>10}{'spread':>9}{'x naive':>9}{'x batched':>11}{'MFLOP':>9}{'of peak':>9}")
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, rate in medians.items():
        spread = (max(found[name]) - min(found[name])) / rate
        flops = flops_of(name, works, sizes)
        ratios = [f"{rate / medians[other]:.2f}" if other in medians else "" for other in ("naive", "batched")]
        print(f"{name:<14}{rate:>10.1f}{spread:>9.0%}{ratios[0]:>9}{ratios[1]:>11}{flops / 1e6:>9.0f}"
              f"{rate * flops / peak:>9.1%}", flush=True)  # fmt: skip


def strided_groups(options: argparse.Namespace) -> dict[str, Groups]:
    """Groups of each direction; neighbouring queries share all but `--stride` of their candidates."""
    pictures, names = demo(options.pool)
    asked = [make(name, None, FIND) for name in names]
    seen = [make("", image, NAME) for image in pictures]
    named = [make(name) for name in names]
    shown = [make("", image, "Represent the given picture.") for image in pictures]
    sides = {
        "picture -> text": (seen, named),
        "text -> picture": (asked, shown),
        "picture -> picture": (seen, shown),
    }
    return {
        name: [
            (many[query], [pool[(query * options.stride + place) % len(pool)] for place in range(options.candidates)])
            for query in range(options.queries)
        ]
        for name, (many, pool) in sides.items()
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
        model = options.model or save_random_model(Path(folder), options.picture_tokens, options.hidden)
        compare(options, model)
    extrapolate(options.kept_up)


def compare(options: argparse.Namespace, model: str) -> None:
    pixels = PixelBudget(max_pixels=options.max_pixels, min_pixels=options.max_pixels)
    backbone = Backbone.load(model, dtype=options.dtype, pixels=pixels)
    naive = Naive(resolve_model(model), options.dtype, backbone.device, pixels)
    directions = strided_groups(options)
    orders = ("query_first", "candidate_first")
    works = {name: {order: work_of(backbone, groups, order) for order in orders} for name, groups in directions.items()}
    ways = transformers_ways(backbone, naive, options.batch_tokens)
    ways = [way for way in ways if not options.only or way.name in options.only]
    peak = achievable(backbone.device, options.dtype)
    parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
    print(f"{options.model or 'random'}: {parameters / 1e6:.1f}M parameters, {options.dtype}, {backbone.device}, "
          f"{options.threads} threads, {options.queries} queries x {options.candidates} candidates, median of "
          f"{options.repeats}; matrix product {peak / 1e9:.0f} GFLOP/s")  # fmt: skip
    for direction, groups in directions.items():
        if options.directions and direction not in options.directions:
            continue
        picture = next(p for p in backbone.pictures([i for q, many in groups for i in (q, *many)]) if p is not None)
        sizes = sizes_of(backbone, len(picture.patches))  # type: ignore[union-attr]
        found = rates(ways, groups, options.repeats, backbone.device)
        report(direction, found, ways, works[direction], sizes, peak)


if __name__ == "__main__":
    main()
