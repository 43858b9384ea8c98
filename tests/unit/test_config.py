"""Configs: presets load, unknown keys are refused by the nearest valid name, overrides apply."""

from __future__ import annotations

import pytest

from unime_ray.artifacts import Run
from unime_ray.config import RunConfig, load_config, nearest, parse_config, preset_names
from unime_ray.errors import ConfigError
from unime_ray.pipeline import save_config


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_round_trips(name):
    config = load_config(name)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: r\nembd: {}", "did you mean 'embed'"),
        ("judges: {a: {promt_order: query_first}}", "did you mean 'prompt_order'"),
        ("embedders: {a: {lora: {rnk: 3}}}", "did you mean 'rank'"),
        ("corpus: {sources: [{format: jsonl, path: x, image_rot: y}]}", "did you mean 'image_root'"),
        ("corpus: {sources: [{format: tar, path: x}]}", "corpus.sources.0.format"),
        ("embed: {batch_tokens: many}", "embed.batch_tokens"),
        ("judges: {a: {engine: oracle}}", "needs `truth`"),
        (
            "embedders: {a: {infonce_weight: 2}}",
            "embedders.a: loss judge_kl does not read `infonce_weight`; remove it, or",
        ),
        ("embedders: {a: {loss: infonce, hardness: 2}}", "choose `loss: hardness_infonce`"),
        ("embedders: {a: {loss: unime_v1, judge_targets: logit}}", "`loss: judge_kl` or `loss: margin_mse` or"),
        (
            "embedders: {a: {loss: hard_negative_ce, num_negatives: 0}}",
            "set num_negatives to 1 or more, or use infonce",
        ),
        ("embedders: {a: {loss: unime_v1, false_negative_margin: null}}", "set false_negative_margin"),
        ("embedders: {a: {loss: text_distill}}", "needs `teacher`"),
        ("embedders: {a: {loss: text_distill, teacher: t}}", "no teacher 't'; add a section `teachers`"),
        ("teachers: {mini: {}}\nembedders: {a: {loss: text_distill, teacher: mni}}", "did you mean 'mini'"),
        ("teachers: {m: {}}\nembedders: {a: {teacher: m}}", "loss judge_kl does not read `teacher`"),
        ("teachers: {m: {engine: parquet}}", "needs `path`"),
        ("embedders: {a: {loss: text_distill, teacher: t, lora: {train_vision: true}}}", "lora.train_vision to false"),
        ("embedders: {one: {}, two: {start_from: oen}}", "did you mean 'one'"),
        ("embedders: {a: {start_from: b}, b: {start_from: a}}", "a -> b -> a goes round in a circle"),
        ("embedders: {a: {}, b: {start_from: a, model: tiny}}", "remove one"),
        ("embedders: {a: {loss: infonse}}", "'infonce'"),
        ("embedders: {a: {matryoshka_dims: [64, 32]}}", "must ascend"),
        ("embedders: {a: {matryoshka_dims: [32, 64], matryoshka_weights: [1]}}", "1 matryoshka_weights for 2"),
        ("judges: {tiny: {}}\nembedders: {e: {judge: tny}}", "did you mean 'tiny'"),
        ("embedders: {a: {seed: -1}}", "embedders.a.seed: Input should be greater than or equal to 0"),
        ("- a list", "mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_configs_say_where_and_what(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=".*") as error:
        load_config(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_config("dmo")


def test_overrides_are_yaml_and_reach_lists_of_names():
    config = load_config("demo", ("judges.tiny.batch_tokens=77", "run=elsewhere", "evaluate.ks=[1, 3]"))
    assert config.judges["tiny"].batch_tokens == 77
    assert config.run == "elsewhere"
    assert config.evaluate.ks == (1, 3)


def test_an_override_changes_one_section_alone(tmp_path):
    """Though an anchor of the file gave several sections the same mapping."""
    path = tmp_path / "c.yaml"
    path.write_text("embedders: {a: &a {lora: {rank: 8}}, b: {<<: *a}}")
    for source, others in ((str(path), {"b": 8}), ("demo", {"unime_v2": 16, "unime_v2_oracle": 16})):
        changed = "a" if source != "demo" else "infonce"
        found = load_config(source, (f"embedders.{changed}.lora.rank=4",)).embedders
        assert {name: section.lora.rank for name, section in found.items()} == {changed: 4} | others


def test_an_override_takes_a_section_out():
    assert list(load_config("demo", ("embedders.infonce=null",)).embedders) == ["unime_v2", "unime_v2_oracle"]


@pytest.mark.parametrize("override", ["novalue", "=3", "run.deeper=3", "run=["])
def test_bad_overrides(override):
    with pytest.raises(ConfigError, match="--set"):
        load_config("demo", (override,))


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config("demo").embed.model = "other"  # type: ignore[misc]


def test_nearest_lists_all_when_nothing_is_near():
    assert nearest("zzz", ["alpha", "beta"]) == "; valid: alpha, beta"


def test_default_judge_is_the_first():
    config = load_config("demo")
    assert config.judge_of(config.embedders["infonce"]) == "tiny"


def test_a_config_is_laid_over_the_one_it_extends(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "extends: unime-v2-qwen2vl-2b-paper\nembedders: {unime_v2: {steps: 7, pixels: {min_pixels: null}}}\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "extends: base.yaml\nrun: r\n"
        "corpus: {sources: [{format: jsonl, path: a.jsonl}]}\n"
        "embedders: {unime_v2: {lora: {rank: 4}}, other: {loss: infonce}}\n"
        "judges: {judge: {dtype: float32}}\n"
    )
    config = load_config(str(tmp_path / "mine.yaml"), ("embedders.unime_v2.steps=9",))
    trained = config.embedders["unime_v2"]
    assert (trained.steps, trained.lora.rank, trained.lora.alpha, trained.batch_queries) == (9, 4, 64, 1024)
    assert (trained.pixels.min_pixels, trained.pixels.max_pixels) == (None, 336**2)
    assert (config.run, len(config.corpus.sources), list(config.embedders)) == ("r", 1, ["unime_v2", "other"])
    assert config.judges["judge"].model == "Qwen/Qwen2.5-VL-7B-Instruct"
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nembedders: {unime_v2: null}\n")
    assert not load_config(str(tmp_path / "mine.yaml")).embedders


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ("unime-v2-qwen2vl-2b", "did you mean 'unime-v2-qwen2vl-2b-"),
        ("[demo]", "extends: give the name of one preset"),
        ("c.yaml", "`extends` goes round in a circle"),
    ],
)
def test_a_bad_extends_is_told_in_one_line(tmp_path, parent, message):
    path = tmp_path / "c.yaml"
    path.write_text(f"extends: {parent}\n")
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_embedders_are_trained_after_what_they_start_from(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("embedders: {c: {start_from: b}, a: {}, b: {start_from: a}}")
    assert load_config(str(path)).training_order() == ["a", "b", "c"]


def test_imported_negatives_stand_for_a_judge() -> None:
    from unime_ray.artifacts import Run
    from unime_ray.pipeline import recipe

    config = RunConfig(judges={}, embedders={"mine": {"loss": "judge_kl"}, "same": {"judge": "imported"}})  # type: ignore[arg-type]
    assert [config.judge_of(section) for section in config.embedders.values()] == ["imported", "imported"]
    stages = [step.stage for step in recipe(Run("r"), config)]
    assert stages == ["ingest", "train-embedder", "train-embedder", "evaluate", "report"]
    with pytest.raises(ValueError, match="`imported` stands for hard negatives"):
        RunConfig(judges={"imported": {}})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "/tmp/x", ".hidden", "..", "", "a+b", "a b", "a?b", "x" * 101])
