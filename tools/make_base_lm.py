r"""Make a small base model for a folder of real tasks: a byte-level BPE tokenizer and a Llama
trained on the run's seen tasks.

    python tools/make_base_lm.py --config list-functions \
        --out runs/bases/list-functions data.path=../shared/data/list-functions

For a machine without a pretrained model. It reads the data through the run's own config, so it sees
the seen tasks and their training examples alone, and learns three kinds of text: an answer with the
instruction in the prompt, an answer after shots, and the instruction after examples. Give the
folder to the run as model.*.base.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ship_ds.config import load_config
from ship_ds.data.readers import read_tasks
from ship_ds.data.task import SplitTask
from ship_ds.data.task_files import FilesConfig, FilesSource
from ship_ds.errors import UserError
from ship_ds.prompt import PromptFormat
from ship_ds.runtime.engine import cosine

KINDS = {"instruction": 0.6, "shots": 0.15, "naming": 0.25}
MAX_TOKENS = 384


def make_tokenizer(config: FilesConfig, vocabulary: int, out: Path) -> PreTrainedTokenizerFast:
    """Trained on every text of the folder; a tokenizer learns no rule."""
    tasks = read_tasks(Path(config.path), config.format)
    texts = [
        text
        for task in tasks
        for e in task.examples
        for text in (task.instruction, e.input, e.target)
    ]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts, vocab_size=vocabulary, special_tokens=["<pad>", "<eos>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def draw(
    task: SplitTask, prompts: PromptFormat, rng: random.Random
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    shown = rng.sample(task.train, min(len(task.train), rng.randint(2, 4)))
    wording = rng.choice(task.wordings)
    if kind == "instruction":
        return prompts.task_prompt(shown[0].input, wording), prompts.target(shown[0].target)
    if kind == "shots":
        return prompts.task_prompt(shown[0].input, None, shown[1:]), prompts.target(shown[0].target)
    return prompts.decoder_prompt(shown[1:]), prompts.target(wording)


def train(
    model: LlamaForCausalLM,
    tasks: tuple[SplitTask, ...],
    prompts: PromptFormat,
    args: argparse.Namespace,
) -> float:
    """The mean loss of the last 20 steps, over prompts and targets alike: a base model has to model
    both."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    rng, started, losses = random.Random(args.seed), time.time(), []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50, cosine(step / args.steps))
        rows = [draw(rng.choice(tasks), prompts, rng) for _ in range(args.batch)]
        rows = [row for row in rows if len(row[0]) + len(row[1]) <= MAX_TOKENS] or rows[:1]
        length = max(len(prompt) + len(target) for prompt, target in rows)
        ids = torch.full((len(rows), length), prompts.pad_id)
        labels = torch.full((len(rows), length), -100)
        for i, (prompt, target) in enumerate(rows):
            ids[i, : len(prompt) + len(target)] = labels[i, : len(prompt) + len(target)] = (
                torch.tensor(prompt + target)
            )
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
    return sum(losses[-20:]) / len(losses[-20:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, help="the recipe or YAML file of the run that will use the base"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_intermixed_args()
    try:
        data = load_config(args.config, args.overrides).data
        if not isinstance(data, FilesConfig):
            raise UserError(
                f"{args.config}: data.kind is not files; the generated rules have a "
                "base, the embedded one"
            )
        tokenizer = make_tokenizer(data, args.vocabulary, args.out)
        splits = FilesSource(data).read(tokenizer, print)
    except UserError as error:
        print(f"make_base_lm: {error}", file=sys.stderr)
        return 2
    prompts = PromptFormat(tokenizer)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.width,
            intermediate_size=3 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            pad_token_id=prompts.pad_id,
            eos_token_id=prompts.eos_id,
            bos_token_id=None,
        )
    )
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(splits.seen)} seen tasks"
    )
    loss = train(model, splits.seen, prompts, args)
    model.save_pretrained(args.out)
    (args.out / "training.json").write_text(
        json.dumps({"loss": loss, **{k: str(v) for k, v in vars(args).items()}}, indent=2)
    )
    print(f"{args.out}: loss {loss:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
