"""Checking a corpus as ingest would, without Ray, a model or a run folder: what `unime-ray validate` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from unime_ray.config import CorpusConfig, Source
from unime_ray.corpus.files import absolute_sources, corpus_root
from unime_ray.corpus.readers import read_unit, work_units
from unime_ray.corpus.records import Record, Reject
from unime_ray.corpus.resolve import Resolver
from unime_ray.corpus.units import STAGE

SHOWN_REASONS = 10


@dataclass
class CorpusReport:
    """What is in a corpus. `counts` has good rows by (dataset, split, role)."""

    max_error_rate: float
    rows: int = 0
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)
    limit: int | None = None
    root: str | None = None
    """What the sources of `rejects` are relative to."""

    @property
    def ok(self) -> bool:
        """Whether ingest would accept the rows that were read."""
        bad = len(self.rejects)
        return self.rows > bad and bad <= self.max_error_rate * self.rows

    def render(self) -> str:
        """The report as text: counts per dataset and split, the first reasons of bad rows, and a verdict."""
        lines = [f"{'dataset':<32} {'split':<12} {'role':<6} {'good rows':>10}"]
        for (dataset, split, role), count in sorted(self.counts.items()):
            lines.append(f"{dataset:<32} {split:<12} {role:<6} {count:>10}")
        bad = len(self.rejects)
        part = "" if self.limit is None else f" (at most {self.limit} a source)"
        lines.append(f"{self.rows} rows read{part}, {bad} bad; corpus.max_error_rate is {self.max_error_rate:.1%}")
        if bad and self.root:
            lines.append(f"files under {self.root}:")
        lines += [f"  {one.source}:{one.row}: {one.reason}" for one in self.rejects[:SHOWN_REASONS]]
        if bad > SHOWN_REASONS:
            lines.append(f"  ... and {bad - SHOWN_REASONS} more")
        if self.ok and not any(key[1:] == ("train", "pairs") for key in self.counts):
            lines.append("warning: no pairs with split `train`; there is nothing to mine or train on")
        lines.append("the corpus can be used" if self.ok else "the corpus cannot be used")
        return "\n".join(lines)


def validate_corpus(corpus: CorpusConfig, limit: int | None = None) -> CorpusReport:
    """Read every row (or the first `limit` of each source) and check it with its pictures.

    Raises:
        CorpusError: a source is missing, unreadable, or lacks a column that the config names.
    """
    corpus = absolute_sources(corpus)
    report = CorpusReport(corpus.max_error_rate, limit=limit, root=corpus_root(corpus))
    for source in corpus.sources:
        seen: set[str] = set()
        for number, found in enumerate(_checked(source, corpus)):
            if number == limit:
                break
            report.rows += 1
            if isinstance(found, Record) and found.row_id is not None and found.row_id in seen:
                found = Reject(found.source, found.row, STAGE, f"duplicate id {found.row_id!r}")
            if isinstance(found, Reject):
                report.rejects.append(found)
                continue
            seen.update([found.row_id] if found.row_id is not None else [])
            report.counts[found.dataset, found.split, found.role] += 1
    return report


def _checked(source: Source, corpus: CorpusConfig) -> Iterator[Record | Reject]:
    for unit in work_units(source, corpus.rows_per_task):
        for found in Resolver(corpus).resolve_all(read_unit(unit, source, corpus)):
            yield found if isinstance(found, Reject) else found.record
