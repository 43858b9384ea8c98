"""The configuration of a run: one YAML file, frozen pydantic models, unknown keys refused by name.

    run: runs/mine               a local folder or s3://bucket/prefix
    corpus / embed / retrieve / judges / select / teachers / embedders / rerankers / evaluate / serve

`judges`, `teachers`, `embedders` and `rerankers` are named, since one run may compare several; most have one of each.
A preset is a config that ships in the package (`demo`). `extends: NAME` at the top of a file starts from a preset, or
from another file, and the file's own values are laid over it; `--set a.b=v` overrides any value.
"""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from unime_ray.config_corpus import Columns as Columns
from unime_ray.config_corpus import CorpusConfig, DuplicatesConfig
from unime_ray.config_corpus import ImagePolicy as ImagePolicy
from unime_ray.config_corpus import Source as Source
from unime_ray.config_judge import JudgeConfig
from unime_ray.config_serve import ServeConfig
from unime_ray.config_teacher import TeacherConfig
from unime_ray.config_train import EmbedderConfig, RerankerConfig, TrainConfig
from unime_ray.config_train import LoraConfig as LoraConfig
from unime_ray.config_vllm import VllmConfig
from unime_ray.errors import ConfigError
from unime_ray.sections import Count, PixelBudget, Positive, Resources, Section, Seed

NAMED_SECTIONS = ("judges", "teachers", "embedders", "rerankers")
NAME = re.compile(r"\w[\w.-]{0,99}")
IMPORTED = "imported"
"""In place of a judge's name: the hard negatives that a source of the corpus brought along."""
RESERVED = {
    ("judges", IMPORTED): "hard negatives that the corpus brings",
    ("embedders", "base"): "the embedder before training",
    ("rerankers", "none"): "serving without a reranker",
}
"""Names that stand for something else."""


class EmbedConfig(Section):
    """The embedder that mines (and the base that `embedders` adapt unless they name another)."""

    model: str = "tiny"
    revision: str | None = None
    engine: Literal["transformers", "vllm"] = "transformers"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_tokens: Count = 8192
    """Upper bound of padded tokens in one forward pass."""
    rows_per_batch: Count = 512
    pixels: PixelBudget = PixelBudget()
    half: bool = False
    """Store vectors as float16."""
    vllm: VllmConfig = VllmConfig()
    dimensions: Count | None = None
    """Keep the first so many numbers of each vector, normalised again, of base and trained embedders alike: for
    checkpoints that were trained for it (Matryoshka). None: all."""
    resources: Resources = Resources()


class RetrieveConfig(Section):
    top_k: Count = 50
    scope: Literal["global", "dataset"] = "global"
    """`global` searches the whole mining pool, items of other datasets included, as the paper does; `dataset` only the
    pool of the query's own dataset: right where datasets differ in what an answer is (pictures, or names)."""
    queries_per_batch: Count = 1024
    num_cpus: Positive = 1.0


class SelectConfig(Section):
    """Which judged candidates become hard negatives (PAPER: UniME-V2 section on hard negative sampling)."""

    delta: Literal["none", "positive"] | float = "none"
    """Similarity threshold: candidates at or above it are dropped. `positive` is sim(q, c+)."""
    beta: float = 0.01
    """False-negative margin: candidates with score > sigma(q, c+) - beta are dropped."""
    num_negatives: Count = 10
    cycle: Count = 5
    fallback: Literal["skip", "published"] = "skip"
    """No candidate left: `skip` leaves the query out; `published` takes random candidates with score 1.0."""
    seed: Seed = 0


class EvaluateConfig(Section):
    splits: tuple[str, ...] = ("test",)
    ks: tuple[int, ...] = (1, 5, 10)
    rerank_top_k: Count = 10
    max_queries: int | None = None
    """Evaluate a fixed sample of this many queries per dataset (None: all)."""
    bootstrap_samples: Annotated[int, Field(ge=0)] = 1000
    batch_tokens: Count = 8192
    reranker: Literal["listwise", "pointwise"] = "listwise"
    truth: str | None = None
    """Folder with a truth table: the judge is then measured against it in the report."""
    seed: Seed = 0


