"""Which samples go through the network together, and which of them share an optimizer step. No tensors in here.

An epoch's N samples are cut into minibatches, one an optimizer step, these into a part for each process, and the parts
into micro-batches, as many samples as fit into memory. Rollout and training use the same micro-batches: only then is
the first ratio exactly 1, because networks round differently on batches of another size.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .schedule import TRAIN_TIMESTEPS


def micro_batches(start, stop, size):
    """The samples start .. stop - 1 in slices of `size`, the last one smaller if need be."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def part_of(start, stop, rank, processes):
    """One process's part of the samples start .. stop - 1, a slice; the parts differ by one sample at most."""
    first, after = (start + (stop - start) * r // processes for r in (rank, rank + 1))
    return slice(first, after)


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
    rank: int = 0                       # the number of this process, of so many
    processes: int = 1

    @property
    def minibatch(self):
        """Samples an optimizer step."""
        return self.samples // self.updates

    def rollout(self):
        """This process's samples, minibatch by minibatch: yields slices, the micro-batches."""
        self.progress("sampling", 0)
        for first in range(0, self.samples, self.minibatch):
            for samples in self._micro_batches(first):
                yield samples
                self._tell("sampling", samples, first)

    def _part(self, first):
        return part_of(first, first + self.minibatch, self.rank, self.processes)

    def _micro_batches(self, first):
        own = self._part(first)
        return micro_batches(own.start, own.stop, self.micro_batch)

    def _tell(self, phase, done, first):
        """That a micro-batch of the minibatch from `first` on is done, and the other processes' like it."""
        own = self._part(first)
        scale = self.minibatch / (own.stop - own.start)
        self.progress(phase, round((done.stop - own.start) * scale) - round((done.start - own.start) * scale))

    def minibatches(self, rng):
        """DDPO's: yields a minibatch for each optimizer step, every one once an inner epoch, in random order.

        A minibatch is an iterator of (samples, i, part): a micro-batch (slice) of this process at denoising step i, and
        which part of the minibatch's (sample, step) pairs it is; the parts of all processes sum to 1.
        """
        count = max(1, round(self.fraction * len(self.steps)))
        for _ in range(self.inner_epochs):
            for first in rng.permutation(np.arange(0, self.samples, self.minibatch)).tolist():
                yield self._pairs(first, np.sort(rng.permutation(self.steps)[:count]).tolist())

    def _pairs(self, first, steps):
        self.progress("training", 0)
        for samples in self._micro_batches(first):
            for i in steps:
                yield samples, i, (samples.stop - samples.start) / (self.minibatch * len(steps))
            self._tell("training", samples, first)

    def noised_minibatches(self, rng, times, count):
        """The forward process's: DDPO's minibatches, each of their samples noised anew to `count` timesteps.

        times: the timesteps to choose from; they are cut into `count` parts, and one is drawn from each. A minibatch is
        an iterator of (samples, t, seeds, part): a micro-batch (slice) of this process, the timestep and the noise's
        seed of each of its samples (the same numbers however the minibatch is divided), and its part of the minibatch.
        """
        times, k = np.asarray(times), np.arange(count)[:, None]
        for _ in range(self.inner_epochs):
            for first in rng.permutation(np.arange(0, self.samples, self.minibatch)).tolist():
                place, seeds = (rng.integers(most, size=(count, self.minibatch)) for most in (len(times), 2 ** 32))
                yield self._noised(first, times[(k * len(times) + place) // count], seeds)

    def _noised(self, first, t, seeds):
        self.progress("training", 0)
        for samples in self._micro_batches(first):
            own = slice(samples.start - first, samples.stop - first)
            for k in range(len(t)):
                yield samples, t[k, own], seeds[k, own], (samples.stop - samples.start) / t.size
            self._tell("training", samples, first)

    def random_minibatches(self, weights, rng):
        """Weighted regression's: the samples of weight above 0, again and again in new random order.

        weights: (N,). Yields updates * inner_epochs minibatches, each an iterator of (samples, t, seeds, part): a
        micro-batch (int array) of those that this process has drawn, the timestep and the noise's seed of each (the
        same numbers however the minibatch is divided), and which part of the minibatch it is.
        """
        kept, order = np.flatnonzero(weights), np.array([], dtype=int)
        for _ in range(self.updates * self.inner_epochs):
            while len(order) < self.minibatch:
                order = np.append(order, rng.permutation(kept))
            chosen, order = order[:self.minibatch], order[self.minibatch:]
            t, seeds = (rng.integers(most, size=self.minibatch) for most in (TRAIN_TIMESTEPS, 2 ** 32))
            yield self._parts(chosen, t, seeds)

    def _parts(self, chosen, t, seeds):
        self.progress("training", 0)
        own = self._part(0)
        place = chosen % self.minibatch         # in the minibatch that it was drawn in
        here = np.flatnonzero((own.start <= place) & (place < own.stop))
        for part in micro_batches(0, len(here), self.micro_batch):
            some = here[part]
            yield chosen[some], t[some], seeds[some], len(some) / self.minibatch
            done = self.minibatch * np.array([part.start, part.stop]) / len(here)
            self.progress("training", int(np.diff(done.round())[0]))
