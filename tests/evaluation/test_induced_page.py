"""The page of induced texts beside the true ones."""

from ship_ds.evaluation.cells import Cell, Measured
from ship_ds.evaluation.induced_page import NUM_DRAWN, page


def test_twenty_tasks_are_drawn_at_random_with_both_texts() -> None:
    rows = [
        {
            "task": f"t{i:02d}",
            "instruction": f"true {i}",
            "said": f"a | b\n{i}",
            "rouge_l": [i / 50],
            "execution_accuracy_encoder": [1.0, 0.0],
        }
        for i in range(50)
    ]
    measured = Measured({}, ["rouge_l", "execution_accuracy_encoder"], rows, 1.0, 0.0, 1)
    cell = Cell("ship", "induction", "unseen", 5)
    drawn = page(cell, measured, seed=0)
    assert drawn == page(cell, Measured({}, measured.metrics, rows[::-1], 1.0, 0.0, 1), seed=0)
    assert drawn != page(cell, measured, seed=1)
    lines = drawn.splitlines()
    assert "20 of 50 tasks, drawn at random with seed 0." in lines
    assert "| task | true | induced | ROUGE-L | execution, encoder |" in lines
    table = [
        line
        for line in lines
        if line.startswith("| t") and " true " in line and "induced" not in line
    ]
    assert len(table) == NUM_DRAWN == len(set(table))
    number = int(table[0][3:5])
    assert table[0] == (
        f"| t{number:02d} | true {number} | a \\| b {number} | {number / 50:.2f} | 0.50 |"
    )
