"""The tutorial in the plane: its truth is the truth, DDPO's estimates converge to it, and the program learns."""
import math
import re
import sys

import pytest
import torch
from PIL import Image

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tutorial"))
import toy2d

from ddpo_min.advantages import epoch_advantages

torch.set_default_dtype(torch.float32)      # toy2d is a program, and sets the default of its whole process


@pytest.fixture(autouse=True, scope="module")
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def theta(double):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy2d, "PRETRAINING", 600)
        return toy2d.pretrain(torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def truth(theta):
    J = toy2d.expected_reward(theta)
    return J.item(), toy2d.gradient(theta, [J])


def test_the_network_learns_the_expected_noise(theta):
    """For a mixture of Gaussians E[noise | x_t] is known: each Gaussian's, by how probable it makes x_t."""
    generator = torch.Generator().manual_seed(2)
    for i, a in enumerate(toy2d.STEPS.alpha_bar):
        x = a ** 0.5 * toy2d.data(500, generator) + (1 - a) ** 0.5 * torch.randn(500, 2, generator=generator)
        variance = a * toy2d.SPREADS ** 2 + 1 - a
        away = x[:, None] - a ** 0.5 * toy2d.CENTRES                                    # (500, 5, 2)
        chance = torch.softmax(toy2d.SHARES.log() - (away ** 2).sum(2) / (2 * variance) - variance.log(), 1)
        best = (1 - a) ** 0.5 * ((chance / variance)[..., None] * away).sum(1)
        assert ((toy2d.eps(theta, x, i) - best) ** 2).mean() < 0.02 + 0.1 * (best ** 2).mean()


def test_the_truth_of_a_linear_network_is_known(monkeypatch):
    """Linear steps lead from one Gaussian to the next, and a squared distance needs its mean and covariance alone."""
    generator, T, star = torch.Generator().manual_seed(0), toy2d.T, torch.tensor([0.7, -0.4])
    W, b = torch.zeros(T, 2, 2), 0.1 * torch.randn(T, 2, generator=generator)
    for i, a in enumerate(toy2d.STEPS.alpha_bar):       # data N(0, 0.5), so that nothing leaves the grid
        W[i] = (1 - a) ** 0.5 / (0.5 * a + 1 - a) * torch.eye(2) + 0.1 * torch.randn(2, 2, generator=generator)
    theta = [W.requires_grad_(), b.requires_grad_()]
    monkeypatch.setattr(toy2d, "eps", lambda theta, x, i: x @ theta[0][i] + theta[1][i])
    monkeypatch.setattr(toy2d, "reward", lambda x: -((x - star) ** 2).sum(-1))

    mean, covariance = torch.zeros(2), torch.eye(2)
    for i, (a, a_prev) in enumerate(zip(toy2d.STEPS.alpha_bar, toy2d.STEPS.alpha_bar_prev)):
        noise = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        p = (a_prev / a) ** 0.5
        q = (1 - a_prev - noise) ** 0.5 - p * (1 - a) ** 0.5
        M = p * torch.eye(2) + q * W[i]
        mean, covariance = mean @ M + q * b[i], M.T @ covariance @ M + noise * torch.eye(2)
    J = -((mean - star) ** 2).sum() - covariance.trace()
    exact = toy2d.gradient(theta, [J])

    by_quadrature = toy2d.expected_reward(theta)
    assert by_quadrature.item() == pytest.approx(J.item(), rel=1e-4)
    assert (toy2d.gradient(theta, [by_quadrature]) - exact).norm() < 1e-4 * exact.norm()


def test_a_finer_and_larger_grid_gives_the_same_truth(theta, truth, monkeypatch):
    monkeypatch.setattr(toy2d, "H", 0.17)
    monkeypatch.setattr(toy2d, "AXIS", 0.17 * torch.arange(-46, 47))
    monkeypatch.setattr(toy2d, "GRID", torch.cartesian_prod(toy2d.AXIS, toy2d.AXIS))
    J = toy2d.expected_reward(theta)
    assert J.item() == pytest.approx(truth[0], rel=1e-4)
    assert (toy2d.gradient(theta, [J]) - truth[1]).norm() < 1e-3 * truth[1].norm()


def test_samples_have_the_expected_reward(theta, truth):
    r = toy2d.reward(toy2d.sample(theta, 40_000, torch.Generator().manual_seed(3))[0][-1])
    error = r.std() / len(r) ** 0.5
    assert abs(r.mean() - truth[0]) < 3 * error < 0.02


def test_the_estimates_are_unbiased_and_advantages_are_the_better_ones(theta, truth):
    generator = torch.Generator().manual_seed(4)
    g = torch.stack([toy2d.estimates(theta, 500, generator) for _ in range(80)])        # (80, 2, parameters)
    error, expected = (g.mean(0) - truth[1]) ** 2, g.var(0) / len(g)                    # (2, parameters)
    assert (error.sum(1) < 3 * expected.sum(1)).all()
    step = torch.cat([torch.arange(toy2d.T).view(-1, 1, 1).expand_as(p).flatten() for p in theta])
    for i in range(toy2d.T):                    # each step has parameters of its own
        assert (error[:, step == i].sum(1) < 5 * expected[:, step == i].sum(1)).all()
    by_reward, by_advantage = expected.sum(1).sqrt() / truth[1].norm()
    assert by_advantage < 0.15 and 2 * by_advantage < by_reward < 0.5


def test_both_losses_have_the_same_gradient_before_the_first_step(theta):
    x, log_p = toy2d.sample(theta, 300, torch.Generator().manual_seed(5))
    A = torch.from_numpy(epoch_advantages(toy2d.reward(x[-1]).numpy()))
    by_sf, by_is = (toy2d.gradient(theta, toy2d.losses(theta, x, log_p, A, sf)) for sf in (True, False))
    assert by_sf.norm() > 0.1 and by_is.equal(by_sf)


def test_training_follows_the_true_gradient(theta, truth, monkeypatch):
    """Of an optimizer that moves nothing, the steps' gradients are estimates, too: in standard deviations of r."""
    gradients = []

    class Still:
        def __init__(self, theta, lr):
            self.theta = theta

        def step(self):
            gradients.append(torch.cat([p.grad.flatten() for p in self.theta]))

        def zero_grad(self):
            for p in self.theta:
                p.grad = None

    for name, value in dict(COUNTS=(10,), REPEATS=1, EPOCHS=29, CLOUD=100, pretrain=lambda generator: theta,
                            expected_reward=lambda theta: sum(p.sum() for p in theta), draw=lambda *_: None).items():
        monkeypatch.setattr(toy2d, name, value)
    monkeypatch.setattr(torch.optim, "Adam", Still)
    toy2d.main()
    std = toy2d.reward(toy2d.sample(theta, 10_000, torch.Generator().manual_seed(6))[0][-1]).std()
    estimate = -2 * std * torch.stack(gradients).mean(0)
    assert len(gradients) == 30 * toy2d.SAMPLES / toy2d.MINIBATCH
    assert (estimate - truth[1]).norm() < 0.2 * truth[1].norm()


def test_the_program_compares_learns_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in dict(PRETRAINING=200, COUNTS=(100, 400), REPEATS=1, EPOCHS=4, LR=1e-2, SHOWN=(0, 2, 4),
                            CLOUD=2000).items():
        monkeypatch.setattr(toy2d, name, value)
    toy2d.main()
    said = capsys.readouterr().out
    J, of_samples, error = map(float, re.search(r"^J = (\S+); .* (\S+) \+- (\S+)$", said, re.MULTILINE).groups())
    assert abs(J - of_samples) < 3 * error
    rows = [list(map(float, row)) for row in re.findall(r"^ *(\d+) samples.* (\S+) degrees, .* (\S+), .* (\S+)$", said,
                                                        re.MULTILINE)]
    assert [row[0] for row in rows] == [100, 100, 400, 400]
    for _, degrees, length, error in rows:      # the law of cosines, for the two gradients and the error
        cosine = (length ** 2 + 1 - error ** 2) / (2 * length)
        assert cosine == pytest.approx(math.cos(math.radians(degrees)), abs=0.01)
    courses = re.findall(r"^epoch +(\d+): .* (\S+), exactly (\S+)$", said, re.MULTILINE)
    assert [course[0] for course in courses] == ["0", "4"] and float(courses[0][2]) == pytest.approx(J, abs=1e-3)
    assert float(courses[1][2]) > J + 0.3
    assert all(abs(float(sampled) - float(exactly)) < 0.2 for _, sampled, exactly in courses)
    assert Image.open("toy2d.png").size == (1540, 814)
