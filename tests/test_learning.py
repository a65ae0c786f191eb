"""The losses, the advantages and the rewards, against examples worked by hand."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo_min.advantages import PromptStatistics, clipped_advantages
from ddpo_min.files import InputError
from ddpo_min.losses import ddpo_is_loss, ddpo_sf_loss
from ddpo_min.rewards import incompressible, jpeg, jpeg_kilobytes, score
from ddpo_min.scorer import find_reward
from ddpo_min.vae import to_uint8


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# Losses

#    advantage, ratio, loss, its gradient with respect to log p; the clip range is 0.2
CASES = [(2.0, 1.1, -2.2, -2.2), (2.0, 0.9, -1.8, -1.8),    # inside: the plain ratio
         (2.0, 1.5, -2.4, 0.0),                             # good, and already more likely: no more to gain
         (2.0, 0.5, -1.0, -1.0),                            # good, but less likely: the worse of the two is kept
         (-2.0, 1.1, 2.2, 2.2), (-2.0, 0.9, 1.8, 1.8),
         (-2.0, 1.5, 3.0, 3.0),                             # bad, but more likely: the worse of the two is kept
         (-2.0, 0.5, 1.6, 0.0)]                             # bad, and already less likely: no more to gain


@pytest.mark.parametrize("advantage, ratio, loss, slope", CASES)
def test_the_clipped_loss_is_the_pessimistic_one(advantage, ratio, loss, slope):
    log_p = (double(-3.0) + np.log(ratio)).requires_grad_()
    got_ratio = torch.exp(log_p + 3)
    got = ddpo_is_loss(got_ratio, double(advantage), 0.2)
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-12)
    assert got_ratio.item() == pytest.approx(ratio, rel=1e-12)
    assert log_p.grad.item() == pytest.approx(slope, rel=1e-12, abs=0)


def test_the_clipped_loss_is_the_mean_of_a_batch():
    advantage, ratio, loss, _ = (double(*column) for column in zip(*CASES))
    got = ddpo_is_loss(ratio, advantage, 0.2)
    assert got.item() == pytest.approx(loss.mean().item(), rel=1e-12)


def test_gradients_are_those_of_finite_differences():
    advantage, ratio, _, _ = (double(*column) for column in zip(*CASES))
    for loss in (lambda x: ddpo_is_loss(torch.exp(x + 1), advantage, 0.2),
                 lambda x: ddpo_sf_loss(x, advantage)):
        log_p = (ratio.log() - 1).requires_grad_()
        loss(log_p).backward()
        h = 1e-6
        for k, unit in enumerate(torch.eye(8, dtype=torch.float64)):
            slope = (loss(log_p.detach() + h * unit) - loss(log_p.detach() - h * unit)) / (2 * h)
            assert log_p.grad[k].item() == pytest.approx(slope.item(), rel=1e-7, abs=1e-9)


def test_reinforce_is_minus_the_mean_of_advantage_times_log_prob():
    assert ddpo_sf_loss(double(-1.0, -2.0, 4.0), double(3.0, -1.0, 0.5)).item() == pytest.approx(-1 / 3, rel=1e-12)


# Advantages

def normalised(reward, seen):
    mean = sum(seen) / len(seen)
    deviation = (sum((x - mean) ** 2 for x in seen) / len(seen)) ** 0.5
    return (reward - mean) / deviation


def test_each_reward_is_normalised_by_its_prompts_latest_ones():
    statistics = PromptStatistics(buffer=3, minimum=2)
    first = statistics.advantages(["a", "b", "a"], [1.0, 10.0, 3.0])
    assert first == pytest.approx([-1, normalised(10, [1, 10, 3]), 1], rel=1e-12)
    second = statistics.advantages(["b", "a"], [4.0, 5.0])
    assert second == pytest.approx([-1, 2 / (8 / 3) ** 0.5], rel=1e-12)
    third = statistics.advantages(["a"], [9.0])         # the 1 is forgotten
    assert third == pytest.approx([normalised(9, [3, 5, 9])], rel=1e-12)


def test_below_the_minimum_the_batch_counts_and_from_it_on_the_prompt():
    statistics = PromptStatistics(buffer=8, minimum=3)
    assert statistics.advantages(["a", "b"], [1.0, 5.0]) == pytest.approx([-1, 1], rel=1e-12)
    assert statistics.advantages(["a", "b"], [2.0, 8.0]) == pytest.approx([-1, 1], rel=1e-12)
    got = statistics.advantages(["a", "c"], [6.0, 0.0])
    assert got == pytest.approx([normalised(6, [1, 2, 6]), normalised(0, [6, 0])], rel=1e-12)


@pytest.mark.parametrize("buffer, minimum", [(16, 17), (4, 0)])
def test_a_minimum_that_is_never_reached_or_means_nothing_is_refused(buffer, minimum):
    with pytest.raises(ValueError, match="minimum"):
        PromptStatistics(buffer, minimum)
    PromptStatistics(16, 16)


@pytest.mark.parametrize("rewards", [[1, 2, 4], np.array([1, 2, 4]), np.array([1, 2, 4], dtype=np.float32)])
def test_integer_rewards_are_not_truncated(rewards):
    got = PromptStatistics(8, 1).advantages(["a"] * 3, rewards)
    assert got.dtype == np.float64
    assert got == pytest.approx([normalised(r, [1, 2, 4]) for r in (1, 2, 4)], rel=1e-12)


@pytest.mark.parametrize("other", ["a Fox", "a fox ", "a fox" + " and a hen" * 60])
def test_prompts_that_differ_at_all_are_kept_apart(other):
    one = "a fox" + " and a hen" * 60 + "!" if len(other) > 10 else "a fox"
    got = PromptStatistics(8, 2).advantages([one, other, one, other], [0.0, 100.0, 1.0, 102.0])
    assert got == pytest.approx([-1, -1, 1, 1], rel=1e-12)


@pytest.mark.parametrize("normalise", ["prompt", "group", "epoch"])
@pytest.mark.parametrize("value", [0.1, 0.0, -3.7, 1e10, 1e-10, 1e300])
def test_equal_rewards_have_no_advantage(value, normalise):
    got = clipped_advantages(["a"] * 20 + ["b"] * 3, np.full(23, value), normalise=normalise, clip=5, group_size=23,
                             statistics=PromptStatistics(32, 16))
    assert got.tolist() == [0] * 23


@pytest.mark.parametrize("normalise", ["prompt", "group", "epoch"])
@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1e10, 1e300])
def test_the_scale_of_a_reward_does_not_matter(scale, normalise):
    prompts, rewards = ["a", "b"] * 6, np.random.default_rng(0).normal(size=12)
    wanted, got = (clipped_advantages(prompts, r, normalise=normalise, clip=5, group_size=4,
                                      statistics=PromptStatistics(8, 2)) for r in (rewards, scale * rewards))
    assert got == pytest.approx(wanted, rel=1e-9)


def test_all_of_an_epochs_own_rewards_count_and_older_ones_fill_the_buffer():
    statistics, rewards = PromptStatistics(buffer=4, minimum=2), np.arange(10.0) ** 2
    assert statistics.advantages(["a"] * 10, rewards) == pytest.approx([normalised(r, rewards) for r in rewards])
    assert statistics.advantages(["a"], [7.0]) == pytest.approx([normalised(7, [49, 64, 81, 7])], rel=1e-12)


def test_restored_statistics_continue_exactly():
    rng = np.random.default_rng(0)
    batches = [([f"p{k}" for k in rng.integers(0, 4, 12)], rng.normal(size=12)) for _ in range(6)]
    whole, first, second = (PromptStatistics(buffer=5, minimum=3) for _ in range(3))
    wanted = [whole.advantages(*batch) for batch in batches]
    for batch in batches[:3]:
        first.advantages(*batch)
    kept = first.state_dict()
    text = json.dumps(kept)
    first.advantages(*batches[3])                           # does not reach what was kept
    assert json.dumps(kept) == text
    second.load_state_dict(json.loads(text))
    for batch, advantages in zip(batches[3:], wanted[3:]):
        assert np.array_equal(second.advantages(*batch), advantages)


# Rewards

def pictures():
    """A flat one, a ramp, and noise."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3))
    ramp = np.broadcast_to(np.arange(64)[:, None, None] * 4, (64, 48, 3))
    return np.stack([np.full((64, 48, 3), 90), ramp, noise]).astype(np.uint8)


