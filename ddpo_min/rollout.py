"""Sampling pictures and remembering how: the policy, and the trajectories it leaves behind."""
from dataclasses import dataclass, field

import numpy as np
import torch

from .ddim import Steps, ddim_step, guide
from .files import NotFinite
from .lora import switched_off


DECODE_BATCH = 16       # pictures decoded together: more of them leave the processor's cache and take longer


@dataclass
class Policy:
    """The denoiser as a policy: rollout and training both go through `eps`, so their ratio starts at exactly 1."""
    model: object           # StableDiffusion
    steps: Steps
    guidance: float
    layers: dict = field(default_factory=dict)     # its LoRA, {name: LoRA layer}, if that is what is trained
    compiled: object = None     # torch.compile(model.unet), if wanted

    def predict(self, x, t, context):
        """The network's eps. Compiled, sampling runs the graph of training too: another one would round differently."""
        if self.compiled is None:
            return self.model.unet(x, t, context)
        with torch.enable_grad():       # of one order of memory, too: another one would be compiled again
            eps = self.compiled(x.contiguous(), t.contiguous(), context.contiguous())
        return eps if torch.is_grad_enabled() else eps.detach()

    def eps(self, x_t, t, context, empty):
        """Predicted noise, guided: both halves in one batch; one half if guidance is 1.

        x_t: (B, 4, h, w); t: an int for all, or (B,); context, empty: (B, 77, width). Returns float32 like x_t.
        """
        dtype = self.model.unet.conv_in.weight.dtype
        if isinstance(t, int):
            t = torch.full((len(x_t),), t, device=x_t.device)       # made there: a copy would wait for the GPU
        if self.guidance == 1:
            return self.predict(x_t.to(dtype), t, context.to(dtype)).float()
        both = self.predict(torch.cat([x_t, x_t]).to(dtype), torch.cat([t, t]), torch.cat([empty, context]).to(dtype))
        return guide(*both.float().chunk(2), self.guidance)

    @torch.no_grad()
    def base_eps(self, x_t, t, context, empty):
        """What the base model predicts: the same with the LoRA switched off, and so without an --init-lora."""
        with switched_off(self.layers):
            return self.eps(x_t, t, context, empty)

    def step(self, x_t, i, context, empty, noise=None, x_prev=None):
        """Step i: act (noise given) or score (x_prev given); returns (x_prev, log_prob (B,))."""
        return ddim_step(x_t, self.eps(x_t, self.steps.t[i], context, empty), self.steps, i, noise, x_prev)


@dataclass
class Trajectories:
    """What one epoch of sampling leaves: T + 1 latents a sample, stored once; x_t is [:, i], x_prev is [:, i + 1]."""
    prompts: list               # N str
    latents: torch.Tensor       # (N, T+1, 4, h, w) float32, from pure noise x_T to x_0; or x_0 alone, (N, 1, 4, h, w);
                                # on the CPU: 256 samples of Stable Diffusion are 0.86 GB
    log_p_old: torch.Tensor     # (N, T) float32, under the policy that sampled
    contexts: torch.Tensor      # (P, 77, width): the prompts' embeddings, each once; the last is the empty prompt's
    context_index: torch.Tensor  # (N,) on the CPU: which of them is a sample's
    images: np.ndarray          # (N, H, W, 3) uint8; none of them, N = 0, where only `finished` needed them

    def context(self, index):
        """(context, empty), each (B, 77, width), of the samples `index` (B,), on the CPU."""
        return self.contexts[self.context_index[index]], self.contexts[-1:].expand(len(index), -1, -1)


def sample_noise(seeds, steps, shape):
    """All the noise of trajectories, each sample's from its own seed, drawn on the CPU whatever the device.

    seeds: list of B int; shape: (4, h, w). Returns float32 (B, steps + 1, 4, h, w): x_T, then one a step.
    """
    return torch.stack([torch.randn(steps + 1, *shape, generator=torch.Generator().manual_seed(int(seed)))
                        for seed in seeds])


def groups(count, share, batch):
    """The samples 0..count-1 in groups that go through the network together: list of (start, stop).

    Every share of `share` samples is cut into groups of `batch`, the last of them smaller if need be. Sampling and
    training use the same groups, so that the first update's ratio is 1 to the last bit.
    """
    return [(b, min(b + batch, start + share, count)) for start in range(0, count, share)
            for b in range(start, min(start + share, count), batch)]


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3) on the CPU, clamped and ROUNDED. Raises NotFinite."""
    if not torch.isfinite(images).all():
        raise NotFinite("the decoded pictures")
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def decode(model, latents, batch):
    """Latents (N, 4, h, w) -> images uint8 (N, H, W, 3), `batch` at a time or DECODE_BATCH if that is fewer."""
    dtype = model.vae.post_quant_conv.weight.dtype
    parts = latents.split(min(batch, DECODE_BATCH))
    return np.concatenate([to_uint8(model.vae.decode(part.to(dtype))) for part in parts])


@torch.no_grad()
def sample_trajectories(policy, prompts, seeds, batch, latent_size, share=None, whole=True, finished=None):
    """Draw one picture for each prompt and keep the whole way there.

    prompts: list of N str; seeds: list of N int; batch, share: see groups(), one share if None; latent_size: side, or
    (h, w), of the latents; whole: False keeps of the latents only x_0; finished: called with every group of pictures
    and its prompts as soon as they are drawn, to score them meanwhile, and then the pictures are not kept: a round may
    be thousands of them. Returns Trajectories. Raises NotFinite if either network overflows.
    """
    model = policy.model
    device = model.unet.conv_in.weight.device
    height, width = (latent_size, latent_size) if isinstance(latent_size, int) else latent_size
    unique = sorted(set(prompts))
    contexts = model.encode_prompts([*unique, ""])
    which = torch.tensor([unique.index(prompt) for prompt in prompts])
    latents, log_probs, images = [], [], []
    for start, stop in groups(len(prompts), share or len(prompts), batch):
        part = slice(start, stop)
        context, empty = contexts[which[part]], contexts[-1:].expand(stop - start, -1, -1)
        noise = sample_noise(seeds[part], len(policy.steps), (4, height, width)).to(device)
        x_t = noise[:, 0]
        path, log_p = [x_t], []
        for i in range(len(policy.steps)):
            x_t, log_prob = policy.step(x_t, i, context, empty, noise=noise[:, i + 1])
            path.append(x_t)
            log_p.append(log_prob)
        latents.append(torch.stack(path if whole else path[-1:], dim=1).cpu())
        log_probs.append(torch.stack(log_p, dim=1))
        images.append(decode(model, x_t, batch))
        if finished is not None:
            finished(images.pop(), prompts[part])
    return Trajectories(list(prompts), torch.cat(latents), torch.cat(log_probs), contexts, which,
                        np.concatenate(images or [np.empty((0, 0, 0, 3), np.uint8)]))


@torch.no_grad()
def rescore(policy, trajectories, batch, share=None):
    """The log-probabilities of trajectories under another policy, in the groups they were drawn in: (N, T)."""
    count, log_probs = len(trajectories.prompts), []
    for start, stop in groups(count, share or count, batch):
        index = torch.arange(start, stop)
        context, empty = trajectories.context(index)
        latents = trajectories.latents[index].to(context.device)
        log_probs.append(torch.stack([policy.step(latents[:, i], i, context, empty, x_prev=latents[:, i + 1])[1]
                                      for i in range(len(policy.steps))], dim=1))
    return torch.cat(log_probs)
