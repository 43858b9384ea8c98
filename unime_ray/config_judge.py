"""The `judges` section of a config."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from unime_ray.config_vllm import VllmConfig
from unime_ray.sections import Count, Fraction, PixelBudget, Positive, Resources, Section

VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class ServerConfig(Section):
    """Where an OpenAI-compatible server is and how it is used. The key itself never stands in a config."""

    base_url: str
    """Up to and with `/v1`."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key, on every node that judges; None sends no key."""
    concurrency: Count = 32
    """Requests in flight of one actor."""
    timeout: Positive = 120.0
    """Seconds a request may take."""
    attempts: Count = 5
    retry_seconds: Annotated[float, Field(ge=0.0)] = 1.0
    """Wait before the second attempt; doubled for each one after it."""
    top_logprobs: Annotated[int, Field(ge=2)] = 20
    """Tokens whose log-probabilities are asked for; OpenAI's own limit is 20."""

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("base_url must be an address such as http://localhost:8000/v1")
        if parts.username is not None or parts.password is not None or parts.query:
            raise ValueError(
                "base_url holds a user, a password or a query, which the manifest would show; put the key into an "
                "environment variable and name it in `api_key_env`"
            )
        return value

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not VARIABLE_NAME.fullmatch(value):
            raise ValueError("api_key_env is the name of an environment variable, not the key itself")
        return value


class JudgeConfig(Section):
    """A judge: a vision-language model here or behind a server, or an oracle that reads a truth table."""

    engine: Literal["transformers", "vllm", "openai", "oracle"] = "transformers"
    model: str = "tiny"
    """A checkpoint; for engine `openai` the name that the server knows it by."""
    revision: str | None = None
    """For engine `openai` whatever tells the server's weights apart; scores of another revision are not reused."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    prompt: Literal["unime_v2", "qwen3_vl_reranker"] = "unime_v2"
    """How the question is put: UniME-V2's words, or those that Qwen3-VL-Reranker checkpoints were trained with."""
    instruction: str | None = None
    """What `qwen3_vl_reranker` says of the task (default: the checkpoints' own)."""
    prompt_order: Literal["query_first", "candidate_first"] = "query_first"
    repetition_penalty: Annotated[float, Field(ge=1.0)] = 1.0
    """1.05 divides the logits of both answers as the published scores had it; 1.0 leaves them alone."""
    share_prefix: bool = True
    batch_tokens: Count = 16384
    queries_per_batch: Count = 32
    pixels: PixelBudget = PixelBudget()
    server: ServerConfig | None = None
    """Engine `openai` only."""
    truth: str | None = None
    """Oracle: folder with `truth.parquet` and `truth_items.parquet`."""
    noise_auc: Annotated[float, Field(gt=0.5, le=1.0)] = 1.0
    """Oracle: noise its scores until its AUC is this (1.0: no noise)."""
    cache: str | None = None
    """Folder (or `s3://`) of scores shared with other runs: known pairs are not judged again, new ones are added."""
    calibration: Literal["none", "platt", "isotonic"] = "none"
    """Turn scores into probabilities before select, fitted on `calibration_labels`."""
    calibration_labels: str | None = None
    """A truth folder, or a table (Parquet, CSV, JSONL) with `query_id`, `candidate_id` in hex and `relevant`.
    None: the declared positives against the mined candidates, hidden positives among these included."""
    calibrate: Literal["both", "selection", "targets"] = "both"
    """Where calibrated scores stand: in the false-negative filter, in the targets of training, or in both."""
    max_error_rate: Fraction = 0.05
    vllm: VllmConfig = VllmConfig()
    canary: str | None = None
    """Folder with reference scores that every actor's engine is held to (default: `canaries` in the run)."""
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _engine_has_what_it_needs(self) -> JudgeConfig:
        if self.engine == "oracle" and not self.truth:
            raise ValueError("engine `oracle` needs `truth`: the folder with truth.parquet and truth_items.parquet")
        if self.engine == "openai" and self.server is None:
            raise ValueError("engine `openai` needs `server: {base_url: http://host:port/v1}`")
        if self.server is not None and self.engine != "openai":
            raise ValueError(f"`server` is for engine `openai`; this judge's engine is `{self.engine}`")
        if self.engine == "openai" and self.repetition_penalty != 1.0:
            raise ValueError(
                "engine `openai`: repetition_penalty needs logits, and a server returns log-probabilities; set it to "
                "1.0, or use the engine `transformers`"
            )
        return self

    @model_validator(mode="after")
    def _options_belong_together(self) -> JudgeConfig:
        if self.instruction is not None and self.prompt != "qwen3_vl_reranker":
            raise ValueError(
                f"`instruction` is for prompt `qwen3_vl_reranker`; prompt `{self.prompt}` has its own words"
            )
        if self.calibration_labels is not None and self.calibration == "none":
            raise ValueError("`calibration_labels` without a calibration: set `calibration: platt` or `isotonic`")
        return self