def test_compressibility_is_minus_the_kilobytes_of_a_jpeg_on_disk_at_quality_95(tmp_path):
    sizes = []
    for i, picture in enumerate(pictures()):
        Image.fromarray(picture, "RGB").save(tmp_path / f"{i}.jpg", quality=95)
        sizes.append((tmp_path / f"{i}.jpg").stat().st_size / 1000)
    assert sizes[0] < sizes[1] < sizes[2]
    assert find_reward("jpeg")(pictures(), ["a"] * 3).tolist() == [-size for size in sizes]
    assert find_reward("incompressible")(pictures(), ["a"] * 3).tolist() == sizes
    assert jpeg_kilobytes(pictures()[2], quality=75) < sizes[2]


def test_noise_is_the_worst_for_one_reward_and_the_best_for_the_other():
    assert jpeg(pictures(), ["a"] * 3).argmin() == 2 and incompressible(pictures(), ["a"] * 3).argmax() == 2


def test_an_unknown_reward_is_refused():
    with pytest.raises(InputError, match="jpg"):
        find_reward("jpg")


@pytest.mark.parametrize("returned", [[1.0, float("nan"), 2.0], [1.0, 2.0, -np.inf]])
def test_a_reward_that_is_no_number_is_refused_with_its_prompt(returned):
    bad = int(np.flatnonzero(~np.isfinite(returned))[0])
    with pytest.raises(InputError, match=f"epoch: {bad} .'p{bad}'"):
        score(lambda images, prompts: returned, pictures(), ["p0", "p1", "p2"])


@pytest.mark.parametrize("returned", [1.0, [1.0, 2.0], [[1.0], [2.0], [3.0]]])
def test_a_reward_for_another_number_of_pictures_is_refused(returned):
    with pytest.raises(InputError, match="shape"):
        score(lambda images, prompts: returned, pictures(), ["a"] * 3)


def test_scores_are_what_the_reward_returns_in_float64():
    got = score(lambda images, prompts: [len(prompt) for prompt in prompts], pictures(), ["a", "bb", "ccc"])
    assert got.dtype == np.float64 and got.tolist() == [1, 2, 3]


def test_pictures_are_rounded_and_clamped_with_the_channels_last():
    levels = torch.tensor([10.4, 10.6, 254.6, 0.4, -40.0, 300.0]).view(1, 3, 1, 2)
    got = to_uint8(levels / 255 * 2 - 1)
    assert got.dtype == np.uint8 and got.tolist() == [[[[10, 255, 0], [11, 0, 255]]]]
