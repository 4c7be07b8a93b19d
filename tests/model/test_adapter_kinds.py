"""What every kind of adapter keeps to, kind by kind: a new one is tested by its line in `KINDS`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ship_ds.config import ModelConfig
from ship_ds.errors import UserError
from ship_ds.kinds import ADAPTERS
from ship_ds.model.adapters.adapter import (
    Adapter,
    Hypernetwork,
    States,
    Target,
    build_hypernetwork,
)
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.adapters.sites import linears_of, sites_in_each_block, wrap, wrap_also
from ship_ds.model.batch import TokenBatch
from ship_ds.model.generation import greedy
from ship_ds.model.language_model import LanguageModel, language_model
from tests.model.models import EOS, HIDDEN, random_rows, tiny_lm, tiny_t5

Z, TASKS, BLOCKS = 2 * HIDDEN, 2, 2
STATE_WIDTH = (1 + BLOCKS) * HIDDEN
"""Of a state with what came into each block behind it; the encoder is such a llama, too."""
READ = States(
    torch.randn(TASKS, 4, STATE_WIDTH, generator=torch.Generator().manual_seed(7)),
    torch.tensor([[True, True, True, True], [True, True, False, False]]),
)
"""What an encoder gives of a text of four tokens and of one of two."""
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 3, "width": 16},
    "lora by layer": {"kind": "lora", "rank": 3, "width": 16, "latent": "by_layer"},
    "lora from a": {"kind": "lora", "rank": 3, "width": 16, "starts_at_zero": "a"},
    "lora per rank by layer": {
        "kind": "lora",
        "rank": 3,
        "width": 16,
        "heads": "per_rank",
        "latent": "by_layer",
    },
    # Its learned B has numbers of size one: with the others' scale what it adds drowns the model.
    "lora diagonal": {"kind": "lora", "rank": 3, "alpha": 3, "width": 16, "heads": "diagonal"},
    "lora square by layer": {
        "kind": "lora",
        "rank": 3,
        "width": 16,
        "heads": "square",
        "latent": "by_layer",
    },
    "soft_prompt": {"kind": "soft_prompt", "num_virtual_tokens": 2, "width": 16},
    "soft_prompt decomposed": {
        "kind": "soft_prompt",
        "num_virtual_tokens": 2,
        "width": 16,
        "rank": 3,
    },
    "reshape": {"kind": "reshape", "num_virtual_tokens": 2},
    "prefix": {"kind": "prefix", "length": 3, "width": 16},
    "prefix by layer": {"kind": "prefix", "length": 3, "width": 16, "latent": "by_layer"},
    "layer_prompt": {"kind": "layer_prompt", "length": 3, "width": 16},
    "layer_prompt decomposed by layer": {
        "kind": "layer_prompt",
        "length": 3,
        "width": 16,
        "latent": "by_layer",
        "rank": 5,
    },
    "bottleneck": {"kind": "bottleneck", "rank": 3, "width": 16},
    "bottleneck by layer": {"kind": "bottleneck", "rank": 3, "width": 16, "latent": "by_layer"},
    "bottleneck from a": {"kind": "bottleneck", "rank": 3, "width": 16, "starts_at_zero": "a"},
    "bottleneck diagonal": {"kind": "bottleneck", "rank": 3, "width": 16, "heads": "diagonal"},
    "sparse": {"kind": "sparse", "rank": 3, "width": 16},
    "sparse in the last block": {"kind": "sparse", "rank": 3, "width": 16, "num_blocks": 1},
    "scatter": {"kind": "scatter", "num_blocks": 1},
    "fusion": {"kind": "fusion", "width": 16},
    # By itself it makes nothing of z, which the contract asks for.
    "block_fusion and lora": {
        "kind": "combination",
        "parts": [{"kind": "lora", "rank": 3, "width": 16}, {"kind": "block_fusion"}],
    },
    "combination": {
        "kind": "combination",
        "parts": [
            {"kind": "lora", "rank": 2, "width": 16, "targets": ["q_proj", "o_proj"]},
            {"kind": "lora", "rank": 3, "width": 16, "targets": ["o_proj"]},
            {"kind": "bottleneck", "rank": 3, "width": 16},
            {"kind": "prefix", "length": 3, "width": 16},
            {"kind": "soft_prompt", "num_virtual_tokens": 2, "width": 16},
        ],
    },
    "combination with a sparse one": {
        "kind": "combination",
        "parts": [
            {"kind": "lora", "rank": 2, "width": 16},
            {"kind": "sparse", "rank": 3, "width": 16, "num_blocks": 1},
        ],
    },
    "HINT": {
        "kind": "combination",
        "parts": [
            {"kind": "bottleneck", "rank": 3, "width": 16, "latent": "by_layer"},
            {"kind": "prefix", "length": 3, "width": 16, "latent": "by_layer"},
            {"kind": "fusion", "width": 16},
        ],
    },
}
CASES = [
    (name, family)
    for name in KINDS
    for family in ("llama", "t5")
    # Its encoder would have to be a T5, which no encoder is: refused (test_block_fusion.py).
    if not (family == "t5" and "block_fusion" in name)
]
"""Kinds with the Task LLM's family: one stack, and two."""
STARTS_AT_THE_BASE = ("lora", "bottleneck", "sparse")


