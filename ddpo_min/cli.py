"""The command line of train.py: flags made from Settings, presets filled in, checks before anything slow starts.

From Python: make_settings(reward="jpeg", epochs=3) gives the settings that the same flags give.
"""
import argparse
import difflib
import inspect
import json
import shlex
import shutil
import sys
from contextlib import suppress
from dataclasses import fields, replace
from math import inf, isfinite
from os import PathLike
from pathlib import Path

from . import __version__
from .files import InputError
from .folder import instead_of_resuming, sha256
from .prompts import evaluation_prompts, find_prompts
from .rewards import REWARDS, WITH_NETWORKS
from .scorer import check_rewards
from .settings import ALGORITHMS, CHOICES, FULL_LR, LAPTOP_REWARDS, PRESETS, SD_LORA, USED_BY, Settings
from .text import cut_prompts
from .weights import is_small, parse_size

DESCRIPTION = """Train a text-to-image diffusion model on a reward, by DDPO.
Defaults are those of the preset laptop, for the shipped model. In brackets:
the paper's value for Stable Diffusion or, where the paper has none, that of
its authors' code ("code")."""
EXAMPLES = """examples:
  python train.py --reward jpeg
      the shipped model, in less than three minutes on two CPU cores
  python train.py --weights stable-diffusion-v1-5/stable-diffusion-v1-5 --reward jpeg --batch auto
      Stable Diffusion 1.5 from the Hugging Face Hub, with the preset sd_lora
  python train.py --resume runs/jpeg --epochs 12
      go on with a run, to 12 epochs in all"""

ON_RESUME = {"epochs", "device", "batch", "checkpointing", "compile", "watch", "eval_every", "stop_when", "keep_every",
             "vlm_url"}        # what --resume may change
# Code that a run executes and a server that it sends to: with --resume given again, for a folder may be somebody else's
GIVEN_AGAIN = ("reward", "watch", "vlm_encoder", "vlm_url")
METAVARS = {str: "TEXT", int: "INT", float: "FLOAT"}

