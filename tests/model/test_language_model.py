"""The port: how an architecture is found, what it cannot do, and that nobody reaches past it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from ship_ds.errors import UserError
from ship_ds.model.adapters.sites import sites_of, wrap_sites
from ship_ds.model.decoder_only import DecoderOnly
from ship_ds.model.language_model import auto_class, language_model
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


def test_a_model_that_cannot_be_adapted_says_so_in_one_line() -> None:
    with torch.device("meta"):
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
        bloom = BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2))
    assert language_model(model).missing("adapters") is None
    model.config.n_layer = 2
    for one, message in (
        (model, "GPT2LMHeadModel: has no list of num_hidden_layers blocks"),
        (bloom, "BloomForCausalLM: hands its blocks nothing but its own arguments"),
    ):
        reason = language_model(one).missing("adapters")
        assert reason is not None and "\n" not in reason
        with pytest.raises(UserError, match=message):
            wrap_sites(one, ("c_attn",))
    with pytest.raises(UserError, match="bloom: hands its blocks nothing but its own arguments"):
        auto_class(bloom.config)
