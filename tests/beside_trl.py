"""The same training by TRL's DDPOTrainer and by train.py: the shipped model, one set of settings, several seeds.

    pip install trl==0.23.1 transformers==4.56.2 diffusers==0.35.2 peft==0.17.1 "accelerate<1.12"
    python tests/beside_trl.py trl              # or trl-1, ddpo-pytorch, flow-grpo: those of docs/coming_from.md
    python tests/beside_trl.py trl --update
    python tests/beside_trl.py --leaderboard    # of some rewards alone: --leaderboard jpeg clip; also with --lr 1e-3
    python tests/beside_trl.py --leaderboard --clock    # the seconds of its epochs again

In an environment of its own, with this project's packages, too: later versions of TRL have no DDPOTrainer. Prints a
line for each epoch with the mean reward of its samples (minus the JPEG size in kB): both sides' mean and deviation over
the seeds, and how many deviations they are apart. With --update: ddpo_update on the samples and advantages of TRL's
first epoch, against what TRL made of them, and the policy's log-probabilities of the second, against TRL's. With
--leaderboard: TRL alone, for its rows in docs/leaderboard.md.
"""
import argparse
import contextlib
import gzip
import io
import json
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import leaderboard

from ddpo_min.cli import flag, make_settings
from ddpo_min.ddim import ddim_steps
from ddpo_min.ddpo import ddpo_update
from ddpo_min.files import run_main
from ddpo_min.lora import add_lora
from ddpo_min.optimizer import Optimizer
from ddpo_min.plan import Plan
from ddpo_min.policy import Policy
from ddpo_min.prompts import find_prompts
from ddpo_min.rollout import Trajectories
from ddpo_min.scorer import find_reward
from ddpo_min.weights import SHIPPED, load_stable_diffusion
from train import train

# What suits the small model, and what TRL's optimizer and losses are
COMMON = dict(steps=8, lr=3e-3, clip_range=0.01, step_weights="paper", timestep_fraction=1.0, beta2=0.999,
              eval_samples=45)
# The batches and statistics of each conversion, the first as on 4 GPUs and as on one, the second on 4 of 8, and of the
# preset laptop; guidance 1 is none
CONVERSIONS = {
    "trl": dict(epochs=8, samples=96, updates=8, guidance=5.0, prompt_buffer=32, prompt_minimum=16),
    "trl-1": dict(epochs=20, samples=24, updates=8, guidance=5.0, prompt_buffer=32, prompt_minimum=16, lr=1e-3),
    "ddpo-pytorch": dict(epochs=5, samples=128, updates=4, guidance=1.0, prompt_buffer=16, prompt_minimum=16),
    "flow-grpo": dict(epochs=5, samples=128, updates=2, guidance=1.0, normalise="group", group_size=16),
    "laptop": dict(epochs=8, samples=256, updates=4, guidance=1.0, prompt_buffer=16, prompt_minimum=8)}
# TRL's in sampling and in training
BATCHES = {"trl": (24, 12), "trl-1": (12, 3), "ddpo-pytorch": (32, 32), "flow-grpo": (64, 64), "laptop": (64, 64)}


def tokenizer(folder):
    """transformers' tokenizer with the vocabulary that open_clip brings along."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe
    from transformers import CLIPTokenizer
    merges = gzip.open(default_bpe()).read().decode().split("\n")[1:49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges),
             "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77,
                         pad_token="<|endoftext|>")


def write_folder(folder):
    """The shipped model as the diffusers folder that TRL's pipeline reads."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffusers_side import diffusers_unet, diffusers_vae
    model = load_stable_diffusion(SHIPPED)
    c = model.text_encoder.config
    unet, vae = diffusers_unet(model.unet.config, sample_size=16), diffusers_vae(model.vae.config)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=c.width, intermediate_size=c.inner, num_hidden_layers=c.layers,
                                        num_attention_heads=c.heads, projection_dim=c.width, hidden_act="quick_gelu"))
    for network, own in ((unet, model.unet), (vae, model.vae), (text, model.text_encoder)):
        state = own.state_dict()
        if "embeddings.token_embedding.weight" in network.state_dict():      # transformers 5 has no text_model
            state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
        network.load_state_dict(state)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer(folder), unet=unet, scheduler=scheduler,
                            safety_checker=None, feature_extractor=None, requires_safety_checker=False
                            ).save_pretrained(folder)


def prompt_function(seed, settings):
    """TRL's: a random prompt each time, or each as often as a group has samples."""
    rng, prompts = np.random.default_rng(seed), find_prompts("animals")
    if settings.normalise != "group":
        return lambda: (prompts[rng.integers(len(prompts))], {})

    def in_groups():
        groups = settings.samples // settings.group_size
        while True:
            for i in rng.permutation(len(prompts))[:groups]:
                yield from [prompts[i]] * settings.group_size

    order = in_groups()
    return lambda: (next(order), {})


