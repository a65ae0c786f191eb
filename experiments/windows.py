"""Noise in a window of denoising steps alone, and training on these: MixGRPO's windows [arXiv 2507.21802].

    python experiments/windows.py       an hour on 2 CPU cores; writes windows.csv, goes on where it was stopped

The other steps are taken with eta = 0, and the pictures of a group have one prompt and one x_T, as in MixGRPO. So all
of what makes one of them better than another happened in the steps that are trained on. The window stands still, or
moves from the noisiest steps to the last ones over the epochs. Beside it: the default, the default in such groups, and
noise in every step but training on the first ones alone, as in Flow-GRPO. All else is the laptop preset's; the reward
is the JPEG size. After each epoch the same held-out pictures are drawn, always with noise in every step.
"""
import sys
import time
from functools import partial
from typing import NamedTuple

import numpy as np
from gradient_noise import learner_of
from judges import recognised
from results import ROOT, read_rows, write_rows
from run import SEEDS
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from ddpo_min.advantages import clipped_advantages
from ddpo_min.ddim import ddim_steps, with_noise_in
from ddpo_min.ddpo import ddpo_update, even_emphasis
from ddpo_min.files import run_script
from ddpo_min.plan import Plan, micro_batches
from ddpo_min.policy import Policy
from ddpo_min.prompts import draw_prompts, find_prompts, held_out
from ddpo_min.rewards import jpeg
from ddpo_min.rollout import sample_trajectories
from ddpo_min.settings import Settings

T, HELD_OUT = Settings.steps, Settings.eval_samples


class Way(NamedTuple):
    """How a run draws and trains."""
    epochs: int = 8
    window: int = T             # so many steps have noise,
    moves: bool = False         # the first ones, or others in each epoch
    trained: int = T            # of these the first so many are trained on,
    fraction: float = 1.0       # or of those a share that is drawn anew for each minibatch
    group: int = 1              # so many samples share prompt and x_T and are compared with each other; 1: see train.py


# An epoch costs a pass for each step that draws, and three for each that is trained on: all take about as long
WAYS = {"the default": Way(fraction=0.5), "noise everywhere, training on the first 4": Way(trained=4),
        "the default, in groups": Way(fraction=0.5, group=8), "noise in the first 4": Way(window=4, group=8),
        "noise in 4, moving": Way(window=4, moves=True, group=8),
        "noise in 2, moving": Way(epochs=11, window=2, moves=True, group=8)}


def window_of(way, epoch):
    """The steps that have noise in this epoch, a range."""
    start = round((T - way.window) * epoch / (way.epochs - 1)) if way.moves else 0
    return range(start, start + way.window)


def score(rewards, images, prompts, first):
    """Add the rewards of a micro-batch to the list."""
    rewards.extend(jpeg(images, prompts))


def train(learner, seed, way, samples=Settings.samples):
    """DDPO; yields what an epoch has logged: {name: number}, with the mean reward of its samples and its seconds."""
    s, steps, prompts_to_train = Settings(), ddim_steps(T), find_prompts("animals")
    for epoch in range(way.epochs):
        began, rewards, window = time.perf_counter(), [], window_of(way, epoch)
        policy = Policy(learner.model, with_noise_in(steps, window), s.guidance, lora=learner.lora)
        plan = Plan(samples, s.updates, s.batch, steps=window[:way.trained], fraction=way.fraction)
        prompts, seeds = draw_prompts(prompts_to_train, samples, seed=seed, epoch=epoch, group_size=way.group)
        trajectories = sample_trajectories(policy, prompts, seeds, plan.rollout(), on_images=partial(score, rewards),
                                           samples_per_start=way.group)
        advantages = clipped_advantages(prompts, np.array(rewards), normalise="group" if way.group > 1 else s.normalise,
                                        clip=s.advantage_clip, group_size=way.group, statistics=learner.statistics)
        logged = ddpo_update(policy, learner.optimizer, trajectories, advantages,
                             np.random.default_rng([seed, epoch, 1]), plan=plan, clip_range=s.clip_range,
                             emphasis=even_emphasis(steps))
        yield dict(reward=np.mean(rewards), seconds=time.perf_counter() - began,
                   **{name: logged[name] for name in ("approx_kl", "clip_fraction", "grad_norm")})


def evaluate(learner):
    """The held-out pictures, drawn with noise in every step: their JPEG size and how many are recognised."""
    policy = Policy(learner.model, ddim_steps(T), Settings.guidance, lora=learner.lora)
    prompts, seeds = held_out(find_prompts("animals"), HELD_OUT)
    images = sample_trajectories(policy, prompts, seeds, micro_batches(0, HELD_OUT, 45), keep="images").images
    return dict(held_out=jpeg(images, prompts).mean(), held_out_recognised=recognised(images, prompts).mean())


def rows_of(run, seed):
    """A run as rows, as in run.py: what is held out, and what the epoch that begins there has logged."""
    learner, elapsed, rows = learner_of(seed), 0.0, []
    measured = evaluate(learner)
    for logged in tqdm(train(learner, seed, WAYS[run]), f"{run}, seed {seed}", WAYS[run].epochs):
        rows.append(logged | measured | dict(seconds=elapsed))
        elapsed, measured = elapsed + logged["seconds"], evaluate(learner)
    rows.append(measured | dict(seconds=elapsed))
    return [dict(run=run, seed=seed, epoch=epoch, queries=epoch * Settings.samples, **row)
            for epoch, row in enumerate(rows)]


def main():
    rows = read_rows("windows")
    for seed in SEEDS:          # a table that has some seed of a run but not all is not finished, see run.py
        for run in WAYS:
            if (run, seed) not in {(row["run"], row["seed"]) for row in rows}:
                rows += rows_of(run, seed)
                write_rows("windows", sorted(rows, key=lambda row: (list(WAYS).index(row["run"]), row["seed"])))


if __name__ == "__main__":
    run_script(main, __doc__)
