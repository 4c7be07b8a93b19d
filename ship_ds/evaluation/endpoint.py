"""A judge behind an OpenAI-compatible endpoint: is the induced instruction the same as the true
one?"""

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ship_ds.errors import UserError
from ship_ds.evaluation.config import EndpointConfig
from ship_ds.evaluation.judge import Judge
from ship_ds.evaluation.questions import Question
from ship_ds.files import write_json

if TYPE_CHECKING:
    from openai import OpenAI

_QUESTION = (
    "Two instructions for the same kind of input follow. Would a careful reader who follows them "
    "give the same output for "
    "every input? Answer with one word, yes or no."
)


class EndpointJudge(Judge):
    """A language model behind an OpenAI-compatible endpoint says whether the text means the same as
    the instruction.

    Every reply is kept in `folder` under the hash of its request, and is not asked for again.
    """

    def __init__(self, config: EndpointConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.client = _client(config)

    def columns(
        self, induced: Sequence[str], questions: Sequence[Question]
    ) -> dict[str, list[list[float]]]:
        return {
            "judged_equivalence": [
                [self.is_same(text, q.task.task.instruction)]
                for text, q in zip(induced, questions, strict=True)
            ]
        }

    def is_same(self, text: str, instruction: str) -> bool:
        """Anything but a reply that starts with "yes" is a no."""
        reply = self.reply(f"{_QUESTION}\n\nFirst: {instruction}\nSecond: {text}")
        return reply.strip().strip("*\"'").lower().startswith("yes")

    def reply(self, content: str) -> str:
        request = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
        }
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
        return json.loads(path.read_text())["reply"]["choices"][0]["message"]["content"] or ""

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
