r"""Make the embedded default: a Llama-shaped tiny LM that follows list instructions given in its prompt.

    python tools/make_tiny_lm.py --out first --examples 48
    python tools/make_tiny_lm.py --out second --start-from first --examples 48 --steps 2500 --lr 1.5e-3 --family-share 0.15
    python tools/make_tiny_lm.py --out third --start-from second --steps 1500 --lr 1.5e-3 --family-share 0.15
    python tools/make_tiny_lm.py --out fourth --start-from third --steps 1300 --lr 1.5e-3 --family-share 0 \
        --instruction-share 0.9 --examples 800
    python tools/make_tiny_lm.py --out ship_ds/assets/tiny_lm --start-from fourth --steps 700 --lr 1.2e-3 --family-share 0 \
        --instruction-share 0.95 --examples 800 --seed 1

The first run meets families evenly, the others mostly rules, so that compositions, each a rule of its own, are met more often.
With 48 examples a rule the second ends at 0.90 on seen rules, its loss near zero: it knows its examples by heart. The third
draws from 400 a rule (0.94), the last two from 800 (0.955), the test examples of the default world left out.

It learns from the seen rules alone: answering with the instruction in the prompt, answering from n shots, and naming the
rule from examples. Everything is drawn from seeded generators, so one machine with one thread count gives one file hash.
The accuracies it prints at the end are measured on the NF4 model, the way SHIP uses it.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ship_ds.data.rules import RulesConfig, build_world
from ship_ds.data.task import SplitTask
from ship_ds.prompt import PromptFormat

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user> {{ message['content'] }} "
    "{% else %}<assistant> {{ message['content'] }} <eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
PROMPT_WORDS = "instruction input output target this task is to".split()
REST = {"shots": 2, "naming": 5}
"""How the steps that are not on instructions are shared out."""


def make_tokenizer(tasks: list[SplitTask]) -> PreTrainedTokenizerFast:
    words = {word for task in tasks for text in (*task.wordings, *task.held_out_paraphrases) for word in text.split()}
    vocabulary = SPECIAL + [str(n) for n in range(100)] + sorted((words | set(PROMPT_WORDS)) - set(map(str, range(100))))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex("[:,.]"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"], clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def draw(kind: str, task: SplitTask, prompts: PromptFormat, rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    wording = rng.choice(task.wordings)
    if kind == "instruction":
        example = rng.choice(task.train)
        return prompts.task_prompt(example.input, wording), prompts.target(example.target)
    shown = rng.sample(task.train, rng.randint(1, 6) + (kind == "shots"))
    if kind == "shots":
        return prompts.task_prompt(shown[0].input, None, shown[1:]), prompts.target(shown[0].target)
    return prompts.decoder_prompt(shown), prompts.target(wording)


def with_more_examples(tasks: Sequence[SplitTask], num_examples: int) -> list[SplitTask]:
    """The same rules with `num_examples` examples each to train on; what the default world tests on stays out."""
    config = RulesConfig(train_examples=num_examples)
    more = {task.id: task for task in build_world(config).seen}
    return [
        replace(task, train=tuple(e for e in more[task.id].train if e.input not in {test.input for test in task.test}))
        for task in tasks
    ]


def draw_task(
    tasks: list[SplitTask], families: dict[str, list[SplitTask]], family_share: float, rng: random.Random
) -> SplitTask:
    """A share of the draws is over families first, or a rule like "sort the list" is met too seldom."""
    return rng.choice(families[rng.choice(list(families))]) if rng.random() < family_share else rng.choice(tasks)


def collate(rows: list[tuple[tuple[int, ...], tuple[int, ...]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(p) + len(t) for p, t in rows)
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), -100)
    for i, (prompt, target) in enumerate(rows):
        ids[i, : len(prompt) + len(target)] = torch.tensor(prompt + target)
        labels[i, len(prompt) : len(prompt) + len(target)] = torch.tensor(target)
    return ids, labels


def train(model: LlamaForCausalLM, tasks: list[SplitTask], prompts: PromptFormat, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(f"{args.seed} {args.start_from is not None}")
    families: dict[str, list[SplitTask]] = {}
    for task in tasks:
        first, plus, _ = task.task.family.partition("+")
        families.setdefault(first + plus, []).append(task)
    started = time.time()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 200, 0.02 + 0.98 * (1 + math.cos(math.pi * step / args.steps)) / 2)
        kind = "instruction" if rng.random() < args.instruction_share else rng.choices(list(REST), list(REST.values()))[0]
        size = args.batch if kind == "instruction" else args.batch // 4
        drawn = [draw_task(tasks, families, args.family_share, rng) for _ in range(size)]
        ids, labels = collate([draw(kind, task, prompts, rng) for task in drawn], prompts.pad_id)
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][labels[:, 1:] != -100]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), labels[:, 1:][labels[:, 1:] != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == args.steps - 1:
            print(f"step {step} {kind} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True)
            if args.save_every and step and step % args.save_every == 0:
                model.save_pretrained(args.out)


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, rows: list[tuple[tuple[int, ...], tuple[str, ...]]], prompts: PromptFormat) -> float:
    """The share of greedy continuations that end and equal one of the row's right texts."""
    right = 0
    for start in range(0, len(rows), 256):
        chunk = rows[start : start + 256]
        length = max(len(prompt) for prompt, _ in chunk)
        ids = torch.tensor([[prompts.pad_id] * (length - len(p)) + list(p) for p, _ in chunk])
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p, _ in chunk])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=prompts.pad_id)
        pairs = zip(out[:, length:], chunk, strict=True)
        right += sum(prompts.text(o.tolist()) in texts and prompts.eos_id in o for o, (_, texts) in pairs)
    return right / len(rows)


