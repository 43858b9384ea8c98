"""A run after ingest, made by hand, and models quick enough for tests: what the tests of mining stand on."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import lance
import numpy as np
import pyarrow as pa
from ray import cloudpickle

from unime_ray import ids, prompts
from unime_ray.artifacts import Manifest, Run
from unime_ray.config import EmbedConfig, JudgeConfig, RunConfig
from unime_ray.errors import EngineDied, ModelError
from unime_ray.models.judge import Usage, Verdict
from unime_ray.schemas import IMAGES, ITEMS, POOLS, QRELS

# Workers of the test cluster cannot import this module, so its classes travel whole.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

DIM = 16
NOT_A_PICTURE = b"these bytes are no picture"


class Corpus:
    """Items, pairs and pools of a small run; `save` writes the artifacts that ingest would."""

    def __init__(self) -> None:
        self.items: dict[bytes, dict] = {}
        self.images: dict[bytes, bytes] = {}
        self.qrels: list[dict] = []
        self.pools: list[dict] = []

    def item(self, text: str | None, image: bytes | None = None, instruction: str | None = None) -> bytes:
        image_id = None
        if image is not None:
            image_id = ids.image_id(image)
            self.images[image_id] = image
        rendered = prompts.render(text, image is not None, instruction)
        identifier = ids.item_id(rendered, image_id)
        self.items[identifier] = {
            "item_id": identifier,
            "rendered": rendered,
            "instruction": instruction,
            "text": text,
            "image_id": image_id,
            "source": "corpus.jsonl",
        }
        return identifier

    def pair(
        self, query: bytes, positive: bytes, split: str = "train", relevance: float = 1.0, dataset: str = "d"
    ) -> None:
        row = {"dataset": dataset, "split": split, "query_id": query, "item_id": positive, "relevance": relevance}
        self.qrels.append(row)

    def pool(self, *items: bytes, split: str = "train", dataset: str = "d") -> None:
        self.pools += [{"dataset": dataset, "split": split, "item_id": item} for item in items]

    def save(self, folder: Path) -> Run:
        run = Run(str(folder))
        images = [
            {"image_id": key, "bytes": data, "path": None, "width": 1, "height": 1} for key, data in self.images.items()
        ]
        tables = {
            "items": pa.Table.from_pylist(list(self.items.values()), ITEMS),
            "images": pa.Table.from_pylist(images, IMAGES),
            "qrels": pa.Table.from_pylist(self.qrels, QRELS),
            "pools": pa.Table.from_pylist(self.pools, POOLS),
        }
        for name, table in tables.items():
            artifact = run.artifact(name)
            if name in ("items", "images"):
                lance.write_dataset(table, artifact.data_uri)
            else:
                artifact.write(table, table.schema)
            mark = hashlib.sha256(repr(table.to_pylist()).encode()).hexdigest()[:24]
            artifact.finish(Manifest(table=name, stage="ingest", fingerprint=mark, rows=table.num_rows))
        return run


def word_run(folder: Path, num_queries: int = 60, pool_size: int = 90) -> Run:
    """`q<i>` wants `a<i>`; the pool also holds answers nobody asks for."""
    corpus = Corpus()
    answers = [corpus.item(f"a{number}") for number in range(pool_size)]
    for number in range(num_queries):
        corpus.pair(corpus.item(f"q{number}"), answers[number])
    corpus.pool(*answers)
    corpus.pool(corpus.item("held out"), split="test")
    return corpus.save(folder)


def settings(run: Run, **sections: object) -> RunConfig:
    """A config for `run` whose models are never read from disk (fingerprints of folders aside)."""
    return RunConfig.model_validate({"run": run.root} | sections)


def model_folder(folder: Path) -> str:
    """A folder that counts as a checkpoint: its revision is taken, the fake models below never read it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    return str(folder)


class FakeEmbedder:
    """A random direction per text, the same everywhere; refuses pictures that start with `these bytes`."""

    def embed_checked(self, items: list) -> tuple[np.ndarray, list[str | None]]:
        _dawdle(len(items))
        vectors = np.zeros((len(items), DIM), np.float32)
        errors: list[str | None] = []
        for row, item in enumerate(items):
            broken = item.image == NOT_A_PICTURE
            errors.append("cannot identify image" if broken else None)
            if not broken:
                vectors[row] = direction(item.rendered)
        return vectors, errors


