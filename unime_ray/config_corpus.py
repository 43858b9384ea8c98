"""The sections `corpus` and `duplicates` of a config: which files, what pictures may come in, what is the same."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unime_ray.sections import Count, Fraction, Positive, Section

Format = Literal[
    "parquet",
    "jsonl",
    "csv",
    "unime_json",
    "webdataset",
    "mmeb_train",
    "mmeb_eval",
    "hf_dataset",
    "coco",
    "flickr30k",
]
CAPTION_FORMATS = ("webdataset", "coco", "flickr30k")
MMEB_FORMATS = ("mmeb_train", "mmeb_eval")


class Columns(Section):
    """Which column of a source holds what. None: the source has no such column (missing defaults are fine).

    A pairs source has a query and a positive side; a pool source has only the item side.
    """

    query_text: str | None = "query_text"
    query_image: str | None = "query_image"
    query_instruction: str | None = "query_instruction"
    pos_text: str | None = "pos_text"
    pos_image: str | None = "pos_image"
    pos_instruction: str | None = "pos_instruction"
    text: str | None = "text"
    image: str | None = "image"
    instruction: str | None = "instruction"
    id: str | None = "id"
    dataset: str | None = "dataset"
    split: str | None = "split"
    relevance: str | None = "relevance"


class Source(Section):
    """One file, folder or glob of the corpus."""

    format: Format
    path: str
    role: Literal["pairs", "pool"] = "pairs"
    """`pairs` rows hold a query with its positive; `pool` rows hold one item that may be retrieved."""
    image_root: str | None = None
    """Folder that relative picture paths start from (default: the folder of the file)."""
    dataset: str | None = None
    """Name of the dataset for rows that name none themselves (default: the file's stem)."""
    split: str = "train"
    """`train` rows are mined and trained on; every other split is only evaluated."""
    meta_task: str | None = None
    query_instruction: str | None = None
    """Put before the query's text when the row has no instruction of its own."""
    pos_instruction: str | None = None
    direction: Literal["i2t", "t2i", "both"] | None = None
    """Caption formats: pictures search captions, captions search pictures, or (default) both, as the datasets
    `<dataset>_i2t` and `<dataset>_t2i`."""
    columns: Columns = Columns()

    @model_validator(mode="after")
    def _fits_its_format(self) -> Source:
        if self.direction is not None and self.format not in CAPTION_FORMATS:
            raise ValueError(f"`direction` belongs to {', '.join(CAPTION_FORMATS)}; format `{self.format}` has none")
        if self.role == "pool" and self.format in MMEB_FORMATS:
            raise ValueError(f"format `{self.format}` holds queries; `role: pool` cannot read it")
        if self.format == "mmeb_eval" and self.split == "train":
            raise ValueError("format `mmeb_eval` holds evaluation rows; set `split: test`")
        return self


class ImagePolicy(Section):
    """What pictures may come in and how a model gets them. Sizes in pixels."""

    max_source_pixels: Count = 64_000_000
    """Decompression-bomb limit: a larger picture is rejected before it is decoded."""
    max_source_bytes: Count = 50_000_000
    min_side: Count = 2
    store_max_pixels: int | None = None
    """Re-encode larger pictures to this many pixels at ingest (None: keep the bytes as they came)."""


class CorpusConfig(Section):
    sources: tuple[Source, ...] = ()
    image: ImagePolicy = ImagePolicy()
    max_error_rate: Fraction = 0.05
    max_text_chars: Count = 20_000
    rows_per_task: Count = 512


class DuplicatesConfig(Section):
    """Near-duplicates: found between embed and retrieve if `methods` names any; off by default."""

    methods: tuple[Literal["phash", "embedding"], ...] = ()
    """`phash`: pictures by perceptual hash. `embedding`: items of one kind (text, picture, both) by cosine."""
    max_hamming: Annotated[int, Field(ge=0, le=16)] = 8
    """Bits of 64 in which the hashes of two pictures may differ."""
    max_color: Annotated[int, Field(ge=0, le=255)] = 24
    """Levels of 255 by which any part of the two may differ in any color: the hash alone sees no color."""
    min_cosine: Annotated[float, Field(gt=0.0, le=1.0)] = 0.98
    leak: Literal["drop", "warn"] = "warn"
    """Training items with a picture whose group, or self, is held out: left out of mining, or only counted."""
    rows_per_task: Count = 512
    num_cpus: Positive = 1.0
