"""Induction where people wrote the instructions: other searches than for texts of a grammar, the
ranking that suits the base, and what is computed once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ship_ds.api import Ship
from ship_ds.config import parse_config
from ship_ds.console import no_log
from ship_ds.data.source import source_of
from ship_ds.data.task import Example, SplitTask, Task
from ship_ds.errors import UserError
from ship_ds.inference.analogies import share_in_slots
from ship_ds.inference.bank import Bank
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.derived import Derived
from ship_ds.inference.descents import descend_from_texts
from ship_ds.inference.gradient import Schedule, descend_on_latent
from ship_ds.inference.induction import induce_many, known_neighbours
from ship_ds.inference.prompt_following import PromptFollowing, measure_prompt_following
from ship_ds.inference.search_state import Proposal, SearchState
from ship_ds.inference.trials import test_proposals as try_proposals
from tests.inference.conftest import KNOWN

pytestmark = pytest.mark.slow

WRITTEN = (
    "add 3 to each number of the list",
    "remove every 5",
    "take the first 2 and reverse them",
    "sort the list",
)
EXAMPLES = [Example("3 4 9", "4 9"), Example("1 2 5", "2 5"), Example("7 1", "1")]
QUICK = {"num_views": 2, "num_known": 3, "num_finalists": 4, "max_new_tokens": 8}


def test_only_texts_of_a_grammar_stand_in_slots() -> None:
    assert share_in_slots(KNOWN) == 1
    assert share_in_slots(WRITTEN) == 0 == share_in_slots([])
    assert share_in_slots([*WRITTEN, "sort the words", "sort the names"]) == 3 / 6


def test_a_search_suits_its_bank_unless_told_otherwise() -> None:
    config = InductionConfig(num_splices=9)
    assert config.suited_to(0.8) is config
    suited = config.suited_to(0.03)
    assert (suited.num_splices, suited.num_edits, suited.refine_steps) == (9, 0, 0)
    assert suited.asks_task_llm and not suited.analogies
    assert InductionConfig(method="bank").suited_to(0.0) == InductionConfig(method="bank")
    overridden = InductionConfig().with_overrides(["num_views=7"]).suited_to(0.0)
    assert overridden.num_views == 7 and overridden.num_edits == 0


def test_written_instructions_are_searched_by_what_the_decoder_reads(ship: Ship) -> None:
    bank = Bank.build(ship.model, WRITTEN)
    config = InductionConfig.model_validate({**QUICK, "ranks_in_prompt": False})
    found = induce_many(ship.model, bank, [EXAMPLES], config)[0]
    origins = {candidate.origin for candidate in found.candidates}
    assert "known" in origins and not origins & {"analogy", "edit", "splice"}
    assert {(c.num_right_in_prompt, c.loss_in_prompt) for c in found.candidates} == {(None, None)}
    ranks = [(-c.num_right, c.loss) for c in found.candidates]
    assert ranks == sorted(ranks)


def test_known_instructions_of_several_views_take_turns(ship: Ship) -> None:
    bank = Bank.build(ship.model, WRITTEN)
    views = [[EXAMPLES[:1], EXAMPLES[1:2]]]
    first, second = bank.shortlist_by_decoder(ship.model, views[0], 3)
    merged = bank.shortlist_read(ship.model, views, 3)[0]
    turns = list(dict.fromkeys(c for pair in zip(first, second, strict=True) for c in pair))
    assert merged == turns[:3] and len(set(merged)) == 3
    assert bank.nearest(bank.latent_CZ[2:3] + 1e-4, 1) == [[2]]


@pytest.mark.parametrize(
    ("stated", "bare", "right_stated", "right_encoded", "follows"),
    [
        (5.0, 9.0, 8, 16, True),
        (5.0, 9.0, 7, 16, False),
        (9.0, 9.0, 16, 16, False),
        (5.0, 9.0, 0, 0, True),
    ],
)
def test_text_is_followed_where_it_helps_and_answers_half_as_many(
    stated: float, bare: float, right_stated: int, right_encoded: int, follows: bool
) -> None:
    assert PromptFollowing(stated, bare, right_stated, right_encoded, 32).follows is follows


def test_following_is_measured_on_training_tasks_and_kept(
    ship: Ship, bundle: Path, tmp_path: Path
) -> None:
    splits = source_of(ship.config.data).read(ship.model.prompts.tokenizer, lambda text: None)
    measured = measure_prompt_following(ship.model, splits.seen)
    assert measured.num_examples == 32 and 0 < measured.loss_bare != measured.loss_stated
    kept = Derived(tmp_path, "a", "float32")
    assert kept.following() is None
    kept.keep_following(measured)
    assert kept.following() == measured and Derived(tmp_path, "b", "float32").following() is None
    (tmp_path / "file").write_text("")
    Derived(tmp_path / "file", "a", "float32").keep_following(measured)  # where nothing can be kept


def test_a_base_that_follows_no_text_is_said_once_and_ranked_by_the_encoder(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    other = Ship(ship.model, ship.config, ship.digest, WRITTEN)
    measured = PromptFollowing(9, 8, 0, 9, 32)
    monkeypatch.setattr("ship_ds.api.measure_prompt_following", lambda model, seen: measured)
    for _ in range(2):
        assert not other.searching(InductionConfig(), lines.append, []).ranks_in_prompt
    assert len(lines) == 1 and "0 with their instruction in its prompt" in lines[0]
    assert lines[0].endswith("through the encoder alone, and it is asked for no text")
    # Nor is it asked for a text, as it is by itself among written instructions.
    assert not other.searching(InductionConfig(), lines.append, []).suited_to(0.0).asks_task_llm
    lines.clear()
    asks = other.searching(InductionConfig(asks_task_llm=True), lines.append, []).suited_to(0.0)
    assert asks.asks_task_llm and not asks.ranks_in_prompt
    assert lines == [f"{measured}: candidates are ranked through the encoder alone"]
    told = InductionConfig(ranks_in_prompt=True)
    ranked = other.searching(told, lines.append, []).suited_to(0.0)
    assert ranked.ranks_in_prompt and not ranked.asks_task_llm
    assert lines[1:] == [f"{measured}: it is asked for no text"]
    # Who hears nothing does not keep others from hearing it.
    fresh = Ship(ship.model, ship.config, ship.digest, WRITTEN)
    fresh.searching(InductionConfig(), no_log, [])
    fresh.searching(InductionConfig(), lines.append, [])
    assert len(lines) == 3


def test_following_that_is_interrupted_is_measured_again(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a client of the server leaves."""
    asked = []

    def measure(*_: object) -> PromptFollowing:
        asked.append(1)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return PromptFollowing(9, 8, 0, 9, 32)

    monkeypatch.setattr("ship_ds.api.measure_prompt_following", measure)
    other = Ship(ship.model, ship.config, ship.digest, WRITTEN)
    with pytest.raises(KeyboardInterrupt):
        other.searching(InductionConfig(), no_log, [])
    for _ in range(2):
        assert not other.searching(InductionConfig(), no_log, []).ranks_in_prompt
    assert len(asked) == 2


