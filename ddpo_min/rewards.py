"""Rewards: functions (images uint8 (B, H, W, 3), prompts: list of B str) -> float64 (B,). Higher is better."""
import io

import numpy as np
from PIL import Image

from .files import InputError


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


def find_reward(name):
    """The reward function of that name. Raises InputError if there is none."""
    if name not in REWARDS:
        raise InputError(f"--reward {name}: unknown; expected one of {', '.join(REWARDS)}")
    return REWARDS[name]


def score(reward, images, prompts):
    """Call a reward and check what it returns: float64 (B,), finite. Raises InputError otherwise."""
    rewards = np.asarray(reward(images, prompts), dtype=np.float64)
    if rewards.shape != (len(images),):
        raise InputError(f"the reward returned shape {rewards.shape} for {len(images)} images; expected ({len(images)},)")
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        raise InputError(f"the reward of image {bad[0]} ({prompts[bad[0]]!r}) is {rewards[bad[0]]}; expected a number")
    return rewards
