"""bitsandbytes, imported without torch's inductor; whoever needs it takes it from here.

As it is imported, bitsandbytes 0.50 gives five functions of its backend without kernels to
torch.compile, which loads inductor: a second of every start of every rank, and of every verb, for
functions that nobody here calls (NF4 has kernels on CPUs and on CUDA).
"""

import sys
from collections.abc import Callable
from typing import Any

import torch


def _as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """What torch.compile returns, uncompiled."""
    return _as_it_is if function is None else function


_compile = torch.compile
# In vLLM, whose plugin this package has, others may use those functions, and compile meanwhile.
if "vllm" not in sys.modules:
    torch.compile = _as_it_is  # type: ignore[assignment]
try:
    import bitsandbytes
finally:
    torch.compile = _compile

__all__ = ["bitsandbytes"]
