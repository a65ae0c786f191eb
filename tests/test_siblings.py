"""AWM, DiffusionNFT and RAM: against tests/plain.py optimizer step by optimizer step, and their equations by hand."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import plain_descent
from ddpo_min.ddim import ddim_mean, ddim_steps, gaussian_log_prob, step_weights, x0_hat
from ddpo_min.forward_process import forward_process_update, velocity_units
from ddpo_min.losses import ddpo_is_loss, matching_log_prob, nft_loss, ram_loss
from ddpo_min.optimizer import Optimizer
from ddpo_min.plan import Plan
from ddpo_min.rollout import Trajectories
from ddpo_min.schedule import alphas_cumprod
from test_train import arguments, metrics
from test_update_oracle import compare, settings_of, tiny_model

A = alphas_cumprod()


def random(*shape):
    """The same numbers in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


# train() against its twin. Between them the cases have every setting that these updates know of away from its default

SETTINGS = dict(trainable="lora", normalise="prompt", updates=2, inner_epochs=1, rank=2, statistics=(5, 3), lr=1e-2)
CASES = [{**SETTINGS, **case} for case in (
    dict(algorithm="awm", updates=4, inner_epochs=2, batch=1, clip_range=1e-4, timesteps=1),
    dict(algorithm="awm", updates=2, inner_epochs=2, batch=3, clip_range=1e-5, advantage_clip=0.5, timesteps=3,
         grid_timesteps=True, step_weights="paper", awm_power=0.25, kl_weight=0.3, kl_old=2.0, guidance=3.0, eta=0.5,
         normalise="group", group_size=2, betas=(0.5, 0.7), adam_eps=1e-2, weight_decay=0.5, grad_clip=1e-3, seed=5),
    dict(algorithm="awm", trainable="full", rank=None, updates=1, inner_epochs=2, clip_range=0.01, kl_old=0.5,
         policy_ema=0.4, guidance=3.0, guidance_in_training=False, normalise="epoch", awm_power=0.5, eta=0.0),
    dict(algorithm="nft", updates=4, batch=16, nft_beta=0.3, kl_weight=0.2, policy_ema=0.7, dtype="float16",
         grad_clip=100.0),
    dict(algorithm="nft", inner_epochs=2, batch=3, nft_beta=2.0, advantage_clip=0.5, timesteps=3, step_weights="paper",
         kl_old=0.3, guidance=3.0, normalise="group", group_size=4, eta=0.0, seed=5),
    dict(algorithm="nft", trainable="full", rank=None, updates=1, inner_epochs=2, grid_timesteps=True, timesteps=4,
         normalise="epoch", guidance=3.0, guidance_in_training=False),
    dict(algorithm="ram", updates=4, inner_epochs=2, batch=1, kl_weight=0.5, timesteps=1),
    dict(algorithm="ram", updates=1, inner_epochs=2, batch=3, kl_weight=2.0, kl_old=0.7, policy_ema=0.3, timesteps=3,
         grid_timesteps=True, step_weights="paper", guidance=3.0, normalise="group", group_size=2, eta=0.5),
    dict(algorithm="ram", batch=16, kl_weight=0.1, dtype="float16", advantage_clip=0.5, normalise="epoch", guidance=3.0,
         guidance_in_training=False),
)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['algorithm']}-{case['updates']}-{case['normalise']}")
def test_training_is_the_plain_loop(case, tmp_path, monkeypatch):
    settings, prompts = settings_of(case, tmp_path)
    twins = compare(settings, tiny_model(), prompts, monkeypatch)
    seen = [one for twin in twins for one in twin.record.seen]
    assert len(seen) == 2 * settings.samples * settings.timesteps * settings.inner_epochs
    assert {one.A > 0 for one in seen} == {True, False} and len({one.t for one in seen}) > 2
    if settings.algorithm == "awm":
        assert {one.A > 0 for one in seen if one.clipped} == {True, False}      # on both sides
        assert any(one.outside and not one.clipped for one in seen)             # not what moved the wrong way


