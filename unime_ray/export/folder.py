"""Copies a run's trained models into folders of their own, local or on S3, and writes what makes them self-describing.

    TO/<name>/           merged weights, tokenizer, image processor: plain transformers loads it
    TO/<name>/adapter/   the adapter alone, for peft, if one was trained
    TO/<name>/*.json     sentence-transformers' and vLLM's files (families they can take; see `layout`)
    TO/<name>/README.md  the model card

A reranker that has an embedder's name goes to TO/<name>-reranker. README.md is written last: a folder without it is
not a whole export.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

from unime_ray.artifacts import Artifact, Manifest, Run, filesystem, join, local_folder, read_text, write_text
from unime_ray.config import nearest
from unime_ray.errors import ConfigError
from unime_ray.export.card import model_card
from unime_ray.export.layout import (
    PICTURE_TOKENS,
    cross_encoder_files,
    embedder_files,
    embedder_template,
    pair_template,
)

KINDS = ("embedder", "reranker")
CARD, TEMPLATE = "README.md", "chat_template.jinja"


@dataclass(frozen=True)
class Exported:
    """One model that was written: `kind` is embedder or reranker, `libraries` what loads the folder at `uri`."""

    kind: str
    name: str
    uri: str
    libraries: tuple[str, ...]


def export_run(run: Run, to: str, name: str = "", licence: str = "") -> list[Exported]:
    """Export every trained model of `run` to `to`, or only the one called `name`.

    Args:
        to: a folder or an `s3://` URI. licence: what the card states; data and base model decide, so it is not guessed.

    Raises:
        ConfigError: the run has no such model, two would go to one folder, or `to` already holds one of another run.
    """
    found = [a for a in run.artifacts() if a.table in KINDS and name in ("", a.name)]
    if not found:
        known = [str(a.name) for a in run.artifacts() if a.table in KINDS]
        what = f"no trained model called {name!r}{nearest(name, known)}" if name else "no trained model"
        raise ConfigError(f"{run.root}: {what}; train one first (unime-ray train-embedder, train-reranker)")
    folders = _folders(found)
    for folder in folders:
        _check_target(join(to, folder))
    return [_export(run, artifact, join(to, folder), licence) for folder, artifact in folders.items()]


def _folders(found: list[Artifact]) -> dict[str, Artifact]:
    """Each model by the name of its folder: its own, but for a reranker that is called like an embedder."""
    embedders = {artifact.name for artifact in found if artifact.table == "embedder"}
    folders: dict[str, Artifact] = {}
    for artifact in found:
        name = str(artifact.name)
        folder = f"{name}-reranker" if artifact.table == "reranker" and name in embedders else name
        if folder in folders:
            raise ConfigError(f"{artifact.uri} and {folders[folder].uri} both go to {folder!r}; export one with --name")
        folders[folder] = artifact
    return folders


def _check_target(uri: str) -> None:
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type == pafs.FileType.Directory and read_text(join(uri, "config.json")) is not None:
        raise ConfigError(f"{uri} already holds a model; remove it or export to another folder")


def _export(run: Run, artifact: Artifact, uri: str, licence: str) -> Exported:
    manifest = artifact.require()
    _copy(artifact.child("model"), uri)
    adapter = artifact.child("adapter")
    if read_text(join(adapter, "adapter_config.json")) is not None:
        _copy(adapter, join(uri, "adapter"), without=(CARD,))
    config = json.loads(read_text(join(uri, "config.json")) or "{}")
    extra = _other_libraries(artifact.table, config, uri)
    for path, text in extra.items():
        write_text(join(uri, *path.split("/")), text)
    others = ("sentence-transformers", "vllm") if artifact.table == "embedder" else ("sentence-transformers",)
    libraries = ("transformers", *(others if extra else ()))
    exported = Exported(artifact.table, str(artifact.name), uri, libraries)
    write_text(join(uri, CARD), _card(run, exported, manifest, config, licence))
    return exported


def _copy(source: str, target: str, without: tuple[str, ...] = ()) -> None:
    """Copies the files of one folder, none of its folders."""
    (fs, path), (to_fs, to_path) = filesystem(source), filesystem(target)
    to_fs.create_dir(to_path, recursive=True)
    for info in fs.get_file_info(pafs.FileSelector(path)):
        if info.type == pafs.FileType.File and info.base_name not in without:
            pafs.copy_files(
                info.path, f"{to_path}/{info.base_name}", source_filesystem=fs, destination_filesystem=to_fs
            )


def _other_libraries(kind: str, config: dict[str, Any], uri: str) -> dict[str, str]:
    """sentence-transformers' and vLLM's files, or none for a family whose processor they would not use as we do."""
    picture = PICTURE_TOKENS.get(config.get("model_type", ""))
    if picture is None:
        return {}
    if kind == "embedder":
        dim = config.get("text_config", config)["hidden_size"]
        return embedder_files(dim) | {TEMPLATE: embedder_template(picture)}
    return _reranker_files(picture, uri)


def _reranker_files(picture: str, uri: str) -> dict[str, str]:
    """The judge's prompt as a pair template, with the answers' token ids of the exported tokenizer."""
    from unime_ray.models.loading import read_tokens

    _, tokens = read_tokens(local_folder(uri, without=(".safetensors",)))
    before, after = tokens.chat_wrap()
    yes, no = tokens.answer_ids()
    own = str(tokens.tokenizer.chat_template)
    return cross_encoder_files(yes, no) | {TEMPLATE: pair_template(picture, before, after, own)}


def _card(run: Run, exported: Exported, manifest: Manifest, config: dict[str, Any], licence: str) -> str:
    judge = manifest.config.get("judge")
    judged = run.artifact("judgements", judge).manifest() if judge else None
    metrics = run.artifact("metrics")
    rows = metrics.read().to_pylist() if metrics.manifest() is not None else []
    return model_card(exported.kind, exported.name, exported.libraries, manifest, judged, rows, config, licence)
