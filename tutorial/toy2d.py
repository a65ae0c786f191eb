"""DDPO in the plane, where the expected reward and its true gradient can be calculated.

    python tutorial/toy2d.py        half a minute on one CPU core; prints what it measures, draws toy2d.png

A "picture" is a point, the data are five Gaussians, and the reward is minus the distance to a star. The sampler, the
losses and the advantages are the project's own. DDPO's estimate of the gradient from 10,000 samples is 9 degrees away
from the truth (31, if rewards take the place of advantages), and ten times as many samples make its error three times
smaller. Training then takes the expected reward from -2.68 to -0.17 (seeds 1 and 2: to -0.19 and -0.18).
"""
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ddpo_min.advantages import epoch_advantages
from ddpo_min.ddim import ddim_step, ddim_steps
from ddpo_min.losses import ddpo_is_loss, ddpo_sf_loss

torch.set_default_dtype(torch.float64)
SEED, T = 0, 10                                         # T denoising steps
STEPS = ddim_steps(T)                                   # Stable Diffusion's noise schedule; i = 0 is the noisiest step
HIDDEN, PRETRAINING = 32, 1500                          # hidden units, optimizer steps
COUNTS, REPEATS = (100, 1000, 10_000, 100_000), 6       # samples of an estimate of the gradient; how many estimates
EPOCHS, SAMPLES, MINIBATCH, LR, CLIP = 40, 1000, 250, 1e-3, 0.1
SHOWN, CLOUD = (0, 8, 40), 50_000                       # epochs whose density is drawn, from so many samples

CENTRES = torch.tensor([[0.83, 0.56], [-0.36, 1.09], [-1.30, 0.05], [-0.48, -1.37], [1.29, -0.95]])     # of the data
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
    """Trajectories x (T + 1, n, 2), x[0] is noise and x[T] the samples, and each step's log-probability (T, n)."""
    x, log_p = [torch.randn(n, 2, generator=generator)], []
    for i in range(T):
        x_prev, p = ddim_step(x[i], eps(theta, x[i], i), STEPS, i, noise=torch.randn(n, 2, generator=generator))
        x.append(x_prev)
        log_p.append(p)
    return torch.stack(x), torch.stack(log_p)


def losses(theta, x, log_p_old, A, sf=False):
    """DDPO's loss of each step: by importance ratios, or by the score function (REINFORCE)."""
    for i in range(T):
        _, log_p = ddim_step(x[i], eps(theta, x[i], i), STEPS, i, x_prev=x[i + 1])
        yield ddpo_sf_loss(log_p, A) if sf else ddpo_is_loss(torch.exp(log_p - log_p_old[i]), A, CLIP)


def gradient(theta, terms):
    """The gradient of a sum, as one vector."""
    return sum(torch.cat([g.flatten() for g in torch.autograd.grad(term, theta)]) for term in terms)


def estimates(theta, n, generator):
    """DDPO's estimate of dJ/dtheta, J = E[r], from n samples: once with A = r, once with A = (r - mean) / std.

    dJ/dtheta = E[ sum_i A d/dtheta log p(x[i+1] | x[i]) ], for A = r as for A = r - any constant    [paper Sec. 4.3]
    """
    x, log_p = sample(theta, n, generator)
    r = reward(x[-1])
    A = torch.from_numpy(epoch_advantages(r.numpy()))
    # times -2: a loss is minus what shall grow, and log_p is the mean over two dimensions, not the sum
    return torch.stack([-2 * gradient(theta, losses(theta, x, log_p, r)),
                        -2 * gradient(theta, losses(theta, x, log_p, A)) * r.std(correction=0)])


H = 0.2                                             # mesh of a grid from -7 to 7: J to 1e-4
AXIS = H * torch.arange(-35, 36)
GRID = torch.cartesian_prod(AXIS, AXIS)             # (5041, 2)
Z = 3 ** 0.5 * torch.cartesian_prod(*2 * [torch.tensor([-1.0, 0.0, 1.0])])      # Gauss-Hermite, for a normal z:
W = torch.tensor([1, 4, 1, 4, 16, 4, 1, 4, 1]) / 36                             # E[f(z)] = sum_k W[k] f(Z[k])


def expected_reward(theta):
    """J = E[r] without samples, from the last step back to the first. Its gradient by autograd is the true one.

    V_T = r,  V_i(x) = E[r | x[i] = x] = integral of N(x'; mu_i(x), sigma_i^2) V_{i+1}(x') dx',  J = E[V_0(x[0])]
    """
    x = GRID
    for i in (T - 2, T - 1):        # their noise is narrower than the mesh, and nine points are enough
        x = ddim_step(x[:, None], eps(theta, x, i)[:, None], STEPS, i, noise=Z)[0].flatten(0, 1)
    V = reward(x).view(-1, 9, 9) @ W @ W
    for i in reversed(range(T - 2)):
        mu, _ = ddim_step(GRID, eps(theta, GRID, i), STEPS, i, noise=torch.zeros(2))
        N = [H * torch.distributions.Normal(mu[:, [d]], STEPS.sigma[i]).log_prob(AXIS).exp() for d in range(2)]
        V = ((N[0] @ V.view(len(AXIS), -1)) * N[1]).sum(1)      # the density in the plane is a product
    return (H ** 2 * torch.distributions.Normal(0.0, 1.0).log_prob(GRID).sum(1).exp() * V).sum()


