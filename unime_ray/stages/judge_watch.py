"""What a judging actor leaves on disk while it works: which pairs it has in hand, and what it has done so far.

An actor writes a mark before it scores and removes it after. If its process dies, the mark stays, and whoever gets the
same queries next reads from it which pairs were in hand. What is suspected is then scored in smaller parts: a batch's
queries one by one, a query's pairs one by one. A pair that was in hand alone twice is given up: it crashes the engine.

    watch/hand-<actor>-<n>.json   {"queries": [hex, ...], "candidate": hex or null, "loading": bool}
    watch/done-<actor>.json       counters
"""

from __future__ import annotations

import json
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow.fs as pafs

from unime_ray.artifacts import filesystem, join, read_text, remove, write_text
from unime_ray.errors import ModelError, UnimeError
from unime_ray.models.judge import Group
from unime_ray.stages.judge_known import Pair

CRASHES_OF_A_PAIR = 2
MAX_LOADING_DEATHS = 3
MAX_DEATHS = 20
"""Deaths over one batch; so many mean that it is not a few pairs that are wrong."""
POISON = "the engine died each of the 2 times it was given this pair alone"


@dataclass
class Evidence:
    """What earlier processes died over, as far as it concerns some queries."""

    loading: int = 0
    deaths: int = 0
    suspected: set[bytes] = field(default_factory=set)
    """Queries that were in hand together with others."""
    alone: set[bytes] = field(default_factory=set)
    """Queries that were in hand alone, or a pair of theirs was."""
    crashes: Counter[Pair] = field(default_factory=Counter)

    def add(self, mark: Mapping[str, object], queries: set[bytes]) -> None:
        in_hand = [bytes.fromhex(one) for one in mark["queries"]]  # type: ignore[attr-defined]
        mine = queries.intersection(in_hand)
        if not mine:
            return
        if mark["loading"]:
            self.loading += 1
            return
        self.deaths += 1
        if mark["candidate"] is not None:
            self.crashes[in_hand[0], bytes.fromhex(str(mark["candidate"]))] += 1
        if len(in_hand) == 1:
            self.alone |= mine
        else:
            self.suspected |= mine

    def check(self) -> None:
        """Raise ModelError if it is the judge, and not a few of its pairs, that is broken."""
        if self.loading >= MAX_LOADING_DEATHS:
            raise ModelError(
                f"{self.loading} processes died while they loaded the judge; see Ray's worker logs (out of memory?)"
            )
        if self.deaths >= MAX_DEATHS:
            raise ModelError(
                f"the judge's process died {self.deaths} times over one batch of queries; see Ray's worker logs"
            )

    def gives_up(self, pair: Pair) -> bool:
        """Whether this pair crashes the engine."""
        return self.crashes[pair] >= CRASHES_OF_A_PAIR

    def parts(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """The groups in parts to score one after the other: unsuspected ones together, given-up pairs left out."""
        calm = [group for group in groups if group[0].item_id not in self.suspected | self.alone]
        if calm:
            yield calm
        for query, candidates in groups:
            if query.item_id in self.alone:
                for one in candidates:
                    if not self.gives_up((query.item_id, one.item_id)):
                        yield [(query, [one])]
            elif query.item_id in self.suspected:
                yield [(query, candidates)]


class Watch:
    """Marks and counters of the actors of one artifact; `uri` is a folder in it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._actor, self._number = uuid.uuid4().hex, 0

    def __reduce__(self) -> tuple[type[Watch], tuple[str]]:
        return Watch, (self.uri,)  # each process is an actor of its own

    def evidence(self, queries: Sequence[bytes]) -> Evidence:
        """What processes that are gone left about these queries. A query is never in the hands of two actors."""
        found, mine = Evidence(), set(queries)
        for uri in self._files("hand-"):
            text = read_text(uri)
            if text is not None:  # else another actor has just finished
                found.add(json.loads(text), mine)
        return found

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Around one attempt at the whole work: what earlier ones left counts only where it can tell of pairs.

        Who died while loading says nothing of them. And where an attempt ends with a reason that the user is told, or
        at the user's wish, its marks go: the cause may be mended by the next. After a kill they stay.
        """
        fs, path = filesystem(self.uri)
        fs.create_dir(path, recursive=True)  # else an actor may list it just while another one makes it, which fails
        self._drop(lambda mark: bool(mark["loading"]))
        try:
            yield
        except (UnimeError, KeyboardInterrupt):
            self._drop(lambda mark: True)
            raise

    def _drop(self, which: Callable[[Mapping[str, object]], bool]) -> None:
        for uri in self._files("hand-"):
            if which(json.loads(read_text(uri) or '{"loading": true}')):
                remove(uri)

    def enter(self, groups: Sequence[Group], loading: bool = False) -> None:
        """These pairs are in hand from now on."""
        self._number += 1
        only = groups[0][1][0] if len(groups) == 1 and len(groups[0][1]) == 1 and not loading else None
        mark = {
            "queries": [query.item_id.hex() for query, _ in groups],
            "candidate": None if only is None else only.item_id.hex(),
            "loading": loading,
        }
        write_text(self._mark(), json.dumps(mark))

    def leave(self) -> None:
        """They are done."""
        remove(self._mark())

    def save(self, counters: Mapping[str, float]) -> None:
        """What this actor has done since it started."""
        write_text(join(self.uri, f"done-{self._actor}.json"), json.dumps(dict(counters)))

    def totals(self) -> dict[str, float]:
        """What all actors have done, those of earlier attempts included."""
        total: dict[str, float] = defaultdict(float)
        for uri in self._files("done-"):
            for name, amount in json.loads(read_text(uri) or "{}").items():
                total[name] += amount
        return dict(total)

    def clear(self) -> None:
        """Remove everything; for an artifact that has its manifest."""
        remove(self.uri)

    def _mark(self) -> str:
        return join(self.uri, f"hand-{self._actor}-{self._number}.json")

    def _files(self, start: str) -> list[str]:
        fs, path = filesystem(self.uri)
        infos = fs.get_file_info(pafs.FileSelector(path, recursive=False, allow_not_found=True))
        names = (info.base_name for info in infos)
        return [join(self.uri, name) for name in sorted(names) if name.startswith(start) and name.endswith(".json")]
