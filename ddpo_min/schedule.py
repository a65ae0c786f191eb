"""Stable Diffusion's noise schedule and the timesteps a sampler visits.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps    [DDPM Eq. 4]
"""
import torch

TRAIN_TIMESTEPS = 1000
OFFSET = 1      # Stable Diffusion's steps_offset: the last step is taken at t = 1, so that sigma stays above 0


def alphas_cumprod():
    """The cumulative products alpha_bar_t of Stable Diffusion's scaled-linear schedule.

    beta_t = (sqrt(0.00085) + (sqrt(0.012) - sqrt(0.00085)) t / 999)^2, alpha_bar_t = prod_{s<=t} (1 - beta_s)
    Returns float64 (1000,), decreasing from 0.99915 to 0.00466.
    """
    beta = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, dim=0)


def sampling_timesteps(steps):
    """The timesteps of a trajectory, noisiest first: with 50 steps 981, 961, ..., 21, 1.

    t_i = (steps - 1 - i) * (1000 // steps) + 1.   steps: 1..500; returns int64 (steps,). Raises ValueError otherwise.
    """
    if not 1 <= steps <= TRAIN_TIMESTEPS // 2:
        raise ValueError(f"steps is {steps}; expected 1 to {TRAIN_TIMESTEPS // 2}")
    return torch.arange(steps - 1, -1, -1) * (TRAIN_TIMESTEPS // steps) + OFFSET
