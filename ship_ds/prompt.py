"""The prompt format: how instructions, inputs and examples become token ids. It is part of the model.

Adapters only work under the prompt they were trained with, so the format is one versioned value that is saved, with its
hash, in the run, the bundle and every exported adapter's card. Labels go on the answer and the end-of-sequence token alone.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from ship_ds.data.task import Example

VERSION = 1
_MARK = "\x00"
_PLAIN_TEMPLATE = (f"{_MARK}\n", "\n")
"""Before and after the user's text for a base model without a chat template."""


class PromptFormat:
    """Token ids for the three roles. Every method returns ids without padding; `eos_id` ends each target.

    Raises ValueError when the tokenizer has no end-of-sequence token, since answers could then never end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no eos_token; set one in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_id
        self.before, self.after = self._split_template()
        self._ids = lru_cache(maxsize=1 << 18)(self._tokenise)

    def _split_template(self) -> tuple[str, str]:
        if self.tokenizer.chat_template is None:
            bos = self.tokenizer.bos_token or ""
            return bos + _PLAIN_TEMPLATE[0].split(_MARK)[0], _PLAIN_TEMPLATE[1]
        rendered: Any = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
        before, after = rendered.split(_MARK)
        return before, after

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prompt(self, user_text: str) -> tuple[int, ...]:
        return self._ids(self.before + user_text + self.after)

    def target(self, text: str) -> tuple[int, ...]:
        return (*self._ids(text), self.eos_id)

    def task_prompt(self, text: str, instruction: str | None = None, shots: Sequence[Example] = ()) -> tuple[int, ...]:
        """What the Task LLM reads before it answers `text`; n-shot when `shots` are given."""
        lines = [f"instruction: {instruction}"] if instruction is not None else []
        for shot in shots:
            lines += [f"input: {shot.input}", f"output: {shot.target}"]
        return self._prompt("\n".join([*lines, f"input: {text}"]))

    def encoder_prompt(self, instruction: str) -> tuple[int, ...]:
        """What the encoder reads; the posterior is taken from the hidden state of the last token."""
        return self._prompt(f"instruction: {instruction}")

    def decoder_prompt(self, examples: Sequence[Example]) -> tuple[int, ...]:
        """What the decoder reads after the soft tokens of z (SHIP, section 3.2: "input: x, target: y. This task is to:")."""
        shown = " ".join(f"input: {example.input}, target: {example.target}." for example in examples)
        return self._prompt(f"{shown} This task is to:".strip())

    def text(self, ids: Sequence[int]) -> str:
        """Generated ids up to the end-of-sequence token, as text."""
        ids = list(ids)
        kept = ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids
        decoded: Any = self.tokenizer.decode(kept, skip_special_tokens=True)
        return decoded.strip()

    def describe(self) -> dict[str, Any]:
        """The format as saved: what has to be equal for an adapter to mean the same."""
        content = {
            "version": VERSION,
            "before": self.before,
            "after": self.after,
            "task": "instruction: {k}\\ninput: {x}",
            "decoder": "input: {x}, target: {y}. This task is to:",
            "eos": self.tokenizer.eos_token,
            "labels": "target and eos",
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        return {**content, "hash": digest}
