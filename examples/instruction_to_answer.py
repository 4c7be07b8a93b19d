"""An instruction becomes an adapter's folder, and `peft` alone answers with it.

    python examples/instruction_to_answer.py runs/quickstart "add 5 to element 2" "3 7 3 5"

The folder that `ship-ds deduce` writes is an ordinary adapter of `peft`, or has two inside that are
loaded one around the other: what opens it below knows nothing of ship_ds but how a prompt reads,
which is part of what the adapter was trained for. The instruction itself is not in the prompt.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def make_adapter(run: str, instruction: str, folder: Path) -> None:
    """Write the adapter of an instruction, proved on a probe before it is there."""
    command = ["deduce", instruction, "--run", run, "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "ship_ds.cli", *command], check=True)


@torch.no_grad()
def answer(folder: Path, text: str, max_new_tokens: int = 20) -> str:
    """What the base model under the adapter in `folder` answers to `text`."""
    names = json.loads((folder / "ship.json").read_text())["folders"] or ["."]
    base = PeftConfig.from_pretrained(folder / names[0]).base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    for name in names:
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        model = PeftModel.from_pretrained(inner, folder / name).eval()
    message = [{"role": "user", "content": f"input: {text}"}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def main() -> None:
    """Make the adapter of the instruction, and print what it answers to each input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("instruction")
    parser.add_argument("inputs", nargs="+")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        make_adapter(args.run, args.instruction, folder)
        for text in args.inputs:
            print(f"{text} -> {answer(folder, text)}")


if __name__ == "__main__":
    main()
