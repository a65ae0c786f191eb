"""DDPO's update: what the policy gradient does with an epoch's samples."""
import numpy as np
import torch

from .ddim import step_weights
from .losses import ddpo_is_loss, ddpo_sf_loss, step_kl
from .metrics import Metrics


def even_emphasis(steps):
    """Factors for the losses of the denoising steps that make their gradients about equally large.

    emphasis_i = (1 / w_i) / mean(1 / w): the gradient of log p is proportional to w_t = |d mu / d eps| / sigma_t, see
    step_weights(). Returns T floats: 0 for steps without noise, the others of mean 1 (also if fewer are trained on).
    """
    inverse = 1 / np.array(step_weights(steps))
    return (inverse / inverse[inverse > 0].mean()).tolist()


def ddpo_update(policy, optimizer, trajectories, advantages, rng, *, plan, clip_range, emphasis, kl_weight=0.0):
    """Improve the policy on an epoch's trajectories, with an optimizer step for each minibatch    [paper Sec. 4.3].

    L = mean over the minibatch's (sample, step i) pairs of [ emphasis_i loss + kl_weight KL(policy | base model) ]
    In an epoch's first optimizer step the weights are those that computed log_p_old, so the ratio is exactly 1.
    advantages: float (N,); rng: numpy Generator for the order of minibatches and steps; plan: see Plan; clip_range:
    of DDPO_IS (importance sampling), None for DDPO_SF (score function); emphasis: T floats.
    Returns the metrics of docs/metrics.md, {name: number or list}.
    """
    advantages = torch.as_tensor(advantages).to(trajectories.log_p_old)
    w, metrics = step_weights(policy.steps), Metrics()
    for minibatch in plan.minibatches(rng):
        for samples, i, part in minibatch:      # a micro-batch, its step, its part of the pairs (parts add up to 1)
            x_t, x_prev, log_p_old, context = trajectories.at(samples, i)
            log_p, eps = policy.log_prob(x_prev, x_t, i, context)
            ratio = torch.exp(log_p - log_p_old)
            if clip_range is None:
                loss = ddpo_sf_loss(log_p, advantages[samples])
            else:
                loss = ddpo_is_loss(ratio, advantages[samples], clip_range)
            base = policy.base_eps(x_t, policy.steps.t[i], context) if kl_weight else eps.detach()
            kl = step_kl(eps, base, w[i]).mean()
            optimizer.backward(part * (emphasis[i] * loss + kl_weight * kl))
            error, limit = (ratio - 1).abs(), torch.inf if clip_range is None else clip_range
            metrics.add(len(x_t), i, loss=loss, kl_to_base=kl, approx_kl=0.5 * ((log_p - log_p_old) ** 2).mean(),
                        clip_fraction=(error > limit).to(loss).mean(), ratio_error=error.max())
        metrics.step(optimizer.step())
    metrics.of_all()
    means = {name: metrics.mean(name) for name in ("loss", "approx_kl", "clip_fraction")}
    if kl_weight:
        means["kl_to_base"] = metrics.mean("kl_to_base")
    return dict(means, **metrics.gradient(), max_ratio_error=metrics.largest_at_first("ratio_error"),
                clip_fraction_by_step=metrics.by_step("clip_fraction", len(policy.steps)))
