"""CLIP's text encoder as Stable Diffusion uses it: token ids (B, 77) -> one vector for each token (B, 77, width).

The UNet's cross-attention reads every token after the final LayerNorm, padding included. 1.x uses OpenAI's CLIP, 2.x
OpenCLIP's without its last layer. XL uses one of each, without last layer and LayerNorm, and a pooled text besides.
Modules have the names of the transformers checkpoint.
"""
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from .files import InputError, shown
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
    norm: bool = True       # the output goes through the final LayerNorm (not in XL)
    projection: int = 0     # width of the pooled text (XL's second encoder); 0: none

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
    """The layers, of which the first `used` are run: Stable Diffusion 2.x and XL leave out the last."""

    def __init__(self, config):
        super().__init__()
        self.used = config.used
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, x, rest=False):
        """x (B, N, C) through the layers that are used, or through the rest of them."""
        for layer in self.layers[self.used:] if rest else self.layers[:self.used]:
            x = layer(x)
        return x


class TextModel(nn.Module):
    """Embeddings, layers, final LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.norm = config.norm
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, token_ids):
        x = self.encoder(self.embeddings(token_ids))
        return self.final_layer_norm(x) if self.norm else x


class TextEncoder(nn.Module):
    """CLIP's text encoder; in the checkpoint its names begin with `text_model.`"""

    def __init__(self, config=TextConfig()):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        if config.projection:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    @property
    def encoders(self):
        """One or two: this one alone."""
        return self,

    def forward(self, token_ids):
        """token_ids: int64 (B, N), N up to 77; returns (B, N, width), the context of the UNet."""
        return self.text_model(token_ids)

    def pooled(self, context, token_ids):
        """XL's pooled text: the end mark after all layers and the final LayerNorm, projected.

        context: forward(token_ids), (B, N, width); returns (B, projection).
        """
        end = (token_ids == END_OF_TEXT).int().argmax(dim=1)        # the first
        x = self.text_model.encoder(context, rest=True)[torch.arange(len(end), device=end.device), end]
        return self.text_projection(self.text_model.final_layer_norm(x))

    def tokens(self, prompts):
        """Prompts (list of B str) -> their token ids on its device. Raises InputError if it is not for CLIP's."""
        if self.config.vocabulary <= END_OF_TEXT:
            raise InputError(f"the model's text encoder knows {self.config.vocabulary} tokens; expected CLIP's 49408")
        device = self.text_model.final_layer_norm.weight.device
        return tokenize(prompts, self.config.positions, self.config.padding).to(device)

    def encode(self, prompts):
        """Prompts (list of B str) -> the context of the UNet, (B, 77, width)."""
        return self(self.tokens(prompts))


class TextEncoders(nn.Module):
    """XL's two text encoders, OpenAI's CLIP and OpenCLIP's, under their names in a diffusers folder."""

    def __init__(self, first, second):
        super().__init__()
        self.config = first.config
        self.text_encoder, self.text_encoder_2 = first, second

    @property
    def encoders(self):
        """Both."""
        return self.text_encoder, self.text_encoder_2

    @property
    def text_model(self):
        """The first one's."""
        return self.text_encoder.text_model

    def encode(self, prompts):
        """Prompts (list of B str) -> the context of the UNet, (B, 78, width), in one tensor with the pooled text.

        A row has both encoders' vectors of a token side by side; the last has the second's pooled text, then zeros. All
        is zero for an empty prompt, as XL was trained.
        """
        ids = self.text_encoder_2.tokens(prompts)
        second = self.text_encoder_2(ids)
        tokens = torch.cat([self.text_encoder.encode(prompts), second], dim=2)
        pooled = self.text_encoder_2.pooled(second, ids)
        pooled = F.pad(pooled, (0, tokens.shape[2] - pooled.shape[1]))
        empty = torch.tensor([prompt == "" for prompt in prompts], device=ids.device)
        return torch.cat([tokens, pooled[:, None]], dim=1).masked_fill(empty[:, None, None], 0)
