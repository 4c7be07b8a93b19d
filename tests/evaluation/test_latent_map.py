"""Latents for the t-SNE figures, of a real run."""

import json
from functools import partial
from pathlib import Path

import pytest

from ship_ds.evaluation import evaluate, figures, latent_map
from ship_ds.evaluation.evaluate import write_latent_map
from ship_ds.evaluation.harness import Run
from ship_ds.evaluation.latent_map import NUM_TASKS
from ship_ds.files import write_json
from ship_ds.inference.config import InductionConfig
from tests.evaluation.test_harness import fresh

KINDS = ("encoded", "trained", "re-encoded")


def test_a_run_is_mapped_once_and_drawn(
    one_rank_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both maps: of eight tasks by where a latent is from, of all by their category. A file of an
    earlier version, which has one of the two, is made again."""
    monkeypatch.setattr(latent_map, "InductionConfig", partial(InductionConfig, steps=2))
    run, said = fresh(one_rank_run, tmp_path / "run"), list[str]()
    write_latent_map(run, said.append)
    path = run / "evaluation" / "latents.json"
    written = json.loads(path.read_text())
    opened = Run.open(run, said.append)
    splits = opened.splits
    assert {point["kind"] for point in written["points"]} == {*KINDS}
    assert len({point["instruction"] for point in written["points"]}) == NUM_TASKS
    assert [task["part"] for task in written["tasks"]] == [
        *["seen"] * len(splits.seen),
        *["dev"] * len(splits.dev),
        *["unseen"] * len(splits.unseen),
    ]
    first = splits.dev[0].task
    of_first = written["tasks"][len(splits.seen)]
    assert of_first["category"] == first.family != ""
    assert of_first["latent"] == pytest.approx(
        opened.ship.model.encode([first.instruction])[0].tolist(), abs=1e-4
    )
    for name in ("latents", "categories"):
        drawn = figures.save(name, figures.FIGURES[name], [run], tmp_path)
        assert drawn.stat().st_size > 10_000
    said.clear()
    write_latent_map(run, said.append)
    assert not said
    write_json(path, {name: value for name, value in written.items() if name != "tasks"})
    monkeypatch.setattr(evaluate, "latent_map", lambda ship, splits: written)
    write_latent_map(run, said.append)
    assert said and json.loads(path.read_text()) == written
