"""The prompt format: how instructions, inputs and examples become token ids. It is part of the
model.

Adapters only work under the prompt they were trained with, so the format is one versioned value
that is saved, with its hash, in the bundle and in every exported adapter's card. The hash is made
of the token ids of fixed samples, so that no change of a template, of this file or of a tokenizer
goes unseen. Labels go on the answer and the end-of-sequence token alone.
"""

import contextlib
import hashlib
import json
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, tzinfo
from functools import lru_cache
from reprlib import Repr
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from ship_ds.base_shapes import check_end_id, no_end
from ship_ds.data.task import CutOff, Example, Reading, Splits, SplitTask
from ship_ds.errors import UserError
from ship_ds.template_limits import TemplateLimitError, within_limits

VERSION = 2
"""Of the description that is saved; 0.1.0 wrote the first one, and its bundles still open."""
ROLES = ("task_llm", "encoder", "decoder")
"""The language models of a SHIP, as a config names them; each may have its own tokenizer."""
_MARK = "\x00"
_SHORT = Repr()
_SHORT.maxstring = 80
_PLAIN_TEMPLATE = (f"{_MARK}\n", "\n")
"""Before and after the user's text for a base model without a chat template; after it the end of
sequence where another stack writes the answer."""


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    """The template's text: of a template that others wrote, within limits of time and memory.

    Some say what day it is. A prompt that differs from day to day is none that an adapter could be
    trained for, so for them it is always the same one.
    """

    key = str((type(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map, turns))
    if key in _RENDERED:
        return _RENDERED[key]

    def render() -> str:
        # Jinja can draw from a list, and a prompt that is drawn is another one in each process.
        random.seed(0)
        # In the child that renders, whose own modules these are. Of what it is given, transformers
        # passes on data alone, and no clock.
        chat_template_utils.datetime = _TemplatesDay  # type: ignore[attr-defined]
        text: Any = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return str(text)

    _RENDERED[key] = within_limits(render)
    return _RENDERED[key]


_RENDERED: dict[str, str] = {}
"""What a template gave, by all that it is given: three roles of one base have the same, and a child
takes longer to start the larger this process is."""


class _TemplatesDay(datetime):
    """A clock that stands: at the day that Llama 3's template names where it is told none."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "_TemplatesDay":
        """Always the same."""
        return cls(2024, 7, 26, tzinfo=tz)


_COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}


def _stated(instruction: str) -> str:
    return f"instruction: {instruction}"


def _asked(text: str) -> str:
    return f"input: {text}"


class PromptFormat:
    """Token ids for the three roles. Every method returns ids without padding; `eos_id` ends each
    target.

    Args:
        tokenizer: with its chat template, if it has one.
        system_message: what the template gets as the system's turn; None: no such turn, and some
            templates put in a sentence of their own.
        ends: tokens by which the base's own answers end, such as Gemma's <end_of_turn>, which its
            generation_config.json names and its tokenizer does not; SHIP's end by `eos_id`.
        vocabulary_size: of the base's embeddings; None: as large as it has to be.
        ends_prompts: what is read ends by itself, as T5 was trained to read, and is not continued.

    Raises:
        UserError: the tokenizer has no end-of-sequence token, so that answers could never end; or
            its template cannot be rendered, does not hold the user's text once, or leaves the
            system message out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_message: str | None = None,
        ends: Collection[int] = (),
        vocabulary_size: int | None = None,
        ends_prompts: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise no_end(tokenizer.name_or_path)
        self.tokenizer = tokenizer
        self.reads_examples = False
        """Whether the encoder is shown examples: part of what is described."""
        self.eos_id: int = tokenizer.eos_token_id
        if vocabulary_size is not None:
            check_end_id(tokenizer.name_or_path, self.eos_id, vocabulary_size)
        self.other_ends = tuple(sorted({*ends} - {self.eos_id}))
        self.pad_id = _pad_id(tokenizer, self.eos_id, vocabulary_size)
        self._specials = _special_texts(tokenizer)
        self._controls = _control_ids(tokenizer, {self.eos_id, *self.other_ends})
        self._end = str(tokenizer.eos_token) if ends_prompts else _PLAIN_TEMPLATE[1]
        self.before, self.after = self._split_template(system_message)
        self._known: Mapping[str, tuple[int, ...]] = {}
        self._ids = lru_cache(maxsize=1 << 18)(self._tokenise)

    def _split_template(self, system_message: str | None) -> tuple[str, str]:
        """What stands before and after the user's text."""
        if self.tokenizer.chat_template is None:
            if system_message is not None:
                raise self._refused("there is none for model.system_message", "leave that out")
            bos = self.tokenizer.bos_token or ""
            return bos + _PLAIN_TEMPLATE[0].split(_MARK)[0], self._end
        templates = self.tokenizer.chat_template
        if isinstance(templates, dict) and "default" not in templates:
            raise self._refused(
                f"of {', '.join(sorted(templates)) or 'none'}, none is named default",
                "name one so, or put one alone into chat_template.jinja",
            )
        turns = [{"role": "user", "content": _MARK}]
        if system_message is not None:
            turns.insert(0, {"role": "system", "content": system_message})
        try:
            rendered = _rendered(self.tokenizer, turns)
        except (TemplateError, TemplateLimitError) as error:
            raise self._refused(
                f"it cannot be rendered {'without' if system_message is None else 'with'} "
                f"model.system_message ({error})",
                self._way_out(system_message, error),
            ) from error
        if rendered.count(_MARK) != 1:
            raise self._refused(
                f"it holds the user's text {rendered.count(_MARK)} times, not once",
                "mend the template",
            )
        if system_message is not None and system_message.strip() not in rendered:
            raise self._refused("it leaves model.system_message out", "leave that out as well")
        before, after = rendered.split(_MARK)
        return before, after

    def _way_out(self, system_message: str | None, error: Exception) -> str:
        """By another attempt: what helps is said alone, and no limit is met twice."""
        user = {"role": "user", "content": _MARK}
        if not isinstance(error, TemplateLimitError):
            other = [user] if system_message is not None else [{**user, "role": "system"}, user]
            with contextlib.suppress(TemplateError, TemplateLimitError):
                _rendered(self.tokenizer, other)
                way_out = "set model.system_message" if system_message is None else "leave it out"
                return f"{way_out}, or mend the template"
        return "mend the template, or remove it for plain prompts"

    def _refused(self, reason: str, way_out: str) -> UserError:
        return UserError(f"{self.tokenizer.name_or_path}: chat template: {reason}; {way_out}")

    def texts(self, tasks: Iterable[SplitTask]) -> list[str]:
        """The very strings that answering and encoding these tasks will tokenise; what a token
        cache is made of."""
        texts: dict[str, None] = {}
        for task in tasks:
            for wording in (*task.wordings, *task.held_out_paraphrases):
                texts |= {self._wrap(_stated(wording)): None, wording: None}
            for example in (*task.train, *task.test):
                texts |= {self._wrap(_asked(example.input)): None, example.target: None}
        return list(texts)

    def remember(self, ids: Mapping[str, tuple[int, ...]]) -> None:
        """Take these strings' tokens from a cache instead of the tokenizer."""
        self._known = ids

    def forget_beyond(self, num_texts: int) -> None:
        """Keep the tokens of no more texts than this: for a program whose texts others choose."""
        self._ids = lru_cache(maxsize=num_texts)(self._tokenise)

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return (
            self._known[text]
            if text in self._known
            else tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        )

    def _wrap(self, user_text: str) -> str:
        return self.before + user_text + self.after

    def _holds_specials(self, text: str) -> bool:
        return self._specials is not None and self._specials.search(text) is not None

    def _letters(self, text: str) -> tuple[int, ...]:
        """The ids of a user's text in which "<eos>" is five letters and no end of anything, unless
        the vocabulary itself holds that word."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return tuple(ids)

    def acting_token(self, text: str) -> str | None:
        """The first control token of a user's text that no letters spell, since the vocabulary
        holds it as a word: it would act as one. None where there is none."""
        return self._acting(self._letters(text)) if self._holds_specials(text) else None

    def _acting(self, ids: Iterable[int]) -> str | None:
        left = next((one for one in ids if one in self._controls), None)
        return None if left is None else str(self.tokenizer.convert_ids_to_tokens(left))

    def check_spelling(self, text: str, what: str) -> None:
        """Refuse a text that has an `acting_token`.

        Args:
            text: what a user wrote.
            what: it is, for the message.

        Raises:
            UserError: it has one.
        """
        if (token := self.acting_token(text)) is not None:
            raise _would_act(what, token)

    def _spelled_out(self, text: str) -> tuple[int, ...]:
        ids = self._letters(text)
        if (token := self._acting(ids)) is not None:
            raise _would_act(_SHORT.repr(text), token)
        return ids

    def ids(self, text: str) -> tuple[int, ...]:
        """A user's text by itself: an answer without its end.

        Raises:
            UserError: see `check_spelling`, as for every method that takes a user's text.
        """
        if self._holds_specials(text):
            return self._spelled_out(text)
        return self._ids(text)

    def _prompt(self, user_text: str) -> tuple[int, ...]:
        if self._holds_specials(user_text):
            return (
                *self._ids(self.before),
                *self._spelled_out(user_text),
                *self._ids(self.after),
            )
        return self._ids(self._wrap(user_text))

    def target(self, text: str) -> tuple[int, ...]:
        """An answer's ids, and the end of sequence."""
        return (*self.ids(text), self.eos_id)

    def task_prompt(
        self, text: str, instruction: str | None = None, shots: Sequence[Example] = ()
    ) -> tuple[int, ...]:
        """What the Task LLM reads before it answers `text`; n-shot when `shots` are given.

        Args:
            text: the input.
            instruction: stated before everything else; None: it is not stated, as where the adapter
                has it.
            shots: examples that are shown with their targets, before the input.

        Returns:
            Token ids.

        Raises:
            UserError: see `check_spelling`; of any of these texts.
        """
        lines = [_stated(instruction)] if instruction is not None else []
        for shot in shots:
            lines += [f"input: {shot.input}", f"output: {shot.target}"]
        return self._prompt("\n".join([*lines, _asked(text)]))

    def published_task_prompt(self, text: str, instruction: str) -> tuple[int, ...]:
        """The execution prompt of Honovich et al. (2022, arXiv 2205.10782), as a user's turn."""
        return self._prompt(f"Instruction: {instruction}\nInput: {text}\nOutput:")

    def published_induction_prompt(self, examples: Sequence[Example]) -> tuple[int, ...]:
        """Theirs by which a model names the instruction of examples."""
        pairs = "\n\n".join(f"Input: {one.input}\nOutput: {one.target}" for one in examples)
        count = _COUNTS.get(len(examples), str(len(examples)))
        return self._prompt(
            f"I gave a friend an instruction and {count} inputs. The friend read the instruction "
            "and wrote an output for every one of the inputs.\nHere are the input-output pairs:"
            f"\n\n{pairs}\n\nThe instruction was"
        )

    def encoder_prompt(self, read: str | Reading) -> tuple[int, ...]:
        """What the encoder reads: an instruction, or that and examples, or examples alone."""
        if isinstance(read, str):
            read = Reading(read)
        lines = [] if read.instruction is None else [_stated(read.instruction)]
        for example in read.examples:
            lines += [f"input: {example.input}"]
            lines += [f"output: {example.target}"] if read.states_targets else []
        return self._prompt("\n".join(lines))

    def decoder_prompt(self, examples: Sequence[Example]) -> tuple[int, ...]:
        """What the decoder reads after the soft tokens of z (SHIP, section 3.2: "input: x, target:
        y. This task is to:")."""
        shown = " ".join(
            f"input: {example.input}, target: {example.target}." for example in examples
        )
        return self._prompt(f"{shown} This task is to:".strip())

    def text(self, ids: Sequence[int]) -> str:
        """Generated ids up to the end-of-sequence token, as text."""
        ids = list(ids)
        kept = ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids
        decoded: Any = self.tokenizer.decode(kept, skip_special_tokens=True)
        return decoded.strip()

    def finished_text(self, ids: Sequence[int]) -> str | None:
        """As `text`, but None where no end-of-sequence came in time: an answer that never ended is
        none."""
        return self.text(ids) if ids[-1] == self.eos_id else None

    def written_text(self, ids: Sequence[int]) -> str:
        """As `text`, but a `CutOff` where no end-of-sequence came in time."""
        return self.text(ids) if ids[-1] == self.eos_id else CutOff(self.text(ids))

    def samples(self) -> dict[str, tuple[int, ...]]:
        """Token ids of fixed texts through every method that renders for a model, by a name.

        They have one example, several and none: what stands between two is part of the format too.
        """
        instruction, text = "add 2 to it", "3 1"
        examples = (Example("1 4", "3 6"), Example("5", "7"))
        return {
            "input": self.task_prompt(text),
            "instruction and input": self.task_prompt(text, instruction),
            "examples and input": self.task_prompt(text, None, examples),
            "encoder": self.encoder_prompt(instruction),
            **self._samples_with_examples(examples),
            "decoder": self.decoder_prompt(()),
            "decoder with examples": self.decoder_prompt(examples),
            "target": self.target("5 3"),
        }

    def _samples_with_examples(self, examples: tuple[Example, ...]) -> dict[str, tuple[int, ...]]:
        """Of an encoder that reads examples: a format without has no such lines, and bundles from
        before there were any keep their description."""
        if not self.reads_examples:
            return {}
        return {
            "encoder with examples": self.encoder_prompt(Reading("add 2 to it", examples)),
            "encoder with inputs": self.encoder_prompt(Reading(None, examples, False)),
        }

    def describe(self) -> dict[str, Any]:
        """The format as saved, for people as texts and for programs as a hash:

        {"version": 2, "samples": {"input": "<user> input: 3 1 <assistant>", ...}, "hash": "0f..."}
        """
        samples = self.samples()
        texts = {name: self.tokenizer.decode(list(ids)) for name, ids in samples.items()}
        return {"version": VERSION, "samples": texts, "hash": _hash(samples)}

    def describe_as_0_1_0(self) -> dict[str, Any]:
        """What version 0.1.0 saved for this format: templates in words, beside the chat template's
        own text. A bundle of it is compared with this."""
        content = {
            "version": 1,
            "before": self.before,
            "after": self.after,
            "task": "instruction: {k}\\ninput: {x}",
            "decoder": "input: {x}, target: {y}. This task is to:",
            "eos": self.tokenizer.eos_token,
            "labels": "target and eos",
        }
        return {**content, "hash": _hash(content)}


def _pad_id(tokenizer: PreTrainedTokenizerBase, eos_id: int, vocabulary_size: int | None) -> int:
    """The tokenizer's padding, where it has one and the model embeds it."""
    pad_id: int | None = tokenizer.pad_token_id
    if pad_id is None or (vocabulary_size is not None and pad_id >= vocabulary_size):
        return eos_id
    return pad_id


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """What the tokenizer takes for control tokens wherever it stands; None where it has none."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = sorted({*tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _control_ids(tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> frozenset[int]:
    """Tokens that no user's text may become. That of unknown words is none, unless it ends too."""
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    controls = added | {*tokenizer.all_special_ids}
    return frozenset(controls - ({tokenizer.unk_token_id} - {*ends}))


def _would_act(what: str, token: str) -> UserError:
    return UserError(
        f"{what}: {token!r} is a control token of the base model, whose vocabulary has no letters "
        "to spell it, and would act as one: leave it out"
    )


def check_tasks(formats: Iterable[PromptFormat], splits: Splits) -> None:
    """Refuse tasks with a text that one of these formats cannot spell.

    Args:
        formats: of the models that read them.
        splits: the tasks.

    Raises:
        UserError: there is one; the message says where the task was read.
    """
    for form in formats:
        for task in splits.tasks:
            examples = (*task.train, *task.test)
            for part, texts in (
                ("instruction", (*task.wordings, *task.held_out_paraphrases)),
                ("input", [example.input for example in examples]),
                ("target", [text for example in examples for text in example.answers]),
            ):
                for text in texts:
                    if (token := form.acting_token(text)) is not None:
                        where = f"{task.task.source}: task {task.id}: {part} {_SHORT.repr(text)}"
                        raise _would_act(where, token)


def describe_roles(prompts: Mapping[str, PromptFormat]) -> dict[str, Any]:
    """The formats of a whole SHIP as a bundle saves them; each role may have another tokenizer.

    Args:
        prompts: by role, "task_llm", "encoder" and "decoder".

    Returns:
        {"version": 2, "roles": {"task_llm": {...}, ...}, "hash": "5c..."}.
    """
    roles = {role: role_prompts.describe() for role, role_prompts in prompts.items()}
    return {"version": VERSION, "roles": roles, "hash": _hash(roles)}


def is_described(saved: Mapping[str, Any], prompts: Mapping[str, PromptFormat]) -> bool:
    """Whether a saved description is that of these formats, each version compared with its like.

    Args:
        saved: what `describe_roles`, or version 0.1.0, wrote into a bundle.
        prompts: by role, as `describe_roles` takes them.
    """
    if saved.get("version") == 1:
        return saved == prompts["task_llm"].describe_as_0_1_0()
    return saved == describe_roles(prompts)


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
