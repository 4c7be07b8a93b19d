"""Rows that come and go: the decoder by itself, turn by turn."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ship_ds.api import Ship
from ship_ds.prompt import PromptFormat
from ship_ds.serving.answers import ChatShape, Shape, whole
from ship_ds.serving.app import _fitting
from ship_ds.serving.decoding import (
    AnswerPart,
    AnswerWriter,
    Row,
    Sampling,
    Source,
    TokenChance,
    _chance,
    _sendable,
)
from ship_ds.serving.errors import RequestError
from ship_ds.serving.limits import Limits
from ship_ds.serving.metrics import Metrics
from ship_ds.serving.room import Room, Writing
from tests.export.models import make_ship
from tests.serving.conftest import INPUT

Pieces = list[AnswerPart | RequestError]


@pytest.fixture
def decoder(ship: Ship) -> AnswerWriter:
    return AnswerWriter(ship.model, Limits(), Metrics())


def row(ship: Ship, instruction: str | None, **sampling: Any) -> tuple[Row, Pieces]:
    pieces: Pieces = []
    source = Source()
    if instruction is not None:
        source = Source(instruction, ship.model.encode([instruction]).cpu(), instruction)
    settings = Sampling(**{"max_new_tokens": 12, **sampling})
    return Row(source, ship.model.question(INPUT, instruction), settings, pieces.append), pieces


def text(pieces: Sequence[AnswerPart | RequestError]) -> str:
    assert all(isinstance(piece, AnswerPart) for piece in pieces), pieces
    assert pieces[-1].finish_reason  # type: ignore[union-attr]
    return "".join(piece.text for piece in pieces)  # type: ignore[union-attr]


def finish(decoder: AnswerWriter) -> None:
    for _ in range(100):
        if decoder.is_idle:
            return
        decoder.turn()
    pytest.fail("not done after a hundred turns")


def test_a_row_begins_in_the_turn_in_which_another_ends(decoder: AnswerWriter, ship: Ship) -> None:
    first, told = row(ship, "add 2", max_new_tokens=2)
    second, told_second = row(ship, "add 3")
    alone, told_alone = row(ship, "add 3")
    decoder.submit([first])
    decoder.turn()
    decoder.submit([second])
    decoder.turn()
    assert isinstance(told[-1], AnswerPart) and told[-1].finish_reason
    finish(decoder)
    decoder.submit([alone])
    finish(decoder)
    assert text(told_second) == text(told_alone)


def test_rows_that_end_with_their_first_token_leave_those_that_begin_after_them(
    decoder: AnswerWriter, ship: Ship
) -> None:
    """Both begin in one turn, those under adapters first."""
    short, told_short = row(ship, "add 2", max_new_tokens=1)
    bare, told_bare = row(ship, None, max_new_tokens=3)
    decoder.submit([short, bare])
    finish(decoder)
    for pieces in (told_short, told_bare):
        assert isinstance(pieces[-1], AnswerPart) and pieces[-1].finish_reason


def test_rows_that_came_at_different_turns_share_forwards(
    decoder: AnswerWriter, ship: Ship
) -> None:
    instructions = ["add 2", "add 3", "remove every 3", None, "add 2", None]
    rows = [row(ship, instruction) for instruction in instructions]
    alone = []
    for one, pieces in [row(ship, instruction) for instruction in instructions]:
        decoder.submit([one])
        finish(decoder)
        alone.append(text(pieces))
    for one, _ in rows:
        decoder.submit([one])
        decoder.turn()
        assert len(decoder._running) <= 2  # one under adapters, one bare
    finish(decoder)
    assert [text(pieces) for _, pieces in rows] == alone


def test_what_does_not_fit_waits_and_comes_in_order(decoder: AnswerWriter, ship: Ship) -> None:
    rows = [row(ship, "add 2") for _ in range(5)]
    one = [rows[0][0]]
    decoder._bytes = int(2.5 * (decoder._row_bytes(one) + decoder._adapter_bytes(one)))
    decoder.submit([one for one, _ in rows])
    decoder.turn()
    assert (decoder.num_running, decoder.num_waiting) == (2, 3)
    finish(decoder)
    assert len({text(pieces) for _, pieces in rows}) == 1
    decoder._bytes = 1  # less than any row: one at a time still runs
    decoder.submit([row(ship, "add 2")[0] for _ in range(2)])
    decoder.turn()
    assert decoder.num_running == 1
    finish(decoder)


@pytest.fixture(scope="module")
def fused() -> Ship:
    parts = [{"kind": "lora", "rank": 2, "width": 8}, {"kind": "block_fusion"}]
    return make_ship("embedded", kind="combination", parts=parts)


def test_adapters_that_join_are_as_large_as_the_largest(fused: Ship) -> None:
    """A prefix is padded to the longest of those that run: two that fit apart may not together."""
    for fits in (False, True):
        decoder = AnswerWriter(fused.model, Limits(), Metrics())
        texts = ("put 7 at the front " * 12, "reverse")
        long, short = (row(fused, text)[0] for text in texts)
        each = decoder._row_bytes([long])
        sizes = [decoder._adapter_bytes([one]) for one in (long, short)]
        assert each == decoder._row_bytes([short]) and sizes[0] > 2 * sizes[1]
        decoder._bytes = 2 * each + (2 * sizes[0] if fits else sum(sizes))
        for one in (long, short):
            decoder.submit([one])
            decoder.turn()
        assert (decoder.num_running, decoder.num_waiting) == ((2, 0) if fits else (1, 1))
        finish(decoder)


def test_a_fused_instruction_stands_before_the_prompt_in_the_context(fused: Ship) -> None:
    source = row(fused, "reverse the list " * 100)[0].source
    limit = fused.model.task_llm.language_model.context_length
    assert limit == 512
    ids, settings = [7] * 300, Sampling(max_new_tokens=8)
    assert _fitting(fused, Source(), ids, settings, False) == settings
    with pytest.raises(RequestError, match="are more than the model's 512"):
        _fitting(fused, source, ids, settings, False)


def test_a_request_waits_once_however_many_rows_it_has(ship: Ship) -> None:
    room = Room(ship, Limits(max_rows=1))
    decoder = room.decoder
    first, second, left = ([row(ship, "add 2")[0] for _ in range(3)] for _ in range(3))
    for rows in (first, second, left):
        decoder.submit(rows)
    assert (decoder.num_waiting, room.num_waiting) == (9, 3)  # as --max-waiting counts
    decoder.turn()
    assert (decoder.num_waiting, decoder.num_waiting_requests) == (8, 2)
    for one in left:
        one.is_cancelled = True
    decoder.turn()
    assert (decoder.num_waiting, decoder.num_waiting_requests) == (5, 1)
    finish(decoder)
    assert decoder.num_waiting_requests == 0


def test_no_more_rows_than_allowed(ship: Ship) -> None:
    decoder = AnswerWriter(ship.model, Limits(max_rows=3), Metrics())
    decoder.submit([row(ship, "add 2")[0] for _ in range(5)])
    decoder.turn()
    assert (decoder.num_running, decoder.num_waiting) == (3, 2)
    finish(decoder)


def test_a_row_that_waited_too_long_is_told(ship: Ship) -> None:
    decoder = AnswerWriter(ship.model, Limits(wait_seconds=0), Metrics())
    late, pieces = row(ship, "add 2")
    decoder.submit([late])
    decoder.turn()
    (error,) = pieces
    assert isinstance(error, RequestError) and error.status == 503
    assert decoder.is_idle


def test_a_fault_ends_its_rows_and_not_the_decoder(
    decoder: AnswerWriter, ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fault, status in ((RuntimeError("x"), 500), (torch.OutOfMemoryError("x"), 503)):
        one, pieces = row(ship, "add 2")
        decoder.submit([one])
        decoder.turn()

        def fail(*_: Any, fault: Exception = fault) -> None:
            raise fault

        with monkeypatch.context() as patched:
            patched.setattr(type(decoder._running[0].stream), "advance_rows", fail)
            decoder.turn()
        assert isinstance(pieces[-1], RequestError) and pieces[-1].status == status
        assert decoder.is_idle
    fine, pieces = row(ship, "add 2")
    decoder.submit([fine])
    finish(decoder)
    assert text(pieces)


def test_a_seeds_draws_do_not_depend_on_the_batch(decoder: AnswerWriter, ship: Ship) -> None:
    warm = {"temperature": 1.5, "seed": 5}
    alone, told = row(ship, "add 2", **warm)
    decoder.submit([alone])
    finish(decoder)
    among, told_among = row(ship, "add 2", **warm)
    decoder.submit([row(ship, "add 3", temperature=2.0)[0], among, row(ship, None)[0]])
    finish(decoder)
    assert text(told) == text(told_among)


@pytest.mark.parametrize(
    ("written", "stop", "sent"),
    [
        ("abc", (), "abc"),
        ("abc\ufffd", (), "abc"),
        ("abc", ("cd",), "ab"),
        ("abc", ("bcd", "cx"), "a"),
        ("abab", ("abac",), "ab"),
        ("abc", ("x",), "abc"),
    ],
)
def test_what_may_still_change_is_held_back(written: str, stop: tuple[str, ...], sent: str) -> None:
    assert _sendable(written, stop) == sent


def test_an_answer_ends_by_any_end_of_the_base(
    decoder: AnswerWriter, ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `Answerer`: it is given back as the end of sequence, and is no part of the text."""
    form = ship.model.prompts
    plain, told_plain = row(ship, "add 2")
    decoder.submit([plain])
    finish(decoder)
    assert len(plain.ids) > 2 and form.eos_id not in plain.ids[:2] and text(told_plain)
    assert plain.ids[0] != plain.ids[1]
    monkeypatch.setattr(form, "other_ends", (plain.ids[1],))
    for sampling in ({"top_logprobs": 1}, {"temperature": 1.0, "top_p": 1e-6}):
        ended, told = row(ship, "add 2", **sampling)
        decoder.submit([ended])
        finish(decoder)
        assert ended.ids == [plain.ids[0], form.eos_id]
        assert text(told) == form.text(plain.ids[:1])
        assert isinstance(told[-1], AnswerPart) and not told[-1].chances
        assert told[-1].finish_reason == "stop"