LINEARS = {
    "lora": ["all-linear"],
    "bottleneck": ["o", "wo"],
    "sparse": ["all-linear"],
    "scatter": ["all-linear"],
}
"""Targets in a T5, whose linears have other names than the defaults."""


def _section(name: str, family: str) -> Any:
    section = KINDS[name]
    if family == "t5":
        parts = [one | _targets(one) for one in section.get("parts", [])]
        section = section | _targets(section) | ({"parts": parts} if parts else {})
    return ModelConfig.model_validate({"hypernetwork": section}).hypernetwork


def _targets(section: dict[str, Any]) -> dict[str, Any]:
    named = LINEARS.get(section["kind"])
    return {} if named is None else {"targets": named}


def _made(name: str, family: str = "llama") -> tuple[LanguageModel, Hypernetwork]:
    """A wrapped model and a fresh hypernetwork of the kind."""
    section = _section(name, family)
    model = (tiny_t5() if family == "t5" else tiny_lm(family)).requires_grad_(False)
    kind = ADAPTERS.implementation(section)
    sites = sites_in_each_block(model, kind.targets(section))
    wrap(model, sites)
    lm = language_model(model)
    torch.manual_seed(0)
    target = replace(Target.of(lm, sites), state_size=HIDDEN, state_blocks=BLOCKS)
    return lm, build_hypernetwork(section, Z, target)


def _awake(hypernetwork: Hypernetwork, spread: float = 0.2) -> Hypernetwork:
    """No weight that starts at zero is zero any more."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in hypernetwork.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return hypernetwork


def _latent(seed: int = 1) -> Tensor:
    return torch.randn(TASKS, Z, generator=torch.Generator().manual_seed(seed))


def _adapted(hypernetwork: Hypernetwork, latent_TZ: Tensor, read: States = READ) -> Adapter:
    made: Adapter = hypernetwork(latent_TZ, read) if hypernetwork.fuses else hypernetwork(latent_TZ)
    return made


PROMPTS, TARGETS = random_rows([5, 2, 4, 6], 3), random_rows([2, 3, 1, 2], 4)


def _batch(hypernetwork: Hypernetwork, rows: slice = slice(None)) -> TokenBatch:
    places = hypernetwork.num_virtual_tokens
    return TokenBatch.build(PROMPTS[rows], TARGETS[rows], 0, places)


def _soft(adapter: Adapter, num_rows: int) -> Tensor | None:
    tokens = adapter.virtual_tokens()
    return None if tokens is None else tokens.repeat_interleave(num_rows // len(tokens), 0)


def _logits(lm: LanguageModel, adapter: Adapter, batch: TokenBatch, **options: Any) -> Tensor:
    soft = _soft(adapter, len(batch.lengths))
    return lm.score(batch, adapter, adapter.num_tasks, soft=soft, **options)[0]


def test_every_kind_is_here() -> None:
    """Those of tests and plugins are not the package's."""
    inside = {
        name
        for name in ADAPTERS.names()
        if ADAPTERS.config_class(name).__module__.startswith("ship_ds.")
    }
    sections = [one for whole in KINDS.values() for one in (whole, *whole.get("parts", ()))]
    assert {section["kind"] for section in sections} == inside