def trainer_of(folder, settings, sampling, training):
    """TRL's trainer, and a list to which it adds the rewards of what it samples.

    A group's own statistics are those of its last group_size samples.
    """
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    PartialState()      # TRL's first warning needs it
    s, rewards, score = settings, [], find_reward(settings.reward, **settings.reward_models)
    pipeline = DefaultDDPOStableDiffusionPipeline(str(folder))
    if s.guidance == 1:         # diffusers joins the empty prompt to the given one all the same
        pipeline.sd_pipeline._encode_prompt = lambda *ignored, prompt_embeds, **others: prompt_embeds
    buffer, minimum = ((s.group_size,) * 2 if s.normalise == "group" else (s.prompt_buffer, s.prompt_minimum))

    def reward(images, prompts, metadata):
        pictures = (images * 255).round().clamp(0, 255).byte().cpu().permute(0, 2, 3, 1).numpy()
        rewards.append(score(pictures, list(prompts)))
        return rewards[-1].astype(np.float32), {}

    return DDPOTrainer(DDPOConfig(
        seed=s.seed, num_epochs=s.epochs, mixed_precision="no", sample_num_steps=s.steps,
        sample_guidance_scale=s.guidance, train_cfg=s.guidance > 1, sample_batch_size=sampling,
        sample_num_batches_per_epoch=s.samples // sampling, train_batch_size=training,
        train_gradient_accumulation_steps=s.samples // s.updates // training, train_learning_rate=s.lr,
        train_clip_range=s.clip_range, per_prompt_stat_tracking=True, save_freq=10 ** 6, logdir=tempfile.mkdtemp(),
        per_prompt_stat_tracking_buffer_size=buffer, per_prompt_stat_tracking_min_count=minimum),
        reward, prompt_function(s.seed, s), pipeline), rewards


def theirs(folder, settings, sampling, training):
    """The mean reward of each epoch's samples, by TRL."""
    trainer, rewards = trainer_of(folder, settings, sampling, training)
    trainer.train()
    return np.concatenate(rewards).reshape(settings.epochs, -1).mean(1)


class InOrder:
    """A generator whose permutations are none: TRL has shuffled its samples already."""

    def permutation(self, values):
        return np.asarray(values)


def recorded(folder, s, sampling, training):
    """Two epochs of TRL's: for each its LoRA before and after, {name: tensor}, and what it has trained on."""
    trainer, _ = trainer_of(folder, replace(s, epochs=2), sampling, training)
    unet, train_on, epochs = trainer.sd_pipeline.unet, trainer._train_batched_samples, []

    def lora():
        return {name.replace(".default.", "."): p.detach().clone() for name, p in unet.named_parameters()
                if p.requires_grad}

    def look(inner_epoch, epoch, step, batches):
        before = lora()
        samples = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        step = train_on(inner_epoch, epoch, step, batches)
        epochs.append((before, lora(), samples))
        return step

    trainer._train_batched_samples = look
    trainer.train()
    return epochs


def as_trajectories(samples):
    """TRL's samples, whose denoising steps it has shuffled."""
    order = samples["timesteps"].argsort(dim=1, descending=True)
    x_t, x_prev, log_p_old = (torch.stack([tensor[i] for tensor, i in zip(samples[name], order)])
                              for name in ("latents", "next_latents", "log_probs"))
    n = torch.arange(len(order))
    return Trajectories(torch.cat([x_t, x_prev[:, -1:]], dim=1), log_p_old.flatten(1), samples["prompt_embeds"], n, n,
                        None)


def same_samples(folder, s, sampling, training):
    """On TRL's samples: how much the first epoch's change of the LoRA differs from ddpo_update's, in its length, and
    how far the second epoch's ratios are from 1 before its first update."""
    (before, after, first), (trained, _, second) = recorded(folder, s, sampling, training)
    model = load_stable_diffusion(SHIPPED)
    layers = add_lora(model.unet, s.rank)
    own = {f"{name}.{part}.weight": getattr(layer, part).weight for name, layer in layers.items()
           for part in ("lora_A", "lora_B")}
    policy = Policy(model, ddim_steps(s.steps), s.guidance, lora=layers)
    optimizer = Optimizer(list(own.values()), lr=s.lr, betas=(s.beta1, s.beta2), eps=s.adam_eps,
                          weight_decay=s.weight_decay, grad_clip=s.grad_clip)

    def take(weights):
        assert own.keys() == weights.keys()
        for name, p in own.items():
            p.data.copy_(weights[name])

    take(before)
    ddpo_update(policy, optimizer, as_trajectories(first), first["advantages"].double().numpy(), InOrder(),
                plan=Plan(s.samples, s.updates, training, range(s.steps)), clip_range=s.clip_range,
                emphasis=[1.0] * s.steps)
    change, apart = (torch.cat([(after[name] - other[name].detach()).flatten() for name in own])
                     for other in (before, own))
    take(trained)
    trajectories, everyone, error = as_trajectories(second), slice(0, s.samples), 0.0
    for i in range(s.steps):
        x_t, x_prev, log_p_old, context = trajectories.at(everyone, i)
        with torch.no_grad():
            ratio = (policy.log_prob(x_prev, x_t, i, context)[0] - log_p_old).exp()
        error = max(error, (ratio - 1).abs().max().item())
    return (apart.norm() / change.norm()).item(), error


