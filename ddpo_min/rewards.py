"""Rewards: functions (images uint8 (B, H, W, 3), prompts: list of B str) -> B numbers. Higher is better.

This file holds the two that need no network, finds a user's own, and calls them all safely.
"""
import importlib
import importlib.util
import io
import sys
from functools import cache
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
WITH_NETWORKS = ("aesthetic", "clip", "vlm")       # made by clip_rewards.py and vlm.py


@cache
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
        raise InputError(f"{flag} {name}: unknown; expected one of {', '.join([*REWARDS, *WITH_NETWORKS])}, or your "
                         "own as my_rewards.py:function or package.module:function")
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


def score(reward, images, prompts, name="the reward", first=0):
    """Call a reward and check what it returns: float64 (B,), finite. Raises InputError otherwise.

    first: the number of the first of these images in its epoch, for the message.
    """
    try:
        rewards = np.asarray(reward(images, prompts), dtype=np.float64)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} failed on images {first} to {first + len(images) - 1} of the epoch, the first of "
                         f"{prompts[0]!r} ({type(error).__name__}: {first_line(error)})")
    if rewards.shape != (len(images),):
        raise InputError(f"{name} returned shape {rewards.shape} for images {first} to {first + len(images) - 1} of "
                         f"the epoch; expected ({len(images)},)")
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        which = ", ".join(f"{first + i} ({prompts[i]!r})" for i in bad[:5]) + (" ..." if len(bad) > 5 else "")
        raise InputError(f"{name} is {rewards[bad[0]]} for {len(bad)} of {len(images)} images; by their number in "
                         f"the epoch: {which}; expected numbers")
    return rewards
