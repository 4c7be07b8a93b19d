"""`ship-ds plan`: does a recipe fit its GPUs, what takes the memory, what does a step send, and
what to change.

    ship-ds plan --config pretrain-7b --shapes llama-2-7b --gpus 8 --gpu-memory 80
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ship_ds.config import Config, override_config
from ship_ds.model.adapters.sites import AdaptedBlock
from ship_ds.planner.activations import Activations, Lengths, Workload, count_activations
from ship_ds.planner.evaluation import PlannedPass, rows_answered
from ship_ds.planner.evaluation import passes as evaluation_passes
from ship_ds.planner.forecast import Forecast, forecast
from ship_ds.planner.shapes import Shapes, Weight, build_shapes
from ship_ds.planner.zero import Held, Traffic, Zero, gradients_come_last, held_by_a_rank, traffic
from ship_ds.runtime.deepspeed_config import is_bf16, read_deepspeed_config
from ship_ds.runtime.engine import engine_dtype
from ship_ds.runtime.preflight import check_division

RESERVED = 2 * 10**9
"""Bytes of a GPU left to the CUDA context, NCCL and the allocator's fragments: an assumption, not a
count."""


@dataclass(frozen=True)
class Machines:
    """nodes x gpus ranks of `gpu_memory` bytes each."""

    nodes: int
    gpus: int
    gpu_memory: int

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank: `memory` by term on its GPU while it trains, `evaluating` while it
    answers, `host` beside it; `traffic` of one optimiser step."""

    config: Config
    machines: Machines
    work: Workload
    memory: dict[str, int]
    evaluating: dict[str, int]
    host: dict[str, int]
    traffic: Traffic
    parameters: dict[str, int]
    is_sharded: bool
    largest_gathered: tuple[str, int]
    passes: list[PlannedPass]
    rows_at_once: int
    forecast: Forecast

    @property
    def needed(self) -> int:
        """Of a GPU's memory, at the heavier of training and evaluation."""
        return max(sum(self.memory.values()), sum(self.evaluating.values())) + RESERVED

    @property
    def evaluation_needs_most(self) -> bool:
        """Whether it is evaluation or the report that decides."""
        return sum(self.evaluating.values()) > sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.machines.gpu_memory


def shapes_of(config: Config) -> Shapes:
    """Where the Task LLM lies changes no shape, so that one set of shapes, kept, serves both."""
    unplaced = config.model.task_llm.model_copy(update={"shard": "auto"})
    model = config.model.model_copy(update={"task_llm": unplaced})
    return build_shapes(model, engine_dtype(config.training), config.loss)


def make_plan(config: Config, machines: Machines, lengths: Lengths = (None, None, None)) -> Plan:
    """What a recipe needs of each rank of these machines, and sends in a step.

    Args:
        config: of the run.
        machines: that it is to run on.
        lengths: tokens of an instruction, an input and a target; None: as many as the run's task
            source allows.

    Raises:
        UserError: the recipe could not start on these machines: a base, a target or the file of
            ds_configs/ is not there or does not fit, or the ranks do not divide a step.
    """
    settings = read_deepspeed_config(config.training.deepspeed)
    zero = Zero.read(settings, machines.num_ranks, machines.gpus)
    shapes = shapes_of(config)
    work = Workload.of(config, _tasks_per_micro_batch(config, machines), lengths)
    engine, outside = managed(config, shapes, zero)
    is_sharded = not outside
    held = held_by_a_rank(zero, engine, outside)
    accumulation = config.training.accumulation
    in_engine = set(map(id, engine))
    again = [weight for weight in _recomputed(shapes) if id(weight) in in_engine]
    sent = traffic(zero, engine, accumulation, again)
    evaluations = evaluation_passes(shapes, work, config.evaluation)
    staying = sum(_staying(zero, held).values())
    return Plan(
        config,
        machines,
        work,
        _memory(
            held,
            count_activations(shapes, work, zero.stage == 3),
            _dequantised(shapes),
            gradients_come_last(zero, engine, accumulation),
        ),
        _evaluating(zero, held, evaluations, _dequantised(shapes)),
        held.host,
        sent,
        _parameters(shapes),
        is_sharded,
        _largest(zero, engine),
        evaluations,
        _rows_at_once(shapes, evaluations, machines.gpu_memory - RESERVED - staying),
        forecast(shapes, work, sent, accumulation, machines.nodes, zero.stage == 3),
    )


def managed(config: Config, shapes: Shapes, zero: Zero) -> tuple[list[Weight], list[Weight]]:
    """The weights that DeepSpeed manages, and those of a Task LLM that every rank keeps whole.

    Args:
        config: of the run; it says whether the Task LLM is sharded.
        shapes: of the model.
        zero: the settings of DeepSpeed; `shard: auto` goes by the bytes of a number.

    Returns:
        The two lists; the second is empty where the Task LLM is sharded, and so among the first.
    """
    task_llm = shapes.weights("task LLM")
    stored = sum(weight.stored_bytes(zero.dtype_bytes) for weight in task_llm)
    others = [
        weight for part in shapes.parts if part != "task LLM" for weight in shapes.weights(part)
    ]
    if config.model.task_llm.shards(lambda: stored):
        return [*others, *task_llm], []
    return others, task_llm


def _tasks_per_micro_batch(config: Config, machines: Machines) -> int:
    training = config.training
    check_division(training.tasks_per_step, machines.num_ranks, training.accumulation)
    return training.tasks_per_step // (machines.num_ranks * training.accumulation)