def epochs_of(trainer, epochs):
    """As trainer.train() does: yields the number of each epoch after it."""
    step = 0
    for epoch in range(epochs):
        step = trainer.step(epoch, step)
        yield epoch


def add_to_the_leaderboard(seeds, folder, settings, entry, *batches):
    """Train with TRL on one reward, measure the LoRA of each epoch, and keep the rows; what is kept is left alone."""
    for seed in (n for n in leaderboard.missing(settings.reward, entry, settings.epochs) if n in seeds):
        print(f"{settings.reward}: {entry}, seed {seed}", flush=True)
        trainer, _ = trainer_of(folder, replace(settings, seed=seed), *batches)
        loras = []
        for epoch in epochs_of(trainer, settings.epochs):
            kept = folder / f"{settings.reward}-{seed}-{epoch}"
            trainer.sd_pipeline.save_checkpoint([trainer.sd_pipeline.unet], None, kept)
            loras.append(kept / "pytorch_lora_weights.safetensors")
        logged = [dict(epoch=n, queries=n * settings.samples) for n in range(settings.epochs + 1)]
        leaderboard.keep(settings.reward, entry, seed, logged, loras)


def clock(folder, settings, entry, *batches):
    """Keep what each of TRL's first epochs takes: the clock runs around a whole step of its trainer."""
    print(f"{settings.reward}: {entry}, its clock", flush=True)
    trainer, _ = trainer_of(folder, settings, *batches)
    times = [time.perf_counter(), *(time.perf_counter() for _ in epochs_of(trainer, leaderboard.TIMED))]
    leaderboard.keep_clock(settings.reward, entry, np.diff(times))


def ours(folder, settings, *batches):
    """The same, by train.py."""
    run = train(replace(settings, out=str(folder / f"ours_{settings.seed}")))
    return np.array([line["reward_mean"] for line in run.history])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversion", nargs="?", choices=CONVERSIONS, default="laptop")
    parser.add_argument("--epochs", type=int, help="of a conversion, or 16 for the leaderboard")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--clip-range", type=float)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--update", action="store_true", help="compare updates and log-probabilities instead")
    parser.add_argument("--leaderboard", nargs="*", choices=leaderboard.GOALS, help="train with TRL alone, on these "
                        "rewards or all, and add its rows to experiments/leaderboard.csv")
    parser.add_argument("--clock", action="store_true", help="for the leaderboard: measure the seconds again")
    a = parser.parse_args()
    own = {name: value for name in ("lr", "clip_range") if (value := getattr(a, name)) is not None}
    epochs = a.epochs or (CONVERSIONS[a.conversion]["epochs"] if a.leaderboard is None else 16)
    settings = make_settings(**{**COMMON, **CONVERSIONS[a.conversion], **own, "epochs": epochs})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder)
        if a.update:
            apart, error = same_samples(folder, settings, *BATCHES[a.conversion])
            return print(f"{settings.updates} optimizer steps on the same samples: the LoRA's changes differ by "
                         f"{apart:.1e} of their length; then the first ratios are within {error:.1e} of 1")
        if a.leaderboard is not None:
            torch.set_num_threads(2)        # the two cores of its rules
            rewards = a.leaderboard or list(leaderboard.GOALS)
            entry = ", ".join([f"TRL {version('trl')}", *[a.conversion] * (a.conversion != "laptop"),
                               *(f"{flag(name)} {value}" for name, value in own.items())])
            for reward in rewards:
                what = folder, replace(settings, reward=reward), entry, *BATCHES[a.conversion]
                add_to_the_leaderboard(range(a.seeds), *what)
                if a.clock or not leaderboard.clocked(reward, entry):
                    clock(*what)
            return leaderboard.overview(rewards)
        with contextlib.redirect_stdout(io.StringIO()):
            both = [np.array([side(folder, replace(settings, seed=seed), *BATCHES[a.conversion])
                              for seed in range(a.seeds)]) for side in (theirs, ours)]
    (mean, std), (other, spread) = ((x.mean(0), x.std(0, ddof=1)) for x in both)
    for i in range(settings.epochs):
        apart = abs(mean[i] - other[i]) / np.hypot(std[i], spread[i])
        print(f"epoch {i + 1}: TRL {mean[i]:.3f} +- {std[i]:.3f}, train.py {other[i]:.3f} +- {spread[i]:.3f}, "
              f"{apart:.1f} deviations apart")
    for side, rewards in zip(("TRL", "train.py"), both):
        print(f"last epoch of each seed, {side}: " + ", ".join(f"{x:.2f}" for x in rewards[:, -1]))


if __name__ == "__main__":
    run_main(main)
