"""Low-rank adaptation: train W + scale * B A instead of W, with A (rank, in) and B (out, rank)    [LoRA Eq. 3]."""
import json
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from .files import InputError, atomic
from .weights import open_safetensors

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")      # the attention projections, by the end of their names


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a trainable low-rank one; B starts at zero, so nothing changes at first.

    y = W x + b + (alpha / rank) B A x    [LoRA Eq. 3]
    The frozen weight keeps its name; the new ones are lora_A.weight (rank, in) and lora_B.weight (out, rank), kept and
    optimised in float32, computed with in the network's dtype.
    Nothing is merged by train() or eval(): merge() and unmerge() are called by name or not at all.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        where = linear.weight.device
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, device="meta").to_empty(device=where)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, device="meta").to_empty(device=where)
        # drawn on the CPU: the same seed gives the same start on every device
        self.lora_A.weight.data.copy_(torch.randn(rank, linear.in_features) / rank)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = alpha / rank
        self.merged = False

    def forward(self, x):
        y = super().forward(x)
        if self.merged or self.scale == 0:
            return y
        low = self.scale * F.linear(x, self.lora_A.weight.to(x.dtype))      # scaled where it is narrow
        return y + F.linear(low, self.lora_B.weight.to(x.dtype))

    @torch.no_grad()
    def merge(self):
        """W <- W + scale B A; the low-rank path is then skipped."""
        if not self.merged:
            self.weight += self.scale * (self.lora_B.weight @ self.lora_A.weight).to(self.weight.dtype)
            self.merged = True

    @torch.no_grad()
    def unmerge(self):
        """Undo merge()."""
        if self.merged:
            self.weight -= self.scale * (self.lora_B.weight @ self.lora_A.weight).to(self.weight.dtype)
            self.merged = False


def add_lora(unet, rank=4, alpha=None):
    """Freeze the network and put a LoRALinear in place of every attention projection; changes `unet`.

    rank: of every layer; alpha: numerator of the scale, the rank if None (scale 1). Returns {name: LoRALinear}.
    """
    unet.requires_grad_(False)
    layers = {}
    for name, module in list(unet.named_modules()):
        if type(module) is nn.Linear and name.endswith(TARGETS) and (".attn1." in name or ".attn2." in name):
            layers[name] = LoRALinear(module, rank, rank if alpha is None else alpha)
            owner, _, leaf = name.rpartition(".")
            setattr(unet.get_submodule(owner), leaf, layers[name])
    return layers


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


def save_lora(path, layers, **metadata):
    """Write the LoRA to a safetensors file, with rank, alpha and whatever else is given as its metadata."""
    first = next(iter(layers.values()))
    rank = first.lora_A.out_features
    metadata = dict(rank=rank, alpha=first.scale * rank, **metadata)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in lora_state(layers).items()}
    with atomic(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", "ddpo_min": json.dumps(metadata)})


def load_lora(path, unet, scale=1.0):
    """Put a saved LoRA on a network, strictly by name; changes `unet`, returns {name: LoRALinear}.

    scale: multiplies its effect, 0 is off. Raises InputError if a name or a shape does not fit.
    """
    file = open_safetensors(path)
    state = {name: file.get_tensor(name) for name in file.keys()}
    metadata = json.loads((file.metadata() or {}).get("ddpo_min", "{}"))
    ranks = {tensor.shape[0] for name, tensor in state.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1:
        raise InputError(f"{path}: found no LoRA of ours (names like unet....lora_A.weight, one rank); "
                         "expected the lora.safetensors of a run")
    rank = ranks.pop()
    layers = add_lora(unet, rank, metadata.get("alpha", rank))
    own = lora_state(layers)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise InputError(f"{path}: {len(missing)} tensors missing, {len(unexpected)} unexpected for this model; "
                         f"the first is {(missing + unexpected)[0]}; use the base model it was trained on")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise InputError(f"{path}: {name} has shape {tuple(state[name].shape)}, this model needs "
                             f"{tuple(tensor.shape)}; use the base model it was trained on")
        tensor.data.copy_(state[name])
    for layer in layers.values():
        layer.scale *= scale
    return layers
