"""What a step costs the host: SHIP of 30 narrow Llama blocks in each role (SmolLM2's number), whose
products take next to nothing. Where a GPU is quicker than its host, this is what a step costs.

    python tools/bench_host.py           # writes tools/results/host.json; one CPU core, two minutes

Each layout in turn, on one process and thread, ZeRO-2 in bf16, the Task LLM in NF4: the operations
of a step that are no views and do something, by a TorchDispatchMode, and the seconds of the same
step in rounds in which the layouts take turns. `decoder apart` switches the one pass of a shared
base off, as it is under ZeRO-3.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ship_ds.config import base_folder, load_config
from ship_ds.monitor.machine import describe_machine, versions
from ship_ds.runtime import ranks
from ship_ds.train import Trainer

RESULTS = Path(__file__).parent / "results" / "host.json"
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 30,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 266,
    "tie_word_embeddings": True,
}
LORA = "tuning: {kind: lora, rank: 16, dropout: 0}"
SHARED = (
    "model.backbone=shared",
    f"model.encoder={{quantisation: nf4, {LORA}}}",
    f"model.decoder={{quantisation: nf4, {LORA}, max_examples: 2}}",
)
LAYOUTS: dict[str, tuple[str, ...]] = {
    "separate bases": (f"model.encoder={{{LORA}}}", f"model.decoder={{{LORA}, max_examples: 2}}"),
    "one base, decoder apart": SHARED,
    "one base, one pass": SHARED,
}
_NOTHING_TO_DO = {
    *("view", "_unsafe_view", "_reshape_alias", "transpose", "t", "permute", "expand", "alias"),
    *("select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind", "as_strided"),
    *("unsqueeze", "squeeze", "detach", "lift_fresh", "empty", "empty_like", "empty_strided"),
    *("new_empty", "new_empty_strided", "set_", "resize_", "is_pinned", "_local_scalar_dense"),
}
"""Operations that read and write no numbers."""


class Counted(TorchDispatchMode):
    """Operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def number(self) -> int:
        """Without those that do nothing."""
        return sum(count for name, count in self.names.items() if name not in _NOTHING_TO_DO)


class Layout:
    """A trainer and the batches of its first step, which it takes again and again."""

    def __init__(self, name: str, base: Path, folder: Path) -> None:
        self.name = name
        settings = [
            f"run.folder={folder / name.replace(' ', '-')}",
            f"model.task_llm.base={base}",
            "model.hypernetwork={kind: lora, rank: 8, width: 128}",
            "training.deepspeed=zero2_bf16",
            "training.tasks_per_step=4",
            *LAYOUTS[name],
        ]
        self.trainer = Trainer(load_config("quickstart-smoke", settings))
        if "apart" in name:
            self.trainer.model.plans_shards = True
        self.batches = self.trainer.make_batches(0)
        self.counts = self.trainer.count(self.batches)

    def forward_and_backward(self) -> None:
        self.trainer.losses_and_gradients(self.batches, self.counts)

    def step(self) -> None:
        self.trainer.engine.step()

    def count(self) -> dict[str, int]:
        """Operations of a step's two halves."""
        found = {}
        halves: dict[str, Callable[[], None]] = {
            "forward and backward": self.forward_and_backward,
            "engine's step": self.step,
        }
        for name, run in halves.items():
            with Counted() as counted:
                run()
            found[name] = counted.number
        return found

    def seconds(self) -> float:
        """Of a step."""
        start = time.perf_counter()
        self.forward_and_backward()
        self.step()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected 1 or more")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        LlamaForCausalLM(LlamaConfig.from_dict(SHAPE)).save_pretrained(base)
        AutoTokenizer.from_pretrained(base_folder("embedded")).save_pretrained(base)
        layouts = [Layout(one, base, Path(name)) for one in LAYOUTS]
        for layout in layouts:
            layout.seconds()
        operations = {layout.name: layout.count() for layout in layouts}
        taken: dict[str, list[float]] = {layout.name: [] for layout in layouts}
        for _ in range(args.rounds):
            for layout in layouts:
                taken[layout.name].append(layout.seconds())
    report = {
        "command": "python tools/bench_host.py",
        "machine": describe_machine(),
        "versions": versions(),
        "operations": operations,
        "seconds": {
            one: {
                "median": round(statistics.median(values), 3),
                "min": round(min(values), 3),
                "max": round(max(values), 3),
            }
            for one, values in taken.items()
        },
        "one pass over apart, by rounds": round(_ratio(taken), 3),
        "rounds": args.rounds,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    ranks.exit_process(0)


def _ratio(taken: dict[str, list[float]]) -> float:
    """Median of the quotients within a round."""
    pairs = zip(taken["one base, one pass"], taken["one base, decoder apart"], strict=True)
    return statistics.median(one / apart for one, apart in pairs)


if __name__ == "__main__":
    main()
