"""What DeepSpeed's ZeRO keeps on a rank and sends in a step, as arithmetic over the weights' sizes.

The constants were read off DeepSpeed 0.19.8 and are compared with running ranks by
tools/bench_planner.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ship_ds.planner.shapes import Weight
from ship_ds.runtime.deepspeed_config import complete, is_bf16

Device = Literal["gpu", "cpu", "nvme"]
_MASTER_AND_MOMENTS = 12
"""Bytes a trained weight: the master copy and Adam's two moments, fp32 whatever the engine's
dtype."""


@dataclass(frozen=True)
class Zero:
    """The settings of a ds_configs file that decide memory and traffic, on `num_ranks`."""

    stage: int
    dtype_bytes: int
    num_ranks: int
    bucket_elements: int
    num_buckets: int
    prefetch_elements: int
    persistent_below: int
    reuse_distance: int
    hpz_ranks: int
    optimiser_on: Device
    parameters_on: Device

    @classmethod
    def read(
        cls, deepspeed_config: dict[str, Any], num_ranks: int, ranks_per_node: int = 8
    ) -> "Zero":
        """The settings of a ds_configs file, and our defaults (`complete`) where it says nothing.

        Args:
            deepspeed_config: of `read_deepspeed_config`.
            num_ranks: of the whole run.
            ranks_per_node: what `"zero_hpz_partition_size": "node"` stands for.
        """
        zero = complete(deepspeed_config, ranks_per_node)["zero_optimization"]
        stage = zero.get("stage", 0)
        return cls(
            stage,
            2 if is_bf16(deepspeed_config) else 4,
            num_ranks,
            int(zero["reduce_bucket_size"]),
            2 if stage < 3 and zero["overlap_comm"] else 1,
            int(zero["stage3_prefetch_bucket_size"]),
            int(zero["stage3_param_persistence_threshold"]),
            int(zero["stage3_max_reuse_distance"]),
            int(zero["zero_hpz_partition_size"]),
            _device(zero.get("offload_optimizer")),
            _device(zero.get("offload_param")),
        )

    def share(self, num_bytes: int) -> int:
        return -(-num_bytes // self.num_ranks)


def _device(offload: dict[str, Any] | None) -> Device:
    device: str = (offload or {}).get("device", "none")
    return "cpu" if device == "cpu" else "nvme" if device == "nvme" else "gpu"


@dataclass(frozen=True)
class Held:
    """Bytes of one rank at a step boundary, and the buffers of the step itself, by name; host:
    outside the GPU."""

    gpu: dict[str, int]
    host: dict[str, int]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one rank's links in one step, by what they are.

    Ring algorithms: an all-gather of b bytes over n ranks moves b (n-1)/n.

    inside_node: what hpZ moves between the GPUs of one node; it is not in `wire`. The first step
    of a run moves every frozen weight between nodes as well.
    """

    wire: dict[str, int]
    inside_node: int = 0

    @property
    def total(self) -> int:
        return sum(self.wire.values())


def held_by_a_rank(zero: Zero, engine: Sequence[Weight], outside: Sequence[Weight]) -> Held:
    """Bytes that a rank holds: weights, gradients and the optimiser's state, and the buffers of a
    step.

    Args:
        zero: the settings of DeepSpeed and the number of ranks.
        engine: the weights that DeepSpeed manages.
        outside: those of a Task LLM that every rank keeps whole.
    """
    trained = sum(weight.numel for weight in engine if weight.is_trained)
    gpu: dict[str, int] = {}
    host: dict[str, int] = {}
    for name, kind in _kinds(zero, engine).items():
        on_gpu = zero.stage < 3 or zero.parameters_on == "gpu"
        (gpu if on_gpu else host)[name] = _stored(zero, kind)
        if not on_gpu:
            gpu[name] = sum(
                weight.stored_bytes(zero.dtype_bytes)
                for weight in kind
                if _is_persistent(zero, weight)
            )
    for name, kind in _kinds(zero, outside).items():
        gpu[name] += sum(weight.stored_bytes(zero.dtype_bytes) for weight in kind)
    gpu["quantisation scales"] = sum(weight.quant_state_bytes for weight in (*engine, *outside))
    (gpu if zero.optimiser_on == "gpu" else host)["optimiser state"] = zero.share(
        _MASTER_AND_MOMENTS * trained
    )
    gradients = trained * zero.dtype_bytes
    (gpu if zero.optimiser_on == "gpu" or zero.stage < 3 else host)["gradients"] = (
        gradients if zero.stage < 2 else zero.share(gradients)
    )
    gpu["communication buckets"] = zero.bucket_elements * zero.num_buckets * zero.dtype_bytes
    gpu["gathered layers"] = _gathered(zero, engine)
    if zero.stage == 3 and zero.hpz_ranks > 1:
        gpu["node's second copy (hpZ)"] = (
            sum(weight.stored_bytes(zero.dtype_bytes) for weight in engine) // zero.hpz_ranks
        )
    return Held(gpu, host)