# What a number must be, in words and as a test, and the settings that this holds for
RANGES = (
    ("1 or more", lambda x: x >= 1, ("samples", "epochs", "updates", "inner_epochs", "rank", "prompt_buffer",
     "prompt_minimum", "eval_samples", "show_every", "group_size", "first_step", "vlm_parallel", "timesteps")),
    ("1 to 500", lambda x: 1 <= x <= 500, ("steps",)),
    ("0 or more", lambda x: 0 <= x < float("inf"), ("kl_weight", "kl_old", "eval_every", "keep_every", "vlm_retries",
     "batch", "inverse_temperature", "noise_steps")),
    ("0 to 2^64 - 1", lambda x: 0 <= x < 2 ** 64, ("seed",)),
    ("a number above 0", lambda x: 0 < x < float("inf"), ("lr", "clip_range", "advantage_clip", "grad_clip",
     "guidance", "adam_eps", "nft_beta", "vlm_timeout")),
    ("a number above 0 and up to 1", lambda x: 0 < x <= 1, ("timestep_fraction", "awm_power")),
    ("a number from 0 to 1", lambda x: 0 <= x <= 1, ("eta",)),
    ("a number from 0 to below 1", lambda x: 0 <= x < 1, ("weight_decay", "beta1", "beta2", "ema", "policy_ema")),
    ("a number between 0 and 1", lambda x: 0 < x < 1, ("percentile",)),
)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that complains in one line, and knows which flag was probably meant."""

    def error(self, message):
        print(f"error: {' '.join(message.split())}; see --help", file=sys.stderr)
        sys.exit(2)

    def parse_args(self, args=None, namespace=None):
        arguments = list(sys.argv[1:] if args is None else args)
        self._refuse_values_of_switches(arguments)
        parsed, unknown = self.parse_known_args(arguments, namespace)
        if unknown and not unknown[0].startswith("-"):
            self.error(f"{unknown[0]}: a value without a flag before it")
        if unknown:
            name = unknown[0].partition("=")[0]
            self.error(f"{name}: no such flag" + nearest(name, self._option_string_actions))
        return parsed

    def _refuse_values_of_switches(self, arguments):
        for argument, following in zip(arguments, [*arguments[1:], "-"]):
            name, equals, value = argument.partition("=")
            action = self._option_string_actions.get(name)
            if isinstance(action, argparse.BooleanOptionalAction) and (equals or not following.startswith("-")):
                self.error(f"{name} {value if equals else following}: it is a switch now, without a value; write "
                           + " or ".join(action.option_strings))


def check_ranges(args, ranges):
    """Raises InputError for a number of a parsed command line that is out of its range: (name, lowest, highest)."""
    for name, lowest, highest in ranges:
        value = getattr(args, name)
        if value is not None and not lowest <= value <= highest:
            raise InputError(f"--{name} {value}: expected {lowest} to {highest}")


def nearest(name, names):
    """"; the nearest is NAME", the one of these names that is most like a wrong one; "" if none is. Dashes aside."""
    plain = {other.lstrip("-"): other for other in names}
    near = difflib.get_close_matches(name.lstrip("-"), plain, n=1)
    return f"; the nearest is {plain[near[0]]}" if near else ""


def batch_size(text):
    """The value of --batch: a number, or auto, which is 0."""
    try:
        return 0 if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto")


def flag(name):
    """The flag of a setting: vlm_url -> --vlm-url."""
    return "--" + name.replace("_", "-")


def sections():
    """Settings as its file explains it: {section: {name of a field: the comment behind it}}."""
    found = {}
    for line in inspect.getsource(Settings).splitlines():
        code, _, comment = line.partition("#")
        if comment and not code.strip():
            texts = found[comment.strip()] = {}
        elif comment:
            texts[code.partition(":")[0].strip()] = comment.strip()
    return found


def make_parser():
    """The parser of train.py: a group of flags for each section of Settings; flags that are not given stay away."""
    def formatter(prog):
        width = min(100, shutil.get_terminal_size().columns)
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=width)

    parser = OneLineParser(prog="train.py", usage="python train.py [--help] [--FLAG VALUE ...]", allow_abbrev=False,
                           formatter_class=formatter, description=DESCRIPTION, epilog=EXAMPLES,
                           argument_default=argparse.SUPPRESS, add_help=False)
    by_name = {field.name: field for field in fields(Settings)}
    for title, texts in sections().items():
        group = parser.add_argument_group(title)
        for name, text in texts.items():
            field = by_name[name]
            if field.type is bool:
                options, default = dict(action=argparse.BooleanOptionalAction), "on" if field.default else "off"
            else:
                kind = batch_size if name == "batch" else field.type
                options, default = dict(type=kind, metavar=METAVARS[field.type]), field.default
            text += f" (default: {default})" if default != "" else ""
            added = group.add_argument(flag(name), **options)
            added.help = text.replace("%", "%%")        # afterwards: some versions of argparse add to a switch's text
    group.add_argument("-h", "--help", action="help", help="show this text")
    return parser


def read_settings(arguments=None):
    """Command line (list of str; None: sys.argv's) -> Settings.

    Prints the presets and exits for --preset list. What cannot be parsed ends with one line and status 2; raises
    InputError for what cannot work.
    """
    given = vars(make_parser().parse_args(arguments))
    if given.get("preset") == "list":
        print(list_presets())
        sys.exit(0)
    return make_settings(**given)


def make_settings(**given):
    """Defaults, then the preset, then what is given, checked: the Settings of a run. Raises InputError.

    With resume, a run's folder: its own settings, of which only those of ON_RESUME may be given anew.
    """
    given = {name: str(value) if isinstance(value, PathLike) else value for name, value in given.items()}
    _check_types(given)
    if given.get("resume") and not given.get("auto_resume"):
        settings = _resumed(**given)
    else:
        if "rank" in given and given.get("init_lora"):
            raise InputError("--rank: follows from the file with --init-lora; drop it")
        settings = _started_or_resumed(given) if given.get("auto_resume") else _filled(given)
    check_settings(settings, own_reward=True)       # train() looks the reward up: it may be a function
    return settings


def _started_or_resumed(given):
    """--auto-resume: the settings of a new run, or of the one in --out, which must be the same. Raises InputError."""
    if not given.get("out") or given.get("resume"):
        raise InputError("--auto-resume: goes on with the run in --out, which must be given, and --resume must not")
    wanted = _filled(given)
    if not (Path(wanted.out) / "state.pt").is_file():
        return wanted
    changes = {name: given[name] for name in sorted(ON_RESUME & given.keys()) if (name, given[name]) != ("batch", 0)}
    run = _resumed(wanted.out, **{**changes, **given_again(vars(wanted))})
    own = {*ON_RESUME, "out", "resume", "auto_resume"} | {"reward"} - given.keys()      # reward: a function
    for name, value in vars(run).items():
        if name not in own and getattr(wanted, name) != value:
            raise InputError(f"--auto-resume: the run in {wanted.out} has {flag(name)} {value}, not "
                             f"{getattr(wanted, name)}; start the other one with another --out")
    return replace(run, auto_resume=True)


def with_own_reward(settings, reward):
    """The settings with a function as the reward: its name is in files and figures, or "own_jpeg" if it is called like
    another reward. Raises InputError if the run that is resumed has another."""
    name = getattr(reward, "__name__", "own")
    if name in WITH_NETWORKS or REWARDS.get(name, reward) is not reward:
        name = f"own_{name}"
    if settings.resume and name != settings.reward:
        raise InputError(f"reward {name}: the run in {settings.resume} was trained on {settings.reward}; give that "
                         "function")
    return replace(settings, reward=name)


def _usual_preset(weights, algorithm):
    """The preset of a model and an algorithm, if none is named."""
    size = "laptop" if is_small(weights) else "sd_lora"
    return f"{size}_{algorithm}" if f"{size}_{algorithm}" in PRESETS else size


def _filled(given):
    """Settings from defaults, preset and what is given; unchecked but for the preset's name."""
    weights = given.get("weights", "")
    preset = given.get("preset") or _usual_preset(weights, given.get("algorithm", "ddpo_is"))
    if preset not in PRESETS:
        raise InputError(f"--preset {preset}: unknown; expected list, or one of {', '.join(PRESETS)}")
    laptop = preset.startswith("laptop")
    if not weights and not laptop:
        raise InputError(f"--preset {preset}: made for Stable Diffusion's size; give such a file with --weights")
    values = dict(PRESETS[preset])
    if laptop:
        values.update(LAPTOP_REWARDS.get(given.get("reward"), {}))
    if "algorithm" in given and given["algorithm"] != (of_preset := values.get("algorithm", "ddpo_is")):
        if of_preset != "ddpo_is":
            raise InputError(f"--preset {preset}: for --algorithm {of_preset}, not for {given['algorithm']}; drop one "
                             "of them")
        values.update(ALGORITHMS.get(given["algorithm"], {}))
    if given.get("trainable") == "full" and values.get("trainable") != "full":
        values.update(lr=FULL_LR["laptop" if laptop else "sd"], dtype="float32")
        if preset == "laptop_fast":     # its pull to the base model needs a LoRA
            values.update(kl_weight=0.0)
    if given.get("trainable") == "lora" and values.get("trainable") == "full":
        values.update(lr=SD_LORA["lr"])
    return Settings(**{**values, **given, "preset": preset})


def _resumed(resume, **changes):
    """The settings that the run in the folder `resume` was started with, and the changes. Raises InputError."""
    folder = Path(resume)
    path = folder / "config.json"
    if not path.is_file() or not (folder / "state.pt").is_file():
        raise InputError(f"--resume {folder}: not the folder of a run (config.json and state.pt are not both there)")
    try:
        saved = dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{path}: not the JSON of a run's settings; restore it or start a new run")
    _check_version(folder, saved.pop("version", None))
    checksum = saved.pop("sha256", None)
    try:
        _check_types(saved)
    except InputError as error:
        raise InputError(f"{path}: {error}")
    if checksum != sha256(saved) or saved.keys() != vars(Settings()).keys():
        raise InputError(f"{path}: not as it was written; restore it, or {instead_of_resuming(folder)}")
    again = given_again(saved)
    other = [name for name, value in again.items() if changes.get(name, value) != value and name not in ON_RESUME]
    if other:
        raise InputError(f"--resume {folder}: {flag(other[0])} {changes[other[0]]}: expected {again[other[0]]}, as "
                         "when the run began; start this in the folder that the run was started in")
    wrong = sorted(changes.keys() - ON_RESUME - again.keys())
    if wrong:
        raise InputError(f"--resume goes on with the run's own settings; drop {flag(wrong[0])} "
                         f"(only {', '.join(flag(name) for name in sorted(ON_RESUME))} may change)")
    if not again.keys() <= changes.keys():
        raise InputError(f"--resume {folder}: its settings name code or a server; if you trust these, give them again: "
                         f"{how_to_resume(Settings(**saved), folder)}")
    return _filled({**saved, **changes, "out": str(folder), "resume": str(folder)})


def given_again(saved):
    """{name: value} of a run's settings {name: value} that must be given again with --resume."""
    return {name: saved[name] for name in GIVEN_AGAIN if ":" in saved[name] and saved[name] != getattr(Settings, name)}


def how_to_resume(s, folder):
    """The flags that go on with a run."""
    return shlex.join(["--resume", str(folder), *(word for name, value in given_again(vars(s)).items()
                                                  for word in (flag(name), value))])


def _check_version(folder, version):
    """Refuse a run that another version wrote (major or minor differs, or it names none). Raises InputError."""
    if version and str(version).split(".")[:2] == __version__.split(".")[:2]:
        return
    raise InputError(f"--resume {folder}: written by {f'version {version}' if version else 'an older version'} of "
                     f"ddpo_min, this is {__version__}; {instead_of_resuming(folder)}")


def check_settings(s, own_reward=False):
    """Refuse settings that cannot work, before anything slow starts. Raises InputError.

    own_reward: the reward is a function of the caller's; the name in s.reward is not looked up.
    """
    _check_types(vars(s))
    _check_values(s)
    _check_minibatches(s)
    _check_algorithm(s)
    _check_prompts(s)
    if not s.reward and not own_reward:
        raise InputError("--reward: empty; expected a reward's name, such as jpeg")
    if s.normalise_each and "," not in s.reward and not own_reward:
        raise InputError("--normalise-each: needs a sum of rewards, such as --reward hps=1,aesthetic=1")
    scored = check_rewards("" if own_reward else s.reward, s.watch, small=is_small(s.weights), **s.reward_models)
    if s.stop_when:
        _check_stop(s, None if own_reward else {s.reward, *scored[1]})


def stop_bound(s):
    """What --stop-when says: (the name of a reward, its bound); ("", -inf) if nothing. Raises InputError."""
    if not s.stop_when:
        return "", -inf
    name, _, bound = (piece.strip() for piece in s.stop_when.rpartition("<"))
    with suppress(ValueError):
        if name and isfinite(float(bound)):
            return name, float(bound)
    raise InputError(f'--stop-when {s.stop_when}: expected the name of a reward, < and a number: "clip<0.7"')


def _check_stop(s, names):
    """Whether --stop-when names one of these rewards (None: not known yet), and looks at anything."""
    name, _ = stop_bound(s)
    if names and name not in names:
        raise InputError(f"--stop-when {s.stop_when}: {name} is neither trained on nor watched; add --watch {name}")
    if not s.eval_every:
        raise InputError(f"--stop-when {s.stop_when}: looks at the evaluations between epochs; add "
                         "--eval-every 1, or another number of epochs")


def _check_types(values):
    """values: {name: value}; every name a setting, every value of its type (a whole number will do for a float)."""
    kinds = {field.name: field.type for field in fields(Settings)}
    words = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}
    for name, value in values.items():
        if name not in kinds:
            raise InputError(f"{name}: no such setting" + nearest(name, kinds))
        kind = kinds[name]
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(f"{flag(name)} {value!r}: expected {words[kind]}")


