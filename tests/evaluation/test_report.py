"""Differences of methods over the tasks that both were asked."""

import pytest

from ship_ds.evaluation.cells import Cell, Measured
from ship_ds.evaluation.report import Provenance, build, markdown


def measured(values: dict[str, list[float]], metric: str = "exact_match") -> Measured:
    rows = [
        {"task": task, "kind": "", "instruction": f"do {task}", metric: row, "said": ""}
        for task, row in values.items()
    ]
    return Measured({}, [metric], rows, 1.0, 0.0, 1)


def provenance(*names: str) -> Provenance:
    about = {"instruction_in_query": False, "sees_labels": False}
    return Provenance(
        "run",
        "ship-ds evaluate",
        {"torch": "2"},
        {"num_shown": [5]},
        {name: {**about, "about": f"what {name} is"} for name in names},
        5,
    )


@pytest.fixture
def cells() -> dict[Cell, Measured]:
    return {
        Cell("ship", "deduction", "unseen", None): measured(
            {"a": [1, 1], "b": [1, 0], "c": [1, 1], "d": [0, 0]}
        ),
        Cell("tagi", "deduction", "unseen", None): measured(
            {"b": [0, 0], "c": [1, 0], "a": [1, 1]}
        ),
        Cell("ship", "induction", "unseen", 5): measured({"a": [1]}, "rouge_l"),
        Cell("ship", "induction", "unseen", 1): measured({"a": [0]}, "rouge_l"),
        Cell("itd", "induction", "unseen", 5): measured({"a": [0.25]}, "rouge_l"),
        Cell("itd", "induction", "unseen", 1): measured({"a": [0.75]}, "rouge_l"),
    }


def test_difference_is_over_the_tasks_that_both_have(cells: dict[Cell, Measured]) -> None:
    """Task by task: a 1 - 1, b 1/2 - 0, c 1 - 1/2; d has no partner."""
    paired = build(cells, provenance("ship", "tagi", "itd"))["paired"]
    cell = paired["tagi"]["deduction"]["unseen"]
    assert cell["exact_match"]["value"] == pytest.approx(1 / 3, abs=1e-4)
    low, high = cell["exact_match"]["ci95"]
    assert 0 <= low < 1 / 3 < high <= 0.5
    assert cell["n_tasks"] == 3
    assert "ship" not in paired


def test_difference_is_of_the_reports_own_number_of_examples(
    cells: dict[Cell, Measured],
) -> None:
    paired = build(cells, provenance("ship", "tagi", "itd"))["paired"]
    assert paired["itd"]["induction"]["unseen"]["rouge_l"]["value"] == 0.75


def test_page_says_what_each_row_is_and_shows_the_differences(
    cells: dict[Cell, Measured],
) -> None:
    report = build(cells, provenance("ship", "tagi", "itd"))
    page = markdown(report, cells)
    assert "- tagi: what tagi is." in page
    assert "SHIP minus each, over the same tasks:" in page
    assert "| tagi | no | 0.333 [0.000, 0.500] |" in page


def test_rows_of_fewer_tasks_say_so(cells: dict[Cell, Measured]) -> None:
    page = markdown(build(cells, provenance("ship", "tagi", "itd")), cells)
    assert "unseen, n=4: exact match" in page
    assert "(n=3)" in page


def test_without_ship_there_is_nothing_to_compare(cells: dict[Cell, Measured]) -> None:
    others = {cell: scores for cell, scores in cells.items() if cell.method != "ship"}
    report = build(others, provenance("tagi", "itd"))
    assert report["paired"] == {} and "SHIP minus" not in markdown(report, others)


def test_a_part_of_other_numbers_of_shown_examples_alone_is_in_the_page(
    cells: dict[Cell, Measured],
) -> None:
    """As when a method was measured with `--num-shown 1` and another one with 5 afterwards."""
    del cells[Cell("itd", "induction", "unseen", 5)]
    report = build(cells, provenance("ship", "tagi", "itd"))
    assert report["methods"]["itd"]["induction"]["unseen"].keys() == {"by_num_shown"}
    assert "itd" in markdown(report, cells)
