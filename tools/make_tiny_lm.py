"""Make the embedded default: a Llama-shaped tiny LM that follows list instructions given in its
prompt.

    python tools/make_tiny_lm.py --out ship_ds/assets/tiny_lm          # 50 minutes on two cores

It learns from the seen rules and from compositions outside the world (`rules.other_compositions`),
never from a dev or an unseen rule: answering with the instruction in the prompt, answering from n
shots, and naming the rule from examples. Every row has an example of its own; with a fixed number
for each rule (48, 400) it came to know them by heart. Everything is drawn from seeded generators,
so one machine with one thread count gives one file hash. The accuracies that it prints at the end
are measured on the NF4 model, the way SHIP uses it.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ship_ds.data.rules import (
    Rule,
    RulesConfig,
    build_world,
    draw_examples,
    draw_wording,
    other_compositions,
    part_rules,
)
from ship_ds.data.task import Example, SplitTask
from ship_ds.prompt import PromptFormat
from ship_ds.runtime.engine import cosine

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user> {{ message['content'] "
    "}} "
    "{% else %}<assistant> {{ message['content'] }} <eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
PROMPT_WORDS = "instruction input output target this task is to".split()
KINDS = {"instruction": 0.78, "shots": 0.07, "naming": 0.15}
"""How the steps are shared out."""
SOURCES = {"family": 0.2, "seen": 0.45, "other": 0.35}
"""How rows are shared out. Over families first, or a rule like "sort the list" is met too
seldom."""


def make_tokenizer(tasks: list[SplitTask]) -> PreTrainedTokenizerFast:
    words = {
        word
        for task in tasks
        for text in (*task.wordings, *task.held_out_paraphrases)
        for word in text.split()
    }
    vocabulary = (
        SPECIAL
        + [str(n) for n in range(100)]
        + sorted((words | set(PROMPT_WORDS)) - set(map(str, range(100))))
    )
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[:,.]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


class Drawer:
    """Draws rules and rows. A rule's test inputs in the default world are never drawn."""

    def __init__(self, tasks: Sequence[SplitTask], prompts: PromptFormat, seed: int) -> None:
        self.prompts, self.rng = prompts, random.Random(seed)
        self.tested = {task.id: {example.input for example in task.test} for task in tasks}
        self.seen = part_rules(RulesConfig().seed)[0]
        self.other = other_compositions(RulesConfig().seed, per_pair=200)
        self.families: dict[str, list[Rule]] = {}
        for rule in self.seen:
            if not rule.steps:
                self.families.setdefault(rule.family, []).append(rule)

    def rule(self) -> Rule:
        source = self.rng.choices(list(SOURCES), list(SOURCES.values()))[0]
        if source == "family":
            return self.rng.choice(self.families[self.rng.choice(list(self.families))])
        return self.rng.choice(self.seen if source == "seen" else self.other)

    def examples(self, rule: Rule, count: int) -> list[Example]:
        tested = self.tested.get(rule.name, set())
        found: list[Example] = []
        while len(found) < count:
            found += [
                e
                for e in draw_examples(rule, count - len(found), self.rng)
                if e.input not in tested
            ]
        return found

    def row(self, kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rule = self.rule()
        if kind == "instruction":
            (example,) = self.examples(rule, 1)
            return self.prompts.task_prompt(
                example.input, draw_wording(rule, self.rng)
            ), self.prompts.target(example.target)
        first, *more = self.examples(rule, self.rng.randint(1, 6) + (kind == "shots"))
        if kind == "shots":
            return self.prompts.task_prompt(first.input, None, more), self.prompts.target(
                first.target
            )
        return self.prompts.decoder_prompt([first, *more]), self.prompts.target(
            self.rng.choice(rule.wordings)
        )


def collate(
    rows: list[tuple[tuple[int, ...], tuple[int, ...]]], pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(p) + len(t) for p, t in rows)
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), -100)
    for i, (prompt, target) in enumerate(rows):
        ids[i, : len(prompt) + len(target)] = torch.tensor(prompt + target)
        labels[i, len(prompt) : len(prompt) + len(target)] = torch.tensor(target)
    return ids, labels


