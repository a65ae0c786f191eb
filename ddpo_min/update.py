"""What happens to a round of samples: rewards become advantages or weights, and these change the policy."""
import numpy as np
import torch

from .advantages import effective_samples, group_advantages, round_advantages, rwr_sparse_weights, rwr_weights
from .ddim import ddim_step, step_weights
from .files import InputError
from .losses import ddpo_is_loss, ddpo_sf_loss, rwr_loss, step_kl
from .rollout import groups, sample_noise
from .schedule import alphas_cumprod


def advantages_of(statistics, prompts, rewards, settings):
    """The advantages of a round: how much better than usual was each picture? float64 (N,), cut at +-advantage_clip."""
    if settings.normalise == "prompt":
        advantages = statistics.advantages(prompts, rewards)
    elif settings.normalise == "group":
        advantages = group_advantages(rewards, settings.group_size)
    else:
        advantages = round_advantages(rewards)
    return advantages.clip(-settings.advantage_clip, settings.advantage_clip)


def weights_of(prompts, rewards, settings):
    """The sample weights of a round of reward-weighted regression, per prompt or over the round: float64 (N,)."""
    keys = prompts if settings.normalise == "prompt" else ["round"] * len(prompts)
    if settings.algorithm == "rwr":
        return rwr_weights(keys, rewards, settings.inverse_temperature)
    return rwr_sparse_weights(keys, rewards, settings.percentile)


def optimiser_step(parameters, optimizer, settings):
    """Clip the gradient and step; returns its norm before clipping. Raises InputError if it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
    if not torch.isfinite(norm):
        raise InputError("the gradient is no longer finite; start again with a smaller --lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def ddpo_update(policy, parameters, optimizer, trajectories, advantages, settings, rng, progress):
    """DDPO: improve the policy on one round's trajectories by settings.updates optimiser steps (times inner epochs).

    The gradient of an optimiser step is the mean over its share of the samples and over their denoising steps.
    trajectories: N samples; advantages: float32 (N,); rng: numpy Generator; progress: called with samples done.
    Returns {metric: mean over everything that was trained on}; max_ratio_error is of the first update alone.
    """
    share, T = settings.samples // settings.updates, len(policy.steps)
    window = np.arange(settings.first_step - 1, settings.last_step or T)
    count = max(1, round(settings.timestep_fraction * len(window)))
    w = step_weights(policy.steps)
    emphasis = np.array([1 / w_t for w_t in w] if settings.step_weights == "even" else [1.0] * T)
    emphasis = emphasis / emphasis.mean()
    history, grad_norms, kls, max_ratio_error = [], [], [], None
    for inner in range(settings.inner_epochs):
        for first in rng.permutation(np.arange(0, settings.samples, share)):
            chosen_steps = np.sort(rng.permutation(window)[:count]).tolist()
            for start, stop in groups(share, share, settings.batch):
                index = torch.arange(first + start, first + stop)
                context, empty = trajectories.context(index)
                advantage, latents = advantages[index], trajectories.latents[index].to(advantages.device)
                for i in chosen_steps:
                    x_t, x_prev = latents[:, i], latents[:, i + 1]
                    log_p_old = trajectories.log_p_old[index, i]
                    eps = policy.eps(x_t, policy.steps.t[i], context, empty)
                    _, log_p = ddim_step(x_t, eps, policy.steps, i, x_prev=x_prev)
                    if settings.algorithm == "ddpo_is":
                        loss, ratio = ddpo_is_loss(log_p, log_p_old, advantage, settings.clip_range)
                    else:
                        loss, ratio = ddpo_sf_loss(log_p, advantage), torch.exp(log_p - log_p_old)
                    objective = emphasis[i] * loss
                    if settings.kl_weight:
                        eps_base = policy.base_eps(x_t, policy.steps.t[i], context, empty)
                        kl = step_kl(eps, eps_base, w[i]).mean()
                        objective = objective + settings.kl_weight * kl
                        kls.append((len(index), kl.item()))
                    (objective * len(index) / (share * count)).backward()
                    error = (ratio.detach() - 1).abs()
                    history.append((i, len(index), loss.item(), 0.5 * ((log_p.detach() - log_p_old) ** 2).mean().item(),
                                    (error > settings.clip_range).float().mean().item(), error.max().item()))
                progress(len(index))
            if max_ratio_error is None:     # so far the policy is the one that sampled
                max_ratio_error = max(error for *_, error in history)
            grad_norms.append(optimiser_step(parameters, optimizer, settings))
    step, weight, loss, approx_kl, clipped, _ = np.array(history).T
    by_step = [float(np.average(clipped[step == i], weights=weight[step == i])) if (step == i).any() else None
               for i in range(T)]
    return dict(loss=np.average(loss, weights=weight), approx_kl=np.average(approx_kl, weights=weight),
                clip_fraction=np.average(clipped, weights=weight), grad_norm=np.mean(grad_norms),
                max_ratio_error=max_ratio_error, clip_fraction_by_step=by_step,
                **({"kl_to_base": sum(n * kl for n, kl in kls) / sum(n for n, _ in kls)} if kls else {}))


def rwr_update(policy, parameters, optimizer, trajectories, weights, settings, rng, progress):
    """Reward-weighted regression: settings.updates * inner_epochs optimiser steps of weighted denoising on the x_0.

    Each takes the next samples // updates of the samples of weight above 0, in ever new random order, each with a
    timestep and noise drawn afresh. weights: float64 (N,); rng: numpy Generator. Returns {metric: mean}.
    """
    share, device = settings.samples // settings.updates, trajectories.contexts.device
    alpha_bar = alphas_cumprod().float().to(device)
    kept, order = np.flatnonzero(weights), np.array([], dtype=int)
    losses, grad_norms = [], []
    for _ in range(settings.updates * settings.inner_epochs):
        while len(order) < share:
            order = np.append(order, rng.permutation(kept))
        chosen, order = order[:share], order[share:]
        for start, stop in groups(share, share, settings.batch):
            index = torch.as_tensor(chosen[start:stop])
            x_0, (context, empty) = trajectories.latents[index, -1].to(device), trajectories.context(index)
            t = torch.as_tensor(rng.integers(0, 1000, len(index)), device=device)
            eps = sample_noise(rng.integers(2 ** 32, size=len(index)), 0, x_0.shape[1:])[:, 0].to(device)
            a = alpha_bar[t][:, None, None, None]
            x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
            weight = torch.as_tensor(weights[chosen[start:stop]], dtype=torch.float32, device=device)
            loss = rwr_loss(policy.eps(x_t, t, context, empty), eps, weight)
            (loss * len(index) / share).backward()
            losses.append((len(index), loss.item()))
            progress(len(index))
        grad_norms.append(optimiser_step(parameters, optimizer, settings))
    size, loss = np.array(losses).T
    return dict(loss=np.average(loss, weights=size), grad_norm=np.mean(grad_norms),
                effective_samples=effective_samples(weights))
