"""The blocks that several of the networks are made of."""
import torch.nn.functional as F
from torch import nn


def not_16_bit_on_cpu(x):
    """x in float32 if it is a 16-bit tensor on a CPU, where torch's attention and group norm are slow in 16 bits."""
    return x.float() if x.device.type == "cpu" and x.itemsize == 2 else x


class GroupNorm(nn.GroupNorm):
    """Normalise each group of channels to mean 0 and standard deviation 1, then apply weight and bias."""

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


def attention(q, k, v, heads, causal=False):
    """Multi-head attention: softmax(q k^T / sqrt(C / heads)) v, for each head    [Transformer Eq. 1].

    q: (B, N, C); k, v: (B, M, C); causal: each token attends to itself and those before it. Returns (B, N, C).
    """
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))     # (B, heads, N or M, C / heads)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention from x (B, N, C) to context (B, M, D), or to x itself without a context: (B, N, C)."""

    def __init__(self, width, heads, context_width=None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width or width, width, bias=False)
        self.to_v = nn.Linear(context_width or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (not_16_bit_on_cpu(y) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out[0](attention(q, k, v, self.heads).to(x.dtype))


class Downsample(nn.Module):
    """Half the side by a strided convolution; the VAE's (asymmetric) is padded on the right and below only."""

    def __init__(self, channels, asymmetric=False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Twice the side, or another size (H, W), by repeating each pixel, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        size = size or [2 * side for side in x.shape[-2:]]
        return self.conv(F.interpolate(x, size, mode="nearest"))
