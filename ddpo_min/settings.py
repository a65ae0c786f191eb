"""All settings of a run in one dataclass; the command line is made from it, presets are differences to it."""
import argparse
import sys
from dataclasses import dataclass, fields, replace

from .files import InputError
from .rewards import parse_rewards
from .weights import is_small


@dataclass
class Settings:
    """Defaults: the laptop preset, for the model in weights/. In brackets: the paper's value for DDPO_IS on Stable
    Diffusion 1.4, or that of its authors' code where the text gives none (marked "code")."""
    # What is trained, and on what
    reward: str = "jpeg"            # jpeg, incompressible, aesthetic, clip, vlm, FILE.py:FUNCTION; a sum: clip=9,jpeg=1
    watch: str = ""                 # rewards to log and draw beside the trained one, with commas between
    algorithm: str = "ddpo_is"      # ddpo_is (clipped ratio), ddpo_sf (REINFORCE), rwr, rwr_sparse (weighted denoising)
    trainable: str = "lora"         # lora, or full: the whole UNet [full]
    prompts: str = "animals"        # animals (45), imagenet_animals, activities, counting, dpok, or a text file
    weights: str = ""               # Stable Diffusion 1.x or 2.x: a file, diffusers folder or Hub name; empty: shipped
    preset: str = ""                # a set of values, "list" shows them all; empty chooses by --weights and --algorithm
    # Sampling: the denoising process is the policy
    samples: int = 256              # pictures drawn an epoch [256]
    steps: int = 8                  # denoising steps T [50]
    guidance: float = 1.0           # classifier-free guidance, in sampling and training alike; 1 is none [5.0]
    guidance_in_training: str = "on"  # off trains without the guidance that sampling has, which collapses [on]
    eta: float = 1.0                # DDIM's noise, in (0, 1] [code: 1.0]
    # Learning
    epochs: int = 8                 # rounds of sampling and training [code: 100]
    updates: int = 4                # optimiser steps an epoch, on equal shares of the samples [4]
    inner_epochs: int = 1           # passes over the same samples [1]
    batch: int = 64                 # samples that go through the network together; auto (0): as many as fit, up to 64
    clip_range: float = 0.01        # the ratio is clipped to 1 +- this; see README, "What clip 1e-4 means" [1e-4]
    advantage_clip: float = 5.0     # advantages beyond this are cut [code: 5 or 10]
    step_weights: str = "even"      # even: a step's loss is divided by its w_t, see README; paper: all count 1
    timestep_fraction: float = 1.0  # share of a trajectory's steps that is trained on, drawn anew each update [1]
    first_step: int = 1             # the window of steps to train on, 1 (the noisiest) to T: its first ...
    last_step: int = 0              # ... and its last; 0 is T
    kl_weight: float = 0.0          # adds this times the KL of each step to the base model; 0 is off [0]
    inverse_temperature: float = 5.0  # beta of rwr, per unit of reward [0.2]
    percentile: float = 0.9         # rwr_sparse keeps the samples above it [0.9]
    # Optimiser: AdamW on the LoRA
    lr: float = 2.5e-3              # learning rate; full has its own [1e-5 for the whole UNet; code: 3e-4 for LoRA]
    weight_decay: float = 1e-4      # [1e-4]
    beta1: float = 0.9              # [0.9]
    beta2: float = 0.95             # short: the first gradients are the largest and soon out of date [0.999]
    adam_eps: float = 1e-8          # [1e-8]
    grad_clip: float = 1.0          # largest norm of the gradient [1.0]
    rank: int = 4                   # of the LoRA on the attention projections [code: 4]
    init_lora: str = ""             # a LoRA file to go on from, with its layers and ranks; the KL's base is without it
    # Normalisation of the reward
    normalise: str = "prompt"       # by the same prompt's latest rewards; group: its group's; round: all [prompt]
    group_size: int = 1             # so many samples of a round share a prompt; needed by --normalise group
    prompt_buffer: int = 16         # latest rewards of a prompt that count [code: 16 or 32]
    prompt_minimum: int = 8         # with fewer than these, the epoch's mean and deviation are used [code: 16]
    # Machine and files
    seed: int = 0                   # of everything random
    device: str = "auto"            # cpu, cuda, mps; auto takes the best there is
    dtype: str = "float32"          # of the frozen networks: float32, bfloat16, or float16 on GPUs before 2020
    checkpointing: str = "off"      # on: less memory, a third more time: activations are computed again going back
    compile: str = "off"            # on: torch.compile the UNet, for both phases; takes minutes at the start
    eval_samples: int = 180         # pictures for the figures before and after, on seeds never trained on
    eval_prompts: str = ""          # what to evaluate on instead of --prompts, less what is trained on
    eval_every: int = 0             # epochs between two evaluations; 0 is before and after only
    show_every: int = 4             # epochs between two rows of samples.png
    out: str = ""                   # folder of the run; empty is runs/REWARD, numbered if it exists
    resume: str = ""                # folder of a run to go on with
    # Rewards with networks of their own
    clip_model: str = ""            # of open_clip, for aesthetic and clip; empty goes by --weights [ViT-L-14-quickgelu]
    clip_weights: str = ""          # its file, or a tag that open_clip can fetch
    aesthetic_head: str = ""        # file of the head; empty: the shipped one, or LAION's, fetched once
    vlm_url: str = "http://localhost:8000/v1"  # an OpenAI-compatible server: vLLM, SGLang, Ollama, llama.cpp, LM Studio
    vlm_model: str = ""             # the model's name on that server [LLaVA]
    vlm_question: str = "Answer concisely: what is going on in this image?"  # what it is asked [code: the same]
    vlm_reference: str = "The image contains {prompt}"  # what its answer is compared with [code: the same]
    vlm_encoder: str = ""           # FILE.py:FUNCTION for BERTScore; empty: the model's own text encoder [DeBERTa]
    vlm_idf: str = "off"            # on weights tokens by their rarity among the prompts
    vlm_parallel: int = 8           # requests in flight
    vlm_timeout: float = 60.0       # seconds to wait for an answer
    vlm_retries: int = 4            # tries more, after 1, 2, 4, ... seconds

    @property
    def regression(self):
        """Whether the algorithm is weighted denoising (rwr, rwr_sparse) and not a policy gradient."""
        return self.algorithm.startswith("rwr")


