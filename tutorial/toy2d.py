"""DDPO in two dimensions, where everything can be computed: also the true gradient.

    python tutorial/toy2d.py        half a minute on a laptop; prints a table and the reward, draws toy2d.png

A small diffusion model learns a mixture of five Gaussians, then DDPO pulls its samples to a star. Samplers, losses and
advantages are the project's own; a "picture" is a point of the plane. So the expected reward is an integral that we can
calculate, and its gradient tells how good DDPO's estimate is.
"""
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ddpo_min.advantages import epoch_advantages
from ddpo_min.ddim import ddim_mean, ddim_step, ddim_steps
from ddpo_min.losses import ddpo_is_loss, ddpo_sf_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEED = 0
T = 10                      # denoising steps
STEPS = ddim_steps(T)       # Stable Diffusion's own noise schedule; i = 0 is the noisiest step
WIDTH = 32                  # hidden units
PRETRAINING = 1500          # optimizer steps
SAMPLES, MINIBATCH, EPOCHS, LR, CLIP = 1000, 250, 40, 1e-3, 0.1
EARLY = 8                   # the epoch of the picture in between
REPEATS = {100: 16, 1000: 16, 10_000: 16, 100_000: 4}       # samples of an estimate: how many estimates
CLOUD = 100_000             # samples behind each density that is drawn


# ---- 1. The data, the reward, the diffusion model ----

k = torch.arange(5)
ANGLE, RADIUS = 0.6 + 0.4 * math.pi * k, 1 + 0.15 * k
CENTRES = torch.stack([RADIUS * ANGLE.cos(), RADIUS * ANGLE.sin()], 1).double()     # (5, 2)
WIDTHS, SHARES = 0.15 + 0.03 * k.double(), torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1])
STAR = torch.tensor([1.8, -1.5], dtype=torch.float64)


def normal(*shape, generator):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def data(n, generator):
    """n points of the mixture of Gaussians: (n, 2)."""
    k = torch.multinomial(SHARES, n, replacement=True, generator=generator)
    return CENTRES[k] + WIDTHS[k, None] * normal(n, 2, generator=generator)


def reward(x):
    """Minus the distance to the star: (n, 2) -> (n,). It knows nothing about the data."""
    return -(x - STAR).norm(dim=1)


def eps(theta, x, i):
    """The predicted noise in x (n, 2) at step i: a network with one hidden layer, with weights of its own for each i."""
    W1, b1, W2, b2 = (p[i] for p in theta)
    return torch.tanh(x @ W1 + b1) @ W2 + b2