def _spelled(tokenizer: Tokenizer, answer: str) -> tuple[list[TokenChance], PromptFormat]:
    """The tokens of an answer as their log-probabilities are told; the likeliest other one in a
    token's place is the one before it."""
    form = PromptFormat(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))
    ids, told = form.ids(answer), list[TokenChance]()
    for place, token in enumerate(ids):
        logits_V = torch.zeros(len(form.tokenizer))
        logits_V[token], logits_V[ids[place - 1]] = 9, 6
        told.append(_chance(logits_V, token, 2, form, ids[max(0, place - 1) : place]))
    return told, form


def test_parts_of_a_letter_have_their_own_bytes() -> None:
    letters = Tokenizer(models.BPE())
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"]
    )
    letters.train_from_iterator(["hello"], trainer)
    pieces = [f"<0x{code:02X}>" for code in "a \u00e9\u20ac".encode()]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys(["<eos>", *pieces]))}
    by_code = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    by_code.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for tokenizer in (letters, by_code):
        answer = "a \u00e9\u20ac"
        told, _ = _spelled(tokenizer, answer)
        assert len(told) == len(answer.encode())
        assert b"".join(one.raw for one in told) == answer.encode()
        assert [one.top[0].raw for one in told] == [one.raw for one in told]
        chat = ChatShape("m", Source(), "f", True).choice(0, answer, told, "stop")
        entries = chat["logprobs"]["content"]
        assert bytes(byte for one in entries for byte in one["bytes"]) == answer.encode()
        # Two parts of a letter have one text in a dictionary: the likelier one's number.
        old = Shape("m", Source(), "f", True).choice(0, answer, told, "stop")["logprobs"]
        assert old["top_logprobs"][3] == {"\ufffd": told[3].logprob}


