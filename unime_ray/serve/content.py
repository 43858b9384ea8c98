"""Texts and pictures of a request as items the models take; whatever is wrong with them names its field."""

from __future__ import annotations

from unime_ray.config_serve import LimitsConfig
from unime_ray.corpus.payload import Item
from unime_ray.ids import image_id, item_id
from unime_ray.prompts import render
from unime_ray.serve.errors import ApiError, invalid
from unime_ray.serve.pictures import picture_bytes


def make_item(
    text: str | None,
    image: str | None,
    limits: LimitsConfig,
    text_param: str = "text",
    image_param: str = "image",
    instruction: str | None = None,
) -> Item:
    """One item. `text_param` and `image_param` are what errors call its fields (`documents[3].image`).

    Raises:
        ApiError: 422 (empty, too long, not Unicode, a marker without a picture, a bad picture) or 413.
    """
    check_text(text, text_param, limits)
    check_text(instruction, "instruction", limits)
    data = None if image is None else picture_bytes(image, image_param, limits)
    if data is None and not (text and text.strip()):
        raise invalid(text_param, "empty; give some text, or a picture in `image`", "empty")
    try:
        rendered = render(text, data is not None, instruction)
    except ValueError as error:
        raise invalid(text_param, str(error)) from error
    key = None if data is None else image_id(data)
    return Item(item_id(rendered, key), rendered, text, key, data)


def check_text(text: str | None, param: str, limits: LimitsConfig) -> None:
    """Raise ApiError unless `text` is Unicode of at most `max_text_chars`."""
    if text is None:
        return
    if len(text) > limits.max_text_chars:
        reason = f"{param}: {len(text)} characters; at most {limits.max_text_chars} are taken"
        raise ApiError(413, "text_too_long", reason, param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(param, f"not valid Unicode at character {error.start} (a lone surrogate)") from error
