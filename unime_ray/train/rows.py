"""Rows of tokens with a shared beginning: the layout in which the tiny model is trained.

A row is a prefix and several branches. A branch sees the prefix and itself, not its sisters, so a query is computed
once for all its candidates and a picture once for its embedding and its caption; each branch gives exactly what
prefix + branch would give alone (a test holds that). Positions are M-RoPE's.

Shapes: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_SIDE = 4  # image tokens per side: 64 pixels / 8-pixel patches / 2x2 merge
MASKED = -30000.0
"""Added to attention scores where a token may not look; finite in bfloat16 and float32."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some tokens with their M-RoPE positions (3, n) relative to the chunk's start, and how far they advance it."""

    ids: np.ndarray
    positions: np.ndarray
    advance: int


def text_chunk(ids: Sequence[int]) -> Chunk:
    """Text advances all three position axes by one a token."""
    count = len(ids)
    return Chunk(np.asarray(ids, np.int64), np.broadcast_to(np.arange(count), (3, count)), count)


def image_chunk(start_id: int, end_id: int, first_image_id: int) -> Chunk:
    """`<|vision_start|>`, 16 image tokens with ids counting up from `first_image_id`, `<|vision_end|>`."""
    count = _SIDE * _SIDE
    rows, columns = np.divmod(np.arange(count), _SIDE)
    grid = np.stack([np.ones(count, np.int64), 1 + rows, 1 + columns])
    positions = np.concatenate([np.zeros((3, 1), np.int64), grid, np.full((3, 1), 1 + _SIDE)], axis=1)
    ids = np.concatenate([[start_id], np.arange(first_image_id, first_image_id + count), [end_id]])
    return Chunk(ids, positions, 2 + _SIDE)


def join(*chunks: Chunk) -> Chunk:
    """The chunks one after the other."""
    starts = np.cumsum([0] + [chunk.advance for chunk in chunks])
    positions = [chunk.positions + start for chunk, start in zip(chunks, starts[:-1], strict=True)]
    return Chunk(np.concatenate([chunk.ids for chunk in chunks]), np.concatenate(positions, axis=1), int(starts[-1]))


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a branch lies: row, first column, and the column after its last token."""

    row: int
    start: int
    end: int


class Rows:
    """Collects rows; `tensors` lays them out."""

    def __init__(self) -> None:
        self._rows: list[list[tuple[int, Chunk, int]]] = []  # (branch, chunk, position offset)
        self._used: list[int] = []

    def add(self, prefix: Chunk | None, branches: Sequence[Chunk]) -> list[Placed]:
        """One row; gives where each branch was laid."""
        row = [] if prefix is None else [(0, prefix, 0)]
        column, offset = (0, 0) if prefix is None else (len(prefix.ids), prefix.advance)
        placed = []
        for number, branch in enumerate(branches, start=1):
            row.append((number, branch, offset))
            placed.append(Placed(len(self._rows), column, column + len(branch.ids)))
            column += len(branch.ids)
        self._rows.append(row)
        self._used.append(column)
        return placed

    def add_packed(self, chunks: Sequence[Chunk], limit: int) -> list[Placed]:
        """Independent texts, as many to a row as fit into `limit` tokens, in the given order."""
        placed: list[Placed] = []
        start, used = 0, 0
        for index, chunk in enumerate(chunks):
            if used + len(chunk.ids) > limit and index > start:
                placed += self.add(None, chunks[start:index])
                start, used = index, 0
            used += len(chunk.ids)
        return placed + self.add(None, chunks[start:]) if chunks[start:] else placed

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids (B, T), branch (B, T; -1 is padding) and positions (3, B, T)."""
        shape = (len(self._rows), max(self._used))
        ids, branch = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        positions = np.zeros((3, *shape), np.int64)
        for number, row in enumerate(self._rows):
            column = 0
            for which, chunk, offset in row:
                span = slice(column, column + len(chunk.ids))
                ids[number, span], branch[number, span] = chunk.ids, which
                positions[:, number, span] = chunk.positions + offset
                column = span.stop
        return torch.from_numpy(ids), torch.from_numpy(branch), torch.from_numpy(positions)

    @property
    def width(self) -> int:
        """T: tokens of the longest row; 0 if there is none."""
        return max(self._used, default=0)


def attention_bias(branch_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T): 0 where the row's token may look (earlier, and in the prefix or in its own branch)."""
    keys, queries = branch_BT[:, None, :], branch_BT[:, :, None]
    tokens = branch_BT.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    allowed = causal & ((keys == 0) | (keys == queries))
    bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, MASKED)
    return bias.unsqueeze(1)
