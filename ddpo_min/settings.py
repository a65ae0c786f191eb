"""All settings of a run in one dataclass; the command line is made from it, presets are differences to it."""
import argparse
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from .files import InputError
from .rewards import find_reward
from .weights import SHIPPED


@dataclass
class Settings:
    """Defaults: the laptop preset, for the model in weights/. In brackets: the paper's value for DDPO_IS on Stable
    Diffusion 1.4, or that of its authors' code where the text gives none (marked "code")."""
    # What is trained, and on what
    reward: str = "jpeg"            # jpeg (small files) or incompressible (large ones)
    algorithm: str = "ddpo_is"      # ddpo_is (importance sampling, clipped) or ddpo_sf (REINFORCE, one update an epoch)
    prompts: str = "animals"        # the paper's 45 animals, "a cat" ... , or a text file with one prompt a line
    weights: str = ""               # a Stable Diffusion 1.x file or diffusers folder; empty is the shipped model
    preset: str = ""                # laptop or sd_lora; empty chooses by --weights
    # Sampling: the denoising process is the policy
    samples: int = 256              # pictures drawn an epoch [256]
    steps: int = 8                  # denoising steps T [50]
    guidance: float = 1.0           # classifier-free guidance, in sampling and training alike; 1 is none [5.0]
    eta: float = 1.0                # DDIM's noise, in (0, 1] [code: 1.0]
    # Learning
    epochs: int = 8                 # rounds of sampling and training [code: 100]
    updates: int = 4                # optimiser steps an epoch, on equal shares of the samples [4]
    inner_epochs: int = 1           # passes over the same samples [1]
    batch: int = 64                 # samples that go through the network together: memory and speed
    clip_range: float = 0.01        # the ratio is clipped to 1 +- this; see README, "What clip 1e-4 means" [1e-4]
    advantage_clip: float = 5.0     # advantages beyond this are cut [code: 5 or 10]
    step_weights: str = "even"      # even: a step's loss is divided by its w_t, see README; paper: all count 1
    timestep_fraction: float = 1.0  # share of a trajectory's steps that is trained on, drawn anew each update [1]
    # Optimiser: AdamW on the LoRA
    lr: float = 2.5e-3              # learning rate [1e-5 for the whole UNet; code: 3e-4 for LoRA]
    weight_decay: float = 1e-4      # [1e-4]
    beta1: float = 0.9              # [0.9]
    beta2: float = 0.95             # short: the first gradients are the largest and soon out of date [0.999]
    adam_eps: float = 1e-8          # [1e-8]
    grad_clip: float = 1.0          # largest norm of the gradient [1.0]
    rank: int = 4                   # of the LoRA on the attention projections [code: 4]
    # Per-prompt normalisation of the reward
    prompt_buffer: int = 16         # latest rewards of a prompt that count [code: 16 or 32]
    prompt_minimum: int = 8         # with fewer than these, the epoch's mean and deviation are used [code: 16]
    # Machine and files
    seed: int = 0                   # of everything random
    device: str = "auto"            # cpu, cuda, mps; auto takes the best there is
    dtype: str = "float32"          # of the frozen networks: float32 or bfloat16; in float16 gradients underflow
    eval_samples: int = 180         # pictures for the figures before and after, on seeds never trained on
    show_every: int = 4             # epochs between two rows of samples.png
    out: str = ""                   # folder of the run; empty is runs/REWARD, numbered if it exists
    resume: str = ""                # folder of a run to go on with


