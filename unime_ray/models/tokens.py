"""Text and pictures as token ids with M-RoPE positions, in segments that can be laid end to end.

A segment's positions start at 0 and say where what follows it starts, so a prefix and its many suffixes are
tokenised apart and give the same ids and positions whether they run together or share the prefix's keys and values.
Text of users never becomes a special token: `<|im_end|>` in a caption stays ordinary text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unime_ray.errors import ModelError, RejectedRow
from unime_ray.models.pixels import Picture
from unime_ray.prompts import IMAGE_MARKER, NO, YES

MAX_CACHED_TEXTS = 50_000
MAX_CACHED_CHARS = 1000
CONTENT_SENTINEL = "@@content@@"


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """T tokens: `ids` (T,) int64, `positions` (3, T) int64 from 0, `span` positions taken, `pictures` in order."""

    ids: np.ndarray
    positions: np.ndarray
    span: int
    pictures: tuple[Picture, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def join(segments: Sequence[Segment]) -> Segment:
    """Segments laid end to end as one."""
    offsets = np.cumsum([0, *(segment.span for segment in segments)])
    return Segment(
        np.concatenate([segment.ids for segment in segments]),
        np.concatenate(
            [segment.positions + offset for segment, offset in zip(segments, offsets[:-1], strict=True)], axis=1
        ),
        int(offsets[-1]),
        tuple(picture for segment in segments for picture in segment.pictures),
    )


class PromptTokenizer:
    """A checkpoint's tokenizer, seen as a maker of segments."""

    def __init__(self, tokenizer: Any, image_token_id: int, vision_ids: tuple[int, int], merge: int, name: str) -> None:
        """`vision_ids` open and close a picture; `merge` is the vision tower's spatial merge size.

        Raises:
            ModelError: the tokenizer does not know the image token.
        """
        self.tokenizer, self.name, self.merge = tokenizer, name, merge
        self.image_token_id, self.vision_ids = image_token_id, vision_ids
        size = len(tokenizer)
        if any(token is None or not 0 <= token < size for token in (image_token_id, *vision_ids)):
            raise ModelError(f"model {name}: its tokenizer ({size} tokens) has no image token; it cannot take pictures")
        self._texts: dict[tuple[str, bool], Segment] = {}
        self._grids: dict[tuple[int, int], Segment] = {}

    def encode_text(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; special tokens written in it count as such only if `special`."""
        return self.text(text, special).ids.tolist()

    def text(self, text: str, special: bool = False) -> Segment:
        """A segment without pictures."""
        found = self._texts.get((text, special))
        if found is None:
            encoded = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)
            found = text_segment(np.asarray(encoded, dtype=np.int64))
            if len(self._texts) >= MAX_CACHED_TEXTS:
                self._texts.clear()
            if len(text) <= MAX_CACHED_CHARS:
                self._texts[text, special] = found
        return found

    def picture(self, picture: Picture) -> Segment:
        """vision_start, one image token per merged patch, vision_end, with the three-axis positions of M-RoPE."""
        layout = self._grids.get(picture.grid)
        if layout is None:
            layout = self._grids.setdefault(picture.grid, self._layout(picture.grid))
        return Segment(layout.ids, layout.positions, layout.span, (picture,))

    def rendered(self, text: str, pictures: Sequence[Picture]) -> Segment:
        """A text with a picture at each marker.

        Raises:
            RejectedRow: as many markers as pictures are needed.
        """
        parts = text.split(IMAGE_MARKER)
        if len(parts) != len(pictures) + 1:
            raise RejectedRow(
                f"the text has {len(parts) - 1} image markers {IMAGE_MARKER} for {len(pictures)} pictures"
            )
        if not pictures:
            return self.text(text)
        segments = [self.text(parts[0])] if parts[0] else []
        for picture, after in zip(pictures, parts[1:], strict=True):
            segments.append(self.picture(picture))
            if after:
                segments.append(self.text(after))
        return join(segments)

    def chat_wrap(self, system: str | None = None) -> tuple[str, str]:
        """What the chat template puts before and after a user's turn, up to where the answer starts.

        With `system`, a system turn of that text comes first.

        Raises:
            ModelError: the tokenizer has no chat template, or one that does not carry the user's text (or `system`).
        """
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"model {self.name} has no chat template: a judge or reranker needs one (chat_template.jinja)"
            )
        turns = [{"role": "system", "content": system}] if system is not None else []
        turns.append({"role": "user", "content": CONTENT_SENTINEL})
        whole = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before, found, after = whole.partition(CONTENT_SENTINEL)
        if not found:
            raise ModelError(f"model {self.name}: its chat template drops the user's text")
        if system is not None and system not in before:
            raise ModelError(f"model {self.name}: its chat template drops the system turn that the prompt needs")
        return before, after

    def answer_ids(self, answers: Sequence[str] = (YES, NO)) -> list[int]:
        """The single token of each answer.

        Raises:
            ModelError: the tokenizer splits an answer, so it cannot be read off one position.
        """
        found = []
        for answer in answers:
            tokens = self.encode_text(answer)
            if len(tokens) != 1 or tokens[0] == self.tokenizer.unk_token_id:
                raise ModelError(f"model {self.name}: {answer!r} is not a single token, but {len(tokens)}")
            found.append(tokens[0])
        return found

    def _layout(self, grid: tuple[int, int]) -> Segment:
        rows, columns = grid[0] // self.merge, grid[1] // self.merge
        start, end = self.vision_ids
        ids = np.array([start, *[self.image_token_id] * (rows * columns), end], dtype=np.int64)
        positions = np.ones((3, len(ids)), dtype=np.int64)
        positions[:, 0] = 0
        positions[1, 1:-1] += np.repeat(np.arange(rows), columns)
        positions[2, 1:-1] += np.tile(np.arange(columns), rows)
        positions[:, -1] = 1 + max(rows, columns)
        return Segment(ids, positions, 2 + max(rows, columns))


def text_segment(ids: np.ndarray) -> Segment:
    """A segment of plain tokens: all three axes count along."""
    return Segment(ids, np.broadcast_to(np.arange(len(ids)), (3, len(ids))), len(ids))