def train(model: LlamaForCausalLM, drawer: Drawer, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    backbone = torch.compile(model.model, dynamic=True)
    started = time.time()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 200, cosine(step / args.steps))
        kind = drawer.rng.choices(list(KINDS), list(KINDS.values()))[0]
        rows = [
            drawer.row(kind)
            for _ in range(args.batch if kind == "instruction" else args.batch // 4)
        ]
        ids, labels = collate(rows, drawer.prompts.pad_id)
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][
            labels[:, 1:] != -100
        ]
        loss = torch.nn.functional.cross_entropy(
            model.lm_head(hidden), labels[:, 1:][labels[:, 1:] != -100]
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == args.steps - 1:
            print(
                f"step {step} {kind} loss {loss.item():.4f} {time.time() - started:.0f} s",
                flush=True,
            )
            if args.save_every and step and step % args.save_every == 0:
                model.save_pretrained(args.out)


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM,
    rows: Sequence[tuple[tuple[int, ...], Sequence[str]]],
    prompts: PromptFormat,
) -> float:
    """The share of greedy continuations that end and equal one of the row's right texts."""
    right = 0
    for start in range(0, len(rows), 256):
        chunk = rows[start : start + 256]
        length = max(len(prompt) for prompt, _ in chunk)
        ids = torch.tensor([[prompts.pad_id] * (length - len(p)) + list(p) for p, _ in chunk])
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p, _ in chunk])
        out = model.generate(  # type: ignore[misc]  # by transformers' own types it has none
            ids,
            attention_mask=mask,
            max_new_tokens=32,
            do_sample=False,
            pad_token_id=prompts.pad_id,
        )
        pairs = zip(out[:, length:], chunk, strict=True)
        right += sum(
            prompts.text(o.tolist()) in texts and prompts.eos_id in o for o, (_, texts) in pairs
        )
    return right / len(rows)


def measure(
    model: LlamaForCausalLM, parts: dict[str, list[SplitTask]], prompts: PromptFormat
) -> dict[str, float]:
    scores = {}
    for part, tasks in parts.items():
        rng = random.Random(0)
        rows = [
            (prompts.task_prompt(e.input, t.task.instruction), (e.target,))
            for t in tasks
            for e in t.test[:3]
        ]
        scores[f"instruction/{part}"] = accuracy(model, rows, prompts)
        rows = [
            (
                prompts.task_prompt(t.test[0].input, None, rng.sample(t.train, 5)),
                (t.test[0].target,),
            )
            for t in tasks
        ]
        scores[f"5 shots/{part}"] = accuracy(model, rows, prompts)
        names = [(prompts.decoder_prompt(rng.sample(t.train, 5)), t.wordings) for t in tasks]
        scores[f"naming/{part}"] = accuracy(model, names, prompts)
    return {name: round(value, 4) for name, value in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    world = build_world(RulesConfig())
    tokenizer = make_tokenizer([*world.seen, *world.dev, *world.unseen])
    prompts = PromptFormat(tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=prompts.pad_id,
        eos_token_id=prompts.eos_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(world.seen)} seen rules",
        flush=True,
    )
    tokenizer.save_pretrained(args.out)
    train(model, Drawer(world.seen, prompts, args.seed), args)
    model.save_pretrained(args.out)

    from ship_ds.model import nf4

    quantised = LlamaForCausalLM.from_pretrained(
        args.out, quantization_config=nf4.config(torch.float32), dtype=torch.float32
    )
    scores = {
        "nf4": measure(
            quantised.eval(), {"seen": list(world.seen), "unseen": list(world.unseen)}, prompts
        ),
        "fp32": measure(model.eval(), {"seen": list(world.seen)[::4]}, prompts),
        "arguments": {
            name: str(value)
            for name, value in vars(args).items()
            if name not in ("out", "save_every")
        },
    }
    (args.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
