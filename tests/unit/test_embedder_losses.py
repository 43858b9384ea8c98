"""Every loss of an embedder against its equation written out, and its gradient against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from tests.unit import loss_references as reference
from tests.unit.test_losses import finite_difference, random_unit
from unime_ray import losses

QUERIES, CANDIDATES, OWN, WIDTH = 4, 11, 3, 6
TARGETS = [2, 0, 5, 7]
TAU, JUDGE_TAU = 0.3, 0.4


class Scene:
    """Random unit vectors in float64, judge scores, and a mask that lets the targets in."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.queries = random_unit(QUERIES, WIDTH, seed=seed).double()
        self.candidates = random_unit(CANDIDATES, WIDTH, seed=seed + 1).double()
        self.own = random_unit(QUERIES, OWN, WIDTH, seed=seed + 2).double()
        self.scores = torch.rand(QUERIES, OWN, generator=generator).double()
        self.targets = torch.tensor(TARGETS)
        allowed = torch.rand(QUERIES, CANDIDATES, generator=generator) < 0.8
        self.allowed = allowed.scatter(1, self.targets[:, None], True)
        self.teachers = random_unit(QUERIES, 9, seed=seed + 3).double()

    def loss(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Loss `name` per query, as a function of the query embeddings alone."""
        own = losses.cosines(x, self.own)
        in_batch = (x, self.candidates, self.targets, TAU)
        kwargs = {"temperature": TAU, "judge_temperature": JUDGE_TAU, "infonce_weight": 0.7, "margin": 0.1}
        distill = {"temperature": TAU, "teacher_temperature": JUDGE_TAU}
        texts = (x, x, self.teachers, self.teachers, torch.arange(QUERIES))
        return {
            "judge_kl": lambda: losses.judge_kl(own, self.scores, TAU, JUDGE_TAU),
            "judge_kl of logits": lambda: losses.judge_kl(own, losses.score_logits(self.scores), TAU, 2.0),
            "hard_negative_ce": lambda: losses.hard_negative_ce(own, TAU),
            "margin_mse": lambda: losses.margin_mse(own, self.scores, TAU, JUDGE_TAU),
            "infonce": lambda: losses.infonce(*in_batch, self.allowed),
            "hardness_infonce": lambda: losses.hardness_infonce(*in_batch, 2.0, self.allowed),
            "unime_v1": lambda: losses.unime_v1(*in_batch, top_k=4, margin=0.1, allowed_BM=self.allowed),
            "unime_v1, repeated": lambda: losses.unime_v1(*in_batch, top_k=25, margin=-0.1),
            "hybrid": lambda: losses.hybrid(
                x, self.own, self.scores, self.candidates, self.targets, self.allowed, **kwargs
            ),
            "text_distill": lambda: losses.text_distill(*texts, **distill),
            "text_distill, others": lambda: losses.text_distill(*texts, **distill, include_self=False),
        }[name]()

    def written_out(self, name: str) -> list[float]:
        own = losses.cosines(self.queries, self.own)
        in_batch, everything = (self.queries, self.candidates, TARGETS, TAU), torch.ones_like(self.allowed)
        logits = torch.log(self.scores / (1 - self.scores))
        return {
            "judge_kl": lambda: reference.judge_kl(own, self.scores, TAU, JUDGE_TAU),
            "judge_kl of logits": lambda: reference.judge_kl(own, logits, TAU, 2.0),
            "hard_negative_ce": lambda: reference.hard_negative_ce(own, TAU),
            "margin_mse": lambda: reference.margin_mse(own, self.scores, TAU, JUDGE_TAU),
            "infonce": lambda: reference.infonce(*in_batch, self.allowed),
            "hardness_infonce": lambda: reference.hardness_infonce(*in_batch, 2.0, self.allowed),
            "unime_v1": lambda: reference.unime_v1(*in_batch, 4, 0.1, self.allowed),
            "unime_v1, repeated": lambda: reference.unime_v1(*in_batch, 25, -0.1, everything),
            "hybrid": lambda: reference.hybrid(
                self.queries, self.own, self.scores, self.candidates, TARGETS, self.allowed, TAU, JUDGE_TAU, 0.7, 0.1
            ),
            "text_distill": lambda: reference.text_distill(self.queries, self.teachers, TAU, JUDGE_TAU),
            "text_distill, others": lambda: reference.text_distill(self.queries, self.teachers, TAU, JUDGE_TAU, False),
        }[name]()


NAMES = [
    "judge_kl", "judge_kl of logits", "hard_negative_ce", "margin_mse", "infonce", "hardness_infonce", "unime_v1",
    "unime_v1, repeated", "hybrid", "text_distill", "text_distill, others",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_losses_equal_their_equations_written_out(name, seed):
    scene = Scene(seed)
    assert scene.loss(name, scene.queries).tolist() == pytest.approx(scene.written_out(name), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("hardness")])
def test_gradients_equal_finite_differences(name):
    scene = Scene()
    x = scene.queries.clone().requires_grad_(True)
    scene.loss(name, x).sum().backward()
    numeric = finite_difference(lambda point: scene.loss(name, point).sum(), x.detach(), 1e-6)
    assert torch.allclose(x.grad, numeric, atol=1e-7), (x.grad, numeric)
    assert x.grad.abs().max() > 1e-3


def test_no_gradient_flows_through_the_weights_of_hard_negatives():
    scene, hardness = Scene(), 2.0
    x = scene.queries.clone().requires_grad_(True)
    scene.loss("hardness_infonce", x).sum().backward()
    weights = (hardness * scene.queries @ scene.candidates.T).scatter(1, scene.targets[:, None], 0.0)

    def fixed(point: torch.Tensor) -> torch.Tensor:
        logits = (point @ scene.candidates.T / TAU + weights).masked_fill(~scene.allowed, float("-inf"))
        return torch.nn.functional.cross_entropy(logits, scene.targets, reduction="sum")

    assert torch.allclose(x.grad, finite_difference(fixed, x.detach(), 1e-6), atol=1e-7)


def test_hardness_zero_is_infonce():
    scene = Scene()
    plain = losses.infonce(scene.queries, scene.candidates, scene.targets, TAU, scene.allowed)
    weighted = losses.hardness_infonce(scene.queries, scene.candidates, scene.targets, TAU, 0.0, scene.allowed)
    assert torch.equal(plain, weighted)


def test_score_logits_undo_the_sigmoid_and_stay_finite():
    logits = torch.tensor([-8.0, -0.5, 0.0, 3.0, 8.0])
    assert torch.allclose(losses.score_logits(torch.sigmoid(logits)), logits, atol=1e-3)
    assert losses.score_logits(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([-12.0, 12.0], rel=1e-2)


def test_logit_targets_tell_apart_what_scores_cannot():
    scores = torch.tensor([[0.9998, 0.98, 0.5]], dtype=torch.float64)
    flat = torch.softmax(scores / 0.5, dim=-1)[0]
    sharp = torch.softmax(losses.score_logits(scores), dim=-1)[0]
    assert flat[0] / flat[1] == pytest.approx(math.exp(0.0198 / 0.5))
    assert sharp[0] / sharp[1] == pytest.approx((0.9998 / 0.0002) / (0.98 / 0.02))
    aligned = losses.judge_kl(losses.score_logits(scores) * 0.1, losses.score_logits(scores), 0.1, 1.0)
    assert aligned.item() == pytest.approx(0.0, abs=1e-12)


def test_hard_negative_ce_of_equal_cosines_is_the_log_of_the_list():
    assert losses.hard_negative_ce(torch.zeros(2, 5), 0.02).tolist() == pytest.approx([math.log(5)] * 2)


def test_hard_negative_ce_is_the_one_hot_limit_of_the_judge():
    cosines = random_unit(3, 4)
    sure = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(3, 4)
    log_q = torch.log_softmax(sure / 0.01, dim=-1)
    cross_entropy = -(log_q.exp() * torch.log_softmax(cosines / 0.1, dim=-1)).sum(-1)
    assert torch.allclose(losses.hard_negative_ce(cosines, 0.1), cross_entropy, atol=1e-6)


def test_margin_mse_is_zero_at_the_optimum_of_judge_kl():
    scores = torch.tensor([[0.9, 0.2, 0.4]])
    cosines = scores * 0.1 / 0.5 + 0.3
    assert losses.margin_mse(cosines, scores, 0.1, 0.5).item() == pytest.approx(0.0, abs=1e-10)
    assert losses.judge_kl(cosines, scores, 0.1, 0.5).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.margin_mse(torch.tensor([[0.5, 0.2]]), torch.tensor([[1.0, 0.0]]), 1.0, 1.0).item() == pytest.approx(
        0.49
    )
    with pytest.raises(ValueError, match="at least one negative"):
        losses.margin_mse(torch.ones(2, 1), torch.ones(2, 1), 0.1, 0.1)


def test_unime_v1_takes_the_hardest_that_are_no_likely_false_negatives():
    # Along one axis: cosines 0.5 (c+), 0.61 (over the margin), 0.6, 0.2, -0.3.
    cosines = torch.tensor([0.5, 0.61, 0.6, 0.2, -0.3], dtype=torch.float64)
    candidates = torch.stack([cosines, (1 - cosines.square()).sqrt()], dim=1)
    query, target = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    loss = losses.unime_v1(query, candidates, target, 1.0, top_k=2, margin=0.1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.1) + math.exp(-0.3)))
    repeated = losses.unime_v1(query, candidates, target, 1.0, top_k=4, margin=0.1)
    assert repeated.item() == pytest.approx(math.log(1 + 2 * math.exp(0.1) + math.exp(-0.3) + math.exp(-0.8)))


def test_unime_v1_without_a_negative_left_is_zero_with_a_finite_gradient():
    queries, candidates = random_unit(2, 4).requires_grad_(True), random_unit(3, 4, seed=1)
    loss = losses.unime_v1(queries, candidates, torch.tensor([0, 1]), 0.02, margin=-2.0)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert torch.equal(queries.grad, torch.zeros_like(queries))


def test_distillation_is_zero_where_student_and_teacher_agree():
    texts, own = random_unit(5, 8), torch.arange(5)
    same = losses.text_distill(texts, texts, texts, texts, own, temperature=0.1, teacher_temperature=0.1)
    assert torch.allclose(same, torch.zeros(5), atol=1e-6)
    rotated = texts.flip(1)  # another basis, the same geometry
    for include_self in (True, False):
        settings = {"temperature": 0.1, "teacher_temperature": 0.1, "include_self": include_self}
        assert losses.text_distill(texts, texts, rotated, rotated, own, **settings).abs().max() < 1e-5


def test_a_text_alone_in_its_batch_is_all_there_is_to_distil():
    text = random_unit(1, 4).requires_grad_(True)
    for include_self in (True, False):
        settings = {"temperature": 0.1, "teacher_temperature": 0.1, "include_self": include_self}
        loss = losses.text_distill(text, text, text.detach(), text.detach(), torch.zeros(1, dtype=int), **settings)
        assert include_self is False or loss.item() == 0.0
        assert torch.isfinite(loss).all()


@pytest.mark.parametrize("name", ["infonce", "unime_v1", "judge_kl", "hybrid"])
def test_matryoshka_is_the_weighted_mean_over_widths(name):
    scene = Scene()
    functions = {
        "judge_kl": lambda q, own, c: losses.judge_kl(losses.cosines(q, own), scene.scores, TAU, JUDGE_TAU),
        "infonce": lambda q, own, c: losses.infonce(q, c, scene.targets, TAU),
        "unime_v1": lambda q, own, c: losses.unime_v1(q, c, scene.targets, TAU, top_k=3),
        "hybrid": lambda q, own, c: losses.hybrid(
            q, own, scene.scores, c, scene.targets, scene.allowed,
            temperature=TAU, judge_temperature=JUDGE_TAU, infonce_weight=1.0,
        ),
    }  # fmt: skip
    parts = [scene.queries, scene.own, scene.candidates]
    found = losses.matryoshka(functions[name], parts, [2, 6], [1.0, 3.0])
    cut = [torch.nn.functional.normalize(rows[..., :2], dim=-1) for rows in parts]
    expected = (functions[name](*cut) + 3.0 * functions[name](*parts)) / 4.0
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(losses.matryoshka(functions[name], parts, [6]), functions[name](*parts), atol=1e-12)


@pytest.mark.parametrize(("dims", "weights"), [([7], []), ([0, 2], []), ([], []), ([2, 4], [1.0])])
def test_matryoshka_refuses_widths_that_do_not_fit(dims, weights):
    with pytest.raises(ValueError, match="matryoshka"):
        losses.matryoshka(lambda x: x.sum(-1), [torch.ones(2, 6)], dims, weights)


def test_matryoshka_gradients_equal_finite_differences():
    scene = Scene()

    def loss(x: torch.Tensor) -> torch.Tensor:
        parts = [x, scene.candidates]
        return losses.matryoshka(lambda q, c: losses.infonce(q, c, scene.targets, TAU), parts, [2, 4, 6]).sum()

    x = scene.queries.clone().requires_grad_(True)
    loss(x).backward()
    assert torch.allclose(x.grad, finite_difference(loss, x.detach(), 1e-6), atol=1e-7)
