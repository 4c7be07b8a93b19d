"""What the encoder's learned queries gather of a text: against the formula, packed and padded, with
whatever else an encoder may be."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ship_ds.bundle import Bundle, frozen_bases, write_bundle
from ship_ds.config import Config, load_config
from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.inference.gradient import Schedule, descend_on_instructions
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.batch import TokenBatch
from ship_ds.model.decoder_only import DecoderOnly
from ship_ds.model.pooling import LearnedQueries
from ship_ds.model.ship import ShipModel
from ship_ds.prompt import describe_roles
from tests.model.models import wake_up
from tests.model.test_shared_backbone import config_of, step, trained

pytestmark = pytest.mark.slow

WORDINGS = ["keep the numbers greater than 4", "reverse", "put 7 at the front of the list"]
LENGTHS = [5, 2, 9]
ATTENTION: dict[str, Any] = {"encoder.pooling": {"kind": "attention", "num_queries": 3}}
LORA = "{quantisation: nf4, tuning: {kind: lora, rank: 2, dropout: 0.1}}"


def small(*overrides: str) -> Config:
    """A SHIP whose encoder has learned queries."""
    return load_config(
        "quickstart-smoke",
        [
            "model.latent_size=16",
            "model.hypernetwork={kind: lora, rank: 2, width: 8}",
            "model.encoder.pooling=attention",
            *overrides,
        ],
    )


def ship_of(config: Config) -> ShipModel:
    torch.manual_seed(0)
    ship = build_ship(config.model, LoadedWeights())
    wake_up(ship)
    return ship.eval()


def some_states(hidden_size: int = 8) -> tuple[Tensor, Tensor]:
    """States of three texts in fp64, zero in the padding, and where they are real."""
    generator = torch.Generator().manual_seed(3)
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    states = torch.randn(*real.shape, hidden_size, generator=generator, dtype=torch.float64)
    return states * real[..., None], real


@pytest.mark.parametrize("num_heads", [1, 4])
def test_one_query_of_zero_weights_gathers_the_mean_of_the_real_tokens(num_heads: int) -> None:
    states, real = some_states()
    pooling = LearnedQueries(8, 1, num_heads).double()
    torch.nn.init.zeros_(pooling.queries.weight)
    means = torch.stack([one[:length].mean(0) for one, length in zip(states, LENGTHS, strict=True)])
    torch.testing.assert_close(pooling(states, real), means, rtol=1e-7, atol=1e-7)


def test_each_head_of_each_query_gathers_its_share_by_weights_of_its_own() -> None:
    states, real = some_states()
    pooling = LearnedQueries(8, 3, 2).double()
    gathered = pooling(states, real).view(3, 3, 2, 4)
    vectors = pooling.queries.weight.view(3, 2, 8)
    for text, length in enumerate(LENGTHS):
        for query in range(3):
            for head in range(2):
                own = states[text, :length]
                weights = (own @ vectors[query, head] / 8**0.5).softmax(0)
                expected = weights @ own[:, 4 * head : 4 * head + 4]
                # The softmax is in fp32, whatever the states are in.
                torch.testing.assert_close(
                    gathered[text, query, head], expected, rtol=1e-5, atol=1e-5
                )


def test_no_weight_falls_on_padding_whatever_stands_there() -> None:
    states, real = some_states()
    pooling = LearnedQueries(8, 3, 2).double()
    weights = pooling.weights(states, real)
    assert not weights[~real].any() and weights[real].all()
    torch.testing.assert_close(weights.sum(1), torch.ones(3, 6))
    other = states.masked_fill(~real[..., None], 1e9)
    assert torch.equal(pooling(other, real), pooling(states, real))


def test_16_bits_have_a_softmax_of_32() -> None:
    states, real = some_states(64)
    pooling = LearnedQueries(64, 2, 4)
    expected = pooling(states.float(), real)
    half = pooling.bfloat16()
    assert half.weights(states.bfloat16(), real).dtype == torch.float32
    gathered = half(states.bfloat16(), real)
    assert gathered.dtype == torch.bfloat16
    torch.testing.assert_close(gathered.float(), expected, rtol=0.02, atol=0.02)


def prompts_of(ship: ShipModel) -> TokenBatch:
    prompts = ship.encoder_prompts
    ids = [prompts.encoder_prompt(text) for text in WORDINGS]
    return TokenBatch.build(ids, None, prompts.pad_id)


def read(ship: ShipModel, embeddings: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean and log-variance side by side, and every gradient of their sum of cubes."""
    posterior = torch.cat(ship.encoder(prompts_of(ship), embeddings), 1)
    ship.zero_grad()
    (posterior**3).sum().backward()
    parameters = ship.encoder.named_parameters()
    return posterior.detach(), {
        name: p.grad.clone() for name, p in parameters if p.grad is not None
    }


