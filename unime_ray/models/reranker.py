"""Reorders a few retrieved candidates (UniME-V2-Reranker): one listwise prompt, or the judge's prompt per candidate.

Listwise, the logits of the index tokens at the first answer position rank the whole list in one forward pass: nothing
is decoded and no answer can fail to parse. (The published code generates `Ans: (k)` and moves only k to the front.)
A candidate that cannot be shown stays behind those that can; a query that cannot leaves the retrieval order as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from unime_ray.errors import RejectedRow
from unime_ray.models.backbone import Backbone
from unime_ray.models.embedder import token_budget_batches
from unime_ray.models.items import Item
from unime_ray.models.judge import Group
from unime_ray.models.judge_transformers import TransformersJudge
from unime_ray.models.pixels import Picture
from unime_ray.models.prompt_ids import MAX_LIST, check_length
from unime_ray.models.tokens import Segment

DEFAULT_BATCH_TOKENS = 8192
MODES = ("listwise", "pointwise")


class Reranker:
    """A checkpoint that answers listwise prompts with an index, and pairs with Yes or No.

    Raises (on construction):
        ModelError: no chat template; Yes, No or a digit is not a single token.
    """

    def __init__(self, backbone: Backbone, batch_tokens: int = DEFAULT_BATCH_TOKENS) -> None:
        self.backbone, self.batch_tokens = backbone, backbone.batch_budget(batch_tokens)
        self.judge = TransformersJudge(backbone, batch_tokens=batch_tokens)
        self.prompts = self.judge.prompts

    def listwise_logits(self, query: Item, candidates: Sequence[Item]) -> np.ndarray:
        """(k,) float32 logits of the index tokens, k <= 10; minus infinity for a candidate that cannot be shown.

        Raises:
            ValueError: more than ten candidates.
        """
        return self.listwise_groups([(query, candidates)])[0]

    @torch.no_grad()
    def listwise_groups(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """`listwise_logits` of many queries, batched by length."""
        for _, candidates in groups:
            if len(candidates) > MAX_LIST:
                raise ValueError(f"a listwise prompt holds at most {MAX_LIST} candidates, not {len(candidates)}")
        logits = [np.full(len(candidates), -np.inf, dtype=np.float32) for _, candidates in groups]
        made = self.build_listwise(groups)
        lengths = {row: len(segment) for row, (segment, _) in enumerate(made) if isinstance(segment, Segment)}
        for rows in token_budget_batches(lengths, self.batch_tokens):
            segments = [segment for segment, _ in (made[row] for row in rows) if isinstance(segment, Segment)]
            hidden = self.backbone.forward_hidden(self.backbone.collate(segments))
            values = self.backbone.answer_logits(hidden, self.prompts.index_ids).cpu().numpy()
            for row, found in zip(rows, values, strict=True):
                shown = made[row][1]
                logits[row][shown] = found[: len(shown)]
        return logits

    def build_listwise(self, groups: Sequence[Group]) -> list[tuple[Segment | RejectedRow, list[int]]]:
        """Each group's prompt, or the reason there is none, with the places of the candidates it shows."""
        items = {item.item_id: item for query, candidates in groups for item in (query, *candidates)}
        pictures = dict(zip(items, self.backbone.pictures(list(items.values())), strict=True))
        return [self._listwise(query, candidates, pictures) for query, candidates in groups]

    def pointwise_scores(self, query: Item, candidates: Sequence[Item]) -> np.ndarray:
        """(k,) float32 judge scores in [0, 1]; minus infinity for a pair that cannot be scored."""
        return self.pointwise_groups([(query, candidates)])[0]

    def pointwise_groups(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """`pointwise_scores` of many queries."""
        verdicts = self.judge.score_groups(groups)
        values = [[-np.inf if v.score is None else v.score for v in group] for group in verdicts]
        return [np.array(group, dtype=np.float32) for group in values]

    def rerank(self, query: Item, candidates: Sequence[Item], mode: str = "listwise") -> list[int]:
        """Places of `candidates` (given in retrieval order), best first. Ties keep the retrieval order.

        Listwise, candidates after the tenth keep their places.
        """
        return self.rerank_groups([(query, candidates)], mode)[0]

    def rerank_groups(self, groups: Sequence[Group], mode: str = "listwise") -> list[list[int]]:
        """`rerank` of many queries.

        Raises:
            ValueError: `mode` is neither `listwise` nor `pointwise`.
        """
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}: use one of {', '.join(MODES)}")
        if mode == "pointwise":
            return [best_first(values) for values in self.pointwise_groups(groups)]
        heads = [(query, candidates[:MAX_LIST]) for query, candidates in groups]
        return [
            best_first(values) + list(range(len(values), len(candidates)))
            for values, (_, candidates) in zip(self.listwise_groups(heads), groups, strict=True)
        ]

    def _listwise(
        self, query: Item, candidates: Sequence[Item], pictures: dict[bytes, Picture | RejectedRow | None]
    ) -> tuple[Segment | RejectedRow, list[int]]:
        asked = pictures[query.item_id]
        if isinstance(asked, RejectedRow):
            return asked, []
        shown = [k for k, item in enumerate(candidates) if not isinstance(pictures[item.item_id], RejectedRow)]
        if not shown:
            return RejectedRow("no candidate can be shown"), []
        found = [asked, *(pictures[candidates[place].item_id] for place in shown)]
        texts = [candidates[place].rendered for place in shown]
        try:
            segment = self.prompts.build_listwise_ids(
                query.rendered, texts, [picture for picture in found if isinstance(picture, Picture)]
            )
        except RejectedRow as reason:
            return reason, []
        return check_length([len(segment)], self.backbone.max_tokens) or segment, shown


def best_first(values: np.ndarray) -> list[int]:
    """Places by descending value; equal values keep their order."""
    return np.argsort(-values, kind="stable").tolist()
