"""The graph over which a bank is searched."""

import pytest
import torch

from ship_ds.inference import latent_graph
from ship_ds.inference.latent_graph import LatentGraph, distances

ON_A_LINE = torch.tensor([[0.0], [1.0], [3.0], [9.0]])


def test_neighbours_are_nearest_first_and_begin_with_the_point_itself() -> None:
    assert LatentGraph(ON_A_LINE, 2).neighbours == [[0, 1], [1, 0], [2, 1], [3, 2]]
    assert LatentGraph(ON_A_LINE, 9).neighbours[3] == [3, 2, 1, 0]


def test_each_spread_point_is_the_farthest_from_those_before() -> None:
    graph = LatentGraph(ON_A_LINE, 2)
    assert graph.spread(3) == [0, 3, 2]
    assert graph.spread(9) == [0, 3, 2, 1]


def test_of_many_points_only_some_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    whole = LatentGraph(points, 4).neighbours
    monkeypatch.setattr(latent_graph, "_MOST_DISTANCES", 7 * 40)
    parts = list(distances(points, points))
    assert [len(part) for _, part in parts] == [7, 7, 7, 7, 7, 5]
    assert torch.allclose(torch.cat([part for _, part in parts]), torch.cdist(points, points))
    assert LatentGraph(points, 4).neighbours == whole
