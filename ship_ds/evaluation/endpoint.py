"""A judge behind an OpenAI-compatible endpoint: is the induced instruction the same as the true
one, and is an answer right?"""

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    Every reply is kept in `folder` under the hash of its request, and is not asked for again.
    """

    def __init__(self, config: EndpointConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.client = _client(config)
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
        return self.prompt.is_yes(self.reply(self.prompt.about_text(text, instruction)))

    def is_right(self, answer: str | None, example: Example, instruction: str) -> bool:
        """Whether the judge calls the answer right; of one that never ended it is not asked."""
        if answer is None:
            return False
        messages = self.prompt.about_answer(answer, example, instruction)
        return self.prompt.is_yes(self.reply(messages))

    def reply(self, messages: list[dict[str, str]]) -> str:
        """The judge's words, from the folder where it has been asked before."""
        request = {"model": self.config.model, "messages": messages, "temperature": 0}
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
        return (
            json.loads(path.read_text(encoding="utf-8"))["reply"]["choices"][0]["message"][
                "content"
            ]
            or ""
        )

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        from openai import OpenAIError

        try:
            answer = self.client.chat.completions.create(**request)
        except OpenAIError as error:
            raise UserError(
                f"{self.config.url}: the judge gave no answer: {' '.join(str(error).split())}"
            ) from None
        if not answer.choices:
            raise UserError(
                f"{self.config.url}: the judge's reply has no choices; is it an "
                "OpenAI-compatible endpoint?"
            )
        return answer.model_dump(mode="json")


def _client(config: EndpointConfig) -> "OpenAI":
    """Imported here: `openai` is an extra, which no other judge needs."""
    try:
        from openai import OpenAI
    except ImportError:
        raise UserError(
            "--judge endpoint needs the package openai: pip install 'ship-ds[judge]', or leave "
            "that judge out"
        ) from None
    # The client retries with backoff by itself: connection errors, 408, 409, 429 and 5xx. Local
    # servers take any key.
    return OpenAI(
        base_url=config.url,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        max_retries=config.retries,
        timeout=config.timeout_seconds,
    )
