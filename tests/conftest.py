"""Shared by all tests: the repository on the path, no network, and a tiny random model in a file."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")


def tiny_networks(seed=0):
    """A UNet, a VAE and a text encoder with two levels and random weights: 16 pixels, latents of 8 x 8."""
    from ddpo_min.text import TextConfig, TextEncoder
    from ddpo_min.unet import UNet, UNetConfig
    from ddpo_min.vae import VAE, VAEConfig
    torch.manual_seed(seed)
    unet = UNet(UNetConfig(widths=(16, 32), attention=(False, True), layers=1, context_width=16, heads=2, groups=8))
    vae = VAE(VAEConfig(widths=(8, 16), layers=1, groups=4))
    text = TextEncoder(TextConfig(width=16, layers=1, heads=2, inner=32))
    return unet, vae, text


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory):
    """The tiny model as a single file in Stable Diffusion's layout."""
    from ddpo_min.weights import save_single_file
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_single_file(path, *tiny_networks(), dtype=torch.float32, image_size=16)
    return path


def random_lora_policy(path, guidance, steps):
    """(a policy whose LoRA has random values, its parameters): for updates against gradients written by hand."""
    from ddpo_min.ddim import ddim_steps
    from ddpo_min.lora import add_lora
    from ddpo_min.rollout import Policy
    from ddpo_min.weights import load_stable_diffusion
    model = load_stable_diffusion(path)
    torch.manual_seed(0)
    layers = add_lora(model.unet, 2)
    parameters = [p for layer in layers.values() for p in (layer.lora_A.weight, layer.lora_B.weight)]
    for p in parameters:
        torch.nn.init.normal_(p, std=0.1)
    return Policy(model, ddim_steps(steps), guidance, layers), parameters


def randomise(network, seed=0):
    """Every parameter to a random value, norms included, so that none can be left out unnoticed; float64, frozen."""
    torch.manual_seed(seed)
    for name, p in network.double().requires_grad_(False).named_parameters():
        if p.ndim > 1:
            p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5)
        else:
            p.copy_(0.3 * torch.randn_like(p) + (1.0 if name.endswith("weight") else 0.0))
    return network.eval()


def their_unet(c, **more):
    """diffusers' UNet with the sizes of a UNetConfig, random."""
    from diffusers import UNet2DConditionModel
    return randomise(UNet2DConditionModel(
        in_channels=c.in_channels, out_channels=c.out_channels, block_out_channels=c.widths, layers_per_block=c.layers,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in c.attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in c.attention[::-1]],
        cross_attention_dim=c.context_width, norm_num_groups=c.groups, use_linear_projection=c.linear,
        attention_head_dim=[w // c.head_width for w in c.widths] if c.head_width else c.heads, **more))


def their_vae(c):
    """diffusers' autoencoder with the sizes of a VAEConfig, random."""
    from diffusers import AutoencoderKL
    n = len(c.widths)
    return randomise(AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=c.widths, layers_per_block=c.layers, latent_channels=c.latent_channels,
        norm_num_groups=c.groups, scaling_factor=c.latent_scale))


def their_text(c):
    """transformers' CLIP text encoder with the sizes of a TextConfig, random."""
    from transformers import CLIPTextConfig, CLIPTextModel
    return randomise(CLIPTextModel(CLIPTextConfig(
        vocab_size=c.vocabulary, hidden_size=c.width, intermediate_size=c.inner, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, max_position_embeddings=c.positions,
        hidden_act="gelu" if c.openclip else "quick_gelu",
        bos_token_id=0, eos_token_id=1, pad_token_id=1)))
