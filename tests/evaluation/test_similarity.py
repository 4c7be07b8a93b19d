"""Similarity: the encoder of the wheel as it is known to be, and the judge around any encoder."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ship_ds.console import no_log
from ship_ds.data.task import Example, SplitTask, Task
from ship_ds.errors import UserError
from ship_ds.evaluation.questions import ask
from ship_ds.evaluation.similarity import SENTENCE_ENCODER_WHEEL, SentenceEncoder, SimilarityJudge
from ship_ds.wheels import Wheel


class Letters(nn.Module):
    """A token's state says which of the letters a, b and c it is."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=nn.functional.one_hot(input_ids, 4).float())


def spell(texts: list[str], **settings: Any) -> dict[str, Tensor]:
    """Ids 0 to 2; a row that is padded has 2 where its mask is 0."""
    longest = max(map(len, texts))
    return {
        "input_ids": torch.tensor([["abc".index(c) for c in t.ljust(longest, "c")] for t in texts]),
        "attention_mask": torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts]),
    }


ENCODER = SentenceEncoder(Letters(), spell)


def test_similarity_is_the_cosine_of_mean_states_padding_left_out() -> None:
    pairs = [("aab", ["cc", "abb"]), ("a", ["b"]), ("ab", ["ab"]), (None, ["a"]), ("", ["a"])]
    assert ENCODER.similarities(pairs) == pytest.approx([4 / 5, 0, 1, 0, 0])
    assert ENCODER.similarities([]) == [] and ENCODER.similarities([("a", [])]) == [0]


def test_the_judge_scores_texts_by_the_closest_wording_and_answers_one_by_one() -> None:
    examples = tuple(Example("x", text) for text in ("a", "b", "ab"))
    task = SplitTask(Task("t", "aab", examples, ("cc",)), examples[:1], examples[1:], ("abb",))
    judge, question = SimilarityJudge(ENCODER), ask(task, 0, 0)
    [[value]] = judge.columns(["abb"], [question])["similarity"]
    assert value == 1
    [row] = judge.answer_columns([["a", None]], [question])["similarity"]
    assert row == [0, 0]
    [row] = judge.answer_columns([["ab", "a"]], [question])["similarity"]
    assert row == pytest.approx([0.5**0.5, 0.5**0.5])


@pytest.mark.slow
@pytest.mark.skipif(SENTENCE_ENCODER_WHEEL.installed() is None, reason="the wheel is not installed")
def test_the_encoder_gives_the_numbers_of_its_model_card() -> None:
    encoder = SentenceEncoder.from_wheel(no_log)
    vector = encoder.encode(["This is an example sentence", "Each sentence is converted"])[0, :5]
    assert vector.tolist() == pytest.approx([0.0677, 0.0635, 0.0487, 0.0793, 0.0374], abs=1e-4)


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "all_minilm_l6_v2").mkdir()
    (tmp_path / "all_minilm_l6_v2" / "model.zip").write_bytes(b"PK")
    monkeypatch.setattr(Wheel, "installed", lambda self: tmp_path)
    with pytest.raises(UserError, match="sha256 .* instead of 0872f5d7d0e8"):
        SentenceEncoder.from_wheel(no_log)
