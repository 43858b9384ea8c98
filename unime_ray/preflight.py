"""What can be known to be wrong before any work starts, and the demo corpus laid out as a user's own would be."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from unime_ray.artifacts import Run, filesystem
from unime_ray.config import PixelBudget, RunConfig
from unime_ray.errors import ConfigError, CorpusError
from unime_ray.prompts import judge_prompt

DEMO_SCHEME = "demo://"
DEMO_QUERIES = 1500


def resolve_demo(config: RunConfig) -> RunConfig:
    """Replace `demo://file` paths by files of the bundled corpus, unpacked beside the run as plain JSONL and pictures.

    A run on S3 unpacks into `./demo_corpus`, which every node must then share.
    """
    data = config.model_dump()
    if not _mentions_demo(data):
        return config
    from unime_ray.corpus.demo import materialize_demo

    home = Path("demo_corpus").resolve() if "://" in config.run else Path(Run(config.run).child("corpus"))
    folder = materialize_demo(home, num_queries=DEMO_QUERIES)
    return RunConfig.model_validate(_replace_demo(data, str(folder)))


def _mentions_demo(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_mentions_demo(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_mentions_demo(item) for item in value)
    return isinstance(value, str) and value.startswith(DEMO_SCHEME)


def _replace_demo(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {key: _replace_demo(item, folder) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_demo(item, folder) for item in value]
    if isinstance(value, str) and value.startswith(DEMO_SCHEME):
        return f"{folder}/{value.removeprefix(DEMO_SCHEME)}".rstrip("/")
    return value


def check_run(run: Run, config: RunConfig) -> None:
    """Fail in one clear line, before a GPU is asked for, if the run cannot succeed.

    Raises:
        ArtifactError: the run folder cannot be written.
        ConfigError, CorpusError: no sources, a source that is not there, or no training pairs.
        ModelError: a checkpoint is missing, unsupported, or lacks what its role needs.
    """
    run.check_writable()
    check_sources(config)
    check_truth(config)
    check_vllm(config)
    check_teachers(config)
    check_duplicates(config)
    check_models(config)
    check_servers(run, config)


def check_sources(config: RunConfig) -> None:
    """Raise unless every source is there and at least one holds training pairs."""
    if not config.corpus.sources:
        raise ConfigError("corpus.sources is empty; name at least one file (`unime-ray init corpus.yaml` shows how)")
    for index, source in enumerate(config.corpus.sources):
        if "*" in source.path:
            continue
        fs, path = filesystem(source.path)
        if fs.get_file_info(path).type.name == "NotFound":
            raise CorpusError(f"corpus.sources[{index}].path: no such file or folder: {source.path}")
    if not any(source.role == "pairs" for source in config.corpus.sources):
        raise ConfigError("corpus.sources: no source has role `pairs`; mining needs queries with their positives")


def check_truth(config: RunConfig) -> None:
    """Raise unless every truth table and every table of labels that the config names is there."""
    named = {f"judges.{name}.truth": judge.truth for name, judge in config.judges.items()}
    named["evaluate.truth"] = config.evaluate.truth
    for name, judge in config.judges.items():
        if judge.calibration_labels is not None and not _is_there(judge.calibration_labels):
            raise ConfigError(f"judges.{name}.calibration_labels: no such file or folder: {judge.calibration_labels}")
    for key, folder in named.items():
        if folder is not None and not (Path(folder) / "truth.parquet").is_file():
            raise ConfigError(f"{key}: {folder} holds no truth.parquet")


def check_vllm(config: RunConfig) -> None:
    """Raise if vLLM is asked for and not installed, a model is split over more GPUs than its actor gets, or is of a
    family that vLLM does not run here."""
    from unime_ray.models.loading import read_family
    from unime_ray.models.vllm_engine import has_vllm, missing_vllm, vllm_family

    sections = {"embed": config.embed} | {f"judges.{name}": judge for name, judge in config.judges.items()}
    for key, section in sections.items():
        if section.engine != "vllm":
            continue
        if not has_vllm():
            raise missing_vllm(key)
        gpus, split = section.resources.num_gpus, section.vllm.tensor_parallel_size
        if split > max(gpus, 1):
            raise ConfigError(f"{key}.vllm.tensor_parallel_size is {split}: set {key}.resources.num_gpus to as many")
        vllm_family(read_family(section.model, section.revision), section.model)


def check_teachers(config: RunConfig) -> None:
    """Raise unless every teacher's library, and the file it reads, is there."""
    from unime_ray.models.teacher import teacher_folder

    for name, teacher in config.teachers.items():
        if teacher.engine == "sentence_transformers":
            teacher_folder(teacher.model)
        if teacher.path is not None:
            fs, path = filesystem(teacher.path)
            if fs.get_file_info(path).type.name == "NotFound":
                raise ConfigError(f"teachers.{name}.path: no such file or folder: {teacher.path}")


def check_duplicates(config: RunConfig) -> None:
    """Raise unless the library for perceptual hashes is there, if the config asks for them."""
    if "phash" in config.duplicates.methods and importlib.util.find_spec("imagehash") is None:
        raise ConfigError("duplicates.methods: `phash` needs imagehash: pip install 'unime-ray[dedup]'")


def _is_there(uri: str) -> bool:
    fs, path = filesystem(uri)
    return bool(fs.get_file_info(path).type.name != "NotFound")


def check_models(config: RunConfig) -> None:
    """Raise ModelError unless every checkpoint can be loaded in its role; reads configs and tokenizers only."""
    from unime_ray.models.embedder import check_dimensions
    from unime_ray.models.loading import check_model, embedding_dim

    embed = config.embed
    check_dimensions(embed.dimensions, embedding_dim(embed.model, embed.revision), embed.model)
    roles: dict[tuple[str, str | None, PixelBudget], bool] = {(embed.model, embed.revision, embed.pixels): False}
    for judge in config.judges.values():
        if judge.engine not in ("oracle", "openai"):
            prompt = judge_prompt(judge.prompt, judge.instruction)
            model, revision = judge.model, judge.revision
            check_model(model, revision=revision, needs_answers=True, prompt=prompt, pixels=judge.pixels)
    for embedder in config.embedders.values():
        if embedder.model is not None:
            pixels = embedder.pixels if embedder.pixels != PixelBudget() else embed.pixels
            roles.setdefault((embedder.model, embedder.revision, pixels), False)
    for reranker in config.rerankers.values():
        if reranker.model is not None:
            roles[(reranker.model, reranker.revision, reranker.pixels)] = True
    for (model, revision, pixels), answers in roles.items():
        check_model(model, revision=revision, needs_answers=answers, pixels=pixels)


def check_servers(run: Run, config: RunConfig) -> None:
    """Raise ModelError unless every server that still has to judge answers and knows its model."""
    for name, judge in config.judges.items():
        if judge.server is not None and run.artifact("judgements", name).manifest() is None:
            from unime_ray.models.judge_openai import check_server

            check_server(judge.server, judge.model)
