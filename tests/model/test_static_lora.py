"""The static LoRA of encoder and decoder: `peft`'s to the bit, through wrapped linears; and
checkpointing of the roles that train it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from ship_ds.config import (
    DecoderConfig,
    EncoderConfig,
    FullTuning,
    LoraHypernetworkConfig,
    LoraTuning,
    ModelConfig,
    TaskLlmConfig,
)
from ship_ds.data.sampler import TaskDraw
from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.model.adapters.sites import sites_anywhere, wrap
from ship_ds.model.adapters.static_lora import StaticLora
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.loading import freeze, load_lm
from ship_ds.model.parameter_names import current_name
from ship_ds.model.ship import ShipModel
from tests.model.models import tiny_lm, wake_up

pytestmark = pytest.mark.slow

IDS = torch.arange(2, 14).view(2, 6)
TUNING = LoraTuning(rank=3, alpha=6, dropout=0.25, targets=("down_proj", "q_proj"))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tiny_lm("llama").save_pretrained(tmp_path)
    return str(tmp_path)


def _by_peft(folder: str, quantisation: Any) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    model = freeze(load_lm(folder, quantisation, torch.float32))
    settings = LoraConfig(
        r=TUNING.rank,
        lora_alpha=int(TUNING.alpha),
        lora_dropout=TUNING.dropout,
        target_modules=list(TUNING.targets),
    )
    torch.manual_seed(3)
    model = inject_adapter_in_model(settings, model)
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


def _by_value(folder: str, quantisation: Any) -> tuple[Any, StaticLora]:
    model = freeze(load_lm(folder, quantisation, torch.float32))
    sites = sites_anywhere(model, TUNING.targets)
    wrap(model, sites)
    torch.manual_seed(3)
    return model, StaticLora(sites, TUNING)


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_first_values_dropout_and_gradients_are_those_of_peft(
    folder: str, quantisation: Any
) -> None:
    by_peft, expected = _by_peft(folder, quantisation)
    model, lora = _by_value(folder, quantisation)
    own = dict(lora.named_parameters())
    assert [f"encoder.adapter.{name}" for name in own] == [
        current_name(f"encoder.lm.{name}") for name in expected
    ]
    assert len(own) == 2 * 2 * 2
    for mine, theirs in zip(own.values(), expected.values(), strict=True):
        assert torch.equal(mine, theirs)
    with torch.no_grad():
        for (name, mine), theirs in zip(own.items(), expected.values(), strict=True):
            if "lora_b" in name:
                assert not theirs.any()
                mine.copy_(theirs.normal_())
    by_peft.eval(), lora.eval()
    at_rest = model(IDS, ship_adapter=lora.value()).logits
    assert torch.equal(at_rest, by_peft(IDS).logits)
    by_peft.train(), lora.train()
    torch.manual_seed(5)
    theirs_in_training = by_peft(IDS).logits
    torch.manual_seed(5)
    in_training = model(IDS, ship_adapter=lora.value()).logits
    assert torch.equal(in_training, theirs_in_training)
    assert not torch.equal(in_training, at_rest)
    for logits in (in_training, theirs_in_training):
        logits.square().sum().backward()
    for mine, theirs in zip(own.values(), expected.values(), strict=True):
        assert mine.grad is not None and bool(mine.grad.any())
        assert torch.equal(mine.grad, theirs.grad)


def test_a_model_under_no_adapter_is_the_base(folder: str) -> None:
    model, lora = _by_value(folder, "none")
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_()
        bare = load_lm(folder, "none", torch.float32)(IDS).logits
        assert torch.equal(model(IDS).logits, bare)
        assert not torch.allclose(model(IDS, ship_adapter=lora.value()).logits, bare)


def test_missing_target_of_the_static_lora_is_named(folder: str) -> None:
    with pytest.raises(
        UserError,
        match=r"tuning.targets: LlamaForCausalLM has no linear module 'query'; "
        r"its blocks have down_proj, g",
    ) as error:
        sites_anywhere(load_lm(folder, "none", torch.float32), ("q_proj", "query"))
    assert "\n" not in str(error.value)


ROLES = ("encoder", "decoder", "task_llm")


def _ship(quantisation: Any, tuning: Any, recomputed: tuple[str, ...]) -> ShipModel:
    """Whose roles in `recomputed` recompute their blocks."""
    role: dict[str, Any] = {"quantisation": quantisation, "tuning": tuning}
    by_role = {name: {"checkpointing": name in recomputed} for name in ROLES}
    config = ModelConfig(
        latent_size=16,
        encoder=EncoderConfig(**role, **by_role["encoder"]),
        decoder=DecoderConfig(**role, **by_role["decoder"]),
        task_llm=TaskLlmConfig(quantisation="nf4", **by_role["task_llm"]),
        hypernetwork=LoraHypernetworkConfig(rank=2, width=8, targets=("q_proj",)),
    )
    torch.manual_seed(0)
    ship = build_ship(config, LoadedWeights())
    wake_up(ship)
    return ship.train()


def _gradients(ship: ShipModel) -> dict[str, torch.Tensor]:
    draw = TaskDraw("a", "reverse the list", (Example("1 2", "2 1"),), (), True)
    torch.manual_seed(2)
    sums = ship(ship.collate([draw], 0, 0))
    sum(sums.objectives.values()).backward()
    return {name: p.grad for name, p in ship.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("quantisation", "tuning"), [("none", FullTuning()), ("none", TUNING), ("nf4", TUNING)]
)
def test_checkpointed_roles_have_the_same_gradients_and_names(
    quantisation: Any, tuning: Any
) -> None:
    """Dropout included: the recomputation draws the mask of the forward again."""
    kept, recomputed = (_ship(quantisation, tuning, on) for on in ((), ROLES))
    each = [_kept_bytes(_ship(quantisation, tuning, (role,))) for role in ROLES]
    assert max(each) < _kept_bytes(kept) and _kept_bytes(recomputed) < min(each)
    expected, gradients = _gradients(kept), _gradients(recomputed)
    assert list(gradients) == list(expected) and any("encoder" in name for name in expected)
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name
    assert recomputed.state_dict().keys() == kept.state_dict().keys()
    # Either reads what the other one wrote; bitsandbytes reads no constants back.
    is_strict = quantisation == "none"
    last = "encoder.lm.model.norm.weight"
    for one, other in ((kept, recomputed), (recomputed, kept)):
        state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
        state[last] += 1
        other.load_state_dict(state, strict=is_strict)
        assert torch.equal(other.encoder.state_dict()[last.removeprefix("encoder.")], state[last])


def _kept_bytes(ship: ShipModel) -> int:
    """Bytes that autograd keeps of the forward."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    draw = TaskDraw("a", "reverse the list", (Example("1 2", "2 1"),), (), True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ship(ship.collate([draw], 0, 0))
    weights = {parameter.untyped_storage().data_ptr() for parameter in ship.parameters()}
    weights |= {p.untyped_storage().data_ptr() for p in ship.task_llm.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in weights)
