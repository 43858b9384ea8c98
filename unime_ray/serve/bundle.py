"""What of a run is served: the embedder and reranker chosen, where they lie, and which revision they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml
from pydantic import ValidationError

from unime_ray.artifacts import Run, local_folder, read_text
from unime_ray.config import PixelBudget, RunConfig, nearest
from unime_ray.config_serve import ServeConfig
from unime_ray.config_vllm import VllmConfig
from unime_ray.corpus.payload import PayloadStore
from unime_ray.errors import ConfigError

BASE, NO_RERANKER = "base", "none"


@dataclass(frozen=True)
class Checkpoint:
    """A model by the name its users call it, with how it is loaded."""

    name: str
    path: str
    """A local folder, a hub id, or the address of a folder, which each replica copies to its own machine."""
    revision: str
    dim: int
    """Width of its vectors."""
    hub_revision: str | None
    dtype: str
    pixels: PixelBudget
    batch_tokens: int
    vllm: VllmConfig | None = None
    """Settings of vLLM, if that is what embeds."""


@dataclass(frozen=True)
class Bundle:
    """Everything a replica needs to know; small, so that it travels with the deployment."""

    run: Run
    embedder: Checkpoint
    reranker: Checkpoint | None
    config: ServeConfig
    judge: str | None = None
    """Whose hard negatives the embedder was trained on."""

    def payload(self) -> PayloadStore:
        return PayloadStore(self.run.artifact("images").data_uri, self.run.artifact("items").data_uri)


def resolve_bundle(run: Run, config: RunConfig, serve: ServeConfig) -> Bundle:
    """Choose the models and find their revisions.

    Raises:
        ConfigError: `serve.embedder` or `serve.reranker` names none that the run has.
        ArtifactError: ingest has not run.
        ModelError: a checkpoint is not there.
    """
    for table in ("images", "items", "pools"):
        run.artifact(table).require()
    embedder = _embedder(run, config, serve)
    trained = config.embedders.get(embedder.name)
    judge = None if trained is None else trained.judge
    if config.embed.dimensions is not None:
        embedder = replace(embedder, dim=config.embed.dimensions)
    if config.embed.engine == "vllm":
        embedder = replace(embedder, vllm=config.embed.vllm)
    return Bundle(run, embedder, _reranker(run, config, serve), serve, judge)


def run_config(run: Run) -> RunConfig:
    """The config a run saved with itself.

    Raises:
        ConfigError: there is none; or none that this version reads.
    """
    text = read_text(run.child("config.yaml"))
    if text is None:
        raise ConfigError(f"{run.root}: no config.yaml there; is it a run folder?")
    try:
        return RunConfig.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{run.child('config.yaml')}: {' '.join(str(error).split())}") from error


def choice_of(bundle: Bundle) -> dict[str, Any]:
    """What `chosen` takes: the models by name and the index."""
    reranker = bundle.reranker.name if bundle.reranker else NO_RERANKER
    return {"embedder": bundle.embedder.name, "reranker": reranker, "index": bundle.config.index.model_dump()}


def chosen(bundle: Bundle, choice: Mapping[str, Any]) -> Bundle:
    """The bundle with other models or another index: `embedder`, `reranker` and `index` as in the config's `serve`.

    Raises:
        ConfigError: a key or value cannot be used, or the run has no such model.
    """
    own = choice_of(bundle)
    if dict(choice) == own:
        return bundle
    for key in choice:
        if key not in own:
            raise ConfigError(f"user_config.{key}: unknown{nearest(key, own)}")
    try:
        settings = ServeConfig.model_validate(bundle.config.model_dump() | dict(choice))
    except ValidationError as error:
        raise ConfigError(f"user_config: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error
    return resolve_bundle(bundle.run, run_config(bundle.run), settings)


def _embedder(run: Run, config: RunConfig, serve: ServeConfig) -> Checkpoint:
    trained = _trained(run, "embedder", tuple(config.embedders))
    name = serve.embedder or (trained[-1] if trained else BASE)
    section = config.embed
    if name == BASE:
        return _checkpoint(name, section.model, section.revision, section.dtype, section.pixels, section.batch_tokens)
    _check("serve.embedder", name, [BASE, *trained])
    pixels = config.embedders[name].pixels if name in config.embedders else section.pixels
    model = run.artifact("embedder", name).child("model")
    return _checkpoint(name, model, None, section.dtype, pixels, section.batch_tokens)


def _reranker(run: Run, config: RunConfig, serve: ServeConfig) -> Checkpoint | None:
    trained = _trained(run, "reranker", tuple(config.rerankers))
    name = serve.reranker or (trained[-1] if trained else NO_RERANKER)
    if name == NO_RERANKER:
        return None
    _check("serve.reranker", name, [NO_RERANKER, *trained])
    section = config.rerankers.get(name)
    pixels = section.pixels if section is not None else config.embed.pixels
    model = run.artifact("reranker", name).child("model")
    return _checkpoint(name, model, None, config.embed.dtype, pixels, config.evaluate.batch_tokens)


def _trained(run: Run, kind: str, declared: tuple[str, ...]) -> list[str]:
    """Names of the run's finished models of a kind: those of the config in its order, then any others."""
    there = [artifact.name for artifact in run.artifacts() if artifact.table == kind and artifact.name]
    return [name for name in there if name not in declared] + [name for name in declared if name in there]


def _check(key: str, name: str, valid: list[str]) -> None:
    if name not in valid:
        raise ConfigError(f"{key}: the run has no {name!r}{nearest(name, valid)}")


def _checkpoint(
    name: str, model: str, hub_revision: str | None, dtype: str, pixels: PixelBudget, batch_tokens: int
) -> Checkpoint:
    from unime_ray.models.loading import embedding_dim
    from unime_ray.models.names import model_revision, resolve_model

    path = model if "://" in model else resolve_model(model)
    revision = model_revision(path, hub_revision)
    dim = embedding_dim(local_folder(model, without=(".safetensors",)), hub_revision)
    return Checkpoint(name, path, revision, dim, hub_revision, dtype, pixels, batch_tokens)
