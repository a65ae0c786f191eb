"""Rewards: functions (images uint8 (B, H, W, 3), prompts: list of B str) -> B numbers. Higher is better.

This file holds the two that need no network, finds all the others by name, and calls them safely.
"""
import importlib
import importlib.util
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .files import InputError, first_line


def jpeg_kilobytes(image, quality=95):
    """Size of one image (uint8 (H, W, 3)) as a JPEG file, in kB = 1000 bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.tell() / 1000


def jpeg(images, prompts):
    """Compressibility: minus the JPEG size in kB    [paper Sec. 5.1]."""
    return -np.array([jpeg_kilobytes(image) for image in images])


def incompressible(images, prompts):
    """Incompressibility: the JPEG size in kB    [paper Sec. 5.1]."""
    return -jpeg(images, prompts)


REWARDS = dict(jpeg=jpeg, incompressible=incompressible)
JUDGED = ("aesthetic", "clip", "vlm")       # these need other networks: see judges.py and vlm.py


def parse_rewards(spec, flag="--reward"):
    """"aesthetic=1,jpeg=0.05" -> {name: weight}; a name alone has weight 1. Raises InputError if a name is unknown."""
    weights = {}
    for part in spec.split(","):
        name, _, weight = (piece.strip() for piece in (part if "=" in part else part + "=1").rpartition("="))
        if name in weights:
            raise InputError(f"{flag} {spec}: {name} stands there twice; give it one weight")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise InputError(f"{flag} {spec}: {weight!r} is not a number; expected NAME=WEIGHT,NAME=WEIGHT")
        if not np.isfinite(weights[name]) or weights[name] == 0:
            raise InputError(f"{flag} {spec}: weight {weight}; expected a number other than 0")
        if name not in REWARDS and name not in JUDGED:
            find_own(name, flag)
    return weights


@lru_cache(maxsize=None)
def _module_of_file(path):
    """Run a user's file once; modules beside it can be imported from it."""
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def find_own(name, flag="--reward"):
    """A user's reward: "my_rewards.py:red" or "package.module:function". Raises InputError if it is not there."""
    where, _, function = name.rpartition(":")
    if not where:
        raise InputError(f"{flag} {name}: unknown; expected one of {', '.join([*REWARDS, *JUDGED])}, or your own as "
                         "my_rewards.py:function or package.module:function")
    try:
        if where.endswith(".py"):
            if not Path(where).is_file():
                raise InputError(f"{flag} {name}: no file {where}")
            module = _module_of_file(Path(where).resolve())
        else:
            module = importlib.import_module(where)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{flag} {name}: {where} cannot be imported ({type(error).__name__}: {first_line(error)})")
    if not callable(getattr(module, function, None)):
        raise InputError(f"{flag} {name}: {where} has no function {function}")
    return getattr(module, function)


def check_rewards(settings):
    """The rewards of the settings: ({name: weight} of the sum, [names, the watched too]). Raises InputError."""
    weights = parse_rewards(settings.reward)
    watched = parse_rewards(settings.watch, "--watch") if settings.watch else {}
    if any(weight != 1 for weight in watched.values()):
        raise InputError(f"--watch {settings.watch}: weights have no meaning there; expected NAME,NAME")
    names = list(dict.fromkeys([*weights, *watched]))
    if set(names) & set(JUDGED):
        from . import judges, vlm
        judges.check(settings, names)
        if "vlm" in names:
            vlm.check(settings)
    return weights, names


def find_reward(name, settings=None, model=None, device="cpu"):
    """The reward function of one name. settings, model, device: for those with networks of their own."""
    if name in REWARDS:
        return REWARDS[name]
    if name in JUDGED:
        from . import judges, vlm
        return dict(aesthetic=judges.aesthetic, clip=judges.clip, vlm=vlm.alignment)[name](settings, model, device)
    return find_own(name)


def score(reward, images, prompts, name="the reward", first=0):
    """Call a reward and check what it returns: float64 (B,), finite. Raises InputError otherwise.

    first: the number of the first of these images in its round, for the message.
    """
    try:
        rewards = np.asarray(reward(images, prompts), dtype=np.float64)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} failed on images {first} to {first + len(images) - 1} of the round, the first of "
                         f"{prompts[0]!r} ({type(error).__name__}: {first_line(error)})")
    if rewards.shape != (len(images),):
        raise InputError(f"{name} returned shape {rewards.shape} for images {first} to {first + len(images) - 1} of "
                         f"the round; expected ({len(images)},)")
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        which = ", ".join(f"{first + i} ({prompts[i]!r})" for i in bad[:5]) + (" ..." if len(bad) > 5 else "")
        raise InputError(f"{name} is {rewards[bad[0]]} for {len(bad)} of {len(images)} images; by their number in the "
                         f"round: {which}; expected numbers")
    return rewards


class Scorer:
    """Scores groups of pictures beside the drawing of the next group; the order stays as given.

    JPEG sizes and a server's answers are waited for in several threads; all others, also users' own, which may not bear
    company, in one.
    """

    def __init__(self, weights, functions):
        """weights: {name: weight in the sum}, absent or 0 if only watched; functions: {name: reward function}."""
        self.weights, self.functions = weights, functions
        alone = set(functions) - {"jpeg", "incompressible", "vlm"}
        self.pool, self.pending, self.count = ThreadPoolExecutor(max_workers=1 if alone else 4), [], 0

    def add(self, images, prompts):
        """Begin to score a group: uint8 (B, H, W, 3), list of B str. Raises what an earlier group's reward raised."""
        if any(group.done() and group.exception() for group in self.pending):
            self.take()         # raises: no need to draw the rest of the round
        first, self.count = self.count, self.count + len(images)
        self.pending.append(self.pool.submit(lambda: {
            name: score(function, images.copy(), prompts, f"reward {name}", first)      # a copy: it may be written into
            for name, function in self.functions.items()}))

    def take(self):
        """Wait for everything added: (total (N,), {name: (N,)}). Raises what a reward raised."""
        try:
            parts = [group.result() for group in self.pending]
        finally:
            self.forget()
        scores = {name: np.concatenate([part[name] for part in parts]) for name in self.functions}
        return sum(weight * scores[name] for name, weight in self.weights.items()), scores

    def forget(self):
        """Drop what was added and not taken."""
        for group in self.pending:
            group.cancel()
        self.pending, self.count = [], 0
