"""Flickr30k in its three files: Karpathy's JSON (COCO has one too), `results_20130124.token`, and the CSV of captions.

    dataset_flickr30k.json    {"images": [{"filename", "split", "sentences": [{"raw"}, ...]}, ...]}
    *.token                   1000092795.jpg#0<tab>Two young guys ...
    *.csv                     image,caption, or image_name| comment_number| comment, with a header

Pictures lie under `image_root`. A row is a picture, in the order of the file; lines that cannot be read are refused
under numbers after the last picture. The JSON's own splits (`restval` is training data) win over the source's, unless
`columns: {split: null}`.
"""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from unime_ray.corpus.captions import Captioned, CaptionReader, read_object, read_whole, stamp
from unime_ray.errors import CorpusError

PICTURE_COLUMNS = ("image", "image_name", "filename")
CAPTION_COLUMNS = ("caption", "comment", "raw")
TRAINING = {"restval": "train"}

Line = tuple[int, str | None, str]
"""Line number, picture or None if the line cannot be read, caption."""


def load(file: str) -> Sequence[Captioned]:
    """Every picture of the file with its captions.

    Raises:
        CorpusError: the file has none of the three layouts.
    """
    return _load(file, stamp(file))


READER = CaptionReader(load)


@functools.lru_cache(maxsize=2)
def _load(file: str, _stamp: tuple[int, int]) -> Sequence[Captioned]:
    name = file.partition("?")[0].lower()
    if name.endswith(".json"):
        return _karpathy(file)
    try:
        text = read_whole(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file}: not valid UTF-8 at byte {error.start}") from error
    return _grouped(_token_lines(text) if name.endswith(".token") else _csv_lines(text, file))


def _karpathy(file: str) -> list[Captioned]:
    images = read_object(file, "an annotation file holds one, with `images`").get("images")
    if not isinstance(images, list):
        raise CorpusError(f"{file}: no list `images`; expected Karpathy's dataset_flickr30k.json")
    return [_karpathy_entry(image, place) for place, image in enumerate(images, 1)]


def _karpathy_entry(image: Any, place: int) -> Captioned:
    sentences = image.get("sentences") if isinstance(image, dict) else None
    name = image.get("filename") if isinstance(image, dict) else None
    if not isinstance(name, str) or not isinstance(sentences, list):
        return Captioned("", (), str(place), problem=f"entry {place} has no `filename` with `sentences`")
    captions = [one.get("raw") if isinstance(one, dict) else one for one in sentences]
    path = f"{image['filepath']}/{name}" if image.get("filepath") else name
    split = image.get("split")
    return Captioned(path, captions, name, split=TRAINING.get(split, split) if isinstance(split, str) else None)


def _token_lines(text: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), 1):  # a caption may hold what `splitlines` takes for a line's end
        if line.strip():
            name, tab, caption = line.partition("\t")
            yield number, name.rpartition("#")[0] if tab and "#" in name else None, caption


def _csv_lines(text: str, file: str) -> Iterator[Line]:
    delimiter = "|" if "|" in text.partition("\n")[0] else ","
    lines = io.StringIO(text, newline="")
    # The file with bars quotes nothing, and its captions hold quotation marks.
    reader = csv.reader(lines, delimiter="|", quoting=csv.QUOTE_NONE) if delimiter == "|" else csv.reader(lines)
    header = [name.strip() for name in next(reader, [])]
    places = [next((header.index(one) for one in names if one in header), None) for names in _KINDS]
    if places[0] is None or places[1] is None:
        raise CorpusError(f"{file}: the header has no column of pictures and captions, such as `image,caption`")
    try:
        for fields in reader:
            if fields:
                good = len(fields) == len(header)
                yield reader.line_num, fields[places[0]] if good else None, fields[places[1]] if good else ""
    except csv.Error as error:
        raise CorpusError(f"{file}: not valid CSV after line {reader.line_num}: {error}") from error


_KINDS = (PICTURE_COLUMNS, CAPTION_COLUMNS)


def _grouped(lines: Iterable[Line]) -> list[Captioned]:
    """Pictures with all their captions, in the order of their first, then the lines that cannot be read."""
    captions: dict[str, list[str]] = {}
    bad = []
    for number, name, caption in lines:
        if name is None or not name.strip():
            reason = f"line {number} does not hold a picture and its caption"
            bad.append(Captioned("", (), str(number), problem=reason))
        else:
            captions.setdefault(name.strip(), []).append(caption)
    return [Captioned(name, found, name) for name, found in captions.items()] + bad
