"""The report: complete, self-contained, small, and safe to open whatever the corpus says."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import EVIL, SyntheticRun, full_run

from unime_ray.artifacts import write_text
from unime_ray.calibration import fit_calibration
from unime_ray.config import EmbedConfig, SelectConfig
from unime_ray.report import run_report
from unime_ray.report.build import duration, number, render
from unime_ray.report.charts import axis, histogram, interval_chart, line_chart, score_counts, tick_label
from unime_ray.report.fates import load_mined, why
from unime_ray.report.gallery import choose
from unime_ray.report.pictures import Pictures
from unime_ray.report.sections import _reason_kind, seen_before, without_keys
from unime_ray.selection import FALSE_NEGATIVE, KEPT, SPARE

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements with their attributes; fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRun:
    return full_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def text(made: SyntheticRun) -> str:
    return render(made.run, made.config)[0]


def test_the_page_is_well_formed_and_has_every_section(text: str) -> None:
    page = Page(text)
    sections = [element["id"] for element in page.named("section")]
    assert sections == ["results", "answers", "corpus", "stages", "training", "judges", "gallery", "provenance"]
    assert [link["href"] for link in page.named("a")] == [f"#{name}" for name in sections]


def test_it_says_what_the_packaged_models_had_seen(made: SyntheticRun, text: str) -> None:
    assert "no picture by openmoji" in text and "or by emojione" in text
    other = made.config.model_copy(update={"embed": EmbedConfig(model="owner/name"), "judges": {}})
    assert seen_before(other) == ""


def test_nothing_is_loaded_from_elsewhere(text: str) -> None:
    page = Page(text)
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    assert all("src" not in attributes for _, attributes in page.elements)
    assert not re.search(r"https?://", text)
    assert set(re.findall(r"url\((.{5})", text)) == {"data:"}
    assert len(text.encode()) < 3_000_000


def test_text_of_the_corpus_stays_text(text: str) -> None:
    assert EVIL not in text and "&lt;script&gt;alert" in text
    page = Page(text)
    assert len(page.named("script")) == 1 and page.named("img") == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert EVIL in "".join(page.words), "it is shown, as text"


def test_keys_in_addresses_are_not_shown(made: SyntheticRun) -> None:
    address = "s3://AKIAKEY:s3%2Fcret@bucket/run"
    config = made.config.model_copy(update={"run": address, "embed": EmbedConfig(model="s3://AKIAKEY:s3cret@b/m")})
    page = render(made.run, config)[0]
    assert "AKIAKEY" not in page and "cret" not in page and "s3://***@bucket/run" in page
    assert without_keys("a@b http://h/p@q s3://bucket?x=1") == "a@b http://h/p@q s3://bucket?x=1"


def test_results_are_the_numbers_of_the_table(made: SyntheticRun, text: str) -> None:
    rows = made.run.artifact("metrics").read().to_pylist()
    mean = {r["model"]: 100 * r["value"] for r in rows if r["dataset"] == "mean" and r["metric"] == "hit@1"}
    shown = "".join(Page(text).words)
    assert f"was {mean['base']:.1f} %" in shown
    assert f"is {mean['unime_v2']:.1f} %" in shown
    assert all(f"{value:.1f}" in shown for value in mean.values())


def test_differences_that_may_be_none_are_hollow(made: SyntheticRun, text: str) -> None:
    differences = json.loads(Path(made.run.artifact("metrics").child("differences.json")).read_text())
    shown = [row for row in differences if row["metric"] in ("hit@1", "recall@5", "recall@10", "mrr", "ndcg@10")]
    unclear = [row for row in shown if row["low"] <= 0 <= row["high"]]
    assert 0 < len(unclear) < len(shown)
    classes = [(a.get("class") or "").split() for a in Page(text).named("div")]
    assert sum("unclear" in names for names in classes) == len(unclear)


def test_gallery_shows_reasons_pictures_and_truth(text: str) -> None:
    page = Page(text)
    cards = [a for a in page.named("article") if "card" in (a["class"] or "")]
    assert len(cards) == 24
    shown = "".join(page.words)
    for words in ("Kept as hard negatives", "Dropped as false negatives", "cycle 0 rank 0", "truly the same"):
        assert words in shown
    used = {name for a in page.named("span") for name in (a.get("class") or "").split() if re.fullmatch(r"p\d+", name)}
    defined = re.findall(r"^\.(p\d+)\{background", text, re.M)
    assert used == set(defined) and len(defined) == len(set(defined)), "each picture once, however often it is shown"


def test_fates_agree_with_what_select_wrote(made: SyntheticRun) -> None:
    negatives = made.run.artifact("hard_negatives", "oracle").read().to_pylist()
    mined = load_mined(made.run, "oracle", [row["query_id"] for row in negatives], made.config.select)
    for row in negatives:
        found = mined[row["query_id"]]
        assert {one.item_id for one in found.of(KEPT)} == set(row["negative_ids"])
        assert all(one.score == pytest.approx(0.98) for one in found.of(FALSE_NEGATIVE))
        assert all(made.concept_of[one.item_id] == made.concept_of[row["query_id"]] for one in found.of(FALSE_NEGATIVE))
        assert len(found.candidates) == sum(len(found.of(fate)) for fate in (KEPT, FALSE_NEGATIVE, SPARE))


def test_the_choice_of_queries_is_fixed_and_mixed(made: SyntheticRun) -> None:
    ids = made.run.artifact("candidates", "base").read(["query_id"])["query_id"].to_pylist()
    mined = load_mined(made.run, "tiny", ids, made.config.select)
    chosen = choose(mined, 12)
    assert chosen == choose(dict(reversed(mined.items())), 12) and len(set(chosen)) == 12
    assert sum(bool(mined[query].of(FALSE_NEGATIVE)) for query in chosen) >= 4


def test_reasons_have_their_numbers() -> None:
    config = SelectConfig(delta="positive", beta=0.05)
    assert why(FALSE_NEGATIVE, 0.5, 0.9, 0.8, 0.6, config) == "0.900 > 0.800 − 0.05"
    assert why("delta", 0.7, 0.1, 0.8, 0.6, config) == "similarity 0.700 ≥ δ 0.600"


def test_an_unfinished_run_has_a_report_too(tmp_path: Path) -> None:
    begun = SyntheticRun(tmp_path / "begun").corpus()
    page = Page(render(begun.run, begun.config)[0])
    assert [element["id"] for element in page.named("section")] == ["corpus", "stages", "provenance"]
    mined = SyntheticRun(tmp_path / "mined").corpus().mining()
    assert "gallery" in [element["id"] for element in Page(render(mined.run, mined.config)[0]).named("section")]


def test_run_report_writes_once(made: SyntheticRun) -> None:
    first = run_report(made.run, made.config)
    path = Path(made.run.artifact("report").child("report.html"))
    written = path.stat().st_mtime_ns
    assert run_report(made.run, made.config) == first and path.stat().st_mtime_ns == written
    assert first.counts["queries_shown"] == 24 and first.counts["kilobytes"] < 3000


def test_pictures_are_embedded_once_and_within_the_budget(tiny_pictures: dict[str, bytes]) -> None:
    pictures = Pictures(budget_bytes=700)
    names = [pictures.name(name.encode(), data) for name, data in tiny_pictures.items()]
    assert names[0] == "p0" and names[-1] is None
    assert pictures.name(b"red", tiny_pictures["red"]) == "p0"
    assert pictures.name(b"broken", b"no picture") is None
    assert len(pictures.css) < 700 + 80 * names.count(None) + 60 * len(names)


def test_large_pictures_become_thumbnails() -> None:
    from conftest import picture

    from unime_ray.report.pictures import thumbnail

    found = thumbnail(picture("red", (900, 300)))
    assert found is not None and found[0] == "image/webp" and len(found[1]) < 3000


def test_axes_have_round_ticks() -> None:
    assert [text for _, text in axis(0, 1).ticks] == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert [text for _, text in axis(-3, 12, wanted=5).ticks] == ["−5", "0", "5", "10", "15"]
    assert axis(2.0, 2.0).high > 2.0
    assert axis(0, 10).place(5) == 50.0 and axis(0, 10).place(99) == 100.0
    assert tick_label(20000, 10000) == "20k"


def test_charts_place_their_data() -> None:
    chart = interval_chart(
        [{"value": 2.0, "low": 1.0, "high": 3.0}, {"value": -1.0, "low": None, "high": None}], zero=True
    )
    assert chart["rows"][0]["from"] < chart["rows"][0]["at"] < chart["rows"][0]["to"]
    assert chart["rows"][1]["from"] == chart["rows"][1]["at"] < chart["zero"]
    bars = histogram(score_counts([0.0, 0.01, 1.0, float("nan")], num_bins=4))
    assert bars["total"] == 3 and [bar["height"] for bar in bars["bars"]] == [100.0, 50.0]
    line = line_chart([1, 2, 3], [3.0, 2.0, 1.0])
    assert line["raw"].startswith("M0.00,") and line["raw"].count("L") == 2


def test_numbers_as_people_read_them() -> None:
    assert [number(value) for value in (0, 12345, 0.5, None, "x")] == ["0", "12\u2009345", "0.500", "–", "x"]
    assert [duration(value) for value in (0.42, 59.6, 61, 3700)] == ["0.4 s", "1 min 00 s", "1 min 01 s", "1 h 01 min"]


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("positive: picture not found: /data/a.png", "positive: picture not found"),
        ("negative 3: text has 9 characters", "negative: text has 9 characters"),
        ("image cannot be decoded: x", "image cannot be decoded"),
        ("query:", "query"),
        ("nothing", "nothing"),
    ],
)
def test_reasons_are_told_apart_by_what_happened(reason: str, kind: str) -> None:
    assert _reason_kind(reason) == kind


def test_the_judges_page_shows_the_filter_over_beta_and_calibration(tmp_path: Path) -> None:
    made = SyntheticRun(tmp_path, 24).corpus().mining()
    rows = made.run.artifact("judgements", "tiny").read().to_pylist()
    scores, relevant = [row["score"] for row in rows], [row["is_positive"] for row in rows]
    calibration = fit_calibration("platt", scores, relevant)
    write_text(made.run.artifact("hard_negatives", "tiny").child("calibration.json"), calibration.to_json())
    made.training().evaluation()
    found = json.loads((Path(made.run.root) / "metrics" / "judges.json").read_text())
    tiny, oracle = found["tiny"], found["oracle"]
    assert oracle["calibrated"] is None and tiny["calibrated"]["method"] == "platt"
    for one in (tiny, oracle):
        sweep = {row["beta"]: row for row in one["sweep"]}
        assert {key: sweep[0.01][key] for key in ("precision", "recall", "flagged")} == {
            key: one[key] for key in ("precision", "recall", "flagged")
        }
        flagged = [row["flagged"] for row in one["sweep"]]
        assert flagged == sorted(flagged) and len(flagged) == 30, "a wider margin flags more"
        recalls = [row["recall"] for row in one["sweep"]]
        assert recalls == sorted(recalls) and recalls[-1] > recalls[0]
    page, _ = render(made.run, made.config)
    assert page.count('class="area sweep"') == 2 and page.count("after platt calibration") == 1
    assert "on calibrated scores" in page
