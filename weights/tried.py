"""Ways to draw crisply in few steps, side by side under one budget: what the last stage of the recipe was chosen from.

    python weights/tried.py         an hour and a half on 2 CPU cores, after pretrain.py; prints the model card's table

Each way starts from the finished UNet and trains it for STEPS steps of 64 pictures, or the same number of pictures in
larger batches. Those that change the network start from nothing, so they are compared with one another. Every result is
kept in tried.json, beside what pretrain.py keeps, and what is there is not done again. 450 pictures are drawn as
train.py draws them.
"""
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import evaluate
import pretrain
import sharper
from ddpo_min.ddim import ddim_steps, guide
from ddpo_min.files import InputError, atomic, run_script
from ddpo_min.unet import UNet
from ddpo_min.weights import load_stable_diffusion

STEPS, BATCH, FROM_NOTHING = 400, 64, 2000
LR = 2e-4
GRID = torch.tensor(ddim_steps(8).t)


def denoising(network, x_t, t, context, eps, weight=1.0):
    """The ordinary loss, each picture with a weight."""
    return (weight * ((sharper.predict(network, x_t, t, context) - eps) ** 2).mean((1, 2, 3))).mean()


def plain(pictures, teacher, network, step, generator, count=BATCH):
    """Uniform t, as in the stage before."""
    x_0, eps, context = pictures.draw(count, generator)
    t = torch.randint(1000, (count,), generator=generator)
    return denoising(network, pictures.noised(x_0, eps, t), t, context, eps)


def min_snr(pictures, teacher, network, step, generator):
    """w_t = min(SNR_t, 5) / SNR_t, SNR_t = alpha_bar_t / (1 - alpha_bar_t)    [Hang et al. 2023, Sec. 3.4, for eps]."""
    x_0, eps, context = pictures.draw(BATCH, generator)
    t = torch.randint(1000, (BATCH,), generator=generator)
    snr = pictures.alpha_bar[t] / (1 - pictures.alpha_bar[t])
    return denoising(network, pictures.noised(x_0, eps, t), t, context, eps, snr.clamp(max=5) / snr)


