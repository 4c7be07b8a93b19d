"""A SHIP step on one CUDA GPU: is it right, how fast is it, what does it hold and wait for.

    python tools/bench_gpu.py                            # every part; writes tools/results/gpu.json
    python tools/bench_gpu.py --parts segment_lora --out here.json

Weights are random and nothing is downloaded. Each part runs in a process of its own under a time
limit, so that one that fails costs none of the others; what it printed stands in its place. Parts
that the file holds already, of the same card and versions, stay.

    limits        the rates of a large matrix product and of a large copy
    segment_lora  products of T adapters against the base linear, forward and backward
    ship_1b       SHIP of three 1B Llamas in bf16: packed against padded, memory against the planner
    ship_8b_nf4   the same of three 8B Llamas in NF4, the Task LLM's blocks recomputed
    elementwise   norms, rotary embeddings and SwiGLU: eager, compiled, and torch's own norm
    lora_8b       the recipe of that name on random weights: its step at two sizes, and adapters
    adapter_8b    what adapters of the seven projections cost an 8B Task LLM; decoding
    trainer_*     the smoke recipe under DeepSpeed, on the GPU and, to compare losses, without it
    trainer_moves the same from the CPU to the GPU and back, by its checkpoints
    lora_8b_24gb  the recipe of that name through the trainer, an evaluation and the report
                  included, on a random base of 16 GB of files and within 23 GB of this GPU

Times are medians over rounds in which the variants take turns, with the smallest and the largest.
Without CUDA it says so in one line and measures nothing.

Letters: T tasks, N packed tokens, R LoRA rank, I inputs of a linear, O outputs of a linear.
"""

import argparse
import datetime
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig

from ship_ds.config import load_config
from ship_ds.flops import flops_of_parts, peak_of
from ship_ds.model import elementwise
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.adapters.segment_lora import LowRank
from ship_ds.model.adapters.segments import TaskEnds
from ship_ds.model.adapters.sites import wrap_sites
from ship_ds.model.assemble import build_ship
from ship_ds.model.attention import SDPA, VARLEN
from ship_ds.model.batch import TokenBatch
from ship_ds.model.language_model import auto_class
from ship_ds.model.lean_modules import make_lean
from ship_ds.model.loading import freeze
from ship_ds.model.nf4 import Nf4, pieces_of
from ship_ds.model.nf4_linear import use_nf4_linears
from ship_ds.model.ship import ShipModel
from ship_ds.model.sizes import step_rows
from ship_ds.model.step import ShipBatch
from ship_ds.model.streaming import empty_nf4_lm
from ship_ds.model.task_llm import TaskLlm
from ship_ds.monitor.machine import describe_machine, versions
from ship_ds.planner.activations import Workload, count_activations, planned_batch
from ship_ds.planner.shapes import Shapes, build_shapes

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "gpu.json"
TINY_LM = REPOSITORY / "ship_ds" / "assets" / "tiny_lm"
LLAMA_1B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
LLAMA_8B: dict[str, Any] = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
LAYOUTS = ("packed", "padded", "padded_sdpa")
"""Of a batch: packed and padded by torch's variable-length kernel, padded by SDPA."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
TRAINER_SECONDS = 200
"""One run of the trainer may take."""

# ---- measuring

_kept_in: Path | None = None
"""Where a part's process keeps what it has found so far."""


def keep(found: Mapping[str, Any]) -> None:
    """Save what a part has found, so that its time limit costs no more than what comes after."""
    if _kept_in is not None:
        _kept_in.write_text(json.dumps(found))


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], times: int = 1) -> float:
    synchronise()
    start = time.perf_counter()
    for _ in range(times):
        run()
    synchronise()
    return (time.perf_counter() - start) / times


def take_turns(
    variants: Mapping[str, Callable[[], Any]], rounds: int, times: int = 1
) -> dict[str, dict[str, float]]:
    """Milliseconds of each variant, run one after another in every round; two rounds warm up."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 2):
        for name, run in variants.items():
            taken = seconds(run, times)
            if round_ >= 2:
                samples[name].append(1e3 * taken)
    return {
        name: {
            "median_ms": round(statistics.median(values), 3),
            "min_ms": round(min(values), 3),
            "max_ms": round(max(values), 3),
            "rounds": len(values),
        }
        for name, values in samples.items()
    }


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that `run` holds beyond what was there before."""
    synchronise()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronise()
    return torch.cuda.max_memory_allocated() - before


