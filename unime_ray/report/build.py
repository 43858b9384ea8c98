"""`run_report`: gathers what a run has so far and writes `report/report.html`, one file that needs nothing else.

Text of the corpus is somebody else's: templates escape everything, and only the page's own style sheet, script and
base64 picture rules go in as they are.
"""

from __future__ import annotations

import datetime
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from unime_ray import __version__
from unime_ray.artifacts import Manifest, Run, StageResult, run_stage, write_text
from unime_ray.config import RunConfig
from unime_ray.report.answers import answers_section
from unime_ray.report.gallery import gallery
from unime_ray.report.judges import judge_sections
from unime_ray.report.pictures import Instructions, Pictures
from unime_ray.report.results import results_section
from unime_ray.report.sections import (
    corpus_section,
    manifests,
    provenance,
    stage_rows,
    training_curves,
    without_keys,
)

CODE_VERSION = 3
FILE = "report.html"


def run_report(run: Run, config: RunConfig, name: str | None = None) -> Manifest:
    """Write the report of whatever the run holds; sections of stages that have not run are left out."""
    artifact = run.artifact("report")
    inputs = [one for one in run.artifacts() if one.table != "report"]

    def build() -> StageResult:
        page, counts = render(run, config)
        write_text(artifact.child(FILE), page)
        return StageResult(rows=1, counts=counts | {"kilobytes": round(len(page.encode()) / 1000)})

    return run_stage(
        artifact,
        stage="report",
        code_version=CODE_VERSION,
        config=config.model_dump(mode="json"),
        inputs=inputs,
        build=build,
    )


def render(run: Run, config: RunConfig) -> tuple[str, dict[str, int]]:
    """The page, and how much is on it."""
    found = manifests(run)
    pictures = Pictures()
    instructions = Instructions.of(run)
    cards = gallery(run, config, pictures, instructions)
    results = results_section(run)
    headline = results["headline"] if results else None
    sections: dict[str, Any] = {
        "results": results,
        "answers": answers_section(run, headline["steps"], pictures, instructions) if headline else [],
        "corpus": corpus_section(run, config, found),
        "stages": stage_rows(found),
        "curves": training_curves(run, found),
        "judges": judge_sections(run, config),
        "cards": cards,
        "has_truth": config.evaluate.truth is not None,
        "provenance": provenance(config, found),
    }
    frame = {
        "title": without_keys(run.root).partition("?")[0].rstrip("/").rsplit("/", 1)[-1],
        "now": datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
        "seconds": sum(one.seconds for one in found.values()),
        "version": __version__,
        "style": Markup(_template("style.css") + pictures.css),
        "script": Markup(_template("page.js")),
    }
    page = environment().get_template("report.html.j2").render(**frame, **sections)
    return page, {"queries_shown": len(cards), "judges": len(sections["judges"]), "curves": len(sections["curves"])}


def environment() -> jinja2.Environment:
    """Templates that escape all they are given and fail on a name they do not know."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("unime_ray.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"count": count, "number": number, "duration": duration}
    return made


def _template(name: str) -> str:
    return (resources.files("unime_ray.report") / "templates" / name).read_text()


def count(value: float) -> str:
    """12345 -> 12 345, with thin spaces."""
    return f"{value:,.0f}".replace(",", "\u2009")


def number(value: Any, digits: int = 3) -> str:
    """A number of the manifest: whole ones grouped, others with `digits` digits; None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return count(value) if isinstance(value, int) or abs(value) >= 10_000 else f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
