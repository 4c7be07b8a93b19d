"""Segment LoRA against its base linear, against `peft`'s mixed batch, and against the two published
ways, forward and backward; writes tools/results/segment_lora.json.

    OMP_NUM_THREADS=2 python tools/bench_segment_lora.py
    python tools/bench_segment_lora.py --width 576 --rounds 9 --out here.json
    python tools/bench_segment_lora.py --dtypes fp32    # of a processor that has no bf16

    base            the frozen linear: output and input gradient
    segment         what this package adds to it, tasks of equal length (batched products)
    segment_ragged  the same, tasks of different lengths
    base+segment    the adapted linear, the low-rank part added in place
    peft            a LoRA layer of `peft` with a name of an adapter for each row (`adapter_names`)
    per_token_bmm   A and B repeated for every token, then batched products over tokens
    per_token_einsum  the same by einsum

`peft` runs its base linear itself, so its time stands beside `base+segment`; the published ways are
the low-rank part alone and stand beside `segment`. Before anything is timed, every way's output and
gradients of x, A and B are compared with fp64. All ways take one turn in each round, under the
allocator that a training takes.

Letters: T tasks, N packed tokens, I inputs of a linear, O outputs of a linear, R LoRA rank.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ship_ds.allocator import allocator_in_use, use_scalable_malloc
from ship_ds.model.adapters.segment_lora import LowRank
from ship_ds.model.adapters.segments import TaskEnds
from ship_ds.monitor.machine import describe_machine, versions

RESULTS = Path(__file__).parent / "results" / "segment_lora.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAPTED = ("segment", "segment_ragged", "per_token_bmm", "per_token_einsum")
"""The low-rank part alone; the others run the base linear too."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
Way = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_NI, a_TRI, b_TOR) -> (N, O)."""


class Case:
    """One problem: numbers, lengths of the tasks, and the ways to solve it."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        tasks, tokens, width, rank = args.tasks, args.tokens, args.width, args.rank
        self.dtype, self.num_tasks, self.even = dtype, tasks, [tokens // tasks] * tasks
        shares = torch.rand(tasks) + 0.5
        self.ragged = (shares / shares.sum() * tokens).int().tolist()
        self.ragged[-1] += tokens - sum(self.ragged)
        self.scaling = 0.5
        self.leaves = [
            (torch.randn(*shape) * spread).to(dtype).requires_grad_()
            for shape, spread in (
                ((tokens, width), 1),
                ((tasks, rank, width), width**-0.5),
                ((tasks, width, rank), rank**-0.5),
            )
        ]
        self.grad_NO = torch.randn(tokens, width).to(dtype)
        self.base = nn.Linear(width, width, bias=False).to(dtype).requires_grad_(False)
        self.peft_layer, self.names = self._peft_layer(rank, width)

    def _peft_layer(self, rank: int, width: int) -> tuple[Any, list[str]]:
        model = nn.ModuleDict({"linear": nn.Linear(width, width, bias=False).to(self.dtype)})
        model["linear"].weight = self.base.weight
        names = [f"task{t}" for t in range(self.num_tasks)]
        for name in names:
            config = LoraConfig(
                r=rank,
                lora_alpha=round(rank * self.scaling),
                target_modules=["linear"],
            )
            inject_adapter_in_model(config, model, adapter_name=name)
        layer: Any = model["linear"]
        layer.set_adapter(names)
        # `peft` takes adapter_names in evaluation mode alone; gradients flow all the same.
        model.eval()
        with torch.no_grad():
            for t, name in enumerate(names):
                layer.lora_A[name].weight.data = self.leaves[1][t].detach().clone()
                layer.lora_B[name].weight.data = self.leaves[2][t].detach().clone()
        return layer, names

    def ways(self) -> dict[str, Way]:
        """Every way to compute it, by name."""
        ends = TaskEnds(torch.tensor(self.ragged).cumsum(0).to(torch.int32))
        task_N = torch.arange(self.num_tasks).repeat_interleave(self.even[0])
        scaling, base = self.scaling, self.base

        def per_token_bmm(x: Tensor, a_TRI: Tensor, b_TOR: Tensor) -> Tensor:
            a_NRI, b_NOR = a_TRI[task_N], b_TOR[task_N]
            return torch.bmm(b_NOR, torch.bmm(a_NRI, x[..., None]))[..., 0] * scaling

        def per_token_einsum(x: Tensor, a_TRI: Tensor, b_TOR: Tensor) -> Tensor:
            low = torch.einsum("nri,ni->nr", a_TRI[task_N], x)
            return torch.einsum("nor,nr->no", b_TOR[task_N], low) * scaling

        return {
            "base": lambda x, a, b: base(x),
            "segment": lambda x, a, b: LowRank(a, b, scaling).delta(x),
            "segment_ragged": lambda x, a, b: LowRank(a, b, scaling, ends).delta(x),
            "base+segment": lambda x, a, b: LowRank(a, b, scaling).add_to(base(x), x),
            "peft": lambda x, a, b: self._peft(x),
            "per_token_bmm": per_token_bmm,
            "per_token_einsum": per_token_einsum,
        }

    def _peft(self, x_NI: Tensor) -> Tensor:
        rows = x_NI.unflatten(0, (self.num_tasks, -1))
        out: Tensor = self.peft_layer(rows, adapter_names=self.names)
        return out.flatten(0, 1)

    def run(self, name: str, way: Way) -> list[Tensor]:
        """The output and the gradients of whatever the way trains."""
        x, a_TRI, b_TOR = self.leaves
        out = way(x, a_TRI, b_TOR)
        if name == "base":
            return [out, *torch.autograd.grad(out, [x], self.grad_NO)]
        if name != "peft":
            return [out, *torch.autograd.grad(out, self.leaves, self.grad_NO)]
        layer, names = self.peft_layer, self.names
        weights = [half[name].weight for half in (layer.lora_A, layer.lora_B) for name in names]
        grad_x, *others = torch.autograd.grad(out, [x, *weights], self.grad_NO)
        halves = others[: self.num_tasks], others[self.num_tasks :]
        return [out, grad_x, *map(torch.stack, halves)]

    def exact(self, name: str) -> list[Tensor]:
        """What `run` should give, in fp64, task by task."""
        x, a_TRI, b_TOR = (leaf.detach().double().requires_grad_() for leaf in self.leaves)
        lengths = self.ragged if name == "segment_ragged" else self.even
        parts = zip(x.split(lengths), a_TRI, b_TOR, strict=True)
        out = torch.cat([self.scaling * (part @ a.T @ b.T) for part, a, b in parts])
        if name not in ADAPTED:
            out = x @ self.base.weight.double().T + (0 if name == "base" else out)
        wanted = [x] if name == "base" else [x, a_TRI, b_TOR]
        return [out, *torch.autograd.grad(out, wanted, self.grad_NO.double())]

    def error(self, name: str, way: Way) -> float:
        """The largest relative error of output and gradients. Stops where it is no rounding."""
        pairs = zip(self.run(name, way), self.exact(name), strict=True)
        error = max(float((one.double() - two).norm() / two.norm()) for one, two in pairs)
        if not error < TOLERANCES[self.dtype]:
            raise SystemExit(f"{name}: relative error {error:.1e} in {self.dtype}")
        return error


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, minimum and quartiles in milliseconds."""
    milliseconds = sorted(1e3 * one for one in seconds)
    first, middle, third = statistics.quantiles(milliseconds, n=4, method="inclusive")
    names = ("median_ms", "min_ms", "quartile1_ms", "quartile3_ms")
    values = (middle, milliseconds[0], first, third)
    return {name: round(value, 3) for name, value in zip(names, values, strict=True)}


def measure(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Errors, times and ratios in one dtype; a ratio is the median of each round's."""
    case = Case(args, dtype)
    ways = case.ways()
    errors = {name: float(f"{case.error(name, way):.1e}") for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            case.run(name, way)
            seconds[name].append(time.perf_counter() - start)

    def ratio(one: str, other: str) -> float:
        pairs = zip(seconds[one], seconds[other], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "largest_relative_error_to_fp64": errors,
        "times": {name: spread(times) for name, times in seconds.items()},
        "ratios": {
            "segment / base": ratio("segment", "base"),
            "segment_ragged / base": ratio("segment_ragged", "base"),
            "base+segment / base": ratio("base+segment", "base"),
            "peft / base+segment": ratio("peft", "base+segment"),
            "per_token_bmm / segment": ratio("per_token_bmm", "segment"),
            "per_token_einsum / segment": ratio("per_token_einsum", "segment"),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of the tasks")
    parser.add_argument("--width", type=int, default=1024, help="inputs and outputs of the linear")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    names = ("tasks", "tokens", "width", "rank", "rounds")
    row = {
        "command": " ".join(["python", *sys.argv]),
        "machine": describe_machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "malloc": allocator_in_use(),
        **{name: getattr(args, name) for name in names},
        **{name: measure(args, DTYPES[name]) for name in args.dtypes},
    }
    args.out.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    # The allocator that a training takes.
    use_scalable_malloc()
    main()
