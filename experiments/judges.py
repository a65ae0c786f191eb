"""What the experiments watch beside the reward:  python train.py --watch experiments/judges.py:recognised"""
import sys
from functools import cache

import numpy as np
from results import ROOT

sys.path.insert(0, str(ROOT / "weights"))
import evaluate
from ddpo_min.prompts import ANIMALS, COUNTED

ANIMAL = {**{animal: i for i, animal in enumerate(ANIMALS)}, **{COUNTED[a]: ANIMALS.index(a) for a in COUNTED}}


@cache
def classifier():
    """The model card's classifier; no reward knows it."""
    return evaluate.load_classifiers()["the classifier"]


def recognised(images, prompts):
    """1 where the classifier sees the animal of the prompt, which is its first word that names one; else 0."""
    animals = [next(ANIMAL[word] for word in prompt.split() if word in ANIMAL) for prompt in prompts]
    return evaluate.recognised(classifier(), images, animals).astype(np.float64)
