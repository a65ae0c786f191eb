"""The latent UNet of Stable Diffusion, which predicts the noise: eps(x_t, t, context).

    x_t (B, 4, H, W) -> conv_in -> down_blocks -> mid_block -> up_blocks -> conv_out -> eps (B, 4, H, W)

Each level has residual blocks, which read the timestep t, and transformers, which read the prompt by cross-attention.
The outputs of the down blocks are kept and concatenated, last first, to the inputs of the up blocks (skip connections).
Modules and parameters have the names of the diffusers checkpoint, so a state dict loads strictly, without renaming.
XL also reads a pooled text and the picture's size, which are added to the time.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .layers import Attention, Downsample, GroupNorm, ResBlock, Upsample

SIZE_FEATURES = 256     # sinusoidal features of each of XL's six size numbers


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of a UNet; the defaults are Stable Diffusion 1.x's."""
    in_channels: int = 4
    out_channels: int = 4
    widths: tuple = (320, 640, 1280, 1280)          # channels of each level
    attention: tuple = (1, 1, 1, 0)                 # transformer layers of each level; in XL (0, 2, 10)
    middle: int = 1                                 # transformer layers of the middle block
    layers: int = 2                                 # residual blocks of a down level; an up level has one more
    context_width: int = 768                        # width of the text encoder's output, or of both side by side (XL)
    heads: int = 8                                  # attention heads of every level
    groups: int = 32                                # groups of every GroupNorm
    head_width: int = 0                             # channels per head (64 in 2.x, XL) instead of `heads`; 0: `heads`
    linear: bool = False                            # proj_in and proj_out: linear (2.x, XL), not 1x1 convolutions
    pooled: int = 0                                 # width of the pooled text (XL), the context's last row; 0: none
    pixels: int = 8                                 # of the picture, a side, to one of the latents (XL's size numbers)

    def heads_at(self, width):
        """Number of attention heads of a level with `width` channels."""
        return width // self.head_width if self.head_width else self.heads


def timestep_embedding(t, width):
    """Sinusoidal features of the timestep, cosines first.

    cos(t f_i), sin(t f_i) with f_i = 10000^(-i / (width/2))   [DDPM, after Transformer Sec. 3.5]
    t: (B,) timesteps 0..999; returns (B, width) in float32, as when the checkpoints were trained.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Two linear layers: timestep_embedding() -> the time vector (B, out_width) that every residual block reads."""

    def __init__(self, width, out_width):
        super().__init__()
        self.linear_1 = nn.Linear(width, out_width)
        self.linear_2 = nn.Linear(out_width, out_width)

    def forward(self, features):
        return self.linear_2(F.silu(self.linear_1(features)))


class GEGLU(nn.Module):
    """value * GELU(gate), each one half of a linear layer's output: (B, N, C) -> (B, N, inner)."""

    def __init__(self, width, inner):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """An MLP with a hidden layer four times as wide: (B, N, C) -> (B, N, C)."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, MLP, each with a norm before it and a residual around it."""

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks on the sequence of a feature map's pixels: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width, config, layers):
        super().__init__()
        self.linear = config.linear
        self.norm = GroupNorm(config.groups, width, eps=1e-6)      # 1e-6 here, 1e-5 in the residual blocks
        self.proj_in = nn.Linear(width, width) if config.linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, config.heads_at(width), config.context_width) for _ in range(layers))
        self.proj_out = nn.Linear(width, width) if config.linear else nn.Conv2d(width, width, 1)

    def forward(self, x, context):
        height, width = x.shape[-2:]
        h = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2).contiguous()                   # (B, H*W, C); channels_last is not copied
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, (height, width))
        return x + (h if self.linear else self.proj_out(h))


