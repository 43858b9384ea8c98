"""Which rows a batch of pictures makes: embeddings, captions, Yes/No lists and a few listwise prompts.

Labels are by emoji: another artist's picture of the same emoji is "Yes", another tone or gender of it is "No".

Shapes: C concepts of the batch, 2C pictures, K candidates of a list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unime_ray import prompts
from unime_ray.train import pretrain_tokenizer as words
from unime_ray.train.pretrain_data import Neighbours, Pictures
from unime_ray.train.rows import Chunk, Placed, Rows, image_chunk, join, text_chunk
from unime_ray.train.tiny_model import IMAGE_TOKENS


@dataclass(frozen=True)
class BatchShape:
    """How much of everything a step holds."""

    concepts: int = 40
    cluster: int = 4
    near: float = 0.6  # share of a seed's companions that are its nearest, once negatives are fully hard
    picture_lists: int = 32  # text queries with pictures
    picture_candidates: int = 4
    name_lists: int = 28  # picture queries with names
    text_lists: int = 4  # text queries with names
    name_candidates: int = 8
    twin_lists: int = 8  # picture queries with pictures
    twin_candidates: int = 3
    listwise: int = 4
    temperature: float = 0.05
    weights: dict[str, float] = field(
        default_factory=lambda: {"caption": 0.7, "contrast": 1.0, "judge": 2.5, "order": 0.0, "listwise": 0.15}
    )


class Vocabulary:
    """The fixed chunks of every prompt, and the names and keywords as token ids."""

    def __init__(self, tokenizer: Any, pictures: Pictures) -> None:
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        ids = words.special_ids(tokenizer)
        self.size = len(tokenizer)
        self.start, self.end = ids["<|vision_start|>"], ids["<|vision_end|>"]
        self.turn_end = ids["<|im_end|>"]
        self.yes, self.no = encode(prompts.YES)[0], encode(prompts.NO)[0]
        self.numbers = [encode(str(number))[0] for number in range(1, 11)]
        self.find = text_chunk(encode(words.FIND_PICTURE))
        self.name_it = text_chunk(encode(words.NAME_PICTURE))
        self.represent = text_chunk(encode(words.REPRESENT_PICTURE))
        self.judge = text_chunk(encode(words.USER + prompts.JUDGE_INSTRUCTION + prompts.QUERY_SLOT))
        self.listwise = text_chunk(encode(words.USER + prompts.LISTWISE_INSTRUCTION + prompts.QUERY_SLOT))
        self.slot = text_chunk(encode(prompts.CANDIDATE_SLOT))
        self.answer = text_chunk(encode(words.TURN_END + words.ASSISTANT))
        self.blank = text_chunk(encode(" "))
        # As the tokenizer cuts a whole prompt: the blank after one candidate belongs to the next one's bracket.
        self.marks = [text_chunk(encode(f"{' ' if number > 1 else ''}({number}) ")) for number in range(1, 11)]
        self.names = [text_chunk(ids) for ids in words.encode_all(tokenizer, pictures.names)]
        self._encode = encode
        self._spelled, self._keywords = pictures.names, pictures.keywords

    def picture(self, slot: int) -> Chunk:
        """The batch's picture number `slot`, without a text."""
        return image_chunk(self.start, self.end, self.size + slot * IMAGE_TOKENS)

    def name_list(self, concepts: list[int]) -> Chunk:
        """The candidate list of a listwise prompt whose candidates are names."""
        entries = (prompts.listwise_candidate(k, self._spelled[c]) for k, c in enumerate(concepts, start=1))
        return text_chunk(self._encode("".join(entries)))

    def picture_list(self, slots: list[int]) -> Chunk:
        """The same for pictures of the batch."""
        entries = [(mark, self.picture(slot), self.represent) for mark, slot in zip(self.marks, slots, strict=False)]
        return join(*(part for entry in entries for part in entry), self.blank)

    def keywords(self, concept: int, rng: np.random.Generator) -> Chunk:
        """Two or three of the concept's keywords, or its name if it has fewer."""
        known = self._keywords[concept]
        if len(known) < 2:
            return self.names[concept]
        chosen = rng.choice(len(known), min(len(known), int(rng.integers(2, 4))), replace=False)
        return text_chunk(self._encode(", ".join(known[index] for index in chosen)))


