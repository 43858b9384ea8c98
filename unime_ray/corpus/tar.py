"""A tar archive as samples: consecutive members with the same key. Nothing is ever written to disk.

WebDataset's rule: `a/0001.jpg` and `a/0001.txt` are the members `jpg` and `txt` of sample `a/0001`; the key ends at the
first dot of the file's name. A member's name is only a name: it is never used as a path.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from unime_ray.corpus.files import open_file
from unime_ray.errors import RejectedRow

BLOCK = 512
BUFFER_BYTES = 2**20
MAX_HEADER_BYTES = 2**20
"""Of a long name or of extended attributes, which tarfile reads whole."""
MAX_MEMBERS = 1000
MAX_SAMPLE_BYTES = 2**28


@dataclass
class Sample:
    """The members of one key by extension, as (offset, bytes); `start` and `stop` are where it lies in the archive."""

    key: str
    start: int
    stop: int
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    problem: str | None = None
    """Why the sample cannot be used."""


class _Headers:
    """What tarfile sees of the stream: no more than `MAX_HEADER_BYTES` at once, and no place before its start."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream, self.tell = stream, stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._stream.read(size)

    def seek(self, place: int) -> int:
        if not 0 <= place < 2**63:
            raise tarfile.ReadError(f"a member that ends at byte {place}")
        return self._stream.seek(place)


class Archive:
    """An open archive. Members are found by their headers; contents are read when asked for."""

    def __init__(self, file: str) -> None:
        source = open_file(file)
        self.size: int = source.size()
        self._stream = io.BufferedReader(source, BUFFER_BYTES)  # type: ignore[type-var]

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, sample: Sample, extension: str) -> bytes:
        """One member of a sample, whole."""
        offset, size = sample.members[extension]
        self._stream.seek(offset)
        return self._stream.read(size)

    def samples(self, start: int = 0) -> Iterator[Sample]:
        """The samples from byte `start` on, in order; an archive that breaks off ends with one that has a `problem`."""
        current: Sample | None = None
        for found in self._members(start):
            if isinstance(found, Sample):  # the archive cannot be read beyond this point
                if current is not None:
                    yield current
                yield found
                return
            key, extension = _split(found.name)
            if current is not None and key != current.key:
                yield current
                current = None
            current = current or Sample(key, found.offset, found.offset)
            current.stop = found.offset_data + -(-found.size // BLOCK) * BLOCK
            self._add(current, found, extension)
        if current is not None:
            yield current

    def _members(self, start: int) -> Iterator[tarfile.TarInfo | Sample]:
        """Every member that is no folder and not hidden; a broken header gives a sample that says so."""
        end = start
        self._stream.seek(start)
        try:
            with tarfile.open(name="", fileobj=_Headers(self._stream), mode="r:") as archive:  # type: ignore[call-overload]
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined] # it would keep every header it has seen
                    if member.size < 0 or archive.offset <= end:  # it would go round in a circle
                        raise tarfile.ReadError(f"member {member.name!r} has {member.size} bytes")
                    end = archive.offset
                    if not member.isdir() and not member.name.rpartition("/")[2].startswith("."):
                        yield member
                    if end >= self.size:
                        return
                end = archive.offset
        except (tarfile.TarError, ValueError, RecursionError) as error:
            if start == self.size and not start:
                return
            yield Sample("", end, self.size, problem=f"no readable tar header at byte {end}: {error}")
            return
        self._stream.seek(end)
        if self._stream.read(BLOCK).strip(b"\0"):  # tarfile takes a broken header for the end
            yield Sample("", end, self.size, problem=f"no readable tar header at byte {end}: is the archive cut short?")

    def _add(self, sample: Sample, member: tarfile.TarInfo, extension: str) -> None:
        problem = None
        if not member.isreg() or member.issparse():
            problem = f"member {member.name!r} is a link, device or sparse file"
        elif member.offset_data + member.size > self.size:
            problem = f"member {member.name!r} is cut short: the archive ends within it"
        elif extension in sample.members:
            problem = f"member {member.name!r} is there twice"
        elif len(sample.members) == MAX_MEMBERS:
            problem = f"more than {MAX_MEMBERS} members"
        elif sum(size for _, size in sample.members.values()) + member.size > MAX_SAMPLE_BYTES:
            problem = f"the members are larger than {MAX_SAMPLE_BYTES} bytes"
        else:
            sample.members[extension] = member.offset_data, member.size
        sample.problem = sample.problem or problem


def member_of(sample: Sample, extension: str) -> str:
    """`extension` if the sample has such a member.

    Raises:
        RejectedRow: it has not.
    """
    if extension not in sample.members:
        there = ", ".join(sorted(sample.members)[:8]) or "nothing"
        raise RejectedRow(f"sample {sample.key!r} has no member {extension[:80]!r}; it has {there}")
    return extension


def _split(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()
