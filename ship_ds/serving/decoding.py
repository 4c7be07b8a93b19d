"""Many answers at once, each growing by a token a turn.

    decoder = AnswerWriter(ship.model, limits, metrics)
    decoder.submit(rows)
    while not decoder.is_idle:
        decoder.turn()          # every row's `emit` gets what it may send

Rows under different adapters share a forward. A row that comes while others run is read at once, in
a stream of its own, so that its first token waits for no long answer; then its stream joins the
one that runs. Rows that are done, or that nobody waits for any more, leave before the next token.

Letters: E sequences, V vocabulary, Z latent size.
"""

import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor

from ship_ds.console import log
from ship_ds.data.task import Reading
from ship_ds.model import budget
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.batch import TokenBatch
from ship_ds.model.language_model import Stream
from ship_ds.model.ship import ShipModel
from ship_ds.prompt import PromptFormat
from ship_ds.serving.errors import RequestError
from ship_ds.serving.limits import Limits
from ship_ds.serving.metrics import Metrics

FinishReason = Literal["stop", "length"]
_ENTRY_BYTES = 512
"""Of Python's objects around a latent and its text."""
_COLDEST = 1e-3
"""A lower temperature is greedy: logits over it leave the range of floats."""
_HALF_A_LETTER = "\ufffd"
"""What a tokenizer writes for bytes that are no whole letter yet."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = sorted(set(range(256)) - set(_VISIBLE))
_BYTES = {chr(one): one for one in _VISIBLE} | {chr(256 + n): one for n, one in enumerate(_HIDDEN)}
"""Letter -> byte in vocabularies of bytes: itself where it is seen, and one behind the first 256
where it is not (`bytes_to_unicode` of GPT-2)."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is written.

    Args:
        max_new_tokens: Cuts it off.
        temperature: 0 is greedy.
        top_p: Tokens are drawn from the likeliest that have this probability together.
        seed: Of the draws; None: other ones each time.
        stop: Texts that end it; they are no part of it.
        top_logprobs: How many alternatives to each token are told; None: no log-probabilities.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature < _COLDEST


@dataclass(frozen=True)
class TokenChance:
    """How likely a token is.

    Args:
        text: What it adds to the answer; of a part of a letter what a tokenizer writes for one.
        raw: Its own bytes, which together are those of the answer.
        logprob: Of it.
        top: The likeliest ones in its place, of a token of an answer.
    """

    text: str
    raw: bytes
    logprob: float
    top: tuple["TokenChance", ...] = ()


@dataclass(frozen=True)
class AnswerPart:
    """What a turn adds to an answer.

    Args:
        text: Letters that no later token can change any more; often none.
        chances: Of its tokens, where they were asked for.
        num_tokens: Of the answer so far, the end of sequence included.
        finish_reason: None while the answer goes on.
    """

    text: str
    chances: tuple[TokenChance, ...]
    num_tokens: int
    finish_reason: FinishReason | None


@dataclass(frozen=True, eq=False)
class Source:
    """Who answers.

    Args:
        instruction: Of the adapter, given or induced; None: the bare base.
        latent_1Z: What its adapter is made of; None: the bare base.
        reading: What the latent was made of, for adapters that fuse it.
    """

    instruction: str | None = None
    latent_1Z: Tensor | None = None
    reading: str | Reading | None = None

    @property
    def num_bytes(self) -> int:
        """What keeping it takes."""
        latent = 0 if self.latent_1Z is None else self.latent_1Z.nbytes
        texts = [self.instruction or ""]
        if isinstance(self.reading, Reading):
            texts += [text for one in self.reading.examples for text in (one.input, one.target)]
        return _ENTRY_BYTES + latent + 4 * sum(map(len, texts))