PRESETS = {
    "laptop": {},
    "sd_lora": dict(samples=256, steps=50, guidance=5.0, epochs=100, updates=4, batch=4, clip_range=1e-4, lr=3e-4,
                    eval_samples=32, show_every=10, dtype="bfloat16", step_weights="paper", beta2=0.999,
                    prompt_buffer=32, prompt_minimum=16),
}
ALGORITHMS = {"ddpo_is": {}, "ddpo_sf": dict(updates=1)}     # REINFORCE may use its samples only once
CHOICES = dict(step_weights=("even", "paper"), algorithm=tuple(ALGORITHMS), preset=tuple(PRESETS),
               dtype=("float32", "bfloat16"), device=("auto", "cpu", "cuda", "mps"))


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that complains in one line."""

    def error(self, message):
        print(f"error: {message}; see --help", file=sys.stderr)
        sys.exit(2)


def _help_texts():
    """The comment behind each field of Settings, read from this file: the one place where a setting is explained."""
    import inspect
    texts = {}
    for line in inspect.getsource(Settings).splitlines():
        code, _, comment = line.partition("#")
        if ":" in code and "=" in code and comment:
            texts[code.split(":")[0].strip()] = comment.strip().replace("%", "%%")
    return texts


def parse(arguments=None):
    """Command line -> (Settings, names of the settings that the user gave). Wrong ones end with one line, status 2."""
    parser = OneLineParser(prog="train.py", allow_abbrev=False,
                            description="Train a text-to-image diffusion model on a reward, by DDPO. In brackets: the "
                                        "paper's value for Stable Diffusion.")
    for field in fields(Settings):
        parser.add_argument("--" + field.name.replace("_", "-"), type=field.type, default=argparse.SUPPRESS,
                            metavar=field.type.__name__.upper(),
                            help=f"{_help_texts()[field.name]} (default: {field.default!r})")
    given = vars(parser.parse_args(arguments))
    return settings_from(given), set(given)


def settings_from(given):
    """Defaults, then the preset, then what the user gave. Raises InputError for what cannot work."""
    weights = given.get("weights", "")
    preset = given.get("preset") or ("sd_lora" if weights and Path(weights).resolve() != SHIPPED else "laptop")
    if preset not in PRESETS:
        raise InputError(f"--preset {preset}: unknown; expected one of {', '.join(PRESETS)}")
    algorithm = ALGORITHMS.get(given.get("algorithm"), {})
    settings = replace(Settings(), **{**PRESETS[preset], **algorithm, **given, "preset": preset})
    check(settings)
    return settings


def check(s):
    """Refuse settings that cannot work, before anything slow starts. Raises InputError."""
    find_reward(s.reward)
    for name, allowed in CHOICES.items():
        if getattr(s, name) not in allowed:
            raise InputError(f"--{name} {getattr(s, name)}: unknown; expected one of {', '.join(allowed)}")
    for name in ("samples", "steps", "epochs", "updates", "inner_epochs", "batch", "rank", "prompt_buffer",
                 "prompt_minimum", "eval_samples", "show_every"):
        if getattr(s, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: expected 1 or more")
    for name in ("lr", "clip_range", "advantage_clip", "grad_clip", "guidance", "adam_eps"):
        if not 0 < getattr(s, name) < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: expected a number above 0")
    for name in ("eta", "timestep_fraction"):
        if not 0 < getattr(s, name) <= 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: expected a number above 0 and up to 1")
    for name in ("weight_decay", "beta1", "beta2"):
        if not 0 <= getattr(s, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: expected a number from 0 to below 1")
    if s.steps > 500:
        raise InputError(f"--steps {s.steps}: expected 1 to 500")
    if s.seed < 0:
        raise InputError(f"--seed {s.seed}: expected 0 or more")
    if s.samples % s.updates:
        raise InputError(f"--samples {s.samples}: not divisible by --updates {s.updates}; each update takes an equal share")
    if s.prompt_minimum > s.prompt_buffer:
        raise InputError(f"--prompt-minimum {s.prompt_minimum}: above --prompt-buffer {s.prompt_buffer}, "
                         "so it would never be reached")
    if s.algorithm == "ddpo_sf" and s.updates * s.inner_epochs > 1:
        raise InputError("--algorithm ddpo_sf: REINFORCE uses its samples once; --updates and --inner-epochs must be 1")


def describe(s):
    """The settings as printed at the start: one a line, differences from the preset marked, then derived sizes."""
    base = settings_from({name: getattr(s, name) for name in ("preset", "algorithm")})
    lines = []
    for field in fields(s):
        value, usual = getattr(s, field.name), getattr(base, field.name)
        mark = "" if value == usual or field.name == "preset" else f"    * preset {s.preset}: {usual!r}"
        lines.append(f"  {field.name:18} {value!r}{mark}")
    share = s.samples // s.updates
    passes = 2 if s.guidance != 1 else 1
    lines.append(f"  an epoch: {s.samples} pictures x {s.steps} steps; {s.inner_epochs * s.updates} updates of {share} "
                 f"pictures, {min(s.batch, share)} at a time; {passes} network passes a step")
    return "\n".join(lines)
