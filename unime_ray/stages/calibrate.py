"""Fitting a judge's calibration to labelled pairs, for select."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.json as pajson
import pyarrow.parquet as pq

from unime_ray.artifacts import Artifact, Run, filesystem, join
from unime_ray.calibration import Calibration, fit_calibration
from unime_ray.config import JudgeConfig
from unime_ray.corpus.truth import RELEVANT, TRUTH_FILES, Truth, concepts_of
from unime_ray.errors import ConfigError
from unime_ray.stages.engine import parquet_files

FILE = "calibration.json"
MAX_PAIRS = 500_000
"""Pairs a map is fitted on: the first files of judgements, whose queries are as good as drawn at random."""
MAX_LABEL_BYTES = 2**31
COLUMNS = ("query_id", "candidate_id", "relevant")
PAIR_COLUMNS = ["query_id", "candidate_id", "is_positive", "score"]


def labels_digest(settings: JudgeConfig) -> str:
    """What the labels are: part of select's fingerprint.

    Raises:
        ConfigError: `calibration_labels` is not there.
    """
    where = settings.calibration_labels
    if where is None:
        return "declared positives"
    hasher = hashlib.blake2b(digest_size=12)
    for uri in [join(where, name) for name in TRUTH_FILES] if _is_folder(where) else [where]:
        fs, path = filesystem(uri)
        if fs.get_file_info(path).type != pafs.FileType.File:
            raise ConfigError(f"calibration_labels: no such file: {uri}")
        with fs.open_input_stream(path) as stream:
            while chunk := stream.read(2**20):
                hasher.update(chunk)
    return hasher.hexdigest()


def fit_judge(run: Run, settings: JudgeConfig, judgements: Artifact) -> Calibration | None:
    """The calibration that `settings` asks for, fitted on this judge's scores; None for `none`.

    Raises:
        ConfigError: the labels cannot be read, or do not fit the judgements.
    """
    if settings.calibration == "none":
        return None
    scores: list[float] = []
    relevant: list[bool] = []
    for row, label in _labelled(run, settings, judgements):
        if row["score"] is not None:
            scores.append(row["score"])
            relevant.append(label)
    try:
        return fit_calibration(settings.calibration, np.array(scores), np.array(relevant, bool), settings.calibrate)
    except ValueError as error:
        where = settings.calibration_labels or "the declared positives"
        raise ConfigError(f"judges.{judgements.name}.calibration, fitted on {where}: {error}") from error


def _labelled(run: Run, settings: JudgeConfig, judgements: Artifact) -> Iterator[tuple[dict[str, Any], bool]]:
    """Judged pairs with their labels."""
    where = settings.calibration_labels
    if where is None:
        yield from ((row, row["is_positive"]) for row in _pairs(judgements))
    elif _is_folder(where):
        truth = Truth.load(where)
        concepts = concepts_of(run, truth)
        for row in _pairs(judgements):
            query, item = concepts.get(row["query_id"]), concepts.get(row["candidate_id"])
            if query is not None and item is not None:
                yield row, truth.relevance(query, item) >= RELEVANT
    else:
        labels = read_labels(where)
        for row in _pairs(judgements):
            label = labels.get((row["query_id"], row["candidate_id"]))
            if label is not None:
                yield row, label


def _pairs(judgements: Artifact) -> Iterator[dict[str, Any]]:
    paths, fs = parquet_files(judgements.data_uri)
    seen = 0
    for path in paths:
        if seen >= MAX_PAIRS:
            return
        table = pq.read_table(path, columns=PAIR_COLUMNS, filesystem=fs)
        seen += table.num_rows
        yield from table.to_pylist()


def read_labels(uri: str) -> dict[tuple[bytes, bytes], bool]:
    """(query id, candidate id) -> relevant, from a Parquet, CSV or JSONL table.

    Raises:
        ConfigError: no such file, a column is missing, or an id is not 32 hex digits (or 16 bytes).
    """
    fs, path = filesystem(uri)
    info = fs.get_file_info(path)
    if info.type != pafs.FileType.File or info.size > MAX_LABEL_BYTES:
        raise ConfigError(f"calibration_labels: {uri} is no file of at most {MAX_LABEL_BYTES >> 30} GB")
    try:
        with fs.open_input_file(path) as stream:
            table = _reader(path)(stream).select(list(COLUMNS))
        columns = [table.column(name).to_pylist() for name in COLUMNS]
        ids = [[one if isinstance(one, bytes) else bytes.fromhex(one) for one in column] for column in columns[:2]]
        return {(q, c): bool(float(label)) for q, c, label in zip(*ids, columns[2], strict=True)}
    except (pa.ArrowException, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"calibration_labels: {uri}: not a table of {', '.join(COLUMNS)}: {reason}") from error


def _reader(path: str) -> Any:
    if path.endswith(".csv"):
        # Ids of digits alone must not become numbers.
        return lambda stream: pacsv.read_csv(
            stream, convert_options=pacsv.ConvertOptions(column_types=dict.fromkeys(COLUMNS[:2], pa.string()))
        )
    return pajson.read_json if path.endswith((".jsonl", ".json")) else pq.read_table


def _is_folder(uri: str) -> bool:
    fs, path = filesystem(uri)
    return fs.get_file_info(path).type == pafs.FileType.Directory
