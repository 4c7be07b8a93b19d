"""An amortised reader q(z | LoRA): from an adapter's weight updates to the latent behind them, in
one pass.

    z -> hypernetwork -> LoRA -> features -> MLP -> mean and log-variance of z

The hypernetwork makes pairs without end, so the reader is trained on nothing else: latents of known
instructions, between two of them, and of the prior. It sees what the update of each site does to a
few fixed random directions, seen from a few others:

    features of a site = left (update) right        (_NUM_PROBES, _NUM_PROBES)

which no change of factors touches (B A is what counts, not B and A). Noise on the features and
missing modules in training stand for adapters that were trained by somebody else.

Letters: C candidates, I inputs of a linear, J sites of a group, O outputs of a linear, R LoRA
rank, T tasks, U features of a group, Z latent size. The group is all sites.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ship_ds.console import Log
from ship_ds.inference.bank import Bank
from ship_ds.model import budget
from ship_ds.model.adapters.adapter import Adapter, Sites
from ship_ds.model.drawing import keyed_generator
from ship_ds.model.ship import ShipModel
from ship_ds.monitor.progress import ProgressLine

_NUM_PROBES = 6
"""Directions on each side of a site's update."""
_WIDTH = 256
_ROUNDS, _PAIRS, _STEPS, _BATCH, _KEPT = 24, 512, 40, 256, 8
"""Of training: rounds of new pairs and of steps, and how many rounds' pairs a step draws from."""
_MOST_SECONDS = 400.0
"""After which no further round begins: a large hypernetwork makes fewer pairs. Ranks that train a
reader each may then stop at different rounds, and their readers differ."""
_DROPPED = 0.2
"""How often a step leaves out all modules of one name, as adapters of fewer modules do."""


class LoraReader(nn.Module):
    """The MLP from features to q(z | LoRA), in units of the latents that it was trained on."""

    center_Z: Tensor
    spread_Z: Tensor

    def __init__(self, sites: Sites, latent_size: int) -> None:
        super().__init__()
        self.register_buffer("center_Z", torch.zeros(latent_size))
        self.register_buffer("spread_Z", torch.ones(latent_size))
        self.sites, self.latent_size = dict(sites), latent_size
        num_features = len(sites) * _NUM_PROBES**2 + 1
        self.layers = nn.Sequential(
            nn.Linear(num_features, _WIDTH),
            nn.GELU(),
            nn.Linear(_WIDTH, _WIDTH),
            nn.GELU(),
            nn.Linear(_WIDTH, 2 * latent_size),
        )

    def forward(self, features_TU: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of (z - center) / spread, (T, Z) each."""
        norm_T = features_TU.norm(dim=1, keepdim=True).clamp(min=1e-12)
        # The direction and the size apart: a LoRA that was trained longer is the same one, larger.
        unit_TU = features_TU / norm_T * features_TU.shape[1] ** 0.5
        seen_TU = torch.cat([unit_TU, norm_T.log()], 1)
        mean_TZ, log_variance_TZ = self.layers(seen_TU).chunk(2, 1)
        return mean_TZ, log_variance_TZ.clamp(-8, 4)

    @torch.no_grad()
    def read(self, adapter: Adapter) -> Tensor:
        """The mean of q(z | adapter), (T, Z)."""
        mean_TZ: Tensor = self(features(adapter, self.sites).to(self.center_Z))[0]
        return self.center_Z + self.spread_Z * mean_TZ


def features(adapter: Adapter, sites: Sites) -> Tensor:
    """What the updates of all sites do to fixed random directions, (T, U); zero where the adapter
    changes nothing."""
    made = []
    for path, (num_in, num_out) in sites.items():
        low = adapter.factors_at(path)
        if low is None:
            made.append(torch.zeros(adapter.num_tasks, _NUM_PROBES**2))
            continue
        right = _directions(path, "right", num_in).to(low.a_TRI)
        left = _directions(path, "left", num_out).to(low.b_TOR)
        seen = (left.T @ low.b_TOR) @ (low.a_TRI @ right)
        made.append(low.scaling * seen.flatten(1))
    device = next((one.device for one in made if one.is_cuda), made[0].device)
    return torch.cat([one.float().to(device) for one in made], 1)


def _directions(path: str, side: str, size: int) -> Tensor:
    """Columns of unit length on average, a function of the names alone."""
    generator = keyed_generator(f"lora reader {side} {path}")
    return torch.randn(size, _NUM_PROBES, generator=generator) / size**0.5


def can_read(model: ShipModel) -> bool:
    """Whether the run's adapters are updates of low rank."""
    adapter = model.adapt(model.prior.mean(1).to(model.device))
    return any(adapter.low_rank(path) is not None for path in model.task_llm.sites())


def train_reader(model: ShipModel, bank: Bank, log: Log, seed: int = 0) -> LoraReader:
    """A reader of this run's adapters: about a minute on two cores for the embedded base.

    Args:
        model: whose hypernetwork makes the pairs.
        bank: the known instructions, around whose latents most pairs are drawn.
        log: takes progress.
        seed: of every draw.
    """
    generator = torch.Generator().manual_seed(seed)
    sites = model.task_llm.sites()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = LoraReader(sites, model.config.latent_size)
    first_CZ = _latents(model, bank, _PAIRS, generator)
    reader.center_Z.copy_(first_CZ.mean(0))
    reader.spread_Z.copy_(first_CZ.std(0).clamp(min=1e-6))
    dropped = _modules_of_names(sites)
    optimiser = torch.optim.Adam(reader.parameters(), lr=1e-3)
    num_steps = _ROUNDS * _STEPS
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=num_steps)
    kept: list[tuple[Tensor, Tensor]] = []
    started = time.perf_counter()
    with ProgressLine("the reader of adapters", _ROUNDS, "round", log) as progress:
        progress.begin("training on pairs of its hypernetwork")
        for _ in range(_ROUNDS):
            if time.perf_counter() - started > _MOST_SECONDS:
                break
            kept = [*kept, _pairs(model, bank, _PAIRS, generator)][-_KEPT:]
            latents_CZ, features_CU = (torch.cat(one) for one in zip(*kept, strict=True))
            for _ in range(_STEPS):
                rows = torch.randint(len(latents_CZ), (_BATCH,), generator=generator)
                seen_CU = _as_if_foreign(features_CU[rows], dropped, generator)
                mean_CZ, log_variance_CZ = reader(seen_CU)
                aim_CZ = (latents_CZ[rows] - reader.center_Z) / reader.spread_Z
                miss_CZ = (aim_CZ - mean_CZ).square()
                loss = (miss_CZ * (-log_variance_CZ).exp() + log_variance_CZ).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
            progress.done(1)
    return reader.requires_grad_(False).eval()


