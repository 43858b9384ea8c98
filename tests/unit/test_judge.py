"""The judge: sharing a prefix changes nothing, errors stay with their pair, and the prompt is the published one."""

from __future__ import annotations

import math
import re
import struct
import zlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, RepetitionPenaltyLogitsProcessor

from tests.unit.models_fixtures import (
    FAMILIES,
    FakeItem,
    build_tokenizer,
    make_item,
    mixed_items,
    picture,
    save_checkpoint,
)
from unime_ray.config import JudgeConfig
from unime_ray.errors import ModelError
from unime_ray.models import attention, judge_transformers
from unime_ray.models.backbone import Backbone
from unime_ray.models.judge import Verdict, load_judge, usage_of, yes_probability
from unime_ray.models.judge_transformers import TransformersJudge
from unime_ray.models.loading import check_model
from unime_ray.models.prompt_ids import PromptIds
from unime_ray.prompts import judge_prompt


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(str(save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)), device="cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("small"))


def groups() -> list[tuple[FakeItem, list[FakeItem]]]:
    """Every item as query (text, picture, both), with candidate lists of different lengths."""
    items = mixed_items()
    return [(query, items[: 3 + index] if index % 3 else items) for index, query in enumerate(items)]


def scores(verdicts: list[list[Verdict]]) -> torch.Tensor:
    return torch.tensor([[v.logit_yes, v.logit_no, v.score] for group in verdicts for v in group], dtype=torch.float64)