def test_a_whole_run_begins_with_ratios_of_one_and_resumes_exactly(tiny_file, tmp_path):
    more = ["--algorithm", "awm", "--timestep-fraction", "1", "--lr", "1e-2", "--kl-weight", "0.1", "--policy-ema",
            "0.5"]
    train.main(arguments(tiny_file, tmp_path / "whole", *more, epochs=2))
    train.main(arguments(tiny_file, tmp_path / "halves", *more, epochs=1))
    train.main(["--resume", str(tmp_path / "halves"), "--epochs", "2"])
    whole, halves = (load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "halves")
    first, second = metrics(tmp_path / "whole")
    assert first["max_ratio_error"] == 0 < second["max_ratio_error"]        # ahead of the average that draws
    assert first["distance_to_old"] > 0 and first["distance_to_base"] > 0


# One model that is a matrix: its gradient in closed form

@pytest.mark.parametrize("step_weights", ["even", "paper"])
def test_awms_first_gradient_is_the_closed_form_of_a_model_that_is_one_matrix(step_weights):
    """eps_hat = W x_t. E (W x_t - eps) x_t' = W (a x_0 x_0' + (1 - a) I) - sqrt(1 - a) I; the rest follows."""
    N, t, W = 500, 600, torch.nn.Parameter(random(4, 4) / 2)
    x_0, advantages, first = 1.5 * random(N, 4) + 0.5, random(N) + 0.5, torch.zeros(N, dtype=torch.int64)
    trajectories = Trajectories(x_0.reshape(N, 1, 4, 1, 1), first[:, None].double(), torch.zeros(1, 1, 1), first,
                                torch.arange(N), None)
    policy = SimpleNamespace(training_guidance=1.0, model=SimpleNamespace(alpha_bar=A), steps=SimpleNamespace(t=(t,)),
                             eps=lambda x, *_: (x.flatten(1) @ W.T).view_as(x))
    before, plan = W.detach().clone(), Plan(N, 1, N)
    metrics = forward_process_update(
        policy, plain_descent([W]), trajectories, advantages, np.random.default_rng(0), plan=plan, algorithm="awm",
        timesteps=16, grid=True, step_weights=step_weights, clip_range=0.1, power=1.0, beta=1.0, advantage_clip=5.0)
    a, one = A[t], advantages.mean() * torch.eye(4, dtype=torch.float64)
    second = torch.einsum("n,ni,nj->ij", advantages, x_0, x_0) / N
    mean = before @ (a * second + (1 - a) * one) - (1 - a).sqrt() * one
    tau = (1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt())
    expected = 2 / 4 * mean * (1 if step_weights == "even" else tau / (1 - tau) ** 2)
    assert (before - W - expected).abs().max() < 0.08 * expected.abs().max()
    assert metrics["max_ratio_error"] == metrics["distance_to_old"] == 0
    assert metrics["loss"] == pytest.approx(-advantages.mean().item())


# From noise to velocity

@pytest.fixture(params=[1, 300, 900])
def scene(request):
    """Three samples at a timestep: predicted, old, base and true noise, and what they are as velocities and x_0."""
    t = request.param
    a, (eps, x_0, *off) = A[t].item(), random(5, 3, 4, 2, 2)
    x_t = a ** 0.5 * x_0 + (1 - a) ** 0.5 * eps
    hat, old, base = (eps + 0.3 * error for error in off)
    clean = [x0_hat(x_t, e, a) for e in (hat, old, base, eps)]
    velocity = [e - x for e, x in zip((hat, old, base, eps), clean)]
    scale, weight = (numbers[t] for numbers in velocity_units("paper", alphas_cumprod()))
    return SimpleNamespace(t=t, a=a, scaled=[scale * e for e in (hat, old, base, eps)], weight=weight.expand(3),
                           clean=clean, velocity=velocity, advantage=torch.tensor([2.0, -5.0, 0.5]).double())


def mean(x):
    return x.flatten(1).mean(dim=1)