class Row:
    """One answer in the making.

    Args:
        source: Whose adapter it is under. Rows with the very same source share an adapter.
        prompt: Its token ids.
        sampling: How it is written.
        emit: Takes each piece, or the error that ends it, on the model's thread.
        number: Which of several answers to one prompt it is.
    """

    def __init__(
        self,
        source: Source,
        prompt: Sequence[int],
        sampling: Sampling,
        emit: Callable[[AnswerPart | RequestError], None],
        number: int = 0,
    ) -> None:
        self.source, self.prompt, self.sampling, self.emit = source, prompt, sampling, emit
        self.ids: list[int] = []
        self.is_cancelled = False
        """Set by whoever asked, on any thread."""
        self.num_bytes = 0
        """Of its cache and logits; its adapter comes on top."""
        self.adapter_bytes = 0
        self.since = time.monotonic()
        # A text and not a tuple: Random takes no tuples, and numbers of a row have to differ.
        self._random = Random(f"{sampling.seed}/{number}" if sampling.seed is not None else None)
        self._sent = ""

    @property
    def is_bare(self) -> bool:
        """Whether no adapter is over it."""
        return self.source.latent_1Z is None

    def draw(self) -> float:
        """The next number in [0, 1), which no other row's draws change."""
        return self._random.random()

    def add(
        self, token: int, form: PromptFormat, chances: tuple[TokenChance, ...]
    ) -> FinishReason | None:
        """Take a token, and emit what may be sent.

        Args:
            token: The next one of the answer; its end is `form.eos_id`, whichever the base ends by.
            form: The prompt format, which makes text of ids.
            chances: Of this token; none where they were not asked for.

        Returns:
            Why the answer ends here; None where it goes on.
        """
        self.ids.append(token)
        reason: FinishReason | None = None
        if token == form.eos_id:
            reason = "stop"
        text, is_stopped = _before_stop(form.text(self.ids), self.sampling.stop)
        if is_stopped:
            reason = "stop"
        elif reason is None and len(self.ids) >= self.sampling.max_new_tokens:
            reason = "length"
        if reason is None:
            text = _sendable(text, self.sampling.stop)
        self.emit(
            AnswerPart(self._unsent(text, reason is not None), chances, len(self.ids), reason)
        )
        return reason

    def _unsent(self, text: str, is_last: bool) -> str:
        if not text.startswith(self._sent):
            # A tokenizer that tidies up what it has written; what was sent stays.
            if not is_last:
                return ""
            return text[_num_common(text, self._sent) :]
        new = text[len(self._sent) :]
        self._sent = text
        return new


def _before_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first of these, and whether one is there."""
    places = [place for one in stop if (place := text.find(one)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _sendable(text: str, stop: Sequence[str]) -> str:
    """Without an end that the next token may turn into another letter or into a stop."""
    text = text.rstrip(_HALF_A_LETTER)
    held = [
        length
        for one in stop
        for length in range(1, min(len(one), len(text) + 1))
        if text.endswith(one[:length])
    ]
    return text[: len(text) - max(held, default=0)]


def _num_common(one: str, other: str) -> int:
    """Letters that both begin with."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@dataclass
class _Running:
    """Rows of one stream, and the token that each has chosen and the stream has not read."""

    stream: Stream
    rows: list[Row]
    tokens: list[int]

    @property
    def is_bare(self) -> bool:
        return self.rows[0].is_bare


