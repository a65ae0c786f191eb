"""Rewards by name, their weighted sum, and scoring beside sampling."""
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from . import clip_rewards, preference_rewards
from .advantages import clipped_advantages
from .files import InputError
from .processes import gather
from .rewards import REWARDS, WITH_NETWORKS, adapt, find_own, fingerprint, score
from .vlm import alignment
from .vlm import check as check_vlm

IN_THREADS = {"jpeg", "incompressible", "vlm"}      # these may be called from several threads at once
PATIENCE = 600      # seconds to wait for scores without a word


def parse_rewards(text, flag="--reward"):
    """"aesthetic=1,jpeg=0.05" -> {name: weight}; a name alone has weight 1. Raises InputError if a name is unknown."""
    weights = {}
    for part in text.split(","):
        name, _, weight = (piece.strip() for piece in (part if "=" in part else part + "=1").rpartition("="))
        if not name:
            raise InputError(f"{flag} {text}: a part without a name; expected NAME,NAME or NAME=WEIGHT,NAME=WEIGHT")
        if name in weights:
            raise InputError(f"{flag} {text}: {name} is given twice; give it one weight")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise InputError(f"{flag} {text}: {weight!r} is not a number; expected NAME=WEIGHT,NAME=WEIGHT") from None
        if not np.isfinite(weights[name]) or weights[name] == 0:
            raise InputError(f"{flag} {text}: weight {weight}; expected a number other than 0")
        if name not in REWARDS and name not in WITH_NETWORKS:
            find_own(name, flag)
    return weights


def check_rewards(reward, watch, *, small, clip, files, vlm):
    """The rewards that are asked for: ({name: weight} of the sum, [names to score, the watched ones too]).

    reward: as parse_rewards() takes it, "" for a function that is passed in; watch: names with commas between; small:
    whether the model is of the shipped one's kind; clip, vlm: keywords of clip_rewards.check() and vlm.check(); files:
    see preference_rewards.check(). Raises InputError for what could not work, before anything slow starts.
    """
    weights = parse_rewards(reward) if reward else {}
    watched = parse_rewards(watch, "--watch") if watch else {}
    if any(weight != 1 for weight in watched.values()):
        raise InputError(f"--watch {watch}: weights have no meaning there; expected NAME,NAME")
    names = list(dict.fromkeys([*weights, *watched]))
    clip_rewards.check(names, small=small, **clip)
    preference_rewards.check(names, files)
    if "vlm" in names:
        check_vlm(**{name: vlm[name] for name in ("url", "model", "reference", "encoder", "api_key_env")})
    return weights, names