def test_scaled_errors_of_noise_are_errors_of_the_straight_paths_velocity(scene):
    tau, (hat, *_, v) = scene.weight[0], scene.velocity
    assert (tau / (1 - tau)).item() == pytest.approx(((1 - scene.a) / scene.a) ** 0.5)      # as noisy as the schedule
    assert torch.allclose(scene.scaled[0] - scene.scaled[3], hat - v)
    got = matching_log_prob(scene.scaled[0], scene.scaled[3], scene.weight, 0.25)
    assert torch.allclose(got, -tau / 0.25 * mean((hat - v) ** 2) ** 0.25)                  # "ghuber" of AWM's code
    ones = velocity_units("even", alphas_cumprod())
    assert all((numbers == 1).all() and numbers.shape == (1000,) for numbers in ones)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nfts_loss_is_that_of_its_implicit_policies_in_x_0(beta, scene):
    """As its code has it: each policy predicts x_0, and the error is divided by its own size."""
    predicted, old, _, x_0 = scene.clean
    good, bad = (1 - beta) * old + beta * predicted, (1 + beta) * old - beta * predicted
    r = torch.tensor([0.7, 0.0, 0.55]).double()         # of advantages 2, -5, 0.5, clipped at 5
    each = r * mean((good - x_0) ** 2) / mean((good - x_0).abs()) / beta
    each = each + (1 - r) * mean((bad - x_0) ** 2) / mean((bad - x_0).abs()) / beta
    hat, v_old, _, v = scene.scaled
    got = nft_loss(hat, v_old, v, scene.advantage, scene.weight, beta, 5.0)
    assert got.item() == pytest.approx(5 * each.mean().item())


def test_rams_target_is_the_base_models_velocity_corrected_by_the_reward(scene):
    hat, old, base, v = scene.velocity
    target = base + 20 * scene.advantage[:, None, None, None] * (v - old)
    expected = (scene.weight * mean((hat - target) ** 2)).mean() / 20
    assert ram_loss(*scene.scaled, scene.advantage, scene.weight, 1 / 20).item() == pytest.approx(expected.item())


# What they share, and that RAM holds for noise

def test_all_three_begin_with_the_same_gradient(scene):
    """A (v_old - v), times 2 and the weight; NFT's is divided by the size of the error, RAM's has its pull besides."""
    _, old, base, v = scene.scaled
    v_hat = old.clone().requires_grad_(True)

    def gradient(loss):
        return torch.autograd.grad(loss, v_hat)[0] * old.numel()

    w, advantage = scene.weight, scene.advantage
    expected = 2 * (w * advantage)[:, None, None, None] * (old - v)
    log_p = matching_log_prob(v_hat, v, w)
    torch.testing.assert_close(gradient(ddpo_is_loss(torch.exp(log_p - log_p.detach()), advantage, 0.1)), expected)
    size = mean((old - v).abs())[:, None, None, None]
    for beta in (1.0, 0.2):
        torch.testing.assert_close(gradient(nft_loss(v_hat, old, v, advantage, w, beta, 5.0)) * size, expected)
    pull = 2 * 0.3 * w[:, None, None, None] * (old - base)
    torch.testing.assert_close(gradient(ram_loss(v_hat, old, base, v, advantage, w, 0.3)) - pull, expected)


@pytest.mark.parametrize("a", [0.95, 0.4, 0.01])
@pytest.mark.parametrize("kl_weight", [1.0, 0.25])
def test_ram_is_at_rest_where_the_pictures_are_tilted_by_the_reward(a, kl_weight):
    """For a Gaussian model and a linear reward that is exact: p(x_0) exp(r / k) has another mean and no other width.

    The expectation over x_0 given x_t is Gauss-Hermite quadrature, exact for these polynomials.
    """
    m, variance, slope, x_t = 0.4, 0.7, 0.9, 1.3
    left = 1 / (1 / variance + a / (1 - a))                                 # variance of x_0 given x_t
    nodes, weights = (torch.as_tensor(x) for x in np.polynomial.hermite_e.hermegauss(6))

    def x_0_given(prior):
        return left * (prior / variance + a ** 0.5 * x_t / (1 - a))

    def noise(x_0):
        return (x_t - a ** 0.5 * torch.as_tensor(x_0, dtype=torch.float64)) / (1 - a) ** 0.5

    tilted = x_0_given(m + slope / kl_weight * variance)
    x_0 = tilted + left ** 0.5 * nodes
    v_hat = noise(tilted).requires_grad_(True)
    many = [x.reshape(-1, 1, 1, 1).expand(6, 1, 1, 1) for x in
            (v_hat, v_hat.detach(), noise(x_0_given(m)), noise(x_0))]
    loss = ram_loss(*many, slope * x_0 + 7.0, weights, kl_weight)           # the 7 is no advantage
    gradient, = torch.autograd.grad(loss, v_hat)
    assert abs(gradient.item()) < 1e-12 and abs(many[0][0] - many[2][0]).item() > 0.05


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_ddpos_log_probability_is_a_denoising_loss_towards_the_noise_between_neighbours(eta):
    steps, (x_t, x_prev, e1, e2) = ddim_steps(7, eta), random(4, 3, 4, 5, 5)
    for i, w in enumerate(step_weights(steps)):
        a, b, s = steps.alpha_bar[i], steps.alpha_bar_prev[i], steps.sigma[i]
        of = lambda e: ddim_mean(x_t, e, a, b, s)       # noqa: E731
        slope = of(torch.ones_like(x_t)) - of(torch.zeros_like(x_t))        # d mu / d eps
        implied = (x_prev - of(torch.zeros_like(x_t))) / slope
        change = gaussian_log_prob(x_prev, of(e1), s) - gaussian_log_prob(x_prev, of(e2), s)
        torch.testing.assert_close(change, -w ** 2 / 2 * (mean((e1 - implied) ** 2) - mean((e2 - implied) ** 2)))
        if eta == 1:        # minus sqrt(1 - a) times the score of q(x_t | x_prev)
            torch.testing.assert_close(implied, (1 - a) ** 0.5 * (x_t - (a / b) ** 0.5 * x_prev) / (1 - a / b),
                                       rtol=1e-6, atol=1e-6)


