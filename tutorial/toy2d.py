"""DDPO in the plane, where the expected reward and its true gradient can be calculated.

    python tutorial/toy2d.py        half a minute on one CPU core; prints two tables, draws toy2d.png

A "picture" is a point, the data are a mixture of five Gaussians, and the reward is minus the distance to a star. The
sampler, the losses and the advantages are the project's own.
"""
import sys
from pathlib import Path

import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch.distributions import Normal
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ddpo_min.advantages import epoch_advantages
from ddpo_min.ddim import ddim_mean, ddim_step, ddim_steps
from ddpo_min.losses import ddpo_is_loss, ddpo_sf_loss

torch.set_default_dtype(torch.float64)

SEED = 0
T = 10                          # denoising steps, with Stable Diffusion's own noise schedule
STEPS = ddim_steps(T)
HIDDEN = 32
PRETRAINING = 1500              # optimizer steps
COUNTS, REPEATS = (100, 1000, 10_000, 100_000), 6       # samples of an estimate of the gradient, estimates of each kind
EPOCHS, SAMPLES, MINIBATCH, LR, CLIP = 40, 1000, 250, 1e-3, 0.1
SHOWN = 0, 8, 40                # after how many epochs we draw samples
CLOUD = 50_000                  # how many

CENTRES = torch.tensor([[0.83, 0.56], [-0.36, 1.09], [-1.30, 0.05], [-0.48, -1.37], [1.29, -0.95]])
SPREADS = torch.tensor([0.15, 0.18, 0.21, 0.24, 0.27])
SHARES = torch.tensor([0.30, 0.25, 0.20, 0.15, 0.10])
STAR = torch.tensor([1.8, -1.5])


def data(n, generator):
    """Points of the mixture: (n, 2)."""
    k = torch.multinomial(SHARES, n, replacement=True, generator=generator)
    return CENTRES[k] + SPREADS[k, None] * torch.randn(n, 2, generator=generator)


def reward(x):
    """Minus the distance to the star, which lies beside the rarest Gaussian: (n, 2) -> (n,)."""
    return -(x - STAR).norm(dim=1)


def eps(theta, x, i):
    """The noise predicted in x (n, 2): each step i has a network of its own, with one hidden layer."""
    W1, b1, W2, b2 = (p[i] for p in theta)
    return torch.tanh(x @ W1 + b1) @ W2 + b2


def pretrain(generator):
    """theta: the weights that see the noise in x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise."""
    shapes = {(T, 2, HIDDEN): 1, (T, 1, HIDDEN): 1, (T, HIDDEN, 2): HIDDEN ** -0.5, (T, 1, 2): 0}
    theta = [(scale * torch.randn(shape, generator=generator)).requires_grad_() for shape, scale in shapes.items()]
    optimizer = torch.optim.Adam(theta, lr=5e-3)
    alpha_bar = torch.tensor(STEPS.alpha_bar).view(T, 1, 1)
    for _ in tqdm(range(PRETRAINING), desc="pretraining", leave=False):
        noise = torch.randn(T, 200, 2, generator=generator)
        x_t = alpha_bar.sqrt() * data(200, generator) + (1 - alpha_bar).sqrt() * noise
        ((eps(theta, x_t, slice(T)) - noise) ** 2).mean().backward()        # all steps at once
        optimizer.step()
        optimizer.zero_grad()
    return theta


@torch.no_grad()
def sample(theta, n, generator):
    """Trajectories from noise to x_0 (T + 1, n, 2), and the log-probability of each step (T, n)."""
    x, log_p = [torch.randn(n, 2, generator=generator)], []
    for i in range(T):
        x_prev, p = ddim_step(x[i], eps(theta, x[i], i), STEPS, i, noise=torch.randn(n, 2, generator=generator))
        x.append(x_prev)
        log_p.append(p)
    return torch.stack(x), torch.stack(log_p)


def losses(theta, x, log_p_old, A, sf=False):
    """DDPO's loss of each step: importance sampling, or the score function (REINFORCE)."""
    for i in range(T):
        _, log_p = ddim_step(x[i], eps(theta, x[i], i), STEPS, i, x_prev=x[i + 1])
        yield ddpo_sf_loss(log_p, A) if sf else ddpo_is_loss(torch.exp(log_p - log_p_old[i]), A, CLIP)


