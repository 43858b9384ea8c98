"""Prompts: the paper's words, and one rendering whatever way a marker was written."""

from __future__ import annotations

import pytest

from unime_ray import prompts


def test_the_judge_prompt_is_the_papers():
    text = prompts.judge_prefix("<Query>") + "<Candidate>"
    assert text == (
        "I will provide you with a query and a candidate. Please evaluate whether the candidate meets the "
        "requirements of the query. If it does, respond with 'Yes'; if it doesn't, respond with 'No'. "
        "Query:<Query>, Candidates:<Candidate>"
    )


@pytest.mark.parametrize(
    ("text", "instruction", "has_image", "rendered"),
    [
        ("a cat", None, False, "a cat"),
        (" a cat ", "Find: ", False, "Find: a cat"),
        (None, None, True, "<|image_1|>\n"),
        ("a cat", None, True, "<|image_1|>\na cat"),
        ("<|image_1|>\na cat", None, True, "<|image_1|>\na cat"),
        ("<|image_1|> a cat", None, True, "<|image_1|>\na cat"),
        ("<|image_1|>\na cat", "Look at", True, "Look at\n<|image_1|>\na cat"),
    ],
)
def test_render(text, instruction, has_image, rendered):
    assert prompts.render(text, has_image, instruction) == rendered
    assert prompts.render(rendered, has_image) == rendered, "rendering what is rendered changes nothing"


@pytest.mark.parametrize(("text", "has_image"), [("<|image_1|> a", False), ("<|image_1|> <|image_1|>", True)])
def test_markers_that_do_not_match_the_picture(text, has_image):
    with pytest.raises(ValueError, match="marker"):
        prompts.render(text, has_image)


def test_the_hash_follows_the_wording():
    assert prompts.prompt_hash("a", "b") != prompts.prompt_hash("ab")
    assert len(prompts.JUDGE_PROMPT_HASH) == 12
