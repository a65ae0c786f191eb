"""Train a diffusion model on a reward, by DDPO or by reward-weighted regression:  python train.py --reward jpeg

The loop of `main` is the algorithm: sample, score, advantage, update, log. Every setting is a flag (--help) and
explained in ddpo_min/settings.py; sampling is in ddpo_min/rollout.py, the update in ddpo_min/update.py, files and
figures in ddpo_min/run.py.
"""
import time
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from ddpo_min.advantages import PromptStatistics
from ddpo_min.ddim import ddim_steps
from ddpo_min.files import InputError, NotFinite, run_main
from ddpo_min.machine import peak_memory_mb, pick_device, prepare
from ddpo_min.prompts import draw, evaluation_prompts, find_prompts, held_out
from ddpo_min.rewards import Scorer, check_rewards, find_reward
from ddpo_min.rollout import Policy, rescore, sample_trajectories
from ddpo_min.run import Run, Trainable, resumed_settings
from ddpo_min.settings import ON_RESUME, describe, parse
from ddpo_min.update import Optimiser, advantages_of, ddpo_update, rwr_update, weights_of
from ddpo_min.weights import SHIPPED, load_stable_diffusion


def main(arguments=None):
    settings, given = parse(arguments)
    if settings.resume:
        changes = {name: getattr(settings, name) for name in given & ON_RESUME}
        settings = resumed_settings(settings.resume, given, changes)
    trained_prompts = find_prompts(settings.prompts)
    test_prompts = evaluation_prompts(settings.eval_prompts, trained_prompts)
    test_prompts, test_seeds = held_out(test_prompts, settings.eval_samples)
    weights_in_sum, names = check_rewards(settings)
    parts = [name for name in names if name != settings.reward]     # of a sum, and what is watched
    few = settings.samples < 4 * len(trained_prompts) and settings.group_size < 4
    if settings.regression and settings.normalise == "prompt" and few:
        raise InputError(f"--algorithm {settings.algorithm}: {settings.samples} samples are fewer than 4 for each "
                         f"of {len(trained_prompts)} prompts, too few to compare; take more --samples, or "
                         "--normalise round")
    device = pick_device(settings.device, settings.dtype)
    run = Run(settings, arguments)
    print(describe(settings))

    model = load_stable_diffusion(settings.weights or SHIPPED, device, getattr(torch, settings.dtype))
    scorer = Scorer(weights_in_sum, {name: find_reward(name, settings, model, device) for name in names})
    torch.manual_seed(settings.seed)
    trained = Trainable(model, settings.trainable, settings.rank, run.init_lora)
    parameters = list(trained.state().values())
    optimiser = Optimiser(parameters, settings)
    policy = Policy(model, ddim_steps(settings.steps, settings.eta), settings.guidance, trained.layers)
    settings = run.settings = replace(settings, batch=prepare(policy, parameters, settings))
    training_policy = policy if settings.guidance_in_training == "on" else replace(policy, guidance=1.0)
    statistics = PromptStatistics(settings.prompt_buffer, settings.prompt_minimum)
    share = settings.samples // settings.updates

    shown = np.linspace(0, min(len(set(test_prompts)), settings.eval_samples) - 1, 10).astype(int)
    shown = sorted(set(shown.tolist()))

    def sample(prompts, seeds, finished=None):
        return sample_trajectories(policy, prompts, seeds, settings.batch, model.latent_size, share=share,
                                   whole=not settings.regression, finished=finished)

    def evaluate():
        images = []

        def keep(group, prompts):
            images.append(group)
            scorer.add(group, prompts)

        sample(test_prompts, test_seeds, keep)
        return np.concatenate(images), *scorer.take()

    def evaluate_meanwhile():
        """The figures of an evaluation; none if a reward fails, for the epoch just finished must not be lost."""
        try:
            _, rewards, scores = evaluate()
        except NotFinite:
            raise
        except InputError as error:
            scorer.forget()
            bar.write(f"no evaluation this time: {error}")
            return {}
        return dict(eval_reward=rewards.mean(), **{f"eval_score_{name}": scores[name].mean() for name in parts})

    print(f"  {model.report}, on {device}")
    if settings.resume:
        first = run.load(trained, optimiser, statistics)
        run.start()
    else:
        first = 0
        images, rewards, scores = evaluate()
        run.start()             # only now: a reward that cannot work leaves no folder behind
        print(f"  {settings.reward} on {settings.eval_samples} held-out seeds: {rewards.mean():.3f}; to {run.folder}/")
        run.keep_before(images, rewards, scores)
        run.show(0, images[shown])
        run.save(0, trained, optimiser, statistics)

    passes = 1 + settings.inner_epochs
    bar = tqdm(initial=first * settings.samples * passes, total=settings.epochs * settings.samples * passes,
               unit="sample", smoothing=0.05)

    def drawn(images, prompts):         # scoring runs beside the sampling of the next group
        scorer.add(images, prompts)
        bar.update(len(images))

    finished = first
    try:
        for epoch in range(first, settings.epochs):
            begin = time.time()
            prompts, seeds = draw(trained_prompts, settings.samples, settings.seed, epoch, settings.group_size)
            bar.set_description(f"epoch {epoch + 1}/{settings.epochs} sampling")
            trajectories = sample(prompts, seeds, drawn)                                                    # sample

            rewards, scores = scorer.take()                                                                 # score
            bar.set_postfix_str(f"reward {rewards.mean():.3f}")
            sampled = time.time()

            rng = np.random.default_rng([settings.seed, epoch, 1])
            bar.set_description(f"epoch {epoch + 1}/{settings.epochs} training")
            if settings.regression:
                weights = weights_of(prompts, rewards, settings)                                            # advantage
                metrics = rwr_update(training_policy, optimiser, trajectories, weights, settings, rng,      # update
                                     bar.update)
            else:
                advantages = advantages_of(statistics, prompts, rewards, settings)                          # advantage
                advantages = torch.as_tensor(advantages, dtype=torch.float32, device=device)
                if training_policy is not policy:
                    trajectories.log_p_old = rescore(training_policy, trajectories, settings.batch, share)
                metrics = ddpo_update(training_policy, optimiser, trajectories, advantages, settings, rng,  # update
                                      bar.update)
            trained_at = time.time()

            if settings.eval_every and (epoch + 1) % settings.eval_every == 0:
                metrics.update(evaluate_meanwhile())
            metrics.update({f"score_{name}": scores[name].mean() for name in parts})
            bar.write(run.log(epoch + 1, dict(                                                              # log
                reward_mean=rewards.mean(), reward_std=rewards.std(), reward_min=rewards.min(),
                reward_max=rewards.max(), **metrics, sampling_images_per_s=settings.samples / (sampled - begin),
                training_images_per_s=settings.samples * settings.inner_epochs / (trained_at - sampled),
                peak_memory_mb=peak_memory_mb(device))))
            run.save(epoch + 1, trained, optimiser, statistics)
            finished = epoch + 1
            if finished % settings.show_every == 0 and finished < settings.epochs:
                run.show(finished, sample([test_prompts[i] for i in shown], [test_seeds[i] for i in shown]).images)
    except KeyboardInterrupt:
        finished = run.load(trained, optimiser, statistics)
        scorer.forget()
        bar.write(f"stopped after epoch {finished}; go on with --resume {run.folder} --epochs {settings.epochs}")
    except InputError as error:
        finished = run.load(trained, optimiser, statistics)
        run.save_trained(trained, finished)
        raise InputError(f"{error}; {finished} finished epochs are saved, go on with --resume {run.folder}")
    finally:
        bar.close()

    print("evaluating on the held-out seeds ...")
    run.save_trained(trained, finished)         # before anything else can fail
    images, rewards, scores = evaluate()
    run.show(finished, images[shown])
    print(run.finish(trained, test_prompts, images, rewards, scores, shown, finished))
    print(f"Look at {run.folder}/before_after.png, samples.png, curve.png; {trained.file} has what was learned.")


if __name__ == "__main__":
    run_main(main)