def gradients_come_last(zero: Zero, engine: Sequence[Weight], micro_steps: int) -> bool:
    """Whether a rank makes room for its gradients when the activations are gone already.

    ZeRO-2 does at the first bucket that is full (copy_grads_in_partition); a bucket that holds all
    of them is emptied when the backward pass is over. A second micro-batch meets the first one's.

    Args:
        zero: the settings of DeepSpeed and the number of ranks.
        engine: the weights that DeepSpeed manages.
        micro_steps: micro-batches of a step.
    """
    trained = sum(weight.numel for weight in engine if weight.is_trained)
    in_buckets = zero.stage == 2 and zero.optimiser_on == "gpu" and micro_steps == 1
    return in_buckets and trained <= zero.bucket_elements


def _kinds(zero: Zero, weights: Sequence[Weight]) -> dict[str, list[Weight]]:
    return {
        "trained weights": [weight for weight in weights if weight.is_trained],
        "frozen weights": [
            weight for weight in weights if not weight.is_trained and not weight.is_nf4
        ],
        "4-bit weights": [weight for weight in weights if weight.is_nf4],
    }


def _is_persistent(zero: Zero, weight: Weight) -> bool:
    """Small ones stay whole on every rank, beside their shard."""
    return zero.stage == 3 and weight.stored_elements <= zero.persistent_below


def _stored(zero: Zero, weights: Sequence[Weight]) -> int:
    total = 0
    for weight in weights:
        num_bytes = weight.stored_bytes(zero.dtype_bytes)
        total += (
            num_bytes
            if zero.stage < 3
            else zero.share(num_bytes) + num_bytes * _is_persistent(zero, weight)
        )
    return total


def _sharded(zero: Zero, engine: Sequence[Weight]) -> list[Weight]:
    return [weight for weight in engine if not _is_persistent(zero, weight)]


def _gathered(zero: Zero, engine: Sequence[Weight]) -> int:
    """Whole weights at once under ZeRO-3: those used again within `reuse_distance` elements, or
    the largest and what is fetched ahead.

    One rank has its weights whole; where they lie on the host it copies them to the GPU as several
    ranks gather theirs (DeepSpeed's NoGatherHandle).
    """
    weights = _sharded(zero, engine)
    is_there = zero.num_ranks == 1 and zero.parameters_on == "gpu"
    if zero.stage < 3 or is_there or not weights:
        return 0
    elements = sum(weight.stored_elements for weight in weights)
    total = sum(weight.stored_bytes(zero.dtype_bytes) for weight in weights)
    largest = max(weight.stored_bytes(zero.dtype_bytes) for weight in weights)
    window = zero.reuse_distance // 2 + zero.prefetch_elements
    gathered = largest + total * window // elements
    if _keeps_shared(zero, weights):
        shared = [weight for weight in weights if weight.reads[0] > 1]
        gathered = max(gathered, sum(w.stored_bytes(zero.dtype_bytes) for w in shared))
    return min(total, gathered)


