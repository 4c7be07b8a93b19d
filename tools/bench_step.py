"""The whole training step, against a plain reference that does what published code does, and
against another checkout; writes tools/results/step.json.

    python tools/bench_step.py --config quickstart                        # the embedded default
    python tools/bench_step.py --config natural-instructions data.path=FOLDER \\
        model.task_llm.base=SMOLLM2 ... --against OTHER_CHECKOUT          # a real model

A contestant is a process of its own, so that its peak of memory is its own; they take one step in
turn, round after round, and the others wait without spinning. `ship-ds` is this checkout's Trainer
with one rank, `compiled` the same with model.elementwise=compiled, `before` the Trainer of the
checkout in --against. `published` is written below: three models in the run's dtype (16 bits where
training.deepspeed says so), rows padded to the longest, the instruction encoded once for every
example, A and B applied row by row by einsum, logits at every position, AdamW. Its hypernetwork,
prompts, draws and learning rate are the run's own, so that all contestants do the same useful work;
its decoder writes the instruction once for every task.

Letters: E sequences, S padded length, R LoRA rank, I inputs of a linear, O outputs of a linear,
Z latent size, H hidden size, P virtual tokens, V vocabulary.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "step.json"
_IGNORED = -100


def peak_gigabytes() -> float:
    """The largest resident memory of this process since `reset_peak`."""
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    ]
    return int(line.split()[1]) / 1e6


def reset_peak() -> None:
    """Start to measure the peak anew: loading a model may take more than a step."""
    Path("/proc/self/clear_refs").write_text("5")


class TrainerStep:
    """The step of the package that is imported, by its own Trainer."""

    def __init__(self, config: Any) -> None:
        from ship_ds.train import Trainer

        self.trainer = Trainer(config)

    def take(self, step: int) -> tuple[float, int]:
        """Loss and real tokens of the next step."""
        self.trainer.take_step()
        row = json.loads((self.trainer.folder / "metrics.jsonl").read_text().splitlines()[-1])
        tokens = row["speed/tokens_per_second"] * row["speed/step_seconds"]
        return float(row["loss/total"]), round(tokens)


class RowLora(nn.Module):
    """A linear under another A and B for every row of the batch."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.factors: Any = None

    def forward(self, x_ESI: Tensor) -> Tensor:
        a_ERI, b_EOR = self.factors
        low_ESR = torch.einsum("esi,eri->esr", x_ESI, a_ERI)
        update_ESO: Tensor = torch.einsum("esr,eor->eso", low_ESR, b_EOR)
        return update_ESO + self.base(x_ESI)