def waits(run: Callable[[], Any]) -> dict[str, int]:
    """Places where the host waits for the GPU -> how often, by torch's own check."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{'/'.join(Path(one.filename).parts[-3:])}:{one.lineno}"
        for one in caught
        if "synchroni" in str(one.message)
    )
    return dict(places.most_common())


def profiled(run: Callable[[], Any], top: int = 12) -> dict[str, Any]:
    """One run's kernels: number, the share of time in which none ran, and the longest by name."""
    from torch.profiler import ProfilerActivity, profile

    run()
    synchronise()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        run()
        synchronise()
    kernels = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in record.events()
        if event.device_type.name == "CUDA" and event.time_range.end > 0
    ]
    kernels.sort()
    busy, reached = 0.0, kernels[0][0]
    by_name: Counter[str] = Counter()
    for start, end, name in kernels:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
        by_name[name[:90]] += end - start
    span, total = reached - kernels[0][0], sum(by_name.values())
    return {
        "kernels": len(kernels),
        "span_ms": round(span / 1e3, 2),
        "busy_ms": round(busy / 1e3, 2),
        "idle_percent": round(100 * (1 - busy / span), 1),
        "top": {name: round(100 * taken / total, 1) for name, taken in by_name.most_common(top)},
    }


# ---- random models and batches


def _random_(tensor: Tensor) -> Tensor:
    return tensor.fill_(1.0) if tensor.dim() == 1 else tensor.normal_(std=0.02)


@torch.no_grad()
def random_lm(
    settings: Any,
    quantisation: str,
    dtype: torch.dtype,
    device: torch.device,
    way: elementwise.ElementwiseMode = "eager",
) -> Any:
    """A causal LM of random weights, made where it runs; its linears in NF4 where asked."""
    if way == "compiled":
        elementwise.compile_all(device, dtype)
    if quantisation == "none":
        with torch.device(device):
            lm = auto_class(settings).from_config(settings, dtype=dtype, attn_implementation=VARLEN)
        for parameter in lm.parameters():
            _random_(parameter)
        return make_lean(lm, way).eval()
    lm = empty_nf4_lm(settings, dtype, VARLEN)
    for module in lm.modules():
        for name, empty in list(module._parameters.items()):
            if empty is None:
                continue
            values = _random_(torch.empty(empty.shape, dtype=dtype, device=device))
            filled: nn.Parameter = nn.Parameter(values, requires_grad=False)
            if hasattr(empty, "quant_state"):
                pieces = pieces_of(values, torch.float32, device)
                filled = Nf4.of(empty.shape, dtype, pieces, device).parameter(empty)
            module._parameters[name] = filled
    lm.tie_weights()
    use_nf4_linears(lm, device, "random")
    return make_lean(lm, way).eval()


@dataclass(frozen=True)
class RandomWeights:
    """See assemble.Weights."""

    dtype: torch.dtype
    device: torch.device
    way: elementwise.ElementwiseMode = "eager"

    def language_model(self, base: str, quantisation: str, sharded: bool) -> nn.Module:
        lm: nn.Module = random_lm(
            AutoConfig.from_pretrained(base), quantisation, self.dtype, self.device, self.way
        )
        return lm

    def prompts(self, base: str, system_message: str | None) -> None:
        """Batches of random ids need no tokenizer."""

    def shards(self, config: Any) -> bool:
        return False


def model_config(shape: Mapping[str, Any], quantisation: str, folder: Path) -> Any:
    """The `model` section: three roles on one base, LoRA of rank 16 on all seven projections."""
    AutoConfig.for_model(**shape).save_pretrained(folder)
    tuned = [
        f"model.{role}.{setting}"
        for role in ("encoder", "decoder")
        for setting in ("tuning.kind=lora", f"tuning.rank={RANK}", f"quantisation={quantisation}")
    ]
    return load_config(
        "quickstart",
        [
            f"model.task_llm.base={folder}",
            f"model.task_llm.quantisation={quantisation}",
            "model.task_llm.checkpointing=true",
            "model.latent_size=4096",
            f"model.hypernetwork.rank={RANK}",
            "model.hypernetwork.width=128",
            *tuned,
        ],
    ).model


@torch.no_grad()
def random_ship(config: Any, dtype: torch.dtype, device: torch.device) -> ShipModel:
    """All of SHIP in one dtype, as the engine casts it: parameters alone, buffers as they are."""
    ship = build_ship(config, RandomWeights(dtype, device, config.elementwise)).to(device)
    for parameter in ship.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    # B starts at zero, which would hide a wrong adapter.
    for path, parameter in ship.hypernetwork.named_parameters():
        if ".to_b." in path:
            parameter.normal_(std=0.02)
    return ship.train()


def random_rows(
    count: int, shortest: int, longest: int, vocabulary: int, draw: random.Random
) -> list[list[int]]:
    return [
        [draw.randrange(2, vocabulary) for _ in range(draw.randint(shortest, longest))]
        for _ in range(count)
    ]


