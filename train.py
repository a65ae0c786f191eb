"""Train a diffusion model on a reward by DDPO:  python train.py --reward jpeg

The loop of `main` is the algorithm: sample, score, advantage, update, log. Every setting is a flag (--help) and
explained in ddpo_min/settings.py; everything about files and figures is in ddpo_min/run.py.
"""
import time

import numpy as np
import torch
from tqdm import tqdm

from ddpo_min.advantages import PromptStatistics
from ddpo_min.ddim import ddim_steps, step_weights
from ddpo_min.files import InputError, run_main
from ddpo_min.lora import add_lora
from ddpo_min.losses import ddpo_is_loss, ddpo_sf_loss
from ddpo_min.prompts import draw, find_prompts, held_out
from ddpo_min.rewards import find_reward, score
from ddpo_min.rollout import Policy, groups, sample_trajectories
from ddpo_min.run import Run, peak_memory_mb, pick_device, resumed_settings
from ddpo_min.settings import describe, parse
from ddpo_min.weights import SHIPPED, load_stable_diffusion


def update(policy, parameters, optimizer, trajectories, advantages, settings, rng, progress):
    """Improve the policy on one epoch's trajectories by settings.updates optimiser steps (times inner epochs).

    The gradient of an optimiser step is the mean over its share of the samples and over their denoising steps.
    trajectories: N samples; advantages: float32 (N,); rng: numpy Generator; progress: called with samples done.
    Returns {metric: mean over everything that was trained on}; max_ratio_error is of the first update alone.
    """
    share, T = settings.samples // settings.updates, len(policy.steps)
    count = max(1, round(settings.timestep_fraction * T))
    emphasis = np.array([1 / w for w in step_weights(policy.steps)] if settings.step_weights == "even" else [1.0] * T)
    emphasis = emphasis / emphasis.mean()
    history, grad_norms, max_ratio_error = [], [], None
    for inner in range(settings.inner_epochs):
        for first in rng.permutation(np.arange(0, settings.samples, share)):
            chosen_steps = np.sort(rng.permutation(T)[:count]).tolist()
            for start, stop in groups(share, share, settings.batch):
                index = torch.arange(first + start, first + stop, device=trajectories.latents.device)
                context, empty = trajectories.context(index)
                advantage = advantages[index]
                for i in chosen_steps:
                    x_t, x_prev = trajectories.latents[index, i], trajectories.latents[index, i + 1]
                    log_p_old = trajectories.log_p_old[index, i]
                    _, log_p = policy.step(x_t, i, context, empty, x_prev=x_prev)
                    if settings.algorithm == "ddpo_is":
                        loss, ratio = ddpo_is_loss(log_p, log_p_old, advantage, settings.clip_range)
                    else:
                        loss, ratio = ddpo_sf_loss(log_p, advantage), torch.exp(log_p - log_p_old)
                    (emphasis[i] * loss * len(index) / (share * count)).backward()
                    error = (ratio.detach() - 1).abs()
                    history.append((i, len(index), loss.item(), 0.5 * ((log_p.detach() - log_p_old) ** 2).mean().item(),
                                    (error > settings.clip_range).float().mean().item(), error.max().item()))
                progress(len(index))
            if max_ratio_error is None:     # so far the policy is the one that sampled
                max_ratio_error = max(error for *_, error in history)
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
            if not torch.isfinite(norm):
                raise InputError("the gradient is no longer finite; start again with a smaller --lr")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            grad_norms.append(norm.item())
    step, weight, loss, approx_kl, clipped, _ = np.array(history).T
    by_step = [float(np.average(clipped[step == i], weights=weight[step == i])) if (step == i).any() else None
               for i in range(T)]
    return dict(loss=np.average(loss, weights=weight), approx_kl=np.average(approx_kl, weights=weight),
                clip_fraction=np.average(clipped, weights=weight), grad_norm=np.mean(grad_norms),
                max_ratio_error=max_ratio_error, clip_fraction_by_step=by_step)