# The old policy

def test_the_policy_between_epochs_is_the_moving_average_of_what_is_trained():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = Optimizer([p], lr=0.1, policy_ema=0.25)
    for begins, old, trained, average in ((1.0, 1.0, 3.0, 2.5), (3.0, 2.5, 5.0, 4.375)):
        with optimizer.epoch():
            assert p.item() == begins
            with pytest.raises(KeyError), optimizer.old_policy():
                assert p.item() == old
                raise KeyError
            assert p.item() == begins
            p.data.fill_(trained)
        assert p.item() == average
    again = Optimizer([torch.nn.Parameter(torch.zeros(1))], lr=0.1, policy_ema=0.25)
    again.load_state_dict(optimizer.state_dict())
    with again.epoch():
        assert again.parameters[0].item() == 5.0
    with Optimizer([p], lr=0.1).epoch():
        p.data.fill_(7.0)
    assert p.item() == 7.0


# Minibatches

def test_each_of_a_samples_timesteps_is_drawn_from_its_own_part_of_the_times():
    plan = Plan(12, 2, 4, inner_epochs=2)
    minibatches = [list(own) for own in plan.noised_minibatches(np.random.default_rng(0), range(1000), 4)]
    cut = [[(s.start % 6, s.stop % 6 or 6) for s, *_ in own] for own in minibatches]
    assert cut == [[(0, 4)] * 4 + [(4, 6)] * 4] * 4
    for own in minibatches:
        assert all(len(t) == len(seeds) == s.stop - s.start and part == len(t) / 24 for s, t, seeds, part in own)
        assert all((t // 250 == k % 4).all() for k, (_, t, *_) in enumerate(own))
    assert all({s.start // 6 for own in minibatches[p:p + 2] for s, *_ in own} == {0, 1} for p in (0, 2))
    assert len({seed for own in minibatches for *_, seeds, _ in own for seed in seeds.tolist()}) == 4 * 6 * 4
    drawn = [t for own in Plan(600, 1, 600).noised_minibatches(np.random.default_rng(0), (981, 501, 1), 2)
             for _, t, *_ in own]
    counts = [[(t == time).mean() for time in (981, 501, 1)] for t in drawn]
    assert np.abs(np.array(counts) - [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]).max() < 0.05


def test_the_draws_are_the_same_however_a_minibatch_is_divided():
    whole = [list(own) for own in Plan(12, 2, 64).noised_minibatches(np.random.default_rng(0), range(1000), 2)]
    heard = []
    plans = [Plan(12, 2, 1, rank=rank, processes=4, progress=lambda _, n: heard.append(n)) for rank in range(4)]
    parts = [[list(own) for own in plan.noised_minibatches(np.random.default_rng(0), range(1000), 2)] for plan in plans]

    def rows(own):
        return [row for s, t, seeds, _ in own for row in zip(range(s.start, s.stop), t.tolist(), seeds.tolist())]

    for alone, *divided in zip(whole, *parts):
        assert sorted(rows(alone)) == sorted(sum(map(rows, divided), []))
        assert sum(part for own in divided for *_, part in own) == pytest.approx(1)
    assert sum(heard) == 4 * 12
    for plan, minibatches in zip(plans, parts):
        drawn = {n for s in plan.rollout() for n in range(s.start, s.stop)}
        assert {n for own in minibatches for n, *_ in rows(own)} == drawn
