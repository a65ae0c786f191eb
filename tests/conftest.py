"""Shared by all tests: the repository on the path, no network, and a tiny random model in a file."""
import os
import sys
from pathlib import Path

# Before torch is imported: one thread a process, as pyproject.toml has two processes test at once.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", OMP_NUM_THREADS="1")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.fsync = lambda descriptor: None      # waiting for disks takes long, and no test needs to survive a power cut


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


def noise_through(unet):
    """Make a UNet's output about equal to its input, by a path from the first convolution to the last block."""
    last, layers, at = f"up_blocks.{len(unet.config.widths) - 1}", unet.config.layers, torch.arange(4)
    block = f"{last}.resnets.{layers}"
    for name, p in unet.named_parameters():
        if name.startswith(("conv_in", "conv_out", f"{block}.conv", f"{last}.attentions.{layers}.proj_out")):
            p.zero_()
    unet.conv_in.weight[at, at, 1, 1] = unet.conv_out.weight[at, at, 1, 1] = 1
    unet.get_parameter(f"{block}.conv_shortcut.weight")[at, unet.config.widths[0] + at, 0, 0] = 1
    unet.conv_norm_out.weight.fill_(0.1)
    unet.conv_norm_out.bias.fill_(3)        # where SiLU is nearly linear
    return unet


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory):
    """The tiny model as a single file in Stable Diffusion's layout."""
    from ddpo_min.weights import save_single_file
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_single_file(path, *tiny_networks(), dtype=torch.float32, image_size=16)
    return path


@pytest.fixture(scope="session")
def one_level(tmp_path_factory):
    """The same with a UNet of one level, which has half of the operations: where the network is not what is tested."""
    from ddpo_min.unet import UNet, UNetConfig
    from ddpo_min.weights import save_single_file
    _, vae, text = tiny_networks()
    unet = UNet(UNetConfig(widths=(16,), attention=(True,), layers=1, context_width=16, heads=2, groups=8))
    path = tmp_path_factory.mktemp("weights") / "one_level.safetensors"
    save_single_file(path, unet, vae, text, dtype=torch.float32, image_size=16)
    return path


@pytest.fixture(scope="module")
def plain_curve():
    """curve.png is a line of text, for runs of which it is not looked at: to draw it takes half as long as an epoch.

    Gives the function in whose place this is. test_algorithms.py, test_own_rewards.py, test_siblings.py and
    test_sums.py draw the real one.
    """
    from ddpo_min import figures
    from ddpo_min.files import atomic

    def save_curve(path, history, title):
        with atomic(path) as temporary:
            temporary.write_text(title)

    with pytest.MonkeyPatch.context() as patch:
        real = figures.save_curve
        patch.setattr(figures, "save_curve", save_curve)
        yield real


def random_lora_policy(path, guidance, steps, dtype=torch.float32):
    """(a policy whose LoRA has random values, its parameters): for updates against gradients written by hand."""
    from ddpo_min.ddim import ddim_steps
    from ddpo_min.lora import add_lora
    from ddpo_min.policy import Policy
    from ddpo_min.weights import load_stable_diffusion
    model = load_stable_diffusion(path, dtype=dtype)
    torch.manual_seed(0)
    layers = add_lora(model.unet, 2)
    parameters = [p for layer in layers.values() for p in (layer.lora_A.weight, layer.lora_B.weight)]
    for p in parameters:
        torch.nn.init.normal_(p, std=0.1)
    return Policy(model, ddim_steps(steps), guidance, lora=layers), parameters


def plain_descent(parameters, lr=1.0, **more):
    """The optimizer of the updates with gradient descent in AdamW's place: at rate 1 the change is the gradient."""
    from ddpo_min.optimizer import Optimizer
    optimizer = Optimizer(parameters, lr=lr, grad_clip=1e9, **more)
    optimizer.rule = torch.optim.SGD(parameters, lr=lr)
    return optimizer


def cut(count, size, minibatch=None):
    """The samples 0 .. count - 1 in micro-batches of `size`, none of which crosses a minibatch."""
    from ddpo_min.plan import micro_batches
    minibatch = minibatch or count
    return [part for first in range(0, count, minibatch)
            for part in micro_batches(first, min(first + minibatch, count), size)]


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
    from diffusers_side import diffusers_unet
    return randomise(diffusers_unet(c, **more))


def their_vae(c):
    """diffusers' autoencoder with the sizes of a VAEConfig, random."""
    from diffusers_side import diffusers_vae
    return randomise(diffusers_vae(c))


def their_text(c):
    """transformers' CLIP text encoder with the sizes of a TextConfig, random."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    return randomise((CLIPTextModelWithProjection if c.projection else CLIPTextModel)(CLIPTextConfig(
        vocab_size=c.vocabulary, hidden_size=c.width, intermediate_size=c.inner, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, max_position_embeddings=c.positions,
        hidden_act="gelu" if c.openclip else "quick_gelu",
        bos_token_id=0, eos_token_id=49407 if c.projection else 1, pad_token_id=1, projection_dim=c.projection)))