# The public LoRA configuration for Stable Diffusion 1.x, and the paper's appendix table for the whole UNet
SD_LORA = dict(samples=256, steps=50, guidance=5.0, epochs=100, updates=4, batch=4, clip_range=1e-4, lr=3e-4,
               eval_samples=32, show_every=10, dtype="bfloat16", step_weights="paper", beta2=0.999,
               prompt_buffer=32, prompt_minimum=16, inverse_temperature=0.2)
PAPER = {**SD_LORA, "prompts": "imagenet_animals", "trainable": "full", "lr": 1e-5, "dtype": "float32"}
# 10,240 samples where the paper has 10,000, so that its 400 updates of 128 come out even
PAPER_RWR = {**PAPER, "samples": 10_240, "updates": 80, "inner_epochs": 5, "epochs": 10}

# Regression learns to draw what it drew: few steps draw hazily, and every round would add haze to haze
LAPTOP_RWR = dict(steps=32, epochs=4, inner_epochs=4, lr=2.5e-4)

PRESETS = {
    "laptop": {},
    "laptop_ddpo_sf": dict(algorithm="ddpo_sf", updates=1, lr=3e-3),
    "laptop_rwr": {**LAPTOP_RWR, "algorithm": "rwr"},
    "laptop_rwr_sparse": {**LAPTOP_RWR, "algorithm": "rwr_sparse", "percentile": 0.7},
    "sd_lora": SD_LORA,
    "sd_lora_compressibility": {**SD_LORA, "prompts": "imagenet_animals", "prompt_buffer": 16},
    "sd_lora_incompressibility": {**SD_LORA, "reward": "incompressible", "prompts": "imagenet_animals",
                                  "prompt_buffer": 16},
    "sd_lora_aesthetic": {**SD_LORA, "reward": "aesthetic", "epochs": 200, "updates": 2},
    "sd_lora_alignment": {**SD_LORA, "reward": "vlm", "prompts": "activities", "samples": 288, "epochs": 200,
                          "updates": 2},
    "paper_ddpo_is": PAPER,
    "paper_ddpo_sf": {**PAPER, "algorithm": "ddpo_sf", "updates": 1},
    "paper_rwr": {**PAPER_RWR, "algorithm": "rwr"},
    "paper_rwr_sparse": {**PAPER_RWR, "algorithm": "rwr_sparse"},
}
# The rewards' scales differ: what a unit of reward is worth to the laptop's weighted regression
LAPTOP_REWARDS = dict(aesthetic=dict(inverse_temperature=2.0), clip=dict(inverse_temperature=15.0))
# What an algorithm needs that is chosen on top of a preset of another one
ALGORITHMS = dict(ddpo_is={}, ddpo_sf=dict(updates=1, inner_epochs=1), rwr=dict(inner_epochs=4),
                  rwr_sparse=dict(inner_epochs=4))