def advantages(rewards):
    """How many standard deviations better than the mean."""
    return torch.from_numpy(epoch_advantages(rewards.numpy()))


def gradient(theta, terms):
    """The gradient of a sum of terms, as one vector."""
    return sum(torch.cat([g.flatten() for g in torch.autograd.grad(term, theta)]) for term in terms)


def estimates(theta, n, generator):
    """DDPO's estimate of dJ/dtheta, J = E[r], from n samples: once with A = r, once with A = (r - mean) / std.

    dJ/dtheta = E[ sum_i A d/dtheta log p(x_{i+1} | x_i) ]; a constant that is taken from A changes nothing    [Sec. 4.3]
    """
    x, log_p = sample(theta, n, generator)
    r = reward(x[-1])
    # times -2: a loss is minus what shall grow, and log_p is the mean of two dimensions, not their sum
    return torch.stack([-2 * gradient(theta, losses(theta, x, log_p, r)),
                        -2 * gradient(theta, losses(theta, x, log_p, advantages(r))) * r.std(correction=0)])


def mean(theta, x, i):
    """mu_i(x): where step i leads without noise."""
    return ddim_mean(x, eps(theta, x, i), STEPS.alpha_bar[i], STEPS.alpha_bar_prev[i], STEPS.sigma[i])


H = 0.2                                                     # mesh of a grid from -7 to 7
AXIS = H * torch.arange(-35, 36)
GRID = torch.cartesian_prod(AXIS, AXIS)
NODES = 3 ** 0.5 * torch.cartesian_prod(*2 * [torch.tensor([-1.0, 0, 1])])      # E[f(z)] = sum_k WEIGHTS_k f(NODES_k)
WEIGHTS = torch.tensor([1, 4, 1, 4, 16, 4, 1, 4, 1]) / 36                       # for a normal z (Gauss-Hermite)


def expected_reward(theta):
    """J = E[r] without samples, backwards from the end. Its gradient by autograd is the true one.

    V_T = r,  V_i(x) = E[r | x_i = x] = integral of N(x'; mu_i(x), sigma_i^2) V_{i+1}(x') dx',  J = E[V_0(x_0)]
    """
    x = GRID
    for i in (T - 2, T - 1):        # noise too narrow for the grid, so nine points each
        x = (mean(theta, x, i)[:, None] + STEPS.sigma[i] * NODES).flatten(0, 1)
    V = reward(x).view(-1, 9, 9) @ WEIGHTS @ WEIGHTS
    for i in reversed(range(T - 2)):
        mu = mean(theta, GRID, i)
        N_1, N_2 = (H * Normal(mu[:, [d]], STEPS.sigma[i]).log_prob(AXIS).exp() for d in range(2))      # N = N_1 N_2
        V = ((N_1 @ V.view(len(AXIS), -1)) * N_2).sum(1)
    return (H ** 2 * Normal(0.0, 1.0).log_prob(GRID).sum(1).exp() * V).sum()


