"""A larger cache of picture features for vLLM, whose own holds no more tokens than one forward pass.

vLLM loads this class by name when an engine is started with `encoder_cache_tokens`; nothing else imports this module.
"""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager


class SizedEncoderCache(EncoderCacheManager):
    """vLLM's cache with room for `manager_config["tokens"]` picture tokens, if that is more than it would have."""

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: VllmConfig) -> SizedEncoderCache:
        return cls(max(cache_size, vllm_config.ec_manager_config.manager_config["tokens"]))
