"""How one vLLM engine is started. None leaves a choice to vLLM or to the engine's own default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from unime_ray.sections import Count, Section


class VllmConfig(Section):
    """Read by the engine `vllm` of `embed` and of a judge. Several engines on one node are several actors."""

    tensor_parallel_size: Count = 1
    """GPUs that share one engine; the stage's `resources.num_gpus` must be as many."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Share of a GPU's memory that the engine takes, weights and key-value cache together."""
    cpu_cache_gib: Count = 1
    """Key-value cache of an engine on a CPU."""
    max_model_len: int | None = None
    """Shorten the context (a smaller cache then holds more prompts); longer prompts become errors of their pairs."""
    max_num_batched_tokens: Count = 8192
    """Tokens of one forward pass."""
    max_num_seqs: Count = 256
    block_size: int | None = None
    """Tokens a block of the key-value cache holds; prefixes are shared in whole blocks (a CPU's default here: 32)."""
    cache_blocks: int | None = None
    """Blocks of the key-value cache (None: as many as memory allows)."""
    encoder_cache_tokens: int | None = None
    """Picture tokens whose features are kept across requests (None: `max_num_batched_tokens`)."""
    prefix_caching: bool = True
    enforce_eager: bool = True
    """One prefill a pair and no decoding: there is little for CUDA graphs to speed up, and starting is quicker."""
    head: Literal["classify", "logits"] | None = None
    """How a judge reads Yes and No: a head of two rows, or the whole language head (None: `classify`, or `logits` if
    the model is split over GPUs)."""
    in_process: bool = True
    """The engine runs inside the actor and gets pixels by reference; False: in a process of its own."""
