"""Which samples go through the network together, and which of them share an optimizer step. No tensors in here.

An epoch's N samples are cut into minibatches, one an optimizer step, and these into micro-batches, as many as fit into
memory. Rollout and training use the same micro-batches: only then is the first ratio exactly 1, because networks round
differently on batches of another size.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def micro_batches(start, stop, size):
    """The samples start .. stop - 1 in slices of `size`, the last one smaller if need be."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def no_progress(phase, samples):
    """What a plan tells its progress to by default: nobody."""


@dataclass(frozen=True)
class Plan:
    """The order of an epoch; every random choice comes from the generator that is passed in."""
    samples: int                        # N
    updates: int                        # minibatches, so optimizer steps, an epoch; N is a multiple of it
    micro_batch: int
    steps: range = range(0)             # the denoising steps i that may be trained on
    fraction: float = 1.0               # of them that a minibatch is trained on, drawn anew for each
    inner_epochs: int = 1               # passes over the same samples
    progress: Callable = no_progress    # called with ("sampling" or "training", how many samples are done)

    @property
    def minibatch(self):
        """Samples an optimizer step."""
        return self.samples // self.updates

    def rollout(self):
        """All samples, minibatch by minibatch: yields slices, the micro-batches."""
        self.progress("sampling", 0)
        for first in range(0, self.samples, self.minibatch):
            for samples in micro_batches(first, first + self.minibatch, self.micro_batch):
                yield samples
                self.progress("sampling", samples.stop - samples.start)

    def minibatches(self, rng):
        """DDPO's: yields a minibatch for each optimizer step, every one once an inner epoch, in random order.

        A minibatch is an iterator of (samples, i, part): a micro-batch (slice) at denoising step i, and which part of
        the minibatch's (sample, step) pairs it is; the parts of a minibatch sum to 1.
        """
        count = max(1, round(self.fraction * len(self.steps)))
        for _ in range(self.inner_epochs):
            for first in rng.permutation(np.arange(0, self.samples, self.minibatch)).tolist():
                yield self._pairs(first, np.sort(rng.permutation(self.steps)[:count]).tolist())

    def _pairs(self, first, steps):
        self.progress("training", 0)
        for samples in micro_batches(first, first + self.minibatch, self.micro_batch):
            size = samples.stop - samples.start
            for i in steps:
                yield samples, i, size / (self.minibatch * len(steps))
            self.progress("training", size)

    def random_minibatches(self, weights, rng):
        """Weighted regression's: the samples of weight above 0, again and again in new random order.

        weights: (N,). Yields updates * inner_epochs minibatches, each an iterator of (samples, part): a micro-batch
        (int array) and which part of the minibatch it is.
        """
        kept, order = np.flatnonzero(weights), np.array([], dtype=int)
        for _ in range(self.updates * self.inner_epochs):
            while len(order) < self.minibatch:
                order = np.append(order, rng.permutation(kept))
            chosen, order = order[:self.minibatch], order[self.minibatch:]
            yield self._parts(chosen)

    def _parts(self, chosen):
        self.progress("training", 0)
        for part in micro_batches(0, self.minibatch, self.micro_batch):
            yield chosen[part], len(chosen[part]) / self.minibatch
            self.progress("training", len(chosen[part]))
