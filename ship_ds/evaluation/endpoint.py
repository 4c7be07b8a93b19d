"""A judge behind an OpenAI-compatible endpoint: is the induced instruction the same as the true
one, and is an answer right?"""

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ship_ds.data.matching import has_ended
from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.evaluation.config import EndpointConfig
from ship_ds.evaluation.judge import Columns, Judge
from ship_ds.evaluation.judge_prompts import JUDGE_PROMPTS
from ship_ds.evaluation.questions import Question
from ship_ds.files import write_json
from ship_ds.inference.deduction import AnswersByTask

if TYPE_CHECKING:
    from openai import OpenAI


class EndpointJudge(Judge):
    """A language model behind an OpenAI-compatible endpoint says whether the text means the same as
    the instruction, and whether an answer is right.

    Every reply is kept in `folder`; see `ChatEndpoint`.
    """

    def __init__(self, config: EndpointConfig, folder: Path) -> None:
        self.endpoint = ChatEndpoint(config, folder, "the judge", "leave that judge out")
        self.prompt = JUDGE_PROMPTS[config.prompts]

    def columns(self, induced: Sequence[str], questions: Sequence[Question]) -> Columns:
        return {
            "judged_equivalence": [
                [self.is_same(text, q.task.task.instruction)]
                for text, q in zip(induced, questions, strict=True)
            ]
        }

    def answer_columns(self, answers: AnswersByTask, questions: Sequence[Question]) -> Columns:
        return {
            "judged_right": [
                [
                    self.is_right(answer, example, q.task.task.instruction)
                    for answer, example in zip(row, q.asked, strict=True)
                ]
                for row, q in zip(answers, questions, strict=True)
            ]
        }

    def is_same(self, text: str, instruction: str) -> bool:
        """Whether the judge says that the text means what the instruction does."""
        return self.prompt.is_yes(self.endpoint.reply(self.prompt.about_text(text, instruction)))

    def is_right(self, answer: str | None, example: Example, instruction: str) -> bool:
        """Whether the judge calls the answer right; of one that never ended it is not asked.

        Args:
            answer: a method's; None, or a `CutOff`: it never ended.
            example: that it answers, with every right answer.
            instruction: of the task.

        Raises:
            UserError: the judge gave no answer.
        """
        if not has_ended(answer):
            return False
        messages = self.prompt.about_answer(answer, example, instruction)
        return self.prompt.is_yes(self.endpoint.reply(messages))


class ChatEndpoint:
    """Whoever answers at an OpenAI-compatible endpoint.

    Every reply is kept in `folder` under the hash of its request, and is not asked for again.

    Args:
        config: where it is, and which model.
        folder: of the replies.
        who: it is to the user, for messages.
        instead: what to do where the package openai is missing, or nobody answers.
    """

    def __init__(self, config: EndpointConfig, folder: Path, who: str, instead: str) -> None:
        self.config, self.folder, self.who, self.instead = config, folder, who, instead
        self.client = _client(config, who, instead)

    def reply(self, messages: list[dict[str, str]], **options: Any) -> str:
        """Its words, from the folder where it has been asked before.

        Args:
            messages: of the chat.
            options: of the request, such as its temperature; 0 by default.

        Raises:
            UserError: it gave no answer.
        """
        return self._choice(messages, options)["message"]["content"] or ""

    def finished_reply(self, messages: list[dict[str, str]], **options: Any) -> str | None:
        """The same; None where its words were cut off at `max_tokens`."""
        choice = self._choice(messages, options)
        is_cut_off = choice.get("finish_reason") == "length"
        return None if is_cut_off else choice["message"]["content"] or ""

    def _choice(self, messages: list[dict[str, str]], options: Mapping[str, Any]) -> dict[str, Any]:
        request = {"model": self.config.model, "messages": messages, "temperature": 0, **options}
        path = (
            self.folder
            / f"{sha256(json.dumps([self.config.url, request]).encode()).hexdigest()}.json"
        )
        if not path.is_file():
            write_json(
                path,
                {"url": self.config.url, "request": request, "reply": self._ask(request)},
                shared=True,
            )
        choice: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["reply"]["choices"][0]
        return choice

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        from openai import OpenAIError

        try:
            answer = self.client.chat.completions.create(**request)
        except OpenAIError as error:
            raise UserError(
                f"{self.config.url}: {self.who} gave no answer: {' '.join(str(error).split())}; "
                f"see to that server, name another, or {self.instead}"
            ) from None
        if not answer.choices:
            raise UserError(
                f"{self.config.url}: the reply of {self.who} has no choices; is it an "
                "OpenAI-compatible endpoint?"
            )
        return answer.model_dump(mode="json")


def _client(config: EndpointConfig, who: str, instead: str) -> "OpenAI":
    """Imported here: `openai` is an extra, which nothing else needs."""
    try:
        from openai import OpenAI
    except ImportError:
        raise UserError(
            f"{who} behind an endpoint needs the package openai: pip install 'ship-ds[judge]', or "
            f"{instead}"
        ) from None
    # The client retries with backoff by itself: connection errors, 408, 409, 429 and 5xx. Local
    # servers take any key.
    return OpenAI(
        base_url=config.url,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        max_retries=config.retries,
        timeout=config.timeout_seconds,
    )
