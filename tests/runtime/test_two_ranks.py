"""What two real gloo ranks under DeepSpeed do; one pair of processes measures it all
(worker.py)."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests import pooled_run
from tests.conftest import start
from tests.recorded_run import NUM_FIRST_STEPS, TWO_RANKS
from tests.runtime.configs import LONG, TOLERANCES
from tests.test_recorded_losses import Measured

pytestmark = pytest.mark.distributed


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    """What a pair of ranks found, and the folder of its runs."""
    worker = ["-m", "tests.runtime.worker", str(folder), *arguments]
    done = start(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *worker],
        timeout=1200,
    )
    assert done.returncode == 0, said_by_ranks(done.stderr)
    (folder / "stderr").write_text(done.stderr)
    return {**json.loads((folder / "found.json").read_text()), "folder": folder}


def said_by_ranks(stderr: str) -> str:
    """The last lines of each, since the launcher's own come after them."""
    lines = stderr.splitlines()
    first, second = (
        [line for line in lines if line.startswith(f"[rank{rank}]")][-40:] for rank in (0, 1)
    )
    return "\n".join([*first, *second, *lines[-20:]])


@pytest.fixture(scope="module")
def found(one_rank_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measured(tmp_path_factory.mktemp("ranks"), str(one_rank_run))


@pytest.fixture(scope="module")
def found_long(one_rank_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measured(tmp_path_factory.mktemp("ranks_long"), str(one_rank_run), "long")


@pytest.mark.parametrize("what", ["trainable", "optimiser", "nf4"])
def test_each_rank_holds_half(found: dict[str, Any], what: str) -> None:
    """Parameters, their optimiser state and the packed 4-bit weights; `quant_state` (absmax, code
    book) is not sharded."""
    for rank in found["each_rank_holds_half"]:
        held, everything = rank[what]
        assert held == pytest.approx(everything / 2, rel=0.1)
        assert rank["num_nf4"] == 28 and not rank["still whole"]


def test_a_step_asks_zero_3_for_no_weight_more_often_than_it_is_read(found: dict[str, Any]) -> None:
    """A hook of DeepSpeed's runs for each tensor that a module returned: 56 of 93 were those of the
    hypernetwork's heads, two a site."""
    for rank in found["each_rank_holds_half"]:
        work = rank["work of hooks"]
        # The whole's two are the encoder's mean and log-variance.
        assert work["forward"] > 20 and work["more than called"] == {"encoder": 1}
        assert not work["signatures"]


def gives_its_loss_in_pieces(ranks: Iterable[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["in pieces"] == pytest.approx(rank["whole"], rel=1e-5)
        assert rank["whole"][0] != rank["whole"][1]


def test_a_sharded_output_layer_gives_its_loss_in_pieces(found: dict[str, Any]) -> None:
    """It is let go within the piece, before the checkpoint looks at what was recomputed."""
    gives_its_loss_in_pieces(found["sharded_base_resumes"])
    assert all(set(rank["asked"]) == {3} for rank in found["sharded_base_resumes"])


@pytest.mark.soak
def test_so_it_does_where_roles_are_trained_whole(found_long: dict[str, Any]) -> None:
    gives_its_loss_in_pieces(found_long["loss_in_pieces_of_whole_roles"])


def test_projections_of_a_sharded_base_are_gathered_outside_their_blocks(
    found: dict[str, Any],
) -> None:
    """For the forward and for the backward pass, which DeepSpeed's hooks on a block know nothing
    of; so is what came into the encoder's blocks kept beside them."""
    for rank in found["keys_by_projections"]:
        for sharded, whole in zip(rank["always"], rank["never"], strict=True):
            assert sharded == pytest.approx(whole, rel=1e-6)
        assert rank["always"][0] != rank["always"][1]


def test_no_gathered_4_bit_weight_is_alive_after_the_forward(found: dict[str, Any]) -> None:
    """DeepSpeed lets them go one by one, and the backward pass gathers them again."""
    for rank in found["each_rank_holds_half"]:
        assert rank["alive after the forward"] == [28, 0]


def test_no_ranges_are_opened_for_a_profiler_of_gpus(found: dict[str, Any]) -> None:
    assert not any(rank["profiler ranges"] for rank in found["each_rank_holds_half"])


def test_steps_and_an_evaluation_leave_the_base_as_it_was(found: dict[str, Any]) -> None:
    for rank in found["each_rank_holds_half"]:
        assert rank["steps"] == 4 and rank["before"] == rank["after"]


def skips_what_is_not_finite(found: dict[str, Any], name: str) -> None:
    for rank in found[f"steps_of_{name}"]:
        assert rank["moved"] == [True, True, False, True]
        assert rank["bad"] == [0, 0, 1, 0] and rank["finite"]
        rows = [json.loads(line) for line in rank["bad rows"].splitlines()]
        assert len(rows) == 8 and {row["step"] for row in rows} == {2}
        assert all(row["wording"] and row["answered"] for row in rows)
    # The run then went on from before that step, which it takes again.
    path = found["folder"] / f"steps_of_{name}" / "run" / "bad_steps.jsonl"
    assert not path.read_text()


@pytest.mark.parametrize("name", TOLERANCES)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    found: dict[str, Any], name: str
) -> None:
    skips_what_is_not_finite(found, name)


@pytest.mark.soak
@pytest.mark.parametrize("name", LONG)
def test_so_it_is_under_the_other_files(found_long: dict[str, Any], name: str) -> None:
    skips_what_is_not_finite(found_long, name)


@pytest.mark.parametrize("stage", ["zero3_shard_all", "zero2", "zero1", "sub-groups"])
def test_another_zero_stage_goes_on_with_the_same_losses(found: dict[str, Any], stage: str) -> None:
    for rank in found["another_layout"]:
        assert rank[stage] == pytest.approx(rank["zero3"], rel=1e-6)


@pytest.mark.parametrize(
    ("stage", "tolerance"), [("zero2", 0), ("zero3", 1e-6), ("zero2_bf16", 2e-2)]
)
def test_a_checkpoint_of_zero2_goes_on(found: dict[str, Any], stage: str, tolerance: float) -> None:
    for rank in found["zero2_goes_on"]:
        assert rank["state is as saved"] is True
        assert rank[stage] == pytest.approx(rank["whole"], rel=tolerance, abs=0)
        assert rank["betas"] == [0.8, 0.95]
        assert rank[f"{stage} rates"] == pytest.approx(0.1)
        assert sum(rank["turns"].values()) == rank["rules"] and {"4"} < set(rank["turns"]), (
            "small families come oftener"
        )


def test_a_resume_with_sharded_4_bit_bases_and_dropout_repeats_the_losses_bit_for_bit(
    found: dict[str, Any],
) -> None:
    first, second = found["sharded_base_resumes"]
    assert first["step"] == 1
    assert first["first"][1] == first["resumed"] == second["resumed"]
    assert first["mask"] != second["mask"], "each rank has a dropout mask of its own"


@pytest.mark.soak
def test_a_checkpoint_goes_on_in_bf16_and_in_fp32_again(found_long: dict[str, Any]) -> None:
    for rank in found_long["precision_moves"]:
        moves = [name for name in rank if " to " in name]
        assert len(moves) == 8
        for name in moves:
            is_as_saved, losses = rank[name]
            assert is_as_saved is True, name
            assert losses == pytest.approx(rank[name.split(" to ")[0]], rel=2e-2), name


@pytest.mark.soak
@pytest.mark.parametrize("place", ["zero2", "sharded"])
def test_one_base_for_all_roles_takes_the_steps_of_three(
    found_long: dict[str, Any], place: str
) -> None:
    """To the bit."""
    for rank in found_long["shared_backbone"]:
        three, one = rank[f"{place}, separate"], rank[f"{place}, shared"]
        assert one == three and one[0] != one[1]


@pytest.mark.soak
def test_a_shared_base_beside_zero3_is_never_gathered(found_long: dict[str, Any]) -> None:
    """Its bits are those of ZeRO-2, where frozen weights are whole as well; three copies, two of
    them gathered, round the first gradient otherwise."""
    for rank in found_long["shared_backbone"]:
        one = rank["zero3, shared"]
        assert one == rank["zero2, shared"]
        assert one[0] == rank["zero3, separate"][0]
        assert one[1] == pytest.approx(rank["zero3, separate"][1], rel=1e-7)


@pytest.mark.soak
@pytest.mark.parametrize("place", ["zero2", "zero3", "sharded"])
def test_a_checkpoint_goes_on_with_other_backbones_and_checkpointing(
    found_long: dict[str, Any], place: str
) -> None:
    """Every role recomputing its blocks, which the run that wrote it did not."""
    for rank in found_long["shared_backbone"]:
        expected = rank[f"{place}, shared"][1]
        assert rank[f"{place}, as separate"] == rank[f"{place}, as shared"] == expected


@pytest.mark.soak
def test_so_it_does_in_16_bits(found_long: dict[str, Any]) -> None:
    for rank in found_long["recipe_of_8b_in_16_bits"]:
        assert rank["zero2_bf16, together"] == pytest.approx(rank["zero2_bf16, apart"], rel=2e-2)
        passes = [rank[f"zero2_bf16, {way}, passes"] for way in ("together", "apart")]
        assert passes == [4, 6]


def test_lora_8b_trains_in_one_pass_over_the_base_as_in_two(found: dict[str, Any]) -> None:
    for rank in found["recipe_of_8b"]:
        assert rank["zero2, together"] == pytest.approx(rank["zero2, apart"], rel=1e-5)
        # Numbers of 16 bits.
        assert rank["zero2_bf16, together"] == pytest.approx(rank["zero2, together"], rel=2e-2)
        # ZeRO-3 gathers the decoder's own weights in a pass of its own.
        assert rank["zero3, together"] == pytest.approx(rank["zero2, apart"], rel=1e-6)
        passes = {name: rank[f"{name}, passes"] for name in rank if "passes" not in name}
        assert passes == dict.fromkeys(passes, 6) | {
            "zero2, together": 4,
            "zero2_bf16, together": 4,
        }


def accumulates(found: dict[str, Any], stage: str) -> None:
    """The third loss has two updates behind it."""
    for rank, reference in zip(found["accumulation"], found["another_layout"], strict=True):
        assert rank[stage] == pytest.approx((reference["first"] + reference["zero3"])[:3], rel=1e-5)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_micro_batches_change_nothing_but_rounding(found: dict[str, Any], stage: str) -> None:
    accumulates(found, stage)


@pytest.mark.soak
def test_nor_do_they_under_zero1(found_long: dict[str, Any]) -> None:
    accumulates(found_long, "zero1")


@pytest.fixture
def recorded(found: dict[str, Any]) -> Measured:
    return Measured(**found["recorded"][0])


def test_they_repeat_recorded_steps_to_the_bit(recorded: Measured) -> None:
    recorded.check_to_the_bit(TWO_RANKS, NUM_FIRST_STEPS)


def test_they_take_the_steps_of_0_1_0(recorded: Measured) -> None:
    recorded.check_within_rounding(TWO_RANKS, NUM_FIRST_STEPS)


def takes_the_steps_of_one_rank(pooled: list[dict[str, Any]], one_rank: Path) -> None:
    for one, two in zip(pooled_run.losses(one_rank), pooled[0]["losses"], strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_they_take_the_steps_of_one_rank_with_learned_queries(
    found: dict[str, Any], pooled_run_folder: Path
) -> None:
    """Which is compiled, and they are not: a pair takes most of a minute to compile."""
    takes_the_steps_of_one_rank(found["pooled"], pooled_run_folder)


@pytest.mark.soak
def test_so_they_do_compiled(found_long: dict[str, Any], pooled_run_folder: Path) -> None:
    takes_the_steps_of_one_rank(found_long["pooled_compiled"], pooled_run_folder)


def test_too_many_bad_steps_in_a_row_stop_the_run_with_one_line(found: dict[str, Any]) -> None:
    for rank in found["too_many_bad_steps"]:
        assert rank["step"] == 3 and rank["said"].startswith(
            "training: not finite in 2 steps in a row; start with a lower optimiser.lr in another "
            "run.folder"
        )


def test_the_published_recipes_train_and_the_second_starts_from_the_first(
    found: dict[str, Any],
) -> None:
    for rank in found["published_recipes"]:
        assert math.isfinite(rank["pretrain"]) and math.isfinite(rank["in-domain"])
        assert rank["pretrain starts at"] != rank["pretrain ends at"] == rank["in-domain starts at"]
        assert len(rank["pretrain answers"]) == len(rank["in-domain answers"]) == 1


def test_one_rank_goes_on_as_two(
    found: dict[str, Any], one_rank_run: Path, rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    whole = [row["loss/total"] for row in rows(one_rank_run)[8:]]
    for rank in found["one_rank_goes_on_as_two"]:
        assert rank["step"] == 8 and rank["losses"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.soak
def test_each_task_is_asked_once_over_all_ranks(found_long: dict[str, Any]) -> None:
    """Of the model as ZeRO-3 holds it, with the answers that one rank gives of the bundle."""
    both = found_long["each_task_is_asked_once"]
    together = sorted(task for rank in both for task in rank["in evaluation"])
    assert together == sorted(both[0]["tasks"]) and len(together) == 6
    assert all(0 < len(rank["in evaluation"]) < 6 for rank in both)
    for rank in both:
        assert rank["together"] == rank["alone"] and rank["nearest"] == both[0]["nearest"]
        assert len({str(answers) for answers in rank["together"]}) > 2
        assert rank["nearest"]["seen"]["n_tasks"] == 3
    times = Counter(task for rank in both for task in rank["in report"])
    # seen rules are asked once more in their held-out paraphrase
    assert times == {task: 2 if task in both[0]["seen tasks"] else 1 for task in times}
    assert times.keys() == set(both[0]["all tasks"])
    assert all(len(rank["in report"]) < times.total() for rank in both)


def test_an_evaluation_in_the_middle_changes_nothing_after_it(found: dict[str, Any]) -> None:
    looked, quiet = found["evaluation_in_the_middle"], found["another_layout"]
    for with_looks, without in zip(looked, quiet, strict=True):
        assert with_looks["looking"] == without["first"] + without["zero3"]
        assert len(with_looks["looking"]) == 4


def test_a_rank_that_cannot_answer_its_share_is_told_of_by_all(found: dict[str, Any]) -> None:
    assert [rank["raised"] for rank in found["a_rank_cannot_answer"]] == [
        "RankError: rank 1: OutOfMemoryError: CUDA out of memory.",
        "OutOfMemoryError: CUDA out of memory.",
    ]


def test_a_baseline_that_cannot_be_trained_is_told_of_by_all(found: dict[str, Any]) -> None:
    """Rank 1 waits meanwhile, and has to hear of it: of a diverged loss, of a full disk."""
    assert [rank["raised"] for rank in found["a_baseline_cannot_be_trained"]] == [
        ["ValueError: the loss is not finite", "UserError: no room"],
        [
            "RankError: rank 0: ValueError: the loss is not finite",
            "UserError: rank 0: UserError: no room",
        ],
    ]


def test_one_rank_of_a_node_fetches_the_wheel_that_all_read(found: dict[str, Any]) -> None:
    first, second = found["a_wheel_is_fetched_once"]
    assert (first["opened"], second["opened"]) == ([0], [])
    assert first["text"] == second["text"] == "fetched by rank 0"
    assert not first["is left"] and not second["is left"]
    assert first["said"] == "pip cannot fetch it"
    assert second["said"] == "rank 0: UserError: pip cannot fetch it"


def test_a_run_starts_from_another_runs_bundle(found: dict[str, Any]) -> None:
    started = found["starts_from_a_bundle"][0]
    assert (
        started["step"] == 0 and started["same names"] and started["same"] and all(started["same"])
    )


def test_another_learning_rate_is_refused_by_name(found: dict[str, Any]) -> None:
    assert all("optimiser.lr was 0.001 and is 0.5 now" in rank["lr"] for rank in found["refused"])


def test_a_checkpoint_whose_moments_are_elsewhere_is_refused(found: dict[str, Any]) -> None:
    assert all(
        "kept Adam's moments beside it on NVMe: start anew" in rank["nvme"]
        for rank in found["refused"]
    )


def test_starting_from_a_folder_without_a_bundle_is_refused(found: dict[str, Any]) -> None:
    assert all("no bundle here" in rank["bundle"] for rank in found["refused"])


def test_a_run_whose_steps_were_all_skipped_goes_on(found: dict[str, Any]) -> None:
    for rank in found["nothing_learnt_yet"]:
        assert rank["bad"] == 1
        for stage in ("zero3", "zero2"):
            assert (
                rank[stage]["step"] == 1
                and rank[stage]["whole"] == rank["whole"]
                and math.isfinite(rank[stage]["loss"])
            )


def test_a_disk_without_room_stops_every_rank_with_the_same_line(found: dict[str, Any]) -> None:
    for rank in found["full_disk"]:
        assert (
            rank["needed"] in rank["said"]
            and "the checkpoint of step 2 was not written" in rank["said"]
        )
        assert rank["left"] == ["latest", "step-00000001"]


def test_an_evaluation_cut_short_is_made_up_for(found: dict[str, Any]) -> None:
    for rank in found["evaluation_is_cut_short"]:
        assert rank == {"preempted_at": 2, "owed": True, "step": 4}
    folder = found["folder"] / "evaluation_is_cut_short"
    assert [
        json.loads(line)["step"] for line in (folder / "evaluations.jsonl").read_text().splitlines()
    ] == [2, 4]


def trains_and_goes_on(
    steps: list[dict[str, Any]], references: list[dict[str, Any]], tolerance: float
) -> None:
    for rank, reference in zip(steps, references, strict=True):
        assert rank["losses"][:2] == pytest.approx(reference["first"], rel=tolerance, abs=0)
        assert rank["resumed"] == rank["losses"][1]


@pytest.mark.parametrize("name", TOLERANCES)
def test_a_config_trains_two_steps_and_repeats_the_second_from_a_checkpoint(
    found: dict[str, Any], name: str
) -> None:
    """Beside fp32 ZeRO-3. zero1, zero2 and zero3_shard_all train above."""
    trains_and_goes_on(found[f"steps_of_{name}"], found["another_layout"], TOLERANCES[name])


@pytest.mark.soak
@pytest.mark.parametrize("name", LONG)
def test_so_do_the_other_files(found_long: dict[str, Any], name: str) -> None:
    trains_and_goes_on(found_long[f"steps_of_{name}"], found_long["another_layout"], LONG[name])


def test_each_rank_reads_its_own_shard_where_the_parameters_lie_as_they_did(
    found: dict[str, Any],
) -> None:
    for rank in found["another_layout"]:
        assert rank["zero3_shard_all read"] == "1 ShardOfRank"
        groups, kind = rank["sub-groups read"].split()
        assert int(groups) > 3 and kind == "WholeParameters"