class PublishedStep:
    """SHIP's step as plain code writes it: see the top of this file."""

    def __init__(self, config: Any) -> None:
        from ship_ds.config import base_folder
        from ship_ds.data.sampler import StepSampler, balanced
        from ship_ds.data.source import source_of
        from ship_ds.kinds import ADAPTERS
        from ship_ds.model.adapters.adapter import Target, build_hypernetwork
        from ship_ds.model.loading import load_tokenizer
        from ship_ds.prompt import PromptFormat
        from ship_ds.runtime.engine import engine_dtype
        from ship_ds.runtime.precision import choose_precision

        torch.manual_seed(config.run.seed)
        config = choose_precision(config)
        model, training = config.model, config.training
        self.config, self.dtype = config, engine_dtype(training)

        def load(base: str) -> Any:
            return AutoModelForCausalLM.from_pretrained(
                base_folder(base), dtype=self.dtype, local_files_only=True
            )

        def tuned(role: Any) -> Any:
            tuning = role.tuning
            if tuning.kind == "full":
                return load(role.base)
            lora = LoraConfig(
                r=tuning.rank, lora_alpha=tuning.alpha, target_modules=list(tuning.targets)
            )
            return get_peft_model(load(role.base), lora, autocast_adapter_dtype=False)

        self.encoder, self.decoder = tuned(model.encoder), tuned(model.decoder)
        self.task_llm = load(model.task_llm.base).requires_grad_(False)
        kind = ADAPTERS.implementation(model.hypernetwork)
        self.sites = {
            path: RowLora(linear)
            for path, linear in self.task_llm.named_modules()
            if isinstance(linear, nn.Linear)
            and path.rpartition(".")[2] in kind.targets(model.hypernetwork)
        }
        for path, site in self.sites.items():
            parent, _, name = path.rpartition(".")
            setattr(self.task_llm.get_submodule(parent), name, site)
        hidden = self.task_llm.config.hidden_size
        shapes = {
            path: (site.base.in_features, site.base.out_features)
            for path, site in self.sites.items()
        }
        target = Target(shapes, hidden)
        latent = model.latent_size
        self.hypernetwork = build_hypernetwork(model.hypernetwork, latent, target).to(self.dtype)
        self.head = nn.Sequential(
            nn.Linear(hidden, 2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, 2 * latent)
        ).to(self.dtype)
        self.num_soft = model.decoder.num_soft_tokens
        self.soft = nn.Linear(latent, self.num_soft * hidden).to(self.dtype)
        parts = (self.encoder, self.decoder, self.hypernetwork, self.head, self.soft)
        trained = [weight for part in parts for weight in part.parameters() if weight.requires_grad]
        settings = config.optimiser
        self.optimiser = torch.optim.AdamW(
            trained, settings.lr, settings.betas, weight_decay=settings.weight_decay
        )
        tokenizer = load_tokenizer(model.task_llm.base)
        self.prompts = PromptFormat(tokenizer)
        splits = source_of(config.data).read(tokenizer, lambda text: None)
        self.num_steps = training.steps or 1000
        self.sampler = StepSampler(
            balanced(splits.seen, training.family_alpha),
            config.run.seed,
            training.tasks_per_step,
            training.examples_per_task,
            model.decoder.max_examples,
            model.decoder.drop_latent,
        )

    def take(self, step: int) -> tuple[float, int]:
        """Loss and real tokens of a step."""
        from ship_ds.runtime.engine import learning_rate

        draws, prompts = self.sampler.draw_step(step), self.prompts
        examples = [(draw, example) for draw in draws for example in draw.answered]
        ids, mask, _ = self._padded([prompts.encoder_prompt(d.wording) for d, _ in examples])
        num_tokens = int(mask.sum())
        hidden_ESH = self.encoder(
            input_ids=ids, attention_mask=mask, output_hidden_states=True
        ).hidden_states[-1]
        last_EH = hidden_ESH[torch.arange(len(ids)), mask.sum(1) - 1]
        mean_EZ, log_variance_EZ = self.head(last_EH).float().chunk(2, dim=-1)
        latent_EZ = mean_EZ + (log_variance_EZ / 2).exp() * torch.randn_like(mean_EZ)
        kl = (mean_EZ**2 + log_variance_EZ.exp() - 1 - log_variance_EZ).mean() / 2
        adapter = self.hypernetwork(latent_EZ.to(self.dtype))
        for path, site in self.sites.items():
            a_ERI, b_EOR = adapter.factors[path]
            site.factors = (a_ERI, b_EOR * adapter.scaling)
        ids, mask, labels = self._padded(
            [prompts.task_prompt(example.input, None) for _, example in examples],
            [prompts.target(example.target) for _, example in examples],
        )
        num_tokens += int(mask.sum())
        answers_ESV = self.task_llm(input_ids=ids, attention_mask=mask, use_cache=False).logits
        task = self._cross_entropy(answers_ESV, labels)
        ids, mask, labels = self._padded(
            [prompts.decoder_prompt(draw.shown) for draw in draws],
            [prompts.target(draw.wording) for draw in draws],
        )
        num_tokens += int(mask.sum())
        every = len(examples) // len(draws)
        soft_TPH = self.soft(latent_EZ[::every].to(self.dtype)).unflatten(1, (self.num_soft, -1))
        embedded_TSH = self.decoder.get_input_embeddings()(ids)
        ones = mask.new_ones(len(ids), self.num_soft)
        texts_TSV = self.decoder(
            inputs_embeds=torch.cat([soft_TPH, embedded_TSH], 1),
            attention_mask=torch.cat([ones, mask], 1),
            use_cache=False,
        ).logits[:, self.num_soft :]
        reconstruction = self._cross_entropy(texts_TSV, labels)
        weights = self.config.loss
        loss = weights.task.weight * task + weights.reconstruction * reconstruction
        loss = loss + weights.kl.weight * kl
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(step, self.config.optimiser, self.num_steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            [weight for group in self.optimiser.param_groups for weight in group["params"]],
            self.config.optimiser.clip,
        )
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return float(loss.detach()), num_tokens

    def _padded(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and labels, (E, S) each, padded on the right."""
        endings = targets if targets is not None else [()] * len(prompts)
        rows = [[*prompt, *ending] for prompt, ending in zip(prompts, endings, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.prompts.pad_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        labels = torch.tensor(
            [
                [_IGNORED] * len(prompt) + [*ending] + [_IGNORED] * (width - len(row))
                for prompt, ending, row in zip(prompts, endings, rows, strict=True)
            ]
        )
        return ids, mask, labels

    @staticmethod
    def _cross_entropy(logits_ESV: Tensor, labels_ES: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(
            logits_ESV[:, :-1].float().flatten(0, 1),
            labels_ES[:, 1:].flatten(),
            ignore_index=_IGNORED,
        )


CONTESTANTS: dict[str, type[TrainerStep] | type[PublishedStep]] = {
    "ship-ds": TrainerStep,
    "compiled": TrainerStep,
    "before": TrainerStep,
    "published": PublishedStep,
}


_OWN_SETTINGS = {"compiled": ["model.elementwise=compiled"]}
"""Of contestants that take others than the rest."""


def work(name: str, arguments: Sequence[str]) -> None:
    """A contestant's process: builds, then takes a step for every line that it reads."""
    from ship_ds.config import load_config

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers
    with tempfile.TemporaryDirectory() as folder:
        own = _OWN_SETTINGS.get(name, [])
        config = load_config(arguments[0], [*arguments[1:], *own, f"run.folder={folder}"])
        contestant = CONTESTANTS[name](config)
        reset_peak()
        print(json.dumps({"ready": name}), file=answers, flush=True)
        for step, _ in enumerate(sys.stdin):
            started = time.perf_counter()
            loss, tokens = contestant.take(step)
            row = {
                "seconds": time.perf_counter() - started,
                "loss": loss,
                "tokens": tokens,
                "peak_gigabytes": peak_gigabytes(),
            }
            print(json.dumps(row), file=answers, flush=True)
    os._exit(0)  # see runtime/ranks.py: exit_process


def under_system_malloc() -> dict[str, str]:
    """This process's environment without its allocator."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("LD_PRELOAD", "MALLOC_CONF")
    }


class Contestant:
    """A process that takes steps when it is asked to."""

    def __init__(
        self,
        name: str,
        checkout: Path,
        arguments: Sequence[str],
        threads: int,
        surroundings: Mapping[str, str],
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, "--config", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env={
                **surroundings,
                "PYTHONPATH": str(checkout),
                "OMP_NUM_THREADS": str(threads),
                "OMP_WAIT_POLICY": "passive",
                "HF_HUB_OFFLINE": "1",
            },
        )
        self.rows: list[dict[str, float]] = []
        self._read()

    def step(self) -> None:
        """Take one step and keep its figures."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.rows.append(self._read())

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench_step: a contestant ended with code {self.process.wait()}")
        row: dict[str, float] = json.loads(line)
        return row

    def summary(self, warm_up: int) -> dict[str, Any]:
        """Median and spread after the warm-up."""
        rows = self.rows[warm_up:]
        seconds = sorted(row["seconds"] for row in rows)
        return {
            "seconds": {
                "median": round(statistics.median(seconds), 3),
                "min": round(seconds[0], 3),
                "max": round(seconds[-1], 3),
            },
            "peak_gigabytes": round(max(row["peak_gigabytes"] for row in rows), 2),
            "losses": [round(row["loss"], 4) for row in self.rows],
            "tokens": [row["tokens"] for row in rows],
        }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Every contestant's figures and the ratios of its step to that of `ship-ds`."""
    arguments = [args.config, *args.overrides]
    checkouts = {"ship-ds": REPOSITORY, "published": REPOSITORY}
    if args.compiled:
        checkouts["compiled"] = REPOSITORY
    if args.against:
        checkouts["before"] = Path(args.against).resolve()
    # Three contestants of a real model do not fit into a small machine's memory together.
    checkouts = {name: path for name, path in checkouts.items() if name not in args.without}
    contestants = {
        name: Contestant(
            name,
            checkout,
            arguments,
            args.threads,
            under_system_malloc() if name in args.system_malloc else os.environ,
        )
        for name, checkout in checkouts.items()
    }
    for _ in range(args.warm_up + args.steps):
        for contestant in contestants.values():
            contestant.step()
    ours = contestants["ship-ds"].rows[args.warm_up :]
    ratios = {
        name: {
            "seconds": round(
                statistics.median(
                    theirs["seconds"] / mine["seconds"]
                    for theirs, mine in zip(contestant.rows[args.warm_up :], ours, strict=True)
                ),
                2,
            ),
            "peak": round(contestant.rows[-1]["peak_gigabytes"] / ours[-1]["peak_gigabytes"], 2),
        }
        for name, contestant in contestants.items()
        if name != "ship-ds"
    }
    for contestant in contestants.values():
        contestant.process.communicate()
    return {
        "command": "python tools/bench_step.py --config " + " ".join(arguments),
        "threads": args.threads,
        "steps": args.steps,
        "contestants": {
            name: contestant.summary(args.warm_up) for name, contestant in contestants.items()
        },
        "times_the_step_of_ship_ds": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="quickstart", help="a recipe's name or a YAML file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--against", help="another checkout of ship-ds, measured as `before`")
    parser.add_argument(
        "--compiled", action="store_true", help="this checkout with model.elementwise=compiled too"
    )
    parser.add_argument(
        "--without", nargs="*", default=[], choices=["published", "before"], help="not measured"
    )
    parser.add_argument(
        "--system-malloc",
        nargs="*",
        default=[],
        choices=["published", "before"],
        help="who runs under the system's malloc, as version 0.1.0 did of itself",
    )
    parser.add_argument("--steps", type=int, default=5, help="rounds that count")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before them")
    parser.add_argument("--threads", type=int, default=2, help="of each contestant")
    parser.add_argument("--label", help="the name of this row in step.json; default: the config's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.worker:
        work(args.worker, [args.config, *args.overrides])
        return
    from ship_ds.allocator import allocator_in_use, use_scalable_malloc
    from ship_ds.monitor.machine import add_row

    # All contestants inherit the allocator that a training takes, unless they are named.
    use_scalable_malloc()
    row = compare(args) | {"malloc": allocator_in_use(), "system_malloc": args.system_malloc}
    add_row(args.out, args.label or args.config, row)


if __name__ == "__main__":
    main()
