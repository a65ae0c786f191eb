"""Stable Diffusion's autoencoder: images (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/f, W/f), f = 2^(levels - 1).

    image -> encoder -> quant_conv -> mean, log-variance of a Gaussian -> z * latent_scale
    z / latent_scale -> post_quant_conv -> decoder -> image

Modules have the names of the diffusers checkpoint; the residual block is the UNet's, without time and with eps 1e-6.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .device import visiting
from .files import NotFinite
from .layers import Attention, Downsample, GroupNorm, ResBlock, Upsample

DECODE_BATCH = 16       # pictures decoded together: more of them exceed the processor's cache and take longer
DECODE_PIXELS = 2 ** 14     # of latents decoded together, to save memory: 4 pictures at 512 pixels, 1 at 1024


@dataclass(frozen=True)
class VAEConfig:
    """The sizes of an autoencoder; the defaults are Stable Diffusion 1.x's."""
    widths: tuple = (128, 256, 512, 512)    # channels of each level, from the image on
    layers: int = 2                         # residual blocks of an encoder level; a decoder level has one more
    latent_channels: int = 4
    groups: int = 32                        # groups of every GroupNorm
    latent_scale: float = 0.18215           # makes the latents' standard deviation about 1


class VAEAttention(Attention):
    """Single-head self-attention over the pixels, with a norm before it and biases: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width, groups):
        super().__init__(width, heads=1)
        self.group_norm = GroupNorm(groups, width, eps=1e-6)
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x):
        height, width = x.shape[-2:]
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        h = super().forward(h).transpose(1, 2).unflatten(2, (height, width))
        return x + h


class Level(nn.Module):
    """The residual blocks of one resolution and the layer that changes it (or none)."""

    def __init__(self, in_channels, width, layers, groups, downsample=False, upsample=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(in_channels if i == 0 else width, width, groups, eps=1e-6) for i in range(layers))
        self.downsamplers = nn.ModuleList([Downsample(width, asymmetric=True)]) if downsample else None
        self.upsamplers = nn.ModuleList([Upsample(width)]) if upsample else None

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        for resample in self.downsamplers or self.upsamplers or ():
            x = resample(x)
        return x


class MidBlock(nn.Module):
    """The lowest resolution: residual block, attention, residual block."""

    def __init__(self, width, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(width, width, groups, eps=1e-6) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(width, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> mean and log-variance (B, 8, H/f, W/f), before quant_conv."""

    def __init__(self, config):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers, config.groups, downsample=i < last)
            for i, width in enumerate(widths))
        self.mid_block = MidBlock(widths[-1], config.groups)
        self.conv_norm_out = GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image):
        x = self.conv_in(image)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latent (B, 4, H/f, W/f) -> image (B, 3, H, W)."""

    def __init__(self, config):
        super().__init__()
        widths = config.widths[::-1]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], config.groups)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers + 1, config.groups, upsample=i < last)
            for i, width in enumerate(widths))
        self.conv_norm_out = GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """The autoencoder between images and the latents that the UNet works on."""

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def moments(self, image):
        """Mean and log-variance of the unscaled latent's Gaussian.

        image: (B, 3, H, W) in [-1, 1]; returns two tensors (B, 4, H/f, W/f), the second clamped to [-30, 20].
        """
        mean, log_variance = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def encode(self, image, noise=None):
        """Image -> scaled latent: (mean + std * noise) * latent_scale, or mean * latent_scale without noise.

        image: (B, 3, H, W) in [-1, 1]; noise: None or (B, 4, H/f, W/f) standard normal. Returns (B, 4, H/f, W/f).
        """
        mean, log_variance = self.moments(image)
        z = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
        return z * self.config.latent_scale

    def decode(self, latent):
        """Scaled latent (B, 4, H/f, W/f) -> image (B, 3, H, W), about [-1, 1], not clamped; `latent` is unchanged."""
        return self.decoder(self.post_quant_conv(latent / self.config.latent_scale))


def to_uint8(images):
    """Images (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3) on the CPU, clamped and rounded. Raises NotFinite."""
    if not torch.isfinite(images).all():
        raise NotFinite("the decoded pictures")
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def decode_images(vae, latents):
    """Scaled latents (N, 4, h, w) -> images uint8 (N, H, W, 3), on the latents' device, some at a time.

    Raises NotFinite if the autoencoder overflows.
    """
    dtype = vae.post_quant_conv.weight.dtype
    parts = latents.split(max(1, min(DECODE_BATCH, DECODE_PIXELS // latents.shape[-2:].numel())))
    with visiting(vae, latents.device):
        return np.concatenate([to_uint8(vae.decode(part.to(dtype))) for part in parts])
