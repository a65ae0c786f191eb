"""The algorithms beside DDPO_IS: weighted regression, group advantages, KL to the base model, the whole UNet."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence

import train
from conftest import cut, plain_descent, random_lora_policy
from ddpo_min.advantages import epoch_advantages, group_advantages
from ddpo_min.cli import make_settings
from ddpo_min.ddim import ddim_mean, ddim_steps, step_weights
from ddpo_min.ddpo import ddpo_update
from ddpo_min.lora import switched_off
from ddpo_min.losses import rwr_loss, step_kl
from ddpo_min.plan import Plan
from ddpo_min.policy import Policy
from ddpo_min.prompts import draw_prompts
from ddpo_min.rollout import sample_trajectories
from ddpo_min.rwr import effective_samples, rwr_sparse_weights, rwr_update, rwr_weights
from ddpo_min.schedule import alphas_cumprod
from ddpo_min.weights import load_stable_diffusion
from test_train import arguments, metrics

# Weights and advantages

def test_rwr_weights_are_a_softmax_per_prompt_of_mean_one():
    got = rwr_weights(["a", "b", "a", "b", "b"], [0.0, 5.0, np.log(3), 5.0, 5.0], beta=1.0)
    assert got == pytest.approx([0.5, 1.0, 1.5, 1.0, 1.0], rel=1e-12)          # e^0 : e^log 3 = 1 : 3
    got = rwr_weights(["a", "b", "a", "b", "b"], [0.0, 5.0, np.log(3), 5.0, 5.0], beta=2.0)
    assert got[:3] == pytest.approx([0.2, 1.0, 1.8], rel=1e-12)                # 1 : 9
    got = rwr_weights(["a", "b", "a"], [-1e6, 0.0, np.log(2) / 0.2 * 1.0], beta=0.2, per_prompt=False)
    assert got == pytest.approx([0.0, 1.0, 2.0], abs=1e-12)
    assert np.isfinite(rwr_weights(["x"] * 2, [1e4, -1e4], beta=10.0)).all()
    beta = make_settings(algorithm="rwr", inverse_temperature=0.0).inverse_temperature
    assert (rwr_weights(["x"] * 3, [1.0, -9.0, 2.0], beta=beta) == 1).all()


def test_sparse_weights_keep_what_reaches_the_percentile_of_its_prompt():
    prompts = ["a"] * 5 + ["b"] * 5
    rewards = [1, 2, 3, 4, 5, 10, 50, 20, 40, 30]
    assert rwr_sparse_weights(prompts, rewards, percentile=0.5).tolist() == [0, 0, 1, 1, 1, 0, 1, 0, 1, 1]
    assert rwr_sparse_weights(prompts, rewards, percentile=0.75).tolist() == [0, 0, 0, 1, 1, 0, 1, 0, 1, 0]
    of_all = rwr_sparse_weights(prompts, rewards, percentile=0.75, per_prompt=False)
    assert of_all.tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 1, 1]
    assert rwr_sparse_weights(["a"], [3.0], percentile=0.9).tolist() == [1]


def test_group_advantages_look_at_the_group_alone():
    assert group_advantages([1, 3, 10, 30, 5, 5], 2) == pytest.approx([-1, 1, -1, 1, 0, 0], abs=1e-5)
    assert group_advantages([0, 0, 3], 3) == pytest.approx([-1 / 2 ** 0.5, -1 / 2 ** 0.5, 2 / 2 ** 0.5], rel=1e-5)
    assert epoch_advantages([1, 3, 5, 7]) == pytest.approx(np.array([-3, -1, 1, 3]) / 5 ** 0.5, rel=1e-5)


def test_effective_samples_count_equal_weights_and_forget_the_light_ones():
    assert effective_samples([2.0, 2.0, 2.0, 0.0]) == pytest.approx(3)
    assert effective_samples([1.0, 3.0]) == pytest.approx(1.6)


def test_a_group_shares_its_prompt():
    prompts, seeds = draw_prompts([f"p{i}" for i in range(7)], 12, seed=0, epoch=1, group_size=3)
    groups = np.array(prompts).reshape(4, 3)
    assert (groups == groups[:, :1]).all() and len(set(groups[:, 0])) == 4 and len(set(seeds)) == 12


# Losses

def test_the_weighted_denoising_loss_by_hand():
    eps_hat, eps = torch.zeros(2, 4, 1, 1), torch.tensor([[1.0, -1, 3, 1], [2, 0, 0, 0]]).reshape(2, 4, 1, 1)
    assert rwr_loss(eps_hat, eps, torch.tensor([0.5, 3.0])).item() == pytest.approx((0.5 * 3 + 3 * 1) / 2)


def test_the_step_kl_is_that_of_the_two_normals():
    torch.manual_seed(0)
    steps = ddim_steps(7)
    x_t, eps, base = torch.randn(3, 3, 4, 5, 5, dtype=torch.float64)
    for i in range(7):
        of = lambda e: Normal(ddim_mean(x_t, e, steps.alpha_bar[i], steps.alpha_bar_prev[i], steps.sigma[i]),   # noqa
                              steps.sigma[i])
        exact = kl_divergence(of(eps), of(base)).flatten(1).mean(1)
        assert (step_kl(eps, base, step_weights(steps)[i]) - exact).abs().max() < 1e-9 * exact.max()


# Updates, against gradients written by hand

def small(tiny_file, guidance=2.0, steps=3, count=8):
    policy, parameters = random_lora_policy(tiny_file, guidance, steps)
    prompts, seeds = draw_prompts(["a cat", "a dog"], count, seed=0, epoch=0)
    return policy, parameters, sample_trajectories(policy, prompts, seeds, cut(count, 4))


def change_of(parameters, step):
    before = [p.detach().clone() for p in parameters]
    step()
    return [old - p.detach() for p, old in zip(parameters, before)]


def assert_close(got, expected):
    largest = max(g.abs().max() for g in expected)
    assert largest > 1e-4
    assert max((a - b).abs().max() for a, b in zip(got, expected)) < 1e-4 * largest


def test_a_regression_update_is_the_gradient_of_the_weighted_denoising_loss(tiny_file):
    policy, parameters, trajectories = small(tiny_file)
    weights, seen = np.array([0, 2.0, 0, 1, 0.5, 0, 4, 1]), []
    predict = policy.eps
    policy.eps = lambda *given: (seen.append(given[:3]), predict(*given))[1]
    got = change_of(parameters, lambda: rwr_update(
        policy, plain_descent(parameters), trajectories, weights, np.random.default_rng(0), plan=Plan(8, 1, 3)))
    # The batches it drew are taken as they come; which x_0, and which noise, is worked out from x_t.
    x_t, t, context = (torch.cat(column) for column in zip(*seen))
    a = alphas_cumprod().float()[t][:, None, None, None]
    x_0 = trajectories.latents[:, -1]
    noise = (x_t[:, None] - a[:, None].sqrt() * x_0[None]) / (1 - a[:, None]).sqrt()       # one for every guess of x_0
    rng, order = np.random.default_rng(0), np.array([], dtype=int)
    while len(order) < 8:
        order = np.append(order, rng.permutation(np.flatnonzero(weights)))
    which = torch.as_tensor(order[:8])
    assert set(which.tolist()) == {1, 3, 4, 6, 7}
    eps = noise[torch.arange(8), which]
    assert 0.7 < eps.std() < 1.3 and eps.mean().abs() < 0.2 and len(t.unique()) > 4
    for p, g in zip(parameters, got):
        p.data += g                                                             # back to where it started
    loss = sum(weights[which[b]] * ((predict(x_t[b:b + 1], t[b:b + 1], context[b:b + 1], 2.0)
                                     - eps[b]) ** 2).mean() for b in range(8)) / 8
    assert_close(got, torch.autograd.grad(loss, parameters))


def test_the_kl_pulls_towards_the_base_model(tiny_file):
    policy, parameters, trajectories = small(tiny_file)
    got = change_of(parameters, lambda: ddpo_update(
        policy, plain_descent(parameters), trajectories, torch.zeros(8), np.random.default_rng(0),
        plan=Plan(8, 1, 4, range(3)), clip_range=0.01, emphasis=[2.0, 0.5, 0.5], kl_weight=0.5))
    for p, g in zip(parameters, got):
        p.data += g
    loss, context = 0, trajectories.context(slice(0, 8))
    for i, t in enumerate(policy.steps.t):
        x_t = trajectories.latents[:, i]
        with torch.no_grad(), switched_off(policy.lora):
            base = policy.eps(x_t, t, context, 2.0)
        of = lambda e: ddim_mean(x_t, e, policy.steps.alpha_bar[i], policy.steps.alpha_bar_prev[i], policy.steps.sigma[i])  # noqa
        loss = loss + kl_divergence(Normal(of(policy.eps(x_t, t, context, 2.0)), policy.steps.sigma[i]),
                                    Normal(of(base), policy.steps.sigma[i])).mean() / 3
    assert_close(got, torch.autograd.grad(0.5 * loss, parameters))
    assert all(layer.scale == 1 for layer in policy.lora.values())


def test_without_guidance_in_training_the_same_pictures_are_drawn_and_scored_as_training_will(tiny_file):
    policy, _, trajectories = small(tiny_file)
    apart = Policy(policy.model, policy.steps, 2.0, training_guidance=1.0, lora=policy.lora)
    prompts, seeds = draw_prompts(["a cat", "a dog"], 8, seed=0, epoch=0)
    unguided = sample_trajectories(apart, prompts, seeds, cut(8, 4))
    assert torch.equal(unguided.latents, trajectories.latents)
    assert (unguided.log_p_old - trajectories.log_p_old).abs().max() > 1e-3
    for samples in cut(8, 4):
        x_t, x_prev, log_p_old, context = unguided.at(samples, 1)
        own = Policy(policy.model, policy.steps, 1.0, lora=policy.lora).log_prob(x_prev, x_t, 1, context)[0]
        assert torch.equal(own, log_p_old) and torch.equal(apart.log_prob(x_prev, x_t, 1, context)[0], log_p_old)


@pytest.mark.parametrize("keep, passes", [("path", 2), ("x_0", 1), ("images", 1)])
def test_only_a_path_takes_a_second_pass_without_guidance_in_training(keep, passes, tiny_file):
    policy, _, _ = small(tiny_file)
    apart, calls = Policy(policy.model, policy.steps, 2.0, training_guidance=1.0, lora=policy.lora), []
    hook = policy.model.unet.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    sample_trajectories(apart, ["a cat"] * 4, range(4), cut(4, 4), keep=keep)
    hook.remove()
    assert calls == [8, 4][:passes] * 3


def test_the_ratio_error_is_the_largest_of_the_first_optimizer_step(tiny_file):
    """One log-probability of a stored trajectory is changed, as if it were computed otherwise than in training."""
    policy, parameters, trajectories = small(tiny_file)
    trajectories.log_p_old[6, 1] += 0.1
    metrics = ddpo_update(policy, plain_descent(parameters), trajectories, torch.ones(8), np.random.default_rng(0),
                          plan=Plan(8, 1, 4, range(3)), clip_range=0.01, emphasis=[1.0] * 3)
    assert metrics["max_ratio_error"] == pytest.approx(1 - np.exp(-0.1), rel=1e-5)
    assert metrics["clip_fraction"] == pytest.approx(1 / 24) and metrics["clip_fraction_by_step"][1] == 1 / 8


def test_a_window_of_steps_is_all_that_is_trained_on(tiny_file):
    policy, parameters, trajectories = small(tiny_file, steps=5)
    seen, predict = [], policy.eps
    policy.eps = lambda x_t, t, *rest: (seen.append(policy.steps.t.index(t)), predict(x_t, t, *rest))[1]
    ddpo_update(policy, plain_descent(parameters, lr=0.0), trajectories, torch.ones(8), np.random.default_rng(0),
                plan=Plan(8, 2, 4, range(1, 3)), clip_range=0.01, emphasis=[1.0] * 5)
    assert seen == [1, 2, 1, 2]


# Whole runs

@pytest.mark.parametrize("algorithm", ["ddpo_sf", "rwr", "rwr_sparse"])
def test_every_algorithm_draws_its_pictures_and_its_curve(algorithm, tiny_file, tmp_path):
    """That every one resumes exactly is in test_loop.py."""
    more = ["--algorithm", algorithm, "--normalise", "epoch"]
    more += dict(ddpo_sf=["--updates", "1"], rwr_sparse=["--percentile", "0.5"]).get(algorithm, [])
    train.main(arguments(tiny_file, tmp_path / "run", *more, epochs=2))
    assert len(metrics(tmp_path / "run")) == 2 and (tmp_path / "run" / "lora.safetensors").exists()
    for name in ("samples.png", "before_after.png", "curve.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / "run" / name)))) > 20


def test_full_training_moves_the_whole_unet_and_leaves_a_file_that_loads(tiny_file, tmp_path):
    train.main(arguments(tiny_file, tmp_path / "run", "--trainable", "full", "--lr", "1e-3", epochs=1))
    base, new = load_stable_diffusion(tiny_file), load_stable_diffusion(tmp_path / "run" / "model.safetensors")
    moved = [not torch.equal(a, b) for a, b in zip(base.unet.state_dict().values(), new.unet.state_dict().values())]
    assert np.mean(moved) > 0.9
    for part in ("vae", "text_encoder"):
        ours, theirs = getattr(base, part).state_dict(), getattr(new, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert new.image_size == 16 and not (tmp_path / "run" / "lora.safetensors").exists()
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["learner"]["parameters"]
    assert all(torch.equal(state[f"unet.{name}"], p) for name, p in new.unet.state_dict().items())


def test_groups_guidance_off_watching_and_evaluation_in_one_run(tiny_file, tmp_path):
    (tmp_path / "train.txt").write_text("a cat\na dog\n")
    (tmp_path / "test.txt").write_text("a cat\na fox\n")
    train.main(arguments(tiny_file, tmp_path / "run", "--normalise", "group", "--group-size", "2", "--watch",
                         "incompressible", "--no-guidance-in-training", "--eval-every", "2", "--eval-prompts",
                         str(tmp_path / "test.txt"), "--prompts", str(tmp_path / "train.txt"), epochs=2))
    first, second = metrics(tmp_path / "run")
    assert first["score_incompressible"] == -first["reward_mean"] and first["max_ratio_error"] == 0
    assert second["eval_score_incompressible"] == -second["eval_reward"]
    assert "eval_reward" not in first
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert second["eval_reward"] == pytest.approx(result["reward_after"])
    assert result["scores"]["incompressible"] == pytest.approx([-result["reward_before"], -result["reward_after"]])
