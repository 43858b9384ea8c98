"""From a record to items with ids: text rendered, pictures opened and checked. The last gate of a row."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from unime_ray.config import CorpusConfig
from unime_ray.corpus.files import is_remote, read_picture
from unime_ray.corpus.images import check_image, store_bytes
from unime_ray.corpus.records import Record, Reject, Side
from unime_ray.corpus.units import STAGE
from unime_ray.errors import RejectedRow
from unime_ray.ids import image_id, item_id
from unime_ray.prompts import render

READ_AHEAD_ROWS, READ_THREADS = 32, 16


@dataclass(frozen=True, slots=True)
class Picture:
    """A checked picture. `data` is None if this resolver has handed its bytes out before."""

    image_id: bytes
    data: bytes | None = None
    width: int = 0
    height: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One item of a row."""

    item_id: bytes
    rendered: str
    instruction: str | None
    text: str | None
    picture: Picture | None


@dataclass(frozen=True, slots=True)
class Resolved:
    """A good row: its record, and the entries of each of its sides (a pool row has only `item`)."""

    record: Record
    query: Entry | None = None
    positives: tuple[Entry, ...] = ()
    negatives: tuple[Entry, ...] = ()
    candidates: tuple[Entry, ...] | None = None
    item: Entry | None = None

    def entries(self) -> list[Entry]:
        """Every item that the row names."""
        single = [entry for entry in (self.query, self.item) if entry is not None]
        return [*single, *self.positives, *self.negatives, *(self.candidates or ())]


class Resolver:
    """Resolves the rows of one unit; remembers what it has checked, so that a repeated picture is opened once.

    `resolve_all` is what to call. Pictures behind a URI are read ahead by a few threads, since each takes its time.
    """

    def __init__(self, corpus: CorpusConfig) -> None:
        self._corpus = corpus
        self._known: set[bytes] = set()
        self._by_path: dict[str, bytes] = {}
        self.paths: set[str] = set()
        """Every path that was looked at, found or not."""
        self._fresh: dict[str, bytes] = {}
        self._ahead: dict[str, bytes | RejectedRow] = {}

    def resolve_all(self, found: Iterable[Record | Reject]) -> Iterator[Resolved | Reject]:
        """Every row in order, resolved or refused. Take all that comes: what was yielded counts as used."""
        rows = iter(found)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            while chunk := list(itertools.islice(rows, READ_AHEAD_ROWS)):
                self._read_ahead(chunk, pool)
                for row in chunk:
                    yield self._resolve_or_refuse(row)

    def _resolve_or_refuse(self, row: Record | Reject) -> Resolved | Reject:
        if isinstance(row, Reject):
            return row
        try:
            resolved = self.resolve(row)
        except RejectedRow as error:
            return Reject(row.source, row.row, STAGE, error.reason)
        self._accept(resolved)
        return resolved

    def _read_ahead(self, chunk: list[Record | Reject], pool: ThreadPoolExecutor) -> None:
        sides = (side for row in chunk if isinstance(row, Record) for side in row.sides())
        paths = {side.image for side in sides if isinstance(side.image, str) and is_remote(side.image)}
        wanted = sorted(paths - self._by_path.keys())
        self._ahead = dict(zip(wanted, pool.map(self._read, wanted), strict=True))

    def _read(self, path: str) -> bytes | RejectedRow:
        try:
            return read_picture(path, self._corpus.image.max_source_bytes)
        except RejectedRow as error:
            return error

    def resolve(self, record: Record) -> Resolved:
        """The entries of a record.

        Raises:
            RejectedRow: text past the limit or no Unicode, misplaced image markers, a picture that is missing or
                broken, a negative that is one of the row's own positives, or a candidate list without any of them.
        """
        self._fresh = {}
        if record.item is not None:
            return Resolved(record, item=self._entry(record.item, "item"))
        resolved = Resolved(
            record,
            query=None if record.query is None else self._entry(record.query, "query"),
            positives=self._side_entries(record.positives, "positive"),
            negatives=self._side_entries(record.negatives, "negative"),
        )
        if record.candidates is not None:
            resolved = replace(resolved, candidates=self._side_entries(record.candidates, "candidate"))
        positives = {entry.item_id for entry in resolved.positives}
        if resolved.candidates is not None and not any(one.item_id in positives for one in resolved.candidates):
            raise RejectedRow(
                f"the candidate list lacks its gold: none of its {len(resolved.candidates)} entries is a positive of "
                "the row"
            )
        for position, negative in enumerate(resolved.negatives, 1):
            if negative.item_id in positives:
                raise RejectedRow(f"negative {position} is the row's own positive")
        return resolved

    def _accept(self, resolved: Resolved) -> None:
        """Remember the pictures of a row that is used: their bytes will not be handed out again."""
        self._known.update(entry.picture.image_id for entry in resolved.entries() if entry.picture is not None)
        self._by_path |= self._fresh

    def _side_entries(self, sides: tuple[Side, ...], what: str) -> tuple[Entry, ...]:
        if len(sides) == 1:
            return (self._entry(sides[0], what),)
        return tuple(self._entry(side, f"{what} {position}") for position, side in enumerate(sides, 1))

    def _entry(self, side: Side, what: str) -> Entry:
        limit = self._corpus.max_text_chars
        for text in (side.instruction, side.text):
            if text is not None and len(text) > limit:
                raise RejectedRow(f"{what}: text has {len(text)} characters; corpus.max_text_chars is {limit}")
        try:
            picture = None if side.image is None else self._picture(side.image)
            rendered = render(side.text, picture is not None, side.instruction)
            identifier = item_id(rendered, picture.image_id if picture is not None else None)
        except RejectedRow as error:
            raise RejectedRow(f"{what}: {error.reason}") from error
        except UnicodeEncodeError as error:
            raise RejectedRow(f"{what}: text holds half a surrogate pair at character {error.start}") from error
        except ValueError as error:
            raise RejectedRow(f"{what}: {error}") from error
        return Entry(identifier, rendered, side.instruction, side.text, picture)

    def _picture(self, image: bytes | str) -> Picture:
        policy = self._corpus.image
        if isinstance(image, str):
            self.paths.add(image)
            if image in self._by_path:
                return Picture(self._by_path[image])
            ahead = self._ahead.get(image)
            if isinstance(ahead, RejectedRow):
                raise ahead
            data = ahead if ahead is not None else read_picture(image, policy.max_source_bytes)
        else:
            data = image
        identifier = image_id(data)
        if isinstance(image, str):
            self._fresh[image] = identifier
        if identifier in self._known:
            return Picture(identifier)
        try:
            width, height = check_image(data, policy)
            stored = store_bytes(data, policy)
        except RejectedRow as error:
            place = f" ({image})" if isinstance(image, str) else ""
            raise RejectedRow(f"{error.reason}{place}") from error
        return Picture(identifier, stored, width, height)
