"""Sums of rewards: as they are, the largest scale leads; with --normalise-each the weights alone decide."""
from functools import partial

import numpy as np
import pytest
import torch

import train
from conftest import ROOT
from ddpo_min import scorer
from ddpo_min.advantages import PromptStatistics, clipped_advantages
from ddpo_min.files import InputError
from test_train import arguments, assert_same_run

PROMPTS = [prompt for prompt in ("a cat", "a dog", "a fox", "a cow") for _ in range(16)]
WEIGHTS = {"small": 1.0, "large": 1.0}
TWO = """
import numpy as np


def bright(images, prompts):
    return images.mean((1, 2, 3)) / 255


def dull(images, prompts):
    return -1000 * images.std((1, 2, 3))
"""


def parts(seed):
    """{name: 64 rewards} that have nothing to do with each other, of scale 1 and 1000; prompts differ, too."""
    rng, of_prompt = np.random.default_rng(seed), np.repeat(np.arange(4.0), 16)
    return {"small": rng.normal(size=64) + of_prompt, "large": 1000 * (rng.normal(size=64) - 3 * of_prompt)}


def scored(rewards):
    """(r - mean) / std of each prompt's 16, in plain numpy."""
    groups = rewards.reshape(4, 16)
    return ((groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)).ravel()


def weigh_each(given, weights=WEIGHTS, **how):
    """The advantages of parts that a scorer has collected."""
    own = scorer.Scorer(weights, {})
    own.parts = given
    return own.weigh_each(PROMPTS, None, **how)


def correlation(a, b):
    return np.corrcoef(a, b)[0, 1]


@pytest.mark.parametrize("how", [dict(normalise="prompt"), dict(normalise="group", group_size=16)])
def test_the_raw_sum_follows_the_large_part_and_normalise_each_both(how):
    given = parts(0)
    small, large = (scored(given[name]) for name in WEIGHTS)
    raw, each = (weigh(clip=5, statistics=PromptStatistics(16, 8), **how) for weigh in (
        partial(clipped_advantages, PROMPTS, sum(given.values())), partial(weigh_each, given)))
    assert correlation(raw, large) > 0.99999 and abs(correlation(raw, small)) < 0.4
    assert np.abs(each - (small + large)).max() < 1e-9
    assert correlation(each, large) > 0.6 and correlation(each, small) > 0.6


@pytest.mark.parametrize("weights, clip", [({"small": 3.0, "large": -0.5}, 11), ({"small": 0.5, "large": -0.5}, 3)])
def test_the_weights_count_and_the_sum_is_cut_not_its_parts(weights, clip):
    """One reward is far out: of the first sum it is cut, of the second its part alone would be."""
    given = parts(1)
    given["small"][0] = 100
    small, large = scored(given["small"]), scored(given["large"])
    total = weights["small"] * small + weights["large"] * large
    assert (total[0] > 11) if clip == 11 else (small[0] > 3 > total[0])
    each = weigh_each(given, weights, clip=clip, normalise="prompt", statistics=PromptStatistics(16, 8))
    assert np.abs(each - total.clip(-clip, clip)).max() < 1e-9


def test_each_part_has_its_own_statistics_over_the_epochs_and_they_are_kept():
    """Three epochs, and the same with the state saved and loaded between."""
    whole, how = PromptStatistics(24, 20), dict(clip=5, normalise="prompt")
    alone = {name: PromptStatistics(24, 20) for name in WEIGHTS}
    resumed = PromptStatistics(24, 20)
    for epoch in range(3):
        given = parts(epoch)
        each = weigh_each(given, statistics=whole, **how)
        assert np.array_equal(each, sum(alone[name].advantages(PROMPTS, given[name]) for name in WEIGHTS).clip(-5, 5))
        state = resumed.state_dict()
        resumed = PromptStatistics(24, 20)
        resumed.load_state_dict(state)
        assert np.array_equal(each, weigh_each(given, statistics=resumed, **how))
    assert len(whole.rewards) == 8 and {len(kept) for kept in whole.rewards.values()} == {24}


@pytest.mark.parametrize("each", [False, True])
def test_an_update_gets_the_advantages_of_the_sum_or_the_sum_of_the_advantages(tiny_file, tmp_path, monkeypatch, each):
    (tmp_path / "two.py").write_text(TWO)
    more = ["--reward", f"{tmp_path / 'two.py'}:bright=1,{tmp_path / 'two.py'}:dull=1", "--normalise", "epoch",
            *["--normalise-each"] * each]
    got, update, collect, seen = [], train.ddpo_update, scorer.Scorer.collect, []
    monkeypatch.setattr(train, "ddpo_update", lambda *a, **k: (got.append(a[3]), update(*a, **k))[1])
    monkeypatch.setattr(scorer.Scorer, "collect", lambda own: (collected := collect(own), seen.append(collected[1]))[0])
    train.main(arguments(tiny_file, tmp_path / "run", *more, epochs=1))
    expected = [(r - r.mean()) / r.std() for r in seen[1].values()]       # the evaluation before is the first
    total = sum(seen[1].values())
    assert np.abs(got[0] - (sum(expected) if each else (total - total.mean()) / total.std())).max() < 1e-9


def test_a_resumed_run_has_each_parts_statistics(tiny_file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)         # what is watched has no statistics
    more = ["--reward", "jpeg=1,incompressible=0.5", "--normalise-each", "--watch", "weights/rater.py:rule"]
    train.main(arguments(tiny_file, tmp_path / "whole", *more))
    train.main(arguments(tiny_file, tmp_path / "halves", *more, epochs=2))
    train.main(["--resume", str(tmp_path / "halves"), "--epochs", "4", "--watch", "weights/rater.py:rule"])
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    kept = torch.load(tmp_path / "halves" / "state.pt", weights_only=True)["learner"]["statistics"]
    assert {part for part, _ in kept} == {"jpeg", "incompressible"}


def test_what_it_cannot_be_used_with_is_one_line(tiny_file, tmp_path):
    for wrong, named in ((["--reward", "jpeg"], "a sum of rewards"), ([], "a sum of rewards"),
                         (["--reward", "jpeg=1,clip=1", "--algorithm", "rwr"], "an algorithm with advantages")):
        with pytest.raises(InputError, match=f"--normalise-each: needs {named}"):
            train.main(arguments(tiny_file, tmp_path / "run", "--normalise-each", *wrong))
    assert not (tmp_path / "run").exists()