def on_the_grid(pictures, teacher, network, step, generator):
    """Half of the timesteps are those that eight steps visit."""
    x_0, eps, context = pictures.draw(BATCH, generator)
    t = torch.randint(1000, (BATCH,), generator=generator)
    t[::2] = GRID[torch.randint(len(GRID), (BATCH // 2,), generator=generator)]
    return denoising(network, pictures.noised(x_0, eps, t), t, context, eps)


def guided(pictures, teacher, network, step, generator, between=(0, 999)):
    """eps_u + 2 (eps_c - eps_u) of the finished network, where t is `between`    [Meng et al. 2023, Eq. 2]."""
    x_0, noise, context = pictures.draw(BATCH, generator)
    t = torch.randint(1000, (BATCH,), generator=generator)
    x_t, nothing = pictures.noised(x_0, noise, t), pictures.contexts[-1:].expand(BATCH, -1, -1)
    with torch.no_grad():
        with_caption, without = (sharper.predict(teacher, x_t, t, c) for c in (context, nothing))
    inside = ((between[0] <= t) & (t <= between[1]) & (context != nothing).any(-1).any(-1))[:, None, None, None]
    return denoising(network, x_t, t, context, torch.where(inside, guide(without, with_caption, 2.0), with_caption))


class Ahead:
    """sharper.py's loss, with other numbers than its own."""

    def __init__(self, **numbers):
        self.numbers, self.walks = numbers, None

    def __call__(self, pictures, teacher, network, step, generator):
        for name, value in self.numbers.items():
            setattr(sharper, name, value)
        self.walks = self.walks or sharper.Walks(pictures, teacher, 0)
        x_t, t, eps, context, weight = self.walks.minibatch(step, generator)
        return denoising(network, x_t, t, context, eps, weight)


OWN = dict(AHEAD=sharper.AHEAD, GUIDANCE=sharper.GUIDANCE, GUIDED=sharper.GUIDED)
# {way: (loss, steps)}
FINE_TUNED = {
    "the same loss": (plain, STEPS),
    "the same loss, 256 pictures a step": (partial(plain, count=4 * BATCH), STEPS // 4),
    "min-SNR weights": (min_snr, STEPS),
    "half of t on the sampler's grid": (on_the_grid, STEPS),
    "guidance 2 built in": (guided, STEPS),
    "guidance 2 built in, t from 200 to 750": (partial(guided, between=(200, 750)), STEPS),
    "125 timesteps ahead, guidance 2": (Ahead(**{**OWN, "AHEAD": 5}), STEPS),
    "250 ahead, no guidance": (Ahead(**{**OWN, "GUIDED": (2000, 2000)}), STEPS),
    "250 ahead, guidance 2 (the recipe's loss)": (Ahead(**OWN), STEPS),
    "250 ahead, guidance 3": (Ahead(**{**OWN, "GUIDANCE": 3.0}), STEPS),
    "500 ahead, guidance 2": (Ahead(**{**OWN, "AHEAD": 20}), STEPS),
}
NETWORKS = {
    "from nothing: the recipe's network": pretrain.UNET,
    "from nothing: attention on the highest level, too": replace(pretrain.UNET, attention=(True, True, True)),
    "from nothing: 64 instead of 48 channels there": replace(pretrain.UNET, widths=(64, 96, 176)),
}


def train(args, pictures, teacher, name, make, loss, steps, learning_rate):
    """A way's UNet, from what make() gives: its moving average, as in the recipe."""
    def loss_of(network, step, generator):
        value = loss(pictures, teacher, network, step, generator)
        return value, value.item()
    return pretrain.fit(f"tried {name}", make(), loss_of, args, steps, learning_rate, ema=0.99, dtype=torch.bfloat16,
                        warm_up=steps // 10)


def fresh(config):
    """A new UNet."""
    torch.manual_seed(0)
    return UNet(config).to(memory_format=torch.channels_last)


def measure(model, unet, classifiers, num=10, eta=1.0):
    """What is drawn in 8 steps without guidance: shares recognised in percent, kB, its deviation, contrast."""
    model.unet = unet.float().eval()
    images, animals = evaluate.draw(model, num, 8, 1.0, eta)
    size = evaluate.kilobytes(images)
    return dict(recognised=[100 * evaluate.recognised(network, images, animals).mean()
                            for network in classifiers.values()],
                kilobytes=size.mean(), deviation=evaluate.within_prompt_std(size, animals),
                contrast=evaluate.contrast(images))


def row(name, found):
    """A line of the card's table."""
    return (f"| {name} | {found['recognised'][0]:.1f}%, {found['recognised'][1]:.1f}% | {found['kilobytes']:.2f}, "
            f"{found['deviation']:.2f} | {found['contrast']:.1f} |")


def main(work=pretrain.HERE / "work", weights=pretrain.HERE / "emoji.safetensors"):
    args = SimpleNamespace(work=Path(work), device="cpu", seed=0, stop_at=None)
    for file in ("latents.pt", "unet.pt"):
        if not (args.work / file).is_file():
            raise InputError(f"{args.work / file}: not there; python weights/pretrain.py leaves it, run that first")
    path, pictures = args.work / "tried.json", pretrain.Pictures(args)
    done = json.loads(path.read_text()) if path.exists() else {}
    model, classifiers = load_stable_diffusion(weights), evaluate.load_classifiers()
    saved = torch.load(args.work / "unet.pt", weights_only=True)

    def finished(part="average"):
        unet = UNet(pretrain.UNET).to(memory_format=torch.channels_last)
        unet.load_state_dict(saved[part])
        return unet.eval()

    def note(name, make, **how):
        if name not in done:
            done[name] = measure(model, make(), classifiers, **how)
            with atomic(path) as temporary:
                temporary.write_text(json.dumps(done, indent=1, default=float) + "\n")
        print(row(name, done[name]), flush=True)

    note("the finished UNet", finished)
    note("its weights without the average", partial(finished, "modules"))
    note("eta 0.3, less noise", finished, eta=0.3)
    teacher = finished().to(torch.bfloat16).requires_grad_(False)
    train_it = partial(train, args, pictures, teacher)
    for name, (loss, steps) in FINE_TUNED.items():
        note(name, partial(train_it, name, finished, loss, steps, LR))
    for name, config in NETWORKS.items():
        note(name, partial(train_it, name, partial(fresh, config), plain, FROM_NOTHING, 1e-3))


if __name__ == "__main__":
    run_script(main, __doc__)
