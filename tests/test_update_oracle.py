"""train.py's loop against tests/plain.py, optimizer step by optimizer step, in float64.

train() runs as it is, with micro-batches, plan and all; only the model is tiny and in float64, the run has no folder.
Every setting that the update knows of takes several values, and every two of them meet in some case (all-pairs).
"""
import copy
import itertools
import random
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import plain
import train
from conftest import tiny_networks
from ddpo_min.cli import make_settings
from ddpo_min.layers import Attention
from ddpo_min.learner import Learner
from ddpo_min.optimizer import Optimizer
from ddpo_min.prompts import draw_prompts
from ddpo_min.text import TextConfig, TextEncoder
from ddpo_min.unet import timestep_embedding
from ddpo_min.vae import VAE, VAEConfig
from ddpo_min.weights import StableDiffusion

TOLERANCE = 1e-9        # absolute; measured: 1e-12 and less
SAMPLES = 8

# The settings of the cases. A value of None: the setting has no effect there, and keeps its default.
# First the factors that others depend on: a contradiction is then found early.
FACTORS = dict(
    algorithm=["ddpo_is", "ddpo_sf", "rwr", "rwr_sparse"],
    trainable=["lora", "full"],
    normalise=["prompt", "group", "epoch"],
    updates=[1, 2, 4],
    dtype=["float32", "float16"],   # the model here is in float64 whatever it says; float16 scales the loss
    guidance=[1.0, 3.0],
    group_size=[1, 2, 4],
    inner_epochs=[1, 2, 3],
    batch=[1, 3, 16],               # minibatches are of 8, 4 or 2: one by one, uneven, more than there are
    steps=[3, 4],
    noise_steps=[0, 2, 3],
    same_start=[False, True],
    window=[(1, 0), (2, 0), (1, 2), (2, 3)],        # first_step, last_step
    timestep_fraction=[1.0, 0.5, 0.34, None],
    step_weights=["even", "paper", None],
    guidance_in_training=[True, False, None],
    kl_weight=[0.0, 0.3],
    clip_range=[1e-4, 0.1, None],
    advantage_clip=[0.5, 10.0, None],
    statistics=[(16, 8), (5, 3), (16, 16), None],   # prompt_buffer, prompt_minimum; (16, 16) is not reached
    prompts=[2, 3],
    inverse_temperature=[0.5, 2.0, None],
    percentile=[0.5, 0.9, None],
    rank=[1, 3, None],
    eta=[1.0, 0.5],
    lr=[1e-3, 1e-2],
    betas=[(0.9, 0.999), (0.5, 0.7)],
    adam_eps=[1e-8, 1e-2],
    weight_decay=[1e-4, 0.5],
    grad_clip=[1e-3, 100.0],
    seed=[0, 5],
)


def is_rwr(algorithm):
    return algorithm.startswith("rwr")


