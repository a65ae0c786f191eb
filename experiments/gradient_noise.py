"""How noisy is DDPO's gradient? Its signal-to-noise ratio against the batch and the number of denoising steps T.

    python experiments/gradient_noise.py      80 minutes on 2 CPU cores; writes gradient_noise.csv, a seed at a time

For one sample n with advantage A_n the estimate of the gradient is g_n = sum_i A_n d log p_i. A batch of B of them has

    signal-to-noise = |E g|^2 / (E|g_n - E g|^2 / B)

Both expectations are estimated from many small groups of samples, at the untrained model, for the LoRA's gradient.
A sample is compared with about 22 others of its prompt, and all denoising steps count: training has fewer of both.
The gradient of AWM, whose target is the noise of the finished picture, is measured on the same samples: its
signal-to-noise, and its direction.
After an epoch's optimizer steps with other samples, and after four passes over these, the measured samples are no
longer the policy's own. There the importance ratio (IS) is compared with doing nothing about it (SF): by the cosine of
their expected gradient with that of fresh samples. (The log-probability is a mean over a latent's dimensions, so even
unclipped the ratio corrects for less than the policy has moved.)
"""
import sys

import numpy as np
import torch
from results import ROOT, read_rows, write_rows
from run import SEEDS
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from ddpo_min.advantages import PromptStatistics
from ddpo_min.ddim import ddim_steps
from ddpo_min.ddpo import ddpo_update, even_emphasis
from ddpo_min.device import pick_device
from ddpo_min.files import run_script
from ddpo_min.learner import Learner
from ddpo_min.losses import ddpo_is_loss, ddpo_sf_loss, matching_log_prob
from ddpo_min.plan import Plan, micro_batches
from ddpo_min.policy import Policy
from ddpo_min.prompts import draw_prompts, find_prompts
from ddpo_min.rewards import jpeg
from ddpo_min.rollout import sample_trajectories
from ddpo_min.settings import Settings
from ddpo_min.weights import SHIPPED, load_stable_diffusion

SAMPLES, GROUP, MINIBATCH = 1024, 8, 64
STEPS = (4, 8, 16, 32)
BATCHES = (8, 16, 32, 64, 128, 256)
# Of a step: (log_p, log_p_old, advantage) -> scalar
LOSSES = {"SF": lambda log_p, log_p_old, A: ddpo_sf_loss(log_p, A),
          "IS": lambda log_p, log_p_old, A: ddpo_is_loss(torch.exp(log_p - log_p_old), A, Settings.clip_range),
          "IS unclipped": lambda log_p, log_p_old, A: ddpo_is_loss(torch.exp(log_p - log_p_old), A, np.inf)}


def draw(policy, seed, epoch, count=SAMPLES):
    """Trajectories of `count` samples and their advantages, compared with all samples of the same prompt."""
    prompts, seeds = draw_prompts(find_prompts("animals"), count, seed=seed, epoch=epoch)
    images = []
    trajectories = sample_trajectories(policy, prompts, seeds, tqdm(micro_batches(0, count, MINIBATCH), "sampling"),
                                       on_images=lambda drawn, *_: images.append(drawn))
    statistics = PromptStatistics(buffer=count, minimum=2)
    advantages = statistics.advantages(prompts, jpeg(np.concatenate(images), prompts))
    return trajectories, torch.as_tensor(advantages).float().clip(-Settings.advantage_clip, Settings.advantage_clip)


def gradients(policy, parameters, trajectories, advantages, losses, emphases):
    """The gradients of small groups: {(loss, emphasis): float32 (groups, parameters)}, by their names.

    losses: some of LOSSES; emphases: {name: T factors} for the losses of the denoising steps.
    """
    groups = micro_batches(0, len(advantages), GROUP)
    total = {(loss, emphasis): torch.zeros(len(groups), sum(p.numel() for p in parameters))
             for loss in losses for emphasis in emphases}
    for n, samples in enumerate(tqdm(groups, "gradients")):
        for i in range(len(policy.steps)):
            x_t, x_prev, log_p_old, context = trajectories.at(samples, i)
            log_p, _ = policy.log_prob(x_prev, x_t, i, context)
            for loss in losses:
                value = LOSSES[loss](log_p, log_p_old, advantages[samples])
                g = torch.cat([part.flatten() for part in torch.autograd.grad(value, parameters, retain_graph=True)])
                for emphasis, factors in emphases.items():
                    total[loss, emphasis][n] += factors[i] * g
    return total


