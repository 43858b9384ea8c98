"""Which kinds of question a run's data asks, read off the data: the instruction its queries of one kind share.

A retriever finds best what is asked the way it was trained. Where the queries of a dataset open with the same words
("Find an emoji picture that matches the given name:"), a bare query typed by a user gets these words too.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from unime_ray.artifacts import Run
from unime_ray.corpus.payload import Item, PayloadStore
from unime_ray.prompts import IMAGE_MARKER

SAMPLE = 64
MIN_SAMPLE = 4
MIN_WORDS = 3
"""A shorter shared opening is chance, not an instruction."""
TRAIN = "train"


@dataclass(frozen=True, slots=True)
class Task:
    """`kind` is what a query of this task has: text, image or both."""

    name: str
    kind: str
    instruction: str


def kind_of(text: object, image: object) -> str:
    """`text`, `image` or `both`."""
    return "both" if text and image else "image" if image else "text"


def query_tasks(run: Run, payload: PayloadStore) -> list[Task]:
    """The tasks of the run's queries, training data first; at most one per dataset and kind."""
    qrels = run.artifact("qrels").read(["dataset", "split", "query_id"]).to_pylist()
    qrels.sort(key=lambda row: (row["split"] != TRAIN, row["dataset"]))
    samples: dict[str, list[bytes]] = {}
    for row in qrels:
        ids = samples.setdefault(row["dataset"], [])
        if len(ids) < SAMPLE and row["query_id"] not in ids:
            ids.append(row["query_id"])
    tasks: list[Task] = []
    for dataset, ids in samples.items():
        tasks += [Task(dataset, kind, words) for kind, words in instructions(payload.items(ids)).items()]
    return list({(task.kind, task.instruction): task for task in reversed(tasks)}.values())[::-1]


def item_instructions(payload: PayloadStore, ids: Sequence[bytes]) -> dict[str, str]:
    """What the run's own items say before (or beside) their content, by kind: for items written over the API."""
    return instructions(payload.items(list(ids)[:SAMPLE]))


def instructions(items: Sequence[Item]) -> dict[str, str]:
    """The shared opening of the items of each kind; an item whose whole text is the instruction counts as `image`."""
    texts = [_words(item) for item in items if item.image_id is None]
    beside = [_words(item) for item in items if item.image_id is not None]
    found: dict[str, str] = {}
    if len(texts) >= MIN_SAMPLE:
        found["text"] = opening(texts)
    if len(beside) >= MIN_SAMPLE:
        same = len(set(beside)) == 1
        found["image" if same or not opening(beside) else "both"] = beside[0] if same else opening(beside)
    return found


def caption(text: str | None, instructions: Collection[str]) -> str | None:
    """What people read: `text` without an instruction it opens with; None if nothing is left."""
    shown = (text or "").replace(IMAGE_MARKER, "").strip()
    for words in sorted(filter(None, instructions), key=len, reverse=True):
        if shown.startswith(words):
            shown = shown[len(words) :].strip()
            break
    return shown or None


def opening(texts: Sequence[str]) -> str:
    """The words all texts begin with, up to a whole word; empty if they are fewer than MIN_WORDS."""
    shared = os.path.commonprefix(list(texts))
    if any(len(text) > len(shared) and not text[len(shared) - 1 : len(shared)].isspace() for text in texts):
        shared = shared[: shared.rfind(" ") + 1]
    return shared.strip() if len(shared.split()) >= MIN_WORDS else ""


def _words(item: Item) -> str:
    return item.rendered.replace(IMAGE_MARKER, "").strip()
