"""How far a merged model's logits are from the live model's: the adapter on the base it was trained
on.

The adapter folder was proved equal to the live hypernetwork when it was written, so `peft` on that
base stands for it here.
"""

from pathlib import Path
from typing import Any, cast

import torch

from ship_ds.export.proof import PeftBase, largest_difference
from ship_ds.model.bitsandbytes_import import bitsandbytes
from ship_ds.model.loading import Quantisation, load_lm
from ship_ds.origin import read_origin


def drift(merged: Path, adapter: Path, base: Path) -> dict[str, Any]:
    """Measure over the adapter's probes; both models are held whole, one after the other.

    Args:
        merged: The merged model's folder, with what stands before the prompt, if the adapter has
            such a part, in a folder in it.
        adapter: The adapter's, one of ours.
        base: The base model's.

    Returns:
        `logit_drift`, the largest difference from the live model's logits; `adapter_effect`, that
        of the live model's from the bare base's; `drift_of_effect`, the one over the other; and
        `same_next_token`, the share of positions with the same likeliest next token.
    """
    origin, cpu = read_origin(adapter), torch.device("cpu")
    quantisation = cast(Quantisation, origin.quantisation)
    trained_on = PeftBase(load_lm(str(base), quantisation, torch.float32, device=cpu), cpu)
    live = trained_on.under(origin.paths(adapter), origin.probes)
    bare = trained_on.bare(origin.probes)
    # Two models of the size of the base would be in memory at once.
    del trained_on
    result = PeftBase(load_merged(merged), cpu)
    around = [merged / name for name in origin.folders[1:]]
    out = result.under(around, origin.probes) if around else result.bare(origin.probes)
    from_live, effect = largest_difference(out, live), largest_difference(live, bare)
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(out, live, strict=True)])
    return {
        "logit_drift": from_live,
        "adapter_effect": effect,
        "drift_of_effect": from_live / effect,
        "same_next_token": float(same.float().mean()),
    }


def load_merged(folder: Path) -> torch.nn.Module:
    """A merged model in fp32 on the CPU; NF4 weights that a file says are for 16-bit arithmetic are
    computed in it, too, so that only weights differ."""
    model: torch.nn.Module = load_lm(str(folder), "none", torch.float32, device=torch.device("cpu"))
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight: Any = module.weight
            module.compute_dtype = weight.quant_state.dtype = torch.float32
    return model


def drift_line(report: dict[str, Any]) -> str:
    """One line for people about what `drift` and the merge measured."""
    line = (
        f"logits differ from the live model's by {report['logit_drift']:.2g}, "
        f"{100 * report['drift_of_effect']:.1f} % of what "
        f"the adapter does; {100 * report['same_next_token']:.0f} % of next tokens are the same"
    )
    lost = report.get("rounding_error_of_update")
    return (
        line if lost is None else f"{line}; NF4 rounding is {100 * lost:.0f} % of the update's norm"
    )


def drift_warning(report: dict[str, Any]) -> str:
    """One line about a merge into other weights than those that training saw, with the way out."""
    share = report.get("drift_of_effect")
    lost = "part of" if share is None else f"as much as {100 * share:.0f} % of"
    return (
        "training saw the base in NF4, and the base's own weights are others: the merged model "
        f"strays by {lost} what the adapter does; --target dequantised keeps what was learnt"
    )