def matching_gradients(policy, parameters, trajectories, advantages, timesteps, rng):
    """The same of AWM's loss, each sample noised to so many timesteps: float32 (groups, parameters)."""
    total = torch.zeros(len(advantages) // GROUP, sum(p.numel() for p in parameters))
    minibatch, = Plan(len(advantages), 1, GROUP).noised_minibatches(rng, range(1000), timesteps)
    for samples, t, seeds, _ in tqdm(minibatch, "gradients", len(total) * timesteps):
        x_t, t, eps, context = trajectories.noised(samples, t, seeds, policy.model.alpha_bar)
        log_p = matching_log_prob(policy.eps(x_t, t, context, policy.training_guidance), eps, weight=1.0)
        value = ddpo_sf_loss(log_p, advantages[samples])
        total[samples.start // GROUP] += torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])
    return total


def signal_and_noise(g):
    """|E g|^2 without the noise's share, and E|g_n - E g|^2 of a single sample: from groups (groups, parameters)."""
    mean = g.mean(0)
    noise = GROUP * (g - mean).square().sum().item() / (len(g) - 1)
    return mean.square().sum().item() - noise / (GROUP * len(g)), noise


def measured_noise(g, batch):
    """The variance of the mean of `batch` samples, from disjoint batches: it should fall as 1 / batch."""
    size = batch // GROUP
    means = g[:len(g) // size * size].unflatten(0, (-1, size)).mean(1)
    return (means - means.mean(0)).square().sum().item() / (len(means) - 1)


def cosine(a, b):
    """Of the expected gradients behind two sets of groups of different samples; nan if one is nothing but noise."""
    length = signal_and_noise(a)[0] * signal_and_noise(b)[0]
    return (a.mean(0) @ b.mean(0)).item() / length ** 0.5 if length > 0 else np.nan


def cosine_on_the_same(a, b):
    """The same, where the groups have the same samples: the halves that are multiplied share none."""
    return (cosine(a[::2], b[1::2]) + cosine(a[1::2], b[::2])) / 2


def learner_of(seed, weights=SHIPPED):
    """The shipped model with a new LoRA, and the laptop preset's optimizer."""
    model, s = load_stable_diffusion(weights, pick_device("cpu"), torch.float32), Settings()
    return Learner(model, trainable="lora", rank=s.rank, init_lora="", seed=seed,
                   statistics=PromptStatistics(s.prompt_buffer, s.prompt_minimum), lr=s.lr, betas=(s.beta1, s.beta2),
                   eps=s.adam_eps, weight_decay=s.weight_decay, grad_clip=s.grad_clip)


def main():
    rows = read_rows("gradient_noise")
    for seed in SEEDS:
        if seed not in {row["seed"] for row in rows}:       # a seed that was interrupted begins anew
            rows += [row for T in STEPS for row in rows_of(seed, T)]
            write_rows("gradient_noise", sorted(rows, key=lambda row: row["run"]))


def rows_of(seed, T):
    """What is measured at T denoising steps; at the default's, AWM and a step ahead, too."""
    learner, steps, rows = learner_of(seed), ddim_steps(T), []
    policy = Policy(learner.model, steps, 1.0, lora=learner.lora)
    parameters = learner.optimizer.parameters
    emphases = dict(even=even_emphasis(steps), paper=[1.0] * T)
    trajectories, advantages = draw(policy, seed, 0)
    # The ratio is 1 here, so the gradient of IS is that of SF
    found = gradients(policy, parameters, trajectories, advantages, ["SF"], emphases)
    measured = {name: g for (_, name), g in found.items()}
    if T == Settings.steps:
        measured.update({f"awm, {count} timesteps": matching_gradients(
            policy, parameters, trajectories, advantages, count, np.random.default_rng(seed))
            for count in (Settings.timesteps, T)})
    for name, g in measured.items():
        signal, noise = signal_and_noise(g)
        for batch in BATCHES:
            rows.append(dict(run=name, seed=seed, T=T, batch=batch, signal=signal, noise=noise / batch,
                             measured_noise=measured_noise(g, batch), signal_to_noise=signal * batch / noise))
    if T == Settings.steps:
        rows += [dict(run=f"{name}: direction", seed=seed, T=T, cosine=cosine_on_the_same(measured["even"], g))
                 for name, g in measured.items() if name.startswith("awm")]
        rows += after_updates(learner, policy, trajectories, advantages, emphases["even"], seed)
    return rows


def after_updates(learner, policy, trajectories, advantages, emphasis, seed):
    """The same samples after 4 optimizer steps with others, and after 12 more: SF and IS against fresh samples."""
    T, parameters, even, rows = len(policy.steps), learner.optimizer.parameters, dict(even=emphasis), []
    (others, A), rng, taken = draw(policy, seed, 1, Settings.samples), np.random.default_rng(seed), 0
    for passes in (1, 3):
        taken += passes * Settings.updates
        ddpo_update(policy, learner.optimizer, others, A, rng, emphasis=emphasis, clip_range=Settings.clip_range,
                    plan=Plan(Settings.samples, Settings.updates, MINIBATCH, range(T), inner_epochs=passes))
        moved = how_far(policy, trajectories)
        old = gradients(policy, parameters, trajectories, advantages, list(LOSSES), even)
        fresh = gradients(policy, parameters, *draw(policy, seed, 1 + passes), ["SF"], even)["SF", "even"]
        for (loss, _), g in old.items():
            signal, noise = signal_and_noise(g)
            rows.append(dict(run=f"after {taken} steps: {loss}", seed=seed, T=T, signal=signal, noise=noise,
                             cosine=cosine(g, fresh), **moved))
    return rows


@torch.no_grad()
def how_far(policy, trajectories):
    """What docs/metrics.md calls approx_kl and clip_fraction, of all samples and steps."""
    differences = []
    for samples in micro_batches(0, len(trajectories.row), MINIBATCH):
        for i in range(len(policy.steps)):
            x_t, x_prev, log_p_old, context = trajectories.at(samples, i)
            differences.append(policy.log_prob(x_prev, x_t, i, context)[0] - log_p_old)
    log_ratio = torch.cat(differences)
    return dict(approx_kl=0.5 * log_ratio.square().mean().item(),
                clip_fraction=(log_ratio.exp() - 1).abs().gt(Settings.clip_range).float().mean().item())


if __name__ == "__main__":
    run_script(main, __doc__)
