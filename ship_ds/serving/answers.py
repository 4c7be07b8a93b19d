"""Answers as OpenAI's clients read them: whole, or as events of a stream."""

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

from ship_ds.console import log
from ship_ds.serving.decoding import AnswerPart, FinishReason, Source, TokenChance
from ship_ds.serving.errors import RequestError
from ship_ds.serving.room import Writing


class Shape:
    """The words around answers: of completions, and, below, of chats.

    Args:
        model: As the client named it.
        source: Who answers.
        fingerprint: Of the run's weights.
        tells_logprobs: Whether they were asked for.
    """

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, model: str, source: Source, fingerprint: str, tells_logprobs: bool = False
    ) -> None:
        self.tells_logprobs = tells_logprobs
        self._head = {
            "id": f"{self.prefix}-{uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint[:16],
            # Beside what OpenAI has: what was induced is of interest.
            "ship_instruction": source.instruction,
        }

    def head(self, is_chunk: bool) -> dict[str, Any]:
        """Every field but choices and usage."""
        return {**self._head, "object": self.chunk if is_chunk else self.whole}

    def choice(
        self,
        number: int,
        text: str,
        chances: Sequence[TokenChance] | None,
        reason: FinishReason | None,
    ) -> dict[str, Any]:
        """A whole answer.

        Args:
            number: Which of the request's answers it is.
            text: Of the answer.
            chances: Of its tokens; None where they were not asked for.
            reason: Why it ended; None while it goes on, as in a piece of a stream.
        """
        return {
            "index": number,
            "text": text,
            "logprobs": None if chances is None else _completion_logprobs(chances),
            "finish_reason": reason,
        }

    def first(self, number: int) -> dict[str, Any] | None:
        """A choice that says that an answer begins."""
        return None

    def delta(self, number: int, piece: AnswerPart) -> dict[str, Any]:
        """A choice with what is new."""
        return self.choice(number, piece.text, piece.chances or None, piece.finish_reason)


class ChatShape(Shape):
    """The words around the answers of a chat."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(
        self,
        number: int,
        text: str,
        chances: Sequence[TokenChance] | None,
        reason: FinishReason | None,
    ) -> dict[str, Any]:
        """See `Shape`."""
        return {
            "index": number,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if chances is None else _chat_logprobs(chances),
            "finish_reason": reason,
        }

    def first(self, number: int) -> dict[str, Any] | None:
        """See `Shape`."""
        return {
            "index": number,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def delta(self, number: int, piece: AnswerPart) -> dict[str, Any]:
        """See `Shape`."""
        return {
            "index": number,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": _chat_logprobs(piece.chances) if piece.chances else None,
            "finish_reason": piece.finish_reason,
        }


async def whole(
    first: tuple[int, AnswerPart],
    pieces: AsyncIterator[tuple[int, AnswerPart]],
    writing: Writing,
    shape: Shape,
) -> dict[str, Any]:
    """All answers in one body, when the last one is done.

    Args:
        first: What was taken from the pieces already.
        pieces: Of the answers.
        writing: That they are of.
        shape: The words around them.

    Raises:
        RequestError: An answer could not be written.
    """
    texts = [""] * writing.num_answers
    chances: list[list[TokenChance]] = [[] for _ in texts]
    last: dict[int, AnswerPart] = {}

    def take(number: int, piece: AnswerPart) -> None:
        texts[number] += piece.text
        chances[number] += piece.chances
        last[number] = piece

    take(*first)
    async for number, piece in pieces:
        take(number, piece)
    shown = chances if shape.tells_logprobs else [None] * len(texts)
    choices = [
        shape.choice(number, text, shown[number], last[number].finish_reason)
        for number, text in enumerate(texts)
    ]
    return {**shape.head(False), "choices": choices, "usage": _usage(writing, last)}


async def events(
    first: tuple[int, AnswerPart],
    pieces: AsyncIterator[tuple[int, AnswerPart]],
    writing: Writing,
    shape: Shape,
    include_usage: bool,
) -> AsyncIterator[bytes]:
    """Server-sent events; an error that comes now is one of them.

    Args:
        first: What was taken from the pieces already.
        pieces: Of the answers.
        writing: That they are of.
        shape: The words around them.
        include_usage: Whether the tokens are told at the end.
    """
    last: dict[int, AnswerPart] = {}
    usage = {"usage": None} if include_usage else {}

    def event(choices: Sequence[Mapping[str, Any] | None], **fields: Any) -> bytes:
        kept = [one for one in choices if one is not None]
        return _event({**shape.head(True), "choices": kept, **usage, **fields})

    def of(number: int, piece: AnswerPart) -> bytes:
        is_new = number not in last
        last[number] = piece
        # Without letters and without an end there is nothing to tell.
        says = piece.text or piece.chances or piece.finish_reason
        begins = shape.first(number) if is_new else None
        parts = [event([begins])] if begins else []
        parts += [event([shape.delta(number, piece)])] if says else []
        return b"".join(parts)

    try:
        yield of(*first)
        async for number, piece in pieces:
            if data := of(number, piece):
                yield data
        if include_usage:
            yield event([], usage=_usage(writing, last))
    except RequestError as error:
        yield _event(error.body())
    except Exception as error:
        log(f"serve: {type(error).__name__} in a stream: {error}")
        yield _event(RequestError(500, "the answer could not be written").body())
    yield b"data: [DONE]\n\n"


def _event(body: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


def _usage(writing: Writing, last: Mapping[int, AnswerPart]) -> dict[str, int]:
    num_new = sum(piece.num_tokens for piece in last.values())
    return {
        "prompt_tokens": writing.prompt_tokens,
        "completion_tokens": num_new,
        "total_tokens": writing.prompt_tokens + num_new,
    }


def _chat_logprobs(chances: Sequence[TokenChance]) -> dict[str, Any]:
    def entry(one: TokenChance) -> dict[str, Any]:
        return {"token": one.text, "logprob": one.logprob, "bytes": list(one.raw)}

    return {
        "content": [
            {**entry(one), "top_logprobs": [entry(other) for other in one.top]} for one in chances
        ],
        "refusal": None,
    }


def _completion_logprobs(chances: Sequence[TokenChance]) -> dict[str, Any]:
    return {
        "tokens": [one.text for one in chances],
        "token_logprobs": [one.logprob for one in chances],
        "top_logprobs": [_by_text(one.top) for one in chances],
        # OpenAI's places in the text: a tokenizer that writes spaces between tokens has none.
        "text_offset": None,
    }


def _by_text(top: Sequence[TokenChance]) -> dict[str, float]:
    """Several tokens may have one text, as parts of letters do: the likeliest one, which comes
    first, says its number."""
    by_text: dict[str, float] = {}
    for one in top:
        by_text.setdefault(one.text, one.logprob)
    return by_text
