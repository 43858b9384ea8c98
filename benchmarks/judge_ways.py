"""Ways of scoring the same pairs with transformers, and how they are timed."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from engines import BenchItem  # first: it puts the checkout on the path
from judge_cost import Groups
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from unime_ray import prompts
from unime_ray.config import PixelBudget
from unime_ray.models.backbone import Backbone
from unime_ray.models.judge_transformers import TransformersJudge

NAIVE_PAIRS = 40
MATMUL = 1024


@dataclass
class Way:
    """One way of scoring: `run` returns how many pairs it scored."""

    name: str
    run: Callable[[Groups], int]
    forget: Callable[[], object] = lambda: None
    """Called before each repeat: no cache survives from the last."""
    know: Callable[[list[BenchItem]], object] | None = lambda items: None
    """Called next, with items whose pictures the caches shall hold as if earlier queries had shown them; None: a way
    that is not asked then."""
    hit_rate: float | None = None
    """Share of prompt tokens that vLLM found in its prefix cache."""


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
        ways.append(
            Way(
                name,
                lambda groups, judge=judge: count(judge.score_groups(groups)),
                lambda: (backbone.forget_features(), backbone.pixels.forget()),
                lambda items: encode(backbone, items),
            )
        )
    return ways


@torch.no_grad()
def encode(backbone: Backbone, items: list[BenchItem]) -> None:
    """Put the features of the items' pictures into the cache, and leave no patches behind."""
    pictures = [picture for picture in backbone.pictures(items) if picture is not None]
    if pictures:
        backbone.features(pictures)  # type: ignore[arg-type]
    backbone.pixels.forget()


def count(verdicts: list[list[Any]]) -> int:
    """How many verdicts there are; all of them must be scores."""
    failed = [verdict.error for group in verdicts for verdict in group if verdict.error]
    assert not failed, failed[0]
    return sum(len(group) for group in verdicts)


def rates(
    ways: list[Way], groups: Groups, repeats: int, device: torch.device, known: list[BenchItem] | None = None
) -> dict[str, list[float]]:
    """Pairs per second of every way, one figure per repeat; the first round warms up and is not counted."""
    ways = [way for way in ways if not known or way.know is not None]
    found: dict[str, list[float]] = {way.name: [] for way in ways}
    for repeat in range(repeats + 1):
        for way in ways:
            way.forget()
            if known and way.know is not None:
                way.know(known)
            started = clock(device)
            pairs = way.run(groups)
            seconds = clock(device) - started
            if repeat:
                found[way.name].append(pairs / seconds)
    return found


def clock(device: torch.device) -> float:
    """Seconds of wall time once a GPU has nothing left to do; on a CPU this process's CPU time."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def achievable(device: torch.device, dtype: str) -> float:
    """Floating-point operations per second of a plain matrix product, median of five."""
    size = 8 * MATMUL if device.type == "cuda" else MATMUL
    left = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(6):
        started = clock(device)
        left @ left
        seconds.append(clock(device) - started)
    return 2 * size**3 / statistics.median(seconds[1:])