def main(arguments=None):
    settings, given = parse(arguments)
    if settings.resume:
        settings = resumed_settings(settings.resume, given, {k: getattr(settings, k) for k in given & {"epochs", "device"}})
    prompts, reward = find_prompts(settings.prompts), find_reward(settings.reward)
    device = pick_device(settings.device)
    run = Run(settings)
    print(describe(settings))

    model = load_stable_diffusion(settings.weights or SHIPPED, device, getattr(torch, settings.dtype))
    torch.manual_seed(settings.seed)
    layers = add_lora(model.unet, settings.rank)
    parameters = [p for layer in layers.values() for p in (layer.lora_A.weight, layer.lora_B.weight)]
    optimizer = torch.optim.AdamW(parameters, settings.lr, (settings.beta1, settings.beta2), settings.adam_eps,
                                  settings.weight_decay)
    policy = Policy(model, ddim_steps(settings.steps, settings.eta), settings.guidance)
    statistics = PromptStatistics(settings.prompt_buffer, settings.prompt_minimum)

    test_prompts, test_seeds = held_out(prompts, settings.eval_samples)
    shown = np.linspace(0, min(len(prompts), settings.eval_samples) - 1, 10).astype(int)
    shown = sorted(set(shown.tolist()))

    def sample(prompts, seeds, progress=lambda done: None):
        return sample_trajectories(policy, prompts, seeds, settings.batch, model.latent_size,
                                   share=settings.samples // settings.updates, progress=progress)

    run.start()
    print(f"  {model.report}\n  on {device}, to {run.folder}/")
    if settings.resume:
        first = run.load(layers, optimizer, statistics)
    else:
        first = 0
        images = sample(test_prompts, test_seeds).images
        run.keep_before(images, score(reward, images, test_prompts))
        run.show(0, images[shown])
        run.save(0, layers, optimizer, statistics)

    passes = 1 + settings.inner_epochs
    bar = tqdm(initial=first * settings.samples * passes, total=settings.epochs * settings.samples * passes,
               unit="sample", smoothing=0.05)
    finished = first
    try:
        for epoch in range(first, settings.epochs):
            begin = time.time()
            batch_prompts, seeds = draw(prompts, settings.samples, settings.seed, epoch)
            bar.set_description(f"epoch {epoch + 1}/{settings.epochs} sampling")
            trajectories = sample(batch_prompts, seeds, bar.update)                                         # sample

            rewards = score(reward, trajectories.images, batch_prompts)                                     # score
            bar.set_postfix_str(f"reward {rewards.mean():.3f}")
            sampled = time.time()

            advantages = statistics.advantages(batch_prompts, rewards)                                      # advantage
            advantages = advantages.clip(-settings.advantage_clip, settings.advantage_clip)

            bar.set_description(f"epoch {epoch + 1}/{settings.epochs} training")
            metrics = update(policy, parameters, optimizer, trajectories,                                   # update
                             torch.as_tensor(advantages, dtype=torch.float32, device=device), settings,
                             np.random.default_rng([settings.seed, epoch, 1]), bar.update)
            trained = time.time()

            bar.write(run.log(epoch + 1, dict(                                                              # log
                reward_mean=rewards.mean(), reward_std=rewards.std(), reward_min=rewards.min(),
                reward_max=rewards.max(), **metrics, sampling_images_per_s=settings.samples / (sampled - begin),
                training_images_per_s=settings.samples * settings.inner_epochs / (trained - sampled),
                peak_memory_mb=peak_memory_mb(device))))
            run.save(epoch + 1, layers, optimizer, statistics)
            finished = epoch + 1
            if finished % settings.show_every == 0 and finished < settings.epochs:
                run.show(finished, sample([test_prompts[i] for i in shown], [test_seeds[i] for i in shown]).images)
    except KeyboardInterrupt:
        finished = run.load(layers, optimizer, statistics)
        bar.write(f"stopped after epoch {finished}; go on with --resume {run.folder} --epochs {settings.epochs}")
    finally:
        bar.close()

    print("evaluating on the held-out seeds ...")
    images = sample(test_prompts, test_seeds).images
    run.show(finished, images[shown])
    before, after = run.finish(layers, test_prompts, images, score(reward, images, test_prompts), shown, finished)
    print(f"{settings.reward} on {settings.eval_samples} held-out seeds: {before:.3f} before, {after:.3f} after "
          f"{finished} epochs ({100 * (after - before) / abs(before):+.1f}%), {(time.time() - run.started) / 60:.1f} "
          f"minutes.\nLook at {run.folder}/before_after.png, samples.png, curve.png; lora.safetensors holds the LoRA.")


if __name__ == "__main__":
    run_main(main)
