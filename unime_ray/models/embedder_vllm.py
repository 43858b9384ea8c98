"""Items as unit vectors by vLLM: the last token's last hidden state, L2-normalised, as `embedder` computes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unime_ray.config import EmbedConfig
from unime_ray.config_vllm import VllmConfig
from unime_ray.errors import RejectedRow
from unime_ray.models.embedder import CheckedEmbedder, check_dimensions
from unime_ray.models.items import Item
from unime_ray.models.pixels import Picture
from unime_ray.models.tokens import Segment
from unime_ray.models.vllm_engine import EngineStats, Frontend, VllmEngine


class VllmEmbedder(CheckedEmbedder):
    """The vLLM engine beside `embedder.Embedder`, with the same methods."""

    def __init__(
        self,
        frontend: Frontend,
        settings: VllmConfig | None = None,
        *,
        dtype: str = "float32",
        dimensions: int | None = None,
    ) -> None:
        """Start the engine. `dimensions`: numbers of a vector to keep (Matryoshka).

        Raises:
            ModelError: vLLM is not installed or refuses the checkpoint, or its vectors have fewer dimensions.
        """
        self.frontend = frontend
        self.engine = VllmEngine(
            frontend,
            settings or VllmConfig(),
            dtype=dtype,
            runner="pooling",
            convert="embed",
            pooler_config={"seq_pooling_type": "LAST", "use_activation": False},
        )
        self.dimensions = check_dimensions(dimensions, self.engine.hidden_size, frontend.path)

    @classmethod
    def load(cls, config: EmbedConfig) -> VllmEmbedder:
        """The embedder a config describes.

        Raises:
            ModelError: as the constructor.
        """
        frontend = Frontend.load(config.model, config.revision, config.pixels)
        return cls(frontend, config.vllm, dtype=config.dtype, dimensions=config.dimensions)

    @property
    def stats(self) -> EngineStats:
        """Requests, prompt tokens and how many of them the prefix cache held."""
        return self.engine.stats

    def embed_checked(self, items: Sequence[Item]) -> tuple[np.ndarray, list[str | None]]:
        """Vectors (N, D) and each item's error or None; an item with an error has a zero vector.

        Raises:
            EngineDied: the engine stopped working.
        """
        pictures = self.frontend.pictures(items)
        made = [self._segment(item, picture) for item, picture in zip(items, pictures, strict=True)]
        rows = [row for row, segment in enumerate(made) if isinstance(segment, Segment)]
        outputs = self.engine.run([segment for segment in made if isinstance(segment, Segment)], self._params())
        vectors = np.zeros((len(items), self.dimensions), dtype=np.float32)
        for row, output in zip(rows, outputs, strict=True):
            vector = output.outputs.data.float().numpy()[: self.dimensions]
            vectors[row] = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return vectors, [segment.reason if isinstance(segment, RejectedRow) else None for segment in made]

    def _segment(self, item: Item, picture: Picture | RejectedRow | None) -> Segment | RejectedRow:
        if isinstance(picture, RejectedRow):
            return picture
        try:
            segment = self.frontend.family.segment(self.frontend.tokens, item, [] if picture is None else [picture])
        except RejectedRow as reason:
            return reason
        limit = self.engine.max_tokens
        if not len(segment):
            return RejectedRow("item is empty: no text and no picture")
        return (
            segment
            if len(segment) <= limit
            else RejectedRow(f"item has {len(segment)} tokens; the model's context is {limit}")
        )

    def _params(self) -> object:
        from vllm import PoolingParams

        return PoolingParams(task="embed", use_activation=False)
