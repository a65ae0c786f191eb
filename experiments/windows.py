"""Noise in a window of denoising steps alone, and training on these: MixGRPO's windows [arXiv 2507.21802].

    python experiments/windows.py       25 minutes on 2 CPU cores; writes windows.csv

The other steps are taken with eta = 0. So all of what makes one picture of a prompt better than another happened in the
steps that are trained on. The window moves from the noisiest steps to the last ones over the epochs. All else is the
laptop preset's: JPEG size, and pictures of the held-out seeds drawn with noise in every step, before and after.
"""
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
from gradient_noise import learner_of
from judges import recognised
from results import ROOT, write_rows
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from ddpo_min.advantages import clipped_advantages
from ddpo_min.ddim import ddim_steps
from ddpo_min.ddpo import ddpo_update, even_emphasis
from ddpo_min.files import run_script
from ddpo_min.plan import Plan, micro_batches
from ddpo_min.policy import Policy
from ddpo_min.prompts import draw_prompts, find_prompts, held_out
from ddpo_min.rewards import jpeg
from ddpo_min.rollout import sample_trajectories
from ddpo_min.settings import Settings

SEEDS, SAMPLES, NONE = (0, 1, 2), 180, 1e-9     # in place of a sigma of 0, by which some functions divide
# {run: (steps in the window, epochs)}; an epoch costs 1 + 3/8 of a pass for each step in it: all take about as long
WINDOWS = {"4 steps, moving": (4, 8), "2 steps, moving": (2, 11), "the first 4 steps": (4, 8)}


def window_of(run, epoch, T):
    """The steps that have noise in this epoch, a range."""
    width, epochs = WINDOWS[run]
    start = round((T - width) * epoch / (epochs - 1)) if "moving" in run else 0
    return range(start, start + width)


def with_noise_in(steps, window):
    """Steps that draw without noise outside a window."""
    return replace(steps, sigma=tuple(s if i in window else NONE for i, s in enumerate(steps.sigma)))


def score(rewards, images, prompts, first):
    """Add the rewards of a micro-batch to the list."""
    rewards.extend(jpeg(images, prompts))


def train(learner, seed, windows, samples=Settings.samples):
    """DDPO, an epoch for each window; yields (mean reward of its samples, seconds)."""
    s, steps, prompts_to_train = Settings(), ddim_steps(Settings.steps), find_prompts("animals")
    for epoch, window in enumerate(windows):
        began, rewards = time.perf_counter(), []
        policy = Policy(learner.model, with_noise_in(steps, window), s.guidance, lora=learner.lora)
        plan = Plan(samples, s.updates, s.batch, steps=window)
        prompts, seeds = draw_prompts(prompts_to_train, samples, seed=seed, epoch=epoch)
        trajectories = sample_trajectories(policy, prompts, seeds, plan.rollout(), on_images=partial(score, rewards))
        advantages = clipped_advantages(prompts, np.array(rewards), normalise=s.normalise, clip=s.advantage_clip,
                                        statistics=learner.statistics)
        ddpo_update(policy, learner.optimizer, trajectories, advantages, np.random.default_rng([seed, epoch, 1]),
                    plan=plan, clip_range=s.clip_range, emphasis=even_emphasis(steps))
        yield np.mean(rewards), time.perf_counter() - began


def evaluate(learner):
    """The held-out pictures, drawn with noise in every step: their JPEG size and how many are recognised."""
    policy = Policy(learner.model, ddim_steps(Settings.steps), Settings.guidance, lora=learner.lora)
    prompts, seeds = held_out(find_prompts("animals"), SAMPLES)
    images = sample_trajectories(policy, prompts, seeds, micro_batches(0, SAMPLES, 45), keep="images").images
    return dict(held_out=jpeg(images, prompts).mean(), held_out_recognised=recognised(images, prompts).mean())


def main():
    rows, before = [], evaluate(learner_of(0))
    for run, (_, epochs) in WINDOWS.items():
        for seed in SEEDS:
            learner, elapsed, own = learner_of(seed), 0.0, []
            windows = [window_of(run, epoch, Settings.steps) for epoch in range(epochs)]
            for reward, seconds in tqdm(train(learner, seed, windows), f"{run}, seed {seed}", epochs):
                own.append(dict(seconds=elapsed, reward=reward))
                elapsed += seconds
            own = [own[0] | before, *own[1:], dict(seconds=elapsed) | evaluate(learner)]
            rows += [dict(run=run, seed=seed, epoch=epoch, queries=epoch * Settings.samples, **row)
                     for epoch, row in enumerate(own)]
    write_rows("windows", rows)


if __name__ == "__main__":
    run_script(main, __doc__)
