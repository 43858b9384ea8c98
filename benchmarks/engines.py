"""How fast the transformers engines are: embedding, judging with and without shared prefixes, listwise reranking.

    python benchmarks/engines.py --model tiny --threads 1
    python benchmarks/engines.py --model Qwen/Qwen2-VL-2B-Instruct --dtype bfloat16 --queries 8

Pictures and names are the demo corpus's. Every figure is a median over `--repeats`; picture features are forgotten
before each, so that a picture is encoded once per repeat, as in a stage. Pairs: one query with `--candidates` each.
On a machine that others use too, only the second figure means something: the best of the repeats, per CPU second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow.parquet as pq
import torch

from unime_ray.config import PixelBudget
from unime_ray.ids import image_id, item_id
from unime_ray.models.backbone import Backbone
from unime_ray.models.embedder import Embedder
from unime_ray.models.judge_transformers import TransformersJudge
from unime_ray.models.reranker import Reranker
from unime_ray.prompts import render

FIND, NAME, SHOW = (
    "Find an emoji picture that matches the given name:",
    "Name the emoji shown in the given picture.",
    "",
)


@dataclass(frozen=True)
class BenchItem:
    item_id: bytes
    rendered: str
    text: str | None
    image_id: bytes | None
    image: bytes | None


def make(text: str, image: bytes | None = None, instruction: str = "") -> BenchItem:
    rendered = render(text, image is not None, instruction)
    key = image_id(image) if image is not None else None
    return BenchItem(item_id(rendered, key), rendered, text, key, image)


def demo(count: int) -> tuple[list[bytes], list[str]]:
    """`count` pictures and names of the demo corpus."""
    folder = Path(str(resources.files("unime_ray"))) / "data" / "demo"
    names = pq.read_table(folder / "concepts.parquet", columns=["name"]).column("name").to_pylist()
    pictures = pq.read_table(folder / "pictures.parquet", columns=["image"]).slice(0, count).column("image").to_pylist()
    return pictures, [names[index % len(names)] for index in range(count)]


def measure(name: str, count: int, unit: str, run: Callable[[], object], repeats: int, backbone: Backbone) -> None:
    seconds, busy = [], []
    for _ in range(repeats + 1):  # the first one warms up
        backbone.forget_features()
        started, worked = time.perf_counter(), time.process_time()
        run()
        if backbone.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        busy.append(time.process_time() - worked)
    middle = statistics.median(seconds[1:])
    spread = (max(seconds[1:]) - min(seconds[1:])) / middle
    work = min(busy[1:])
    print(
        f"{name:<44}{count / middle:>8.0f} {unit}/s{count / work:>8.0f} per CPU second (spread {spread:.0%})",
        flush=True,
    )


def judge_groups(pictures: list[bytes], names: list[str], queries: int, candidates: int) -> dict[str, list]:
    """Groups of each direction; candidates overlap between queries as they do in a mined pool."""
    shown = [make(SHOW, image, "Represent the given picture.") for image in pictures]
    named = [make(name) for name in names]
    asked = [make(name, None, FIND) for name in names]
    seen = [make("", image, NAME) for image in pictures]
    directions = {
        "text -> picture": (asked, shown),
        "picture -> text": (seen, named),
        "picture -> picture": (seen, shown),
    }
    return {
        name: [
            (many[query], [pool[(query * 7 + place) % len(pool)] for place in range(candidates)])
            for query in range(queries)
        ]
        for name, (many, pool) in directions.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--items", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=None, help="default: each engine's own")
    parser.add_argument("--max-pixels", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    budget = PixelBudget(max_pixels=options.max_pixels, min_pixels=options.max_pixels)
    backbone = Backbone.load(options.model, dtype=options.dtype, pixels=budget)
    tokens = {} if options.batch_tokens is None else {"batch_tokens": options.batch_tokens}
    parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
    print(f"{options.model}: {parameters / 1e6:.1f}M parameters, {options.dtype}, {backbone.device}, "
          f"{options.threads} threads, batch tokens {options.batch_tokens or 'default'}")  # fmt: skip
    pictures, names = demo(options.items)
    embedder = Embedder(backbone, **tokens)
    shown = [make(SHOW, image, "Represent the given picture.") for image in pictures]
    named = [make(name) for name in names]
    run = (options.repeats, backbone)
    measure("embed pictures", len(shown), "items", lambda: embedder.embed(shown), *run)
    measure("embed texts", len(named), "items", lambda: embedder.embed(named), *run)
    for name, groups in judge_groups(pictures, names, options.queries, options.candidates).items():
        pairs = options.queries * options.candidates
        for share in (True, False):
            judge = TransformersJudge(backbone, share_prefix=share, **tokens)
            label = f"judge {name}, {'shared prefix' if share else 'pairs alone'}"
            measure(label, pairs, "pairs", lambda judge=judge, groups=groups: judge.score_groups(groups), *run)
        reranker = Reranker(backbone, **tokens)
        lists = [(query, many[:10]) for query, many in groups]
        measure(
            f"rerank {name}, lists of ten", len(lists), "lists", lambda r=reranker, g=lists: r.rerank_groups(g), *run
        )


if __name__ == "__main__":
    main()
