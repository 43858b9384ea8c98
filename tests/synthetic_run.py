"""A run folder as the stages leave it, made of colored squares: for tests of what reads a finished run."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from unime_ray import ids, prompts, schemas
from unime_ray.artifacts import Artifact, Manifest, Run, write_text
from unime_ray.config import EmbedderConfig, JudgeConfig, RerankerConfig, RunConfig
from unime_ray.evaluation.aggregate import comparisons, differences, metric_rows, stack_arms
from unime_ray.evaluation.arms import Arm, arms_of
from unime_ray.evaluation.protocol import load_protocol
from unime_ray.evaluation.reranking import reranked_row, to_rerank
from unime_ray.evaluation.retrieval import search
from unime_ray.evaluation.tables import per_query_schema
from unime_ray.selection import query_rng, select_negatives

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
SHAPES = ("circle", "square", "ring", "bar")


class SyntheticRun:
    """`num_concepts` colored shapes by two artists; odd concepts are tested on, even ones mined and trained on."""

    def __init__(self, root: Path, num_concepts: int = 60, seed: int = 0) -> None:
        self.run = Run(str(root / "run"))
        self.truth_folder = root / "truth"
        self.rng = random.Random(seed)
        self.config = RunConfig(
            run=self.run.root,
            judges={"tiny": JudgeConfig(), "oracle": JudgeConfig(engine="oracle", truth=str(self.truth_folder))},
            embedders={
                "infonce": EmbedderConfig(judge="tiny", loss="infonce"),
                "unime_v2": EmbedderConfig(judge="tiny"),
            },
            rerankers={"reranker": RerankerConfig(judge="tiny", model="tiny")},
            evaluate={"truth": str(self.truth_folder), "bootstrap_samples": 200},  # type: ignore[arg-type]
        )
        self.names = [f"{SHAPES[n % 4]} number {n}" for n in range(num_concepts)]
        self.names[0] = EVIL
        self.pictures = {(artist, n): _picture(n, artist) for n in range(num_concepts) for artist in range(2)}
        self.concept_of: dict[bytes, int] = {}
        self._items: dict[bytes, dict[str, Any]] = {}

    # --- corpus

    def corpus(self) -> SyntheticRun:
        """images, items, qrels, pools, rejects and the truth table."""
        qrels, pools = [], []
        for n, name in enumerate(self.names):
            split, suffix = ("train", "") if n % 2 == 0 else ("test", "_new")
            text, picture, other = self.item(n, name), self.item(n, None, 0), self.item(n, None, 1)
            wanted = self.item(n, name, None, "Find the picture: ")
            shown = self.item(n, "Name this.", 0)
            for dataset, query, item in ((f"t2i{suffix}", wanted, picture), (f"i2t{suffix}", shown, text)):
                row = {"dataset": dataset, "split": split}
                qrels.append(row | {"query_id": query, "item_id": item, "relevance": 1.0})
                pools.append(row | {"item_id": item})
            pools.append(
                {"dataset": f"t2i{suffix}", "split": split, "item_id": other} if split == "train" else pools[-1]
            )
        self._payload()
        self.write("qrels", qrels, schemas.QRELS, stage="ingest")
        self.write("pools", pools, schemas.POOLS, stage="ingest")
        rejects = [
            {
                "source": f"/data/{EVIL}.jsonl",
                "row": row,
                "stage": "ingest",
                "reason": f"image cannot be decoded: {EVIL}",
            }
            for row in range(3)
        ]
        self.write("rejects", rejects, schemas.REJECTS, name="ingest", stage="ingest")
        self._truth()
        return self

    def item(self, concept: int, text: str | None, artist: int | None = None, instruction: str | None = None) -> bytes:
        data = None if artist is None else self.pictures[artist, concept]
        image = None if data is None else ids.image_id(data)
        rendered = prompts.render(text, image is not None, instruction)
        identifier = ids.item_id(rendered, image)
        row = {"item_id": identifier, "rendered": rendered, "instruction": instruction, "text": text}
        self._items[identifier] = row | {"image_id": image, "source": "synthetic"}
        self.concept_of[identifier] = concept
        return identifier

    def _payload(self) -> None:
        images = [
            {"image_id": ids.image_id(data), "bytes": data, "path": None, "width": 48, "height": 48}
            for data in self.pictures.values()
        ]
        for table, rows, schema in (
            ("images", images, schemas.IMAGES),
            ("items", list(self._items.values()), schemas.ITEMS),
        ):
            artifact = self.run.artifact(table)
            Path(artifact.uri).mkdir(parents=True)
            lance.write_dataset(pa.Table.from_pylist(rows, schema), artifact.data_uri)
            self.finish(artifact, len(rows), "ingest")

    def _truth(self) -> None:
        self.truth_folder.mkdir()
        rows = []
        for (artist, concept), data in self.pictures.items():
            (self.truth_folder / f"{artist}-{concept}.png").write_bytes(data)
            rows.append({"kind": "image", "key": f"{artist}-{concept}.png", "hexcode": str(concept)})
        rows += [{"kind": "text", "key": name, "hexcode": str(n)} for n, name in enumerate(self.names)]
        _write(rows, self.truth_folder / "truth_items.parquet")
        related = [{"hexcode_a": "0", "hexcode_b": "4", "relevance": 0.6}]
        _write(related, self.truth_folder / "truth.parquet")

    # --- mining

    def mining(self, top_k: int = 20) -> SyntheticRun:
        """candidates, judgements and hard negatives of the training queries; a false negative is the other artist's."""
        qrels = [row for row in self.run.artifact("qrels").read().to_pylist() if row["split"] == "train"]
        pool = sorted({r["item_id"] for r in self.run.artifact("pools").read().to_pylist() if r["split"] == "train"})
        candidates = []
        for row in qrels:
            found = sorted(((self._similarity(row["query_id"], item), item) for item in pool), reverse=True)
            found = [pair for pair in found if pair[1] not in (row["item_id"], row["query_id"])][:top_k]
            sims, items = zip(*found, strict=True)
            positive = {"positive_ids": [row["item_id"]], "positive_similarities": [0.7]}
            entry = {"query_id": row["query_id"], "candidate_ids": list(items), "similarities": list(sims)}
            candidates.append(entry | positive)
        self.write("candidates", candidates, schemas.CANDIDATES, name="base", stage="retrieve")
        for judge in self.config.judges:
            self._judge(judge, candidates)
        return self

    def _similarity(self, query: bytes, item: bytes) -> float:
        same = self.concept_of[query] == self.concept_of[item]
        return round(0.45 * same + self.rng.uniform(0.1, 0.5), 4)

    def _judge(self, judge: str, candidates: list[dict[str, Any]]) -> None:
        judged, negatives = [], []
        for row in candidates:
            query = row["query_id"]
            scores = {item: self._score(judge, query, item) for item in row["candidate_ids"] + row["positive_ids"]}
            for item, score in scores.items():
                logits = {"logit_yes": float(np.log(score / (1 - score))), "logit_no": 0.0, "error": None}
                pair = {"query_id": query, "candidate_id": item, "is_positive": item in row["positive_ids"]}
                judged.append(pair | logits | {"score": score})
            positive = row["positive_ids"][0]
            found = select_negatives(
                row["candidate_ids"], row["similarities"], [scores[item] for item in row["candidate_ids"]],
                scores[positive], 0.7, self.config.select, query_rng(0, query),
            )  # fmt: skip
            if found.ids:
                kept = {"negative_ids": found.ids, "negative_scores": found.scores, "negative_reasons": found.reasons}
                kept |= {"negative_similarities": found.similarities, "positive_score": scores[positive]}
                negatives.append(kept | {"query_id": query, "positive_id": positive})
        counts = {"pairs": len(judged), "errors": 0}
        self.write("judgements", judged, schemas.JUDGEMENTS, name=judge, stage="judge", counts=counts, model="tiny")
        counts = {"queries_full": len(negatives), "candidates_false_negative": 31}
        self.write("hard_negatives", negatives, schemas.HARD_NEGATIVES, name=judge, stage="select", counts=counts)

    def _score(self, judge: str, query: bytes, item: bytes) -> float:
        same = self.concept_of[query] == self.concept_of[item]
        if judge == "oracle":
            return 0.98 if same else 0.02
        return float(np.clip(self.rng.gauss(0.72 if same else 0.38, 0.15), 0.01, 0.99))

    # --- training and evaluation

    def training(self, steps: int = 60) -> SyntheticRun:
        """Manifests and logs of the trained models; there are no weights."""
        for table, names in (("embedder", self.config.embedders), ("reranker", self.config.rerankers)):
            for place, name in enumerate(names):
                artifact = self.run.artifact(table, name)
                lines = [
                    {"step": step, "loss": 2.5 * 0.96**step + self.rng.uniform(0.3, 0.5) + place, "lr": 1e-3}
                    | {"queries_per_second": 210.0, "seconds": step / 3}
                    for step in range(1, steps + 1)
                ]
                write_text(artifact.child("log.jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
                loss = {"loss": names[name].loss} if table == "embedder" else {}  # type: ignore[attr-defined]
                self.finish(artifact, steps, f"train_{table}", model="tiny", config=loss, seconds=42.0)
        return self

    def evaluation(self) -> SyntheticRun:
        """Per-query tables and metrics, from vectors that know the concept better the later the arm."""
        settings = self.config.evaluate
        tables: dict[str, pa.Table] = {}
        arms = arms_of(self.run, self.config)
        for place, arm in enumerate(arms):
            tables[arm.name] = self._arm(arm, place, tables)
            self.run.artifact("evaluations", arm.name).write(tables[arm.name], tables[arm.name].schema)
            self.finish(self.run.artifact("evaluations", arm.name), tables[arm.name].num_rows, "evaluate")
        stacked, metrics = stack_arms(tables, settings.ks), self.run.artifact("metrics")
        self.write("metrics", metric_rows(stacked, arms, settings), schemas.METRICS, stage="evaluate")
        write_text(metrics.child("differences.json"), json.dumps(differences(stacked, comparisons(arms), settings)))
        write_text(metrics.child("arms.json"), json.dumps([arm.describe() for arm in arms]))
        from unime_ray.evaluation.judge_truth import measure_judges

        write_text(metrics.child("judges.json"), json.dumps(measure_judges(self.run, self.config)))
        return self

    def _arm(self, arm: Arm, place: int, tables: dict[str, pa.Table]) -> pa.Table:
        ks = self.config.evaluate.ks
        if arm.stage == "rerank":
            rows = tables[arm.embedder].to_pylist()
            for row in to_rerank(tables[arm.embedder]):
                top, gold = rows[row]["top_ids"], rows[row]["gold_ids"]
                order = sorted(range(len(top)), key=lambda at: (top[at] not in gold or self.rng.random() < 0.4, at))
                rows[row] = reranked_row(rows[row], order, ks)
        else:
            vectors = self.vectors(noise=2.2 - 0.4 * place)
            rows = [row for one in load_protocol(self.run, self.config).sets for row in search(one, vectors, ks, 10)]
        return pa.Table.from_pylist(rows, per_query_schema(ks))

    def vectors(self, noise: float, seed: int = 0) -> dict[bytes, np.ndarray]:
        rng = np.random.default_rng(seed)
        concepts = rng.normal(size=(len(self.names), 32))
        found = {}
        for item, concept in sorted(self.concept_of.items()):
            vector = concepts[concept] + noise * rng.normal(size=32)
            found[item] = (vector / np.linalg.norm(vector)).astype(np.float32)
        return found

    # --- writing

    def write(
        self, table: str, rows: list[dict[str, Any]], schema: pa.Schema, name: str | None = None, **manifest: Any
    ) -> None:
        artifact = self.run.artifact(table, name)
        artifact.write(pa.Table.from_pylist(rows, schema), schema)
        self.finish(artifact, len(rows), **manifest)

    def finish(self, artifact: Artifact, rows: int, stage: str, seconds: float = 3.2, **extra: Any) -> None:
        mark = ids.show(ids.item_id(artifact.key, None))[:24]
        rate = round(rows / seconds, 1)
        artifact.finish(
            Manifest(
                table=artifact.table, name=artifact.name, stage=stage, fingerprint=mark, rows=rows, seconds=seconds,
                rows_per_second=rate, git_commit="0123456789abcdef" * 2, revision="f" * 32, **extra,
            )
        )  # fmt: skip


def full_run(root: Path, num_concepts: int = 60) -> SyntheticRun:
    """A run that went from the corpus to its metrics."""
    return SyntheticRun(root, num_concepts).corpus().mining().training().evaluation()


def _picture(n: int, artist: int) -> bytes:
    color = (37 * n % 256, 91 * n % 256, 151 * n % 256)
    image = Image.new("RGB", (48, 48), "white")
    draw, box = ImageDraw.Draw(image), (6 + 4 * artist, 6, 42, 42 - 4 * artist)
    if SHAPES[n % 4] in ("circle", "ring"):
        draw.ellipse(box, fill=color if n % 4 == 0 else None, outline=color, width=5)
    else:
        draw.rectangle(box if n % 4 == 1 else (20, 4, 30, 44), fill=color)
    draw.text((18, 18), str(n), fill="black")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