# What cli.check_settings() refuses, and where a setting has an effect: (the factors, what must hold for their values)
RULES = [
    (("algorithm", "normalise"), lambda a, n: n != "group" or not is_rwr(a)),
    (("algorithm", "updates"), lambda a, u: u == 1 or a != "ddpo_sf"),
    (("algorithm", "inner_epochs"), lambda a, e: e == 1 or a != "ddpo_sf"),
    (("algorithm", "window"), lambda a, w: w == (1, 0) or not is_rwr(a)),
    (("algorithm", "prompts"), lambda a, p: p == 2 or not is_rwr(a)),
    (("same_start", "group_size"), lambda same, g: g > 1 or not same),
    (("noise_steps", "window"), lambda n, w: max(w) <= (n or 3)),
    (("updates", "group_size"), lambda u, g: SAMPLES // u % g == 0),
    (("normalise", "group_size"), lambda n, g: n != "group" or g > 1),
    (("algorithm", "kl_weight"), lambda a, k: k == 0 or not is_rwr(a)),
    (("trainable", "kl_weight"), lambda t, k: k == 0 or t == "lora"),
    (("algorithm", "timestep_fraction"), lambda a, f: (f is None) == is_rwr(a)),
    (("algorithm", "step_weights"), lambda a, w: (w is None) == is_rwr(a)),
    (("algorithm", "advantage_clip"), lambda a, c: (c is None) == is_rwr(a)),
    (("algorithm", "clip_range"), lambda a, c: (c is None) == (a != "ddpo_is")),
    (("algorithm", "normalise", "statistics"), lambda a, n, s: (s is None) == (is_rwr(a) or n != "prompt")),
    (("algorithm", "inverse_temperature"), lambda a, b: (b is None) == (a != "rwr")),
    (("algorithm", "percentile"), lambda a, p: (p is None) == (a != "rwr_sparse")),
    (("guidance", "guidance_in_training"), lambda g, t: (t is None) == (g == 1)),
    (("trainable", "dtype"), lambda t, d: t == "lora" or d == "float32"),
    (("trainable", "rank"), lambda t, r: (r is None) == (t == "full")),
]


# All pairs

def allowed(case, new):
    """Whether the value of the factor `new` breaks no rule, as far as the case has the other values."""
    return all(holds(*(case[name] for name in names)) for names, holds in RULES
               if new in names and all(name in case for name in names))


def completed(case, order):
    """A case with a value for every factor, the first that is allowed; order(case, name) gives the values to try."""
    name = next((name for name in FACTORS if name not in case), None)
    if name is None:
        return case
    tries = ({**case, name: value} for value in order(case, name))
    wholes = (completed(grown, order) for grown in tries if allowed(grown, name))
    return next((whole for whole in wholes if whole), None)


def pairs_of(case):
    """The pairs of values that meet in a case: sets of two (factor, value)."""
    return map(frozenset, itertools.combinations([item for item in case.items() if item[1] is not None], 2))


def possible_pairs():
    """Every pair of values that some case can have, in the order of FACTORS."""
    values = [(name, value) for name in FACTORS for value in FACTORS[name] if value is not None]
    pairs = [dict(pair) for pair in itertools.combinations(values, 2) if pair[0][0] != pair[1][0]]
    return [frozenset(pair.items()) for pair in pairs if all(allowed(pair, name) for name in pair)
            and completed(pair, lambda case, name: FACTORS[name])]


def pairwise_cases(pairs, seed=0, tries=20):
    """Cases in which every pair occurs: each starts from the first pair that is still missing and grows greedily."""
    rng, missing, cases = random.Random(seed), dict.fromkeys(pairs), []

    def most_missing_first(case, name):
        def gain(value):
            return sum(frozenset([(name, value), item]) in missing for item in case.items())
        return sorted(rng.sample(FACTORS[name], len(FACTORS[name])), key=gain, reverse=True)

    while missing:
        first = dict(sorted(next(iter(missing))))
        grown = [completed(first, most_missing_first) for _ in range(tries)]
        cases.append(max(grown, key=lambda case: sum(pair in missing for pair in pairs_of(case))))
        for pair in pairs_of(cases[-1]):
            missing.pop(pair, None)
    return cases


PAIRS = possible_pairs()
CASES = pairwise_cases(PAIRS)


def test_every_two_values_meet_in_a_case():
    met = set().union(*map(pairs_of, CASES))
    assert met == set(PAIRS) and len(PAIRS) == 2498
    assert all(case.keys() == FACTORS.keys() and all(allowed(case, name) for name in case) for case in CASES)
    print(f"{len(CASES)} cases, {len(PAIRS)} pairs")


# A model that is as small as can be: the loop is tested here, not the networks

class TinyUNet(nn.Module):
    """Predicts x_t itself and a bit more, which depends on t and the prompt; with the names that a LoRA looks for."""

    def __init__(self, width=8):
        super().__init__()
        self.conv_in = nn.Conv2d(4, width, 3, padding=1)
        self.time = nn.Linear(width, width)
        self.block = nn.ModuleDict(dict(attn1=Attention(width, 2), attn2=Attention(width, 2, width)))
        self.conv_out = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x_t, t, context):
        h = self.conv_in(x_t) + self.time(timestep_embedding(t, 8).to(x_t.dtype))[:, :, None, None]
        tokens = F.silu(h).flatten(2).transpose(1, 2)
        tokens = tokens + self.block.attn1(tokens)
        tokens = tokens + self.block.attn2(tokens, context)
        return x_t + self.conv_out(F.silu(tokens).transpose(1, 2).unflatten(2, x_t.shape[2:]))


