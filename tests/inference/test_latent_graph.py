"""The graph over which a bank is searched."""

import torch

from ship_ds.inference.latent_graph import LatentGraph

ON_A_LINE = torch.tensor([[0.0], [1.0], [3.0], [9.0]])


def test_neighbours_are_nearest_first_and_begin_with_the_point_itself() -> None:
    assert LatentGraph(ON_A_LINE, 2).neighbours == [[0, 1], [1, 0], [2, 1], [3, 2]]
    assert LatentGraph(ON_A_LINE, 9).neighbours[3] == [3, 2, 1, 0]


def test_each_spread_point_is_the_farthest_from_those_before() -> None:
    graph = LatentGraph(ON_A_LINE, 2)
    assert graph.spread(3) == [0, 3, 2]
    assert graph.spread(9) == [0, 3, 2, 1]
