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

from unime_ray.corpus.demo_rows import (
    ADAPTATION_ARTIST,
    PRETRAINING_ARTISTS,
    TRAIN_FOLD,
    UNSEEN_ARTIST,
    artists_in_pool,
    declared_artist,
    load_corpus,
)
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


def demo_pool(pictures: Pictures, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Which pictures (N,) bool the demo's mining pool holds, and each concept's declared positive (C,), -1 for none."""
    corpus = load_corpus(data)
    number = {
        (str(artist), pictures.hexcodes[concept]): index
        for index, (artist, concept) in enumerate(zip(pictures.artist, pictures.concept, strict=True))
    }
    inside, declared = np.zeros(len(pictures.pixels), bool), np.full(len(pictures.names), -1)
    for index, hexcode in enumerate(pictures.hexcodes):
        concept = corpus.concepts[hexcode]
        artists = artists_in_pool(corpus, concept) if concept.fold == TRAIN_FOLD else []
        inside[[number[artist, hexcode] for artist in artists]] = True
        if ADAPTATION_ARTIST in artists:
            declared[index] = number[declared_artist(corpus, concept), hexcode]
    return inside, declared


def wide_pool(pictures: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """The same of a pool of every artist but the unseen one, where positives are the adaptation artist's."""
    own = pictures.artist == ADAPTATION_ARTIST
    declared = np.full(len(pictures.names), -1)
    declared[pictures.concept[own]] = np.flatnonzero(own)
    return pictures.artist != UNSEEN_ARTIST, declared


def mining_figures(
    judge: Checkpoint, retriever: Checkpoint, inside: np.ndarray, declared: np.ndarray, num_queries: int, seed: int = 0
) -> dict[str, Any]:
    """The adaptation artist's queries over a pool of pictures (`inside`) and all names, each query's nearest 50.

    `pictures_only`: text queries over the pictures alone. `text_queries` and `picture_queries`: pictures and names
    together. A query's declared positive, and its own picture, are not among its candidates. `cosine_*`: the
    retriever on the same lists, for comparison.
    """
    pictures, rng = judge.pictures, np.random.default_rng(seed)
    concepts = rng.permutation(np.flatnonzero(declared >= 0))[:num_queries]
    own = {int(c): int(n) for n, c in enumerate(pictures.concept) if pictures.artist[n] == ADAPTATION_ARTIST}
    shown = np.flatnonzero(inside)
    items: list[Item] = [("picture", int(n)) for n in shown]
    items += [("name", c) for c in range(len(pictures.names))]
    place = {item: index for index, item in enumerate(items)}
    vectors = np.concatenate([retriever.picture_candidates[shown], retriever.names])
    owner = np.concatenate([pictures.concept[shown], np.arange(len(pictures.names))])
    figures = {}
    for task in ("pictures_only", "text_queries", "picture_queries"):
        from_text = task != "picture_queries"
        limit = len(shown) if task == "pictures_only" else len(items)
        asked = [("find", int(c)) if from_text else ("picture", own[int(c)]) for c in concepts]
        queries = [retriever.name_queries[n] if kind == "find" else retriever.picture_queries[n] for kind, n in asked]
        scores = np.stack(queries) @ vectors[:limit].T
        for row, c in enumerate(concepts):
            known: list[Item] = [("picture", int(declared[c]))] if from_text else [asked[row], ("name", int(c))]
            scores[row, [place[item] for item in known if item in place]] = -np.inf
        nearest = np.argsort(-scores, axis=1)[:, :TOP_K]
        right = [owner[row] == c for row, c in zip(nearest, concepts, strict=True)]
        figures[task] = judge_lists(judge, asked, [[items[index] for index in row] for row in nearest], right)
        cosine = [np.take(s, row) for s, row in zip(scores, nearest, strict=True)]
        figures[task]["cosine_pooled"] = round(auc(np.concatenate(cosine), np.concatenate(right)), 4)
        each = [auc(s, r) for s, r in zip(cosine, right, strict=True)]
        figures[task]["cosine_per_query"] = round(float(np.nanmean(each)), 4)
    return figures


def evaluate_checkpoint(
    folder: Path, data: Path, num_queries: int = 150, held_out: bool = True, retriever: Path | None = None
) -> dict[str, Any]:
    """Measures the checkpoint in `folder`, prints the figures and writes them to `figures.json` there.

    Args:
        retriever: the embedder whose nearest 50 the judge is asked about in the mining pools (default: itself).
    """
    began = time.perf_counter()
    artists = (*PRETRAINING_ARTISTS, ADAPTATION_ARTIST, UNSEEN_ARTIST)
    checkpoint = Checkpoint(folder, load_pictures(data, artists))
    figures: dict[str, Any] = {"queries": num_queries, "artists": {}}
    for artist in artists:
        # There are eight pretraining artists: a third of the queries each says enough.
        count = num_queries // 3 if artist in PRETRAINING_ARTISTS else num_queries
        figures["artists"][artist] = artist_figures(checkpoint, artist, count)
    finder = checkpoint if retriever is None else Checkpoint(retriever, checkpoint.pictures)
    figures["demo_pool"] = mining_figures(checkpoint, finder, *demo_pool(checkpoint.pictures, data), num_queries)
    figures["mining_pool"] = mining_figures(checkpoint, finder, *wide_pool(checkpoint.pictures), num_queries)
    if held_out:
        apart = load_pictures(data, (ADAPTATION_ARTIST,), ("heldout_concept", "heldout_composition"))
        unseen = Checkpoint(folder, apart)
        figures["held_out_concepts"] = artist_figures(unseen, ADAPTATION_ARTIST, num_queries)
    figures["seconds"] = round(time.perf_counter() - began, 1)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    for name in ("artists", "demo_pool", "mining_pool"):
        for part, group in figures[name].items():
            print(f"{name} {part}: {json.dumps(group)}", flush=True)
    return figures