class FakeJudge:
    """A score per pair that depends on its two texts alone; pairs with the text `unjudgeable` fail."""

    def score(self, query, candidates) -> list[Verdict]:
        return [self._verdict(query, candidate) for candidate in candidates]

    def score_groups(self, groups) -> list[list[Verdict]]:
        _dawdle(len(groups))
        return [self.score(query, candidates) for query, candidates in groups]

    def _verdict(self, query, candidate) -> Verdict:
        if "unjudgeable" in candidate.rendered:
            return Verdict.failed("the picture does not decode")
        seed = hashlib.sha256(f"{query.rendered}|{candidate.rendered}".encode()).digest()
        right = query.rendered[1:] == candidate.rendered[1:]
        return Verdict.of(2.0 if right else seed[0] / 128 - 1, 0.0)


class MendedJudge(FakeJudge):
    """The same, with the cause of failures gone."""

    def _verdict(self, query, candidate) -> Verdict:
        return super()._verdict(query, query if "unjudgeable" in candidate.rendered else candidate)


class CountingJudge(FakeJudge):
    """Says that each pair has ten tokens, eight of them shared."""

    def __init__(self) -> None:
        self.usage = Usage()

    def score_groups(self, groups) -> list[list[Verdict]]:
        pairs = sum(len(candidates) for _, candidates in groups)
        self.usage.pairs += pairs
        self.usage.prompt_tokens += 10 * pairs
        self.usage.computed_tokens += 2 * pairs
        return super().score_groups(groups)


class DyingJudge(FakeJudge):
    """Takes its process along at a candidate with the text `poison`, and once at anything."""

    def __init__(self, flag: str, how: str, poison: str) -> None:
        self.flag, self.how, self.poison = Path(flag), how, poison

    def _verdict(self, query, candidate) -> Verdict:
        poisoned = candidate.rendered == self.poison
        if poisoned or not self.flag.exists():
            self.flag.touch()
            if self.how == "engine" and not poisoned:
                raise EngineDied("the engine's core process is gone")
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._verdict(query, candidate)


def direction(text: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).normal(size=DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def load_fake_embedder(config: EmbedConfig) -> FakeEmbedder:
    _count_load()
    return FakeEmbedder()


def load_fake_judge(config: JudgeConfig) -> FakeJudge:
    _count_load()
    return FakeJudge()


def load_mended_judge(config: JudgeConfig) -> MendedJudge:
    return MendedJudge()


def load_counting_judge(config: JudgeConfig) -> CountingJudge:
    return CountingJudge()


def load_dying_judge(config: JudgeConfig, flag: str = "", how: str = "process", poison: str = "") -> DyingJudge:
    """With functools.partial: `flag` is a file that says that it died already."""
    _count_load()
    if how == "loading" and not Path(flag).exists():
        Path(flag).touch()
        raise EngineDied("the engine's core process did not come up")
    return DyingJudge(flag, how, poison)


def load_none(config: JudgeConfig) -> NoReturn:
    raise AssertionError("nothing new is to be judged, so no judge is to be loaded")


def load_broken(config: EmbedConfig | JudgeConfig) -> NoReturn:
    raise ModelError("model x: architecture Y is not supported")


def _dawdle(units: int) -> None:
    time.sleep(float(os.environ.get("MINING_TEST_SECONDS_PER_UNIT", "0")) * units)
    trace = os.environ.get("MINING_TEST_TRACE")
    if trace:
        with open(trace, "a") as file:
            file.write(f"{units}\n")


def _count_load() -> None:
    trace = os.environ.get("MINING_TEST_TRACE")
    if trace:
        with open(trace + ".loads", "a") as file:
            file.write("load\n")


def rows_by_id(run: Run, table: str, name: str, keys: tuple[str, ...]) -> list[dict]:
    """All rows of an artifact, sorted by `keys`."""
    found = run.artifact(table, name).read().to_pylist()
    return sorted(found, key=lambda row: tuple(row[key] for key in keys))
