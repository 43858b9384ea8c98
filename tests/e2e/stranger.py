"""A stranger's corpus: two hundred captioned pictures as JSONL, some rows broken, and a config for it.

Drawn here, so that it shares nothing with the bundled corpus: coloured shapes with their descriptions.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "orange", "purple", "black", "grey", "pink", "brown", "cyan")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
BACKGROUNDS = ("white", "yellow", "lightblue", "beige")
NUM_BROKEN = 6
CORNERS = {
    "circle": lambda d, c: d.ellipse((20, 20, 76, 76), fill=c),
    "square": lambda d, c: d.rectangle((22, 22, 74, 74), fill=c),
    "triangle": lambda d, c: d.polygon([(48, 16), (80, 78), (16, 78)], fill=c),
    "cross": lambda d, c: (d.rectangle((40, 14, 56, 82), fill=c), d.rectangle((14, 40, 82, 56), fill=c)),
    "ring": lambda d, c: d.ellipse((20, 20, 76, 76), outline=c, width=12),
}


def write_corpus(folder: Path) -> Path:
    """200 rows (160 train, 40 test) of picture and caption, `NUM_BROKEN` of them unusable; returns the config path."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(200):
        colour, shape = COLOURS[number % 10], SHAPES[number // 10 % 5]
        ground = BACKGROUNDS[number // 50]
        name = f"images/{number:03d}.png"
        picture = Image.new("RGB", (96, 96), ground)
        CORNERS[shape](ImageDraw.Draw(picture), colour)
        picture.save(folder / name)
        caption = f"a {colour} {shape} on {ground}"
        rows.append({"id": number, "query_text": f"Find: {caption}", "pos_image": name, "pos_text": "Describe."})
    _break(rows, folder)
    train, test = [row for i, row in enumerate(rows) if i % 5], [row for i, row in enumerate(rows) if not i % 5]
    (folder / "train.jsonl").write_text("\n".join([*map(json.dumps, train), "{not json"]) + "\n")
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, test)) + "\n")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(_config(folder)))
    return config


def _break(rows: list[dict], folder: Path) -> None:
    rows[1]["pos_image"] = "images/absent.png"
    (folder / rows[2]["pos_image"]).write_bytes((folder / rows[2]["pos_image"]).read_bytes()[:60])
    (folder / rows[3]["pos_image"]).write_bytes(b"not a picture")
    rows[4]["query_text"] = ""
    rows[7]["query_text"] = 17


def _config(folder: Path) -> dict:
    training = {"steps": 4, "batch_queries": 8, "micro_batch_queries": 8, "cpus_per_worker": 1, "checkpoint_every": 2}
    return {
        "run": str(folder / "run"),
        "corpus": {
            "sources": [
                {"format": "jsonl", "path": str(folder / "train.jsonl"), "dataset": "shapes", "split": "train"},
                {"format": "jsonl", "path": str(folder / "test.jsonl"), "dataset": "shapes", "split": "test"},
            ]
        },
        "retrieve": {"top_k": 10},
        "embedders": {"mine": {**training, "num_negatives": 2}},
        "rerankers": {"reranker": {**training, "max_list_length": 4}},
        "evaluate": {"bootstrap_samples": 100},
    }