def _check_values(s):
    """Each setting by itself."""
    for name, allowed in CHOICES.items():
        if getattr(s, name) not in allowed:
            raise InputError(f"{flag(name)} {getattr(s, name)}: unknown; expected one of "
                             f"{', '.join(filter(None, allowed))}")
    for words, fits, names in RANGES:
        for name in names:
            if not fits(getattr(s, name)):
                raise InputError(f"{flag(name)} {getattr(s, name)}: expected {words}")
    if s.size:
        parse_size(s.size)


def _check_minibatches(s):
    """How an epoch's samples are divided, and whether the window of denoising steps and the buffer of rewards fit."""
    if s.samples % s.updates:
        raise InputError(f"--samples {s.samples}: not divisible by --updates {s.updates} minibatches of equal size")
    if s.samples % s.group_size or s.samples // s.updates % s.group_size:
        raise InputError(f"--group-size {s.group_size}: {s.samples // s.updates} samples a minibatch are no whole "
                         "groups; expected a divisor")
    if s.prompt_minimum > s.prompt_buffer:
        raise InputError(f"--prompt-minimum {s.prompt_minimum}: above --prompt-buffer {s.prompt_buffer}, "
                         "so it would never be reached")
    if s.same_start and s.group_size < 2:
        raise InputError("--same-start: needs --group-size 2 or more, the samples that begin from one x_T")
    if s.noise_steps > s.steps:
        raise InputError(f"--noise-steps {s.noise_steps}: more than the {s.steps} denoising steps")
    noisy = len(s.noise_window)
    if not s.first_step <= (s.last_step or noisy) <= noisy:
        raise InputError(f"--first-step {s.first_step} --last-step {s.last_step}: no window of the {noisy} steps"
                         + f" that --noise-steps {s.noise_steps} leaves" * (noisy < s.steps))


