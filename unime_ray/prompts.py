"""The prompts of the method and how an item's text and picture are laid into them.

The wording is UniME-V2's (arXiv 2510.13515); the judge's scores depend on it, so `prompt_hash` of it goes into the
manifest of every artifact it made. Pure text: no tokenizer, no model.

An item is *rendered* once, when the corpus is read: instruction and text joined, with the marker `<|image_1|>` where
its picture goes (VLM2Vec's convention, kept by UniME-V2). What `rendered` holds is exactly what a model sees.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

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

RERANKER_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the "
    'answer can only be "yes" or "no".'
)
RERANKER_TASK = "Given a search query, retrieve relevant candidates that answer the query."
"""System turn and default task of the Qwen3-VL-Reranker checkpoints; their answers are lower-case."""

UNIME_V2, QWEN3_VL_RERANKER = "unime_v2", "qwen3_vl_reranker"
JUDGE_PROMPTS = (UNIME_V2, QWEN3_VL_RERANKER)
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


@dataclass(frozen=True)
class JudgePrompt:
    """How a judge is asked: the words around a query and a candidate, and the two answers that are read.

    A prompt is a system turn (or none) and a user's turn of prefix and suffix. The prefix ends where the second of the
    two items begins, so that it is the part that pairs share.
    """

    name: str
    yes: str
    no: str
    before_query: str
    before_candidate: str
    opening: str
    """What precedes the first item's own heading."""
    between: tuple[str, str]
    """What stands between the items if the query comes first, and if the candidate does."""
    system: str | None = None

    def prefix(self, rendered: str, order: str = "query_first") -> str:
        """Everything before the second item; `rendered` is the query, or the candidate if `candidate_first`."""
        if order == "query_first":
            return f"{self.opening}{self.before_query}{self.item(rendered)}{self.between[0]}{self.before_candidate}"
        return f"{self.opening}{self.before_candidate}{self.item(rendered)}{self.between[1]}{self.before_query}"

    def suffix(self, rendered: str) -> str:
        """The second item, which ends the user's turn."""
        return self.item(rendered)

    def item(self, rendered: str) -> str:
        """An item as this prompt shows it."""
        if self.name == UNIME_V2:
            return rendered
        # The published script puts a picture right before its text, and a word where there is nothing.
        return rendered.replace(f"{IMAGE_MARKER}\n", IMAGE_MARKER) or "NULL"

    @property
    def hash(self) -> str:
        """Twelve hex digits that change whenever the wording does."""
        if self.name == UNIME_V2:
            return JUDGE_PROMPT_HASH
        words = (self.opening, self.before_query, self.before_candidate, *self.between, self.yes, self.no)
        return prompt_hash(self.name, self.system or "", *words)


def judge_prompt(name: str = "unime_v2", instruction: str | None = None) -> JudgePrompt:
    """The prompt of that name (`judges.*.prompt`).

    Args:
        instruction: `qwen3_vl_reranker`: what it says of the task.
    """
    if name == UNIME_V2:
        opening = f"{JUDGE_INSTRUCTION} "
        return JudgePrompt(name, YES, NO, "Query:", "Candidates:", opening, (", ", ", "))
    if name != QWEN3_VL_RERANKER:
        raise ValueError(f"no judge prompt {name!r}; there are {', '.join(JUDGE_PROMPTS)}")
    opening = f"<Instruct>: {instruction or RERANKER_TASK}"
    return JudgePrompt(name, "yes", "no", "<Query>:", "<Document>:", opening, ("\n", "\n"), RERANKER_SYSTEM)


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
