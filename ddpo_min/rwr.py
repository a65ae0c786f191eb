"""Reward-weighted regression: learn to draw one's own pictures again, the better ones more    [paper Sec. 4.2]."""
import numpy as np
import torch

from .losses import rwr_loss
from .metrics import Metrics


def peers(prompts, per_prompt):
    """The samples that are compared with each other, those of one prompt or all: a bool mask (N,) for each prompt."""
    prompts = np.asarray(prompts)
    return [prompts == prompt for prompt in np.unique(prompts)] if per_prompt else [np.ones(len(prompts), dtype=bool)]


def rwr_weights(prompts, rewards, *, beta, per_prompt=True):
    """Reward-weighted regression: a sample counts as exp(beta r), normalised among the samples of its prompt.

    w_i = n_c exp(beta r_i) / sum_{j in c} exp(beta r_j)    [paper Eq. 3; per prompt, App. D.3]
    prompts: list of N str; beta: inverse temperature, per unit of reward; per_prompt: False compares all samples.
    Returns float64 (N,), of mean 1 over each prompt's n_c samples.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    weights = np.empty_like(rewards)
    for own in peers(prompts, per_prompt):
        odds = np.exp(beta * (rewards[own] - rewards[own].max()))       # the largest is 1: nothing overflows
        weights[own] = own.sum() * odds / odds.sum()
    return weights


def rwr_sparse_weights(prompts, rewards, *, percentile, per_prompt=True):
    """Sparse reward-weighted regression: a sample counts fully or not at all.

    w_i = 1[r_i >= C], C the given percentile of the rewards of the same prompt    [paper Eq. 4; per prompt, App. D.3]
    prompts: list of N str; percentile: in (0, 1); per_prompt: False compares all samples. Returns float64 (N,).
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    weights = np.empty_like(rewards)
    for own in peers(prompts, per_prompt):
        weights[own] = rewards[own] >= np.quantile(rewards[own], percentile)
    return weights


def effective_samples(weights):
    """How many equally weighted samples the weights are worth: (sum w)^2 / sum w^2, from 1 to N."""
    return float(np.sum(weights) ** 2 / np.sum(np.square(weights)))


def rwr_update(policy, optimizer, trajectories, weights, rng, *, plan):
    """Fine-tune the policy on an epoch's pictures, each with its weight: an optimizer step for each minibatch.

    weights: float (N,); rng: numpy Generator, of the order, the timesteps and the noise, which are drawn afresh each
    time; plan: see Plan. Returns {metric: mean}.
    """
    metrics = Metrics()
    for minibatch in plan.random_minibatches(weights, rng):
        for samples, t, seeds, part in minibatch:
            x_t, t, eps, context = trajectories.noised(samples, t, seeds, policy.model.alpha_bar)
            weight = torch.as_tensor(weights[samples]).to(x_t)
            loss = rwr_loss(policy.eps(x_t, t, context, policy.training_guidance), eps, weight)
            optimizer.backward(part * loss)
            metrics.add(len(samples), loss=loss)
        metrics.step(optimizer.step())
    metrics.of_all()
    return dict(loss=metrics.mean("loss"), **metrics.gradient(), effective_samples=effective_samples(weights))
