"""The distance of low-rank updates, by which an adapter's weights lead to an instruction."""

import pytest
import torch

from ship_ds.model.adapters.lora import LoraAdapter


def test_weight_distance_is_that_of_the_whole_matrices() -> None:
    generator = torch.Generator().manual_seed(0)

    def lora(num_tasks: int, rank: int, scaling: float, paths: str) -> LoraAdapter:
        return LoraAdapter(
            {
                path: (
                    torch.randn(num_tasks, rank, 7, generator=generator),
                    torch.randn(num_tasks, 5, rank, generator=generator),
                )
                for path in paths
            },
            scaling,
        )

    made, aim = lora(3, 2, 0.5, "ab"), lora(1, 4, 2.0, "b")
    wholes = [made.factors[path][1] @ made.factors[path][0] * 0.5 for path in "ab"]
    target = aim.factors["b"][1] @ aim.factors["b"][0] * 2.0
    expected = (
        wholes[0].square().sum((1, 2)) + (wholes[1] - target).square().sum((1, 2))
    ) / target.square().sum()
    torch.testing.assert_close(made.distance(aim), expected)
    assert float(aim.distance(aim)) == pytest.approx(0, abs=1e-5)
