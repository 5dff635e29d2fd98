"""Noise levels, and what turns a network's output into a clean image: two parameterisations.

Both noise an image alike, x = x0 + sigma * eps, and differ in three things: which sigma training
draws, how the network is wrapped, D(x, sigma, y) = c_skip x + c_out F(c_in x, c_noise, y), and how
the squared error of D is weighted.

"edm" (Karras et al. 2022, table 1) crowds training where the image is decided and gives the network
inputs and targets of unit variance. "eps" is DDPM's noise prediction (Ho et al. 2020) in the same
terms: x_t = x / sqrt(1 + sigma^2), alpha_bar_t = 1 / (1 + sigma^2), and eps = (x - D) / sigma.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

__all__ = ["EdmNoise", "EpsNoise", "Scalings", "make_noise"]


class Scalings(NamedTuple):
    """Factors of D = c_skip x + c_out F(c_in x, c_noise), each float (B,)."""

    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor


@dataclass(frozen=True)
class EdmNoise:
    """ln sigma ~ N(mean, std^2); everything in units of the images' spread sigma_data.

    c_noise is (ln sigma + 6) * 100, not the paper's ln(sigma) / 4: diffusers' time embedding is
    made for numbers from 0 to 1,000.
    """

    mean: float = -1.2
    std: float = 1.2
    sigma_data: float = 0.5  # of images in [-1, 1]
    sigma_min: float = 0.002  # what sampling may use
    sigma_max: float = 80.0

    def ready(self, device) -> None:
        """Nothing to copy: as EpsNoise.ready."""

    def draw(self, n: int, g: torch.Generator) -> torch.Tensor:
        """Training noise levels sigma, float (n,)."""
        return (self.mean + self.std * torch.randn(n, generator=g, device=g.device)).exp()

    def quantile(self, sigma) -> torch.Tensor:
        """Share in 0..1 of the training draws that lie below sigma: what t / T is to DDPM."""
        return torch.special.ndtr((sigma.log() - self.mean) / self.std)

    def scalings(self, sigma) -> Scalings:
        s = self.sigma_data
        total = sigma.square() + s * s
        c_noise = (sigma.log() + 6) * 100
        return Scalings(s * s / total, sigma * s * total.rsqrt(), total.rsqrt(), c_noise)

    def weight(self, sigma) -> torch.Tensor:
        """lambda = 1 / c_out^2: every noise level starts with the same loss."""
        s = self.sigma_data
        return (sigma.square() + s * s) / (sigma * s).square()


@dataclass(frozen=True)
class EpsNoise:
    """t uniform in 0..T-1 on a beta schedule: linear 1e-4..0.02, or the squared cosine."""

    n_timesteps: int = 1000  # T
    beta_schedule: str = "linear"

    @cached_property
    def schedule(self):
        """diffusers' DDPMScheduler of the training."""
        from diffusers import DDPMScheduler

        name = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[self.beta_schedule]
        return DDPMScheduler(num_train_timesteps=self.n_timesteps, beta_schedule=name)

    @cached_property
    def sigmas(self) -> torch.Tensor:
        """sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t), float32 (T,), rising."""
        alpha_bar = self.schedule.alphas_cumprod
        return ((1 - alpha_bar) / alpha_bar).sqrt()

    @cached_property
    def _tables(self) -> dict[torch.device, torch.Tensor]:
        return {}

    def ready(self, device) -> None:
        """Copy the table of sigmas to a device, before anything that reads it there is compiled."""
        self._sigmas_on(torch.empty(0, device=device).device)  # "cuda" is cuda:0

    def _sigmas_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._tables:
            self._tables[device] = self.sigmas.to(device)
        return self._tables[device]

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    def draw(self, n: int, g: torch.Generator) -> torch.Tensor:
        """Training noise levels sigma, float (n,)."""
        t = torch.randint(0, self.n_timesteps, (n,), generator=g, device=g.device)
        return self._sigmas_on(g.device)[t]

    def timestep(self, sigma) -> torch.Tensor:
        """t as float (B,): exact at the schedule's own levels, between them by log sigma."""
        knots, at = self._sigmas_on(sigma.device).double().log(), sigma.double().log()
        low = (torch.searchsorted(knots, at, right=True) - 1).clamp(0, len(knots) - 2)
        share = (at - knots[low]) / (knots[low + 1] - knots[low])
        return (low + share.clamp(0, 1)).float()

    def quantile(self, sigma) -> torch.Tensor:
        """t / T, the share of the training draws that lie below sigma."""
        return self.timestep(sigma) / self.n_timesteps

    def scalings(self, sigma) -> Scalings:
        c_in = (1 + sigma.square()).rsqrt()
        return Scalings(torch.ones_like(sigma), -sigma, c_in, self.timestep(sigma))

    def weight(self, sigma) -> torch.Tensor:
        """1 / sigma^2: the squared error of eps."""
        return sigma.square().reciprocal()


def make_noise(config) -> EdmNoise | EpsNoise:
    """The parameterisation of a DiffusionConfig."""
    if config.parameterisation == "edm":
        return EdmNoise(config.edm_mean, config.edm_std, config.sigma_data)
    return EpsNoise(config.n_timesteps, config.beta_schedule)
