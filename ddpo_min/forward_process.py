"""DDPO's successors: noise the finished pictures anew and weight their denoising by the advantage, signs included.

AWM (Advantage-Weighted Matching, 2509.25050), NFT (DiffusionNFT, 2509.16117) and RAM (Reinforce Adjoint Matching,
2605.10759) begin with the same gradient, A (v_old - v), and differ in what holds it back: docs/algorithms.md has the
derivation, and why DDPO's own update is the same regression onto noisier targets.
"""
import torch

from .losses import ddpo_is_loss, matching_log_prob, nft_loss, ram_loss
from .metrics import Metrics


def velocity_units(step_weights, a):
    """The units of the papers, whose models predict a velocity: (scale, weight) of each timestep, float64 (1000,).

    v_hat - v = scale (eps_hat - eps), scale = 1 / (1 - tau), weight = tau = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a))
    step_weights: "paper" for these; "even" for ones, so that errors of the noise count alike at all timesteps; a: the
    schedule alpha_bar_t, float64 (1000,).
    """
    tau = (1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt())
    return (1 / (1 - tau), tau) if step_weights == "paper" else (torch.ones_like(a), torch.ones_like(a))


def forward_process_update(policy, optimizer, trajectories, advantages, rng, *, plan, algorithm, timesteps, grid,
                           step_weights, clip_range, power, beta, advantage_clip, kl_weight=0.0, kl_old=0.0):
    """Improve the policy on an epoch's finished pictures, with an optimizer step for each minibatch.

    L = mean over the minibatch's (sample, timestep) pairs of
        [ loss + kl_weight |v_hat - v_base|^2 + kl_old |v_hat - v_old|^2 ]    (ram has kl_weight in its loss)
    In an epoch's first optimizer step v_hat is v_old, so the ratio is exactly 1 (with --policy-ema only nearly).
    advantages: float (N,), within +-advantage_clip; rng: numpy Generator, of the order, timesteps and noise; plan: see
    Plan; algorithm: "awm", "nft" or "ram"; timesteps: how many a sample; grid: from the sampler's alone; step_weights:
    see velocity_units(); clip_range, power: awm's; beta: nft's. Returns the metrics of docs/metrics.md, {name: number}.
    """
    advantages = torch.as_tensor(advantages).to(trajectories.log_p_old)
    alpha_bar = policy.model.alpha_bar
    scales, weights = (numbers.to(advantages) for numbers in velocity_units(step_weights, alpha_bar))
    times, guidance, metrics = policy.steps.t if grid else range(len(scales)), policy.training_guidance, Metrics()
    with optimizer.epoch():
        for minibatch in plan.noised_minibatches(rng, times, timesteps):
            for samples, t, seeds, part in minibatch:
                x_t, t, eps, context = trajectories.noised(samples, t, seeds, alpha_bar)
                A, weight, scale = advantages[samples], weights[t], scales[t][:, None, None, None]
                with torch.no_grad(), optimizer.old_policy():
                    v_old = scale * policy.eps(x_t, t, context, guidance)
                v_base = scale * policy.base_eps(x_t, t, context) if kl_weight else v_old
                v_hat, v = scale * policy.eps(x_t, t, context, guidance), scale * eps
                log_p, log_p_old = (matching_log_prob(u, v, weight, power) for u in (v_hat, v_old))
                ratio = torch.exp(log_p - log_p_old)
                if algorithm == "awm":
                    loss = ddpo_is_loss(ratio, A, clip_range)
                elif algorithm == "nft":
                    loss = nft_loss(v_hat, v_old, v, A, weight, beta, advantage_clip)
                else:
                    loss = ram_loss(v_hat, v_old, v_base, v, A, weight, kl_weight)
                to_base, to_old = (((v_hat - u) ** 2).mean() for u in (v_base, v_old))
                pull = 0.0 if algorithm == "ram" else kl_weight
                optimizer.backward(part * (loss + pull * to_base + kl_old * to_old))
                error = (ratio - 1).abs()
                metrics.add(len(x_t), loss=loss, distance_to_base=to_base, distance_to_old=to_old,
                            clip_fraction=(error > clip_range).to(loss).mean(), ratio_error=error.max())
            metrics.step(optimizer.step())
    metrics.of_all()
    names = ["loss", "clip_fraction", "distance_to_old"] + ["distance_to_base"] * bool(kl_weight)
    return dict({name: metrics.mean(name) for name in names}, **metrics.gradient(),
                max_ratio_error=metrics.largest_at_first("ratio_error"))
