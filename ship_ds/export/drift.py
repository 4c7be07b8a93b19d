"""How far a merged model's logits are from the live model's: the adapter on the base it was trained
on.

The adapter folder was proved equal to the live hypernetwork when it was written, so `peft` on that
base stands for it here.
"""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch

from ship_ds.export.proof import PeftBase, largest_difference
from ship_ds.model.backbone import load_lm
from ship_ds.origin import read_origin


def drift(merged: Path, adapter: Path, base: Path) -> dict[str, Any]:
    """Over the adapter's probes: the largest logit difference from the live model, the same over
    the adapter's own effect, and how many of all next tokens are the same. Both models are held
    whole, one after the other."""
    origin, cpu = read_origin(adapter), torch.device("cpu")
    trained_on = PeftBase(load_lm(str(base), origin.quantisation, torch.float32, device=cpu), cpu)  # type: ignore[arg-type]
    live, bare = trained_on.under(adapter, origin.probes), trained_on.bare(origin.probes)
    del trained_on
    out = PeftBase(_in_fp32(load_lm(str(merged), "none", torch.float32, device=cpu)), cpu).bare(
        origin.probes
    )
    from_live, effect = largest_difference(out, live), largest_difference(live, bare)
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(out, live, strict=True)])
    return {
        "logit_drift": from_live,
        "adapter_effect": effect,
        "drift_of_effect": from_live / effect,
        "same_next_token": float(same.float().mean()),
    }


def _in_fp32(model: torch.nn.Module) -> torch.nn.Module:
    """NF4 weights that a file says are for 16-bit arithmetic, computed in fp32, so that only
    weights differ."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight: Any = module.weight
            module.compute_dtype = weight.quant_state.dtype = torch.float32
    return model


def show(report: dict[str, Any]) -> str:
    """One line for people."""
    line = (
        f"logits differ from the live model's by {report['logit_drift']:.2g}, "
        f"{100 * report['drift_of_effect']:.1f} % of what "
        f"the adapter does; {100 * report['same_next_token']:.0f} % of next tokens are the same"
    )
    lost = report.get("rounding_error_of_update")
    return (
        line if lost is None else f"{line}; NF4 rounding is {100 * lost:.0f} % of the update's norm"
    )
