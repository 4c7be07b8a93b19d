"""The adapted linear's low-rank part over task-major tokens: two grouped products, never one
adapter copy per token.

Letters: T tasks, R LoRA rank, I inputs of a linear, O outputs of a linear, N packed tokens.
"""

import torch
from torch import Tensor

_ALIGNMENT_BYTES = 16
"""grouped_mm wants rows in multiples of this."""


def segment_lora(x: Tensor, a_TRI: Tensor, b_TOR: Tensor, offsets: Tensor | None) -> Tensor:
    """B A x for x (..., I) whose tokens lie task after task; the result is (..., O).

    offsets: None when every task has equally many tokens, else (T,) int32 ends of the tasks' token
    ranges.
    """
    a_TRI, b_TOR = a_TRI.to(x.dtype), b_TOR.to(x.dtype)
    if offsets is None:
        x_TNI = x.reshape(a_TRI.shape[0], -1, x.shape[-1])
        low_TNR = torch.bmm(x_TNI, a_TRI.transpose(1, 2))
        return torch.bmm(low_TNR, b_TOR.transpose(1, 2)).reshape(*x.shape[:-1], b_TOR.shape[1])
    multiple = _ALIGNMENT_BYTES // x.element_size()
    missing = -a_TRI.shape[1] % multiple
    if missing:
        a_TRI = torch.nn.functional.pad(a_TRI, (0, 0, 0, missing))
        b_TOR = torch.nn.functional.pad(b_TOR, (0, missing))
    x_NI = x.reshape(-1, x.shape[-1])
    low_NR = torch.nn.functional.grouped_mm(x_NI, a_TRI.transpose(1, 2), offs=offsets)
    out_NO = torch.nn.functional.grouped_mm(low_NR, b_TOR.transpose(1, 2), offs=offsets)
    return out_NO.reshape(*x.shape[:-1], b_TOR.shape[1])