class RunConfig(Section):
    run: str = "runs/unnamed"
    corpus: CorpusConfig = CorpusConfig()
    embed: EmbedConfig = EmbedConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    retrieve: RetrieveConfig = RetrieveConfig()
    judges: dict[str, JudgeConfig] = {"judge": JudgeConfig()}
    select: SelectConfig = SelectConfig()
    teachers: dict[str, TeacherConfig] = {}
    embedders: dict[str, EmbedderConfig] = {}
    rerankers: dict[str, RerankerConfig] = {}
    evaluate: EvaluateConfig = EvaluateConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="after")
    def _names_can_be_used(self) -> RunConfig:
        """They become folders of the run, and metrics join them by `+`."""
        for key in NAMED_SECTIONS:
            for name in getattr(self, key):
                if not NAME.fullmatch(name):
                    raise ValueError(
                        f"{key}: {name!r} cannot be the name of a folder; use letters, digits, '_', '-' and '.', the "
                        "first a letter, a digit or '_'"
                    )
                if (key, name) in RESERVED:
                    raise ValueError(f"{key}: `{name}` stands for {RESERVED[key, name]}; take another")
        return self

    @model_validator(mode="after")
    def _judges_exist(self) -> RunConfig:
        for kind, trained in (("embedders", self.embedders), ("rerankers", self.rerankers)):
            for name, section in trained.items():
                if section.judge not in (None, IMPORTED, *self.judges):
                    raise ValueError(
                        f"{kind}.{name}.judge: no judge {section.judge!r}{nearest(str(section.judge), self.judges)}"
                    )
        return self

    @model_validator(mode="after")
    def _training_order_exists(self) -> RunConfig:
        for name, section in self.embedders.items():
            if section.teacher is not None and section.teacher not in self.teachers:
                hint = nearest(section.teacher, self.teachers) if self.teachers else "; add a section `teachers`"
                raise ValueError(f"embedders.{name}.teacher: no teacher {section.teacher!r}{hint}")
            if section.start_from is not None and section.start_from not in self.embedders:
                hint = nearest(section.start_from, self.embedders)
                raise ValueError(f"embedders.{name}.start_from: no embedder {section.start_from!r}{hint}")
        self.training_order()
        return self

    def training_order(self) -> list[str]:
        """Names of `embedders`, each after the one it starts from.

        Raises:
            ValueError: some start from each other.
        """
        order: list[str] = []
        for name in self.embedders:
            chain: list[str] = []
            before: str | None = name
            while before is not None and before not in order:
                if before in chain:
                    raise ValueError(
                        f"embedders.{name}.start_from: {' -> '.join([*chain, before])} goes round in a circle"
                    )
                chain.append(before)
                before = self.embedders[before].start_from
            order += reversed(chain)
        return order

    def judge_of(self, section: TrainConfig) -> str:
        """Name of the judge whose negatives `section` trains on."""
        return section.judge if section.judge is not None else next(iter(self.judges), IMPORTED)


def nearest(name: str, valid: Any) -> str:
    """`; did you mean 'x'?` for the valid name nearest to `name`, else the list of valid ones."""
    names = [str(item) for item in valid]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(names)}"


def preset_names() -> list[str]:
    """Names of the configs that ship in the package."""
    folder = resources.files("unime_ray") / "presets"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_config(source: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a config by preset name or file path and apply `key.path=value` overrides (values are YAML).

    Raises:
        ConfigError: no such preset or file, invalid YAML, an `extends` that leads nowhere or in a circle, an unknown
            key (the nearest valid one is named), a value of the wrong type, or an override that is no `key=value`.
    """
    data = _read(source)
    for override in overrides:
        _override(data, override)
    return parse_config(data, source)


def parse_config(data: dict[str, Any], source: str) -> RunConfig:
    """The config that `data` holds; `source` is what messages call it.

    Raises:
        ConfigError: an unknown key (the nearest valid one is named) or a value of the wrong type.
    """
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error


def preset_summary(name: str) -> str:
    """What a preset says of itself in its first line."""
    text = (resources.files("unime_ray") / "presets" / f"{name}.yaml").read_text()
    return text.splitlines()[0].removeprefix("#").strip()


def _read(source: str, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """A config's values, laid over those of the config it extends. `below`: the configs that led here."""
    if source in below:
        raise ConfigError(f"{below[0]}: `extends` goes round in a circle: {' -> '.join([*below, source])}")
    data = _parse(source)
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise ConfigError(f"{source}: extends: give the name of one preset, or the path of one config file")
    if parent not in preset_names():
        path = Path(source).parent / Path(parent).expanduser()
        if not path.is_file():
            hint = nearest(parent, preset_names())
            raise ConfigError(f"{source}: extends: no config file and no preset named {parent!r}{hint}")
        parent = str(path)
    return _laid_over(_read(parent, (*below, source)), data)


def _laid_over(base: Any, data: dict[str, Any], key: str = "") -> dict[str, Any]:
    """`data` over `base`: mappings merge, all else replaces; null takes out a judge, teacher, embedder or reranker."""
    merged = dict(base) if isinstance(base, dict) else {}
    for name, value in data.items():
        if value is None and key in NAMED_SECTIONS:
            merged.pop(name, None)
        elif isinstance(value, dict):
            merged[name] = _laid_over(merged.get(name), value, name)
        else:
            merged[name] = value
    return merged


def _parse(source: str) -> dict[str, Any]:
    if source in preset_names():
        text = (resources.files("unime_ray") / "presets" / f"{source}.yaml").read_text()
    else:
        path = Path(source)
        if not path.is_file():
            hint = nearest(source, preset_names())
            raise ConfigError(f"no config file and no preset named {source!r}{hint}")
        text = path.read_text()
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: a config is a mapping of sections, not {type(data).__name__}")
    return _unshared(data)


def _unshared(value: Any) -> Any:
    """A copy in which no mapping stands twice: a YAML anchor puts one under several names, and overriding a value of
    one section must not change it in another."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: write it as key.path=value")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is a value, not a section")
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: {value!r} is not valid YAML; quote it") from error
    if found is None and parents and parents[-1] in NAMED_SECTIONS:
        data.pop(last, None)
    else:
        data[last] = found


def _explain(error: ValidationError) -> str:
    """The first problem of a failed validation in one line."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section = _section_at(problem["loc"][:-1])
        return f"unknown key {where!r}{nearest(str(problem['loc'][-1]), section.model_fields)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _section_at(path: tuple[int | str, ...]) -> type[Section]:
    """The section class that a validation error's path leads to."""
    section: type[Section] = RunConfig
    for part in path:
        field = section.model_fields.get(str(part))
        if field is not None:
            section = _section_of(field.annotation) or section
    return section


def _section_of(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None