@dataclass
class Plan:
    """The rows of one batch and where to read them. Groups of equal row length keep padding small."""

    groups: dict[str, Rows]
    query_ends: list[tuple[str, Placed]]
    candidate_ends: list[tuple[str, Placed]]
    captions: list[tuple[str, Placed, np.ndarray]]
    verdicts: list[tuple[str, Placed, bool, float]]
    choices: list[tuple[str, Placed, int]]
    concepts: np.ndarray
    of_picture: np.ndarray


def plan_batch(
    vocabulary: Vocabulary,
    neighbours: Neighbours,
    concepts: np.ndarray,
    shape: BatchShape,
    hard: float,
    rng: np.random.Generator,
) -> Plan:
    """Rows for `concepts` (C,), whose pictures 2c and 2c+1 are the batch's pictures of concept c.

    `hard` in [0, 1]: 0 draws judge negatives at random, 1 nearly always takes what the model confuses most.
    """
    groups = {name: Rows() for name in ("short", "pictures", "names", "lists")}
    plan = Plan(groups, [], [], [], [], [], concepts, np.repeat(np.arange(len(concepts)), 2))
    _plan_embeddings(plan, vocabulary, rng)
    batch = _BatchNegatives(neighbours, concepts, hard, rng)
    order = rng.permutation(len(concepts))
    for c in order[: shape.picture_lists]:
        query, count = join(vocabulary.find, vocabulary.names[concepts[c]]), shape.picture_candidates
        _judge_pictures(plan, vocabulary, query, int(c), count, batch, None)
    for c in order[-shape.twin_lists :] if shape.twin_lists else ():
        own = 2 * int(c) + int(rng.integers(2))
        query = join(vocabulary.picture(own), vocabulary.name_it)
        _judge_pictures(plan, vocabulary, query, int(c), shape.twin_candidates, batch, own)
    for c in rng.permutation(len(concepts))[: shape.name_lists]:
        query = join(vocabulary.picture(2 * int(c) + int(rng.integers(2))), vocabulary.name_it)
        _judge_names(plan, vocabulary, query, int(c), shape.name_candidates, batch)
    for c in order[: shape.text_lists]:
        query = join(vocabulary.find, vocabulary.names[concepts[c]])
        _judge_names(plan, vocabulary, query, int(c), shape.name_candidates, batch)
    for c in rng.permutation(len(concepts))[: shape.listwise]:
        _listwise(plan, vocabulary, int(c), batch, rng)
    return plan


def _plan_embeddings(plan: Plan, vocabulary: Vocabulary, rng: np.random.Generator) -> None:
    """Each picture as candidate, as query, and captioned; each concept as text query and as name."""
    short = plan.groups["short"]
    queries, candidates = [], []
    for slot, c in enumerate(plan.of_picture):
        name = vocabulary.names[plan.concepts[c]]
        ending = text_chunk([vocabulary.turn_end])
        plain, asked = short.add(
            vocabulary.picture(slot), [vocabulary.represent, join(vocabulary.name_it, name, ending)]
        )
        candidates.append(("short", plain))
        queries.append(("short", Placed(asked.row, asked.start, asked.start + len(vocabulary.name_it.ids))))
        target = np.concatenate([name.ids, ending.ids])
        plan.captions.append(("short", Placed(asked.row, asked.end - 1 - len(target), asked.end - 1), target))
    names = [vocabulary.names[concept] for concept in plan.concepts]
    asked_for = [
        join(vocabulary.find, vocabulary.keywords(concept, rng) if rng.random() < 0.15 else name)
        for concept, name in zip(plan.concepts, names, strict=True)
    ]
    placed = [("short", place) for place in short.add_packed(asked_for + names, short.width)]
    plan.query_ends = placed[: len(names)] + queries
    plan.candidate_ends = placed[len(names) :] + candidates