def tiny_model():
    """In float64, frozen; latents of 4 x 4, pictures of 4 x 4 pixels."""
    torch.manual_seed(0)
    networks = (TinyUNet(), VAE(VAEConfig(widths=(4,), layers=1, groups=2)),
                TextEncoder(TextConfig(width=8, layers=1, heads=2, inner=16)))
    return StableDiffusion(*(network.double().requires_grad_(False).eval() for network in networks), 4, "tiny")


def real_model():
    """The real UNet, with two levels; latents of 8 x 8."""
    return StableDiffusion(*(network.double().requires_grad_(False).eval() for network in tiny_networks()), 16, "tiny")


PROJECTION = np.random.default_rng(0).normal(size=(16 * 16, 3))


def reward(images, prompts):
    """Any function of the pictures and prompts, of a spread of about 1; the prompts differ in what is usual."""
    pixels = images.reshape(len(images), -1, 3) / 255
    return 4 * (pixels * PROJECTION[:pixels.shape[1]]).mean(axis=(1, 2)) + np.array([len(p) for p in prompts]) / 4


# train() and its twin

class RunWithoutFolder:
    """What train() asks of a Run: epochs that are neither evaluated nor saved."""

    def __init__(self, settings):
        self.settings, self.init_lora, self.logged = settings, settings.init_lora, []

    def progress(self, phase, samples):
        pass

    @contextmanager
    def epochs(self, learner, evaluation):
        yield range(self.settings.epochs)

    def log(self, epoch, rewards, scores, metrics):
        self.logged.append((rewards, metrics))


def run_train(settings, model, monkeypatch):
    """Run train() on this model. Returns (epochs, a SimpleNamespace each; the start: what plain.train() works on)."""
    seen = SimpleNamespace(trajectories=[], worth=[], parameters=[])
    start = SimpleNamespace(base=copy.deepcopy(model.unet))

    def trained():
        return {name: p for name, p in model.unet.named_parameters()
                if settings.trainable == "full" or ".lora_" in name}

    def learner_in_float64(*args, **keywords):
        torch.set_default_dtype(torch.float64)      # the LoRA's tensors are new, and of this dtype
        learner = Learner(*args, **keywords)
        torch.set_default_dtype(torch.float32)
        for name, p in trained().items():
            if ".lora_" in name:
                nn.init.normal_(p, std=0.3)         # B = 0 would hide half of the gradients, and the KL
        start.unet = copy.deepcopy(model.unet)
        return learner

    def sampling(*args, **keywords):
        seen.trajectories.append(sample_trajectories(*args, **keywords))
        return seen.trajectories[-1]

    def choosing(*args):
        weigh, update, keep = choose_algorithm(*args)
        return lambda *about: seen.worth.append(weigh(*about)) or seen.worth[-1], update, keep

    def stepping(optimizer):
        norm = step(optimizer)
        seen.parameters.append({name: p.detach().clone() for name, p in trained().items()})
        return norm

    sample_trajectories, choose_algorithm, step = train.sample_trajectories, train.choose_algorithm, Optimizer.step
    for owner, name, stand_in in (
            (train, "load_stable_diffusion", lambda *_: model), (train, "Run", RunWithoutFolder),
            (train, "Learner", learner_in_float64), (train, "sample_trajectories", sampling),
            (train, "choose_algorithm", choosing), (Optimizer, "step", stepping)):
        monkeypatch.setattr(owner, name, stand_in)
    run = train.train(settings, reward=reward)
    each = len(seen.parameters) // settings.epochs
    epochs = enumerate(zip(seen.trajectories, seen.worth, run.logged, strict=True))
    return [SimpleNamespace(latents=trajectories.latents, log_p_old=trajectories.log_p_old, worth=worth,
                            rewards=rewards, metrics=metrics, parameters=seen.parameters[e * each:(e + 1) * each])
            for e, (trajectories, worth, (rewards, metrics)) in epochs], start


