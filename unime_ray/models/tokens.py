"""Text and pictures as token ids with M-RoPE positions, in segments that can be laid end to end.

A segment's positions start at 0 and say where what follows it starts, so a prefix and its many suffixes are
tokenised apart and give the same ids and positions whether they run together or share the prefix's keys and values.
Text of users never becomes a special token: `<|im_end|>` in a caption stays ordinary text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from unime_ray.errors import ModelError, RejectedRow
from unime_ray.models.pixels import Grid, Picture
from unime_ray.prompts import IMAGE_MARKER, NO, YES

MAX_CACHED_TEXTS = 50_000
MAX_CACHED_CHARS = 1000
CONTENT_SENTINEL = "@@content@@"


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """T tokens: `ids` (T,) int64, `positions` (3, T) int64 from 0, `span` positions taken, `pictures` in order.

    Families without M-RoPE count alike on all three axes and read the first.
    """

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

    def __init__(
        self,
        tokenizer: Any,
        image_token_id: int,
        layout: Callable[[PromptTokenizer, Grid], Segment],
        name: str,
        needed: Sequence[int | None] = (),
    ) -> None:
        """`layout` makes the tokens of a picture of some grid; `needed` are special tokens that the tokenizer has.

        Raises:
            ModelError: the tokenizer does not know the image token, or another that pictures need.
        """
        self.tokenizer, self.name, self.image_token_id = tokenizer, name, image_token_id
        if not set(needed) <= set(tokenizer.added_tokens_decoder):
            size = len(tokenizer)
            raise ModelError(f"model {name}: its tokenizer ({size} tokens) has no image token; it cannot take pictures")
        self._layout = layout
        self._texts: dict[tuple[str, bool], Segment] = {}
        self._grids: dict[Grid, Segment] = {}

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
        """The tokens that stand for a picture, its features to be put on those of `image_token_id`."""
        layout = self._grids.get(picture.grid)
        if layout is None:
            layout = self._grids.setdefault(picture.grid, self._layout(self, picture.grid))
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
        for as_parts in (False, True):  # some templates take a string, some a list of parts, some either
            before, found, after = self._fill_template(system, as_parts).partition(CONTENT_SENTINEL)
            if found:
                break
        else:
            raise ModelError(f"model {self.name}: its chat template drops the user's text")
        if system is not None and system not in before:
            raise ModelError(f"model {self.name}: its chat template drops the system turn that the prompt needs")
        return before, after

    def _fill_template(self, system: str | None, as_parts: bool) -> str:
        """The template around the sentinel; empty if it does not take what it is given."""
        turns = [("system", system)] if system is not None else []
        written = [
            {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}
            for role, text in [*turns, ("user", CONTENT_SENTINEL)]
        ]
        try:
            return self.tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError):
            return ""

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


def text_segment(ids: np.ndarray) -> Segment:
    """A segment of plain tokens: all three axes count along."""
    return Segment(ids, np.broadcast_to(np.arange(len(ids)), (3, len(ids))), len(ids))
