"""What a query costs against the length of its instruction: as an adapter, and in the prompt;
writes tools/results/query_cost.json.

    python tools/bench_query_cost.py                                # the embedded default
    python tools/bench_query_cost.py --base bases/smollm2           # a model of `ship-ds base`

A query is a question of a few words and an answer of a fixed number of tokens, one row at a time.
Three ways, in turn, round after round:

- `adapter`: the question alone, under the adapter. It was made before, once: `deduce_once`, which
  is the encoder over the instruction and the hypernetwork.
- `prompt`: the instruction's tokens stand before the question's.
- `prompt_kept`: the same, where a server keeps the instruction's keys and values (prefix caching);
  `prefill_once` makes them.

The weights of SHIP's own parts are random: what they cost does not depend on what they learnt, and
nothing is said here of how good the answers are. First of all, answers are compared with those of
transformers' own model in fp64, under the adapter with B A added to its weights. FLOPs are torch's
own count; reading the instruction has to cost what the formula of ship_ds/flops.py says.

Letters: E sequences, V vocabulary, S padded length.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from ship_ds.config import base_folder, load_config
from ship_ds.console import log
from ship_ds.files import write_json
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.batch import TokenBatch
from ship_ds.model.ship import ShipModel
from ship_ds.monitor.machine import describe_machine, versions
from ship_ds.placement import choose_device, choose_dtype
from ship_ds.runtime import ranks

RESULTS = Path(__file__).parent / "results" / "query_cost.json"
LENGTHS = (16, 64, 256, 1024, 4096)
TOLERANCE = 1e-3
"""Largest difference of a logit from fp64's, as a share of the largest logit, in fp32."""


def build(base: str, rank: int, device: torch.device, dtype: torch.dtype) -> ShipModel:
    """SHIP with three roles of one base, plain weights, and heads that make adapters which act."""
    roles = [f"model.{role}.base={base}" for role in ("task_llm", "encoder", "decoder")]
    config = load_config(
        "natural-instructions",
        [*roles, "model.task_llm.quantisation=none", f"model.hypernetwork.rank={rank}"],
    )
    torch.manual_seed(0)
    model = build_ship(config.model, LoadedWeights(dtype, "auto", device)).to(device).eval()
    for name, parameter in model.named_parameters():
        if ".to_b." in name:
            torch.nn.init.normal_(parameter, std=0.02)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


class Ways:
    """The ways to put a query, each a function that answers it once."""

    def __init__(self, model: ShipModel, stock: Any, num_new: int, num_tokens: int) -> None:
        self.model, self.stock, self.num_new = model, stock, num_new
        generator = torch.Generator().manual_seed(num_tokens)
        vocabulary = stock.config.vocab_size
        self.instruction = torch.randint(10, vocabulary, (num_tokens,), generator=generator)
        self.question = list(model.question("Paris is the capital of which country?"))
        self.flops: dict[str, int] = {}
        """Of each way, counted while it warms up."""
        self.adapter = self.count("deduce_once", self.deduce_once)
        self.cache = self.count("prefill_once", self.prefill_once)

    def count(self, name: str, work: Callable[[], Any]) -> Any:
        """What the work returns; its FLOPs are put down."""
        # The counter knows no fused attention of a CPU; the products of the plain one it sees.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = work()
        self.flops[name] = int(counter.get_total_flops())
        return result

    def prefill_flops(self) -> int:
        """By the formula: of a forward over the instruction, with the logits of its end."""
        size, num_tokens = self.model.flop_size().task_llm, len(self.instruction)
        attention = 4 * size.attention * num_tokens**2
        return 2 * num_tokens * size.blocks.total + attention + 2 * size.output

    def batch(self, ids: Sequence[int]) -> TokenBatch:
        return TokenBatch.build([list(ids)], None, self.model.prompts.pad_id, 0, self.model.device)

    def stream(self, adapter: Adapter | None, ids: Sequence[int]) -> None:
        stream = self.model.task_llm.stream(adapter, self.batch(ids))
        stream.reserve(self.num_new - 1)
        for _ in range(self.num_new - 1):
            stream.advance(stream.logits_EV.argmax(-1))

    def deduce_once(self) -> Adapter:
        mean_TZ, *_ = self.model.encoder(self.batch(self.instruction.tolist()))
        return self.model.adapt(mean_TZ)

    def prefill_once(self) -> DynamicCache:
        cache = DynamicCache(config=self.stock.config)
        ids_ES = self.instruction[None].to(self.model.device)
        self.stock(ids_ES, past_key_values=cache, logits_to_keep=1)
        return cache

    def under_adapter(self) -> None:
        self.stream(self.adapter, self.question)

    def prompt(self) -> None:
        self.stream(None, [*self.instruction.tolist(), *self.question])

    def prompt_kept(self, cache: DynamicCache) -> None:
        ids_ES = torch.tensor([self.question], device=self.model.device)
        for _ in range(self.num_new):
            logits_V = self.stock(ids_ES, past_key_values=cache, logits_to_keep=1).logits[0, -1]
            ids_ES = logits_V.argmax()[None, None]


