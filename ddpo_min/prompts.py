"""Prompts to train on, and the order in which they come."""
from pathlib import Path

import numpy as np

from .files import InputError

# The paper's 45 common animals    [paper App. D.6]
ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard
beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly
llama camel bat gorilla hedgehog kangaroo""".split()

# torch's generator uses 32 bits of a seed: training takes the upper half, evaluation counts from here, sample.py
# from 0.
HELD_OUT = 2 ** 30


def find_prompts(name):
    """A list of prompts: "animals", or the lines of a text file. Raises InputError if there are none."""
    if name == "animals":
        return [("an " if animal[0] in "aeiou" else "a ") + animal for animal in ANIMALS]
    path = Path(name)
    if not path.is_file():
        raise InputError(f"--prompts {name}: neither a prompt set (animals) nor a text file with one prompt a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"--prompts {name}: not a text file; expected UTF-8, one prompt a line")
    if not lines:
        raise InputError(f"--prompts {name}: empty; expected one prompt a line")
    return lines


def draw(prompts, count, seed, epoch):
    """The prompts and seeds of an epoch's samples: every prompt about equally often, in random order.

    A pure function of (seed, epoch), so a resumed run draws what an uninterrupted one would have.
    Returns (count str, count int).
    """
    rng = np.random.default_rng([seed, epoch])
    rounds = -(-count // len(prompts))
    order = np.concatenate([rng.permutation(len(prompts)) for _ in range(rounds)])[:count]
    rng.shuffle(order)
    return [prompts[i] for i in order], rng.integers(2 ** 31, 2 ** 32, size=count).tolist()


def held_out(prompts, count):
    """Fixed prompts and seeds to evaluate on, never trained on: (count str, count int)."""
    return [prompts[i % len(prompts)] for i in range(count)], [HELD_OUT + i for i in range(count)]
