"""Low-rank adaptation: train W + scale * B A instead of W, with A (rank, in) and B (out, rank)    [LoRA Eq. 3]."""
import json
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .files import InputError, make_folder, shown
from .interchange import lora_modules, read_lora, write_lora
from .weights import load_stable_diffusion, save_single_file

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")      # the attention projections, by the end of their names


class LoRALayer:
    """A frozen layer plus a trainable low-rank one; B starts at zero, so at first the output does not change.

    y = W x + b + (alpha / rank) B A x    [LoRA Eq. 3]
    The frozen weight keeps its name; the new ones are lora_A.weight (rank, in) and lora_B.weight (out, rank). They are
    stored and trained in float32 and cast to the network's dtype in the forward pass.
    train() and eval() merge nothing: only merge() does.
    """

    def adapt(self, frozen, A, B, alpha):
        """Use a layer's weights as the frozen ones; A and B: layers on the meta device, in -> rank and rank -> out."""
        self.weight, self.bias = frozen.weight, frozen.bias
        self.lora_A, self.lora_B = (layer.to_empty(device=frozen.weight.device) for layer in (A, B))
        rank = len(A.weight)
        # drawn on the CPU, so that a seed gives the same values on every device
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

    def delta(self):
        """scale B A, in the shape of the frozen weight; also of a convolution, because its B is 1x1."""
        return self.scale * (self.lora_B.weight.flatten(1) @ self.lora_A.weight.flatten(1)).view_as(self.weight)

    @torch.no_grad()
    def merge(self):
        """W <- W + scale B A, added in float32 or wider and rounded once; forward() then skips the low-rank path."""
        if not self.merged:
            exact = self.weight.float() if self.weight.itemsize < 4 else self.weight    # torch cannot add float8
            self.weight.copy_(exact + self.delta())
            self.merged = True


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer with a LoRA."""

    def __init__(self, linear, rank, alpha):
        sizes = linear.in_features, linear.out_features
        super().__init__(*sizes, linear.bias is not None, device="meta")
        self.adapt(linear, nn.Linear(sizes[0], rank, bias=False, device="meta"),
                   nn.Linear(rank, sizes[1], bias=False, device="meta"), alpha)

    def low_rank(self, x, A, B):
        return F.linear(self.scale * F.linear(x, A), B)     # scaled where it has only `rank` channels


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """A convolution with a LoRA: A is a convolution with the same kernel size to `rank` channels, B is 1x1."""

    def __init__(self, conv, rank, alpha):
        kernel = dict(kernel_size=conv.kernel_size, stride=conv.stride, padding=conv.padding)
        super().__init__(conv.in_channels, conv.out_channels, **kernel, bias=conv.bias is not None, device="meta")
        self.adapt(conv, nn.Conv2d(conv.in_channels, rank, **kernel, bias=False, device="meta"),
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

    rank: of every layer; alpha: scale * rank, None: the rank (scale 1). Returns {name: LoRALinear}.
    """
    unet.requires_grad_(False)
    return {name: replace(unet, name, rank, rank if alpha is None else alpha) for name in lora_modules(unet)
            if name.endswith(TARGETS) and (".attn1." in name or ".attn2." in name)}


@contextmanager
def switched_off(layers):
    """Context manager: LoRA layers {name: layer} have scale 0, so their network is the base model."""
    scales = [layer.scale for layer in layers.values()]
    for layer in layers.values():
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers.values(), scales, strict=True):
            layer.scale = scale


def lora_state(layers):
    """The trainable tensors under the names that diffusers and PEFT read: unet.NAME.lora_A.weight, ...lora_B.weight."""
    return {f"unet.{name}.{part}.weight": getattr(layer, part).weight
            for name, layer in layers.items() for part in ("lora_A", "lora_B")}


def save_lora(path, layers, **details):
    """Write the LoRA as diffusers and PEFT read it; its metadata has ranks, alphas and `details` (JSON values)."""
    tensors = {name: tuple(part.weight.detach().cpu() for part in (layer.lora_A, layer.lora_B))
               for name, layer in layers.items()}
    write_lora(path, "diffusers", {name: (A, B, float(layers[name].alpha)) for name, (A, B) in tensors.items()},
               {"ddpo_min": json.dumps(details)})


