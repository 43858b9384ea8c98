"""Artifacts: skipped when done, resumed under the same fingerprint, cleared under another."""

from __future__ import annotations

import pyarrow as pa
import pytest

from unime_ray.artifacts import Run, StageResult, filesystem, fingerprint, join, read_text, run_stage, write_text
from unime_ray.errors import ArtifactError
from unime_ray.schemas import REJECTS

ROWS = pa.table({"source": ["a", "b"], "row": [1, 2], "stage": ["ingest"] * 2, "reason": ["x", "y"]})


def _stage(run, config, calls, fail=False):
    artifact = run.artifact("rejects", "ingest")

    def build():
        calls.append(read_text(artifact.child("half")) or "fresh")
        write_text(artifact.child("half"), "half")
        if fail:
            raise KeyboardInterrupt
        artifact.write(ROWS, REJECTS)
        return StageResult(rows=2, counts={"bad": 2})

    return run_stage(artifact, stage="ingest", code_version=1, config=config, build=build)


def test_a_done_stage_is_skipped_and_a_changed_one_starts_clean(tmp_path):
    run, calls = Run(str(tmp_path)), []
    first = _stage(run, {"a": 1}, calls)
    assert _stage(run, {"a": 1}, calls) == first
    assert calls == ["fresh"]
    other = _stage(run, {"a": 2}, calls)
    assert other.fingerprint != first.fingerprint
    assert calls == ["fresh", "fresh"]


def test_an_interrupted_stage_goes_on_and_is_not_there_until_finished(tmp_path):
    run, calls = Run(str(tmp_path)), []
    with pytest.raises(KeyboardInterrupt):
        _stage(run, {"a": 1}, calls, fail=True)
    artifact = run.artifact("rejects", "ingest")
    assert artifact.manifest() is None
    with pytest.raises(ArtifactError, match="missing or unfinished"):
        artifact.read()
    _stage(run, {"a": 1}, calls)
    assert calls == ["fresh", "half"]
    assert artifact.read().sort_by("row").to_pydict() == ROWS.to_pydict()
    assert [found.key for found in run.artifacts()] == ["rejects/ingest"]


def test_a_missing_input_is_named(tmp_path):
    run = Run(str(tmp_path))
    with pytest.raises(ArtifactError, match="judgements/tiny"):
        run_stage(
            run.artifact("hard_negatives", "tiny"),
            stage="select",
            code_version=1,
            config={},
            inputs=[run.artifact("judgements", "tiny")],
            build=lambda: StageResult(0),
        )


def test_fingerprint_changes_with_each_part():
    base = fingerprint("judge", 1, {"a": 1}, {"items": "f"})
    assert base == fingerprint("judge", 1, {"a": 1}, {"items": "f"})
    others = [
        fingerprint("select", 1, {"a": 1}, {"items": "f"}),
        fingerprint("judge", 2, {"a": 1}, {"items": "f"}),
        fingerprint("judge", 1, {"a": 2}, {"items": "f"}),
        fingerprint("judge", 1, {"a": 1}, {"items": "g"}),
    ]
    assert base not in others
    assert len(set(others)) == 4


def test_run_paths_are_absolute_and_uris_keep_their_query(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Run("here").root == str(tmp_path / "here")
    assert join("s3://bucket/run?endpoint_override=x", "a", "b") == "s3://bucket/run/a/b?endpoint_override=x"
    assert filesystem(str(tmp_path))[1] == str(tmp_path)


def test_an_unwritable_run_folder_is_one_clear_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(ArtifactError, match="cannot be written"):
        Run(str(blocked / "run")).check_writable()
