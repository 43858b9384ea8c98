"""The prompts of the method and how an item's text and picture are laid into them.

The wording is UniME-V2's (arXiv 2510.13515); the judge's scores depend on it, so `prompt_hash` of it goes into the
manifest of every artifact it made. Pure text: no tokenizer, no model.

An item is *rendered* once, when the corpus is read: instruction and text joined, with the marker `<|image_1|>` where
its picture goes (VLM2Vec's convention, kept by UniME-V2). What `rendered` holds is exactly what a model sees.
"""

from __future__ import annotations

import hashlib

IMAGE_MARKER = "<|image_1|>"

JUDGE_INSTRUCTION = (
    "I will provide you with a query and a candidate. Please evaluate whether the candidate meets the requirements "
    "of the query. If it does, respond with 'Yes'; if it doesn't, respond with 'No'."
)
LISTWISE_INSTRUCTION = (
    "I will provide you with a query followed by multiple candidates in the format: (1) candidate1 (2) candidate2, "
    "etc. Each candidate is independent of the others. Evaluate each candidate against the query, and respond with "
    "the number corresponding to the candidate that best meets the requirements of the query."
)
QUERY_SLOT = " Query:"
CANDIDATE_SLOT = ", Candidates:"
SUMMARY_PROMPT = "Summary above sentences in one word: \n"
"""UniME V1, stage 1: follows the text whose embedding is distilled."""

YES, NO = "Yes", "No"

PROMPT_ORDERS = ("query_first", "candidate_first")


def render(text: str | None, has_image: bool, instruction: str | None = None) -> str:
    """The exact text a model gets for one item.

    `instruction` and `text` are joined by one blank; if the item has a picture and neither says where it goes, the
    marker opens the text on a line of its own.

    Raises:
        ValueError: more than one image marker, or a marker without a picture.
    """
    parts = [part.strip() for part in (instruction, text) if part and part.strip()]
    joined = " ".join(parts)
    markers = joined.count(IMAGE_MARKER)
    if markers > 1:
        raise ValueError(f"the text holds {markers} image markers {IMAGE_MARKER}; one item has at most one picture")
    if markers and not has_image:
        raise ValueError(f"the text holds the image marker {IMAGE_MARKER} but the item has no picture")
    if markers:
        # UniME-V2's own data writes a newline after the marker; one form keeps ids equal across readers.
        before, after = (side.strip() for side in joined.split(IMAGE_MARKER))
        head = f"{before}\n" if before else ""
        return f"{head}{IMAGE_MARKER}\n{after}"
    return f"{IMAGE_MARKER}\n{joined}" if has_image else joined


def judge_prefix(query: str) -> str:
    """Everything of the judge's user turn before the candidate: the part a query's candidates share."""
    return f"{JUDGE_INSTRUCTION}{QUERY_SLOT}{query}{CANDIDATE_SLOT}"


def judge_prefix_candidate_first(candidate: str) -> str:
    """The shared part when a candidate is scored against many queries (`judge.prompt_order: candidate_first`)."""
    return f"{JUDGE_INSTRUCTION} Candidates:{candidate}, Query:"


def listwise_prefix(query: str) -> str:
    """The listwise reranker's user turn up to the candidate list."""
    return f"{LISTWISE_INSTRUCTION}{QUERY_SLOT}{query}{CANDIDATE_SLOT}"


def listwise_candidate(position: int, candidate: str) -> str:
    """One entry of the list; `position` counts from 1."""
    return f"({position}) {candidate} "


def prompt_hash(*parts: str) -> str:
    """Twelve hex digits that change whenever the wording of a prompt does."""
    return hashlib.blake2b("\x00".join(parts).encode(), digest_size=6).hexdigest()


JUDGE_PROMPT_HASH = prompt_hash(JUDGE_INSTRUCTION, QUERY_SLOT, CANDIDATE_SLOT, YES, NO)
LISTWISE_PROMPT_HASH = prompt_hash(LISTWISE_INSTRUCTION, QUERY_SLOT, CANDIDATE_SLOT)