def _check_algorithm(s):
    """What the algorithm, and the LoRA or the whole UNet, can be combined with."""
    ddpo = not s.regression and not s.forward_process
    if not ddpo and (s.first_step, s.last_step, s.timestep_fraction) != (1, 0, 1):
        raise InputError("--first-step, --last-step, --timestep-fraction: choose among denoising steps, which the ddpo "
                         f"algorithms train on and {s.algorithm} does not")
    if ddpo and s.eta == 0:
        raise InputError(f"--eta {s.eta}: expected a number above 0 and up to 1, because {s.algorithm} needs the "
                         "probability of what was drawn")
    if s.eta == 0 and (s.same_start or s.noise_steps):
        raise InputError("--eta 0: draws without noise; --same-start and --noise-steps need some, or the pictures of a "
                         "group are equal")
    base = _base(s)
    for name, users in USED_BY.items():
        if s.algorithm not in users and getattr(s, name) != getattr(base, name):
            raise InputError(f"{flag(name)}: for --algorithm {' or '.join(users)}, {s.algorithm} does not use it; drop "
                             "it")
    if s.ema and s.policy_ema:
        raise InputError("--ema, --policy-ema: one average or the other; the policy of --policy-ema is one already")
    if s.algorithm == "ram" and not s.kl_weight:
        raise InputError("--algorithm ram: its loss is a pull to the base model, --kl-weight, which must be above 0")
    if s.normalise == "group" and (s.group_size < 2 or s.regression):
        raise InputError("--normalise group: needs --group-size 2 or more, and an algorithm with advantages, not rwr")
    if s.normalise_each and s.regression:
        raise InputError("--normalise-each: needs an algorithm with advantages, not rwr")
    if s.normalise == "epoch" and s.samples == 1:
        raise InputError("--samples 1: nothing to compare it with by --normalise epoch; take 2 or more, or --normalise "
                         "prompt, which compares with earlier epochs")
    if s.algorithm == "ddpo_sf" and s.updates * s.inner_epochs > 1:
        raise InputError("--algorithm ddpo_sf: REINFORCE uses its samples once; --updates and --inner-epochs must be 1")
    if s.trainable == "full" and s.dtype != "float32":
        raise InputError(f"--trainable full --dtype {s.dtype}: the trained weights must be float32")
    if s.trainable == "full" and s.init_lora:
        raise InputError("--init-lora: needs --trainable lora; to train the whole UNet from there, write a model with "
                         "sample.py --lora FILE --merge MODEL.safetensors and give that with --weights")
    if s.kl_weight and (s.trainable == "full" or s.regression):
        raise InputError("--kl-weight: needs --trainable lora, whose base model is there with the LoRA switched off, "
                         "and an algorithm with advantages, not rwr")