def test_what_leaves_as_a_lora_says_as_which() -> None:
    for name in ADAPTERS.names():
        has_one = hasattr(ADAPTERS.config_class(name), "as_lora")
        assert has_one == (ADAPTERS.implementation(name).leaves == "lora")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family"), [case for case in CASES if case[0].startswith(STARTS_AT_THE_BASE)]
)
def test_a_fresh_one_is_the_base(name: str, family: str) -> None:
    lm, hypernetwork = _made(name, family)
    bare = lm.score(_batch(hypernetwork))[0]
    assert torch.equal(_logits(lm, _adapted(hypernetwork, _latent()), _batch(hypernetwork)), bare)
    awake = _logits(lm, _adapted(_awake(hypernetwork), _latent()), _batch(hypernetwork))
    assert float((awake - bare).detach().abs().max()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), CASES)
def test_tasks_answer_as_each_alone_padded_and_packed(name: str, family: str) -> None:
    lm, hypernetwork = _made(name, family)
    # T5's scores are not scaled: small keys in its cross-attention take next to nothing.
    spread = 1.0 if (name, family) == ("fusion", "t5") else 0.2
    adapter = _adapted(_awake(hypernetwork, spread), _latent())
    together = _logits(lm, adapter, _batch(hypernetwork))
    alone = [
        _logits(lm, adapter.rows(torch.tensor([t])), _batch(hypernetwork, slice(2 * t, 2 * t + 2)))
        for t in range(TASKS)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert (
        float(
            (
                alone[0][0]
                - _logits(lm, adapter.rows(torch.tensor([1])), _batch(hypernetwork, slice(0, 2)))[0]
            )
            .abs()
            .max()
        )
        > 0.01
    )
    assert hypernetwork.packs and lm.packs == (family != "t5")
    if lm.packs:
        packed = _logits(lm, adapter, _batch(hypernetwork), packed=True)
        torch.testing.assert_close(packed, together, rtol=1e-4, atol=1e-4)
    ready = _logits(lm, adapter.prepared(torch.float32), _batch(hypernetwork))
    torch.testing.assert_close(ready, together, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), CASES)
def test_tasks_stand_beside_those_of_another_adapter(name: str, family: str) -> None:
    """Of texts of other lengths, where texts are fused: a server's rows join each other."""
    lm, hypernetwork = _made(name, family)
    _awake(hypernetwork)
    longer = States(
        torch.randn(TASKS, 6, STATE_WIDTH, generator=torch.Generator().manual_seed(8)),
        torch.arange(6) < torch.tensor([[3], [6]]),
    )
    adapters = [_adapted(hypernetwork, _latent()), _adapted(hypernetwork, _latent(5), longer)]
    batches = [_batch(hypernetwork, rows) for rows in (slice(0, 2), slice(2, 4))]
    for order in ((0, 1), (1, 0)):
        both = adapters[order[0]].beside(adapters[order[1]])
        assert both is not None and both.num_tasks == 2 * TASKS
        # The first adapter's rows are those of its own batch, whichever stands first.
        index = torch.tensor([0, 1, 2, 3] if order == (0, 1) else [2, 3, 0, 1])
        together = _logits(lm, both.rows(index), _batch(hypernetwork))
        alone = [_logits(lm, *row) for row in zip(adapters, batches, strict=True)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), CASES)