def run_plain(settings, model, start, prompts):
    """The same by plain.train(). Returns its epochs."""
    unet = start.unet
    parameters = {name: p.requires_grad_(True) for name, p in unet.named_parameters()
                  if settings.trainable == "full" or ".lora_" in name}
    networks = plain.Networks(unet, start.base, lambda prompt: model.encode_prompts([prompt]), model.vae.decode,
                              model.latent_size)
    epochs = plain.train(settings, networks, list(parameters.values()), lambda epoch: draw_prompts(
        prompts, settings.samples, seed=settings.seed, epoch=epoch, group_size=settings.group_size), reward)
    for epoch in epochs:
        epoch.parameters = [dict(zip(parameters, step)) for step in epoch.record.parameters]
        yield epoch


def furthest(got, expected):
    """The largest difference; of dicts of tensors, of all of them."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        return max(furthest(got[name], expected[name]) for name in expected)
    got, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (got, expected))
    assert got.shape == expected.shape
    return (got - expected).abs().max().item()


def compare(settings, model, prompts, monkeypatch):
    """train() against plain.train(), everything at every optimizer step. Returns the latter's epochs."""
    epochs, start = run_train(settings, model, monkeypatch)
    twins = list(run_plain(settings, model, start, prompts))
    assert len(epochs) == len(twins) == settings.epochs
    for ours, twin in zip(epochs, twins):
        path = settings.algorithm.startswith("ddpo")        # the others keep x_0 alone, and no log-probability
        assert ours.rewards.tolist() == twin.rewards
        assert furthest(ours.latents, twin.latents if path else twin.latents[:, -1:]) < TOLERANCE
        assert not path or furthest(ours.log_p_old.nan_to_num(9), twin.log_p_old.nan_to_num(9)) < TOLERANCE
        assert furthest(ours.worth, twin.advantages) < TOLERANCE
        assert len(ours.parameters) == len(twin.parameters) == settings.updates * settings.inner_epochs
        for got, expected in zip(ours.parameters, twin.parameters):
            assert furthest(got, expected) < TOLERANCE
        assert ours.metrics == {name: pytest.approx(value, abs=TOLERANCE) if name != "clip_fraction_by_step" else value
                                for name, value in twin.metrics.items()}
    return twins


def settings_of(case, folder):
    """(the Settings of a case, its prompts)."""
    given = {name: value for name, value in case.items() if value is not None}
    given["first_step"], given["last_step"] = given.pop("window", (1, 0))
    given["beta1"], given["beta2"] = given.pop("betas", (0.9, 0.999))
    given["prompt_buffer"], given["prompt_minimum"] = given.pop("statistics", (16, 8))
    prompts = ["a cat", "a green rabbit", "two dogs"][:given.pop("prompts", 2)]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    given = dict(dict(samples=SAMPLES, epochs=2, steps=3), **given)
    return make_settings(prompts=str(folder / "prompts.txt"), device="cpu", **given), prompts


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['algorithm']}-{case['trainable']}")
def test_training_is_the_plain_loop(case, tmp_path, monkeypatch):
    settings, prompts = settings_of(case, tmp_path)
    compare(settings, tiny_model(), prompts, monkeypatch)
