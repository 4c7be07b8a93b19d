"""What a judge behind an endpoint is asked, by name; scores by different prompts are different
quantities.

    strict            our own: would both give the same output for every input; yes or no
    published         SHIP's authors': are the two instructions equivalent; True or False
    published-lists   theirs for list functions, which they call transformations

A reply counts as theirs does where it has "true" anywhere in it, and as ours where it starts with
"yes".
"""

from collections.abc import Callable
from dataclasses import dataclass

from ship_ds.data.task import Example


@dataclass(frozen=True)
class JudgePrompt:
    """Two questions, and what counts as a yes.

    same_system, right_system: the system message, none where it is empty. same: of two
    instructions, `true` and `induced`. right: of an answer, with `instruction`, `input`, `target`
    and `answer`, and `references`, every right answer.
    """

    same_system: str
    same: str
    right_system: str
    right: str
    is_yes: Callable[[str], bool]

    def about_text(self, induced: str, true: str) -> list[dict[str, str]]:
        """The messages that ask whether an induced instruction means what the true one does."""
        return _messages(self.same_system, self.same.format(true=true, induced=induced))

    def about_answer(self, answer: str, example: Example, instruction: str) -> list[dict[str, str]]:
        """The messages that ask whether an answer is right.

        Args:
            answer: a method's.
            example: that it answers, with every right answer.
            instruction: of the task.
        """
        question = self.right.format(
            instruction=instruction,
            input=example.input,
            target=example.target,
            references=" | ".join(example.answers),
            answer=answer,
        )
        return _messages(self.right_system, question)


def _messages(system: str, question: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": question}]


def _starts_with_yes(reply: str) -> bool:
    return reply.strip().strip("*\"'").lower().startswith("yes")


def _has_true(reply: str) -> bool:
    return "true" in reply.lower()


_STRICT = JudgePrompt(
    "",
    "Two instructions for the same kind of input follow. Would a careful reader who follows them "
    "give the same output for every input? Answer with one word, yes or no.\n\n"
    "First: {true}\nSecond: {induced}",
    "",
    "An instruction, an input, the right answers to it and a given answer follow. Does the given "
    "answer say the same as one of the right ones? Answer with one word, yes or no.\n\n"
    "Instruction: {instruction}\nInput: {input}\nRight: {references}\nGiven: {answer}",
    _starts_with_yes,
)


def _published(described: str, called: str) -> JudgePrompt:
    return JudgePrompt(
        f"Here are two {described}. \nPlease help me determine if these two {called} are "
        'equivalent.\nOnly return "True" or "False".',
        "transformation A: {true}\ntransformation B: {induced}",
        "Here are an instruction, an input, an reference answer and a predicted answer.\nPlease "
        'help me determine if the predicted answer is correct.\nOnly return "True" or "False".',
        "instruction: {instruction}\ninput: {input}\nreference answer: {target}\n"
        "predicted answer: {answer}",
        _has_true,
    )


JUDGE_PROMPTS = {
    "strict": _STRICT,
    "published": _published("instructions described in natural language", "instructions"),
    "published-lists": _published(
        "transformations described in natural language for lists", "transformations"
    ),
}
"""By what `--endpoint-prompts` says."""