def random_batch(ship: ShipModel, tasks: int, examples: int, seed: int = 0) -> ShipBatch:
    """A micro-batch of random ids whose rows are 256 to 512 tokens long, instructions 32 to 128."""
    draw, device = random.Random(seed), ship.device
    vocabulary = ship.task_llm.language_model.vocabulary_size
    rows = tasks * examples
    return ShipBatch(
        TokenBatch.build(random_rows(tasks, 32, 128, vocabulary, draw), None, 0, 0, device),
        TokenBatch.build(
            random_rows(rows, 224, 448, vocabulary, draw),
            random_rows(rows, 32, 64, vocabulary, draw),
            0,
            ship.num_virtual_tokens,
            device,
        ),
        TokenBatch.build(
            random_rows(tasks, 216, 376, vocabulary, draw),
            random_rows(tasks, 32, 128, vocabulary, draw),
            0,
            ship.config.decoder.num_soft_tokens,
            device,
        ),
        torch.ones(tasks, dtype=torch.bool, device=device),
        torch.randn(
            tasks, ship.config.latent_size, generator=torch.Generator().manual_seed(seed)
        ).to(device),
        torch.ones(tasks, device=device),
    )


def take_step(ship: ShipModel, batch: ShipBatch) -> Tensor:
    loss = sum(ship(batch).objectives.values()) / batch.answers.num_targets
    loss.backward()
    return loss.detach()


def settings_of(port: Any) -> Any:
    """The transformers config behind a port: this bench alone switches layouts of a built model."""
    return port.module.config


def lay_out(ship: ShipModel, layout: str) -> None:
    """Choose one of LAYOUTS."""
    for role in (ship.task_llm, ship.encoder, ship.decoder):
        settings_of(role.language_model)._attn_implementation = (
            SDPA if layout == "padded_sdpa" else VARLEN
        )
    # The instance's own value hides the class's.
    ship.hypernetwork.packs = layout == "packed"  # type: ignore[misc]


def _step_in(layout: str, ship: ShipModel, batch: ShipBatch) -> Tensor:
    lay_out(ship, layout)
    return take_step(ship, batch)


# ---- parts


