"""The losses of one pretraining step: captioning, contrast, Yes/No and listwise, over one pass of the vision tower.

Shapes: B rows, T tokens, Q queries, K candidates, D width, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2VLForConditionalGeneration

from unime_ray.train.pretrain_plan import BatchShape, Plan, Vocabulary
from unime_ray.train.rows import MASKED, Placed, attention_bias
from unime_ray.train.tiny_model import FastText, FastVision

# What fits the processor's caches: about 8 % faster than the whole batch at once.
PICTURES_AT_ONCE = 24
TOKENS_AT_ONCE = 1500


class Losses:
    """Runs a plan through the model. Gives the total loss, its parts, and the new embeddings of the concepts."""

    def __init__(self, model: Qwen2VLForConditionalGeneration, vocabulary: Vocabulary, dtype: torch.dtype) -> None:
        self.table = model.model.language_model.embed_tokens.weight
        self.vision, self.text = FastVision(model.model.visual), FastText(model.model.language_model)
        self.vocabulary, self.dtype = vocabulary, dtype

    def states(self, plan: Plan, patches: Tensor) -> dict[str, Tensor]:
        """Last hidden states (B, T, D) of each group of rows."""
        features = torch.cat([self.vision(part) for part in patches.to(self.dtype).split(PICTURES_AT_ONCE)])
        table = torch.cat([self.table.to(self.dtype), features.flatten(0, 1)])
        hidden = {}
        for name, rows in plan.groups.items():
            if not rows.width:
                continue
            ids, branch, positions = rows.tensors()
            cos, sin = self.text.rope(positions, self.dtype)
            embedded = functional.embedding(ids, table)
            layout = (embedded, cos, sin, attention_bias(branch, self.dtype))
            few = max(1, TOKENS_AT_ONCE // rows.width)
            hidden[name] = torch.cat([self.text(*part) for part in zip(*(t.split(few) for t in layout), strict=True)])
        return hidden

    def embeddings(self, plan: Plan, patches: Tensor) -> Tensor:
        """Unit vectors (C + 2C, D) of a plan's texts and pictures as candidates."""
        return self._ends(self.states(plan, patches), plan.candidate_ends)

    def __call__(self, plan: Plan, patches: Tensor, shape: BatchShape) -> tuple[Tensor, dict[str, float], Tensor]:
        hidden = self.states(plan, patches)
        captions = [
            (group, column, place.row) for group, place, _ in plan.captions for column in range(place.start, place.end)
        ]
        targets = torch.from_numpy(np.concatenate([target for _, _, target in plan.captions]))
        caption = functional.cross_entropy(self._logits(_read(hidden, captions)), targets)
        queries, candidates = self._ends(hidden, plan.query_ends), self._ends(hidden, plan.candidate_ends)
        contrast = contrastive_loss(queries, candidates, plan.of_picture, shape.temperature)
        judge, order, accuracy = self._judge(hidden, plan)
        parts = {"caption": caption, "contrast": contrast, "judge": judge, "order": order}
        if plan.choices:
            spots = [(group, place.end - 1, place.row) for group, place, _ in plan.choices]
            answers = torch.tensor([answer for _, _, answer in plan.choices])
            parts["listwise"] = functional.cross_entropy(self._logits(_read(hidden, spots)), answers)
        total = sum((shape.weights[name] * loss for name, loss in parts.items()), torch.zeros(()))
        numbers = {name: float(loss.detach()) for name, loss in parts.items()} | {"judge_accuracy": accuracy}
        return total, numbers, candidates.detach()

    def _logits(self, states: Tensor) -> Tensor:
        return functional.linear(states, self.table.to(self.dtype)).float()

    def _ends(self, hidden: dict[str, Tensor], ends: list[tuple[str, Placed]]) -> Tensor:
        states = _read(hidden, [(group, place.end - 1, place.row) for group, place in ends])
        return functional.normalize(states.float(), dim=-1)

    def _judge(self, hidden: dict[str, Tensor], plan: Plan) -> tuple[Tensor, Tensor, float]:
        """Three numbers over the Yes/No lists, each list of the same weight.

        Cross-entropy over the whole vocabulary at the first answer token; how well the difference of the Yes and No
        logits orders a list (`order_loss`); and the share of right answers.
        """
        spots = [(group, place.end - 1, place.row) for group, place, _, _ in plan.verdicts]
        labels = torch.tensor([label for _, _, label, _ in plan.verdicts])
        weights = torch.tensor([weight for *_, weight in plan.verdicts])
        logits = self._logits(_read(hidden, spots))
        answers = torch.where(labels, self.vocabulary.yes, self.vocabulary.no)
        losses = functional.cross_entropy(logits, answers, reduction="none")
        margin = logits[:, self.vocabulary.yes] - logits[:, self.vocabulary.no]
        right = ((margin > 0) == labels).float()
        order = order_loss(margin, labels, [(group, row) for group, _, row in spots])
        return (losses * weights).sum() / weights.sum(), order, float((right * weights).sum() / weights.sum())


def order_loss(margin: Tensor, labels: Tensor, lists: list[tuple[str, int]]) -> Tensor:
    """-log softmax of each right candidate against the wrong ones of its list, meaned; all of shape (P,), P pairs.

    A Yes or No is judged alone, so it says little about which of two near misses is nearer; this does.
    """
    number = {key: index for index, key in enumerate(dict.fromkeys(lists))}
    of_list = torch.tensor([number[key] for key in lists])
    outside = of_list[:, None] != of_list[None, :]
    wrong = margin[None, :].masked_fill(outside | labels[None, :], MASKED).logsumexp(1)
    return functional.softplus(wrong - margin)[labels].mean()


def _read(hidden: dict[str, Tensor], spots: list[tuple[str, int, int]]) -> Tensor:
    """States (n, D) at (group, column, row), in the order asked for."""
    found: Tensor | None = None
    for name, states in hidden.items():
        chosen = [index for index, spot in enumerate(spots) if spot[0] == name]
        if not chosen:
            continue
        flat = torch.tensor([spots[index][2] * states.shape[1] + spots[index][1] for index in chosen])
        part = states.flatten(0, 1)[flat]
        if len(chosen) == len(spots):
            return part
        base = states.new_zeros(len(spots), states.shape[-1]) if found is None else found
        found = base.index_put((torch.tensor(chosen),), part)
    assert found is not None
    return found


def contrastive_loss(queries: Tensor, candidates: Tensor, of_picture: np.ndarray, temperature: float) -> Tensor:
    """InfoNCE both ways over texts and pictures together, one term a positive pair.

    Queries and candidates (C + 2C, D) hold a text per concept, then the pictures. Positives: the same concept in the
    other modality or by the other artist. A text query and its own name, a picture and itself, count as neither; other
    positives of a query are left out of its denominator.
    """
    concepts = len(queries) - len(of_picture)
    owner = torch.from_numpy(np.concatenate([np.arange(concepts), of_picture]))
    same = owner[:, None] == owner[None, :]
    ignored = torch.eye(len(queries), dtype=torch.bool)
    positive = same & ~ignored
    scores = queries @ candidates.T / temperature
    loss = torch.zeros(())
    for logits, right in ((scores, positive), (scores.T, positive.T)):
        negatives = logits.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
        terms = functional.softplus(negatives - logits)
        loss = loss + (terms * right).sum() / right.sum() / 2
    return loss
