"""Models that can be planned with by name, since their shapes are public; no weights are needed.

    ship-ds plan --config pretrain-7b --shapes llama-2-7b

Imports no torch, so that a mistyped name is told at once.
"""

from collections.abc import Mapping
from typing import Any

from ship_ds.config import Config, override_config
from ship_ds.errors import UserError
from ship_ds.runtime.preflight import check_base, check_stacks

_ROLES = ("encoder", "decoder", "task_llm")


def _shape(
    model_type: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    **others: Any,
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **others,
    }


PUBLIC_SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": _shape("llama", 4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": _shape("llama", 5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": _shape("llama", 8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": _shape("llama", 4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": _shape("llama", 8192, 28672, 80, 64, 8, 128256),
    "mistral-7b": _shape("mistral", 4096, 14336, 32, 32, 8, 32000),
    "qwen2.5-7b": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064, tie_word_embeddings=False),
}
"""As in the config.json that each model is published with."""
WAY_OUT = f"or plan with --shapes and one of {', '.join(PUBLIC_SHAPES)}"


def with_shapes(config: Config, name: str) -> Config:
    """The config with a public shape in place of the Task LLM's base, and of every base that is the
    same one.

    Raises:
        UserError: there is no such shape.
    """
    if name not in PUBLIC_SHAPES:
        raise UserError(f"--shapes {name}: unknown; known are {', '.join(PUBLIC_SHAPES)}")
    model = config.model
    same = [role for role in _ROLES if getattr(model, role).base == model.task_llm.base]
    return override_config(config, [f"model.{role}.base={name}" for role in same])


def check_planned_bases(config: Config) -> None:
    """Every base is a public shape, or a folder with a config.json.

    Raises:
        UserError: one is neither; the message says how to plan without it.
    """
    for role in _ROLES:
        base = getattr(config.model, role).base
        try:
            if base not in PUBLIC_SHAPES:
                check_base(f"model.{role}.base", base, shapes_alone=True)
        except UserError as error:
            raise UserError(f"{error}; {WAY_OUT}") from None
    check_stacks(config.model, PUBLIC_SHAPES)
