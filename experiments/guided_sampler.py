"""Guide the sampler by the reward's gradient instead of training: the comparison of the paper's table 1.

    python experiments/guided_sampler.py      17 minutes on 2 CPU cores; writes guided_sampler.csv

Universal guidance [Bansal et al. 2023] shifts the predicted noise against the gradient of the reward of x0_hat:

    eps <- eps - scale sqrt(1 - alpha_bar_t) d r(decode(x0_hat)) / d x_t

It needs no training, but a reward that can be differentiated, and a backward pass through the UNet, the decoder and the
reward at each step of every picture. The reward is the aesthetic head; pictures are the held-out ones of train.py.
"""
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from judges import recognised
from results import ROOT, write_rows
from run import RULE, SEEDS, rows_of, train_in
from tqdm import tqdm

sys.path[:0] = [str(ROOT), str(ROOT / "weights")]
import rater  # noqa: E402
from ddpo_min import load_stable_diffusion  # noqa: E402
from ddpo_min.clip_rewards import AestheticReward, aesthetic  # noqa: E402
from ddpo_min.ddim import ddim_steps, x0_hat  # noqa: E402
from ddpo_min.files import run_script  # noqa: E402
from ddpo_min.plan import micro_batches  # noqa: E402
from ddpo_min.policy import Policy  # noqa: E402
from ddpo_min.prompts import find_prompts, held_out  # noqa: E402
from ddpo_min.rollout import sample_trajectories  # noqa: E402
from ddpo_min.settings import Settings  # noqa: E402

SCALES = (0, 0.5, 1, 2, 4, 8, 16)
SAMPLES = 180


def differentiable(reward, vae, x_0):
    """The aesthetic score of latents (B, 4, h, w), with a gradient: (B,)."""
    pictures = vae.decode(x_0).clamp(-1, 1)
    return reward.head(F.normalize(reward.scorer.model.encode_image(pictures).float(), dim=-1))


@dataclass
class GuidedPolicy(Policy):
    """The policy whose predicted noise is shifted to where the reward of x0_hat rises."""
    reward: AestheticReward = None
    scale: float = 0.0

    def eps(self, x_t, t, context, guidance):
        if not self.scale:
            return super().eps(x_t, t, context, guidance)
        alpha_bar = self.steps.alpha_bar[self.steps.t.index(t)]
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_(True)
            eps = super().eps(x_t, t, context, guidance)
            score = differentiable(self.reward, self.model.vae, x0_hat(x_t, eps, alpha_bar)).sum()
        return eps.detach() - self.scale * (1 - alpha_bar) ** 0.5 * torch.autograd.grad(score, x_t)[0]


def main():
    model, reward, rows = load_stable_diffusion(device="cpu"), aesthetic("cpu", small=True), []
    after_training = [trained(seed) for seed in SEEDS]
    all_prompts, all_seeds = held_out(find_prompts("animals"), SAMPLES * len(SEEDS))
    for scale in tqdm(SCALES, "scales"):
        policy = GuidedPolicy(model, ddim_steps(Settings.steps), Settings.guidance, reward=reward, scale=scale)
        for seed in SEEDS:
            began, own = time.perf_counter(), slice(SAMPLES * seed, SAMPLES * (seed + 1))
            prompts, seeds = all_prompts[own], all_seeds[own]
            images = sample_trajectories(policy, prompts, seeds, micro_batches(0, SAMPLES, 45), keep="images").images
            rows.append(dict(run=f"scale {scale:g}", seed=seed, scale=scale, held_out=reward(images, prompts).mean(),
                             held_out_rule=rater.rule(images).mean(), seconds=time.perf_counter() - began,
                             held_out_recognised=recognised(images, prompts).mean()))
    write_rows("guided_sampler", rows + after_training)


def trained(seed):
    """The row of DDPO: its held-out evaluation after training; seconds of sampling and training. An interrupted one is
    resumed."""
    folder = ROOT / "runs" / "experiments" / "guided_sampler" / f"DDPO-{seed}"
    train_in(folder, ["--reward", "aesthetic", *RULE, "--seed", str(seed)], f"guided_sampler: DDPO, seed {seed}")
    after = rows_of(folder)[-1]
    return dict(run="DDPO", seed=seed, **{name: after[name] for name in ("held_out", "held_out_rule", "seconds",
                                                                         "held_out_recognised")})


if __name__ == "__main__":
    run_script(main, __doc__)
