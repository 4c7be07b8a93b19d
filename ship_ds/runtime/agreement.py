"""What the ranks agree on at a step boundary, in one reduction of one flat tensor.

Each reduction costs a round over the network, which at a thousand ranks takes as long as a good
part of the step. So the losses of the step that ends, the counts of the step that begins, the stop
flag and the time of training travel together, on the engine's device.

Letters: X other letters flattened.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ship_ds.runtime import ranks


@dataclass(frozen=True)
class Agreement:
    """The same on every rank.

    is_asked_to_stop: whether any rank is. seconds: of training so far, the mean over ranks. counts:
    of the step to come, summed over ranks. sums: of the step before it, summed over ranks, float64
    (X,) on the CPU; empty before the first step.
    """

    is_asked_to_stop: bool
    seconds: float
    counts: list[float]
    sums: Tensor


def agree(
    is_asked_to_stop: bool, seconds: float, counts: Sequence[float], sums: Tensor
) -> Agreement:
    """Reduce this rank's part of an agreement; every rank calls it at the same boundary.

    Args:
        is_asked_to_stop: whether this rank is.
        seconds: of training so far by this rank's clock.
        counts: of the step to come, known on the host.
        sums: any vector (X,) of the step before, on the engine's device.
    """
    on_host = torch.tensor([float(is_asked_to_stop), seconds, *counts], dtype=torch.float64)
    flat = torch.cat([on_host.to(sums.device, non_blocking=True), sums.double()])
    agreed = ranks.sum_over_ranks(flat).cpu()
    num_asked, seconds_of_all = agreed[:2].tolist()
    end = 2 + len(counts)
    return Agreement(
        num_asked > 0,
        seconds_of_all / ranks.world_size(),
        agreed[2:end].tolist(),
        agreed[end:],
    )
