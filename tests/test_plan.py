"""Which samples share a micro-batch and an optimizer step; without tensors, so all of it is counted by hand."""
from dataclasses import replace

import numpy as np
import pytest

from ddpo_min.plan import Plan, micro_batches

UNEVEN = Plan(12, 2, 4, range(5), inner_epochs=3)      # minibatches of 6, in micro-batches of 4 and 2


def rng(seed=0):
    return np.random.default_rng(seed)


def numbers(samples):
    return list(range(samples.start, samples.stop))


def test_micro_batches_by_hand():
    assert micro_batches(3, 10, 3) == [slice(3, 6), slice(6, 9), slice(9, 10)]
    assert micro_batches(0, 4, 4) == micro_batches(0, 4, 9) == [slice(0, 4)]


def test_the_rollout_takes_every_sample_once_in_order_and_never_crosses_a_minibatch():
    assert list(UNEVEN.rollout()) == [slice(0, 4), slice(4, 6), slice(6, 10), slice(10, 12)]
    assert list(Plan(4, 1, 64).rollout()) == [slice(0, 4)]


def test_every_sample_is_in_one_minibatch_of_each_inner_epoch_in_the_rollouts_micro_batches():
    minibatches = [list(minibatch) for minibatch in UNEVEN.minibatches(rng())]
    assert len(minibatches) == 2 * 3
    cut = {(part.start, part.stop) for part in UNEVEN.rollout()}
    for inner in range(3):
        seen = {}
        for minibatch in minibatches[2 * inner:2 * inner + 2]:
            assert len({number // 6 for samples, _, _ in minibatch for number in numbers(samples)}) == 1
            for samples, i, _ in minibatch:
                assert (samples.start, samples.stop) in cut
                for number in numbers(samples):
                    seen.setdefault(number, []).append(i)
        assert seen == {number: [0, 1, 2, 3, 4] for number in range(12)}


def test_the_parts_of_a_minibatch_are_its_pairs_of_sample_and_step():
    for minibatch in replace(UNEVEN, fraction=0.6).minibatches(rng()):
        parts = [(samples.stop - samples.start, part) for samples, _, part in minibatch]
        assert sum(part for _, part in parts) == pytest.approx(1, abs=1e-15)
        assert all(part == pytest.approx(size / (6 * 3)) for size, part in parts) and len(parts) == 2 * 3


@pytest.mark.parametrize("fraction, window, count", [
    (0.5, range(8), 4), (0.34, range(3), 1), (0.01, range(8), 1), (0.7, range(2, 5), 2), (1.0, range(2, 5), 3)])
def test_a_minibatch_is_trained_on_so_many_steps_of_the_window_in_their_order(fraction, window, count):
    plan, all_steps = Plan(8, 4, 64, window, fraction=fraction), set()
    for seed in range(30):
        drawn = [tuple(i for _, i, _ in minibatch) for minibatch in plan.minibatches(rng(seed))]
        assert all(len(steps) == count and list(steps) == sorted(set(steps)) for steps in drawn)
        all_steps |= set(sum(drawn, ()))
    assert all_steps == set(window)


def test_minibatches_are_shuffled_anew_and_the_generator_alone_decides():
    plan = Plan(16, 8, 2, range(1), inner_epochs=2)
    order = [[next(iter(minibatch))[0].start for minibatch in plan.minibatches(rng(seed))] for seed in (0, 0, 1)]
    assert order[0] == order[1] != order[2] and order[0][:8] != order[0][8:]
    assert sorted(order[0][:8]) == sorted(order[0][8:]) == list(range(0, 16, 2)) != order[0][:8]


def test_regression_draws_what_has_weight_again_and_again_equally_often():
    weights = np.array([0, 2.0, 0, 1, 0.5, 0, 4, 0])
    plan = Plan(8, 2, 3, inner_epochs=3)
    minibatches = [list(minibatch) for minibatch in plan.random_minibatches(weights, rng())]
    assert [[len(samples) for samples, *_ in minibatch] for minibatch in minibatches] == [[3, 1]] * 6
    assert [[part for *_, part in minibatch] for minibatch in minibatches] == [[0.75, 0.25]] * 6
    drawn = np.concatenate([samples for minibatch in minibatches for samples, *_ in minibatch]).tolist()
    assert {number: drawn.count(number) for number in set(drawn)} == {1: 6, 3: 6, 4: 6, 6: 6}
    passes = [drawn[i:i + 4] for i in range(0, 24, 4)]
    assert all(sorted(one) == [1, 3, 4, 6] for one in passes) and len({tuple(one) for one in passes}) > 1


def test_a_minibatch_larger_than_what_has_weight_repeats_it():
    drawn = [samples for minibatch in Plan(8, 1, 64).random_minibatches(np.arange(8) // 5, rng())
             for samples, *_ in minibatch][0].tolist()
    assert len(drawn) == 8 and sorted(drawn[:3]) == sorted(drawn[3:6]) == [5, 6, 7]


def test_progress_hears_of_every_sample_after_it_is_done():
    heard = []
    plan = replace(UNEVEN, inner_epochs=1, progress=lambda *news: heard.append(news))
    rollout = plan.rollout()
    next(rollout)
    assert heard == [("sampling", 0)]
    list(rollout)
    assert heard == [("sampling", n) for n in (0, 4, 2, 4, 2)]
    heard.clear()
    for minibatch in plan.minibatches(rng()):
        list(minibatch)
    assert heard == [("training", n) for n in (0, 4, 2)] * 2
    heard.clear()
    for minibatch in plan.random_minibatches(np.ones(12), rng()):
        list(minibatch)
    assert heard == [("training", n) for n in (0, 4, 2)] * 2