def measure(model: LlamaForCausalLM, parts: dict[str, list[SplitTask]], prompts: PromptFormat) -> dict[str, float]:
    scores = {}
    for part, tasks in parts.items():
        rng = random.Random(0)
        rows = [(prompts.task_prompt(e.input, t.task.instruction), (e.target,)) for t in tasks for e in t.test[:3]]
        scores[f"instruction/{part}"] = accuracy(model, rows, prompts)
        rows = [(prompts.task_prompt(t.test[0].input, None, rng.sample(t.train, 5)), (t.test[0].target,)) for t in tasks]
        scores[f"5 shots/{part}"] = accuracy(model, rows, prompts)
        names = [(prompts.decoder_prompt(rng.sample(t.train, 5)), t.wordings) for t in tasks]
        scores[f"naming/{part}"] = accuracy(model, names, prompts)
    return {name: round(value, 4) for name, value in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--instruction-share", type=float, default=0.72, help="of the steps with the instruction in the prompt")
    parser.add_argument("--examples", type=int, default=400, help="training examples a rule")
    parser.add_argument("--family-share", type=float, default=0.5, help="of the draws that choose a family before a rule")
    parser.add_argument("--start-from", type=Path, help="go on from this folder's weights with a fresh optimiser")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    world = build_world(RulesConfig())
    tokenizer = make_tokenizer([*world.seen, *world.dev, *world.unseen])
    prompts = PromptFormat(tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False,
        pad_token_id=prompts.pad_id, eos_token_id=prompts.eos_id, bos_token_id=None,
    )
    model = LlamaForCausalLM(config) if args.start_from is None else LlamaForCausalLM.from_pretrained(args.start_from)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(world.seen)} seen rules", flush=True)
    tokenizer.save_pretrained(args.out)
    train(model, with_more_examples(world.seen, args.examples), prompts, args)
    model.save_pretrained(args.out)

    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantised = LlamaForCausalLM.from_pretrained(args.out, quantization_config=quantisation, dtype=torch.float32)
    scores = {
        "nf4": measure(quantised.eval(), {"seen": list(world.seen), "unseen": list(world.unseen)}, prompts),
        "fp32": measure(model.eval(), {"seen": list(world.seen)[::4]}, prompts),
        "arguments": {name: str(value) for name, value in vars(args).items() if name not in ("out", "start_from")},
    }
    (args.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
