"""What parameters are called, where an earlier version called them otherwise.

0.1.0 trained the LoRA of encoder and decoder through `peft`, inside the language model:

    encoder.lm.model.layers.0.self_attn.q_proj.lora_A.default.weight      in 0.1.0's files
    encoder.adapter.model.layers.0.self_attn.q_proj.lora_a.weight         now

The order of the parameters is the same.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_BY_PEFT = re.compile(r"(encoder|decoder)\.lm\.(.+)\.lora_([AB])\.default\.weight")


def current_name(name: str) -> str:
    """What a parameter of a file is called now; most names have not changed."""
    by_peft = _BY_PEFT.fullmatch(name)
    if by_peft is None:
        return name
    role, path, half = by_peft.groups()
    return f"{role}.adapter.{path}.lora_{half.lower()}.weight"


def by_current_name(values: Mapping[str, Value]) -> dict[str, Value]:
    """The same values in the same order, by the names of now."""
    return {current_name(name): value for name, value in values.items()}
