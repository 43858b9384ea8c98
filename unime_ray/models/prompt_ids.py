"""The method's prompts as token ids: what judge, reranker and their training all read.

The user's turn of the chat template holds the published wording (`prompts`). Judge prompts are tokenised in two parts,
so that the ids are the same whether a prefix is shared or not. Listwise answers are the bare number: it is then the
very first token generated, and one forward pass ranks the list. (The published code answers `Ans: (k)`, which puts the
number third, to be found by decoding.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unime_ray import prompts
from unime_ray.errors import ModelError, RejectedRow
from unime_ray.models.pixels import Picture
from unime_ray.models.tokens import PromptTokenizer, Segment, join

MAX_LIST = 10
UNIME_V2 = prompts.judge_prompt()
PROBES = ("a", "1", "\n", '"')


class PromptIds:
    """Judge and listwise prompts of one checkpoint.

    Raises (on construction):
        ModelError: no chat template; an answer (Yes, No) or a digit is not a single token.
    """

    def __init__(
        self,
        tokens: PromptTokenizer,
        prompt_order: str = "query_first",
        judge_prompt: prompts.JudgePrompt = UNIME_V2,
    ) -> None:
        self.tokens, self.prompt_order, self.judge_prompt = tokens, prompt_order, judge_prompt
        before, after = tokens.chat_wrap()
        self._before, self._after = tokens.text(before, special=True), tokens.text(after, special=True)
        self._judge_before = self._before
        if judge_prompt.system is not None:
            self._judge_before = tokens.text(tokens.chat_wrap(judge_prompt.system)[0], special=True)
        self.yes_id, self.no_id = tokens.answer_ids((judge_prompt.yes, judge_prompt.no))
        self.labels = _list_labels(tokens)
        self.index_ids = tokens.answer_ids(self.labels)
        self.static = _common_start([self.judge_prefix(probe, []) for probe in PROBES])
        """The opening of every judge prompt, whatever the item."""

    def judge_prefix(self, rendered: str, pictures: Sequence[Picture]) -> Segment:
        """The part that pairs share: up to the candidate, or up to the query if `candidate_first`.

        Raises:
            RejectedRow: the text's image markers do not match `pictures`.
        """
        turn = self.judge_prompt.prefix(rendered, self.prompt_order)
        return join([self._judge_before, self.tokens.rendered(turn, pictures)])

    def judge_suffix(self, rendered: str, pictures: Sequence[Picture]) -> Segment:
        """The other item and the chat template's end, up to where the answer starts."""
        return join([self.tokens.rendered(self.judge_prompt.suffix(rendered), pictures), self._after])

    def build_judge_ids(
        self, query: str, candidate: str, pictures: tuple[Sequence[Picture], Sequence[Picture]]
    ) -> Segment:
        """A whole judge prompt. `query` and `candidate` are rendered texts, `pictures` those of each."""
        parts = [(query, pictures[0]), (candidate, pictures[1])]
        shared, other = parts if self.prompt_order == "query_first" else parts[::-1]
        return join([self.judge_prefix(*shared), self.judge_suffix(*other)])

    def build_listwise_ids(self, query: str, candidates: Sequence[str], pictures: Sequence[Picture]) -> Segment:
        """A whole listwise prompt of 1 to 10 rendered candidates; `pictures` in order, the query's first.

        Raises:
            ValueError: no candidate, or more than ten.
        """
        if not 1 <= len(candidates) <= MAX_LIST:
            raise ValueError(f"a listwise prompt holds 1 to {MAX_LIST} candidates, not {len(candidates)}")
        # zip stops at the shorter: a list uses the first labels only.
        shown = "".join(f"({label}) {text} " for label, text in zip(self.labels, candidates, strict=False))
        turn = self.tokens.rendered(prompts.listwise_prefix(query) + shown, pictures)
        return join([self._before, turn, self._after])


def strip_start(segment: Segment, start: np.ndarray) -> Segment | None:
    """`segment` without its opening tokens `start` (plain text), positions counted from 0; None if it has another."""
    length = len(start)
    if len(segment) <= length or not np.array_equal(segment.ids[:length], start):
        return None
    return Segment(
        segment.ids[length:], segment.positions[:, length:] - length, segment.span - length, segment.pictures
    )


def check_length(segment_lengths: Sequence[int], limit: int) -> RejectedRow | None:
    """The reason if a prompt of these parts is longer than the model's context."""
    total = sum(segment_lengths)
    return RejectedRow(f"prompt has {total} tokens; the model's context is {limit}") if total > limit else None


def _list_labels(tokens: PromptTokenizer) -> list[str]:
    """1 ... 10, each a single token; where 10 is two (Qwen writes digits one by one), the tenth is labelled 0."""
    labels = [str(position) for position in range(1, MAX_LIST + 1)]
    try:
        tokens.answer_ids(labels[-1:])
    except ModelError:
        labels[-1] = "0"
    return labels


def _common_start(segments: Sequence[Segment]) -> np.ndarray:
    shortest = min(len(segment) for segment in segments)
    alike = np.stack([segment.ids[:shortest] for segment in segments])
    same = (alike == alike[0]).all(axis=0)
    return alike[0, : shortest if same.all() else int(same.argmin())]