def traffic(
    zero: Zero, engine: Sequence[Weight], micro_steps: int, recomputed: Sequence[Weight] = ()
) -> Traffic:
    """Bytes that one rank sends in a step; none where it is the only one.

    Args:
        zero: the settings of DeepSpeed and the number of ranks.
        engine: the weights that DeepSpeed manages.
        micro_steps: micro-batches of a step.
        recomputed: weights of checkpointed blocks, once a role, which one more pass gathers under
            ZeRO-3 where `reuse_distance` is 0.
    """
    trained = sum(weight.numel * zero.dtype_bytes for weight in engine if weight.is_trained)
    ring = (zero.num_ranks - 1) / zero.num_ranks
    if zero.num_ranks == 1:
        return Traffic({})
    if zero.stage < 3:
        # DeepSpeed reduces whole buckets (use_multi_rank_bucket_allreduce), in ZeRO-2 too; ZeRO-1
        # once a step.
        reductions = 1 if zero.stage == 1 else micro_steps
        return Traffic(
            {
                "gradients, reduced": int(2 * ring * trained * reductions),
                "trained weights, gathered": int(ring * trained),
            }
        )
    over_nodes, inside = _gathered_in_a_step(zero, engine, micro_steps, recomputed)
    small = sum(
        weight.numel * zero.dtype_bytes
        for weight in engine
        if weight.is_trained and _is_persistent(zero, weight)
    )
    return Traffic(
        {
            "weights, gathered": int(ring * (over_nodes + small)),
            "gradients, reduced": int(ring * trained * micro_steps),
        },
        int(inside * (zero.hpz_ranks - 1) / zero.hpz_ranks),
    )


def _gathered_in_a_step(
    zero: Zero, engine: Sequence[Weight], micro_steps: int, recomputed: Sequence[Weight]
) -> tuple[int, int]:
    """Whole weights that a step gathers over all ranks, and inside a node.

    With hpZ a node keeps a second copy of what it has gathered: of a frozen weight for ever, so
    that it crosses nodes once a run, of a trained one until the optimiser's step.
    """
    forward, backward = _gathers(zero, engine, recomputed)
    every_time = (forward + backward) * micro_steps
    if zero.hpz_ranks == 1:
        return every_time, 0
    first, _ = _gathers(zero, [weight for weight in engine if weight.is_trained], ())
    return first, every_time - first


def _gathers(zero: Zero, engine: Sequence[Weight], recomputed: Sequence[Weight]) -> tuple[int, int]:
    """Bytes gathered for one forward and one backward pass.

    A weight stays from the one to the other where its next use is fewer than `reuse_distance`
    elements away (a packed NF4 byte is one element), so the last half of that is gathered once. A
    base that several roles read is gone through from its beginning by each, so that to the next use
    of a weight it is as far as the whole base is long, and in the backward pass again. Frozen
    embeddings have no backward pass.
    """
    weights = _sharded(zero, engine)
    total = sum(weight.stored_bytes(zero.dtype_bytes) for weight in weights)
    elements = sum(weight.stored_elements for weight in weights)
    stays = min(1.0, zero.reuse_distance / 2 / elements) if elements else 1.0
    in_backward = sum(w.stored_bytes(zero.dtype_bytes) for w in weights if w.reads[1])
    more = [] if _keeps_shared(zero, weights) else weights
    forward, backward = (
        sum(w.stored_bytes(zero.dtype_bytes) * max(0, w.reads[way] - 1) for w in more)
        for way in (0, 1)
    )
    again = (
        sum(weight.stored_bytes(zero.dtype_bytes) for weight in _sharded(zero, recomputed))
        if zero.reuse_distance == 0
        else 0
    )
    return total + forward, int(in_backward * (1 - stays)) + backward + again


def _keeps_shared(zero: Zero, weights: Sequence[Weight]) -> bool:
    """Whether a base that several roles read stays gathered from one to the next."""
    shared = sum(weight.stored_elements for weight in weights if weight.reads[0] > 1)
    return 0 < shared <= zero.reuse_distance
