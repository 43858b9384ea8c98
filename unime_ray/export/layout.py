"""The small files with which sentence-transformers (6 and later) and vLLM recognise an embedder or a reranker.

Only those libraries' own modules are named in them, so nothing of ours has to be trusted or installed to load an
export. What they are told is what `models/embedder.py` and `models/judge_transformers.py` compute: raw text without a
chat turn, the last token's last hidden state, L2-normalised; and the difference of the Yes and No logits.

Their chat templates replace the checkpoint's own in the exported folder: a message's parts are laid into the text
exactly as `prompts.render` lays an item's, a picture as its tokens and a newline.
"""

from __future__ import annotations

import json
from typing import Any

from unime_ray.prompts import CANDIDATE_SLOT, JUDGE_INSTRUCTION, QUERY_SLOT

QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
PICTURE_TOKENS = {"qwen2_vl": QWEN_PICTURE, "qwen2_5_vl": QWEN_PICTURE, "qwen3_vl": QWEN_PICTURE}
"""What each family's processor expands to a picture's tokens."""

TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
NORMALIZE = "sentence_transformers.base.modules.normalize.Normalize"
LOGIT_SCORE = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"

_PARTS = (
    "{% macro laid(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ 'PICTURE\n' }}{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
)


def embedder_template(picture: str) -> str:
    """A chat template without turns: the parts of a message are what the embedder sees, nothing more."""
    return _parts(picture) + "{% for message in messages %}{{ laid(message['content']) }}{% endfor %}"


def pair_template(picture: str, before: str, after: str, otherwise: str) -> str:
    """The judge's prompt around a message of role `query` and one of role `document`.

    `before` and `after` are what the checkpoint's own chat template, `otherwise`, puts around a user's turn; messages
    of other roles go through it as ever, so the folder remains a judge and a reranker for us.
    """
    head, tail = _quoted(before + JUDGE_INSTRUCTION), _quoted(after)
    asked = "{% for m in messages if m['role'] == 'query' %}{{ laid(m['content']) }}{% endfor %}"
    offered = "{% for m in messages if m['role'] == 'document' %}{{ laid(m['content']) }}{% endfor %}"
    pair = f"{_parts(picture)}{head}{_quoted(QUERY_SLOT)}{asked}{_quoted(CANDIDATE_SLOT)}{offered}{tail}"
    return f"{{% if messages[0]['role'] == 'query' %}}{pair}{{% else %}}{otherwise}{{% endif %}}"


def embedder_files(dim: int) -> dict[str, str]:
    """Path to text of what makes a Hugging Face folder a sentence-transformers embedder of width `dim`."""
    modules = [("", TRANSFORMER), ("1_Pooling", POOLING), ("2_Normalize", NORMALIZE)]
    return _json_files(
        {
            "modules.json": _modules(modules),
            "sentence_bert_config.json": _transformer("feature-extraction", "last_hidden_state", "token_embeddings"),
            "config_sentence_transformers.json": {
                "model_type": "SentenceTransformer",
                "prompts": {"query": "", "document": ""},
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            },
            "1_Pooling/config.json": {
                "embedding_dimension": dim,
                "pooling_mode": "lasttoken",
                "include_prompt": True,
            },
            "2_Normalize/config.json": {},
        }
    )


def cross_encoder_files(yes: int, no: int) -> dict[str, str]:
    """The same for a reranker that answers with the token `yes` or `no`: its score is sigmoid(logit_yes - logit_no)."""
    return _json_files(
        {
            "modules.json": _modules([("", TRANSFORMER), ("1_LogitScore", LOGIT_SCORE)]),
            "sentence_bert_config.json": _transformer("any-to-any", "logits", "causal_logits"),
            "config_sentence_transformers.json": {
                "model_type": "CrossEncoder",
                "activation_fn": "torch.nn.modules.activation.Sigmoid",
                "prompts": {},
                "default_prompt_name": None,
            },
            "1_LogitScore/config.json": {"true_token_id": yes, "false_token_id": no},
        }
    )


def _parts(picture: str) -> str:
    return _PARTS.replace("PICTURE", picture)


def _quoted(text: str) -> str:
    """`text` as a Jinja expression: a bare newline after a block would be trimmed, and braces be read."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"


def _modules(parts: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(parts)]


def _transformer(task: str, output: str, name: str) -> dict[str, Any]:
    forward = {"method": "forward", "method_output_name": output}
    return {
        "transformer_task": task,
        "modality_config": {
            "text": forward,
            "image": forward,
            "image+text": forward,
            "message": forward | {"format": "structured"},
        },
        "module_output_name": name,
        # One padded batch: laying rows end to end without padding has no M-RoPE positions.
        "unpad_inputs": False,
    }


def _json_files(files: dict[str, Any]) -> dict[str, str]:
    return {path: json.dumps(value, indent=2) + "\n" for path, value in files.items()}