def pretrain(generator):
    """theta, four tensors: learn the noise in x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise, all steps at once."""
    W1, b1, W2 = (normal(T, *shape, generator=generator) for shape in ((2, WIDTH), (1, WIDTH), (WIDTH, 2)))
    theta = [p.requires_grad_() for p in (W1, b1, W2 / WIDTH ** 0.5, torch.zeros(T, 1, 2, dtype=torch.float64))]
    optimizer = torch.optim.Adam(theta, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAINING)
    alpha_bar = torch.tensor(STEPS.alpha_bar, dtype=torch.float64).view(T, 1, 1)
    for _ in tqdm(range(PRETRAINING), desc="pretraining", leave=False):
        noise = normal(T, 200, 2, generator=generator)
        x_t = alpha_bar.sqrt() * data(200, generator) + (1 - alpha_bar).sqrt() * noise
        ((eps(theta, x_t, slice(T)) - noise) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return theta


# ---- 2. DDPO: samples, their steps' log-probabilities, the gradient of their loss ----

@torch.no_grad()
def sample(theta, n, generator):
    """n trajectories from noise to x_0: (T + 1, n, 2), and the log-probability of each step: (T, n)."""
    x, log_p = [normal(n, 2, generator=generator)], []
    for i in range(T):
        x_prev, p = ddim_step(x[i], eps(theta, x[i], i), STEPS, i, noise=normal(n, 2, generator=generator))
        x.append(x_prev)
        log_p.append(p)
    return torch.stack(x), torch.stack(log_p)


def advantages(rewards):
    """A = (r - mean) / std: who is better than the others?"""
    return torch.tensor(epoch_advantages(rewards.numpy()))


def backward(theta, x, log_p_old, A, sf=False):
    """Add the gradient of DDPO's loss, summed over the steps, to that of theta."""
    for i in range(T):
        _, log_p = ddim_step(x[i], eps(theta, x[i], i), STEPS, i, x_prev=x[i + 1])
        ratio = torch.exp(log_p - log_p_old[i])
        (ddpo_sf_loss(log_p, A) if sf else ddpo_is_loss(ratio, A, CLIP)).backward()


def take_gradient(theta):
    """The gradient that backward() left, as one vector; theta is then without one."""
    gradient = torch.cat([p.grad.flatten() for p in theta])
    for p in theta:
        p.grad = None
    return gradient


def estimate(theta, n, generator, baseline=True, sf=False):
    """The policy gradient from n samples.

    dJ/dtheta = E[ sum_i A d/dtheta log p(x_{i+1} | x_i) ], for A = r or r minus any constant    [paper Sec. 4.3]
    """
    x, log_p = sample(theta, n, generator)
    r = reward(x[-1])
    backward(theta, x, log_p, advantages(r) if baseline else r, sf)
    scale = r.std(correction=0) if baseline else 1      # advantages count in standard deviations
    return -2 * scale * take_gradient(theta)            # minus a loss; log_p is the mean of two dimensions, not the sum


def train(theta, generator):
    """DDPO; yields the mean reward of each epoch's samples, while theta changes in place."""
    optimizer = torch.optim.Adam(theta, lr=LR)
    for _ in tqdm(range(EPOCHS), desc="DDPO", leave=False):
        x, log_p = sample(theta, SAMPLES, generator)
        r = reward(x[-1])
        A = advantages(r)
        yield r.mean().item()
        for part in torch.randperm(SAMPLES, generator=generator).split(MINIBATCH):
            backward(theta, x[:, part], log_p[:, part], A[part])
            optimizer.step()
            optimizer.zero_grad()


# ---- 3. The true gradient ----

H = 0.2                                                             # of the grid of 71 x 71 points
AXIS = torch.arange(-7, 7 + H / 2, H, dtype=torch.float64)
NODES, WEIGHTS = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(3))   # Gauss-Hermite: E[f(z)], z normal


def density(x, mu, sigma):
    """N(x; mu, sigma^2) in one dimension."""
    return torch.exp(-((x - mu) / sigma) ** 2 / 2) / (sigma * math.sqrt(2 * math.pi))


def value(theta, x, i):
    """V_i(x) = E[reward of x_0 | x_i = x]: the last two steps, whose noise is narrower than the grid, by Gauss-Hermite.

    V_T = reward,  V_i(x) = E_z[ V_{i+1}(mu_i(x) + sigma_i z) ]
    """
    if i == T:
        return reward(x)
    mu, sigma = mean(theta, x, i), STEPS.sigma[i]
    pairs = zip(torch.cartesian_prod(NODES, NODES), torch.cartesian_prod(WEIGHTS, WEIGHTS).prod(1) / (2 * math.pi))
    return sum(w * value(theta, mu + sigma * z, i + 1) for z, w in pairs)


def mean(theta, x, i):
    return ddim_mean(x, eps(theta, x, i), STEPS.alpha_bar[i], STEPS.alpha_bar_prev[i], STEPS.sigma[i])


def expected_reward(theta):
    """J(theta) = E[reward of x_0], exactly: backwards from the end, V_i(x) = sum over the grid of N(x'; mu_i(x), sigma_i^2) V_{i+1}(x') H^2."""
    grid = torch.cartesian_prod(AXIS, AXIS)
    V = value(theta, grid, T - 2)
    for i in reversed(range(T - 2)):
        mu = mean(theta, grid, i)
        p_x, p_y = (H * density(AXIS, mu[:, [d]], STEPS.sigma[i]) for d in (0, 1))      # a Gaussian is a product
        V = ((p_x @ V.view(len(AXIS), -1)) * p_y).sum(1)
    return (H ** 2 * density(grid, 0, 1).prod(1) * V).sum()


def compare(theta, truth, generator):
    """Estimates beside the truth: {(baseline, n): angle in degrees, length and error by the truth's (repeats, 3)}."""
    table = {}
    for n, repeats in tqdm(REPEATS.items(), desc="estimates", leave=False):
        for baseline in (False, True):
            rows = []
            for _ in range(repeats):
                g = estimate(theta, n, generator, baseline)
                cosine = (g @ truth / (g.norm() * truth.norm())).item()
                rows.append([math.degrees(math.acos(cosine)), *(v.norm() / truth.norm() for v in (g, g - truth))])
            table[baseline, n] = np.array(rows)
    return table


