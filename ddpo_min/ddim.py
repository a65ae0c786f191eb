"""The DDIM sampler with eta > 0, read as a stochastic policy: p(x_prev | x_t, c) = N(mu, sigma_t^2 I).

    eps = unet(x_t, t, c) -> x0_hat -> mu -> x_prev = mu + sigma_t z, and log p(x_prev | x_t, c)

x_prev is x_{t-1} of the paper: the next, less noisy latent. Everything here computes in float32 at least, whatever
the dtype of the network (float64 stays float64).
"""
import math
from dataclasses import dataclass, replace

import torch

from .schedule import alphas_cumprod, sampling_timesteps


def x0_hat(x_t, eps, alpha_bar_t):
    """The clean latent that the predicted noise implies.

    x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)    [DDIM Eq. 9]
    x_t, eps: (B, 4, H, W); alpha_bar_t in (0, 1]; returns (B, 4, H, W).
    """
    return (x_t - (1 - alpha_bar_t) ** 0.5 * eps) / alpha_bar_t ** 0.5


def ddim_sigma(alpha_bar_t, alpha_bar_prev, eta):
    """The standard deviation of a step; eta = 1 is DDPM's, eta = 0 would be deterministic.

    sigma_t = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_prev)   [DDIM Eq. 16]
    """
    return eta * ((1 - alpha_bar_prev) / (1 - alpha_bar_t)) ** 0.5 * (1 - alpha_bar_t / alpha_bar_prev) ** 0.5


def ddim_mean(x_t, eps, alpha_bar_t, alpha_bar_prev, sigma_t):
    """The mean of a step: towards x0_hat, with the part of the noise that is kept.

    mu = sqrt(alpha_bar_prev) x0_hat + sqrt(1 - alpha_bar_prev - sigma_t^2) eps    [DDIM Eq. 12]
    x_t, eps: (B, 4, H, W); returns (B, 4, H, W).
    """
    direction = (1 - alpha_bar_prev - sigma_t ** 2) ** 0.5 * eps
    return alpha_bar_prev ** 0.5 * x0_hat(x_t, eps, alpha_bar_t) + direction


def gaussian_log_prob(x, mu, sigma):
    """Log-density of x under N(mu, sigma^2 I), AVERAGED over a sample's dimensions.

    log p = mean_d [ -(x_d - mu_d)^2 / (2 sigma^2) - log sigma - log(2 pi) / 2 ]
    x, mu: (B, ...); sigma: float > 0; returns (B,). The true log-density is this times the number of dimensions
    (16,384 for Stable Diffusion at 512 pixels), which is what a clip range of 1e-4 has to be read against.
    Raises ValueError if sigma is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}: a deterministic step has no log-probability; use eta > 0")
    log_density = -(x - mu) ** 2 / (2 * sigma ** 2) - math.log(sigma) - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(dim=1)


def guide(eps_uncond, eps_cond, guidance):
    """Classifier-free guidance: eps = eps_u + w (eps_c - eps_u); 1 is none    [CFG Eq. 6, whose w is ours - 1]."""
    return eps_uncond + guidance * (eps_cond - eps_uncond)


@dataclass(frozen=True)
class Steps:
    """What the sampler needs to know of each of its T steps, noisiest first; plain floats, index i = 0..T-1."""
    t: tuple                # timestep the network is told
    alpha_bar: tuple        # alpha_bar_t
    alpha_bar_prev: tuple   # alpha_bar of the next step; the last step goes to alpha_bar_0, not to 1
    sigma: tuple            # sigma_t > 0; 0 of a step without noise, which has no log-probability

    def __len__(self):
        return len(self.t)


def ddim_steps(steps, eta=1.0, alpha_bar=None):
    """The T steps of a schedule, alpha_bar (1000,); None: Stable Diffusion's.

    steps: T, 1 to 500; eta: 0 to 1, 1 is DDPM's noise, 0 none, and so no log-probability. Raises ValueError otherwise.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: expected 0 to 1")
    alpha_bar = alphas_cumprod() if alpha_bar is None else alpha_bar
    t = sampling_timesteps(steps)
    previous = (t - 1000 // steps).clamp(min=0)
    a, a_prev = alpha_bar[t], alpha_bar[previous]
    return Steps(*(tuple(x.tolist()) for x in (t, a, a_prev, ddim_sigma(a, a_prev, eta))))


def with_noise_in(steps, window):
    """The same steps, but without noise (sigma_t = 0) outside a range of them    [MixGRPO, arXiv 2507.21802]."""
    return replace(steps, sigma=tuple(s if i in window else 0.0 for i, s in enumerate(steps.sigma)))


def step_weights(steps):
    """How strongly each step's mean answers to a change of the predicted noise, in standard deviations of the step.

    w_t = |d mu / d eps| / sigma_t = |sqrt(1 - alpha_bar_prev - sigma_t^2) - sqrt(alpha_bar_prev (1 - alpha_bar_t) /
    alpha_bar_t)| / sigma_t: the gradient of log p is w_t times a standard normal times the gradient of eps, so the
    few steps with a large w_t fill the sum over steps with their noise.   Returns T floats; inf where sigma_t is 0.
    """
    return [abs((1 - prev - s ** 2) ** 0.5 - (prev * (1 - a) / a) ** 0.5) / s if s else math.inf
            for a, prev, s in zip(steps.alpha_bar, steps.alpha_bar_prev, steps.sigma)]


def ddim_step(x_t, eps, steps, i, noise=None, x_prev=None):
    """Take step i of the sampler, or score a step that was taken.

    x_t, eps: (B, 4, H, W); noise: (B, 4, H, W) standard normal, to take the step: x_prev = mu + sigma_t noise;
    x_prev: (B, 4, H, W), to score it instead. Returns (x_prev in x_t's dtype, log_prob (B,)). The new x_prev is
    rounded to the dtype it will be stored in BEFORE it is scored, else scoring it again would give another number.
    A step without noise that is taken has log_prob nan. Raises ValueError if one is to be scored, and unless exactly
    one of noise and x_prev is given.
    """
    if (noise is None) == (x_prev is None):
        raise ValueError("give either noise, to take the step, or x_prev, to score it")
    exact = torch.promote_types(x_t.dtype, torch.float32)
    mu = ddim_mean(x_t.to(exact), eps.to(exact), steps.alpha_bar[i], steps.alpha_bar_prev[i], steps.sigma[i])
    if x_prev is None:
        x_prev = (mu + steps.sigma[i] * noise.to(exact)).to(x_t.dtype)
        if steps.sigma[i] == 0:
            return x_prev, mu.new_full((len(mu),), math.nan)
    return x_prev, gaussian_log_prob(x_prev.to(exact), mu, steps.sigma[i])