@torch.no_grad()
def plain_pairs(backbone: Backbone, order: str, ids: PromptIds | None = None) -> torch.Tensor:
    """Each pair whole, one at a time, through transformers' own forward and the full vocabulary."""
    model = AutoModelForImageTextToText.from_pretrained(backbone.path, attn_implementation="eager").eval()
    ids = ids or TransformersJudge(backbone, prompt_order=order).prompts
    rows = []
    for query, candidates in groups():
        for candidate in candidates:
            sides = [[p for p in backbone.pictures([item]) if p is not None] for item in (query, candidate)]
            segment = ids.build_judge_ids(query.rendered, candidate.rendered, (sides[0], sides[1]))
            logits = model(**backbone.collate([segment]).model_inputs(backbone)).logits[0, -1]
            yes, no = logits[ids.yes_id].item(), logits[ids.no_id].item()
            rows.append([yes, no, yes_probability(yes, no)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("order", ["query_first", "candidate_first"])
def test_a_shared_prefix_changes_nothing(backbone: Backbone, order: str) -> None:
    expected = plain_pairs(backbone, order)
    assert expected[:, 2].std() > 0.01  # the pairs do differ
    for share in (True, False):
        for batch_tokens in (1, 300, 16384):
            judge = TransformersJudge(backbone, prompt_order=order, share_prefix=share, batch_tokens=batch_tokens)
            assert judge.shares_prefix is share
            torch.testing.assert_close(scores(judge.score_groups(groups())), expected, atol=1e-5, rtol=0)


def test_both_ways_of_attending_to_a_prefix_agree(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for shortest in (1, 10_000):  # all suffixes through the fused kernel, none
        monkeypatch.setattr(attention, "FUSED_TOKENS", shortest)
        found.append(scores(TransformersJudge(backbone).score_groups(groups())))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_last_layer_runs_for_the_last_token_alone(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    layer = list(backbone.family.layers(backbone.model))[-1]
    layer.mlp.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[:-1].numel()))  # type: ignore[operator]
    batch = backbone.prepare(mixed_items())
    hidden = backbone.run_language_model(batch)
    whole = hidden[torch.arange(len(batch)), batch.last]
    torch.testing.assert_close(backbone.last_hidden(batch), whole, atol=1e-5, rtol=0)
    assert rows == [hidden.shape[:-1].numel(), len(batch)]


def test_one_query_alone_equals_the_same_among_many(backbone: Backbone) -> None:
    judge = TransformersJudge(backbone)
    query, candidates = groups()[3]
    alone, among = judge.score(query, candidates), judge.score_groups(groups())[3]
    torch.testing.assert_close(scores([alone]), scores([among]), atol=1e-5, rtol=0)


def test_shared_tokens_run_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = TransformersJudge(Backbone.load(str(small), device="cpu"))
    judge.score(*groups()[0])  # the opening of all prompts is computed here
    seen: list[tuple[int, int]] = []
    run = judge.backbone.run_language_model
    monkeypatch.setattr(
        judge.backbone, "run_language_model", lambda batch, **kw: seen.append(batch.input_ids.shape) or run(batch, **kw)
    )
    query = make_item("look", picture(7))
    judge.score(query, [make_item(name) for name in ("a", "b", "c", "d", "e")])
    (prefixes, prefix_tokens), (suffixes, suffix_tokens) = seen
    assert (prefixes, suffixes) == (1, 5)
    assert len(judge.prompts.static) > 40 and prefix_tokens < 40 and suffix_tokens < 15


@pytest.mark.parametrize("share", [True, False])
def test_usage_counts_what_ran_and_what_was_shared(small: Path, share: bool) -> None:
    judge = TransformersJudge(Backbone.load(str(small), device="cpu"), share_prefix=share)
    query, candidates = make_item("look", picture(7)), [make_item(name) for name in ("a", "b", "c")]
    judge.score(query, [*candidates, make_item("broken", b"GIF89a")])
    pictures = [judge.backbone.pixels.picture(picture(7))]
    whole = [len(judge.prompts.build_judge_ids(query.rendered, one.rendered, (pictures, ()))) for one in candidates]
    suffixes = sum(len(judge.prompts.judge_suffix(one.rendered, ())) for one in candidates)
    prefix = len(judge.prompts.judge_prefix(query.rendered, pictures)) - len(judge.prompts.static)
    used = usage_of(judge)
    assert (used.pairs, used.prompt_tokens, used.pictures, used.pictures_encoded) == (3, sum(whole), 3, 1)
    assert used.computed_tokens == (prefix + suffixes if share else sum(whole))


def test_prompt_is_the_published_one(small: Path) -> None:
    judge = TransformersJudge(Backbone.load(str(small), device="cpu"))
    segment = judge.prompts.build_judge_ids("QUERY", "CANDIDATE", ((), ()))
    assert judge.backbone.tokens.tokenizer.decode(segment.ids) == (
        "<|im_start|>user\nI will provide you with a query and a candidate. Please evaluate whether the candidate "
        "meets the requirements of the query. If it does, respond with 'Yes'; if it doesn't, respond with 'No'. "
        "Query:QUERY, Candidates:CANDIDATE<|im_end|>\n<|im_start|>assistant\n"
    )
    turned = TransformersJudge(judge.backbone, prompt_order="candidate_first").prompts
    segment = turned.build_judge_ids("QUERY", "CANDIDATE", ((), ()))
    assert "'No'. Candidates:CANDIDATE, Query:QUERY<|im_end|>" in judge.backbone.tokens.tokenizer.decode(segment.ids)


@pytest.mark.parametrize("order", ["query_first", "candidate_first"])
def test_a_yes_no_scorer_is_a_judge_by_its_prompt(tmp_path: Path, order: str) -> None:
    folder = str(save_checkpoint(tmp_path, "qwen3_vl"))
    judge = load_judge(JudgeConfig(model=folder, prompt="qwen3_vl_reranker", prompt_order=order))
    assert isinstance(judge, TransformersJudge)
    ids, tokenizer = judge.prompts, judge.backbone.tokens.tokenizer
    assert [tokenizer.decode([one]) for one in (ids.yes_id, ids.no_id)] == ["yes", "no"]
    query, candidate = "<|image_1|>\nQUERY", "DOCUMENT"
    pictures = [judge.backbone.pixels.picture(picture(1))]
    shown = tokenizer.decode(ids.build_judge_ids(query, candidate, (pictures, ())).ids)
    shown = re.sub(r"<\|vision_start\|>(<\|image_pad\|>)+<\|vision_end\|>", "[picture]", shown)
    sides = ["<Query>:[picture]QUERY", "<Document>:DOCUMENT"]
    assert shown == (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n<Instruct>: Given a search query, retrieve relevant candidates that answer the query."
        + "\n".join(sides if order == "query_first" else sides[::-1])
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = plain_pairs(judge.backbone, order, judge.prompts)
    torch.testing.assert_close(scores(judge.score_groups(groups())), expected, atol=1e-5, rtol=0)
    assert expected[:, 2].std() > 0.01


def test_a_template_without_system_turns_cannot_take_the_scorers_prompt(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for message in messages %}", "{% for message in messages if message.role == 'user' %}"
    )
    folder = str(save_checkpoint(tmp_path, tokenizer=tokenizer))
    check_model(folder, needs_answers=True)
    with pytest.raises(ModelError, match="drops the system turn"):
        check_model(folder, needs_answers=True, prompt=judge_prompt("qwen3_vl_reranker"))


@pytest.mark.parametrize("share", [True, False])
def test_errors_stay_with_their_pair(small: Path, share: bool) -> None:
    judge = TransformersJudge(Backbone.load(str(small), device="cpu"), share_prefix=share)
    good, broken, long = make_item("good"), make_item("broken", b"GIF89a"), make_item("very long " * 400)
    huge = make_item("huge", picture_of_pixels(9000, 9000))
    verdicts = judge.score_groups([(good, [good, broken, long, huge]), (broken, [good]), (long, [good]), (good, [])])
    assert verdicts[0][0].error is None and 0 < (verdicts[0][0].score or 0) < 1
    assert "picture" in (verdicts[0][1].error or "") and "picture" in (verdicts[1][0].error or "")
    assert "context is 1024" in (verdicts[0][2].error or "") and "context" in (verdicts[2][0].error or "")
    assert "9000x9000 pixels; corpus.image.max_source_pixels is" in (verdicts[0][3].error or "")
    assert verdicts[3] == [] and verdicts[0][1].score is None


def test_repetition_penalty_is_transformers_own(small: Path) -> None:
    backbone = Backbone.load(str(small), device="cpu")
    plain, penalised = TransformersJudge(backbone), TransformersJudge(backbone, repetition_penalty=1.05)
    query, candidates = groups()[0]
    ids = torch.tensor([[plain.prompts.yes_id, plain.prompts.no_id]])
    for before, after in zip(plain.score(query, candidates), penalised.score(query, candidates), strict=True):
        full = torch.zeros(1, len(backbone.tokens.tokenizer))
        full[0, ids[0]] = torch.tensor([before.logit_yes, before.logit_no])
        expected = RepetitionPenaltyLogitsProcessor(1.05)(ids, full)[0, ids[0]]
        torch.testing.assert_close(torch.tensor([after.logit_yes, after.logit_no]), expected)


def test_published_scores_are_sigmoid_of_the_difference_over_the_penalty() -> None:
    judge = TransformersJudge.__new__(TransformersJudge)
    judge.repetition_penalty = 1.05
    yes, no = judge._penalised(torch.tensor([20.125, 19.0])).tolist()
    assert yes_probability(yes, no) == pytest.approx(1 / (1 + math.exp(-1.125 / 1.05)), abs=1e-6)


def test_sliding_attention_scores_pairs_alone(tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    backbone = Backbone.load(str(save_checkpoint(tmp_path, **window)), device="cpu")
    judge = TransformersJudge(backbone)
    assert not judge.shares_prefix
    torch.testing.assert_close(
        scores(judge.score_groups(groups())), plain_pairs(backbone, "query_first"), atol=1e-5, rtol=0
    )


def test_bfloat16_stays_near(small: Path) -> None:
    exact = TransformersJudge(Backbone.load(str(small), device="cpu"))
    half = TransformersJudge(Backbone.load(str(small), device="cpu", dtype="bfloat16"))
    difference = scores(half.score_groups(groups()))[:, 2] - scores(exact.score_groups(groups()))[:, 2]
    assert difference.abs().max() < 0.1


def test_load_judge_checks_the_checkpoint(small: Path, tmp_path: Path) -> None:
    judge = load_judge(JudgeConfig(model=str(small), batch_tokens=77, share_prefix=False))
    assert isinstance(judge, TransformersJudge) and judge.batch_tokens == 77 and not judge.shares_prefix
    split = save_checkpoint(tmp_path / "split", tokenizer=build_tokenizer(("No",)))
    with pytest.raises(ModelError, match="'Yes' is not a single token"):
        load_judge(JudgeConfig(model=str(split)))
    blind = save_checkpoint(tmp_path / "blind")
    (blind / "preprocessor_config.json").unlink()
    for check in (lambda: check_model(str(blind)), lambda: load_judge(JudgeConfig(model=str(blind)))):
        with pytest.raises(ModelError, match="no image processor, so it cannot take pictures"):
            check()


def picture_of_pixels(width: int, height: int) -> bytes:
    """The header of a PNG that says it is so large; that is all anybody should read of it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_batches_cover_every_pair_within_the_budget(small: Path) -> None:
    judge = TransformersJudge(Backbone.load(str(small), device="cpu"))
    verdicts = [[Verdict.failed("not scored")] * len(candidates) for _, candidates in groups()]
    bundles = judge._bundles(groups(), verdicts)
    for budget in (1, 200, 4000):
        together = list(judge_transformers._together(bundles, budget))
        assert sum(len(part) for part in together) == len(bundles)
        for part in together:
            width = max(len(bundle.suffixes) for bundle in part)
            cuts = list(judge_transformers._columns(part, budget))
            assert [cut[0] for cut in cuts] == [0, *[cut[1] for cut in cuts[:-1]]] and cuts[-1][1] == width
            for start, stop in cuts:
                longest = max(len(b.suffixes[start]) for b in part if start < len(b.suffixes))
                assert longest * (stop - start) * len(part) <= budget or stop - start == 1