class AnswerWriter:
    """Writes answers; lives on the thread that owns the model.

    Args:
        model: With its trained weights.
        limits: How many rows run at once at most.
        metrics: Counts them.
    """

    def __init__(self, model: ShipModel, limits: Limits, metrics: Metrics) -> None:
        self.model, self.limits, self.metrics = model, limits, metrics
        self._waiting: deque[Row] = deque()
        self._requests: list[Sequence[Row]] = []
        """Rows that came together, while none of them has begun. Replaced and never changed: other
        threads ask for its length."""
        self._running: list[_Running] = []
        self._bytes = budget.bytes_free(model.device)

    @property
    def is_idle(self) -> bool:
        """Whether a turn would do nothing."""
        return not self._waiting and not self._running

    @property
    def num_waiting(self) -> int:
        """Rows of which nothing was read yet."""
        return len(self._waiting)

    @property
    def num_waiting_requests(self) -> int:
        """Submissions of which no row has begun."""
        return len(self._requests)

    @property
    def num_running(self) -> int:
        """Rows that grow."""
        return sum(len(one.rows) for one in self._running)

    def submit(self, rows: Sequence[Row]) -> None:
        """Let rows of one request begin when there is room for them, in the order in which they
        came."""
        self._waiting.extend(rows)
        self._requests = [*self._requests, rows]

    @torch.no_grad()
    def turn(self) -> None:
        """A token for every row that runs, and the first one for those that have room now."""
        self._drop_late()
        for running in list(self._running):
            self._guarded(running.rows, partial(self._advance, running))
        self._drop_empty()
        for rows in self._admitted():
            self._guarded(rows, partial(self._begin, rows))
            self._drop_empty()  # of these, before the next look for some to join
        self._drop_begun()

    def _drop_empty(self) -> None:
        self._running = [one for one in self._running if one.rows]

    def _drop_begun(self) -> None:
        """Keep the requests of which rows wait, and all that are not cancelled do."""
        waiting = set(map(id, self._waiting))
        self._requests = [
            rows
            for rows in self._requests
            if any(id(row) in waiting for row in rows)
            and all(row.is_cancelled or id(row) in waiting for row in rows)
        ]

    def _guarded(self, rows: list[Row], work: Callable[[], None]) -> None:
        """A fault ends these rows, not the server."""
        try:
            work()
        except torch.OutOfMemoryError:
            self._fail(rows, RequestError(503, "out of memory: try a shorter prompt, or later"))
        except Exception as error:
            log(f"serve: {type(error).__name__} while writing answers: {error}")
            self._fail(rows, RequestError(500, "the answer could not be written"))

    def _fail(self, rows: list[Row], error: RequestError) -> None:
        for row in rows:
            row.emit(error)
        failed = set(map(id, rows))
        self._running = [one for one in self._running if not failed & set(map(id, one.rows))]

    def _drop_late(self) -> None:
        oldest = time.monotonic() - self.limits.wait_seconds
        for row in self._waiting:
            if row.since < oldest and not row.is_cancelled:
                row.is_cancelled = True
                row.emit(
                    RequestError(
                        503, f"there was no room for this within {self.limits.wait_seconds:g} s"
                    )
                )
        self._waiting = deque(row for row in self._waiting if not row.is_cancelled)

    def _admitted(self) -> list[list[Row]]:
        """Rows that may begin, those under adapters and those of the bare base."""
        running = [row for one in self._running for row in one.rows]
        free = self._bytes - sum(row.num_bytes for row in running)
        places = self.limits.max_rows - self.num_running
        rows: list[Row] = []
        while self._waiting and len(rows) < places:
            more = [*rows, self._waiting[0]]
            # The longest prompt and the longest answer: a batch is padded to them, and the adapters
            # of all who run, which they join, to the largest of these.
            each, adapter = self._row_bytes(more), self._adapter_bytes([*running, *more])
            needed = len(more) * each + (len(running) + len(more)) * adapter
            if needed > free and (rows or self._running):
                break
            rows.append(self._waiting.popleft())
            for row in rows:
                row.num_bytes = each
        under = [row for row in rows if not row.is_bare]
        bare = [row for row in rows if row.is_bare]
        return [part for part in (under, bare) if part]

    def _row_bytes(self, rows: Sequence[Row]) -> int:
        width = self.model.num_virtual_tokens + max(len(row.prompt) for row in rows)
        return self.model.task_llm.language_model.costs.decoded_row(
            width,
            max(row.sampling.max_new_tokens for row in rows),
            chooses_greedily=all(row.sampling.is_greedy for row in rows),
        )

    def _adapter_bytes(self, rows: Sequence[Row]) -> int:
        for row in rows:
            # Once a row: its text is read for that.
            row.adapter_bytes = row.adapter_bytes or self.model.adapter_bytes_of(
                [row.source.reading]
            )
        return max(row.adapter_bytes for row in rows)

    def _begin(self, rows: list[Row]) -> None:
        """Read the prompts of rows, choose their first tokens, and let them join who runs."""
        rows = _tasks_together(rows)
        adapter = self._adapter(rows)
        virtual = 0 if adapter is None else self.model.num_virtual_tokens
        prompts = [row.prompt for row in rows]
        form, device = self.model.prompts, self.model.device
        batch = TokenBatch.build(prompts, None, form.pad_id, virtual, device)
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        self.metrics.rows_a_forward.observe(len(rows))
        stream = self.model.task_llm.stream(adapter, batch)
        stream.reserve(max(row.sampling.max_new_tokens for row in rows) - 1)
        new = _Running(stream, rows, [])
        self._running.append(new)
        self._choose(new)
        if new.rows:
            self._join(new)

    def _adapter(self, rows: Sequence[Row]) -> Adapter | None:
        """Of rows whose tasks are together; tasks with unequally many rows become one a row."""
        if rows[0].is_bare:
            return None
        sources = [row.source for row in rows]
        counts = [len(list(group)) for _, group in groupby(sources)]
        if len(set(counts)) == 1:
            sources = sources[:: counts[0]]
        latents = [one.latent_1Z for one in sources if one.latent_1Z is not None]
        return self.model.adapt(torch.cat(latents), [one.reading for one in sources])

    def _join(self, new: _Running) -> None:
        for old in self._running:
            if old is not new and old.is_bare == new.is_bare and old.stream.join(new.stream):
                old.rows += new.rows
                old.tokens += new.tokens
                self._running.remove(new)
                return

    def _advance(self, running: _Running) -> None:
        kept = [place for place, row in enumerate(running.rows) if not row.is_cancelled]
        self._keep(running, kept)
        if running.rows:
            self.metrics.rows_a_forward.observe(len(running.rows))
            running.stream.advance(running.stream.index(running.tokens))
            self._choose(running)

    def _keep(self, running: _Running, kept: Sequence[int]) -> None:
        """Let the other rows go. A copy of keys and values, less than what a token reads anyway."""
        if len(kept) < len(running.rows):
            running.rows[:] = [running.rows[place] for place in kept]
            running.tokens[:] = [running.tokens[place] for place in kept]
            if kept:
                running.stream.select(kept)

    def _choose(self, running: _Running) -> None:
        """The next token of each row, handed to it; rows that end with it leave."""
        logits_EV, form = running.stream.logits_EV, self.model.prompts
        running.tokens = [
            form.eos_id if token in form.other_ends else token
            for token in _next_tokens(logits_EV, running.rows)
        ]
        kept = []
        for place, (row, token) in enumerate(zip(running.rows, running.tokens, strict=True)):
            chances: tuple[TokenChance, ...] = ()
            if row.sampling.top_logprobs is not None and token != form.eos_id:
                num_top = row.sampling.top_logprobs
                chances = (_chance(logits_EV[place], token, num_top, form, row.ids[-1:]),)
            if row.add(token, form, chances) is None:
                kept.append(place)
        self.metrics.new_tokens.inc(len(running.rows))
        self._keep(running, kept)


