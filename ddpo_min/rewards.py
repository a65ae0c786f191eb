"""Rewards: functions (images uint8 (B, H, W, 3), prompts: list of B str) -> B numbers. Higher is better.

This file holds the two that need no network, finds a user's own, and calls them all safely.
"""
import hashlib
import importlib
import importlib.util
import inspect
import io
import os
import sys
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from pathlib import Path

import numpy as np
import torch
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
WITH_NETWORKS = ("aesthetic", "clip", "hps", "pickscore", "vlm")       # see scorer.find_reward()
# Rewards that cannot be had by name, and what to do instead
ELSEWHERE = {"imagereward": "its network is a BLIP, which none of the packages used here has; install image-reward and "
                            "give it as a function of your own, see docs/rewards.md"}
LARGEST = 1e300     # of a reward: the sum over an epoch must be a float64, too


@contextmanager
def put_back():
    """Put back afterwards what a user's code may change for the whole program.

    Seeds need no such care: while a reward may run, nothing of ours draws from the global generators.
    """
    folder, arguments, grad = os.getcwd(), sys.argv, torch.is_grad_enabled()
    dtype, device, threads = torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()
    try:
        yield
    finally:
        os.chdir(folder)
        sys.argv = arguments
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@cache
def _module_of_file(path, text):
    """Run a user's file once, and anew if its text has changed; modules beside it, which it can import, run once."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    there = sys.modules.get(path.stem)
    if there is None or getattr(there, "__file__", None) == str(path):      # else another module of that name
        sys.modules[path.stem] = module
    exec(compile(text, str(path), "exec"), module.__dict__)     # the loader may know the old text, of the same second
    return module


def find_own(name, flag="--reward"):
    """A user's reward: "my_rewards.py:red" or "package.module:function". Raises InputError if it is not there."""
    if name in ELSEWHERE:
        raise InputError(f"{flag} {name}: {ELSEWHERE[name]}")
    where, _, function = name.rpartition(":")
    if not where:
        raise InputError(f"{flag} {name}: unknown; expected one of {', '.join([*REWARDS, *WITH_NETWORKS])}, or your "
                         "own as my_rewards.py:function or package.module:function")
    if where.endswith(".py") and not Path(where).is_file():
        raise InputError(f"{flag} {name}: no file {where}")
    try:
        with put_back():
            sys.argv = [where]      # as if it were started alone: our flags are not for it
            path = Path(where).resolve()
            module = (_module_of_file(path, path.read_bytes()) if where.endswith(".py") else
                      importlib.import_module(where))
    except SystemExit as error:
        raise InputError(f"{flag} {name}: {where} ends the program when it is imported (SystemExit: "
                         f"{first_line(error)}); put what is not for that under if __name__ == \"__main__\"")
    except Exception as error:
        raise InputError(f"{flag} {name}: {where} cannot be imported ({type(error).__name__}: {first_line(error)})")
    if not callable(getattr(module, function, None)):
        raise InputError(f"{flag} {name}: {where} has no function {function}")
    return getattr(module, function)


def adapt(reward, name="own", device="cpu"):
    """A reward in the form of TRL's, ddpo-pytorch's or Flow-GRPO's trainers as one of ours; any other as it is.

    Theirs: (images float (B, 3, H, W) in [0, 1], prompts, metadata) -> (rewards, info), known by its third parameter;
    or a function without parameters, or with a device alone, that makes one. Says so. Raises InputError.
    """
    try:
        parameters = list(inspect.signature(reward).parameters.values())
    except (TypeError, ValueError):     # a function in C
        return reward
    if [p.name for p in parameters] in ([], ["device"]):
        try:
            with put_back():
                made = reward(*[device] * len(parameters))
        except (Exception, SystemExit) as error:
            raise InputError(f"reward {name}: takes no pictures, so it was called to make the reward, and failed "
                             f"({type(error).__name__}: {first_line(error)}); mend it there")
        if not callable(made):
            raise InputError(f"reward {name}: takes no pictures and makes no reward; expected parameters (images, "
                             "prompts), or (images, prompts, metadata) as in TRL and ddpo-pytorch")
        return adapt(made, name, device)
    third = [p for p in parameters[2:3] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
             and (p.default is p.empty or "meta" in p.name)]
    if not third:
        return reward
    print(f"  reward {name}: called as in TRL and ddpo-pytorch, f(images in [0, 1], prompts, {third[0].name}) -> "
          f"(rewards, info), with an empty {third[0].name}")

    @wraps(reward)
    def called(images, prompts):
        x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous() / 255
        result = reward(x, tuple(prompts), tuple({} for _ in prompts))
        return result[0] if isinstance(result, tuple) and len(result) == 2 else result

    return called


def fingerprint(reward):
    """SHA-256 of the file that a reward's code is in, in hexadecimal; "" if there is none."""
    try:
        return hashlib.sha256(Path(inspect.getsourcefile(inspect.unwrap(reward))).read_bytes()).hexdigest()
    except (TypeError, OSError):        # an object, a function in C, one typed into a shell
        return ""


def score(reward, images, prompts, name="the reward", first=0, alone=True):
    """Call a reward and check what it returns: float64 (B,), finite. Raises InputError otherwise.

    first: the number of the first of these images in its epoch, for the message; alone: no other thread scores
    meanwhile, so that what the reward changes can be put back.
    """
    which = f"images {first} to {first + len(images) - 1}, the first for the prompt {prompts[0]!r}"
    try:
        with put_back() if alone else nullcontext():
            result = reward(images.copy(), list(prompts))       # copies: some write into them
    except InputError as error:
        raise InputError(f"{name} failed on {which}: {error}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:          # of these are sys.exit's, and asyncio's where a request was cancelled
        frame = error.__traceback__         # the reward's own, if it is written in Python
        while frame and frame.tb_frame.f_code.co_filename == __file__:
            frame = frame.tb_next
        line = f", in line {frame.tb_lineno} of {frame.tb_frame.f_code.co_filename}" if frame else ""
        raise InputError(f"{name} failed on {which}{line} ({type(error).__name__}: {first_line(error)}); mend it there")
    try:
        numbers = result
        if isinstance(result, torch.Tensor):
            numbers = result.detach().cpu() if result.is_complex() else result.detach().cpu().double()
        if isinstance(result, (list, tuple)):
            numbers = [r.item() if isinstance(r, torch.Tensor) and r.numel() == 1 else r for r in result]
        rewards = np.asarray(numbers)
        found = f"shape {rewards.shape} and type {rewards.dtype}"
    except Exception:       # lists of unequal lengths
        rewards, found = np.empty(0), "parts that do not fit together"
    if rewards.shape != (len(images),) or rewards.dtype.kind not in "biuf":
        raise InputError(f"{name} returned a {type(result).__name__} of {found} for {which}; expected one real number "
                         f"for each image, shape ({len(images)},)")
    rewards = rewards.astype(np.float64)
    bad = np.flatnonzero(~(np.abs(rewards) <= LARGEST))
    if len(bad):
        which = ", ".join(f"{first + i} ({prompts[i]!r})" for i in bad[:5]) + (" ..." if len(bad) > 5 else "")
        raise InputError(f"{name} is {rewards[bad[0]]:g} for {len(bad)} of {len(images)} images; by their number in "
                         f"the epoch: {which}; expected numbers, at most {LARGEST:g}")
    return rewards
