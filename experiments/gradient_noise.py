"""How noisy is DDPO's gradient? Its signal-to-noise ratio against the batch and the number of denoising steps T.

    python experiments/gradient_noise.py      40 minutes on 2 CPU cores; writes gradient_noise.csv

For one sample n with advantage A_n the estimate of the gradient is g_n = sum_i A_n d log p_i. A batch of B of them has

    signal-to-noise = |E g|^2 / (E|g_n - E g|^2 / B)

Both expectations are estimated from many small groups of samples, at the untrained model, for the LoRA's gradient.
After one optimizer step the same samples are no longer the policy's own. There the importance ratio (IS) is compared
with doing nothing about it (SF): by the cosine of their mean gradient with that of fresh samples.
"""
import sys

import numpy as np
import torch
from results import ROOT, write_rows
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from ddpo_min.advantages import PromptStatistics
from ddpo_min.ddim import ddim_steps
from ddpo_min.ddpo import ddpo_update, even_emphasis
from ddpo_min.learner import Learner
from ddpo_min.losses import ddpo_is_loss, ddpo_sf_loss
from ddpo_min.plan import Plan, micro_batches
from ddpo_min.policy import Policy
from ddpo_min.prompts import draw_prompts, find_prompts
from ddpo_min.rewards import jpeg
from ddpo_min.rollout import sample_trajectories
from ddpo_min.weights import SHIPPED, load_stable_diffusion

SAMPLES, GROUP = 1024, 8
STEPS, SEEDS = (4, 8, 16, 32), (0, 1, 2)
BATCHES = (8, 16, 32, 64, 128, 256)
CLIP_RANGE = 0.01       # the laptop preset's


def draw(policy, seed, epoch, count=SAMPLES):
    """Trajectories of `count` samples and their advantages, compared with all samples of the same prompt."""
    prompts, seeds = draw_prompts(find_prompts("animals"), count, seed=seed, epoch=epoch)
    images = []
    trajectories = sample_trajectories(policy, prompts, seeds, tqdm(micro_batches(0, count, 64), "sampling"),
                                       on_images=lambda drawn, _: images.append(drawn))
    statistics = PromptStatistics(buffer=count, minimum=2)
    advantages = statistics.advantages(prompts, jpeg(np.concatenate(images), prompts))
    return trajectories, torch.as_tensor(advantages).float().clip(-5, 5)


def gradients(policy, parameters, trajectories, advantages, emphases):
    """The gradients of small groups, by the name of the loss: {name: float32 (groups, parameters)}.

    emphases: {name: T factors} for the losses of the denoising steps; with the first of them also "IS", the clipped
    ratio's, and "IS unclipped".
    """
    groups, T = micro_batches(0, len(advantages), GROUP), len(policy.steps)
    first = next(iter(emphases.values()))
    names = [*emphases, "IS", "IS unclipped"]
    total = {name: torch.zeros(len(groups), sum(p.numel() for p in parameters)) for name in names}
    for n, samples in enumerate(tqdm(groups, "gradients")):
        for i in range(T):
            x_t, x_prev, log_p_old, context = trajectories.at(samples, i)
            log_p, _ = policy.log_prob(x_prev, x_t, i, context)
            ratio, A = torch.exp(log_p - log_p_old), advantages[samples]
            losses = dict(SF=ddpo_sf_loss(log_p, A), clipped=ddpo_is_loss(ratio, A, CLIP_RANGE),
                          free=ddpo_is_loss(ratio, A, np.inf))
            g = {name: torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters, retain_graph=True)])
                 for name, loss in losses.items()}
            for name, emphasis in emphases.items():
                total[name][n] += emphasis[i] * g["SF"]
            total["IS"][n] += first[i] * g["clipped"]
            total["IS unclipped"][n] += first[i] * g["free"]
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
    """Of the mean gradients of two sets of groups."""
    return torch.cosine_similarity(a.mean(0), b.mean(0), dim=0).item()


def learner_of(seed):
    """The shipped model with a new LoRA."""
    model = load_stable_diffusion(SHIPPED, "cpu", torch.float32)
    return Learner(model, trainable="lora", rank=4, init_lora="", seed=seed, statistics=PromptStatistics(), lr=3e-3,
                   betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4, grad_clip=1.0)


def main():
    rows = []
    for seed in SEEDS:
        for T in STEPS:
            learner, steps = learner_of(seed), ddim_steps(T)
            policy = Policy(learner.model, steps, 1.0, lora=learner.lora)
            parameters = learner.optimizer.parameters
            emphases = dict(even=even_emphasis(steps), paper=[1.0] * T)
            trajectories, advantages = draw(policy, seed, 0)
            at_first = gradients(policy, parameters, trajectories, advantages, emphases)
            off = (at_first["IS"] - at_first["even"]).norm() / at_first["even"].norm()
            assert off < 1e-3, off      # the ratio is 1, but for rounding: so IS is SF here
            for name in emphases:
                signal, noise = signal_and_noise(at_first[name])
                for batch in BATCHES:
                    rows.append(dict(run=name, seed=seed, T=T, batch=batch, signal=signal, noise=noise / batch,
                                     measured_noise=measured_noise(at_first[name], batch),
                                     signal_to_noise=signal * batch / noise))
            if T == 8:
                rows += after_a_step(learner, policy, trajectories, advantages, emphases, seed)
            write_rows("gradient_noise", sorted(rows, key=lambda row: row["run"]))


def after_a_step(learner, policy, trajectories, advantages, emphases, seed):
    """The same samples after one optimizer step with 64 others: SF and IS against fresh samples."""
    T, parameters = len(policy.steps), learner.optimizer.parameters
    others, A = draw(policy, seed, 1, 64)
    ddpo_update(policy, learner.optimizer, others, A, np.random.default_rng(seed), plan=Plan(64, 1, 64, range(T)),
                clip_range=CLIP_RANGE, emphasis=emphases["even"])
    old = gradients(policy, parameters, trajectories, advantages, emphases)
    true, again = (gradients(policy, parameters, *draw(policy, seed, epoch), emphases)["even"] for epoch in (2, 3))
    rows = [dict(run="after a step: fresh samples", seed=seed, T=T, cosine=cosine(true, again))]
    for name, short in dict(SF="even", IS="IS", **{"IS unclipped": "IS unclipped"}).items():
        signal, noise = signal_and_noise(old[short])
        rows.append(dict(run=f"after a step: {name}", seed=seed, T=T, signal=signal, noise=noise,
                         cosine=cosine(old[short], true)))
    return rows


if __name__ == "__main__":
    main()
