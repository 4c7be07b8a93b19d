"""The port: how an architecture is found, what it cannot do, and that nobody reaches past it."""

import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ship_ds.errors import UserError
from ship_ds.model.adapters.sites import sites_of, wrap_sites
from ship_ds.model.decoder_only import DecoderOnly
from ship_ds.model.language_model import language_model
from tests.model.models import HIDDEN, VOCABULARY, tiny_lm

ROOT = Path(__file__).parents[2]
REACHES_PAST = re.compile(r"\.lm\b|\.language_model\.module\b")


def test_nobody_outside_model_touches_the_transformers_model() -> None:
    files = [*ROOT.glob("ship_ds/**/*.py"), *ROOT.glob("tools/*.py")]
    assert len(files) > 100
    reaching = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in files
        if "ship_ds/model/" not in file.as_posix()
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if REACHES_PAST.search(line)
    ]
    assert reaching == []


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_causal_lm_says_its_sizes_and_places(family: str) -> None:
    model = tiny_lm(family)
    lm = language_model(model)
    assert isinstance(lm, DecoderOnly) and lm.missing("adapters") is None
    assert (lm.hidden_size, lm.vocabulary_size, lm.context_length) == (HIDDEN, VOCABULARY, 128)
    assert lm.packs == (family == "llama"), "soft-capped scores need a mask of all tokens"
    assert list(lm.blocks()) == ["model.layers.0", "model.layers.1"]
    assert len(lm.linears()) == 14
    for path, linear in lm.linears().items():
        assert model.get_submodule(path) is linear


def test_sites_are_found_again_after_wrapping() -> None:
    model = tiny_lm("llama")
    sites = wrap_sites(model, ("q_proj", "down_proj"))
    assert list(sites) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert sites["model.layers.1.mlp.down_proj"] == (128, 64)
    assert sites_of(model) == sites


def test_a_model_without_a_list_of_blocks_says_so_in_one_line() -> None:
    config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    reason = language_model(model).missing("adapters")
    assert reason is not None and "GPT2LMHeadModel" in reason and "\n" not in reason
    with pytest.raises(UserError, match="has no model.layers"):
        wrap_sites(model, ("c_attn",))