def reference(base: str, adapter: Any, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Last logits (V) of transformers' own model in fp64: bare, and with the adapter's update added
    to its weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(base_folder(base), dtype=torch.float64)
    ids_ES = torch.tensor([list(ids)])
    bare_V = model(ids_ES, logits_to_keep=1).logits[0, -1]
    for path, (a, b) in adapter.factors.items():
        update = b[0].double().cpu() @ a[0].double().cpu()
        model.get_submodule(path).weight += adapter.scaling * update
    return bare_V, model(ids_ES, logits_to_keep=1).logits[0, -1]


def check(base: str, ways: Ways, dtype: torch.dtype) -> dict[str, float]:
    """How far our logits are from fp64's, as a share of the largest; raises where it is too far."""
    bare_V, adapted_V = reference(base, ways.adapter, ways.question)
    shares = {}
    for name, adapter, expected_V in (
        ("prompt", None, bare_V),
        ("adapter", ways.adapter, adapted_V),
    ):
        stream = ways.model.task_llm.stream(adapter, ways.batch(ways.question))
        difference = (stream.logits_EV[0].double().cpu() - expected_V).abs().max()
        shares[name] = float(difference / expected_V.abs().max())
    effect = float((adapted_V - bare_V).abs().max() / adapted_V.abs().max())
    allowed = TOLERANCE if dtype == torch.float32 else 0.05
    if max(shares.values()) > allowed or effect < 10 * shares["adapter"]:
        raise SystemExit(f"wrong logits: {shares}, effect of the adapter {effect}")
    return {**shares, "effect_of_the_adapter": effect}


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(ways: Ways, rounds: int) -> dict[str, Any]:
    """Median, least and most seconds, and FLOPs, of each way."""

    def kept() -> Callable[[], None]:
        cache = copy.deepcopy(ways.cache)  # a query lengthens it; copying is not part of one
        return lambda: ways.prompt_kept(cache)

    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "adapter": lambda: ways.under_adapter,
        "prompt": lambda: ways.prompt,
        "prompt_kept": kept,
        "deduce_once": lambda: ways.deduce_once,
        "prefill_once": lambda: ways.prefill_once,
    }
    for name in makers.keys() - ways.flops.keys():
        ways.count(name, makers[name]())
    if ways.flops["prefill_once"] != ways.prefill_flops():
        raise SystemExit(f"FLOPs: {ways.flops['prefill_once']}, not {ways.prefill_flops()}")
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            times[name].append(seconds_of(make(), ways.model.device))
    return {
        name: {
            "seconds": statistics.median(times[name]),
            "least": min(times[name]),
            "most": max(times[name]),
            "rounds": rounds,
            "flops": ways.flops[name],
        }
        for name in makers
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    ranks.quiet_libraries()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    with torch.no_grad():
        model = build(args.base, args.rank, device, dtype)
        stock: Any = AutoModelForCausalLM.from_pretrained(base_folder(args.base), dtype=dtype)
        stock = stock.to(device).eval()
        room = stock.config.max_position_embeddings - args.new_tokens - 64
        ways = Ways(model, stock, args.new_tokens, 16)
        correctness = check(args.base, ways, dtype)
        rows = {}
        for length in [length for length in args.lengths if length <= room]:
            ways = Ways(model, stock, args.new_tokens, length)
            rows[str(length)] = measure(ways, args.rounds)
            log(
                f"{length} tokens: "
                + ", ".join(
                    f"{name} {one['seconds']:.3f} s" for name, one in rows[str(length)].items()
                )
            )
    name = "embedded" if args.base == "embedded" else stock.config.name_or_path.rpartition("/")[2]
    report = json.loads(args.out.read_text()) if args.out.is_file() else {}
    # Lengths may be measured in several goes, the longest by themselves.
    earlier = report.get(name, {}).get("by_instruction_tokens", {})
    report[name] = {
        "machine": describe_machine(),
        "versions": versions(),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in stock.parameters()),
        "question_tokens": len(ways.question),
        "new_tokens": args.new_tokens,
        "lora_rank": args.rank,
        "longest_instruction": room,
        "difference_from_fp64": correctness,
        "by_instruction_tokens": earlier | rows,
    }
    write_json(args.out, report, indent=2)
    print(args.out)


if __name__ == "__main__":
    main()
