"""Losses in closed form, against written-out references and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from unime_ray import losses


def random_unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def published_loss(similarities, scores, tau):
    """The published loss written out from the paper, one query at a time, with its 1e-8 inside the logarithms."""
    total = 0.0
    for s_row, q_row in zip(similarities.double().tolist(), scores.double().tolist(), strict=True):
        p = [math.exp(s / tau) for s in s_row]
        q = [math.exp(s / tau) for s in q_row]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        forward = sum(a * (math.log(a + 1e-8) - math.log(b + 1e-8)) for a, b in zip(p, q, strict=True))
        backward = sum(b * (math.log(b + 1e-8) - math.log(a + 1e-8)) for a, b in zip(p, q, strict=True))
        total += 0.5 * (forward + backward)
    return total / len(similarities)


def test_judge_kl_is_zero_where_student_and_judge_agree():
    scores = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.2, 0.2]])
    assert torch.allclose(losses.judge_kl(scores, scores, 0.02, 0.02), torch.zeros(2), atol=1e-7)
    assert torch.allclose(losses.judge_kl(scores * 5, scores, 0.1, 0.02), torch.zeros(2), atol=1e-6)


def test_judge_kl_of_two_candidates_has_its_closed_form():
    # For logits (a, 0) and (b, 0): P = sigmoid(a), Q = sigmoid(b), and the loss is (P - Q)(a - b) / 2.
    similarities, scores = torch.tensor([[0.5, 0.1]]), torch.tensor([[0.4, 0.9]])
    a, b = 0.4 / 0.05, -0.5 / 0.2
    expected = 0.5 * (1 / (1 + math.exp(-a)) - 1 / (1 + math.exp(-b))) * (a - b)
    assert losses.judge_kl(similarities, scores, 0.05, 0.2).item() == pytest.approx(expected, rel=1e-6)


def test_judge_kl_stays_finite_where_the_published_logarithms_saturate():
    similarities = torch.tensor([[1.0, -1.0]], requires_grad=True)
    loss = losses.judge_kl(similarities, torch.tensor([[0.0, 1.0]]), 0.001, 0.001)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.5 * (2000 + 1000), rel=1e-4)
    assert torch.isfinite(similarities.grad).all()


@pytest.mark.parametrize("tau", [0.2, 0.5, 1.0])
def test_judge_kl_equals_the_published_loss_away_from_its_guard(tau):
    generator = torch.Generator().manual_seed(3)
    similarities, scores = torch.rand(16, 9, generator=generator), torch.rand(16, 9, generator=generator)
    ours = losses.judge_kl(similarities, scores, tau, tau).mean().item()
    assert ours == pytest.approx(published_loss(similarities, scores, tau), abs=2e-6)


def test_infonce_of_equal_similarities_is_the_log_of_the_batch():
    queries, candidates = torch.zeros(4, 8), random_unit(7, 8)
    loss = losses.infonce(queries, candidates, torch.arange(4), 0.02)
    assert torch.allclose(loss, torch.full((4,), math.log(7)))


def test_masked_candidates_leave_the_denominator():
    queries, candidates = torch.zeros(2, 8), random_unit(5, 8)
    allowed = torch.ones(2, 5, dtype=torch.bool)
    allowed[0, 3:] = False
    loss = losses.infonce(queries, candidates, torch.tensor([0, 1]), 0.02, allowed)
    assert torch.allclose(loss, torch.tensor([math.log(3), math.log(5)]))


def test_in_batch_mask_drops_known_positives_and_repeats():
    keys = torch.tensor([10, 11, 10, 12, 11])
    known = torch.tensor([[10, 12], [11, losses.PADDING_KEY], [10, losses.PADDING_KEY]])
    allowed = losses.in_batch_mask(keys, known, torch.tensor([0, 1, 2]))
    assert allowed.tolist() == [
        [True, True, False, False, False],  # 12 is another positive of query 0; the second 11 is a repeat
        [True, True, False, True, False],
        [False, True, True, True, False],  # its own place counts, the equal item at place 0 does not
    ]


def test_false_negatives_lie_above_the_positive_by_more_than_the_margin():
    similarities = torch.tensor([[0.5, 0.61, 0.6, 0.9]])
    assert losses.false_negative_mask(similarities, torch.tensor([0]), 0.1).tolist() == [[False, True, False, True]]


def test_hybrid_is_the_sum_of_its_parts():
    queries, own = random_unit(3, 8), random_unit(3, 4, 8, seed=1)
    candidates, targets = own.flatten(0, 1), torch.tensor([0, 4, 8])
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    allowed = torch.ones(3, 12, dtype=torch.bool)
    settings = {"temperature": 0.1, "judge_temperature": 0.3}
    both = losses.hybrid(queries, own, scores, candidates, targets, allowed, **settings, infonce_weight=0.7, margin=9.0)
    kl = losses.judge_kl(losses.cosines(queries, own), scores, 0.1, 0.3)
    assert torch.allclose(both, kl + 0.7 * losses.infonce(queries, candidates, targets, 0.1), atol=1e-6)
    masked = losses.hybrid(
        queries, own, scores, candidates, targets, allowed, **settings, infonce_weight=1.0, margin=-2.0
    )
    assert torch.allclose(masked, kl, atol=1e-6)  # every negative masked: InfoNCE of one candidate is 0


def test_yes_no_loss_in_closed_form():
    loss = losses.yes_no_loss(torch.tensor([2.0, 2.0, 0.0]), torch.tensor([-1.0, -1.0, 0.0]), torch.tensor([1, 0, 1]))
    expected = [math.log1p(math.exp(-3)), math.log1p(math.exp(3)), math.log(2)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_listwise_loss_ignores_logits_past_the_list():
    logits = torch.tensor([[0.0, 0.0, 50.0], [1.0, 0.0, 0.0]])
    loss = losses.listwise_loss(logits, torch.tensor([1, 0]), torch.tensor([2, 3]))
    assert loss.tolist() == pytest.approx([math.log(2), math.log(1 + 2 * math.exp(-1))], rel=1e-6)


def finite_difference(function, x: torch.Tensor, step: float) -> torch.Tensor:
    gradient = torch.zeros_like(x)
    for index in range(x.numel()):
        bump = torch.zeros_like(x).view(-1)
        bump[index] = step
        bump = bump.view_as(x)
        gradient.view(-1)[index] = (function(x + bump) - function(x - bump)) / (2 * step)
    return gradient


@pytest.mark.parametrize("name", ["judge_kl", "infonce", "hybrid", "yes_no", "listwise"])
def test_gradients_equal_finite_differences(name):
    scores = torch.rand(2, 3, generator=torch.Generator().manual_seed(5)).double()
    own, targets = random_unit(2, 3, 4, seed=6).double(), torch.tensor([0, 3])
    allowed = torch.ones(2, 6, dtype=torch.bool)
    functions = {
        "judge_kl": lambda x: losses.judge_kl(losses.cosines(x, own), scores, 0.5, 0.4).sum(),
        "infonce": lambda x: losses.infonce(x, own.flatten(0, 1), targets, 0.5).sum(),
        "hybrid": lambda x: losses.hybrid(
            x,
            own,
            scores,
            own.flatten(0, 1),
            targets,
            allowed,
            temperature=0.5,
            judge_temperature=0.5,
            infonce_weight=0.5,
        ).sum(),
        "yes_no": lambda x: losses.yes_no_loss(x[:, 0], x[:, 1], torch.tensor([1, 0])).sum(),
        "listwise": lambda x: losses.listwise_loss(x, torch.tensor([1, 0]), torch.tensor([4, 2])).sum(),
    }
    x = random_unit(2, 4, seed=7).double().requires_grad_(True)
    functions[name](x).backward()
    numeric = finite_difference(functions[name], x.detach(), 1e-6)
    assert torch.allclose(x.grad, numeric, atol=1e-7), (x.grad, numeric)


def test_gather_is_the_identity_without_a_process_group():
    rows = random_unit(3, 4)
    assert losses.gather_rows(rows) is rows