def test_tokens_that_stand_apart_add_up_to_the_answer() -> None:
    words = Tokenizer(
        models.WordLevel({"<eos>": 0, "<unk>": 1, "3": 2, "70": 3}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    marked = Tokenizer(
        models.WordLevel({"<eos>": 0, "<unk>": 1, "\u25813": 2, "\u258170": 3}, unk_token="<unk>")
    )
    marked.pre_tokenizer, marked.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    for tokenizer in (words, marked):
        told, form = _spelled(tokenizer, "3 70 3")
        assert [one.text for one in told] == ["3", " 70", " 3"]
        assert "".join(one.text for one in told) == form.text(form.ids("3 70 3"))
        assert told[1].top[1].text == " 3"


def test_an_answer_without_a_token_has_log_probabilities_of_none() -> None:
    """Where they were asked for."""

    class OneAnswer:
        num_answers = prompt_tokens = 1

    async def none() -> AsyncIterator[tuple[int, AnswerPart]]:
        for _ in ():
            yield

    for is_asked, chat, old in ((True, {"content": [], "refusal": None}, []), (False, None, None)):
        for shape, path, wanted in (
            (ChatShape("m", Source(), "f", is_asked), None, chat),
            (Shape("m", Source(), "f", is_asked), "tokens", old),
        ):
            first = (0, AnswerPart("", (), 1, "stop"))
            body = asyncio.run(whole(first, none(), cast(Writing, OneAnswer()), shape))
            told = body["choices"][0]["logprobs"]
            assert (told[path] if path and told else told) == wanted