FULL_LR = dict(laptop=3e-5, sd=1e-5)     # of --trainable full where the preset is for LoRA
DTYPES = ("float32", "bfloat16", "float16")
CHOICES = dict(step_weights=("even", "paper"), algorithm=tuple(ALGORITHMS), preset=tuple(PRESETS),
               dtype=DTYPES, device=("auto", "cpu", "cuda", "mps"), trainable=("lora", "full"),
               guidance_in_training=("on", "off"), normalise=("prompt", "group", "round"), vlm_idf=("on", "off"),
               checkpointing=("on", "off"), compile=("on", "off"))
ON_RESUME = {"epochs", "device", "batch", "checkpointing", "compile"}      # what --resume may change


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that complains in one line."""

    def error(self, message):
        print(f"error: {message}; see --help", file=sys.stderr)
        sys.exit(2)


def batch_size(text):
    """The value of --batch: a number, or auto, which is 0."""
    return 0 if text == "auto" else int(text)


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
    texts = _help_texts()
    for field in fields(Settings):
        kind = batch_size if field.name == "batch" else field.type
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=argparse.SUPPRESS,
                            metavar=field.type.__name__.upper(),
                            help=f"{texts[field.name]} (default: {field.default!r})")
    given = vars(parser.parse_args(arguments))
    if given.get("preset") == "list":
        print(list_presets())
        sys.exit(0)
    if {"rank", "init_lora"} <= given.keys():
        raise InputError("--rank: follows from the file with --init-lora; drop it")
    return settings_from(given), set(given)


def settings_from(given):
    """Defaults, then the preset, then what the user gave. Raises InputError for what cannot work."""
    weights, algorithm = given.get("weights", ""), given.get("algorithm", "ddpo_is")
    preset = given.get("preset")
    if not preset and not is_small(weights):
        preset = "sd_lora"
    elif not preset:
        preset = f"laptop_{algorithm}" if f"laptop_{algorithm}" in PRESETS else "laptop"
    if preset not in PRESETS:
        raise InputError(f"--preset {preset}: unknown; expected list, or one of {', '.join(PRESETS)}")
    laptop = preset.startswith("laptop")
    if not weights and not laptop:
        raise InputError(f"--preset {preset}: made for Stable Diffusion's size; give such a file with --weights")
    values = dict(PRESETS[preset])
    if laptop:
        values.update(LAPTOP_REWARDS.get(given.get("reward"), {}))
    if "algorithm" in given and given["algorithm"] != values.get("algorithm", "ddpo_is"):
        values.update(ALGORITHMS.get(given["algorithm"], {}))
    if given.get("trainable") == "full" and values.get("trainable") != "full":
        values.update(lr=FULL_LR["laptop" if laptop else "sd"], dtype="float32")
    if given.get("trainable") == "lora" and values.get("trainable") == "full":
        values.update(lr=SD_LORA["lr"])
    settings = replace(Settings(), **{**values, **given, "preset": preset})
    check(settings)
    return settings


def check(s):
    """Refuse settings that cannot work, before anything slow starts. Raises InputError."""
    parse_rewards(s.reward)
    if s.watch:
        parse_rewards(s.watch, "--watch")
    for name, allowed in CHOICES.items():
        if getattr(s, name) not in allowed:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: unknown; expected one of "
                             f"{', '.join(allowed)}")
    for name in ("samples", "steps", "epochs", "updates", "inner_epochs", "rank", "prompt_buffer",
                 "prompt_minimum", "eval_samples", "show_every", "group_size", "first_step", "vlm_parallel"):
        if getattr(s, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: expected 1 or more")
    for name in ("lr", "clip_range", "advantage_clip", "grad_clip", "guidance", "adam_eps", "inverse_temperature",
                 "vlm_timeout"):
        if not 0 < getattr(s, name) < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: expected a number above 0")
    for name in ("eta", "timestep_fraction"):
        if not 0 < getattr(s, name) <= 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: expected a number above 0 and up to 1")
    for name in ("weight_decay", "beta1", "beta2"):
        if not 0 <= getattr(s, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: expected a number from 0 to below 1")
    for name in ("kl_weight", "eval_every", "vlm_retries", "batch"):
        if not 0 <= getattr(s, name) < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: expected 0 or more")
    if not 0 < s.percentile < 1:
        raise InputError(f"--percentile {s.percentile}: expected a number between 0 and 1")
    if s.steps > 500:
        raise InputError(f"--steps {s.steps}: expected 1 to 500")
    if s.seed < 0:
        raise InputError(f"--seed {s.seed}: expected 0 or more")
    if s.samples % s.updates:
        raise InputError(f"--samples {s.samples}: not divisible by --updates {s.updates}; updates take equal shares")
    if s.prompt_minimum > s.prompt_buffer:
        raise InputError(f"--prompt-minimum {s.prompt_minimum}: above --prompt-buffer {s.prompt_buffer}, "
                         "so it would never be reached")
    last = s.last_step or s.steps
    if not s.first_step <= last <= s.steps:
        raise InputError(f"--first-step {s.first_step} --last-step {s.last_step}: no window of the {s.steps} steps")
    if s.regression and (s.first_step, s.last_step, s.timestep_fraction) != (1, 0, 1):
        raise InputError("--first-step, --last-step, --timestep-fraction: choose among denoising steps, which the ddpo "
                         f"algorithms train on and {s.algorithm} does not")
    if s.samples % s.group_size or s.samples // s.updates % s.group_size:
        raise InputError(f"--group-size {s.group_size}: {s.samples // s.updates} samples an update are no whole groups")
    if s.normalise == "group" and (s.group_size < 2 or s.regression):
        raise InputError("--normalise group: needs --group-size 2 or more, and a ddpo algorithm")
    if s.trainable == "full" and s.dtype != "float32":
        raise InputError(f"--trainable full --dtype {s.dtype}: the trained weights must be float32")
    if s.trainable == "full" and s.init_lora:
        raise InputError("--init-lora: needs --trainable lora; to train the whole UNet from there, write a model with "
                         "sample.py --lora FILE --merge MODEL.safetensors and give that with --weights")
    if s.kl_weight and (s.trainable == "full" or s.regression):
        raise InputError("--kl-weight: needs --trainable lora, whose base model is there with the LoRA switched off, "
                         "and a ddpo algorithm")
    if s.algorithm == "ddpo_sf" and s.updates * s.inner_epochs > 1:
        raise InputError("--algorithm ddpo_sf: REINFORCE uses its samples once; --updates and --inner-epochs must be 1")


def list_presets():
    """All presets, each with its differences from the first, one a line."""
    width = max(len(name) for name in PRESETS)
    return "\n".join(f"{name:{width}}  " + (", ".join(f"{k}={v}" for k, v in values.items()) or "the defaults of --help")
                     for name, values in PRESETS.items())


def describe(s):
    """The settings as printed at the start: one a line, differences from the preset marked, then derived sizes."""
    base = settings_from({name: getattr(s, name) for name in ("preset", "algorithm", "trainable", "reward", "weights")})
    lines = []
    for field in fields(s):
        value, usual = getattr(s, field.name), getattr(base, field.name)
        mark = "" if value == usual or field.name == "preset" else f"    * preset {s.preset}: {usual!r}"
        lines.append(f"  {field.name:20} {value!r}{mark}")
    share = s.samples // s.updates
    passes = 2 if s.guidance != 1 else 1
    lines.append(f"  an epoch: {s.samples} pictures x {s.steps} steps; {s.inner_epochs * s.updates} updates of {share} "
                 f"pictures, {min(s.batch, share) or 'as many as fit'} at a time; {passes} network passes a step")
    return "\n".join(lines)
