"""Sampling pictures and keeping their trajectories: what the policy saw, what it did, and how likely that was."""
from dataclasses import dataclass

import numpy as np
import torch

from .vae import decode_images


@dataclass
class Trajectories:
    """An epoch's samples: T + 1 latents each, stored once; x_t of step i is [:, i], x_prev is [:, i + 1].

    Of several processes each has the rows of those that it has drawn.
    """
    latents: torch.Tensor       # (rows, T+1, 4, h, w), from pure noise x_T to x_0; or (rows, 1, 4, h, w), x_0 alone;
                                # float32 at least, on the CPU: 256 samples of Stable Diffusion are 0.86 GB
    log_p_old: torch.Tensor     # (rows, T), as training will see it; of x_0 or images alone, as sampled; nan: no noise
    contexts: torch.Tensor      # (P, 77, width): the embedding of each prompt, once
    context_index: torch.Tensor     # (N,) on the CPU: which of them is a sample's
    row: torch.Tensor           # (N,) on the CPU: the row of a sample; that of one drawn elsewhere has no meaning
    images: np.ndarray          # (rows, H, W, 3) uint8; none if they were not to be kept

    def context(self, samples):
        """The prompts' embeddings (B, 77, width) of the samples, a slice or (B,) indices."""
        return self.contexts[self.context_index[samples]]

    def x_0(self, samples):
        """Their finished latents, (B, 4, h, w)."""
        return self.latents[self.row[samples], -1].to(self.contexts.device)

    def at(self, samples, i):
        """What happened to these samples at denoising step i: (x_t, x_prev, log_p_old, context)."""
        rows = self.row[samples]
        x_t, x_prev = (self.latents[rows, k].to(self.contexts.device) for k in (i, i + 1))
        return x_t, x_prev, self.log_p_old[rows, i], self.context(samples)

    def noised(self, samples, t, seeds, alpha_bar):
        """Their finished latents, noised anew to timestep t[b] by the noise of seeds[b]: (x_t, t, eps, context).

        x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps    [DDPM Eq. 4]
        """
        x_0, t = self.x_0(samples), torch.as_tensor(t)
        eps = sample_noise(seeds, 0, x_0.shape[1:])[:, 0].to(x_0)
        alpha_bar_t = alpha_bar[t].to(x_0)[:, None, None, None]
        x_t = alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * eps
        return x_t, t.to(x_0.device), eps, self.context(samples)


def sample_noise(seeds, steps, shape):
    """All the noise of trajectories, each sample's from its own seed, drawn on the CPU whatever the device.

    seeds: list of B int; shape: (4, h, w). Returns float32 (B, steps + 1, 4, h, w): x_T, then one a step.
    """
    place = dict(dtype=torch.float32, device="cpu")         # not the defaults, which a reward may change meanwhile
    return torch.stack([torch.randn(steps + 1, *shape, generator=torch.Generator().manual_seed(int(seed)), **place)
                        for seed in seeds])


@torch.no_grad()
def sample_trajectories(policy, prompts, seeds, micro_batches, *, keep="path", on_images=None, samples_per_start=1):
    """Draw a picture for each prompt and keep how it came about.

    prompts: list of N str; seeds: list of N int; micro_batches: slices of 0 .. N - 1 in order, of what this process is
    to draw; keep: "path" (all latents), "x_0" (the last) or "images" (x_0 and the pictures); on_images: called with the
    pictures (uint8) and prompts of each micro-batch and the number of its first, as soon as they are drawn;
    samples_per_start: so many samples in a row have one x_T, that of the first of them.
    Returns Trajectories. Raises NotFinite if a network overflows.
    """
    model, T = policy.model, len(policy.steps)
    weight = model.unet.conv_in.weight
    place = dict(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    unique = sorted(set(prompts))
    contexts, which = model.encode_prompts(unique), torch.tensor([unique.index(prompt) for prompt in prompts])
    height, width = model.shape
    # Of nothing: a process may have no sample at all
    latents = [torch.empty(0, T + 1 if keep == "path" else 1, 4, height, width, dtype=place["dtype"])]
    log_p_old, images = [torch.empty(0, T, **place)], [np.empty((0, 0, 0, 3), np.uint8)]
    row, count = torch.zeros(len(prompts), dtype=torch.int64), 0
    starts = [seeds[n - n % samples_per_start] for n in range(len(seeds))]
    for samples in micro_batches:
        noise = sample_noise(seeds[samples], T, (4, height, width)).to(**place)
        if samples_per_start > 1:
            noise[:, :1] = sample_noise(starts[samples], 0, (4, height, width))
        path, log_probs = [noise[:, 0]], []             # x_T, then every x_prev
        for i in range(T):
            x_prev, log_p = policy.act(path[-1], i, contexts[which[samples]], noise[:, i + 1], keep == "path")
            path.append(x_prev)
            log_probs.append(log_p)
        latents.append(torch.stack(path if keep == "path" else path[-1:], dim=1).cpu())
        log_p_old.append(torch.stack(log_probs, dim=1))
        row[samples] = torch.arange(count, count + len(noise))
        count += len(noise)
        drawn = decode_images(model.vae, path[-1])
        if keep == "images":
            images.append(drawn)
        if on_images is not None:
            on_images(drawn, prompts[samples], samples.start)
    images = np.concatenate(images[1:] or images)
    return Trajectories(torch.cat(latents), torch.cat(log_p_old), contexts, which, row, images)
