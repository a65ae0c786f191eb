"""Prompts and seeds to train on and to evaluate on."""
import json
from pathlib import Path

import numpy as np

from .files import InputError

# The paper's 45 common animals and its three activities    [paper App. D.6]
ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard
beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly
llama camel bat gorilla hedgehog kangaroo""".split()
ACTIVITIES = ["riding a bike", "playing chess", "washing dishes"]

NUMBERS = "two three four five six seven eight".split()
# 22 of the animals; the paper does not say which 22 it counts, so these are our choice
COUNTED = dict(cat="cats", dog="dogs", horse="horses", monkey="monkeys", rabbit="rabbits", zebra="zebras",
               spider="spiders", bird="birds", cow="cows", goat="goats", lion="lions", tiger="tigers", bear="bears",
               fox="foxes", wolf="wolves", butterfly="butterflies", dolphin="dolphins", mouse="mice", turtle="turtles",
               frog="frogs", duck="ducks", pig="pigs")

# The first held-out seed. torch's generator uses 32 bits of a seed: training draws from the upper half, evaluation
# counts up from here, sample.py from 0.
HELD_OUT = 2 ** 30


def article(noun):
    """The noun with its indefinite article: "a fox", "an ant"."""
    return ("an " if noun[0].lower() in "aeiou" and not noun.startswith("Eu") else "a ") + noun


def animals():
    """45: "a cat", "a dog", ..."""
    return [article(animal) for animal in ANIMALS]


def imagenet_animals():
    """398: the animals among ImageNet's classes (0 to 397), with open_clip's names."""
    from open_clip import IMAGENET_CLASSNAMES
    return [article(name) for name in IMAGENET_CLASSNAMES[:398]]


def activities():
    """135: "a cat riding a bike", "a cat playing chess", ..."""
    return [f"{article(animal)} {activity}" for animal in ANIMALS for activity in ACTIVITIES]


def counting():
    """154: "two cats" to "eight pigs"."""
    return [f"{number} {plural}" for plural in COUNTED.values() for number in NUMBERS]


def dpok():
    """4: the prompts of the comparison with DPOK    [paper App. C]."""
    return ["a green colored rabbit", "four wolves in the park", "a dog and a cat", "a dog on the moon"]


PROMPT_SETS = dict(animals=animals, imagenet_animals=imagenet_animals, activities=activities, counting=counting,
                   dpok=dpok)


def is_json(text):
    """Whether a text is a list or an object in JSON."""
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def find_prompts(name, flag="--prompts"):
    """A list of prompts: one of PROMPT_SETS, or the lines of a text file. Raises InputError if there are none."""
    if name in PROMPT_SETS:
        return PROMPT_SETS[name]()
    path = Path(name)
    if not path.is_file():
        raise InputError(f"{flag} {name}: neither a prompt set ({', '.join(PROMPT_SETS)}) nor a text file with one "
                         "prompt a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{flag} {name}: not a text file; expected UTF-8, one prompt a line") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]      # reading made \n of \r\n and of \r
    if is_json(text) or lines and is_json(lines[0]):
        raise InputError(f"{flag} {name}: a JSON file; expected a text file, one prompt a line and nothing else")
    if "\0" in text:
        raise InputError(f"{flag} {name}: not a text file; expected UTF-8, one prompt a line")
    if not lines:
        raise InputError(f"{flag} {name}: empty; expected one prompt a line")
    return lines


def evaluation_prompts(name, trained):
    """The prompts to evaluate on: the trained ones (with other seeds) if name is empty, else those of a set or text
    file that are not trained on. Raises InputError if there are none."""
    if not name:
        return trained
    new = [prompt for prompt in find_prompts(name, "--eval-prompts") if prompt not in set(trained)]
    if not new:
        raise InputError(f"--eval-prompts {name}: all of these prompts are trained on; expected some that are not")
    return new


def draw_prompts(prompts, count, *, seed, epoch, group_size=1):
    """The prompts and seeds of an epoch's samples: every prompt about equally often, in random order.

    group_size: that many samples in a row have the same prompt; count is a multiple of it. The result depends only on
    the arguments, so a resumed run draws the same samples as an uninterrupted one. Returns (count str, count int).
    """
    rng = np.random.default_rng([seed, epoch])
    repeats = -(-count // group_size // len(prompts))       # rounded up
    order = np.concatenate([rng.permutation(len(prompts)) for _ in range(repeats)])[:count // group_size]
    rng.shuffle(order)
    return [prompts[i] for i in order.repeat(group_size)], rng.integers(2 ** 31, 2 ** 32, size=count).tolist()


def held_out(prompts, count):
    """Prompts and seeds to evaluate on, always the same; no seed is trained on: (count str, count int)."""
    return [prompts[i % len(prompts)] for i in range(count)], [HELD_OUT + i for i in range(count)]
