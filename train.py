"""Train a text-to-image diffusion model on a reward:  python train.py --reward jpeg

DDPO [arXiv 2305.13301]: denoising is a sequence of decisions. The state is (prompt c, step t, latent x_t); the action
is the next latent x_prev, drawn from a Gaussian whose log-probability is known; the reward comes once, for the finished
picture. The loop in train() is the outline of the algorithm: sample, score, advantage, update, log.

An epoch samples pictures and trains on them in inner epochs (passes), a pass in minibatches (an optimizer step each), a
minibatch in micro-batches (the samples that go through the network together, at one denoising step).
What is left out: a learned value function (a picture is compared with others, by default of its prompt) and samplers
other than DDIM. Read next, in ddpo_min/: rollout.py (sample), advantages.py, ddpo.py (update), plan.py (minibatches).
"""
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ddpo_min.advantages import PromptStatistics, clipped_advantages
from ddpo_min.cli import check_settings, describe, read_settings, with_own_reward
from ddpo_min.ddim import ddim_steps, with_noise_in
from ddpo_min.ddpo import ddpo_update, even_emphasis
from ddpo_min.device import pick_device
from ddpo_min.evaluation import Evaluation
from ddpo_min.files import run_main
from ddpo_min.forward_process import forward_process_update
from ddpo_min.learner import Learner
from ddpo_min.memory import prepare
from ddpo_min.plan import Plan
from ddpo_min.policy import Policy
from ddpo_min.processes import count, rank, together
from ddpo_min.prompts import draw_prompts, evaluation_prompts, find_prompts
from ddpo_min.rollout import sample_trajectories
from ddpo_min.run import Run
from ddpo_min.rwr import rwr_sparse_weights, rwr_update, rwr_weights
from ddpo_min.scorer import make_scorer
from ddpo_min.weights import SHIPPED, is_small, load_stable_diffusion


def train(settings, reward=None):
    """Train as the settings say; returns the Run, with its folder, history and result.

    reward: a function (images uint8 (B, H, W, 3), prompts) -> B numbers, in place of the one in settings.reward.
    From Python: train(make_settings(epochs=3), reward=my_function). After Ctrl-C the run ends at its last finished
    epoch. Raises InputError for what cannot work.
    """
    if reward is not None:
        settings = with_own_reward(settings, reward)
    check_settings(settings, own_reward=reward is not None)
    print(describe(settings))
    prompts_to_train = find_prompts(settings.prompts)
    prompts_held_out = evaluation_prompts(settings.eval_prompts, prompts_to_train)
    device = pick_device(settings.device, settings.dtype)
    run = Run(settings)
    model = load_stable_diffusion(settings.weights or SHIPPED, device, getattr(torch, settings.dtype),
                                  settings.prediction, settings.size)
    print(f"  {model.report}, on {device}")
    scorer = make_scorer(settings.reward, settings.watch, model, device, own=reward, prompts=prompts_to_train,
                         small=is_small(settings.weights), **settings.reward_models)
    learner = Learner(model, trainable=settings.trainable, rank=settings.rank, init_lora=run.init_lora,
                      statistics=PromptStatistics(settings.prompt_buffer, settings.prompt_minimum), seed=settings.seed,
                      lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.adam_eps,
                      weight_decay=settings.weight_decay, grad_clip=settings.grad_clip,
                      scale_loss=settings.dtype == "float16", ema=settings.ema, policy_ema=settings.policy_ema)
    steps = ddim_steps(settings.steps, settings.eta, model.alpha_bar)
    # log_p_old is computed with training's guidance, too (1.0 is none): the first ratio is 1 all the same
    policy = Policy(model, with_noise_in(steps, settings.noise_window), settings.guidance, lora=learner.lora,
                    training_guidance=settings.guidance if settings.guidance_in_training else 1.0)
    minibatch = settings.samples // settings.updates
    settings = run.settings = replace(settings, batch=prepare(          # --batch auto becomes a number
        policy, learner.optimizer.parameters, batch=settings.batch, minibatch=minibatch,
        checkpointing=settings.checkpointing, compile=settings.compile))
    plan = Plan(settings.samples, settings.updates, settings.batch, settings.window, settings.timestep_fraction,
                settings.inner_epochs, run.progress, rank(), count())
    evaluation = Evaluation.of(replace(policy, steps=steps), scorer, prompts_held_out, settings.eval_samples,
                               micro_batch=min(settings.batch, minibatch))      # a larger one may not fit into memory
    weigh, update, keep = choose_algorithm(settings, plan, policy.steps, learner.statistics, scorer)

    with run.epochs(learner, evaluation) as epochs:
        for epoch in epochs:
            prompts, seeds = draw_prompts(prompts_to_train, settings.samples, seed=settings.seed, epoch=epoch,
                                          group_size=settings.group_size)
            trajectories = sample_trajectories(policy, prompts, seeds, plan.rollout(), keep=keep,   # sample
                                               on_images=scorer.add, samples_per_start=settings.samples_per_start)
            rewards, scores = scorer.collect()                                                      # score
            advantages = weigh(prompts, rewards)                                                    # advantage
            rng = np.random.default_rng([settings.seed, epoch, 1])      # draw_prompts has [seed, epoch]
            metrics = update(policy, learner.optimizer, trajectories, advantages, rng)              # update
            run.log(epoch, rewards, scores, metrics)                                                # log
    return run


def choose_algorithm(s, plan, steps, statistics, scorer):
    """The parts in which algorithms differ: (weigh, update, keep).

    weigh: (prompts, rewards) -> advantages (rwr: weights of the samples); update: trains on them; keep: what is kept of
    each trajectory, the whole "path" or "x_0" alone.
    """
    if s.regression:        # rwr, rwr_sparse
        weigh = (partial(rwr_weights, beta=s.inverse_temperature) if s.algorithm == "rwr" else
                 partial(rwr_sparse_weights, percentile=s.percentile))
        return partial(weigh, per_prompt=s.normalise == "prompt"), partial(rwr_update, plan=plan), "x_0"
    weigh = partial(scorer.weigh_each if s.normalise_each else clipped_advantages, normalise=s.normalise,
                    clip=s.advantage_clip, group_size=s.group_size, statistics=statistics)
    if s.forward_process:   # awm, nft, ram
        update = partial(forward_process_update, plan=plan, algorithm=s.algorithm, timesteps=s.timesteps,
                         grid=s.grid_timesteps, step_weights=s.step_weights, clip_range=s.clip_range, power=s.awm_power,
                         beta=s.nft_beta, advantage_clip=s.advantage_clip, kl_weight=s.kl_weight, kl_old=s.kl_old)
        return weigh, update, "x_0"
    emphasis = even_emphasis(steps) if s.step_weights == "even" else [1.0] * len(steps)
    clip = s.clip_range if s.algorithm == "ddpo_is" else None
    return weigh, partial(ddpo_update, plan=plan, clip_range=clip, emphasis=emphasis, kl_weight=s.kl_weight), "path"


def main(arguments=None):
    """The command; returns the Run."""
    return train(read_settings(arguments))


if __name__ == "__main__":
    run_main(together(main))
