"""CLIP's text encoder as Stable Diffusion uses it: token ids (B, 77) -> one vector for each token (B, 77, width).

There is no pooling: the UNet's cross-attention reads every token after the final LayerNorm, padding included. 1.x uses
OpenAI's CLIP, 2.x OpenCLIP's without its last layer. Modules have the names of the transformers checkpoint.
"""
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from .files import shown
from .layers import attention

END_OF_TEXT = 49407     # ends a prompt, and pads it in Stable Diffusion 1.x; OpenCLIP, and so 2.x, pads with 0


@dataclass(frozen=True)
class TextConfig:
    """The sizes of a text encoder; the defaults are those of OpenAI's CLIP ViT-L/14."""
    vocabulary: int = 49408
    positions: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    inner: int = 3072       # width of the MLP's hidden layer
    used: int = None        # layers that are run before the final LayerNorm; None: all
    openclip: bool = False  # OpenCLIP's exact GELU and padding instead of OpenAI's

    @property
    def padding(self):
        """The token id after the end of a prompt."""
        return 0 if self.openclip else END_OF_TEXT


@cache
def _tokenizer(positions):
    from open_clip.tokenizer import SimpleTokenizer
    return SimpleTokenizer(context_length=positions)


def tokenize(prompts, positions=77, padding=END_OF_TEXT):
    """Prompts -> token ids as Stable Diffusion expects them: start, the words, end, then padding.

    prompts: list of B str, cut to `positions` tokens with start and end; returns int64 (B, positions).
    """
    ids = _tokenizer(positions)(list(prompts))
    end = (ids == END_OF_TEXT).int().argmax(dim=1, keepdim=True)
    return torch.where(torch.arange(positions)[None] > end, padding, ids)


def cut_prompts(prompts, positions=77):
    """A line about the prompts that tokenize() cuts, with the longest and how many tokens it loses; "" if none."""
    room = positions - 2        # without start and end; a token is at least a byte, so most prompts need no counting
    lost = {prompt: len(_tokenizer(positions).encode(prompt)) - room for prompt in prompts
            if len(prompt.encode()) > room}
    if max(lost.values(), default=0) <= 0:
        return ""
    longest, others = max(lost, key=lost.get), sum(n > 0 for n in lost.values()) - 1
    return (f'warning: the prompt "{shown(longest)}" loses its last {lost[longest]} token{"s" * (lost[longest] > 1)}, '
            f"because the model reads {room}" + f" (also cut: {others} more)" * (others > 0))


class Embeddings(nn.Module):
    """Token embedding + position embedding: ids (B, N) -> (B, N, width)."""

    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)

    def forward(self, token_ids):
        return self.token_embedding(token_ids) + self.position_embedding.weight[:token_ids.shape[1]]


class CausalAttention(nn.Module):
    """Multi-head self-attention of each token to itself and those before it: (B, N, C) -> (B, N, C)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class MLP(nn.Module):
    """Linear, GELU, linear; the GELU is exact (OpenCLIP) or the quick one, x sigmoid(1.702 x) (OpenAI)."""

    def __init__(self, width, inner, exact):
        super().__init__()
        self.exact = exact
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(F.gelu(h) if self.exact else h * torch.sigmoid(1.702 * h))


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = CausalAttention(config.width, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, config.inner, exact=config.openclip)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers, of which the first `used` are run: Stable Diffusion 2.x leaves out OpenCLIP's last."""

    def __init__(self, config):
        super().__init__()
        self.used = config.used
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, x):
        for layer in self.layers[:self.used]:
            x = layer(x)
        return x


class TextModel(nn.Module):
    """Embeddings, layers, final LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, token_ids):
        return self.final_layer_norm(self.encoder(self.embeddings(token_ids)))


class TextEncoder(nn.Module):
    """CLIP's text encoder without its projection; in the checkpoint its names begin with `text_model.`"""

    def __init__(self, config=TextConfig()):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)

    def forward(self, token_ids):
        """token_ids: int64 (B, N), N up to 77; returns (B, N, width), the context of the UNet."""
        return self.text_model(token_ids)