def test_packed_and_padded_and_alone_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, and where embeddings stand in for the tokens, as induction has them."""
    ship = ship_of(small()).double()
    assert ship.encoder.language_model.packs and prompts_of(ship).has_padding
    packed, expected = read(ship)
    assert expected["pooling.queries.weight"].abs().amin() > 0
    with torch.no_grad():
        alone = torch.cat([ship.encode([text]) for text in WORDINGS])
        embeddings = ship.encoder.language_model.embed(prompts_of(ship))
    tolerance = {"rtol": 1e-6, "atol": 1e-6}  # of the softmax in fp32
    torch.testing.assert_close(packed[:, :16], alone, **tolerance)
    embeddings.requires_grad_()
    by_embeddings, _ = read(ship, embeddings)
    torch.testing.assert_close(by_embeddings, packed, **tolerance)
    assert embeddings.grad is not None
    moves = embeddings.grad.abs().amax(-1)
    real = prompts_of(ship).real_ES
    assert moves[real].all() and not moves[~real].any()
    monkeypatch.setattr(DecoderOnly, "packs", False)
    padded, gradients = read(ship)
    torch.testing.assert_close(padded, packed, **tolerance)
    assert gradients.keys() == expected.keys() and len(gradients) > 30
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packs", [True, False])
def test_what_fills_a_row_up_never_changes_z(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ship = ship_of(small())
    monkeypatch.setattr(DecoderOnly, "packs", packs)
    batch = prompts_of(ship)
    filled = batch.ids_ES.masked_fill(~batch.real_ES, 17)
    assert not torch.equal(filled, batch.ids_ES)
    with torch.no_grad():
        expected, other = (ship.encoder(one)[0] for one in (batch, replace(batch, ids_ES=filled)))
    assert torch.equal(other, expected)


def test_names_are_as_they_were_and_queries_add_one() -> None:
    plain, ship = ship_of(small("model.encoder.pooling=last")), ship_of(small())
    assert small("model.encoder.pooling=last") == small("model.encoder.pooling={kind: last}")
    names, more = ({name for name, _ in one.named_parameters()} for one in (plain, ship))
    assert more - names == {"encoder.pooling.queries.weight"} and names < more
    assert {name for name in names if name.startswith("encoder.") and ".lm." not in name} == {
        f"encoder.head.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert ship.encoder.head[0].in_features == 4 * plain.encoder.head[0].in_features
    assert "encoder.pooling.queries.weight" not in ship.pretrained_parameters()


def test_a_shared_base_and_recomputed_blocks_change_no_bit() -> None:
    """Over an NF4 base with dropout: the same losses and gradients, those of the queries too."""
    three, one = (ship_of_shared(kind, False) for kind in ("separate", "shared"))
    recomputed = ship_of_shared("shared", True)
    losses, gradients = step(three)
    assert gradients["encoder.pooling.queries.weight"].any()
    assert gradients["encoder.adapter.model.layers.0.self_attn.q_proj.lora_a.weight"].any()
    for ship in (one, recomputed):
        assert list(trained(ship)) == list(trained(three))
        other_losses, others = step(ship)
        assert other_losses == losses and others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(others[name], gradient), name


def ship_of_shared(backbone: str, checkpointing: bool) -> ShipModel:
    changes = ATTENTION | {"encoder.checkpointing": checkpointing}
    return ship_of(config_of(backbone, "nf4", **changes)).train()


def test_a_bundle_opens_with_its_queries_and_with_no_others(tmp_path: Path) -> None:
    config = small(f"model.encoder={LORA[:-1]}, pooling: attention}}")
    ship = ship_of(config)
    write_bundle(
        tmp_path / "bundle",
        {name: parameter.detach() for name, parameter in trained(ship).items()},
        config,
        describe_roles(vars(ship.collator.prompts)),
        frozen_bases(config),
        WORDINGS,
        [],
    )
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.config.model == config.model
    torch.manual_seed(5)
    opened = build_ship(bundle.config.model, LoadedWeights()).eval()
    assert not torch.equal(opened.encode(WORDINGS), ship.encode(WORDINGS))
    bundle.load_into(opened)
    assert torch.equal(opened.encode(WORDINGS), ship.encode(WORDINGS))
    for other in ("last", "{kind: attention, num_queries: 2}"):
        model = ship_of(small(f"model.encoder={LORA[:-1]}, pooling: {other}}}"))
        with pytest.raises(UserError, match=r"encoder\.(pooling|head)\.") as error:
            bundle.load_into(model)
        assert "\n" not in str(error.value)


def test_induction_descends_through_the_queries() -> None:
    ship = ship_of(small())
    examples = [Example("3 9 5", "9 5"), Example("1 2", "2"), Example("8 1", "8")]
    schedule = Schedule(steps=3, lr=1e-2, prior_weight=0)
    found = descend_on_instructions(ship, WORDINGS, [examples] * 3, schedule)
    with torch.no_grad():
        start = ship.encode(WORDINGS)
    assert found.latent_CZ.isfinite().all() and found.loss_C.isfinite().all()
    assert not torch.allclose(found.latent_CZ, start, atol=1e-4), "the embeddings moved z"


def test_heads_that_have_no_equal_shares_are_one_line() -> None:
    with pytest.raises(
        UserError,
        match=r"model.encoder.pooling.num_heads \(3\) must divide the base's hidden size \(128\)",
    ) as error:
        ship_of(small("model.encoder.pooling={kind: attention, num_heads: 3}"))
    assert "\n" not in str(error.value)


def test_shares_need_a_query_for_each_block() -> None:
    """Else blocks would read parts of one query's share, in silence."""
    config = load_config(
        "quickstart-smoke",
        [
            "model.encoder.pooling={kind: attention, num_queries: 2, shares: true}",
            "model.hypernetwork={kind: combination, parts: [{}, {kind: prefix, latent: by_layer}]}",
        ],
    )
    with pytest.raises(UserError, match=r"num_queries \(2\).* has to be 4, a query for each block"):
        build_ship(config.model, LoadedWeights())
