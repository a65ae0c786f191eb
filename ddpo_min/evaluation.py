"""The evaluation: the same prompts and seeds before, during and after training, none of them ever trained on."""
from dataclasses import dataclass

import numpy as np

from .plan import micro_batches, part_of
from .policy import Policy
from .processes import count, gather_images, rank
from .prompts import held_out
from .rollout import sample_trajectories
from .scorer import Scorer


def evaluate(policy, prompts, seeds, scorer, *, micro_batch):
    """Draw these pictures and score them: (images uint8 (N, H, W, 3), rewards (N,), {name: scores (N,)})."""
    scorer.forget()         # what an epoch that was stopped has left
    own = part_of(0, len(prompts), rank(), count())
    drawn = sample_trajectories(policy, prompts, seeds, micro_batches(own.start, own.stop, micro_batch), keep="images",
                                on_images=scorer.add)
    rewards, scores = scorer.collect()
    return gather_images(drawn.images), rewards, scores


@dataclass
class Evaluation:
    """What is evaluated on, and how; the ten pictures that are shown are spread over the prompts."""
    policy: Policy
    scorer: Scorer
    prompts: list
    seeds: list
    micro_batch: int

    @classmethod
    def of(cls, policy, scorer, prompts, count, micro_batch):
        """The evaluation on `count` held-out seeds of these prompts."""
        return cls(policy, scorer, *held_out(prompts, count), micro_batch)

    @property
    def shown(self):
        """The numbers of the pictures that are shown: up to ten of different prompts."""
        last = len(set(self.prompts)) - 1
        return sorted(set(np.linspace(0, last, 10).astype(int).tolist()))

    def run(self):
        """Everything drawn and scored, see evaluate()."""
        return evaluate(self.policy, self.prompts, self.seeds, self.scorer, micro_batch=self.micro_batch)

    def run_shown(self):
        """Those that are shown, drawn and scored."""
        prompts, seeds = ([column[i] for i in self.shown] for column in (self.prompts, self.seeds))
        return evaluate(self.policy, prompts, seeds, self.scorer, micro_batch=self.micro_batch)
