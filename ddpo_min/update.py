"""What happens to a round of samples: rewards become advantages or weights, and these change the policy."""
import math

import numpy as np
import torch

from .advantages import effective_samples, group_advantages, round_advantages, rwr_sparse_weights, rwr_weights
from .ddim import ddim_step, step_weights
from .files import InputError, NotFinite
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


class Optimiser:
    """AdamW on what is trained, with the gradient clipped.

    For float16 networks the loss is scaled up before it goes back, or small gradients would round to zero; when they
    overflow, the update is skipped and the scale halved.
    """

    def __init__(self, parameters, settings):
        """parameters: list of float32 tensors. Raises InputError for float16 on mps."""
        s = settings
        if s.dtype == "float16" and parameters[0].device.type == "mps":
            raise InputError("--dtype float16: torch scales no loss on mps; start with --dtype bfloat16 or float32")
        self.parameters, self.grad_clip = parameters, s.grad_clip
        fused = parameters[0].is_cuda or None       # the usual one needs a fifth copy of all that is trained
        self.rule = torch.optim.AdamW(parameters, s.lr, (s.beta1, s.beta2), s.adam_eps, s.weight_decay, fused=fused)
        self.scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=s.dtype == "float16")

    def backward(self, loss):
        """Add the loss's gradient to what has gathered."""
        self.scaler.scale(loss).backward()

    def step(self):
        """Clip the gathered gradient and step; returns its norm before clipping, None if the update was skipped.

        Raises NotFinite if the gradient is that and a smaller scale cannot help.
        """
        self.scaler.unscale_(self.rule)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip).item()
        if not math.isfinite(norm) and self.scaler.get_scale() <= 1:      # 1 without float16
            raise NotFinite("the gradients")
        self.scaler.step(self.rule)
        self.scaler.update()
        self.rule.zero_grad(set_to_none=True)
        return norm if math.isfinite(norm) else None

    def state_dict(self):
        """AdamW's state, and the scale."""
        return {**self.rule.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        """Go on from state_dict(), which may come from another device."""
        self.rule.zero_grad(set_to_none=True)
        self.rule.state.clear()         # before the new moments come: of a whole UNet two sets may not fit
        groups = [{**group, "fused": self.rule.defaults["fused"]} for group in state["param_groups"]]
        self.rule.load_state_dict({"state": state["state"], "param_groups": groups})
        self.scaler.load_state_dict(state.get("scaler", {}))


def of_norms(norms):
    """The metrics of what Optimiser.step() returned: the mean norm, and how many updates were skipped, if any."""
    taken = [norm for norm in norms if norm is not None]
    skipped = len(norms) - len(taken)
    return dict(grad_norm=np.mean(taken or [0.0]), **({"skipped_updates": skipped} if skipped else {}))


def ddpo_update(policy, optimiser, trajectories, advantages, settings, rng, progress):
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
                log_p_before, of_steps = trajectories.log_p_old[index], []
                for i in chosen_steps:
                    x_t, x_prev, log_p_old = latents[:, i], latents[:, i + 1], log_p_before[:, i]
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
                        kls.append((len(index), kl.detach()))
                    optimiser.backward(objective * len(index) / (share * count))
                    error = (ratio.detach() - 1).abs()
                    of_steps.append(torch.stack([loss.detach(), 0.5 * ((log_p.detach() - log_p_old) ** 2).mean(),
                                                 (error > settings.clip_range).float().mean(), error.max()]))
                numbers = torch.stack(of_steps).tolist()        # only now: reading a number waits for the GPU
                history.extend((i, len(index), *of_step) for i, of_step in zip(chosen_steps, numbers))
                progress(len(index))
            if max_ratio_error is None:     # so far the policy is the one that sampled
                max_ratio_error = max(error for *_, error in history)
            grad_norms.append(optimiser.step())
    step, weight, loss, approx_kl, clipped, _ = np.array(history).T
    by_step = [float(np.average(clipped[step == i], weights=weight[step == i])) if (step == i).any() else None
               for i in range(T)]
    return dict(loss=np.average(loss, weights=weight), approx_kl=np.average(approx_kl, weights=weight),
                clip_fraction=np.average(clipped, weights=weight), **of_norms(grad_norms),
                max_ratio_error=max_ratio_error, clip_fraction_by_step=by_step,
                **({"kl_to_base": sum(n * kl.item() for n, kl in kls) / sum(n for n, _ in kls)} if kls else {}))


def rwr_update(policy, optimiser, trajectories, weights, settings, rng, progress):
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
            optimiser.backward(loss * len(index) / share)
            losses.append((len(index), loss.item()))
            progress(len(index))
        grad_norms.append(optimiser.step())
    size, loss = np.array(losses).T
    return dict(loss=np.average(loss, weights=size), **of_norms(grad_norms),
                effective_samples=effective_samples(weights))
