"""The priors' formulas: against closed forms, large samples, grids and autograd's Jacobian."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    kl_divergence,
)

from ship_ds.config import FlowPriorConfig, MixturePriorConfig, StandardNormalConfig
from ship_ds.errors import UserError
from ship_ds.model.flow_prior import FlowPrior
from ship_ds.model.mixture_prior import MixturePrior
from ship_ds.model.priors import Prior, StandardNormal


def mixture(num_components: int, latent_size: int) -> MixturePrior:
    """With components that differ in everything."""
    torch.manual_seed(3)
    prior = MixturePrior(MixturePriorConfig(num_components=num_components), latent_size)
    with torch.no_grad():
        prior.log_variances.weight.normal_(std=0.7)
        prior.log_weights.weight.normal_()
    return prior


def in_torch(prior: MixturePrior) -> MixtureSameFamily:
    """The same by torch's own classes."""
    deviations = (prior.log_variances.weight / 2).exp()
    return MixtureSameFamily(
        Categorical(logits=prior.log_weights.weight[:, 0]),
        Independent(Normal(prior.means.weight, deviations), 1),
    )


def flow(latent_size: int, num_layers: int = 3) -> FlowPrior:
    """No identity any more: scales and shifts that matter."""
    torch.manual_seed(5)
    prior = FlowPrior(FlowPriorConfig(num_layers=num_layers, width=16), latent_size)
    with torch.no_grad():
        for coupling in prior.couplings:
            coupling.layers[2].weight.normal_(std=0.15)
            coupling.layers[2].bias.normal_(std=0.2)
    return prior