def test_rows_that_finish_leave_the_others_their_adapter(name: str, family: str) -> None:
    """Of task 0 one row stays, of task 1 two: each goes on as it would alone. In fp64, since T5's
    attention, whose scores are not scaled, makes much of what fp32 rounds off."""
    lm, hypernetwork = _made(name, family)
    lm.module.double()
    adapter = _adapted(_awake(hypernetwork).double(), _latent().double())
    places = hypernetwork.num_virtual_tokens

    def stream(rows: list[int], task: int | None) -> Any:
        own = adapter if task is None else adapter.rows(torch.tensor([task]))
        prompts = TokenBatch.build([PROMPTS[row] for row in rows], None, 0, places)
        return lm.stream(prompts, own, soft=_soft(own, len(rows)))

    both = stream([0, 1, 2, 3], None)
    both.reserve(3)
    both.select([1, 2, 3])
    token = both.logits_EV.argmax(-1)
    both.advance(token)
    for place, row in enumerate([1, 2, 3]):
        alone = stream([row], row // 2)
        alone.reserve(3)
        alone.advance(token[place : place + 1])
        torch.testing.assert_close(both.logits_EV[place], alone.logits_EV[0], rtol=1e-9, atol=1e-9)
    answers = greedy(stream([0, 1, 2, 3], None), EOS, 6)
    assert answers == [greedy(stream([row], row // 2), EOS, 6)[0] for row in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "packed"),
    [
        (*case, packed)
        for case in CASES
        for packed in (False, True)
        if case[1] == "llama" or not packed
    ],
)
def test_gradients_reach_all_of_two_adapters_alive_under_checkpointing(
    name: str, family: str, packed: bool
) -> None:
    """Both forwards, then both backwards: a recomputation sees the adapter of its own forward."""

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        lm, hypernetwork = _made(name, family)
        _awake(hypernetwork)
        latents = [_latent(seed).requires_grad_() for seed in (1, 2)]
        options: Any = {"packed": packed, "checkpointing": checkpointing}
        batch = _batch(hypernetwork)
        logits = [
            _logits(lm, _adapted(hypernetwork, latent), batch, **options) for latent in latents
        ]
        losses = [nn.functional.cross_entropy(one, batch.labels_K) for one in logits]
        for loss in losses:
            loss.backward()
        named = [*hypernetwork.named_parameters(), *zip(("z0", "z1"), latents, strict=True)]
        return {place: one.grad for place, one in named if one.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    names = {place for place, _ in _made(name, family)[1].named_parameters()}
    assert plain.keys() == recomputed.keys() == names | {"z0", "z1"}
    for place, one in plain.items():
        assert float(one.abs().max()) > 0, place
        torch.testing.assert_close(one, recomputed[place], msg=place)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), CASES)
def test_what_was_generated_has_a_row_a_task(name: str, family: str) -> None:
    _, hypernetwork = _made(name, family)
    adapter = _adapted(_awake(hypernetwork), _latent())
    tensors = adapter.tensors()
    assert tensors and {len(tensor) for tensor in tensors.values()} == {TASKS}
    swapped = adapter.rows(torch.tensor([1, 0])).tensors()
    for place, tensor in tensors.items():
        assert torch.equal(swapped[place], tensor.flip(0)), place


@pytest.mark.parametrize("name", [name for name in KINDS if "by layer" in name])
def test_a_share_of_z_reaches_its_own_block_alone(name: str) -> None:
    _, hypernetwork = _made(name)
    _awake(hypernetwork)
    latent, moved = _latent(), _latent()
    moved[:, Z // 2 :] += 1  # the second of two blocks
    before, after = (
        _adapted(hypernetwork, latent).tensors(),
        _adapted(hypernetwork, moved).tensors(),
    )
    # A of `square` is learned, and the same for every z.
    made = [place for place in before if "square" not in name or place.endswith(".B")]
    changed = {place: not torch.equal(before[place], after[place]) for place in made}
    assert {place for place in changed if changed[place]} == {
        place for place in changed if ".1" in place
    }
    assert len(set(changed.values())) == 2


FUSING = ("fusion", "block_fusion and lora", "HINT")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FUSING)
def test_states_that_are_none_are_not_fused(name: str, packed: bool) -> None:
    """What stands in a text's padding, and how much there is of it, changes no answer; a state
    does."""
    lm, hypernetwork = _made(name)
    _awake(hypernetwork)
    wide = torch.cat([READ.states_TSH, torch.randn(TASKS, 3, STATE_WIDTH)], 1)
    real = nn.functional.pad(READ.real_TS, (0, 3))
    noisy = torch.where(real[..., None], wide, 9.0)
    moved = READ.states_TSH + torch.tensor([0.0, 1.0])[:, None, None]

    def logits(read: States) -> Tensor:
        adapter = _adapted(hypernetwork, _latent(), read)
        return _logits(lm, adapter, _batch(hypernetwork), packed=packed)

    plain = logits(READ)
    torch.testing.assert_close(logits(States(noisy, real)), plain, rtol=1e-4, atol=1e-4)
    others = logits(States(moved, READ.real_TS))
    of_first_task = _batch(hypernetwork).label_row_K < 2
    torch.testing.assert_close(others[of_first_task], plain[of_first_task], rtol=1e-4, atol=1e-4)
    assert float((others - plain)[~of_first_task].abs().max()) > 0.01


@pytest.mark.parametrize("name", FUSING)
def test_a_task_whose_states_are_left_out_goes_by_z_alone(name: str) -> None:
    """Those below the share are left out; no states at all is the same, and runs what is there. In
    fp64, which rounds the same whatever stands beside a token."""
    lm, hypernetwork = _made(name)
    lm.module.double()
    _awake(hypernetwork).double()
    batch, latent_TZ = _batch(hypernetwork), _latent().double()
    read = replace(READ, states_TSH=READ.states_TSH.double())
    chances = torch.tensor([0.05, 0.5])  # drop is 0.1
    dropped = _logits(lm, _adapted(hypernetwork, latent_TZ, replace(read, chance_T=chances)), batch)
    plain = _logits(lm, _adapted(hypernetwork, latent_TZ, read), batch)
    without = _logits(lm, hypernetwork(latent_TZ), batch)
    of_first_task = batch.label_row_K < 2
    torch.testing.assert_close(dropped[of_first_task], without[of_first_task])
    torch.testing.assert_close(dropped[~of_first_task], plain[~of_first_task])
    assert float((plain - without).abs().max()) > 0.01
    called: list[str] = []
    for place, module in hypernetwork.named_modules():
        module.register_forward_hook(lambda *_, place=place: called.append(place))
    hypernetwork(latent_TZ)
    without_states, called[:] = list(called), []
    _adapted(hypernetwork, latent_TZ, read)
    assert called == without_states, "ranks that take turns run the same modules in one order"


@pytest.mark.parametrize(
    "name",
    [
        "lora",
        "soft_prompt",
        "reshape",
        "prefix",
        "layer_prompt",
        "sparse",
        "sparse in the last block",
        "scatter",
    ],
)
def test_what_is_written_is_read_back(name: str, tmp_path: Path) -> None:
    lm, hypernetwork = _made(name)
    adapter = _awake(hypernetwork)(_latent())
    for task, export in enumerate(hypernetwork.exports(adapter)):
        folder = tmp_path / str(task)
        folder.mkdir()
        export.write(folder, "base", lm.module)
        read = hypernetwork.read(folder, lm.module)
        one = adapter.rows(torch.tensor([task]))
        for key, tensor in one.tensors().items():
            torch.testing.assert_close(read.tensors()[key], tensor, atol=1e-5, rtol=1e-4)
        # A difference of sums in fp32.
        assert float(read.distance(one).detach()) < 1e-5
    latent_Z = hypernetwork.latent_of(read)
    assert (latent_Z is not None) == (name in ("reshape", "scatter"))
    if latent_Z is not None:
        torch.testing.assert_close(latent_Z, _latent()[1])


@pytest.mark.parametrize("name", ["soft_prompt", "reshape", "prefix", "layer_prompt"])
def test_another_length_is_one_line(name: str, tmp_path: Path) -> None:
    lm, hypernetwork = _made(name)
    hypernetwork.exports(_awake(hypernetwork)(_latent()))[0].write(tmp_path, "base", lm.module)
    path = tmp_path / "adapter_model.safetensors"
    rows = load_file(path)["prompt_embeddings"]
    save_file({"prompt_embeddings": torch.cat([rows, rows[:1]])}, path)
    with pytest.raises(UserError, match=r"prompt_embeddings: .*model\.hypernetwork\.") as caught:
        hypernetwork.read(tmp_path, lm.module)
    assert "\n" not in str(caught.value)


def test_modules_that_the_run_does_not_adapt_can_be_wrapped_later() -> None:
    """Under an adapter of both, against the sum of weights; parameters keep their names."""
    model = tiny_lm("llama").requires_grad_(False)
    wrap(model, sites_in_each_block(model, ("q_proj",)))
    names = list(model.state_dict())
    path = "model.layers.1.mlp.down_proj"
    sites = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert linears_of(model).keys() >= {path, *sites}
    wrap_also(model, [path, sites[0]])
    wrap_also(model, [path])
    generator = torch.Generator().manual_seed(5)
    factors = {
        one: (
            0.3 * torch.randn(1, 2, linear.in_features, generator=generator),
            0.3 * torch.randn(1, linear.out_features, 2, generator=generator),
        )
        for one, linear in linears_of(model).items()
        if one in (path, sites[1])
    }
    ids = torch.tensor([[5, 9, 3, 7]])
    plain = tiny_lm("llama")
    with torch.no_grad():
        bare = plain(input_ids=ids).logits
        for one, (a_1RI, b_1OR) in factors.items():
            plain.get_submodule(one).weight += 1.5 * b_1OR[0] @ a_1RI[0]
        wanted = plain(input_ids=ids).logits
        found = model(input_ids=ids, ship_adapter=LoraAdapter(factors, 1.5)).logits
        without = model(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(without, bare, atol=1e-5, rtol=1e-5)
    assert (wanted - bare).abs().max() > 0.05
    assert len(names) == len(model.state_dict())
