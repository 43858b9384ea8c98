"""A run's trained models as folders that other libraries load: transformers, sentence-transformers, vLLM.

`folder` copies and writes, `layout` knows the other libraries' small files, `card` fills the model card.
"""

from unime_ray.export.folder import export_run

__all__ = ["export_run"]