def draw(clouds, rewards, exact, table):
    """toy2d.png. clouds: {epoch: trajectories}; exact: {epoch: J}; table: (COUNTS, REPEATS, 2, angle length error)."""
    blue, orange, turn = "#0072B2", "#D55E00", torch.linspace(0, 2 * torch.pi, 60)
    figure = Figure(figsize=(14, 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    planes, (course, angles, lengths) = top.subplots(1, 4), bottom.subplots(1, 3)
    circles = CENTRES[..., None] + 2 * SPREADS[:, None, None] * torch.stack([turn.cos(), turn.sin()])
    for axes in planes:
        axes.plot(*circles.permute(1, 2, 0), color="0.5", linewidth=0.8)
        axes.plot(*STAR, "*", markersize=15, color="#F0E442", markeredgecolor="black", zorder=3)
        axes.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=(-2, 0, 2), yticks=(-2, 0, 2), aspect="equal")
    for axes, (epoch, x) in zip(planes, clouds.items()):
        axes.hist2d(*x[-1].T, bins=130, range=[[-2.6, 2.6]] * 2, cmap="Blues", norm=PowerNorm(0.5, 0, CLOUD / 200))
        axes.plot(*x[-1, :150].T, ".", markersize=2, color="black")
        axes.set_title(f"epoch {epoch}: density and samples")
    for epoch, color in ((SHOWN[0], blue), (SHOWN[-1], orange)):
        planes[3].plot(*clouds[epoch][:, :5].permute(2, 0, 1), color=color, linewidth=0.8)
        planes[3].plot(*clouds[epoch][-1, :5].T, "o", color=color, label=f"epoch {epoch}")
    planes[3].set_title("from the same noise to samples")
    course.plot(rewards, ".", color="0.5", label=f"mean of {SAMPLES} samples")
    course.plot(*zip(*exact.items()), color=blue, label="exact")
    course.set(title="reward: minus the distance to the star", xlabel="epoch")
    n = torch.logspace(1.8, 5.2, 50)
    for kind, (color, label) in enumerate(((orange, "A = r"), (blue, "A = (r - mean) / std"))):
        c = noise(table)[:, kind].mean()
        for column, axes, curve in ((0, angles, (c / n.sqrt()).atan().rad2deg()), (1, lengths, (1 + c ** 2 / n).sqrt())):
            axes.loglog(COUNTS, table[:, :, kind, column], "o", markersize=4, alpha=0.5, color=color)
            axes.loglog(n, curve, "--", linewidth=1, color=color, label=f"{label}: c = {c:.0f}")
    angles.set(title="angle to the true gradient, degrees; dashed: arctan(c / √n)", xlabel="samples n")
    lengths.set(title="length / true length; dashed: √(1 + c² / n)", xlabel="samples n")
    for axes, ticks in ((angles, (2, 5, 10, 20, 45, 90)), (lengths, (1, 2, 4, 8))):
        axes.minorticks_off()
        axes.set_yticks(ticks, ticks)
    for axes in (planes[3], course, angles, lengths):
        axes.legend(frameon=False)
    figure.savefig("toy2d.png", dpi=110)


def noise(table):
    """c: the root mean square error, divided by the true length, is c / sqrt(n): (COUNTS, 2)."""
    return (torch.tensor(COUNTS)[:, None] * (table[..., 2] ** 2).mean(1)).sqrt()


def main():
    generator = torch.Generator().manual_seed(SEED)
    theta = pretrain(generator)

    J = expected_reward(theta)
    truth = gradient(theta, [J])
    x, log_p = sample(theta, CLOUD, generator)
    r = reward(x[-1])
    print(f"J = {J:.4f}, mean of {CLOUD} samples {r.mean():.4f} +- {r.std() / CLOUD ** 0.5:.4f}")
    by_sf, by_is = (gradient(theta, losses(theta, x, log_p, r, sf)) for sf in (True, False))
    print(f"gradients of DDPO_SF and DDPO_IS: largest difference {(by_sf - by_is).abs().max():.1g}")

    table = []
    for n in COUNTS:
        g = torch.stack([estimates(theta, n, generator) for _ in tqdm(range(REPEATS), desc=f"n = {n}", leave=False)])
        angle = torch.cosine_similarity(g, truth, dim=2).acos().rad2deg()
        table.append(torch.stack([angle, g.norm(dim=2) / truth.norm(), (g - truth).norm(dim=2) / truth.norm()], 2))
        for name, row in zip(("A = r", "A = (r - mean) / std"), table[-1].mean(0)):
            print("{:6} samples, {:20}: angle {:4.1f} degrees, length {:.3f}, error {:.3f}".format(n, name, *row))

    clouds, rewards, exact = {}, [], {}
    optimizer = torch.optim.Adam(theta, lr=LR)
    for epoch in tqdm(range(EPOCHS + 1), desc="DDPO", leave=False):
        if epoch in SHOWN:
            clouds[epoch] = sample(theta, CLOUD, torch.Generator().manual_seed(SEED))[0]
        x, log_p = sample(theta, SAMPLES, generator)
        r = reward(x[-1])
        rewards.append(r.mean())
        if epoch % 2 == 0:
            exact[epoch] = expected_reward(theta).item()
            tqdm.write(f"epoch {epoch:2}: mean of {SAMPLES} samples {rewards[-1]:.3f}, exactly {exact[epoch]:.3f}")
        A = advantages(r)
        for part in torch.randperm(SAMPLES, generator=generator).split(MINIBATCH):
            for loss in losses(theta, x[:, part], log_p[:, part], A[part]):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    draw(clouds, rewards, exact, torch.stack(table))


if __name__ == "__main__":
    main()
