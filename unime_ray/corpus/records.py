"""What readers yield: one `Record` for a row that has the right shape, one `Reject` for a row that has not.

A record's pictures are still encoded bytes or paths; nothing has been opened. `resolve` opens them and makes ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["pairs", "pool"]
MAX_REASON_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a row: text, picture or both. `image` is encoded bytes, or a resolved path (local or a URI)."""

    text: str | None = None
    image: bytes | str | None = None
    instruction: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a source: a query with what is relevant to it (`pairs`), or one retrievable item (`pool`).

    `source` is the file and `row` counts from 1 as people count (a JSONL line, a CSV record, a Parquet row).
    `relevances` is as long as `positives`; `negative_scores` is empty or as long as `negatives`.
    """

    source: str
    row: int
    role: Role
    dataset: str
    split: str
    meta_task: str | None = None
    row_id: str | None = None
    query: Side | None = None
    positives: tuple[Side, ...] = ()
    relevances: tuple[float, ...] = ()
    negatives: tuple[Side, ...] = ()
    negative_scores: tuple[float, ...] = ()
    positive_score: float | None = None
    candidates: tuple[Side, ...] | None = None
    """The row's own evaluation candidates, if it names them (MMEB)."""
    item: Side | None = None

    def sides(self) -> list[Side]:
        """Every side that the row names."""
        single = [side for side in (self.query, self.item) if side is not None]
        return [*single, *self.positives, *self.negatives, *(self.candidates or ())]


@dataclass(frozen=True, slots=True)
class Reject:
    """One row that cannot be used, and why: a line of the `rejects` table.

    Reasons quote the row. What cannot be stored or shown in it (half a surrogate pair, a terminal's control sequence)
    is written out as an escape, and only the first `MAX_REASON_CHARS` characters are kept.
    """

    source: str
    row: int
    stage: str
    reason: str

    def __post_init__(self) -> None:
        kept = self.reason[:MAX_REASON_CHARS]
        shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in kept)
        object.__setattr__(self, "reason", shown)
