"""The command line: `unime-ray run --config demo`, each stage alone, and the small commands around them."""

from __future__ import annotations

import logging
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unime_ray import __version__
from unime_ray.artifacts import Manifest, Run
from unime_ray.cli_serve import app as serve_app
from unime_ray.config import IMPORTED, RunConfig, load_config, nearest, preset_names, preset_summary
from unime_ray.errors import ConfigError, UnimeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Adapt multimodal retrieval to your own corpus: mine, judge, train, measure, on Ray.",
)
console = Console(highlight=False, markup=False)  # names of a corpus are no styles

ConfigOption = Annotated[str, typer.Option("--config", "-c", help="A YAML file, or the name of a preset.")]
SetOption = Annotated[list[str], typer.Option("--set", "-s", help="Override a value: --set embed.batch_tokens=4096")]
NameOption = Annotated[str, typer.Option("--name", help="Which judge or model (default: all of them).")]


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors raised on purpose become one line on standard error and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=False)
    for noisy in ("httpx", "ray", "datasets", "urllib3", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app(args=arguments)
    except UnimeError as error:
        _fail(str(error))
    except _ray_errors() as error:
        cause = _purposeful_cause(error)
        if cause is None:
            raise
        _fail(str(cause))


def _ray_errors() -> tuple[type[BaseException], ...]:
    """What Ray raises around an error of a worker; empty while ray has not been imported."""
    if "ray" not in sys.modules:
        return ()
    import ray.exceptions
    import ray.train

    return ray.exceptions.RayError, ray.train.TrainingFailedError


def _purposeful_cause(error: BaseException | None) -> UnimeError | None:
    """The UnimeError inside what Ray wraps around it, or None."""
    while error is not None:
        inner = getattr(error, "cause", None)
        if isinstance(inner, UnimeError):
            return inner
        failures = getattr(error, "worker_failures", None)
        for failure in (failures or {}).values():
            found = failure if isinstance(failure, UnimeError) else _purposeful_cause(failure)
            if isinstance(found, UnimeError):
                return found
        error = inner if isinstance(inner, BaseException) else (error.__cause__ or error.__context__)
        if isinstance(error, UnimeError):
            return error
    return None


def _fail(message: str, status: int = 2) -> None:
    print(f"unime-ray: {message}", file=sys.stderr)
    raise SystemExit(status)


def _load(config: str, overrides: list[str]) -> tuple[Run, RunConfig]:
    from unime_ray.preflight import resolve_demo

    loaded = load_config(config, tuple(overrides))
    run = Run(loaded.run)
    run.check_writable()
    return run, resolve_demo(loaded)


def _execute(config: str, overrides: list[str], stage: str | None, name: str | None = None) -> None:
    """Run the steps of the recipe that belong to `stage` (None: all) and say what each did."""
    from unime_ray.cluster import connected
    from unime_ray.pipeline import recipe, save_config
    from unime_ray.preflight import check_run

    run, loaded = _load(config, overrides)
    check_run(run, loaded)
    save_config(run, loaded)
    steps = [step for step in recipe(run, loaded) if stage in (None, step.stage) and name in (None, step.name)]
    if not steps and stage == "duplicates":
        raise ConfigError("duplicates.methods is empty; set for instance `duplicates: {methods: [phash, embedding]}`")
    if not steps:
        if name is None:
            raise ConfigError(f"{stage}: nothing to do; the config has no section for it")
        known = [step.name for step in recipe(run, loaded) if step.stage == stage and step.name]
        raise ConfigError(f"--name: the config has no {stage} named {name!r}{nearest(str(name), known)}")
    started = time.monotonic()
    try:
        with connected():
            for number, step in enumerate(steps, 1):
                console.print(f"[{number}/{len(steps)}] {step.title}", style="bold")
                clock = time.monotonic()
                manifest = step.run()
                console.print(_summary(manifest, time.monotonic() - clock))
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where this one stopped", 130)
    if stage is None or stage in ("evaluate", "report"):
        _show_results(run)
    console.print(f"run folder: {run.root}   ({time.monotonic() - started:.0f} s)")


def _summary(manifest: Manifest, seconds: float) -> str:
    counts = "  ".join(f"{key} {value}" for key, value in manifest.counts.items() if isinstance(value, (int, str)))
    if seconds < manifest.seconds / 2:
        return f"      already there: {manifest.rows} rows  {counts}"
    return f"      {manifest.rows} rows in {manifest.seconds:.1f} s ({manifest.rows_per_second:.0f}/s)  {counts}"


def _show_results(run: Run) -> None:
    from unime_ray.evaluation import render_results

    if run.artifact("metrics").manifest() is not None:
        render_results(run, console)
    report = run.artifact("report")
    if report.manifest() is not None:
        console.print("report:", Text(report.child("report.html"), style="bold"), soft_wrap=True)


@app.command("run")
def run_all(config: ConfigOption, overrides: SetOption = []) -> None:  # noqa: B006 - typer reads the default
    """The whole recipe: ingest to report. Steps already done are skipped; an interrupted one goes on."""
    _execute(config, overrides, None)


def _stage_command(stage: str, text: str, named: bool) -> None:
    def with_name(config: ConfigOption, overrides: SetOption = [], name: NameOption = "") -> None:  # noqa: B006
        _execute(config, overrides, stage, name or None)

    def plain(config: ConfigOption, overrides: SetOption = []) -> None:  # noqa: B006
        _execute(config, overrides, stage)

    app.command(stage, help=text)(with_name if named else plain)


_stage_command("ingest", "Read the corpus into images, items, qrels and pools; bad rows go to rejects.", False)
_stage_command("embed", "Embed every item with the base embedder.", False)
_stage_command("duplicates", "Group near-duplicates, for splits that leak and false negatives.", False)
_stage_command("retrieve", "Each training query's top-k candidates over the mining pool.", False)
_stage_command("select", "Drop false negatives and pick diverse hard negatives.", True)
_stage_command("teach", "Embed texts with a sentence embedder, for UniME V1's first stage.", True)
_stage_command("train-embedder", "Align an embedder with the judge on the hard negatives.", True)
_stage_command("train-reranker", "Train a reranker on the same negatives.", True)
_stage_command("evaluate", "Measure base, adapted embedders and rerankers on the test splits.", False)
_stage_command("report", "Write report.html.", False)


@app.command("judge")
def judge_pairs(
    config: ConfigOption,
    overrides: SetOption = [],  # noqa: B006
    name: NameOption = "",
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what it would cost; judge a sample only.")] = False,
) -> None:
    """Score every query with its candidates and positives."""
    if not estimate:
        return _execute(config, overrides, "judge", name or None)
    from unime_ray.cluster import connected
    from unime_ray.preflight import check_run
    from unime_ray.stages.judge_estimate import estimate_judge

    run, loaded = _load(config, overrides)
    check_run(run, loaded)
    with connected():
        for judge in [name] if name else loaded.judges:
            console.print(estimate_judge(run, loaded, judge).render())


@app.command()
def init(path: Annotated[Path, typer.Argument(help="Where to write the config.")]) -> None:
    """Write a commented config for your own corpus."""
    if path.exists():
        raise ConfigError(f"{path} is already there; choose another name")
    path.write_text((resources.files("unime_ray") / "presets" / "template.yaml").read_text())
    console.print(f"wrote {path}; set corpus.sources, then: unime-ray validate --config {path}")


@app.command()
def validate(config: ConfigOption, overrides: SetOption = [], limit: int = 0) -> None:  # noqa: B006
    """Check config and corpus without loading a model. --limit N reads only the first N rows of each source."""
    from unime_ray.corpus.validate import validate_corpus
    from unime_ray.preflight import check_sources, check_truth

    _, loaded = _load(config, overrides)
    check_sources(loaded)
    check_truth(loaded)
    report = validate_corpus(loaded.corpus, limit or None)
    console.print(report.render())
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def inspect(folder: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Print a run's artifacts: rows, seconds, rates, models."""
    run = Run(folder)
    artifacts = run.artifacts()
    if not artifacts:
        raise ConfigError(f"{folder}: no artifacts there; is it a run folder?")
    table = Table(box=None, pad_edge=False)
    for title in ("artifact", "rows", "seconds", "rows/s", "model", "revision", "counts"):
        table.add_column(title, justify="right" if title in ("rows", "seconds", "rows/s") else "left")
    for artifact in artifacts:
        table.add_row(*_inspect_row(artifact.key, artifact.require()))
    console.print(table)


def _inspect_row(key: str, manifest: Manifest) -> tuple[Any, ...]:
    counts = " ".join(f"{name}={value}" for name, value in manifest.counts.items() if isinstance(value, (int, str)))
    rate = f"{manifest.rows_per_second:.0f}" if manifest.rows_per_second else ""
    model = Path(manifest.model).name if manifest.model else ""
    return key, str(manifest.rows), f"{manifest.seconds:.1f}", rate, model, (manifest.revision or "")[:12], counts


@app.command()
def results(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    metric: Annotated[str, typer.Option("--metric", help="For instance hit@1, recall@10, mrr, ndcg@10.")] = "",
) -> None:
    """Print a run's results; with --metric one metric as a Markdown table."""
    from unime_ray.evaluation import render_results
    from unime_ray.evaluation.results import markdown_results

    run = Run(folder)
    if metric:
        print(markdown_results(run, metric))
    else:
        render_results(run, console)


app.add_typer(serve_app, name="serve")


@app.command("export-negatives")
def export_negatives(
    config: ConfigOption,
    to: Annotated[Path, typer.Option("--to", help="Folder to write.")],
    overrides: SetOption = [],  # noqa: B006
    name: NameOption = "",
) -> None:
    """Write hard negatives as UniME-V2's published JSON with its pictures, to train their code on them."""
    from unime_ray.corpus.unime_json import export_unime_json

    run, loaded = _load(config, overrides)
    judge = name or next(iter(loaded.judges), IMPORTED)
    rows = export_unime_json(run, judge, to)
    console.print(f"wrote {rows} rows to {to}")


@app.command("import-corpus")
def import_corpus(
    path: Annotated[str, typer.Argument(help="File, folder or glob, local or a URI.")],
    fmt: Annotated[str, typer.Option("--from", help="Its format, as in corpus.sources.")],
    to: Annotated[str, typer.Option("--to", help="The Parquet file to write.")],
    options: Annotated[
        list[str], typer.Option("--option", "-o", help="Another key of the source: -o role=pool -o split=test")
    ] = [],  # noqa: B006
    max_error_rate: Annotated[float, typer.Option(help="More bad rows than this share is an error.")] = 0.05,
) -> None:
    """Read any format and write it as one Parquet file with its pictures; bad rows go to a file beside it."""
    from unime_ray.corpus.exchange import check_outcome, rejects_beside, source_of, source_rows, write_corpus

    outcome = write_corpus(source_rows(source_of(fmt, path, options)), "parquet", to)
    console.print(f"wrote {outcome.pairs + outcome.pool} rows to {to}; {len(outcome.rejects)} rejected")
    check_outcome(outcome, max_error_rate, rejects_beside(to))


@app.command("export-corpus")
def export_corpus(
    folder: Annotated[str, typer.Argument(help="Folder to write.")],
    corpus: Annotated[str, typer.Option("--corpus", help="A run folder, a config file or a preset.")],
    fmt: Annotated[str, typer.Option("--to", help="parquet, jsonl, webdataset, mmeb_train or unime_json.")],
    judge: Annotated[str, typer.Option("--judge", help="Of a run: export this judge's hard negatives too.")] = "",
    pairs_only: Annotated[bool, typer.Option("--pairs-only", help="Leave pool rows out.")] = False,
) -> None:
    """Write the corpus of a run, or of a config, in another format; read again, its items have the same ids."""
    from unime_ray.corpus.exchange import check_outcome, corpus_rows, only_pairs, rejects_beside, run_rows, write_corpus

    if Run(corpus).artifact("qrels").manifest() is not None:
        rows, limit = run_rows(Run(corpus), judge or None), 0.0
    else:
        loaded = _load(corpus, [])[1].corpus
        rows, limit = corpus_rows(loaded), loaded.max_error_rate
    outcome = write_corpus(only_pairs(rows) if pairs_only else rows, fmt, folder)
    console.print(f"wrote {outcome.pairs} pairs and {outcome.pool} pool rows to {folder}")
    check_outcome(outcome, limit, rejects_beside(folder))


@app.command()
def export(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    to: Annotated[str, typer.Option("--to", help="Folder or s3:// address to write to, a folder a model.")],
    name: Annotated[str, typer.Option("--name", help="Only this embedder or reranker.")] = "",
    licence: Annotated[
        str, typer.Option("--licence", help="What the model cards state, for instance apache-2.0.")
    ] = "",
) -> None:
    """Write trained models for transformers, sentence-transformers and vLLM, each with adapter and model card."""
    from unime_ray.export import export_run

    for model in export_run(Run(folder), to, name, licence):
        console.print(f"{model.kind} {model.name}: {model.uri}   ({', '.join(model.libraries)})", soft_wrap=True)


@app.command()
def presets() -> None:
    """List the configs that ship in the package: run one with --config NAME, or start a file with `extends: NAME`."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in preset_names():
        if name != "template":
            table.add_row(name, preset_summary(name))
    console.print(table)


@app.command()
def version() -> None:
    """Print the version."""
    console.print(__version__)


if __name__ == "__main__":
    main()
