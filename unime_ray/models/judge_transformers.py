"""A vision-language model as judge: one prefill per query, its candidates run against it, two logits read.

A query's tokens, its picture's included, are computed once for all its candidates; the opening of the prompt, once for
all queries. Small groups share a forward pass, large ones are cut, both to `batch_tokens`. Results equal scoring each
pair alone up to rounding, whatever the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unime_ray.errors import RejectedRow
from unime_ray.models.attention import Prefix
from unime_ray.models.backbone import Backbone
from unime_ray.models.embedder import token_budget_batches
from unime_ray.models.families import check_judge
from unime_ray.models.items import Item
from unime_ray.models.judge import Group, Usage, Verdict
from unime_ray.models.pixels import Picture
from unime_ray.models.prompt_ids import UNIME_V2, PromptIds, check_length, strip_start
from unime_ray.models.shared_prefix import extend, prefill
from unime_ray.models.tokens import Segment, join, text_segment
from unime_ray.prompts import JudgePrompt

DEFAULT_BATCH_TOKENS = 16384
Place = tuple[int, int]
"""(group, candidate): where a verdict goes."""
Build = Callable[[str, Sequence[Picture]], Segment]


@dataclass
class Bundle:
    """One shared prefix with its suffixes, longest first, and where their verdicts go."""

    prefix: Segment
    suffixes: list[Segment] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    def sort(self) -> None:
        order = sorted(range(len(self.suffixes)), key=lambda row: -len(self.suffixes[row]))
        self.suffixes = [self.suffixes[row] for row in order]
        self.places = [self.places[row] for row in order]


class TransformersJudge:
    """The transformers engine of the judge protocol."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        prompt_order: str = "query_first",
        repetition_penalty: float = 1.0,
        share_prefix: bool = True,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        prompt: JudgePrompt = UNIME_V2,
    ) -> None:
        """`repetition_penalty` as the logits processors of transformers and vLLM apply it: the prompt has both answers.

        Raises:
            ModelError: a model that only embeds, no chat template, or Yes, No are not single tokens.
        """
        check_judge(backbone.family, backbone.tokens.name)
        self.backbone, self.batch_tokens = backbone, backbone.batch_budget(batch_tokens)
        self.repetition_penalty = repetition_penalty
        self.prompts = PromptIds(backbone.tokens, prompt_order, prompt)
        self.shares_prefix = share_prefix and backbone.can_share_prefix
        """False: each pair runs whole, because it was asked for or the checkpoint's attention slides."""
        self._static: Prefix | None = None
        self.usage = Usage()

    def score(self, query: Item, candidates: Sequence[Item]) -> list[Verdict]:
        return self.score_groups([(query, candidates)])[0]

    @torch.no_grad()
    def score_groups(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        verdicts: list[list[Verdict]] = [[Verdict.failed("not scored")] * len(candidates) for _, candidates in groups]
        bundles = self._bundles(groups, verdicts)
        already = self.backbone.pictures_encoded
        scored = self._score_shared(bundles) if self.shares_prefix else self._score_alone(bundles)
        for places, hidden in scored:
            pairs = self._penalised(self.backbone.answer_logits(hidden, [self.prompts.yes_id, self.prompts.no_id]))
            for (group, candidate), (yes, no) in zip(places, pairs.tolist(), strict=True):
                verdicts[group][candidate] = Verdict.of(yes, no)
        self._count(bundles, self.backbone.pictures_encoded - already)
        return verdicts

    def _count(self, bundles: list[Bundle], pictures_encoded: int) -> None:
        used, opening = self.usage, len(self.prompts.static)
        for bundle in bundles:
            pairs, suffixes = len(bundle.suffixes), sum(len(suffix) for suffix in bundle.suffixes)
            whole = pairs * len(bundle.prefix) + suffixes
            used.pairs += pairs
            used.prompt_tokens += whole
            # Every prefix opens alike and that opening is computed once for all.
            used.computed_tokens += len(bundle.prefix) - opening + suffixes if self.shares_prefix else whole
            used.pictures += pairs * len(bundle.prefix.pictures) + sum(len(one.pictures) for one in bundle.suffixes)
        used.pictures_encoded += pictures_encoded

    def _bundles(self, groups: Sequence[Group], verdicts: list[list[Verdict]]) -> list[Bundle]:
        """Pairs by the item that opens their prompt; a pair that cannot be scored gets its verdict here."""
        pictures = self._pictures(groups)
        prefixes: dict[bytes, Bundle | RejectedRow] = {}
        suffixes: dict[bytes, Segment | RejectedRow] = {}
        query_first = self.prompts.prompt_order == "query_first"
        for group, (query, candidates) in enumerate(groups):
            for place, candidate in enumerate(candidates):
                shared, other = (query, candidate) if query_first else (candidate, query)
                if shared.item_id not in prefixes:
                    made = _attempt(self.prompts.judge_prefix, shared, pictures)
                    prefixes[shared.item_id] = made if isinstance(made, RejectedRow) else Bundle(made)
                if other.item_id not in suffixes:
                    suffixes[other.item_id] = _attempt(self.prompts.judge_suffix, other, pictures)
                reason = self._add(prefixes[shared.item_id], suffixes[other.item_id], (group, place))
                if reason is not None:
                    verdicts[group][place] = Verdict.failed(reason.reason)
        found = [bundle for bundle in prefixes.values() if isinstance(bundle, Bundle) and bundle.suffixes]
        for bundle in found:
            bundle.sort()
        return found

    def _add(self, bundle: Bundle | RejectedRow, suffix: Segment | RejectedRow, place: Place) -> RejectedRow | None:
        if isinstance(bundle, RejectedRow):
            return bundle
        if isinstance(suffix, RejectedRow):
            return suffix
        too_long = check_length([len(bundle.prefix), len(suffix)], self.backbone.max_tokens)
        if too_long is None:
            bundle.suffixes.append(suffix)
            bundle.places.append(place)
        return too_long

    def _pictures(self, groups: Sequence[Group]) -> dict[bytes, Picture | RejectedRow | None]:
        items = {item.item_id: item for query, candidates in groups for item in (query, *candidates)}
        return dict(zip(items, self.backbone.pictures(list(items.values())), strict=True))

    def _score_shared(self, bundles: list[Bundle]) -> Iterator[tuple[list[Place], Tensor]]:
        filler = text_segment(self.prompts.static[:1])
        for together in _together(bundles, self.batch_tokens):
            prefix = self._prefill([bundle.prefix for bundle in together])
            for start, stop in _columns(together, self.batch_tokens):
                rows = [_padded(bundle.suffixes[start:stop], stop - start, filler) for bundle in together]
                hidden = extend(self.backbone, prefix, rows).view(len(together), stop - start, -1)
                places = [place for bundle in together for place in bundle.places[start:stop]]
                kept = [hidden[row, : len(bundle.places[start:stop])] for row, bundle in enumerate(together)]
                yield places, torch.cat(kept)

    def _prefill(self, prefixes: list[Segment]) -> Prefix:
        """Prefixes in one pass, behind the opening all prompts share if these do."""
        tails = [strip_start(prefix, self.prompts.static) for prefix in prefixes]
        known = [tail for tail in tails if tail is not None]
        if len(known) < len(prefixes) or not len(self.prompts.static):
            return prefill(self.backbone, prefixes)
        if self._static is None:
            self._static = prefill(self.backbone, [text_segment(self.prompts.static)])
        return prefill(self.backbone, known, self._static)

    def _score_alone(self, bundles: list[Bundle]) -> Iterator[tuple[list[Place], Tensor]]:
        rows = [
            (place, join([bundle.prefix, suffix]))
            for bundle in bundles
            for place, suffix in zip(bundle.places, bundle.suffixes, strict=True)
        ]
        lengths = {index: len(segment) for index, (_, segment) in enumerate(rows)}
        for batch in token_budget_batches(lengths, self.batch_tokens):
            hidden = self.backbone.forward_hidden(self.backbone.collate([rows[index][1] for index in batch]))
            yield [rows[index][0] for index in batch], hidden

    def _penalised(self, logits: Tensor) -> Tensor:
        penalty = self.repetition_penalty
        return torch.where(logits > 0, logits / penalty, logits * penalty)


def _attempt(build: Build, item: Item, pictures: dict[bytes, Picture | RejectedRow | None]) -> Segment | RejectedRow:
    picture = pictures[item.item_id]
    if isinstance(picture, RejectedRow):
        return picture
    try:
        return build(item.rendered, [] if picture is None else [picture])
    except RejectedRow as reason:
        return reason


def _together(bundles: list[Bundle], budget: int) -> Iterator[list[Bundle]]:
    """Bundles to run in one pass: of similar size, all their suffixes within `budget` padded tokens; or one alone."""
    pending: list[Bundle] = []
    for bundle in sorted(bundles, key=lambda b: (-len(b.suffixes), -len(b.suffixes[0]), -len(b.prefix))):
        grown = [*pending, bundle]
        count, length = len(grown[0].suffixes), max(len(b.suffixes[0]) for b in grown)
        uneven = 2 * len(bundle.suffixes) < count
        if pending and (uneven or len(grown) * count * length > budget):
            yield pending
            grown = [bundle]
        pending = grown
    if pending:
        yield pending


def _columns(together: list[Bundle], budget: int) -> Iterator[tuple[int, int]]:
    """Cuts of the suffix lists (longest first), each within `budget` padded tokens or one suffix wide."""
    count, start = max(len(bundle.suffixes) for bundle in together), 0
    while start < count:
        longest = max(len(bundle.suffixes[start]) for bundle in together if start < len(bundle.suffixes))
        stop = min(count, start + max(1, budget // (longest * len(together))))
        yield start, stop
        start = stop


def _padded(suffixes: list[Segment], width: int, filler: Segment) -> list[Segment]:
    return [*suffixes, *[filler] * (width - len(suffixes))]
