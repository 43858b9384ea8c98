"""What a tiny checkpoint can do: retrieval recall and the judge's AUC, by who drew the pictures.

Everything is measured on pictures as they are (no augmentation), in float32. An emoji's pictures are the right answers
to its name and to each other, whoever drew them; everything else, another skin tone included, is wrong.

Shapes: N pictures, C names, D width, K candidates of a query.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoTokenizer

from unime_ray.corpus.demo_rows import ADAPTATION_ARTIST, PRETRAINING_ARTISTS, UNSEEN_ARTIST
from unime_ray.train.pretrain import MEAN, STD
from unime_ray.train.pretrain_data import Pictures, load_pictures
from unime_ray.train.pretrain_plan import Vocabulary
from unime_ray.train.rows import Chunk, Rows, attention_bias, join
from unime_ray.train.tiny_model import FastText, FastVision, to_patches

TOP_K = 50
Item = tuple[str, int]
"""("picture", number), or ("name", concept)."""


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Chance that a right candidate scores above a wrong one, ties counting half; nan without both kinds."""
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


class Checkpoint:
    """A saved model with the pictures to measure it on; features and embeddings of all of them are computed once."""

    def __init__(self, folder: Path, pictures: Pictures, batch: int = 64) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.pictures = pictures
        self.vocabulary = Vocabulary(AutoTokenizer.from_pretrained(folder), pictures)
        self.vision, self.text = FastVision(self.model.model.visual), FastText(self.model.model.language_model)
        self.table = self.model.model.language_model.embed_tokens.weight.detach()
        self.features = torch.cat([self._see(part) for part in _batches(range(len(pictures.pixels)), batch)])
        words = self.vocabulary
        numbers = range(len(pictures.pixels))
        self.picture_candidates = self._embed([(("picture", n), words.represent) for n in numbers])
        self.picture_queries = self._embed([(("picture", n), words.name_it) for n in numbers])
        self.names = self._embed([(("name", c), None) for c in range(len(pictures.names))])
        self.name_queries = self._embed([(("find", c), None) for c in range(len(pictures.names))])

    @torch.no_grad()
    def _see(self, numbers: Sequence[int]) -> Tensor:
        pixels = torch.from_numpy(self.pictures.pixels[list(numbers)]).permute(0, 3, 1, 2).float() / 255
        return self.vision(to_patches((pixels - MEAN) / STD))

    def _chunk(self, item: Item, slots: dict[int, int]) -> Chunk:
        kind, number = item
        if kind == "picture":
            return self.vocabulary.picture(slots.setdefault(number, len(slots)))
        name = self.vocabulary.names[number]
        return join(self.vocabulary.find, name) if kind == "find" else name

    def _offered(self, item: Item, slots: dict[int, int]) -> Chunk:
        """An item as a candidate is written: a picture with its instruction, a name as it is."""
        chunk = self._chunk(item, slots)
        return join(chunk, self.vocabulary.represent) if item[0] == "picture" else chunk

    @torch.no_grad()
    def _states(self, rows: Rows, slots: dict[int, int]) -> Tensor:
        ids, branch, positions = rows.tensors()
        table = torch.cat([self.table, self.features[list(slots)].flatten(0, 1)]) if slots else self.table
        cos, sin = self.text.rope(positions, torch.float32)
        return self.text(functional.embedding(ids, table), cos, sin, attention_bias(branch, torch.float32))

    def _embed(self, items: Sequence[tuple[Item, Chunk | None]], batch: int = 128) -> np.ndarray:
        parts = []
        for some in _batches(items, batch):
            rows = Rows()
            slots: dict[int, int] = {}
            chunks = [(self._chunk(item, slots), tail) for item, tail in some]
            ends = [rows.add(None, [chunk if tail is None else join(chunk, tail)])[0].end - 1 for chunk, tail in chunks]
            states = self._states(rows, slots)[torch.arange(len(ends)), torch.tensor(ends)]
            parts.append(functional.normalize(states, dim=-1).numpy())
        return np.concatenate(parts)

    def judge(self, query: Item, candidates: Sequence[Item]) -> np.ndarray:
        """Scores (K,) in [0, 1] of the judge's own prompt: exp(yes) / (exp(yes) + exp(no))."""
        words, rows = self.vocabulary, Rows()
        slots: dict[int, int] = {}
        asked = self._chunk(query, slots)
        prefix = join(words.judge, join(asked, words.name_it) if query[0] == "picture" else asked, words.slot)
        ends, row_of = [], []
        for some in _batches(candidates, 5):  # short rows: the mask is dense, so many branches in one row cost more
            branches = [join(self._offered(candidate, slots), words.answer) for candidate in some]
            placed = rows.add(prefix, branches)
            ends += [place.end - 1 for place in placed]
            row_of += [place.row for place in placed]
        states = self._states(rows, slots)[torch.tensor(row_of), torch.tensor(ends)]
        yes, no = (states @ self.table[[words.yes, words.no]].T).unbind(-1)
        return torch.sigmoid(yes - no).numpy()


