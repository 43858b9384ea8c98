"""The fast training forward is transformers' own, rows hide branches from each other, and a run resumes."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from unime_ray.errors import CorpusError, TrainingError
from unime_ray.train import pretrain, pretrain_data
from unime_ray.train.augment import augment
from unime_ray.train.pretrain_losses import contrastive_loss, order_loss
from unime_ray.train.pretrain_plan import BatchShape, plan_batch
from unime_ray.train.rows import Rows, attention_bias, image_chunk, join, text_chunk

SMALL = {"hidden": 64, "layers": 2, "intermediate": 96, "vision_width": 64, "vision_depth": 2, "kv_heads": 1}
SHAPE = BatchShape(concepts=8, cluster=2, picture_lists=3, name_lists=3, twin_lists=2, text_lists=1, listwise=2)
NAMES = [f"{tone} {thing}" for thing in ("apple", "boat", "cat", "door", "elf") for tone in ("red", "small", "old")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen training concepts and a held-out one, each drawn by two artists."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    concepts = [
        {"hexcode": f"{index:X}", "name": name, "keywords": name.split(), "group": "things",
         "subgroup": name.split()[1], "base_hexcode": f"{index:X}", "skin_tone": None,
         "fold": "train" if index < 15 else "heldout_concept"}
        for index, name in enumerate([*NAMES, "held out"])
    ]  # fmt: skip
    pictures = [
        {"hexcode": concept["hexcode"], "artist": artist, "image": _webp(rng), "width": 64, "height": 64}
        for concept in concepts
        for artist in ("noto", "blob", "emojione")
    ]
    pq.write_table(pa.Table.from_pylist(concepts), folder / "concepts.parquet")
    pq.write_table(pa.Table.from_pylist(pictures), folder / "pictures.parquet")
    return folder


def _webp(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def trainer_for(data: Path, out: Path, **changes: object) -> pretrain.Pretrainer:
    settings: dict = {"out": str(out), "data": str(data), "model": SMALL, "shape": SHAPE, "dtype": "float32"}
    return pretrain.Pretrainer(pretrain.PretrainConfig(**(settings | changes)))


@pytest.fixture(scope="module")
def trainer(data: Path, tmp_path_factory: pytest.TempPathFactory) -> pretrain.Pretrainer:
    return trainer_for(data, tmp_path_factory.mktemp("run"))


def test_only_training_concepts_by_the_named_artists_are_read(data: Path) -> None:
    pictures = pretrain_data.load_pictures(data, ["noto", "blob"])
    assert "held out" not in pictures.names
    assert set(pictures.artist) == {"noto", "blob"}
    assert len(pictures.pixels) == 30
    assert all(len(own) == 2 for own in pictures.of_concept())


def test_missing_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="concepts.parquet is missing"):
        pretrain_data.load_pictures(tmp_path, ["noto"])


def test_fast_forward_equals_transformers_on_every_branch(trainer: pretrain.Pretrainer) -> None:
    """Every branch of every row, padded left into one mixed batch: last hidden states within 1e-5."""
    concepts = np.arange(8)
    chosen = pretrain_data.choose_pictures(concepts, trainer.of_concept, trainer.rng)
    plan = plan_batch(trainer.vocabulary, trainer.neighbours, concepts, SHAPE, 1.0, trainer.rng)
    patches = trainer.pixels(chosen)
    with torch.no_grad():
        fast = trainer.losses.states(plan, patches)
        for group, rows in plan.groups.items():
            assert rows.width, group
            ids, branch, _ = rows.tensors()
            alone = _sequences(ids, branch)
            reference = _transformers_states(trainer, [sequence for *_, sequence in alone], patches)
            for (row, end, _), expected in zip(alone, reference, strict=True):
                assert torch.allclose(fast[group][row, end], expected, atol=1e-5), (group, row, end)


def _sequences(ids: torch.Tensor, branch: torch.Tensor) -> list[tuple[int, int, list[int]]]:
    """(row, column of the last token, prefix + branch tokens) of every branch."""
    found = []
    for row in range(len(ids)):
        for which in range(1, int(branch[row].max()) + 1):
            seen = (branch[row] == 0) | (branch[row] == which)
            found.append((row, int(seen.nonzero()[-1]), ids[row][seen].tolist()))
    return found


def _transformers_states(
    trainer: pretrain.Pretrainer, sequences: list[list[int]], patches: torch.Tensor
) -> torch.Tensor:
    size, width = trainer.vocabulary.size, max(map(len, sequences))
    pad = trainer.model.config.text_config.pad_token_id
    image_id = trainer.model.config.image_token_id
    ids = torch.tensor([[pad] * (width - len(s)) + [t if t < size else image_id for t in s] for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    slots = [(t - size) // 16 for s in sequences for t in s if t >= size and (t - size) % 16 == 0]
    pixels = patches[slots].view(-1, 3, 1, 64).expand(-1, -1, 2, -1).reshape(-1, 3 * 2 * 64)
    seen = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 8, 8]] * len(slots))} if slots else {}
    types = (ids == image_id).int()
    out = trainer.model.model(input_ids=ids, attention_mask=mask, mm_token_type_ids=types, **seen)
    return out.last_hidden_state[:, -1]


def test_branches_do_not_see_each_other() -> None:
    rows = Rows()
    placed = rows.add(text_chunk([1, 2]), [text_chunk([3]), text_chunk([4, 5])])
    assert [(place.start, place.end) for place in placed] == [(2, 3), (3, 5)]
    _, branch, positions = rows.tensors()
    seen = attention_bias(branch, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    assert positions[0, 0].tolist() == [0, 1, 2, 2, 3]


def test_a_picture_advances_positions_by_its_side() -> None:
    chunk = join(image_chunk(7, 8, 100), text_chunk([9]))
    assert chunk.positions[:, 1].tolist() == [1, 1, 1]
    assert chunk.positions[:, 16].tolist() == [1, 4, 4]
    assert chunk.positions[:, 17:].tolist() == [[5, 6]] * 3


def test_packed_texts_stay_within_the_limit() -> None:
    rows = Rows()
    placed = rows.add_packed([text_chunk([1] * 4), text_chunk([2] * 4), text_chunk([3] * 4)], limit=8)
    assert [(place.row, place.start, place.end) for place in placed] == [(0, 0, 4), (0, 4, 8), (1, 0, 4)]


def test_contrastive_loss_of_equal_embeddings_is_log_of_the_choices() -> None:
    """All similarities equal: each positive stands against the 6 candidates of other concepts, so log 7."""
    same = torch.ones(9, 4) / 2
    loss = contrastive_loss(same, same, np.repeat(np.arange(3), 2), temperature=0.05)
    assert math.isclose(float(loss), math.log(7), rel_tol=1e-5)


def test_order_loss_compares_within_a_list_only() -> None:
    margin = torch.tensor([1.0, 2.0, 0.0, 5.0, 1.0], requires_grad=True)
    labels = torch.tensor([True, False, False, True, True])  # the second list has no wrong candidate: nothing to say
    loss = order_loss(margin, labels, [("a", 0)] * 3 + [("b", 0)] * 2)
    wrong = math.log(math.exp(2) + math.exp(0))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(wrong - 1)) / 3)
    loss.backward()
    assert torch.isfinite(margin.grad).all() and (margin.grad[3:] == 0).all()


def test_a_grown_model_starts_as_the_checkpoint_it_grew_from(data: Path, tmp_path: Path) -> None:
    small = trainer_for(data, tmp_path / "small")
    small.save_model(tmp_path / "small" / "model")
    layers = small.model.config.get_text_config().num_hidden_layers
    grown = trainer_for(
        data, tmp_path / "grown", start=str(tmp_path / "small" / "model"), model=SMALL | {"layers": layers + 1}
    )
    assert len(grown.model.model.language_model.layers) == layers + 1
    concepts = np.arange(8)
    plan = plan_batch(small.vocabulary, small.neighbours, concepts, SHAPE, 1.0, small.rng)
    patches = small.pixels(pretrain_data.choose_pictures(concepts, small.of_concept, small.rng))
    with torch.no_grad():
        before, after = small.losses.embeddings(plan, patches), grown.losses.embeddings(plan, patches)
    assert torch.allclose(before, after, atol=0.02)  # what was saved is rounded to bfloat16
    grown.fill_neighbours()
    assert np.linalg.norm(grown.neighbours.picture[grown.drawn], axis=1).min() > 0.1


def test_growing_from_other_sizes_is_refused(data: Path, tmp_path: Path, trainer: pretrain.Pretrainer) -> None:
    trainer.save_model(tmp_path / "model")
    with pytest.raises(TrainingError, match="has shape .* here it is"):
        trainer_for(data, tmp_path / "other", start=str(tmp_path / "model"), model=SMALL | {"intermediate": 64})


def test_augmentation_keeps_range_and_colours_that_mean_something() -> None:
    pixels = torch.rand(32, 3, 64, 64)
    mixed = augment(pixels, torch.Generator().manual_seed(0))
    assert mixed.shape == pixels.shape and float(mixed.min()) >= 0 and float(mixed.max()) <= 1
    assert 0 < sum(torch.equal(a, b) for a, b in zip(mixed, pixels, strict=True)) < 16
    flat = torch.full((64, 3, 64, 64), 0.5)
    flat[:, 0] = 1.0  # pink, whose channel order a hue turn would change
    bound = augment(flat, torch.Generator().manual_seed(0), clean=0.0, colour_bound=torch.ones(64, dtype=torch.bool))
    assert (bound.mean((2, 3))[:, 0] + 1e-6 >= bound.mean((2, 3))[:, 1]).all()
    assert torch.equal(augment(pixels, torch.Generator(), strength=0.0), pixels)


def test_schedule_rises_and_ends_at_zero() -> None:
    assert pretrain.schedule(0.02, 0.02) == 1.0
    assert pretrain.schedule(0.01, 0.02) == 0.5
    assert pretrain.schedule(1.0, 0.02) == 0.0


def test_a_resumed_run_goes_on_exactly(data: Path, tmp_path: Path) -> None:
    whole = trainer_for(data, tmp_path / "whole", max_steps=6)
    losses = [whole.train_step()["judge"] for _ in range(6)]
    first = trainer_for(data, tmp_path / "first", max_steps=6)
    for _ in range(3):
        first.train_step()
    first.save_state(tmp_path / "state.pt")
    second = trainer_for(data, tmp_path / "second", max_steps=6)
    second.load_state(tmp_path / "state.pt")
    assert [second.train_step()["judge"] for _ in range(3)] == pytest.approx(losses[3:], abs=1e-5)


def test_a_state_of_another_model_is_refused(data: Path, tmp_path: Path, trainer: pretrain.Pretrainer) -> None:
    trainer.save_state(tmp_path / "state.pt")
    other = trainer_for(data, tmp_path / "other", model=SMALL | {"layers": 1})
    with pytest.raises(TrainingError, match="another model"):
        other.load_state(tmp_path / "state.pt")
    with pytest.raises(TrainingError, match="does not exist"):
        other.load_state(tmp_path / "none.pt")


def test_a_short_run_writes_a_loadable_model_and_learns(data: Path, tmp_path: Path) -> None:
    trainer = trainer_for(data, tmp_path / "out", max_steps=80, augmentation=0.0, dtype="bfloat16", seed=1)
    folder = trainer.run()
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 80 and log[-1]["caption"] < 0.6 * log[0]["caption"]
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [len(tokenizer.encode(word, add_special_tokens=False)) for word in ("Yes", "No", "1", "10")] == [1] * 4
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(images=[Image.new("RGB", (200, 200), "white")], return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 8, 8]]