def draw(clouds, rewards, table):
    """toy2d.png. clouds: {epoch: trajectories}; rewards: sampled and exact; table: (COUNTS, REPEATS, kind, column)."""
    blue, orange, turn = "#0072B2", "#D55E00", torch.linspace(0, 2 * torch.pi, 60)
    circles = CENTRES[..., None] + 2 * SPREADS[:, None, None] * torch.stack([turn.cos(), turn.sin()])
    figure = Figure(figsize=(14, 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    planes, (course, angles, lengths) = top.subplots(1, 4), bottom.subplots(1, 3)
    for axes, title in zip(planes, [*(f"samples, epoch {e}" for e in SHOWN), "trajectories, same noise"]):
        axes.plot(*circles.permute(1, 2, 0), color="0.5", linewidth=0.8, label=["data (two std)", *"____"])
        axes.plot(*STAR, "*", markersize=15, color="#F0E442", markeredgecolor="black", zorder=3)
        axes.set(title=title, xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=(-2, 0, 2), yticks=(-2, 0, 2), aspect="equal")
    for axes, x in zip(planes, clouds.values()):
        axes.hist2d(*x[-1].T, bins=130, range=[[-2.6, 2.6]] * 2, cmap="Blues", vmax=CLOUD / 1000)
        axes.plot(*x[-1, :150].T, ".", markersize=2, color="black")
    for epoch, color in ((SHOWN[0], blue), (SHOWN[-1], orange)):
        planes[3].plot(*clouds[epoch][:, :5].permute(2, 0, 1), color=color, linewidth=0.8)
        planes[3].plot(*clouds[epoch][-1, :5].T, "o", color=color, label=f"epoch {epoch}")
    course.plot([sampled for sampled, _ in rewards], ".", color="0.5", label=f"mean of {SAMPLES} samples")
    course.plot([exact for _, exact in rewards], color=blue, label="exact")
    n = torch.logspace(1.8, 5.2, 50)
    for kind, (color, label) in enumerate(((orange, "A = r"), (blue, "A = (r - mean) / std"))):
        c = (torch.tensor(COUNTS) * (table[:, :, kind, 2] ** 2).mean(1)).mean().sqrt()      # error = c / sqrt(n)
        for column, plot, curve in ((0, angles.loglog, (c / n.sqrt()).atan().rad2deg()),
                                    (1, lengths.semilogx, (1 + c ** 2 / n).sqrt())):
            plot(COUNTS, table[:, :, kind, column], "o", markersize=4, alpha=0.5, color=color)
            plot(n, curve, "--", linewidth=1, color=color, label=f"{label}: c = {c:.0f}")
    course.set(title="reward: minus the distance to the star", xlabel="epoch")
    angles.set(title="angle to the true gradient", yticks=(3, 10, 30, 90), yticklabels=("3°", "10°", "30°", "90°"),
               xlabel="samples n     (dashed: arctan(c / √n))")
    lengths.set(title="length / length of the true gradient", xlabel="samples n     (dashed: √(1 + c² / n))")
    for axes in (planes[3], course, angles, lengths):
        axes.legend(frameon=False)
    figure.savefig("toy2d.png", dpi=110)


def main():
    generator = torch.Generator().manual_seed(SEED)
    theta = pretrain(generator)
    clouds, rewards, table = {}, [], []

    J = expected_reward(theta)
    truth = gradient(theta, [J])
    x, log_p = sample(theta, CLOUD, generator)
    r = reward(x[-1])
    print(f"J = {J:.4f}; mean of {CLOUD} samples {r.mean():.4f} +- {r.std() / CLOUD ** 0.5:.4f}")
    by_sf, by_is = (gradient(theta, losses(theta, x, log_p, r, sf)) for sf in (True, False))
    print(f"gradients of DDPO_SF and DDPO_IS: largest difference {(by_sf - by_is).abs().max():.1g}")
    for n in COUNTS:
        g = torch.stack([estimates(theta, n, generator) for _ in tqdm(range(REPEATS), desc=f"n = {n}", leave=False)])
        angle = torch.cosine_similarity(g, truth, dim=2).acos().rad2deg()
        table.append(torch.stack([angle, g.norm(dim=2) / truth.norm(), (g - truth).norm(dim=2) / truth.norm()], 2))
        for name, row in zip(("A = r", "A = (r - mean) / std"), table[-1].mean(0)):
            print("{:6} samples, {:20}: angle {:4.1f} degrees, length {:.3f}, error {:.3f}".format(n, name, *row))

    optimizer = torch.optim.Adam(theta, lr=LR)
    for epoch in tqdm(range(EPOCHS + 1), desc="DDPO", leave=False):
        if epoch in SHOWN:
            clouds[epoch] = sample(theta, CLOUD, torch.Generator().manual_seed(SEED))[0]
        x, log_p = sample(theta, SAMPLES, generator)
        r = reward(x[-1])
        rewards.append((r.mean().item(), expected_reward(theta).item()))
        if epoch % 4 == 0:
            tqdm.write("epoch {:2}: mean of the samples {:.3f}, exactly {:.3f}".format(epoch, *rewards[-1]))
        A = torch.from_numpy(epoch_advantages(r.numpy()))
        for part in torch.randperm(SAMPLES, generator=generator).split(MINIBATCH):
            for loss in losses(theta, x[:, part], log_p[:, part], A[part]):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    draw(clouds, rewards, torch.stack(table))


if __name__ == "__main__":
    main()