class _BatchNegatives:
    """Draws wrong candidates: of the batch's concepts by likeness, of all concepts by neighbour lists."""

    def __init__(self, neighbours: Neighbours, concepts: np.ndarray, hard: float, rng: np.random.Generator) -> None:
        self.concepts, self.hard, self.rng, self.kin = concepts, hard, rng, neighbours.kin
        text, picture = neighbours.text[concepts], neighbours.picture[concepts]
        self.alike = text @ picture.T + picture @ text.T + picture @ picture.T
        self.near = neighbours.nearest(concepts, 20)

    def _hardness(self) -> float:
        """Each list has its own, up to the batch's: without easy negatives among them the easy ones are unlearnt."""
        return self.hard * float(self.rng.uniform(0.1, 1.0))

    def in_batch(self, c: int, count: int) -> np.ndarray:
        """`count` other rows of the batch; Gumbel noise over the likeness makes the draw soft."""
        keys = 8.0 * self._hardness() * self.alike[c] + self.rng.gumbel(size=len(self.concepts))
        keys[c] = -np.inf
        return np.argsort(-keys)[:count]

    def anywhere(self, c: int, count: int) -> list[int]:
        """`count` different other concepts: near ones, kin, and random ones."""
        chosen: dict[int, None] = {}
        own, kin = int(self.concepts[c]), self.kin[self.concepts[c]]
        hard = 0.7 * self._hardness()
        while len(chosen) < count:
            draw = self.rng.random()
            if draw < hard:
                pick = int(self.near[c][min(self.near.shape[1] - 1, int(self.rng.exponential(6)))])
            elif draw < hard + 0.2 and len(kin):
                pick = int(self.rng.choice(kin))
            else:
                pick = int(self.rng.integers(len(self.kin)))
            if pick != own:
                chosen.setdefault(pick)
        return list(chosen)


def _verdicts(plan: Plan, group: str, placed: list[Placed], labels: list[bool]) -> None:
    """Positives weigh two fifths of a list, negatives three, so that a long list does not teach "No"."""
    positives = sum(labels)
    for place, label in zip(placed, labels, strict=True):
        weight = 0.4 / positives if label else 0.6 / (len(labels) - positives)
        plan.verdicts.append((group, place, label, weight))


def _judge_pictures(
    plan: Plan, vocabulary: Vocabulary, query: Chunk, c: int, count: int, batch: _BatchNegatives, own: int | None
) -> None:
    """The judge's prompt with `count` picture candidates; `own` is the query's picture, never its own candidate."""
    right = [slot for slot in (2 * c, 2 * c + 1) if slot != own]
    right = right[: int(batch.rng.integers(1, len(right) + 1))]
    wrong = [2 * int(o) + int(batch.rng.integers(2)) for o in batch.in_batch(c, count - len(right))]
    branches = [join(vocabulary.picture(slot), vocabulary.represent, vocabulary.answer) for slot in right + wrong]
    placed = plan.groups["pictures"].add(join(vocabulary.judge, query, vocabulary.slot), branches)
    _verdicts(plan, "pictures", placed, [True] * len(right) + [False] * len(wrong))


def _judge_names(plan: Plan, vocabulary: Vocabulary, query: Chunk, c: int, count: int, batch: _BatchNegatives) -> None:
    """The judge's prompt with `count` names, one of them right."""
    concepts = [int(plan.concepts[c]), *batch.anywhere(c, count - 1)]
    branches = [join(vocabulary.names[concept], vocabulary.answer) for concept in concepts]
    placed = plan.groups["names"].add(join(vocabulary.judge, query, vocabulary.slot), branches)
    _verdicts(plan, "names", placed, [True] + [False] * (count - 1))


def _listwise(plan: Plan, vocabulary: Vocabulary, c: int, batch: _BatchNegatives, rng: np.random.Generator) -> None:
    """The listwise prompt: names for a picture, or four pictures for a name; the answer's place is uniform."""
    place = int(rng.integers(0, 4))
    if rng.random() < 0.5:
        listed = batch.anywhere(c, int(rng.integers(3, 8)))
        place = int(rng.integers(len(listed) + 1))
        query = join(vocabulary.picture(2 * c + int(rng.integers(2))), vocabulary.name_it)
        shown = vocabulary.name_list([*listed[:place], int(plan.concepts[c]), *listed[place:]])
    else:
        slots = [2 * int(o) + int(rng.integers(2)) for o in batch.in_batch(c, 3)]
        slots.insert(place, 2 * c + int(rng.integers(2)))
        query = join(vocabulary.find, vocabulary.names[plan.concepts[c]])
        shown = vocabulary.picture_list(slots)
    prefix = join(vocabulary.listwise, query, vocabulary.slot)
    placed = plan.groups["lists"].add(prefix, [join(shown, vocabulary.answer)])
    plan.choices.append(("lists", placed[0], vocabulary.numbers[place]))
