"""Guide the sampler by the reward's gradient instead of training: the comparison of the paper's table 1.

    python experiments/guided_sampler.py      15 minutes on 2 CPU cores; writes guided_sampler.csv

Universal guidance [Bansal et al. 2023] shifts the predicted noise against the gradient of the reward of x0_hat:

    eps <- eps - scale sqrt(1 - alpha_bar_t) d r(decode(x0_hat)) / d x_t

It needs no training, but a reward that can be differentiated, and a backward pass through the UNet, the decoder and the
reward at each step of every picture. The reward is the aesthetic head; pictures are the held-out ones of train.py.
"""
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from judges import recognised
from results import ROOT, write_rows
from tqdm import tqdm

sys.path[:0] = [str(ROOT), str(ROOT / "weights")]
import rater  # noqa: E402
from ddpo_min import load_stable_diffusion  # noqa: E402
from ddpo_min.clip_rewards import aesthetic  # noqa: E402
from ddpo_min.ddim import ddim_step, ddim_steps, x0_hat  # noqa: E402
from ddpo_min.plan import micro_batches  # noqa: E402
from ddpo_min.policy import Policy  # noqa: E402
from ddpo_min.prompts import HELD_OUT, find_prompts  # noqa: E402
from ddpo_min.rollout import sample_noise  # noqa: E402
from ddpo_min.vae import decode_images  # noqa: E402

SCALES = (0, 0.5, 1, 2, 4, 8, 16)
SEEDS, SAMPLES = (0, 1, 2), 180


def differentiable(reward, vae, x_0):
    """The aesthetic score of latents (B, 4, h, w), with a gradient: (B,)."""
    pictures = vae.decode(x_0).clamp(-1, 1)
    return reward.head(F.normalize(reward.scorer.model.encode_image(pictures).float(), dim=-1))


def guided_eps(policy, reward, x_t, i, context, scale):
    """The predicted noise, shifted to where the reward of x0_hat rises."""
    steps = policy.steps
    x_t = x_t.detach().requires_grad_(True)
    eps = policy.eps(x_t, steps.t[i], context, policy.guidance)
    score = differentiable(reward, policy.model.vae, x0_hat(x_t, eps, steps.alpha_bar[i])).sum()
    return eps.detach() - scale * (1 - steps.alpha_bar[i]) ** 0.5 * torch.autograd.grad(score, x_t)[0]


def draw(policy, reward, prompts, seeds, scale):
    """Pictures, uint8 (N, 64, 64, 3)."""
    drawn = []
    for samples in micro_batches(0, len(prompts), 45):
        noise = sample_noise(seeds[samples], len(policy.steps), (4, 16, 16))
        context, x = policy.model.encode_prompts(prompts[samples]), noise[:, 0]
        for i in range(len(policy.steps)):
            if scale:
                eps = guided_eps(policy, reward, x, i, context, scale)
            else:
                with torch.no_grad():
                    eps = policy.eps(x, policy.steps.t[i], context, policy.guidance)
            x, _ = ddim_step(x, eps, policy.steps, i, noise[:, i + 1])
        drawn.append(decode_images(policy.model.vae, x))
    return np.concatenate(drawn)


def main():
    model = load_stable_diffusion(device="cpu")
    reward, policy = aesthetic("cpu", small=True), Policy(model, ddim_steps(8), 1.0)
    prompts, rows = [find_prompts("animals")[i % 45] for i in range(SAMPLES)], []
    for scale in tqdm(SCALES, "scales"):
        for seed in SEEDS:
            began = time.perf_counter()
            images = draw(policy, reward, prompts, [HELD_OUT + SAMPLES * seed + i for i in range(SAMPLES)], scale)
            rows.append(dict(run=f"scale {scale:g}", seed=seed, scale=scale, held_out=reward(images, prompts).mean(),
                             held_out_rule=rater.rule(images).mean(), seconds=time.perf_counter() - began,
                             held_out_recognised=recognised(images, prompts).mean()))
    write_rows("guided_sampler", rows)


if __name__ == "__main__":
    main()
