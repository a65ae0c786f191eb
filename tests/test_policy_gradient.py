"""The estimated policy gradient against one that is known exactly.

The data are N(M, S^2) in one dimension, where the best noise prediction is linear in x_t; the policy adds to it a
trainable shift and slope, eps = eps*(x_t) + theta_0 + theta_1 x_t. Twenty DDIM steps with eta = 1 are then a
linear-Gaussian chain: the mean and the variance of x_0, and with them E[reward], follow from a recursion.
"""
import pytest
import torch

from ddpo_min.ddim import ddim_step, ddim_steps
from ddpo_min.losses import ddpo_is_loss, ddpo_sf_loss

M, S, TARGET, ROLLOUTS = 0.7, 0.5, 0.2, 100_000
STEPS = ddim_steps(20)
THETA = torch.tensor([0.03, -0.02], dtype=torch.float64)
REWARDS = {"linear": lambda x: 2 * x, "quadratic": lambda x: -(x - TARGET) ** 2}


def eps(x, a, theta):
    """E[eps | x_t] for x_t = sqrt(a) x_0 + sqrt(1 - a) eps, and the trainable part; theta: (..., 2)."""
    best = (1 - a) ** 0.5 * (x - a ** 0.5 * M) / (a * S ** 2 + 1 - a)
    return best + theta[..., :1] + theta[..., 1:] * x


def moments(theta, steps=STEPS):
    """Mean and variance of x_0, from N(0, 1) at x_T on; the step is written out anew, as mu = p x_t + q eps."""
    mean, variance = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for a, a_prev in zip(steps.alpha_bar, steps.alpha_bar_prev):
        noise = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        p = (a_prev / a) ** 0.5
        q = (1 - a_prev - noise) ** 0.5 - p * (1 - a) ** 0.5
        shift = eps(torch.zeros(1, dtype=torch.float64), a, theta)
        slope = eps(torch.ones(1, dtype=torch.float64), a, theta) - shift
        mean, variance = p * mean + q * (shift + slope * mean), (p + q * slope) ** 2 * variance + noise
    return mean, variance


def objective(reward, theta):
    """J(theta) = E[reward(x_0)], exactly."""
    mean, variance = moments(theta)
    return (2 * mean if reward == "linear" else -(mean - TARGET) ** 2 - variance).squeeze()


def exact_gradient(reward):
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(objective(reward, theta), theta)[0]


@pytest.fixture(scope="module")
def rollouts():
    """Latents (N, T+1, 1) and their log-probabilities (N, T), sampled at THETA."""
    generator = torch.Generator().manual_seed(0)
    path, log_p = [torch.randn(ROLLOUTS, 1, dtype=torch.float64, generator=generator)], []
    for i in range(len(STEPS)):
        noise = torch.randn(ROLLOUTS, 1, dtype=torch.float64, generator=generator)
        x, p = ddim_step(path[-1], eps(path[-1], STEPS.alpha_bar[i], THETA), STEPS, i, noise=noise)
        path.append(x)
        log_p.append(p)
    return torch.stack(path, 1), torch.stack(log_p, 1)


def estimates(reward, rollouts, loss):
    """Every rollout's own estimate of the gradient (N, 2): each gets its own copy of theta."""
    path, log_p_old = rollouts
    advantage = REWARDS[reward](path[:, -1, 0]) - objective(reward, THETA)
    theta = THETA.repeat(ROLLOUTS, 1).requires_grad_()
    for i, a in enumerate(STEPS.alpha_bar):
        _, log_p = ddim_step(path[:, i], eps(path[:, i], a, theta), STEPS, i, x_prev=path[:, i + 1])
        loss(log_p, log_p_old[:, i], advantage).backward()
    return -ROLLOUTS * theta.grad


def score_function(log_p, log_p_old, advantage):
    return ddpo_sf_loss(log_p, advantage)


def importance_sampling(log_p, log_p_old, advantage):
    ratio = torch.exp(log_p - log_p_old)
    assert ratio.eq(1).all()
    return ddpo_is_loss(ratio, advantage, 1e-4)


@pytest.mark.parametrize("reward", REWARDS)
def test_the_exact_gradient_is_that_of_finite_differences(reward):
    h = 1e-5
    for k, unit in enumerate(torch.eye(2, dtype=torch.float64)):
        slope = (objective(reward, THETA + h * unit) - objective(reward, THETA - h * unit)) / (2 * h)
        assert slope.item() == pytest.approx(exact_gradient(reward)[k].item(), rel=1e-6)


def test_without_theta_many_steps_sample_the_data():
    mean, variance = moments(torch.zeros(2, dtype=torch.float64), ddim_steps(500))
    assert mean.item() == pytest.approx(M, abs=0.01) and variance.item() ** 0.5 == pytest.approx(S, abs=0.01)


@pytest.mark.parametrize("reward", REWARDS)
def test_rollouts_have_the_exact_expected_reward(reward, rollouts):
    r = REWARDS[reward](rollouts[0][:, -1, 0])
    error = r.std() / ROLLOUTS ** 0.5
    assert abs(r.mean() - objective(reward, THETA)) < 3 * error < 0.02 * abs(objective(reward, THETA))


@pytest.mark.parametrize("reward", REWARDS)
def test_reinforce_estimates_the_exact_policy_gradient(reward, rollouts):
    each, exact = estimates(reward, rollouts, score_function), exact_gradient(reward)
    error = each.std(dim=0) / ROLLOUTS ** 0.5
    assert (error < 0.03 * exact.abs()).all()
    assert ((each.mean(dim=0) - exact).abs() < 3 * error).all()


@pytest.mark.parametrize("reward", REWARDS)
def test_importance_sampling_starts_with_the_gradient_of_reinforce(reward, rollouts):
    torch.testing.assert_close(estimates(reward, rollouts, importance_sampling),
                               estimates(reward, rollouts, score_function), rtol=1e-12, atol=1e-12)