class Scorer:
    """Scores micro-batches of pictures beside the drawing of the next one; the order stays as given.

    JPEG sizes and a server's answers are waited for in several threads; all others, also users' own, which need not be
    safe to call from several threads at once, in one.
    """

    def __init__(self, weights, functions, total="reward", gpu=None):
        """weights: {name: weight in the sum}, absent or 0 if only watched; functions: {name: reward function}; total:
        the name of the sum, which is not a part of itself; gpu: the number of this process's GPU, if it has one: new
        threads have the first one as "cuda"."""
        self.weights, self.functions, self.total = weights, functions, total
        self.pool = ThreadPoolExecutor(max_workers=4 if set(functions) <= IN_THREADS else 1,
                                       initializer=None if gpu is None else partial(torch.cuda.set_device, gpu))
        self.files = {name: fingerprint(function) for name, function in functions.items()       # of users' own
                      if name not in REWARDS and name not in WITH_NETWORKS}
        self.pending = []       # (number of its first sample, the future scores) of each micro-batch
        self.parts = {}         # {name: scores (N,)} of the sum's parts, of what was collected last
        self.missing, self.reported = {}, set()     # watched rewards that failed: why, since collect(); ever

    def add(self, images, prompts, first):
        """Begin to score a micro-batch: uint8 (B, H, W, 3), list of B str, the number of the first in its epoch.

        Raises what a reward raised before.
        """
        if self.failed():
            self.results()         # raises: no need to draw the rest of the epoch
        self.pending.append((first, self.pool.submit(self.score, images, prompts, first)))

    def failed(self):
        """Whether a reward has raised."""
        return any(scores.done() and scores.exception() for _, scores in self.pending)

    def score(self, images, prompts, first):
        """{name: float64 (B,)} of a micro-batch whose first picture is number `first` of the epoch.

        A reward that is only watched and fails is left out until collect().
        """
        scores = {}
        for name, function in self.functions.items():
            try:
                if name not in self.missing:
                    scores[name] = score(function, images, prompts, f"reward {name}", first,
                                         alone=name not in IN_THREADS)
            except InputError as error:
                if name in self.weights:
                    raise
                self.missing[name] = str(error)
        return scores

    def collect(self):
        """Wait for everything added: (rewards (N,), {name: scores (N,)} of a sum's parts and of what is watched).

        With the vision-language reward, the scores have "empty_answers", too: 1 where it scores exactly 0. Raises what
        a reward raised, and InputError if all these are empty.
        """
        parts, missing = self.of_all(*self.results())
        scores = {name: np.concatenate([part[name] for part in parts]) for name in self.functions
                  if name not in missing}
        if "vlm" in scores:
            scores["empty_answers"] = (scores["vlm"] == 0).astype(float)
            if scores["empty_answers"].all() and "vlm" in self.weights:
                raise InputError(f"reward vlm: all {len(scores['vlm'])} answers of the vision-language model are empty "
                                 "or have nothing in common with the prompt; see --vlm-model and --vlm-question")
        for name in missing.keys() - self.reported:
            tqdm.write(f"{missing[name]}; it is only watched: the run goes on, without it where it fails")
        self.reported |= missing.keys()
        self.parts = {name: scores[name] for name in self.weights}
        rewards = sum(weight * scores[name] for name, weight in self.weights.items())
        return rewards, {name: own for name, own in scores.items() if name != self.total}

    def weigh_each(self, prompts, rewards, *, clip, **how):
        """The advantages of what was collected last, each part of the sum by itself: its weight counts, not its scale.

        A = sum_k w_k A_k, cut at +-clip; A_k: of part k alone, as in clipped_advantages(), uncut.
        prompts: list of N str; rewards: the sum, which plays no part; how: the other keywords of clipped_advantages(),
        whose `statistics` then keep the rewards of each (part, prompt). Returns float64 (N,).
        """
        own = {name: clipped_advantages([(name, prompt) for prompt in prompts], scores, clip=np.inf, **how)
               for name, scores in self.parts.items()}
        return sum(self.weights[name] * advantages for name, advantages in own.items()).clip(-clip, clip)

    def results(self):
        """Wait for everything added: ([(first, {name: scores})] of micro-batches, {watched reward: why it failed})."""
        try:
            if (wait([scores for _, scores in self.pending], PATIENCE, FIRST_EXCEPTION).not_done
                    and not self.failed()):
                tqdm.write(f"reward {', '.join(self.functions)}: no answer for {PATIENCE} s; if it hangs, press "
                           "Ctrl-C, mend it and go on with --resume")
            return [(first, scores.result()) for first, scores in self.pending], self.missing
        finally:
            self.forget()

    def of_all(self, scored, failed):
        """Everything that all processes have scored, in the order of the samples; given: results() of this one."""
        listed = [(first, {name: values.tolist() for name, values in part.items()}) for first, part in scored]
        found, missing = [], {}
        for parts, failures in gather((listed, failed)):
            found += parts
            missing.update(failures)
        found.sort(key=lambda pair: pair[0])
        return [{name: np.array(values) for name, values in part.items()} for _, part in found], missing

    def forget(self):
        """Drop what was added and not collected."""
        for _, scores in self.pending:
            scores.cancel()
        self.pending, self.missing = [], {}


def make_scorer(reward, watch, model, device, *, prompts, own=None, **made_of):
    """The Scorer of the rewards that are asked for; prints what the ones with networks of their own are made of.

    prompts: those trained on; own: a function (images, prompts) -> numbers, to train on in place of `reward`, which is
    then its name only; made_of: the keywords of check_rewards().
    """
    weights, names = check_rewards("" if own else reward, watch, **made_of)
    functions = {name: find_reward(name, model, device, prompts=prompts, **made_of) for name in names}
    if own:
        weights, functions = {reward: 1.0}, {reward: adapt(own, reward, device), **functions}
    return Scorer(weights, functions, total=reward, gpu=torch.device(device).index)


def find_reward(name, model=None, device="cpu", *, prompts=(), small=True, clip=None, files=None, vlm=None):
    """The reward function of one name; the keywords are for those with networks of their own, see check_rewards()."""
    if name in ("aesthetic", "clip"):
        return getattr(clip_rewards, name)(device, small=small, **clip or {})
    if name in preference_rewards.FILES:
        return preference_rewards.preference(name, device, (files or {}).get(name, ""))
    if name == "vlm":
        return alignment(model.text_encoder, prompts, **vlm)
    return REWARDS.get(name) or adapt(find_own(name), name, device)
