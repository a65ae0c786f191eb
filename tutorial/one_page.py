"""DDPO on one page: the shipped model learns to draw pictures that make small JPEG files.

    python tutorial/one_page.py     two minutes on a laptop; prints the mean JPEG size, writes one_page.png

Only the networks come from elsewhere. Everything else is here, with the symbols of the paper (arXiv 2305.13301).
train.py does the same with a LoRA, options, checkpoints and any reward.
"""
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ddpo_min.prompts import find_prompts
from ddpo_min.vae import decode_images
from ddpo_min.weights import load_stable_diffusion

T = 8               # denoising steps of a picture
SAMPLES = 180       # pictures an epoch, four of each animal
MINIBATCH = 60
EPOCHS = 5
CLIP = 1e-2
PROMPTS = find_prompts("animals")      # a cat, a dog, ...
# How much each step's loss counts. The last but one answers to the network seven times as strongly as the others.
EMPHASIS = [0.92, 1.06, 1.16, 1.21, 1.17, 0.97, 0.14, 1.37]

# The noise schedule of Stable Diffusion, and the timesteps at which we look at the network.
# x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise
beta = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
alpha_bar = torch.cumprod(1 - beta, dim=0)
timesteps = [1 + (T - 1 - i) * (1000 // T) for i in range(T)]      # 876, 751, ..., 126, 1: the noisiest first


def step(unet, x_t, i, context):
    """One denoising step as a policy: the action x_prev is drawn from N(mu, sigma^2). Returns mu, sigma."""
    t = timesteps[i]
    a, a_prev = alpha_bar[t], alpha_bar[max(t - 1000 // T, 0)]
    eps = unet(x_t, torch.full((len(x_t),), t), context)            # the noise that the network sees in x_t
    x0_hat = (x_t - (1 - a).sqrt() * eps) / a.sqrt()                # ... and the picture behind it
    sigma = ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    return a_prev.sqrt() * x0_hat + (1 - a_prev - sigma ** 2).sqrt() * eps, sigma


def log_prob(x_prev, mu, sigma):
    """log N(x_prev; mu, sigma^2), without its constant, averaged over the numbers of a latent."""
    return (-(x_prev - mu) ** 2 / (2 * sigma ** 2)).mean((1, 2, 3))


@torch.no_grad()
def sample(unet, context, generator):
    """Draw pictures: their latents, from noise on (T + 1 tensors), and each step's log-probability (T tensors)."""
    x, log_p = [torch.randn(len(context), 4, 16, 16, generator=generator)], []
    for i in range(T):
        mu, sigma = step(unet, x[i], i, context)
        x.append(mu + sigma * torch.randn(mu.shape, generator=generator))
        log_p.append(log_prob(x[i + 1], mu, sigma))
    return x, log_p


def reward(images):
    """Minus the size of the picture as a JPEG file, in kB: any function of a picture would do."""
    sizes = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    return -torch.tensor(sizes)


def advantages(rewards):
    """How much better than the other pictures of its prompt: the four of a prompt stand side by side."""
    groups = rewards.view(len(PROMPTS), -1)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten()


def loss_of(unet, x_t, x_prev, i, context, A, log_p_old):
    """What is made small at step i, for a minibatch."""
    mu, sigma = step(unet, x_t, i, context)
    log_p = log_prob(x_prev, mu, sigma)
    # REINFORCE: make the steps of good pictures (A > 0) more likely, those of bad ones less. It would be
    #     return -(A * log_p).mean()
    # but then samples can be used only once. The ratio of the new probability to the old one corrects for use after
    # the weights have moved, and is cut where it has moved far enough:
    ratio = torch.exp(log_p - log_p_old)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return torch.maximum(-A * ratio, -A * clipped).mean()


def main():
    generator = torch.Generator().manual_seed(0)
    model = load_stable_diffusion()
    unet, context = model.unet, model.encode_prompts(PROMPTS)
    trained = [p for name, p in unet.named_parameters() if ".attn" in name]     # the attention layers alone
    for p in trained:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=3e-4)

    everyone = context.repeat_interleave(SAMPLES // len(PROMPTS), dim=0)
    rows = []
    for epoch in range(EPOCHS + 1):
        x, log_p_old, images = [], [], []
        for part in tqdm(everyone.split(MINIBATCH), desc=f"epoch {epoch} sampling", leave=False):
            path, log_p = sample(unet, part, generator)
            x.append(torch.stack(path))
            log_p_old.append(torch.stack(log_p))
            images.append(decode_images(model.vae, path[-1]))
        x, log_p_old, images = torch.cat(x, 1), torch.cat(log_p_old, 1), np.concatenate(images)
        rewards = reward(images)
        A = advantages(rewards)
        rows.append(np.concatenate(list(images[::SAMPLES // 10]), axis=1))
        print(f"epoch {epoch}: mean JPEG size {-rewards.mean():.3f} kB")
        if epoch == EPOCHS:
            break
        for minibatch in tqdm(torch.randperm(SAMPLES, generator=generator).split(MINIBATCH), desc="training",
                              leave=False):
            for i in range(T):
                loss = loss_of(unet, x[i, minibatch], x[i + 1, minibatch], i, everyone[minibatch], A[minibatch],
                               log_p_old[i, minibatch])
                (EMPHASIS[i] * loss / T).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    Image.fromarray(np.concatenate(rows)).save("one_page.png")
    print("one_page.png: a row for each epoch")


if __name__ == "__main__":
    main()
