"""The latent UNet of Stable Diffusion: eps(x_t, t, context), by hand.

    x_t (B, 4, H, W) -> conv_in -> down_blocks -> mid_block -> up_blocks -> conv_out -> eps (B, 4, H, W)

Each level holds residual blocks, which see the time t, and transformers, which see the prompt by cross-attention.
Every down block's outputs are kept and handed, last first, to the up blocks (the skip connections of a U-Net).
Modules and parameters carry the names of the diffusers checkpoint, so a state dict loads strictly and without a table.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of a UNet; the defaults are Stable Diffusion 1.x's."""
    in_channels: int = 4
    out_channels: int = 4
    widths: tuple = (320, 640, 1280, 1280)          # channels of each level
    attention: tuple = (True, True, True, False)    # levels that hold transformers (the middle always does)
    layers: int = 2                                 # residual blocks a level going down; one more going up
    context_width: int = 768                        # width of the text encoder's output
    heads: int = 8                                  # attention heads, on every level
    groups: int = 32                                # of every GroupNorm
    head_width: int = 0                             # channels of a head instead, 64 in 2.x; 0: heads says how many
    linear: bool = False                            # transformers begin and end with a linear layer, as in 2.x

    def heads_at(self, width):
        """Attention heads of a level with so many channels."""
        return width // self.head_width if self.head_width else self.heads


def timestep_embedding(t, width):
    """Sinusoidal features of the timestep, cosines first.

    cos(t f_i), sin(t f_i) with f_i = 10000^(-i / (width/2))   [DDPM, after Transformer Sec. 3.5]
    t: (B,) timesteps 0..999; returns (B, width), float32 like the checkpoints were trained with.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Two linear layers that turn the sinusoids into the vector every residual block reads."""

    def __init__(self, width, out_width):
        super().__init__()
        self.linear_1 = nn.Linear(width, out_width)
        self.linear_2 = nn.Linear(out_width, out_width)

    def forward(self, features):
        return self.linear_2(F.silu(self.linear_1(features)))


def not_16_bit_on_cpu(x):
    """x, in float32 if it is in 16 bits and on a CPU, where torch's attention and group norms are slow in 16."""
    return x.float() if x.device.type == "cpu" and x.itemsize == 2 else x


class GroupNorm(nn.GroupNorm):
    """Each group of channels to mean 0 and deviation 1, then weight and bias."""

    def forward(self, x):
        y = not_16_bit_on_cpu(x)
        return F.group_norm(y, self.num_groups, self.weight.to(y.dtype), self.bias.to(y.dtype), self.eps).to(x.dtype)


class ResBlock(nn.Module):
    """norm, SiLU, conv, (+ time), norm, SiLU, conv, + input: (B, in, H, W) -> (B, out, H, W).

    eps is 1e-5 in the UNet and 1e-6 in the VAE, which has no time (time_width None).
    """

    def __init__(self, in_channels, out_channels, groups, time_width=None, eps=1e-5):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_width is not None:
            self.time_emb_proj = nn.Linear(time_width, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x, time=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) on context (B, M, D), or on x itself: softmax(q k / sqrt(C/heads)) v."""

    def __init__(self, width, heads, context_width=None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width or width, width, bias=False)
        self.to_v = nn.Linear(context_width or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (self._split(y) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        q, k, v = (not_16_bit_on_cpu(y) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).to(x.dtype)           # (B, heads, N, C/heads)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def _split(self, y):
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """A linear layer whose one half gates the other: (B, N, C) -> (B, N, inner)."""

    def __init__(self, width, inner):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Four times wider and back: (B, N, C) -> (B, N, C)."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward, each after a norm and around a residual."""

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
    """A transformer block over the pixels of a feature map, read as a sequence: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width, config):
        super().__init__()
        self.linear = config.linear
        self.norm = GroupNorm(config.groups, width, eps=1e-6)      # 1e-6 here, 1e-5 in the residual blocks
        self.proj_in = nn.Linear(width, width) if config.linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([
            TransformerBlock(width, config.heads_at(width), config.context_width)])
        self.proj_out = nn.Linear(width, width) if config.linear else nn.Conv2d(width, width, 1)

    def forward(self, x, context):
        height, width = x.shape[-2:]
        h = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2).contiguous()                   # (B, H*W, C); no copy of channels_last
        h = self.proj_in(h) if self.linear else h
        h = self.transformer_blocks[0](h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, (height, width))
        return x + (h if self.linear else self.proj_out(h))


class Downsample(nn.Module):
    """Half the side by a strided convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the side by repeating each pixel, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One level of the UNet: its residual blocks, its transformers if it has any, and what changes the resolution."""

    def __init__(self, in_widths, width, config, attention, downsample=False, upsample=False):
        super().__init__()
        time_width = 4 * config.widths[0]
        self.resnets = nn.ModuleList(ResBlock(i, width, config.groups, time_width) for i in in_widths)
        if attention:
            self.attentions = nn.ModuleList(SpatialTransformer(width, config) for _ in in_widths)
        else:
            self.attentions = None
        self.downsamplers = nn.ModuleList([Downsample(width)]) if downsample else None
        self.upsamplers = nn.ModuleList([Upsample(width)]) if upsample else None

    def block(self, i, x, time, context):
        """Residual block i and the transformer behind it."""
        x = self.resnets[i](x, time)
        return x if self.attentions is None else self.attentions[i](x, context)


class MidBlock(nn.Module):
    """The bottom: residual block, transformer, residual block."""

    def __init__(self, width, config):
        super().__init__()
        time_width = 4 * config.widths[0]
        self.resnets = nn.ModuleList(ResBlock(width, width, config.groups, time_width) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(width, config)])

    def forward(self, x, time, context):
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, time)


class UNet(nn.Module):
    """The noise predictor eps(x_t, t, context)."""

    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        self.checkpointing = False      # True: keep no activations inside blocks, compute them again going back
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])

        skips, below = [widths[0]], widths[0]     # channels of every kept output, in order; of the running x
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            in_widths = [below] + [width] * (config.layers - 1)
            self.down_blocks.append(Level(in_widths, width, config, config.attention[i], downsample=i < last))
            skips += [width] * (config.layers + (i < last))
            below = width

        self.mid_block = MidBlock(below, config)

        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            in_widths = []
            for _ in range(config.layers + 1):
                in_widths.append(below + skips.pop())
                below = width
            self.up_blocks.append(Level(in_widths, width, config, config.attention[i], upsample=i > 0))

        self.conv_norm_out = GroupNorm(config.groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def run(self, block, *inputs):
        """block(*inputs); with checkpointing only the inputs are kept for the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)    # nothing is random
        return block(*inputs)

    def forward(self, x_t, t, context):
        """Predict the noise in x_t.

        x_t: (B, 4, H, W) latents, H and W divisible by 2^(levels - 1); t: (B,) timesteps 0..999;
        context: (B, tokens, context_width) from the text encoder. Returns eps, of x_t's shape and dtype.
        """
        time = self.time_embedding(timestep_embedding(t, self.config.widths[0]).to(x_t.dtype))
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
                x = level.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