def test_where_nothing_is_left_to_be_decided_following_is_not_measured(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ship_ds.api.measure_prompt_following", lambda model, seen: pytest.fail("measured")
    )
    written = Ship(ship.model, ship.config, ship.digest, WRITTEN)
    for of_run, told in (
        (written, InductionConfig(ranks_in_prompt=True, asks_task_llm=True)),
        (written, InductionConfig(method="direct", ranks_in_prompt=False)),
        # A grammar's search asks for no text by itself.
        (ship, InductionConfig(ranks_in_prompt=False)),
    ):
        assert of_run.searching(told, no_log, []) is told


def test_one_round_fewer_where_known_tasks_are_found_by_their_examples() -> None:
    """By itself: who sets a number of rounds, or of what a round does, has one."""
    config = InductionConfig()
    assert [config.suited_to(0.0, index).num_rounds for index in (False, True)] == [1, 0]
    assert config.suited_to(1.0, True).num_rounds == InductionConfig().num_rounds
    for change, rounds in (("num_neighbours=8", 1), ("num_splices=9", 1), ("num_rounds=2", 2)):
        assert config.with_overrides([change]).suited_to(0.0, True).num_rounds == rounds
    assert config.with_overrides(["num_known=5"]).suited_to(0.0, True).num_rounds == 0


def test_a_run_whose_data_are_gone_ranks_both_ways(ship: Ship) -> None:
    lines: list[str] = []
    data = {"kind": "files", "path": "/nowhere"}
    config = parse_config({**ship.config.model_dump(), "data": data}, "test")
    gone = Ship(ship.model, config, ship.digest, ship.known)
    for _ in range(2):
        assert gone.searching(InductionConfig(), lines.append).ranks_in_prompt
    assert len(lines) == 1 and "not where they were" in lines[0]


def test_without_tasks_of_two_examples_nothing_is_concluded(ship: Ship, tmp_path: Path) -> None:
    example = Example("1", "2")
    one = SplitTask(Task("t", "add 1", (example,)), (example,), ())
    assert measure_prompt_following(ship.model, [one]) is None
    other = Ship(ship.model, ship.config, ship.digest, ship.known)
    assert other.searching(InductionConfig(), print, [one]).ranks_in_prompt