# ---- 4. The picture ----

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.45"       # also for colour-blind eyes


def draw_plane(axes, title):
    """The frame of a picture of the plane: the data's Gaussians as circles of two standard deviations, and the star."""
    for centre, width in zip(CENTRES.tolist(), WIDTHS.tolist()):
        axes.add_patch(plt.Circle(centre, 2 * width, fill=False, color=GREY, linewidth=0.8))
    axes.plot(*STAR, marker="*", markersize=15, color="#F0E442", markeredgecolor="black")
    axes.set(title=title, xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=(-2, 0, 2), yticks=(-2, 0, 2), aspect="equal")


def draw(paths, clouds, rewards, exact, table):
    """toy2d.png."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(14, 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    planes, (course, angle, length) = top.subplots(1, 4), bottom.subplots(1, 3)
    for axes, (title, x) in zip(planes, clouds.items()):
        *_, image = axes.hist2d(*x.T.numpy(), bins=130, range=[[-2.6, 2.6]] * 2, density=True, cmap="Blues",
                                norm=matplotlib.colors.PowerNorm(0.5, 0, 3))
        axes.plot(*x[:150].T, ".", markersize=2, color="black")
        draw_plane(axes, title)
    top.colorbar(image, ax=planes[2], label="density of $x_0$", shrink=0.8, extend="max")
    for color, (name, x) in zip((BLUE, ORANGE), paths.items()):
        for path in x.transpose(0, 1):
            planes[3].plot(*path.T, color=color, linewidth=0.8, alpha=0.7)
        planes[3].plot(*x[-1].T, "o", markersize=5, color=color, label=f"{name}")
    draw_plane(planes[3], "from the same noise")
    planes[3].legend(loc="upper left", frameon=False)

    course.plot(rewards, ".", color=GREY, label=f"mean of {SAMPLES} samples")
    course.plot(*zip(*exact.items()), color=BLUE, label="exact, by quadrature")
    course.set(xlabel="epoch", ylabel="reward: minus the distance to the star", title="expected reward")
    n = np.geomspace(60, 170_000)
    for baseline, color, label in ((False, ORANGE, "A = r"), (True, BLUE, "A = (r - mean) / std")):
        c = noise(table, baseline)
        for axes, column, curve in ((angle, 0, np.degrees(np.arctan(c / n ** 0.5))), (length, 1, (1 + c ** 2 / n) ** 0.5)):
            axes.loglog(n, curve, "--", color=color, linewidth=1)
            for count in REPEATS:
                rows = table[baseline, count]
                axes.plot([count] * len(rows), rows[:, column], "o", markersize=4, alpha=0.5, color=color,
                          label=label if count == 100 else None)
    angle.set(xlabel="samples n", ylabel="degrees", title="angle between estimate and true gradient")
    length.set(xlabel="samples n", ylabel="estimate / truth", title="length of the estimate")
    for axes in (course, angle, length):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig("toy2d.png", dpi=110)
    plt.close(figure)


def noise(table, baseline):
    """c: how many times as long as the gradient is the noise of an estimate from one sample."""
    return np.mean([n * (table[baseline, n][:, 2] ** 2).mean() for n in REPEATS]) ** 0.5


def main():
    generator = torch.Generator().manual_seed(SEED)
    theta = pretrain(generator)
    J = expected_reward(theta)
    J.backward()
    truth = take_gradient(theta)
    table = compare(theta, truth, generator)
    print(J.item(), truth.norm(), len(truth))
    for n in REPEATS:
        print(n, *(table[b, n].mean(0) for b in (False, True)))
    clouds, paths, rewards, exact = {}, {}, [], {}
    same = lambda n: sample(theta, n, torch.Generator().manual_seed(SEED))[0]
    clouds["before"] = same(CLOUD)[-1]
    paths["before"] = same(8)
    for epoch, r in enumerate(train(theta, generator)):
        rewards.append(r)
        if epoch % 4 == 0:
            with torch.no_grad():
                exact[epoch] = expected_reward(theta).item()
        if epoch == EARLY:
            clouds[f"after {EARLY} epochs"] = same(CLOUD)[-1]
    clouds[f"after {EPOCHS} epochs"] = same(CLOUD)[-1]
    paths["after"] = same(8)
    print(rewards[::4], exact)
    torch.save((paths, clouds, rewards, exact, table), "/tmp/hE/draw.pt")
    draw(paths, clouds, rewards, exact, table)


if __name__ == "__main__":
    main()