def posteriors(count: int, latent_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean_TZ, log_variance_TZ = torch.randn(2, count, latent_size, generator=generator)
    return mean_TZ, log_variance_TZ - 1


@torch.no_grad()
def kl_by_sampling(
    prior: Prior, mean_TZ: Tensor, log_variance_TZ: Tensor, count: int = 200_000
) -> tuple[Tensor, Tensor]:
    """E_q[log q - log p] of each posterior, and its standard error."""
    torch.manual_seed(11)
    q = Independent(Normal(mean_TZ, (log_variance_TZ / 2).exp()), 1)
    latent = q.sample((count,))
    gaps = q.log_prob(latent) - prior.log_density(latent.flatten(0, 1)).view(count, -1)
    return gaps.mean(0), gaps.std(0) / math.sqrt(count)


def test_one_component_is_a_gaussian_by_dimension() -> None:
    prior = mixture(1, 5)
    with torch.no_grad():
        prior.means.weight.normal_()
    mean_TZ, log_variance_TZ = posteriors(4, 5)
    gaussian = Normal(prior.means.weight[0], (prior.log_variances.weight[0] / 2).exp())
    expected = kl_divergence(Normal(mean_TZ, (log_variance_TZ / 2).exp()), gaussian)
    torch.testing.assert_close(prior.kl(mean_TZ, log_variance_TZ, mean_TZ), expected)
    torch.testing.assert_close(prior.log_density(mean_TZ), gaussian.log_prob(mean_TZ).sum(1))


def test_one_component_starts_as_the_standard_normal() -> None:
    prior = MixturePrior(MixturePriorConfig(num_components=1), 6)
    plain = StandardNormal(StandardNormalConfig(), 6)
    given = posteriors(4, 6)
    torch.testing.assert_close(prior.kl(*given, given[0]), plain.kl(*given, given[0]))
    torch.testing.assert_close(prior.log_density(given[0]), plain.log_density(given[0]))


def test_many_equal_components_are_one() -> None:
    """However the shares fall."""
    prior, one = mixture(4, 3), mixture(1, 3)
    with torch.no_grad():
        for name in ("means", "log_variances"):
            getattr(prior, name).weight.copy_(getattr(one, name).weight.expand(4, -1))
    given = posteriors(5, 3)
    torch.testing.assert_close(prior.kl(*given, given[0]), one.kl(*given, given[0]))


def test_the_mixtures_kl_is_its_formula_and_never_below_the_kl() -> None:
    """-log sum_c w_c exp(-KL_c) in plain Python; above what a large sample says; near it where the
    posterior is narrow and the components are apart."""
    prior = mixture(3, 2)
    mean_TZ, log_variance_TZ = posteriors(6, 2)
    kl_T = prior.kl(mean_TZ, log_variance_TZ, mean_TZ).sum(1).detach()
    weights = prior.log_weights.weight[:, 0].softmax(0).tolist()
    for row in range(6):
        total = 0.0
        for component, weight in enumerate(weights):
            own = 0.0
            for mean, log_variance, to_mean, to_log_variance in zip(
                mean_TZ[row].tolist(),
                log_variance_TZ[row].tolist(),
                prior.means.weight[component].tolist(),
                prior.log_variances.weight[component].tolist(),
                strict=True,
            ):
                ratio = math.exp(log_variance - to_log_variance)
                square = (mean - to_mean) ** 2 / math.exp(to_log_variance)
                own += 0.5 * (ratio + square - 1 - math.log(ratio))
            total += weight * math.exp(-own)
        assert float(kl_T[row]) == pytest.approx(-math.log(total), rel=1e-5)
    sampled_T, error_T = kl_by_sampling(prior, mean_TZ, log_variance_TZ)
    assert bool((kl_T > sampled_T - 4 * error_T).all()) and float((kl_T - sampled_T).max()) > 0.01

    with torch.no_grad():
        prior.means.weight.mul_(20)
    inside = (prior.means.weight + 0.3, torch.full((3, 2), -2.0))
    sampled_T, error_T = kl_by_sampling(prior, *inside)
    gap_T = prior.kl(*inside, inside[0]).sum(1) - sampled_T
    assert bool((gap_T.abs() < 4 * error_T + 1e-4).all())


def test_the_mixtures_density_is_torchs() -> None:
    prior = mixture(4, 3)
    latent_CZ = torch.randn(50, 3) * 2
    expected = in_torch(prior).log_prob(latent_CZ)
    torch.testing.assert_close(prior.log_density(latent_CZ), expected)


@pytest.mark.parametrize("make", [lambda: mixture(3, 2), lambda: flow(2)])
def test_samples_are_of_the_density(make: Callable[[], Prior]) -> None:
    """Shares of samples in cells are the density's sums over a grid, which has nearly all of it."""
    prior = make()
    side = torch.linspace(-9, 9, 1441)
    step = float(side[1] - side[0])
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = (prior.log_density(grid).exp() * step**2).view(1441, 1441)
    draws = prior.sample(100_000, torch.Generator().manual_seed(0))
    assert draws.shape == (100_000, 2) and not draws.requires_grad
    again = prior.sample(100_000, torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    assert float(mass.sum()) > 0.98
    cells = (((-9, -9), (9, 9)), ((-1, -1), (0, 0)), ((0, -1), (1, 1)), ((-2, 0), (0, 2)))
    for low, high in cells:
        inside = [(side >= a) & (side < b) for a, b in zip(low, high, strict=True)]
        expected = float(mass[inside[0]][:, inside[1]].sum())
        found = ((draws >= torch.tensor(low)) & (draws < torch.tensor(high))).all(1)
        assert float(found.float().mean()) == pytest.approx(expected, abs=0.005), (low, high)


def test_the_mixtures_mean_is_that_of_samples() -> None:
    prior = mixture(3, 4)
    draws = prior.sample(200_000, torch.Generator().manual_seed(1))
    assert prior.mean(2).shape == (2, 4)
    torch.testing.assert_close(prior.mean(1)[0], draws.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(prior.mean(1)[0], in_torch(prior).mean.detach())


def test_a_fresh_flow_is_the_standard_normal() -> None:
    prior = FlowPrior(FlowPriorConfig(), 7)
    plain = StandardNormal(StandardNormalConfig(), 7)
    latent_CZ = torch.randn(9, 7)
    torch.testing.assert_close(prior.log_density(latent_CZ), plain.log_density(latent_CZ))
    drawn = [one.sample(3, torch.Generator().manual_seed(2)) for one in (prior, plain)]
    assert torch.equal(*drawn) and torch.equal(prior.mean(2), torch.zeros(2, 7))


@pytest.mark.parametrize("num_layers", [1, 3, 4])
def test_a_flow_is_inverted_and_its_determinant_is_autograds(num_layers: int) -> None:
    prior = flow(5, num_layers)
    latent_CZ = torch.randn(6, 5)
    base_CZ, log_determinant_C = prior.to_base(latent_CZ)
    assert float((base_CZ - latent_CZ).detach().abs().max()) > 0.1
    torch.testing.assert_close(prior.from_base(base_CZ), latent_CZ)
    for row in range(6):
        jacobian = torch.autograd.functional.jacobian(
            lambda latent: prior.to_base(latent[None])[0][0], latent_CZ[row]
        )
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_determinant_C[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_flows_kl_is_right_on_average() -> None:
    """The mean of many estimates is the KL of a large sample; of a fresh flow, the closed form."""
    for prior in (flow(4), FlowPrior(FlowPriorConfig(), 4)):
        mean_TZ, log_variance_TZ = posteriors(3, 4)
        sampled_T, error_T = kl_by_sampling(prior, mean_TZ, log_variance_TZ)
        torch.manual_seed(4)
        many = [one.repeat(100_000, 1) for one in (mean_TZ, log_variance_TZ)]
        latent = many[0] + (many[1] / 2).exp() * torch.randn_like(many[0])
        estimates = prior.kl(*many, latent).sum(1).view(100_000, 3)
        error_T = (error_T**2 + estimates.var(0) / 100_000).sqrt()
        assert bool(((estimates.mean(0) - sampled_T).abs() < 4 * error_T).all())
    closed_T = StandardNormal(StandardNormalConfig(), 4).kl(mean_TZ, log_variance_TZ, mean_TZ)
    assert bool(((estimates.mean(0) - closed_T.sum(1)).abs() < 4 * error_T).all())


def test_the_flows_kl_has_the_gradient_of_the_closed_form_on_average() -> None:
    """Through mean and log-variance, by way of the sample and of the entropy."""
    torch.manual_seed(6)
    mean, log_variance = (one.requires_grad_() for one in posteriors(1, 4))
    noise = torch.randn(200_000, 4)
    latent = mean + (log_variance / 2).exp() * noise
    many = [one.expand(200_000, -1) for one in (mean, log_variance)]
    estimate = FlowPrior(FlowPriorConfig(), 4).kl(*many, latent).sum(1).mean()
    closed = StandardNormal(StandardNormalConfig(), 4).kl(mean, log_variance, mean).sum()
    for found, expected in zip(
        torch.autograd.grad(estimate, [mean, log_variance]),
        torch.autograd.grad(closed, [mean, log_variance]),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("make", [lambda: mixture(3, 6), lambda: flow(6)])
def test_everything_is_fp32_and_every_parameter_learns(make: Callable[[], Prior]) -> None:
    """In an engine of bf16 too."""
    prior = make().to(torch.bfloat16)
    mean_TZ, log_variance_TZ = (one.bfloat16() for one in posteriors(3, 6))
    kl_TZ = prior.kl(mean_TZ, log_variance_TZ, mean_TZ)
    assert kl_TZ.shape == (3, 6) and kl_TZ.dtype == torch.float32
    assert prior.log_density(mean_TZ).dtype == prior.mean(1).dtype == torch.float32
    assert prior.sample(2, torch.Generator().manual_seed(0)).dtype == torch.float32
    kl_TZ.sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in prior.parameters())


def test_a_flow_needs_two_halves() -> None:
    with pytest.raises(UserError, match=r"model.prior.kind=flow needs model.latent_size of at"):
        FlowPrior(FlowPriorConfig(), 1)
