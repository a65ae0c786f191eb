"""Low-rank adaptation: train W + scale * B A instead of W, with A (rank, in) and B (out, rank)    [LoRA Eq. 3]."""
import json
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .files import InputError
from .interchange import lora_modules, read_lora, write_lora
from .weights import load_stable_diffusion, save_single_file

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")      # the attention projections, by the end of their names


class LoRALayer:
    """What a frozen layer and a trainable low-rank one beside it do; B starts at zero, so nothing changes at first.

    y = W x + b + (alpha / rank) B A x    [LoRA Eq. 3]
    The frozen weight keeps its name; the new ones are lora_A.weight (rank, in) and lora_B.weight (out, rank), kept and
    optimised in float32, computed with in the network's dtype.
    Nothing is merged by train() or eval(): merge() and unmerge() are called by name or not at all.
    """

    def adapt(self, frozen, A, B, alpha):
        """Take over a layer's weights; A and B are layers on the meta device, in -> rank and rank -> out."""
        self.weight, self.bias = frozen.weight, frozen.bias
        self.lora_A, self.lora_B = (layer.to_empty(device=frozen.weight.device) for layer in (A, B))
        rank = len(A.weight)
        # drawn on the CPU: the same seed gives the same start on every device
        self.lora_A.weight.data.copy_(torch.randn(A.weight.shape) / rank)
        nn.init.zeros_(self.lora_B.weight)
        self.alpha = alpha
        self.scale = alpha / rank
        self.merged = False

    def forward(self, x):
        y = super().forward(x)
        if self.merged or self.scale == 0:
            return y
        return y + self.low_rank(x, self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype))

    def change(self):
        """scale B A, in the shape of the frozen weight: a convolution's B is 1x1, so it is the same product."""
        return self.scale * (self.lora_B.weight.flatten(1) @ self.lora_A.weight.flatten(1)).view_as(self.weight)

    @torch.no_grad()
    def merge(self):
        """W <- W + scale B A, added in float32 at least and rounded once; the low-rank path is then skipped."""
        if not self.merged:
            self.weight.copy_(self.weight + self.change())
            self.merged = True

    @torch.no_grad()
    def unmerge(self):
        """Undo merge(), up to rounding."""
        if self.merged:
            self.weight.copy_(self.weight - self.change())
            self.merged = False


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer with a LoRA."""

    def __init__(self, linear, rank, alpha):
        sizes = linear.in_features, linear.out_features
        super().__init__(*sizes, linear.bias is not None, device="meta")
        self.adapt(linear, nn.Linear(sizes[0], rank, bias=False, device="meta"),
                   nn.Linear(rank, sizes[1], bias=False, device="meta"), alpha)

    def low_rank(self, x, A, B):
        return F.linear(self.scale * F.linear(x, A), B)     # scaled where it is narrow


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """A convolution with a LoRA: A is a convolution of the same kernel to `rank` channels, B is 1x1."""

    def __init__(self, conv, rank, alpha):
        window = dict(kernel_size=conv.kernel_size, stride=conv.stride, padding=conv.padding)
        super().__init__(conv.in_channels, conv.out_channels, **window, bias=conv.bias is not None, device="meta")
        self.adapt(conv, nn.Conv2d(conv.in_channels, rank, **window, bias=False, device="meta"),
                   nn.Conv2d(rank, conv.out_channels, 1, bias=False, device="meta"), alpha)

    def low_rank(self, x, A, B):
        return F.conv2d(self.scale * F.conv2d(x, A, stride=self.stride, padding=self.padding), B)


def replace(unet, name, rank, alpha):
    """Put a LoRA layer in place of the linear layer or convolution `name`; changes `unet`, returns the new layer."""
    module = unet.get_submodule(name)
    layer = (LoRAConv2d if isinstance(module, nn.Conv2d) else LoRALinear)(module, rank, alpha)
    owner, _, leaf = name.rpartition(".")
    setattr(unet.get_submodule(owner), leaf, layer)
    return layer


def add_lora(unet, rank=4, alpha=None):
    """Freeze the network and put a LoRALinear in place of every attention projection; changes `unet`.

    rank: of every layer; alpha: numerator of the scale, the rank if None (scale 1). Returns {name: LoRALinear}.
    """
    unet.requires_grad_(False)
    return {name: replace(unet, name, rank, rank if alpha is None else alpha) for name in lora_modules(unet)
            if name.endswith(TARGETS) and (".attn1." in name or ".attn2." in name)}


@contextmanager
def switched_off(layers):
    """Within the block the layers of add_lora() compute what they did before it: the base model."""
    scales = [layer.scale for layer in layers.values()]
    for layer in layers.values():
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers.values(), scales):
            layer.scale = scale


def lora_state(layers):
    """The trainable tensors under the names that diffusers and PEFT read: unet.NAME.lora_A.weight, ...lora_B.weight."""
    return {f"unet.{name}.{part}.weight": getattr(layer, part).weight
            for name, layer in layers.items() for part in ("lora_A", "lora_B")}


def save_lora(path, layers, **story):
    """Write the LoRA as diffusers and PEFT read it, with ranks, alphas and whatever else is given as its metadata."""
    tensors = {name: tuple(part.weight.detach().cpu() for part in (layer.lora_A, layer.lora_B))
               for name, layer in layers.items()}
    write_lora(path, "diffusers", {name: (A, B, float(layers[name].alpha)) for name, (A, B) in tensors.items()},
               {"ddpo_min": json.dumps(story)})


def load_lora(path, unet, scale=1.0):
    """Put a saved LoRA on a network, ours or anybody's (see read_lora); changes `unet`, returns {name: LoRA layer}.

    Only what the file has gets a LoRA, each layer of its own rank; the rest is frozen. scale: multiplies its effect,
    0 is off. Raises InputError if nothing of it is for this network, or if a shape does not fit.
    """
    modules = lora_modules(unet)
    found, _ = read_lora(path, modules)
    unet.requires_grad_(False)
    layers = {}
    for name in modules:        # in the network's order, whatever the file's: the optimiser counts its parameters
        if name not in found:
            continue
        A, B, alpha = found[name]
        layer = layers[name] = replace(unet, name, len(A), alpha)
        for own, tensor in ((layer.lora_A.weight, A), (layer.lora_B.weight, B)):
            if own.flatten(1).shape != tensor.flatten(1).shape:        # (rank, in) and (rank, in, 1, 1) are one
                raise InputError(f"{path}: a tensor of {name} has shape {tuple(tensor.shape)}, this model needs "
                                 f"{tuple(own.shape)}; use the base model it was trained on")
            own.data.copy_(tensor.view_as(own))
        layer.scale *= scale
    return layers


def merge_lora(path, weights, out, scale=1.0):
    """Write a complete model, `weights` with the LoRA added, in Stable Diffusion's single-file layout.

    Every tensor keeps the dtype it has in `weights`; the sums are taken in float32 at least and rounded once.
    """
    model = load_stable_diffusion(weights, "cpu", None)
    for layer in load_lora(path, model.unet, scale).values():
        layer.merge()
        del layer.lora_A, layer.lora_B      # the base's names are left
    save_single_file(out, model.unet, model.vae, model.text_encoder, None, model.image_size,
                     base=Path(weights).name, lora=Path(path).name, scale=scale)
