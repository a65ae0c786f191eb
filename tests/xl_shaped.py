"""The shipped model in Stable Diffusion XL's structure, to train something of that shape that can draw.

    python tests/xl_shaped.py xl_shaped.safetensors
    python train.py --weights xl_shaped.safetensors --preset laptop --reward jpeg

It draws what the shipped model draws, nearly: linear projections in place of 1x1 convolutions, another scale of the
latents, and two text encoders, whose layers before the last give the context without a last LayerNorm. So the first
has one more layer that is used, which does the LayerNorm's work, and the second, else all zero, gives its bias. The
added embedding of the pooled text and of the size adds nothing at first; it can be trained.
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ddpo_min.text import TextConfig, TextEncoder, TextEncoders
from ddpo_min.unet import UNet
from ddpo_min.vae import VAE
from ddpo_min.weights import SHIPPED, load_stable_diffusion, save_single_file

XL_SCALE, SECOND, POOLED = 0.13025, 16, 8       # the latents' scale, the second text encoder's widths
SPREAD, GAIN = 2.0, 4.0     # deviation of a token's hidden state x; what of LayerNorm(x) is added to it


def xl_text_encoders(own):
    """The first encoder's last used layer adds GAIN LayerNorm(x) to x; the second's output is (1, 0, 0, ...)."""
    c = own.config
    first = TextEncoder(replace(c, layers=c.layers + 2, used=c.layers + 1, norm=False))
    second = TextEncoder(TextConfig(width=SECOND, layers=2, heads=2, inner=SECOND, used=1, openclip=True, norm=False,
                                    projection=POOLED))
    for p in (*first.parameters(), *second.parameters()):
        p.zero_()
    first.load_state_dict(own.state_dict(), strict=False)
    model = first.text_model
    norm, mlp = model.encoder.layers[c.layers].layer_norm2, model.encoder.layers[c.layers].mlp
    norm.weight.fill_(1)
    unit = torch.eye(c.width)
    mlp.fc1.weight[:2 * c.width] = torch.cat([unit, -unit])      # quick GELU: z s(az) - (-z) s(-az) = z
    mlp.fc2.weight[:, :2 * c.width] = GAIN * torch.cat([unit, -unit], dim=1)
    second.text_model.embeddings.position_embedding.weight[:, 0] = 1
    return TextEncoders(first, second)


def xl_unet(own, norm, pixels):
    """The UNet, whose cross-attention now takes LayerNorm(x), about, from x + GAIN LayerNorm(x).

    x = spread LayerNorm(x) + mean, without the LayerNorm's weight and bias, and the spread is nearly the same for all.
    """
    c = own.config
    centred = (torch.eye(c.context_width) - 1 / c.context_width) / (SPREAD + GAIN)
    depths = tuple(int(depth) for depth in c.attention)
    unet = UNet(replace(c, attention=depths, linear=True, pooled=POOLED, pixels=pixels,
                        context_width=c.context_width + SECOND))
    state = unet.state_dict()
    for name, tensor in own.state_dict().items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            bias = torch.zeros(len(tensor), SECOND)
            bias[:, 0] = tensor @ norm.bias
            tensor = torch.cat([tensor * norm.weight @ centred, bias], dim=1)
        elif name.endswith(("proj_in.weight", "proj_out.weight")):
            tensor = tensor[:, :, 0, 0]
        state[name] = tensor
    for name in ("weight", "bias"):
        state[f"add_embedding.linear_2.{name}"] = torch.zeros_like(state[f"add_embedding.linear_2.{name}"])
    unet.load_state_dict(state)
    return unet


def xl_vae(own):
    """The autoencoder with XL's scale of the latents."""
    vae, scale = VAE(replace(own.config, latent_scale=XL_SCALE)), own.config.latent_scale / XL_SCALE
    vae.load_state_dict(own.state_dict())
    c = vae.quant_conv.weight.shape[0] // 2
    vae.quant_conv.weight[:c] *= scale
    vae.quant_conv.bias[:c] *= scale
    vae.quant_conv.bias[c:] += 2 * torch.tensor(scale).log()
    vae.post_quant_conv.weight /= scale
    return vae


@torch.no_grad()
def xl_shaped(model):
    """A StableDiffusion of 1.x's structure as one of XL's: (UNet, VAE, TextEncoders)."""
    unet = xl_unet(model.unet, model.text_encoder.text_model.final_layer_norm, model.image_size // model.latent_size)
    return unet, xl_vae(model.vae), xl_text_encoders(model.text_encoder)


if __name__ == "__main__":
    shipped = load_stable_diffusion(SHIPPED)
    save_single_file(sys.argv[1], *xl_shaped(shipped), dtype=torch.float32, image_size=shipped.image_size)