def _tasks_together(rows: Sequence[Row]) -> list[Row]:
    """The rows of one source one after another, in the order in which sources came."""
    first: dict[Source, int] = {}
    for place, row in enumerate(rows):
        first.setdefault(row.source, place)
    return sorted(rows, key=lambda row: first[row.source])


def _next_tokens(logits_EV: Tensor, rows: Sequence[Row]) -> list[int]:
    """The likeliest token of greedy rows, a drawn one of others."""
    tokens: list[int] = logits_EV.argmax(-1).tolist()
    for place, row in enumerate(rows):
        if not row.sampling.is_greedy:
            tokens[place] = _drawn(logits_EV[place], row.sampling, row.draw())
    return tokens


def _drawn(logits_V: Tensor, sampling: Sampling, uniform: float) -> int:
    """A token of softmax(logits / temperature), of the likeliest that have top_p together (nucleus
    sampling, Holtzman et al. 2020)."""
    sorted_V, tokens_V = (logits_V.float() / sampling.temperature).sort(descending=True)
    sums_V = (sorted_V - sorted_V[0]).softmax(0).cumsum(0)
    # The first is always kept, and the one that crosses top_p is too.
    num_kept = max(1, int((sums_V < sampling.top_p).sum()) + 1)
    sums_V = sums_V[:num_kept]
    # Rounding can leave the last sum below a draw.
    aim = torch.tensor(uniform, device=sums_V.device) * sums_V[-1]
    place = int(torch.searchsorted(sums_V, aim, right=True).clamp(max=len(sums_V) - 1))
    return int(tokens_V[place])


def _chance(
    logits_V: Tensor, token: int, num_top: int, form: PromptFormat, before: Sequence[int] = ()
) -> TokenChance:
    """Of a token behind another one, or at an answer's beginning."""
    logprobs_V = logits_V.float().log_softmax(0)
    values, tokens = logprobs_V.topk(min(num_top, len(logprobs_V)))
    top = tuple(
        TokenChance(*_spelling(form.tokenizer, one, before), _finite(value))
        for one, value in zip(tokens.tolist(), values.tolist(), strict=True)
    )
    spelling = _spelling(form.tokenizer, token, before)
    return TokenChance(*spelling, _finite(float(logprobs_V[token])), top)


def _spelling(tokenizer: Any, token: int, before: Sequence[int]) -> tuple[str, bytes]:
    """What a token adds to the text, and the bytes of that."""
    text = str(tokenizer.decode([token]))
    if _HALF_A_LETTER in text:
        piece = str(tokenizer.convert_ids_to_tokens(token))
        return text, _bytes_of_piece(piece) or text.encode()
    if before:
        # Some tokenizers write a space between two tokens, or leave it out before the first.
        last, both = str(tokenizer.decode(before)), str(tokenizer.decode([*before, token]))
        text = both[len(last) :] if both.startswith(last) else text
    return text, text.encode()


def _bytes_of_piece(piece: str) -> bytes | None:
    """The bytes that a vocabulary spells as <0xC3>, or with a letter for each (GPT-2's)."""
    if code := _BYTE.fullmatch(piece):
        return bytes.fromhex(code[1])
    return bytes(map(_BYTES.__getitem__, piece)) if _BYTES.keys() >= set(piece) else None


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes this for a token that cannot be."""
    return logprob if math.isfinite(logprob) else -9999.0