def _batches(items: Sequence[Any] | range, size: int) -> Iterable[Any]:
    return (items[start : start + size] for start in range(0, len(items), size))


def recall(queries: np.ndarray, pool: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Recall at 1 and 10: share of queries whose best right answer (`right`, boolean (Q, N)) is among the first k."""
    scores = queries @ pool.T
    best = np.where(right, scores, -np.inf).max(1)
    ahead = ((scores >= best[:, None]) & ~right).sum(1)  # ties count against the model
    return {f"recall@{k}": round(float((ahead < k).mean()), 4) for k in (1, 10)}


def judge_lists(
    checkpoint: Checkpoint, queries: Sequence[Item], lists: Sequence[Sequence[Item]], right: Sequence[np.ndarray]
) -> dict[str, float]:
    """AUC over all pairs at once (`pooled`) and averaged over the queries that have both kinds (`per_query`)."""
    scores = [checkpoint.judge(query, candidates) for query, candidates in zip(queries, lists, strict=True)]
    each = [auc(s, r) for s, r in zip(scores, right, strict=True)]
    known = [value for value in each if not np.isnan(value)]
    return {
        "pooled": round(auc(np.concatenate(scores), np.concatenate(right)), 4),
        "per_query": round(float(np.mean(known)), 4) if known else float("nan"),
        "queries": len(known),
        "right_share": round(float(np.concatenate(right).mean()), 4),
    }


def artist_figures(checkpoint: Checkpoint, artist: str, num_queries: int, seed: int = 0) -> dict[str, Any]:
    """Recall within one artist's pictures and names, and the judge against random and against the nearest 50."""
    pictures, rng = checkpoint.pictures, np.random.default_rng(seed)
    own = np.flatnonzero(pictures.artist == artist)
    concepts = pictures.concept[own]
    same = concepts[:, None] == concepts[None, :]
    text, images = checkpoint.name_queries[concepts], checkpoint.picture_candidates[own]
    chosen = rng.choice(len(own), min(num_queries, len(own)), replace=False)
    nearest = np.argsort(-(text[chosen] @ images.T), axis=1)[:, :TOP_K]
    random = np.stack([rng.choice(len(own), 10, replace=False) for _ in chosen])
    figures: dict[str, Any] = {
        "pictures": len(own),
        "text_to_picture": recall(text, images, same),
        "picture_to_text": recall(checkpoint.picture_queries[own], checkpoint.names[concepts], same),
    }
    for name, drawn in (("judge_random", random), ("judge_top50", nearest)):
        listed = [np.unique(np.append(row, c)) for c, row in zip(chosen, drawn, strict=True)]
        right = [same[c][row] for c, row in zip(chosen, listed, strict=True)]
        lists = [[("picture", int(own[i])) for i in row] for row in listed]
        figures[name] = judge_lists(checkpoint, [("find", int(concepts[c])) for c in chosen], lists, right)
    return figures


def mining_figures(checkpoint: Checkpoint, num_queries: int = 150, seed: int = 0) -> dict[str, Any]:
    """The demo's own task: the adaptation artist's queries over the pool of every trainable picture and name.

    `pictures_only`: text queries, pictures as the pool. `text_queries` and `picture_queries`: the demo's mixed pool,
    without the query's declared positive (and without the query's own picture). `cosine_*`: the embedder on the same
    lists, for comparison.
    """
    pictures, rng = checkpoint.pictures, np.random.default_rng(seed)
    pool_pictures = np.flatnonzero(pictures.artist != UNSEEN_ARTIST)
    own = np.flatnonzero(pictures.artist == ADAPTATION_ARTIST)
    chosen = rng.choice(own, min(num_queries, len(own)), replace=False)
    items: list[Item] = [("picture", int(n)) for n in pool_pictures]
    names: list[Item] = [("name", c) for c in range(len(pictures.names))]
    vectors = np.concatenate([checkpoint.picture_candidates[pool_pictures], checkpoint.names])
    owner = np.concatenate([pictures.concept[pool_pictures], np.arange(len(pictures.names))])
    figures = {}
    for task in ("pictures_only", "text_queries", "picture_queries"):
        from_text = task != "picture_queries"
        queries: list[Item] = [("find", int(pictures.concept[n])) if from_text else ("picture", int(n)) for n in chosen]
        asked = checkpoint.name_queries[pictures.concept[chosen]] if from_text else checkpoint.picture_queries[chosen]
        limit = len(items) if task == "pictures_only" else len(vectors)
        scores = asked @ vectors[:limit].T
        if task != "pictures_only":
            known = {item: index for index, item in enumerate(items + names)}
            for row, number in enumerate(chosen):
                scores[row, known[("picture", int(number))]] = -np.inf
                if not from_text:
                    scores[row, known[("name", int(pictures.concept[number]))]] = -np.inf
        nearest = np.argsort(-scores, axis=1)[:, :TOP_K]
        right = [owner[row] == pictures.concept[number] for row, number in zip(nearest, chosen, strict=True)]
        lists = [[(items + names)[index] for index in row] for row in nearest]
        figures[task] = judge_lists(checkpoint, queries, lists, right)
        cosine = [np.take(s, row) for s, row in zip(scores, nearest, strict=True)]
        figures[task]["cosine_pooled"] = round(auc(np.concatenate(cosine), np.concatenate(right)), 4)
        each = [auc(s, r) for s, r in zip(cosine, right, strict=True)]
        figures[task]["cosine_per_query"] = round(float(np.nanmean(each)), 4)
    return figures


def evaluate_checkpoint(folder: Path, data: Path, num_queries: int = 150, held_out: bool = True) -> dict[str, Any]:
    """Measures the checkpoint in `folder`, prints the figures and writes them to `figures.json` there."""
    began = time.perf_counter()
    artists = (*PRETRAINING_ARTISTS, ADAPTATION_ARTIST, UNSEEN_ARTIST)
    checkpoint = Checkpoint(folder, load_pictures(data, artists))
    figures: dict[str, Any] = {"queries": num_queries, "artists": {}}
    for artist in artists:
        # There are eight pretraining artists: a third of the queries each says enough.
        count = num_queries // 3 if artist in PRETRAINING_ARTISTS else num_queries
        figures["artists"][artist] = artist_figures(checkpoint, artist, count)
    figures["mining_pool"] = mining_figures(checkpoint, num_queries)
    if held_out:
        apart = load_pictures(data, (ADAPTATION_ARTIST,), ("heldout_concept", "heldout_composition"))
        unseen = Checkpoint(folder, apart)
        figures["held_out_concepts"] = artist_figures(unseen, ADAPTATION_ARTIST, num_queries)
    figures["seconds"] = round(time.perf_counter() - began, 1)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    for name, group in (figures["artists"] | {f"mining {k}": v for k, v in figures["mining_pool"].items()}).items():
        print(f"{name}: {json.dumps(group)}", flush=True)
    return figures