def load_lora(path, unet, scale=1.0, base=""):
    """Put one saved LoRA on a UNet, see load_loras(); its layers of the text encoder are left out."""
    return load_loras([(path, scale)], unet, base=base)


def load_loras(files, *networks, base=""):
    """Put the sum of saved LoRAs of any programs (see read_lora) on networks; returns {name: LoRA layer}.

    files: [(path, strength)], of which strength multiplies the LoRA's effect, 0 is off; networks: a UNet, or a UNet and
    a text encoder, which are changed: the layers in the files get a LoRA, the other layers are frozen; base: their
    model's base_name(), with which a line is printed for each LoRA that was trained on another one. Raises InputError
    if a file has no layer of these networks, or if a shape does not fit.
    """
    owners = {name: network for network in networks for name in lora_modules(network)}
    found = {}
    for path, strength in files:
        loaded, metadata = read_lora(path, owners)
        for name, (A, B, alpha) in loaded.items():
            weight = owners[name].get_submodule(name).weight.flatten(1)     # (rank, in) and (rank, in, 1, 1) are equal
            for tensor, shape in ((A, (len(A), weight.shape[1])), (B, (weight.shape[0], len(A)))):
                if tensor.flatten(1).shape != shape:
                    raise InputError(f"{path}: a tensor of {name} has shape {tuple(tensor.shape)}, this model needs "
                                     f"{shape}; use the base model that the LoRA was trained on")
            found.setdefault(name, []).append((A, B, alpha * strength))
        details = json.loads(metadata.get("ddpo_min", "{}"))
        if base and details.get("base_name", base) != base:
            print(f"{path}: trained on another base model ({shown(details.get('base', 'unknown'))}), so what it "
                  "learned may not show here, or spoil the pictures")
    layers = {}
    for network in networks:
        network.requires_grad_(False)
    for name, network in owners.items():    # in the networks' order, not the file's: the optimizer's state goes by it
        if name in found:
            A, B, alpha = add_up(found[name])
            layer = layers[name] = replace(network, name, len(A), alpha)
            for own, tensor in ((layer.lora_A.weight, A), (layer.lora_B.weight, B)):
                own.data.copy_(tensor.view_as(own))
    return layers


def add_up(parts):
    """One LoRA of a layer with the effect of several: [(A, B, alpha)] -> (A, B, alpha), its rank the sum of theirs.

    s1 B1 A1 + s2 B2 A2 + ... = [s1 B1, s2 B2, ...] [A1; A2; ...] with s = alpha / rank. One alone stays as it is.
    """
    if len(parts) == 1:
        return parts[0]
    A = torch.cat([A.float().flatten(1) for A, _, _ in parts])
    B = torch.cat([alpha / len(A) * B.float().flatten(1) for A, B, alpha in parts], dim=1)
    return A, B, float(len(A))


def merge_loras(files, weights, out, prediction=""):
    """Write a complete model, `weights` plus LoRAs ([(path, strength)]), in Stable Diffusion's single-file layout.

    Every tensor keeps the dtype it has in `weights`; sums are computed in float32 or wider and rounded once. Raises
    InputError if that dtype cannot hold a sum.
    """
    model = load_stable_diffusion(weights, "cpu", None, prediction)
    for name, layer in load_loras(files, model.unet, model.text_encoder, base=model.base).items():
        dtype = layer.weight.dtype      # some dtypes saturate silently, so look at the sum before it is rounded
        if not (layer.weight.float() + layer.delta()).abs().max() <= torch.finfo(dtype).max:
            raise InputError(f"{out}: not written, because {name} plus the LoRA has numbers that are too large for "
                             f"{str(dtype).removeprefix('torch.')}; take a smaller strength (--scale)")
        layer.merge()
        del layer.lora_A, layer.lora_B      # so that only the base model's names are left
    make_folder(Path(out).parent)
    save_single_file(out, model.unet, model.vae, model.text_encoder, None, model.image_size, model.prediction,
                     base=Path(weights).name, lora=[f"{Path(path).name}={strength:g}" for path, strength in files])