@torch.no_grad()
def _pairs(
    model: ShipModel, bank: Bank, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Latents with the features of their adapters, on the CPU."""
    latent_CZ = _latents(model, bank, count, generator)
    at_once = max(1, budget.bytes_free(model.device) // model.adapter_bytes)
    sites = model.task_llm.sites()
    # In pieces of 64: more of them at once take memory and save no time.
    pieces = latent_CZ.to(model.device).split(min(64, at_once))
    made = [features(model.adapt(some_CZ), sites).cpu() for some_CZ in pieces]
    return latent_CZ, torch.cat(made)


def _latents(model: ShipModel, bank: Bank, count: int, generator: torch.Generator) -> Tensor:
    """Half from posteriors of known instructions, a quarter between two, a quarter of the prior;
    all of the prior where none is known."""
    prior_CZ = model.prior.sample(count, generator).cpu().float()
    if not len(bank):
        return prior_CZ
    known_CZ, spread_CZ = bank.latent_CZ.cpu().float(), (bank.log_variance_CZ.cpu() / 2).exp()
    first, second = torch.randint(len(bank), (2, count), generator=generator)
    noise_CZ = torch.randn(prior_CZ.shape, generator=generator)
    near_CZ = known_CZ[first] + 2 * spread_CZ[first] * noise_CZ
    between_CZ = near_CZ.lerp(known_CZ[second], torch.rand(count, 1, generator=generator))
    kind_C = torch.rand(count, 1, generator=generator)
    return torch.where(kind_C < 0.5, near_CZ, torch.where(kind_C < 0.75, between_CZ, prior_CZ))


def _modules_of_names(sites: Sites) -> Mapping[str, Tensor]:
    """For each module name, such as "q_proj", 0 at the features of its sites and 1 elsewhere."""
    names = [path.rpartition(".")[2] for path in sites]
    return {
        name: torch.tensor([float(one != name) for one in names]).repeat_interleave(_NUM_PROBES**2)
        for name in dict.fromkeys(names)
    }


def _as_if_foreign(
    features_CU: Tensor, without: Mapping[str, Tensor], generator: torch.Generator
) -> Tensor:
    """With noise of up to the size of each site's own features, and without the modules of some
    names: random updates look like that through random directions."""
    sites_CJU = features_CU.unflatten(1, (-1, _NUM_PROBES**2))
    size_CJ1 = sites_CJU.square().mean(2, keepdim=True).sqrt()
    share_C11 = torch.rand(len(features_CU), 1, 1, generator=generator).square()
    noise_CJU = torch.randn(sites_CJU.shape, generator=generator)
    noisy_CU = (sites_CJU + share_C11 * size_CJ1 * noise_CJU).flatten(1)
    masks: Sequence[Tensor] = list(without.values())
    drops_C = torch.rand(len(features_CU), len(masks), generator=generator) < _DROPPED
    # One name at least stays: an adapter without modules is none.
    drops_C[:, int(torch.randint(len(masks), (), generator=generator))] = False
    for place, mask_U in enumerate(masks):
        noisy_CU = torch.where(drops_C[:, place, None], noisy_CU * mask_U, noisy_CU)
    return noisy_CU