def _memory(
    held: Held, activations: Activations, dequantised: int, gradients_come_last: bool
) -> dict[str, int]:
    gpu = dict(held.gpu)
    if gradients_come_last:
        # They come as the activations go: of both only the larger is there at a time.
        gpu["gradients"] = max(0, gpu["gradients"] - activations.peak - dequantised)
    return {
        **gpu,
        "generated adapters": activations.adapters,
        **{
            f"activations, {part}": num_bytes
            for part, num_bytes in activations.kept.items()
            if num_bytes
        },
        "logits at labels": activations.logits,
        "working memory": activations.working + dequantised,
    }


def _evaluating(
    zero: Zero, held: Held, evaluations: Sequence[PlannedPass], dequantised: int
) -> dict[str, int]:
    if not evaluations:
        return {}
    heaviest = max(evaluations, key=lambda one: one.num_bytes)
    return {
        **_staying(zero, held),
        f"one row of {heaviest.name}": heaviest.num_bytes,
        "working memory": dequantised,
    }


def _staying(zero: Zero, held: Held) -> dict[str, int]:
    """The weights and the optimiser's state stay while a run evaluates; gradients and buckets do
    under ZeRO-3 alone."""
    freed = () if zero.stage == 3 else ("gradients", "communication buckets")
    return {name: num_bytes for name, num_bytes in held.gpu.items() if name not in freed}


def _rows_at_once(shapes: Shapes, evaluations: Sequence[PlannedPass], bytes_free: int) -> int:
    """Of answers under adapters; none where nothing is evaluated."""
    return rows_answered(shapes, evaluations[0], bytes_free) if evaluations else 0


def _dequantised(shapes: Shapes) -> int:
    """The largest 4-bit matrix as it is multiplied with: on the meta device none is in 4 bits."""
    weights = (weight for part in shapes.parts for weight in shapes.weights(part))
    sizes = (weight.numel for weight in weights if weight.is_nf4)
    return max(sizes, default=0) * shapes.dtype.itemsize


def _recomputed(shapes: Shapes) -> list[Weight]:
    """Weights of the blocks that roles compute again, once for each of these roles."""
    config = shapes.config
    roles = {
        "encoder": config.encoder.checkpointing,
        "task LLM": config.task_llm.checkpointing,
        "decoder": config.decoder.checkpointing and shapes.ship.decodes,
    }
    weights = []
    for name in [name for name, recomputes in roles.items() if recomputes]:
        part = name if config.backbone == "separate" else "task LLM"
        blocks = [
            path
            for path, module in shapes.parts[part].named_modules()
            if isinstance(module, AdaptedBlock)
        ]
        # With the dot, or block 1 would have the weights of block 10.
        starts = tuple(f"{path}." for path in blocks)
        weights += [weight for weight in shapes.weights(part) if weight.path.startswith(starts)]
    return weights


def _parameters(shapes: Shapes) -> dict[str, int]:
    counts = {part: sum(weight.numel for weight in shapes.weights(part)) for part in shapes.parts}
    everything = [weight for part in shapes.parts for weight in shapes.weights(part)]
    return {
        **counts,
        "trained": sum(weight.numel for weight in everything if weight.is_trained),
        "frozen": sum(weight.numel for weight in everything if not weight.is_trained),
    }


def _largest(zero: Zero, engine: Sequence[Weight]) -> tuple[str, int]:
    if zero.stage < 3 or zero.num_ranks == 1:
        return "", 0
    largest = max(engine, key=lambda weight: weight.stored_bytes(zero.dtype_bytes))
    return largest.path, largest.stored_bytes(zero.dtype_bytes)


@dataclass(frozen=True)
class Change:
    """Overrides that lower memory, and the plan with them and all changes before them."""

    overrides: tuple[str, ...]
    plan: Plan


def advise(plan: Plan, lengths: Lengths = (None, None, None)) -> list[Change]:
    """Changes to make one after the other, cheapest first, until the run fits; the last one's plan
    says whether it does."""
    done: list[Change] = []
    current = plan
    for candidate in _candidates(plan):
        if current.fits:
            break
        changed = make_plan(override_config(current.config, candidate), plan.machines, lengths)
        if changed.needed < current.needed:
            done.append(Change(candidate, changed))
            current = changed
    return done


def _candidates(plan: Plan) -> list[tuple[str, ...]]:
    """Each raises the cost of a step: recomputation, smaller micro-batches, more traffic, the
    host's memory."""
    config = plan.config
    candidates: list[tuple[str, ...]] = []
    candidates += [
        (f"model.{role}.checkpointing=true",)
        for role in ("task_llm", "decoder", "encoder")
        if not getattr(config.model, role).checkpointing
    ]
    candidates += [
        (f"training.accumulation={config.training.accumulation * factor}",)
        for factor in (2, 4, 8, 16, 32, 64)
        if plan.work.tasks % factor == 0
    ]
    settings = read_deepspeed_config(config.training.deepspeed)
    zero = settings["zero_optimization"]
    if zero["stage"] < 3 or not is_bf16(settings):
        candidates.append(("training.deepspeed=zero3_bf16",))
    if not plan.is_sharded:
        candidates.append(("model.task_llm.shard=always",))
    if "offload_param" not in zero:
        candidates.append(("training.deepspeed=zero3_offload_cpu",))
    return candidates