def test_what_a_later_version_keeps_is_measured_again(tmp_path: Path) -> None:
    kept = Derived(tmp_path, "a", "float32")
    kept.keep_following(PromptFollowing(1.0, 2.0, 3, 4, 5))
    path = tmp_path / "derived" / "prompt_following.json"
    row = json.loads(path.read_text())
    for other in ({**row, "more": 1}, {"loss_bare": 1.0}):
        path.write_text(json.dumps(other))
        assert kept.following() is None


def test_the_task_llm_is_asked_without_the_decoder_too(ship: Ship) -> None:
    """Whose worth is what it adds to everything else."""
    bank = Bank.build(ship.model, WRITTEN)
    more = {"asks_decoder": False, "ranks_in_prompt": False, "num_finalists": 20}
    config = InductionConfig.model_validate({**QUICK, **more})
    found = induce_many(ship.model, bank, [EXAMPLES], config)[0]
    origins = {candidate.origin for candidate in found.candidates}
    assert {"asked", "known"} <= origins and not origins & {"beam", "sampled"}


def test_neighbours_of_a_known_candidate_are_others(ship: Ship) -> None:
    bank = Bank.build(ship.model, WRITTEN)
    config = InductionConfig(num_neighbours=2, num_refined=1, ranks_in_prompt=False)
    search = SearchState(tuple(EXAMPLES))
    try_proposals(ship.model, [search], [Proposal(search, WRITTEN[2], "known")], config)
    texts = [proposal.text for proposal in known_neighbours(bank, [search], config)]
    assert len(set(texts)) == 2 and WRITTEN[2] not in texts


def test_known_instructions_are_encoded_once_a_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Ship.from_run(bundle)
    path = bundle / "derived" / "known.safetensors"
    latent_CZ = first.bank.latent_CZ
    assert load_file(path)["mean"].equal(latent_CZ)
    again = Ship.from_run(bundle)
    monkeypatch.setattr(
        type(again.model), "_encoder_batches", lambda *given, **how: pytest.fail("encoded")
    )
    assert again.bank.latent_CZ.equal(latent_CZ) and again.bank_of(KNOWN) is again.bank
    assert Derived(bundle, "other weights", "float32").posteriors(KNOWN) is None
    assert Derived(bundle, again.digest, "bfloat16").posteriors(KNOWN) is None
    path.write_bytes(b"cut off")
    assert Derived(bundle, again.digest, "float32").posteriors(KNOWN) is None
    path.unlink()


def test_the_published_descents_are_a_preset_of_theirs() -> None:
    config = InductionConfig.of_preset("published", "indirect", max_new_tokens=9)
    assert (config.min_steps, config.indirect_lr, config.prior) == (100, 1e-2, 0)
    assert config.num_shown == 1 == config.num_restarts and config.max_new_tokens == 9
    assert (config.num_beams, config.num_samples, config.num_text_starts) == (1, 0, 0)
    assert InductionConfig.of_preset("published-refined", "direct").num_text_starts == 1
    assert InductionConfig.of_preset("ours", "direct") == InductionConfig(method="direct")
    with pytest.raises(UserError, match="--method union is not the authors'"):
        InductionConfig.of_preset("published", "union")


def test_a_descent_that_may_not_stop_yet_goes_on(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate of zero no loss ever falls, so the first step after `min_steps` is the last."""
    num_steps = 0
    step = torch.optim.Adam.step

    def counted(self: torch.optim.Adam) -> object:
        nonlocal num_steps
        num_steps += 1
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    start_CZ = ship.model.encode(["add 3"])
    for min_steps, wanted in ((0, 1), (6, 6)):
        num_steps = 0
        schedule = Schedule(9, 0.0, 0.0, min_steps, patience=1)
        descend_on_latent(ship.model, start_CZ, [""], [EXAMPLES], schedule)
        assert num_steps == wanted


@pytest.mark.parametrize("method", ["direct", "indirect"])
def test_a_descent_starts_again_from_the_induced_text(ship: Ship, method: str) -> None:
    config = InductionConfig.model_validate({"method": method, "steps": 4, "patience": 9})
    texts = ["add 3", "take the first 2"]
    searches = [SearchState(tuple(EXAMPLES)), SearchState(tuple(EXAMPLES[::-1]))]
    proposals = [Proposal(s, text, "known") for s, text in zip(searches, texts, strict=True)]
    try_proposals(ship.model, searches, proposals, config)
    own = ship.model.encode(texts)
    # Their lengths differ, and a row's result does not depend on the other's.
    both = descend_from_texts(ship.model, searches, config)
    alone = descend_from_texts(ship.model, searches[:1], config)
    torch.testing.assert_close(both[0].latent_Z, alone[0].latent_Z, rtol=1e-3, atol=1e-3)
    for result, start_Z, search in zip(both, own, searches, strict=True):
        assert result.search is search
        assert not result.latent_Z.equal(start_Z), "it moved"
        assert float((result.latent_Z - start_Z).norm()) < float((own[0] - own[1]).norm())