def _check_prompts(s):
    """The prompts to train on and to evaluate on, and whether there are enough samples of each."""
    prompts = find_prompts(s.prompts)
    evaluation_prompts(s.eval_prompts, prompts)
    few = s.samples < 4 * len(prompts) and s.group_size < 4
    if s.regression and s.normalise == "prompt" and few:
        raise InputError(f"--algorithm {s.algorithm}: {s.samples} samples are fewer than 4 for each of {len(prompts)} "
                         "prompts, too few to compare; take more --samples, or --normalise epoch")


def list_presets():
    """All presets, each with its differences from the first, one a line."""
    width = max(len(name) for name in PRESETS)
    texts = {name: ", ".join(f"{k}={v}" for k, v in values.items()) for name, values in PRESETS.items()}
    return "\n".join(f"{name:{width}}  {text or 'the defaults of --help'}" for name, text in texts.items())


def _base(s):
    """What preset, algorithm, trainable, reward and weights alone would give."""
    return _filled({name: getattr(s, name) for name in ("preset", "algorithm", "trainable", "reward", "weights")})


def command(s):
    """The shortest command line that gives these settings, without --out and --resume; it always names the reward."""
    usual, base, default = _usual_preset(s.weights, s.algorithm), _base(s), Settings()
    of_preset = PRESETS[s.preset] if s.preset != usual else {}     # the usual preset follows from the algorithm
    expected = {**vars(base), "preset": usual, "weights": "", "reward": None, "out": s.out, "resume": s.resume,
                "auto_resume": s.auto_resume,
                "algorithm": of_preset.get("algorithm", default.algorithm),
                "trainable": PRESETS[s.preset].get("trainable", default.trainable)}
    words = ["python", "train.py"]
    for name, value in vars(s).items():
        if value == expected[name]:
            continue
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        elif str(value).startswith("-"):
            words.append(f"{flag(name)}={value}")
        else:
            words += [flag(name), str(value)]
    return shlex.join(words)


def describe(s):
    """The settings as printed at the start: one a line, differences from the preset marked, then derived sizes and a
    warning about prompts that are too long."""
    base = _base(s)
    lines = []
    for name, value in vars(s).items():
        usual = getattr(base, name)
        mark = "" if value == usual else f"    * preset {s.preset}: {usual!r}"
        lines.append(f"  {name:20} {value!r}{mark}")
    minibatch, updates, passes = s.samples // s.updates, s.inner_epochs * s.updates, 2 if s.guidance != 1 else 1
    size = min(s.batch, minibatch) or "as many as fit"
    lines.append(f"  an epoch: {s.samples} samples x {s.steps} denoising steps; {updates} optimizer "
                 f"step{'s' * (updates > 1)} on minibatches of {minibatch}, in micro-batches of {size}; "
                 f"{passes} network pass{'es' * (passes > 1)} a step")
    trained = find_prompts(s.prompts)
    warning = cut_prompts([*trained, *evaluation_prompts(s.eval_prompts, trained)])
    return "\n".join(lines + [f"  {warning}"] * bool(warning))
