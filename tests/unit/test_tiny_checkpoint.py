"""The bundled checkpoints load like any other, are small, and judge and retrieve better than chance."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import unime_ray
from unime_ray import prompts
from unime_ray.corpus.demo_rows import (
    ADAPTATION_ARTIST,
    PICTURE_QUERY,
    PICTURE_TEXT,
    PRETRAINING_ARTISTS,
    UNSEEN_ARTIST,
)
from unime_ray.models.names import resolve_model
from unime_ray.train.pretrain_eval import auc

DATA = Path(unime_ray.__file__).parent / "data"
BUNDLED = ("tiny", "tiny_judge")


@pytest.fixture(scope="module", params=BUNDLED)
def tiny(request: pytest.FixtureRequest):
    folder = DATA / request.param
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return model, AutoTokenizer.from_pretrained(folder), processor


@pytest.fixture(scope="module")
def drawn() -> list[tuple[str, Image.Image]]:
    """Sixteen training emoji of different subgroups by a pretraining artist: (name, picture)."""
    concepts = pq.read_table(DATA / "demo/concepts.parquet").to_pylist()
    by_subgroup = {row["subgroup"]: row for row in concepts if row["fold"] == "train" and not row["skin_tone"]}
    rows = pq.read_table(DATA / "demo/pictures.parquet", filters=[("artist", "=", "noto")]).to_pylist()
    bytes_of = {row["hexcode"]: row["image"] for row in rows}
    known = [row for row in by_subgroup.values() if row["hexcode"] in bytes_of][::5][:16]
    return [(row["name"], Image.open(io.BytesIO(bytes_of[row["hexcode"]])).convert("RGB")) for row in known]


def states(tiny, texts: list[str], images: list[Image.Image | None]) -> torch.Tensor:
    """Last token's last hidden state of each text, padded left in one plain transformers forward."""
    model, tokenizer, processor = tiny
    seen = [image for image in images if image is not None]
    pixels = dict(processor(images=seen, return_tensors="pt")) if seen else {}
    slot = f"<|vision_start|>{'<|image_pad|>' * 16}<|vision_end|>"
    batch = tokenizer([t.replace(prompts.IMAGE_MARKER, slot) for t in texts], padding=True, return_tensors="pt")
    types = (batch["input_ids"] == model.config.image_token_id).int()
    with torch.no_grad():
        out = model.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], mm_token_type_ids=types, **pixels
        )
    return out.last_hidden_state[:, -1]


def test_it_is_a_small_qwen2_vl(tiny) -> None:
    model, tokenizer, processor = tiny
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 4e6
    assert sum(path.stat().st_size for path in Path(model.name_or_path).glob("*.safetensors")) <= 8 << 20
    text = model.config.text_config
    assert text.hidden_size // text.num_attention_heads in (32, 64)  # what vLLM's attention kernels take
    assert len(tokenizer) == text.vocab_size
    assert tokenizer.padding_side == "left"
    assert processor(images=[Image.new("RGB", (300, 300))])["image_grid_thw"].tolist() == [[1, 8, 8]]


def test_answers_are_single_tokens_and_users_cannot_end_their_turn(tiny) -> None:
    tokenizer = tiny[1]
    for answer in (prompts.YES, prompts.NO, *map(str, range(1, 11))):
        assert len(tokenizer.encode(answer, add_special_tokens=False)) == 1, answer
    turn = [{"role": "user", "content": "hello"}]
    chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    inside = tokenizer.encode(chat, add_special_tokens=False, split_special_tokens=True)
    assert not set(inside) & set(tokenizer.all_special_ids)


def test_any_text_survives_the_tokenizer(tiny) -> None:
    text = "Ünïcode 漢字 🙂 100 %\n(10) tabs\tand  blanks"
    assert tiny[1].decode(tiny[1].encode(text, add_special_tokens=False)) == text


def test_names_find_their_pictures(tiny, drawn) -> None:
    """Recall@1 among sixteen pictures at least 0.7; chance is 0.06."""
    names, pictures = zip(*drawn, strict=True)
    asked = states(tiny, [PICTURE_QUERY.format(name) for name in names], [None] * len(names))
    shown = states(tiny, [f"{prompts.IMAGE_MARKER}\n{PICTURE_TEXT}"] * len(pictures), list(pictures))
    scores = functional.normalize(asked, dim=-1) @ functional.normalize(shown, dim=-1).T
    assert float((scores.argmax(1) == torch.arange(len(names))).float().mean()) >= 0.7


def test_the_judge_tells_right_from_wrong(tiny, drawn) -> None:
    """AUC at least 0.9 over all 256 pairs of sixteen names and pictures, each prompt through the plain forward."""
    model, tokenizer, _ = tiny
    count = len(drawn)
    candidate = f"{prompts.IMAGE_MARKER}\n{PICTURE_TEXT}"
    turns = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompts.judge_prefix(PICTURE_QUERY.format(name)) + candidate}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for name, _ in drawn
        for _ in range(count)
    ]
    hidden = states(tiny, turns, [picture for _ in range(count) for _, picture in drawn])
    yes, no = (tokenizer.encode(word)[0] for word in (prompts.YES, prompts.NO))
    rows = model.get_output_embeddings().weight
    scores = (hidden @ (rows[yes] - rows[no])).detach().numpy()
    assert auc(scores, np.eye(count, dtype=bool).flatten()) >= 0.9


@pytest.mark.parametrize("name", BUNDLED)
def test_the_card_states_what_was_measured(name: str) -> None:
    card, figures = (DATA / name / "README.md").read_text(), json.loads((DATA / name / "figures.json").read_text())
    for artist in (*PRETRAINING_ARTISTS, ADAPTATION_ARTIST, UNSEEN_ARTIST):
        assert artist in card
    for group in (figures["mining_pool"]["pictures_only"], figures["artists"][UNSEEN_ARTIST]["judge_random"]):
        assert f"{group['pooled']:.2f}" in card


def test_both_share_a_vocabulary_and_a_config_names_them() -> None:
    vocabularies = [(DATA / name / "tokenizer.json").read_bytes() for name in BUNDLED]
    assert vocabularies[0] == vocabularies[1]
    assert [Path(resolve_model(name)).name for name in ("tiny", "tiny-judge")] == list(BUNDLED)