class Level(nn.Module):
    """One level: residual blocks, transformers (or none), and the layer that changes the resolution (or none)."""

    def __init__(self, in_widths, width, config, attention, downsample=False, upsample=False):
        super().__init__()
        time_width = 4 * config.widths[0]
        self.resnets = nn.ModuleList(ResBlock(i, width, config.groups, time_width) for i in in_widths)
        if attention:
            self.attentions = nn.ModuleList(SpatialTransformer(width, config, attention) for _ in in_widths)
        else:
            self.attentions = None
        self.downsamplers = nn.ModuleList([Downsample(width)]) if downsample else None
        self.upsamplers = nn.ModuleList([Upsample(width)]) if upsample else None

    def block(self, i, x, time, context):
        """Residual block i and the transformer after it."""
        x = self.resnets[i](x, time)
        return x if self.attentions is None else self.attentions[i](x, context)


class MidBlock(nn.Module):
    """The lowest resolution: residual block, transformer, residual block."""

    def __init__(self, width, config):
        super().__init__()
        time_width = 4 * config.widths[0]
        self.resnets = nn.ModuleList(ResBlock(width, width, config.groups, time_width) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(width, config, config.middle)])

    def forward(self, x, time, context):
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, time)


class UNet(nn.Module):
    """The noise predictor eps(x_t, t, context)."""

    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        self.checkpointing = False      # True: the backward pass computes activations inside blocks again
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])
        if config.pooled:
            self.add_embedding = TimeEmbedding(config.pooled + 6 * SIZE_FEATURES, 4 * widths[0])

        skips, channels = [widths[0]], widths[0]      # channels of every skip connection, in order; of x
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            in_widths = [channels] + [width] * (config.layers - 1)
            self.down_blocks.append(Level(in_widths, width, config, config.attention[i], downsample=i < last))
            skips += [width] * (config.layers + (i < last))
            channels = width

        self.mid_block = MidBlock(channels, config)

        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            in_widths = []
            for _ in range(config.layers + 1):
                in_widths.append(channels + skips.pop())
                channels = width
            self.up_blocks.append(Level(in_widths, width, config, config.attention[i], upsample=i > 0))

        self.conv_norm_out = GroupNorm(config.groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def run(self, block, *inputs):
        """block(*inputs); with checkpointing only the inputs are kept for the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)    # nothing is random
        return block(*inputs)

    def sizes(self, x_t):
        """XL's size numbers of a picture that was neither scaled nor cropped: height, width, 0, 0, height, width.

        x_t: (B, 4, H, W); returns the features of the six, in pixels, (B, 6 * SIZE_FEATURES) float32.
        """
        height, width, zero = (timestep_embedding(
            torch.full((len(x_t),), self.config.pixels * side, device=x_t.device), SIZE_FEATURES)
            for side in (*x_t.shape[-2:], 0))
        return torch.cat([height, width, zero, zero, height, width], dim=1)

    def forward(self, x_t, t, context):
        """Predict the noise in x_t.

        x_t: (B, 4, H, W) latents of any H and W; t: (B,) timesteps 0..999; context: (B, tokens, context_width) from the
        text encoder, in XL with a last row that begins with the pooled text. Returns eps, with x_t's shape and dtype.
        """
        time = self.time_embedding(timestep_embedding(t, self.config.widths[0]).to(x_t.dtype))
        if self.config.pooled:
            context, pooled = context[:, :-1], context[:, -1, :self.config.pooled]
            time = time + self.add_embedding(torch.cat([pooled, self.sizes(x_t).to(x_t.dtype)], dim=1))
        x = self.conv_in(x_t)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = self.run(level.block, i, x, time, context)
                skips.append(x)
            if level.downsamplers is not None:
                x = level.downsamplers[0](x)
                skips.append(x)
        x = self.run(self.mid_block, x, time, context)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = self.run(level.block, i, torch.cat([x, skips.pop()], dim=1), time, context)
            if level.upsamplers is not None:
                x = level.upsamplers[0](x, skips[-1].shape[-2:])     # an odd side was rounded up when it was halved
        return self.conv_out(F.silu(self.conv_norm_out(x)))