@pytest.mark.parametrize("section", ["judges", "teachers", "embedders", "rerankers"])
def test_a_name_that_is_no_folder_of_the_run_is_refused(section: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{section}: .* cannot be the name of a folder"):
        parse_config({section: {name: {}}}, "c.yaml")


def test_names_that_stand_for_something_else_are_refused() -> None:
    for section, name in (("embedders", "base"), ("rerankers", "none")):
        with pytest.raises(ConfigError, match=f"{section}: `{name}` stands for"):
            parse_config({section: {name: {}}}, "c.yaml")
    assert set(parse_config({"judges": {"größe_2.1-a": {}}}, "c.yaml").judges) == {"größe_2.1-a"}


def test_a_saved_config_demands_no_column_that_was_not_named(tmp_path):
    """Defaults of `columns` need not be in a file; written out as named they would have to be."""
    text = "run: {run}\ncorpus: {{sources: [{{format: parquet, path: x.parquet, columns: {{text: caption}}}}]}}"
    (tmp_path / "mine.yaml").write_text(text.format(run=tmp_path / "run"))
    config = load_config(str(tmp_path / "mine.yaml"))
    run = Run(config.run)
    save_config(run, config)
    again = load_config(run.child("config.yaml"))
    assert again == config
    assert again.corpus.sources[0].columns.model_fields_set == {"text"}