def limits(rounds: int, device: torch.device) -> dict[str, Any]:
    """What this card gives at best, here and now: the ceilings that other figures are read by."""
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**30, device=device)
    target = torch.empty_like(source)
    times = take_turns({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds, 5)
    return {
        "bf16_product_tflops": round(2 * size**3 / times["product"]["median_ms"] / 1e9, 1),
        "copy_gb_per_second": round(2 * source.nbytes / times["copy"]["median_ms"] / 1e6, 1),
    }


def segment_lora_part(rounds: int, device: torch.device) -> dict[str, Any]:
    """R 16, 4096 x 4096, 16 tasks over 16k tokens; a frozen base linear beside it."""
    return {
        f"{num_tasks} tasks, {num_tokens} tokens, {width} wide": _segment_case(
            num_tasks, num_tokens, width, rounds, device
        )
        for num_tasks, num_tokens, width in (
            (16, 16384, 4096),
            (1, 16384, 4096),
            (64, 16384, 4096),
            (16, 2048, 4096),
        )
    }


def _segment_case(
    num_tasks: int, num_tokens: int, width: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    weight_OI, x_NI = draw(width, width) / width**0.5, draw(num_tokens, width).requires_grad_()
    a_TRI = (draw(num_tasks, RANK, width) / width**0.5).requires_grad_()
    b_TOR = (draw(num_tasks, width, RANK) / RANK**0.5).requires_grad_()
    gradient_NO = draw(num_tokens, width)
    shares = [random.Random(t).uniform(0.5, 1.5) for t in range(num_tasks)]
    lengths = [int(num_tokens * share / sum(shares)) for share in shares]
    lengths[-1] += num_tokens - sum(lengths)
    ends = TaskEnds(torch.tensor(lengths, device=device).cumsum(0).to(torch.int32))
    even = [num_tokens // num_tasks] * num_tasks

    def base(x: Tensor) -> Tensor:
        return x @ weight_OI.T

    def run(forward: Callable[[], Tensor]) -> None:
        forward().backward(gradient_NO)

    equal, ragged = LowRank(a_TRI, b_TOR, 1.0), LowRank(a_TRI, b_TOR, 1.0, ends)
    errors = {}
    for name, low_rank, parts in (("bmm", equal, even), ("grouped_mm", ragged, lengths)):
        leaves = [leaf.detach().requires_grad_() for leaf in (x_NI, a_TRI, b_TOR)]
        out = LowRank(leaves[1], leaves[2], 1.0, low_rank.ends).delta(leaves[0])
        ours = [out, *torch.autograd.grad(out, leaves, gradient_NO)]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        reference = torch.cat(
            [x @ a.T @ b.T for x, a, b in zip(exact[0].split(parts), *exact[1:], strict=True)]
        )
        expected = [
            reference,
            *torch.autograd.grad(reference, exact, gradient_NO.double()),
        ]
        errors[name] = max(relative_error(o, e) for o, e in zip(ours, expected, strict=True))
    times = take_turns(
        {
            "base": lambda: run(lambda: base(x_NI)),
            "bmm": lambda: run(lambda: equal.delta(x_NI)),
            "grouped_mm": lambda: run(lambda: ragged.delta(x_NI)),
            "base + bmm": lambda: run(lambda: equal.add_to(base(x_NI), x_NI)),
            "base + grouped_mm": lambda: run(lambda: ragged.add_to(base(x_NI), x_NI)),
        },
        rounds,
        10,
    )
    return {
        "largest_relative_error_to_float64": errors,
        "times": times,
        "ratio_to_base": {
            name: round(one["median_ms"] / times["base"]["median_ms"], 3)
            for name, one in times.items()
        },
    }


def ship_1b(rounds: int, device: torch.device) -> dict[str, Any]:
    return _ship_part(LLAMA_1B, "none", 8, 8, rounds, device)


def ship_8b_nf4(rounds: int, device: torch.device) -> dict[str, Any]:
    return _ship_part(LLAMA_8B, "nf4", 8, 4, rounds, device)


def _ship_part(
    shape: Mapping[str, Any],
    quantisation: str,
    tasks: int,
    examples: int,
    rounds: int,
    device: torch.device,
) -> dict[str, Any]:
    torch.manual_seed(0)
    found: dict[str, Any] = {"tasks": tasks, "examples_per_task": examples}
    with tempfile.TemporaryDirectory() as name:
        config = model_config(shape, quantisation, Path(name))
        ship = random_ship(config, torch.bfloat16, device)
        planned = build_shapes(config, torch.bfloat16)
    found["weights"] = _weights(planned)
    batch = random_batch(ship, tasks, examples)
    found["tokens"] = _tokens(batch)
    found["correct"] = _packed_is_padded(ship, random_batch(ship, 2, 2))
    steps = {layout: partial(_step_in, layout, ship, batch) for layout in LAYOUTS}
    for step in steps.values():
        step()
    found["waits_for_the_gpu"] = {name: waits(step) for name, step in steps.items()}
    found["peak_bytes_of_a_step"] = {name: peak_bytes(step) for name, step in steps.items()}
    times = take_turns(steps, rounds)
    flops = _model_flops(ship, batch)
    found["times"] = times
    keep(found)
    for one in times.values():
        one["tokens_per_second"] = round(1e3 * batch.num_tokens / one["median_ms"])
        one["model_tflops"] = round(flops / one["median_ms"] / 1e9, 1)
    found["profile_packed"] = profiled(steps["packed"])
    found["against_the_planner"] = _against_the_planner(ship, planned, config)
    return found


def _weights(planned: Shapes) -> dict[str, int]:
    """Bytes that the planner counts for the weights, and those of this process."""
    weights = [weight for part in planned.parts for weight in planned.weights(part)]
    return {
        "planned_bytes": sum(
            weight.stored_bytes(2) + weight.quant_state_bytes for weight in weights
        ),
        "allocated_bytes": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
        "trained": sum(weight.numel for weight in weights if weight.is_trained),
    }


def _tokens(batch: ShipBatch) -> dict[str, int]:
    parts = {"encoder": batch.instructions, "task LLM": batch.answers, "decoder": batch.decoded}
    counts = {name: part.num_tokens for name, part in parts.items()}
    return counts | {
        "all": batch.num_tokens,
        "all, with padding": sum(part.ids_ES.numel() for part in parts.values()),
        "labels": batch.answers.num_targets + batch.decoded.num_targets,
    }


def _packed_is_padded(ship: ShipModel, batch: ShipBatch) -> dict[str, Any]:
    """Loss, the Task LLM's logits and the hypernetwork's gradients, each layout against padded
    SDPA.

    What another order of rounding alone gives is measured beside it: SDPA by its unfused kernel,
    whose attention matrices need a small batch.
    """
    seen: dict[str, tuple[Tensor, ...]] = {}

    def results(layout: str) -> tuple[Tensor, ...]:
        ship.zero_grad(set_to_none=True)
        loss = _step_in(layout, ship, batch)
        gradients = [p.grad for p in ship.hypernetwork.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten().float() for gradient in gradients])
        with torch.no_grad():
            adapter = ship.hypernetwork(batch.noise_TZ)
            logits, _ = ship.task_llm.score(
                adapter, batch.answers, batch.num_tasks, layout == "packed"
            )
        return loss, logits.float(), flat

    for layout in LAYOUTS:
        seen[layout] = results(layout)
    with sdpa_kernel(SDPBackend.MATH):
        seen["unfused"] = results("padded_sdpa")

    def errors(layout: str, reference: str) -> dict[str, float]:
        names = ("loss", "logits", "gradients of the hypernetwork")
        pairs = zip(names, seen[layout], seen[reference], strict=True)
        return {name: relative_error(ours, expected) for name, ours, expected in pairs}

    report: dict[str, Any] = {
        "loss": {name: float(one[0]) for name, one in seen.items()},
        "packed against padded": errors("packed", "padded"),
        "packed against padded SDPA": errors("packed", "padded_sdpa"),
        "unfused SDPA against padded SDPA": errors("unfused", "padded_sdpa"),
    }
    packed, rounding = (
        report[name] for name in ("packed against padded SDPA", "unfused SDPA against padded SDPA")
    )
    # An exchanged token or task gives errors near 1.
    report["is_right"] = all(packed[name] <= 2 * rounding[name] + 1e-3 for name in packed)
    return report


def _model_flops(ship: ShipModel, batch: ShipBatch) -> float:
    """Of forward and backward through frozen matrices: no gradient of a weight, no recomputation,
    no attention, no adapters."""
    parts = {
        ship.encoder: batch.instructions,
        ship.task_llm: batch.answers,
        ship.decoder: batch.decoded,
    }
    settings = settings_of(ship.task_llm.language_model)
    width, inner = settings.hidden_size, settings.intermediate_size
    keys = settings.num_key_value_heads * settings.hidden_size // settings.num_attention_heads
    block = 2 * width * width + 2 * width * keys + 3 * width * inner
    tokens = sum(part.num_tokens for part in parts.values())
    labels = batch.answers.num_targets + batch.decoded.num_targets
    return 4.0 * (
        settings.num_hidden_layers * block * tokens + settings.vocab_size * width * labels
    )


def _against_the_planner(ship: ShipModel, planned: Shapes, config: Any) -> dict[str, Any]:
    """A micro-batch of rows that are all as long as they may be, as the planner counts it; the
    gradients are there before the step."""
    work = Workload(4, 4, 128, 448, 64, 0)
    plan = count_activations(planned, work)
    terms = {
        **{f"activations, {part}": num_bytes for part, num_bytes in plan.kept.items()},
        "generated adapters": plan.adapters,
        "logits at labels": plan.logits,
        "working memory": plan.working,
    }
    batch = planned_batch(Shapes(config, torch.bfloat16, ship, frozenset()), work)
    lay_out(ship, "packed")
    take_step(ship, batch)
    measured = peak_bytes(lambda: take_step(ship, batch))
    total = sum(terms.values())
    return {
        "work": "4 tasks x 4 examples, 128 + 448 + 64 tokens, no example shown",
        "planned_terms": terms,
        "planned_bytes": total,
        "measured_bytes": measured,
        "error_percent": round(100 * (total / measured - 1), 1),
    }


def elementwise_part(rounds: int, device: torch.device) -> dict[str, Any]:
    """16,384 tokens of an 8B Llama, forward and backward: norm (4096 wide), rotary embedding of 32
    heads of 128, SwiGLU (14336 wide), each against float64; torch's own norm and SwiGLU beside
    ours, of which the second is what `elementwise=eager` runs."""
    start = time.perf_counter()
    elementwise.compile_all(device, torch.bfloat16)
    found: dict[str, Any] = {"seconds_to_compile": round(time.perf_counter() - start, 1)}
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    x, weight, grad = draw(1, 16384, 4096), draw(4096), draw(1, 16384, 4096)
    heads, angles = draw(1, 32, 16384, 128), draw(1, 1, 16384, 64)
    cos, sin = (torch.cat([one, one], -1) for one in (angles.cos(), angles.sin()))
    gate, up, grad_of_glu = (draw(1, 16384, 14336) for _ in range(3))
    ways = {"eager": elementwise.EAGER, "compiled": elementwise.compiled()}

    def norm(kernels: elementwise.Kernels, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, weight, grad = inputs
        normed, scale = kernels.rms_norm(x, weight, 1e-5)
        return normed, kernels.rms_norm_gradient(grad, x, weight, scale)

    def rotary(kernels: elementwise.Kernels, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, cos, sin = inputs
        return kernels.turned(x, cos, sin, 1), kernels.turned(x, cos, sin, -1)

    def swiglu(kernels: elementwise.Kernels, *inputs: Tensor) -> tuple[Tensor, ...]:
        gate, up, grad = inputs
        return kernels.swiglu(gate, up), *kernels.swiglu_gradients(grad, gate, up)

    def torchs_norm() -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        normed = nn.functional.rms_norm(leaf, (4096,), weight, 1e-5)
        return normed, *torch.autograd.grad(normed, leaf, grad)

    def torchs_swiglu() -> tuple[Tensor, ...]:
        leaves = [one.detach().requires_grad_() for one in (gate, up)]
        out = nn.functional.silu(leaves[0]) * leaves[1]
        return out, *torch.autograd.grad(out, leaves, grad_of_glu)

    torchs = {"norm": torchs_norm, "swiglu": torchs_swiglu}
    operands = {
        "norm": (norm, (x, weight, grad)),
        "rotary": (rotary, (heads, cos, sin)),
        "swiglu": (swiglu, (gate, up, grad_of_glu)),
    }
    for name, (run, inputs) in operands.items():
        variants: dict[str, Callable[[], tuple[Tensor, ...]]] = {
            way: partial(run, kernels, *inputs) for way, kernels in ways.items()
        }
        if name in torchs:
            variants["torch's"] = torchs[name]
        exact = run(elementwise.EAGER, *[one.double() for one in inputs])
        found[name] = {
            "largest_relative_error_to_float64": {
                way: max(relative_error(o, e) for o, e in zip(made(), exact, strict=True))
                for way, made in variants.items()
            },
            "times": take_turns(variants, rounds, 5),
        }
        del exact
    return found


def lora_8b(rounds: int, device: torch.device) -> dict[str, Any]:
    """Packed micro-batches of 2 and 8 tasks x 4 examples (a rank's of the recipe on 16 and on 4
    GPUs), eager and compiled: time, MFU by flops.py, peak; and how many adapters a second."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        AutoConfig.for_model(**LLAMA_8B).save_pretrained(name)
        base = f"model.task_llm.base={name}"
        ships = {
            way: random_ship(
                load_config("lora-8b", [base, f"model.elementwise={way}"]).model,
                torch.bfloat16,
                device,
            )
            for way in ("eager", "compiled")
        }
    ship, peak = ships["eager"], peak_of(torch.cuda.get_device_name())
    found: dict[str, Any] = {}
    for tasks in (2, 8):
        batch = random_batch(ship, tasks, 4)
        steps = {way: partial(take_step, one, batch) for way, one in ships.items()}
        case = found[f"{tasks} tasks x 4 examples"] = {"tokens": _tokens(batch)}
        losses = {way: float(step()) for way, step in steps.items()}
        case["loss"] = losses
        case["peak_bytes_of_a_step"] = {way: peak_bytes(step) for way, step in steps.items()}
        case["times"] = take_turns(steps, rounds)
        flops = sum(flops_of_parts(ship.flop_size(), step_rows(batch)).values())
        for one in case["times"].values():
            one["tokens_per_second"] = round(1e3 * batch.num_tokens / one["median_ms"])
            one["mfu"] = round(flops / (1e-3 * one["median_ms"]) / peak, 3) if peak else None
        keep(found)
        case["profile"] = profiled(steps["eager"])
    for one in ships.values():
        one.zero_grad(set_to_none=True)
    found["adapters"] = _adapters(ship, device)
    return found


@torch.no_grad()
def _adapters(ship: ShipModel, device: torch.device, count: int = 1024) -> dict[str, Any]:
    """From the tokens of so many instructions (32 to 128 tokens each) to their LoRAs, 64 at a time,
    each part of which is let go before the next."""
    vocabulary = ship.task_llm.language_model.vocabulary_size
    draw = random.Random(2)
    batches = [
        TokenBatch.build(random_rows(64, 32, 128, vocabulary, draw), None, 0, 0, device)
        for _ in range(count // 64)
    ]

    def make() -> None:
        for batch in batches:
            latent_TZ, *_ = ship.encoder(batch)
            ship.hypernetwork(latent_TZ=latent_TZ)

    [taken] = take_turns({"make": make}, 2).values()
    return taken | {
        "adapters": count,
        "adapters_per_second": round(1e3 * count / taken["median_ms"]),
    }


def adapter_8b(rounds: int, device: torch.device) -> dict[str, Any]:
    """A frozen bf16 Task LLM alone, 8 tasks x 8 examples packed, blocks recomputed; under adapters
    and without, the gradient going down to soft tokens in both."""
    torch.manual_seed(0)
    settings = AutoConfig.for_model(**LLAMA_8B)
    lm = freeze(random_lm(settings, "none", torch.bfloat16, device))
    sites = wrap_sites(lm, TARGETS)
    task_llm, tasks, examples, places = TaskLlm(lm, True), 8, 8, 4
    draw = random.Random(0)
    rows = tasks * examples
    batch = TokenBatch.build(
        random_rows(rows, 224, 448, settings.vocab_size, draw),
        random_rows(rows, 32, 64, settings.vocab_size, draw),
        0,
        places,
        device,
    )

    def leaf(*shape: int) -> Tensor:
        values = torch.randn(*shape, device=device, dtype=torch.bfloat16)
        return (values / shape[-1] ** 0.5).requires_grad_()

    adapter = LoraAdapter(
        {path: (leaf(tasks, RANK, i), leaf(tasks, o, RANK)) for path, (i, o) in sites.items()}, 0.1
    )
    soft = leaf(rows, places, settings.hidden_size)

    def step(adapter: LoraAdapter | None, checkpointing: bool = True) -> None:
        logits, labels = task_llm.language_model.score(
            batch, adapter, tasks, soft=soft, packed=True, checkpointing=checkpointing
        )
        nn.functional.cross_entropy(logits.float(), labels).backward()

    variants: dict[str, Callable[[], None]] = {
        "with adapters": lambda: step(adapter),
        "without": lambda: step(None),
    }
    found: dict[str, Any] = {"tokens": batch.num_tokens}
    found["peak_bytes_of_a_step"] = {name: peak_bytes(run) for name, run in variants.items()}
    found["times"] = take_turns(variants, rounds)
    for one in found["times"].values():
        one["tokens_per_second"] = round(1e3 * batch.num_tokens / one["median_ms"])
    with_, without = (found["times"][name]["median_ms"] for name in variants)
    found["ratio"] = round(with_ / without, 3)
    keep(found)
    found["profile_with_adapters"] = profiled(variants["with adapters"])
    found["decoding"] = _decoding(task_llm, adapter, rows, settings.vocab_size, device)
    return found


@torch.no_grad()
def _decoding(
    task_llm: TaskLlm, adapter: LoraAdapter, rows: int, vocabulary: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds a token of `rows` rows after prompts of 256 tokens, none of which ends."""
    draw = random.Random(1)
    prompts = TokenBatch.build(random_rows(rows, 256, 256, vocabulary, draw), None, 0, 0, device)
    found: dict[str, Any] = {"rows": rows, "prompt_tokens": 256}
    for name, one in (("with adapters", adapter), ("without", None)):
        stream = task_llm.stream(one, prompts)
        next_E = torch.zeros(rows, dtype=torch.long, device=device)
        samples = [1e3 * seconds(partial(stream.advance, next_E)) for _ in range(24)][4:]
        found[name] = {
            "median_ms": round(statistics.median(samples), 2),
            "min_ms": round(min(samples), 2),
            "max_ms": round(max(samples), 2),
        }
    return found


def trainer(setting: str, on_gpu: bool, rounds: int, device: torch.device) -> dict[str, Any]:
    """The smoke recipe through `python -m ship_ds.train` with one of the files of ds_configs/: does
    it end well, and what are its losses."""
    with tempfile.TemporaryDirectory() as name:
        settings = [f"training.deepspeed={setting}"]
        return _train("quickstart-smoke", Path(name) / "run", settings, on_gpu)


def trainer_moves(rounds: int, device: torch.device) -> dict[str, Any]:
    """The smoke recipe without CUDA, which saves after 4, 8 and 12 steps; from the first of these
    on the GPU; and from the second, which that wrote, without it again."""
    settings = [
        "evaluation.every_steps=0",
        "evaluation.ends_with_report=false",
        "checkpoint.every_steps=4",
        "checkpoint.keep_last=3",
    ]
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        found = {"CPU": _train("quickstart-smoke", run, settings, on_gpu=False)}
        for begins_at, place in ((4, "GPU"), (8, "CPU")):
            for checkpoint in (run / "checkpoints").glob("step-*"):
                if int(checkpoint.name.removeprefix("step-")) > begins_at:
                    shutil.rmtree(checkpoint)
            title = f"{place} from the checkpoint of step {begins_at}"
            found[title] = _train("quickstart-smoke", run, settings, place == "GPU")
        return found


def lora_8b_24gb(rounds: int, device: torch.device) -> dict[str, Any]:
    """Two steps of the recipe, a look and the report, every text as long as the recipe's limits.
    The random base never ends an answer, so that all are as long as they may be."""
    memory = torch.cuda.get_device_properties(device).total_memory
    # A GB of 24 is CUDA's own.
    share = f"per_process_memory_fraction:{_BYTES_OF_24_GB / memory:.4f}"
    with tempfile.TemporaryDirectory() as name:
        base, data, run = (Path(name) / one for one in ("base", "tasks.jsonl", "run"))
        start = time.perf_counter()
        write_random_base(base, device)
        written = time.perf_counter() - start
        torch.cuda.empty_cache()
        write_long_tasks(data, 48, 256, 384, 96)
        settings = [
            f"model.task_llm.base={base}",
            f"data.path={data}",
            "training.epochs=null",
            "training.steps=2",
            "evaluation.every_steps=2",
            "evaluation.num_tasks=2",
            "evaluation.num_final_tasks=2",
        ]
        allocator = {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:True,{share}"}
        found = _train("lora-8b-24gb", run, settings, True, allocator)
        return {"allocator": allocator, "seconds_to_write_the_base": round(written, 1), **found}


_BYTES_OF_24_GB = 23e9


def write_random_base(folder: Path, device: torch.device) -> None:
    """An 8B Llama of random weights as transformers saves one, with the embedded default's
    tokenizer, whose ids are the first of its vocabulary."""
    shutil.copytree(TINY_LM, folder)
    (folder / "model.safetensors").unlink()
    known = json.loads((folder / "config.json").read_text())
    ids = {name: known[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = AutoConfig.for_model(**LLAMA_8B, **ids)
    settings.architectures = ["LlamaForCausalLM"]
    settings.save_pretrained(folder)
    with torch.device("meta"):
        lm = auto_class(settings).from_config(settings, dtype=torch.bfloat16)
    shards: list[list[str]] = [[]]
    shapes = {path: weight.shape for path, weight in lm.named_parameters()}
    for path, shape in shapes.items():
        if sum(shapes[one].numel() for one in shards[-1]) + shape.numel() > 10**9 and shards[-1]:
            shards.append([])
        shards[-1].append(path)
    places: dict[str, str] = {}
    for number, paths in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        weights = {
            path: _random_(torch.empty(shapes[path], dtype=torch.bfloat16, device=device)).cpu()
            for path in paths
        }
        save_file(weights, folder / file, {"format": "pt"})
        places |= dict.fromkeys(paths, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_long_tasks(file: Path, count: int, instruction: int, given: int, target: int) -> None:
    """Tasks whose texts have so many tokens of that tokenizer."""
    draw = random.Random(0)
    tokenizer = json.loads((TINY_LM / "tokenizer.json").read_text())
    # Of words: texts that differ by their numbers alone count as one rule.
    words = sorted(filter(str.isalpha, tokenizer["model"]["vocab"]))

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length))

    lines = []
    for task in range(count):
        pairs = [{"input": text(given), "target": text(target)} for _ in range(20)]
        line = {"id": f"task {task}", "instruction": text(instruction), "examples": pairs}
        lines.append(json.dumps(line))
    file.write_text("\n".join(lines))


def _train(
    recipe: str,
    folder: Path,
    settings: Sequence[str],
    on_gpu: bool,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run `python -m ship_ds.train` to its end: exit code, seconds, and the log's figures."""
    command = [sys.executable, "-m", "ship_ds.train", "--config", recipe, f"run.folder={folder}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})}
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    output = folder.with_suffix(".txt")
    start = time.perf_counter()
    with output.open("w") as file:
        process = subprocess.Popen(
            [*command, *settings],
            cwd=REPOSITORY,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            code: int | str = process.wait(TRAINER_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = f"stopped after {TRAINER_SECONDS} s"
    report: dict[str, Any] = {"exit": code, "seconds": round(time.perf_counter() - start, 1)}
    rows = folder / "metrics.jsonl"
    if rows.exists():
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
        for name, metric in _LOGGED.items():
            report[name] = [round(line[metric], 5) for line in lines if metric in line]
    if (folder / "report.json").exists():
        parts = json.loads((folder / "report.json").read_text())["deduction"]
        report["tasks_of_the_report"] = {name: one["n_tasks"] for name, one in parts.items()}
    if code:
        report["output"] = _last_lines(output.read_text())
    return report


_LOGGED = {
    "losses": "loss/total",
    "step_seconds": "speed/step_seconds",
    "memory_gigabytes": "memory/gigabytes",
    "mfu": "speed/mfu",
}


PARTS: Mapping[str, tuple[Callable[[int, torch.device], dict[str, Any]], int]] = {
    "limits": (limits, 60),
    "segment_lora": (segment_lora_part, 90),
    "ship_1b": (ship_1b, 150),
    "ship_8b_nf4": (ship_8b_nf4, 180),
    "elementwise": (elementwise_part, 120),
    "lora_8b": (lora_8b, 180),
    "adapter_8b": (adapter_8b, 150),
    "trainer_zero2": (partial(trainer, "zero2", True), 150),
    "trainer_zero2_bf16": (partial(trainer, "zero2_bf16", True), 150),
    "trainer_zero3": (partial(trainer, "zero3", True), 150),
    "trainer_zero3_bf16": (partial(trainer, "zero3_bf16", True), 150),
    "trainer_zero2_cpu": (partial(trainer, "zero2", False), 150),
    "trainer_moves": (trainer_moves, 300),
    "lora_8b_24gb": (lora_8b_24gb, 240),
}
"""Name -> (what measures it, seconds after which it is stopped)."""


def _last_lines(text: str, count: int = 25) -> list[str]:
    return text.strip().splitlines()[-count:]


def run_part(name: str, rounds: int) -> dict[str, Any]:
    """In a process of its own."""
    _, limit = PARTS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        command = [sys.executable, __file__, "--part", name, "--out", str(path)]
        environment = {**os.environ, "PYTHONPATH": _with_repository()}
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [*command, "--rounds", str(rounds)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired as error:
            kept = json.loads(path.read_text()) if path.exists() else {}
            return kept | {"failed": [f"stopped after {limit} s", *_last_lines(str(error.output))]}
        taken = {
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - start, 1),
        }
        if not path.exists():
            return taken | {"failed": _last_lines(done.stdout)}
        failed = {"failed": _last_lines(done.stdout)} if done.returncode else {}
        return taken | json.loads(path.read_text()) | failed


def _with_repository() -> str:
    return os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))


def card() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    return {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": driver.stdout.strip(),
    }


def _earlier_parts(path: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that a file holds already, where they are of the same card and versions."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    same = all(earlier.get(name) == report[name] for name in ("card", "versions"))
    parts: dict[str, Any] = earlier["parts"] if same else {}
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu: no CUDA here, nothing was measured")
        return 0
    if args.part:
        global _kept_in
        _kept_in = args.out
        try:
            found = PARTS[args.part][0](args.rounds, torch.device("cuda", 0))
        except Exception:
            traceback.print_exc()
            return 1
        args.out.write_text(json.dumps(found))
        return 0
    report: dict[str, Any] = {
        "command": "python tools/bench_gpu.py",
        "machine": describe_machine(),
        "card": card(),
        "versions": versions(),
    }
    report["parts"] = _earlier_parts(args.out, report)
    for name in args.parts:
        report["parts"][name] = run_part(name, args.rounds)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name}: {json.dumps(report['parts'][name])[:1500]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
