"""LoRA files: two sets of names for the same tensors, and what of somebody's file is for this network.

    diffusers, PEFT               unet.mid_block.attentions.0.proj_in.lora_A.weight           A (rank, in)
                                  unet.mid_block.attentions.0.proj_in.lora_B.weight           B (out, rank)
    kohya, AUTOMATIC1111,         lora_unet_mid_block_attentions_0_proj_in.lora_down.weight   A
    ComfyUI                       lora_unet_mid_block_attentions_0_proj_in.lora_up.weight     B
                                  lora_unet_mid_block_attentions_0_proj_in.alpha              alpha; the rank if missing

Between file and network a LoRA is {module name: (A, B, alpha)}; its layers may differ in rank and in alpha.
"""
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from .checkpoint import open_safetensors
from .files import InputError, atomic, first_line
from .unet import UNet, UNetConfig

FORMS = ("diffusers", "kohya")

# How the parts of a layer are called: today by diffusers and PEFT, by kohya, and by diffusers before PEFT
PARTS = {"lora_A.weight": "A", "lora_down.weight": "A", "lora.down.weight": "A",
         "lora_B.weight": "B", "lora_up.weight": "B", "lora.up.weight": "B", "alpha": "alpha"}

BASE_VERSIONS = {768: ("sd_v1", "False"), 1024: ("sd_v2", "True")}     # by the width of the text encoder's output


def kohya_name(module):
    """The name of a UNet's module in a kohya file: mid_block.resnets.0 -> lora_unet_mid_block_resnets_0."""
    return "lora_unet_" + module.replace(".", "_")


def diffusers_form(layers):
    """{name: tensor} as diffusers and PEFT call them, and the metadata where diffusers, from 0.34 on, finds alpha."""
    state = {f"unet.{name}.lora_{part}.weight": tensor
             for name, (A, B, _) in layers.items() for part, tensor in (("A", A), ("B", B))}
    ranks, alphas = ranks_and_alphas(layers)
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = dict(r=rank, lora_alpha=alpha, target_modules=list(layers),
                  rank_pattern={name: value for name, value in ranks.items() if value != rank},
                  alpha_pattern={name: value for name, value in alphas.items() if value != alpha})
    return state, {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}


def kohya_form(layers):
    """{name: tensor} as kohya, AUTOMATIC1111 and ComfyUI call them, and the metadata of kohya that is true of them."""
    state = {}
    for name, (A, B, alpha) in layers.items():
        state.update({kohya_name(name) + ".lora_down.weight": A, kohya_name(name) + ".lora_up.weight": B,
                      kohya_name(name) + ".alpha": exactly(alpha, A.dtype)})
    metadata = {"ss_network_module": "networks.lora"}
    for key, values in zip(("ss_network_dim", "ss_network_alpha"), ranks_and_alphas(layers)):
        value = one_or_all(values)
        metadata[key] = "Dynamic" if isinstance(value, list) else str(value)
    widths = {A.shape[1] for name, (A, _, _) in layers.items() if name.endswith("attn2.to_k")}
    for width in widths & BASE_VERSIONS.keys():
        metadata["ss_base_model_version"], metadata["ss_v2"] = BASE_VERSIONS[width]
    return state, metadata


def exactly(number, dtype):
    """The number as a tensor of that dtype, or of float32 if it would be rounded."""
    tensor = torch.tensor(number, dtype=dtype)
    return tensor if tensor.item() == number else torch.tensor(number)


def ranks_and_alphas(layers):
    """({name: rank}, {name: alpha})."""
    return ({name: A.shape[0] for name, (A, _, _) in layers.items()},
            {name: alpha for name, (_, _, alpha) in layers.items()})


def one_or_all(values):
    """The number that all of {name: number} share, or the list of those there are."""
    values = sorted(set(values.values()))
    return values[0] if len(values) == 1 else values


def write_lora(path, form, layers, metadata):
    """Write {module name: (A, B, alpha)} in one of FORMS, atomically.

    metadata: {name: str} to keep; its ddpo_min, JSON, gets the ranks and alphas.
    """
    state, of_form = diffusers_form(layers) if form == "diffusers" else kohya_form(layers)
    rank, alpha = (one_or_all(values) for values in ranks_and_alphas(layers))
    story = {**json.loads(metadata.get("ddpo_min", "{}")), "rank": rank, "alpha": alpha}
    metadata = {**metadata, **of_form, "format": "pt", "ddpo_min": json.dumps(story)}
    with atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata=metadata)


def split_name(name):
    """A tensor's name in a file of any form -> (its layer's name there, its part: a key of PARTS or something else)."""
    if name.startswith("lora_"):                # kohya's layers have no dots in their names
        layer, _, part = name.partition(".")
        return layer, part
    return re.fullmatch(r"(.+?)(?:[._](lora[._].+|alpha))?", name).groups()


def common_name(layer):
    """A layer's name in a file of any form -> its kohya name, in which all forms agree."""
    if layer.startswith("lora_"):
        return layer
    layer = layer.removeprefix("base_model.model.").removeprefix("unet.")   # the first: a folder that PEFT saved
    layer = layer.replace(".processor.", ".")       # attn1.processor.to_q: diffusers before PEFT
    return kohya_name(layer + ".0" if layer.endswith(".to_out") else layer)


def told_alpha(module, rank, config):
    """The alpha of a layer by PEFT's configuration; the rank (scale 1) if that says nothing."""
    patterns, usual, rslora = config
    fits = [alpha for pattern, alpha in patterns if pattern.match(module)]
    alpha = fits[0] if fits else float(rank) if usual is None else usual
    return alpha * rank ** 0.5 if rslora else alpha         # rslora: scale alpha / sqrt(rank)


def peft_config(path, metadata):
    """What PEFT's configuration says of alpha: ([(pattern of names, alpha)], the others' alpha or None, rslora or not).

    It stands in the metadata, or in adapter_config.json beside the adapter_model.safetensors. Raises ValueError,
    TypeError, AttributeError or re.error if it makes no sense.
    """
    beside = Path(path).with_name("adapter_config.json")
    text = metadata.get("lora_adapter_metadata", "{}")
    if Path(path).name == "adapter_model.safetensors" and beside.is_file():
        text = beside.read_text()
    config = {key.removeprefix("unet."): value for key, value in json.loads(text).items()}
    patterns = [(re.compile(rf"(.*\.)?({pattern})$"), float(alpha))
                for pattern, alpha in (config.get("alpha_pattern") or {}).items()]
    return patterns, float(config["lora_alpha"]) if "lora_alpha" in config else None, bool(config.get("use_rslora"))


def read_lora(path, modules):
    """Read a LoRA file of either form: ({module name: (A, B, alpha)}, its metadata).

    modules: names of the UNet's layers that can take one. Layers of none of them (the text encoder's) and layers that
    are more than A, B and alpha (DoRA, LoHa, ...) are left out, and one printed line says so. Raises InputError if no
    other is there, or if a layer's tensors do not belong together.
    """
    file = open_safetensors(path)
    metadata = dict(file.metadata() or {})
    try:
        config = peft_config(path, metadata)
        dict(json.loads(metadata.get("ddpo_min", "{}")).items())
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise InputError(f"{path}: its metadata cannot be understood ({first_line(error)}); get it again")
    metadata.pop("lora_adapter_metadata", None)
    found = {}
    for name in file.keys():
        layer, part = split_name(name)
        found.setdefault(layer, {})[PARTS.get(part, part)] = name
    known, layers, left_out = {kohya_name(module): module for module in modules}, {}, []
    for layer, parts in found.items():
        module = known.get(common_name(layer))
        if module is None or not parts.keys() <= {"A", "B", "alpha"}:
            left_out.append(layer)
            continue
        if not {"A", "B"} <= parts.keys():
            raise InputError(f"{path}: {layer} has only {', '.join(parts.values())} of its two halves; "
                             "the file is damaged, get it again")
        A, B = file.get_tensor(parts["A"]), file.get_tensor(parts["B"])
        if min(A.ndim, B.ndim) < 2 or not A.shape[0] == B.shape[1] > 0:
            raise InputError(f"{path}: {layer} has shapes {tuple(A.shape)} and {tuple(B.shape)}; expected "
                             "(rank, in) and (out, rank)")
        alpha = file.get_tensor(parts["alpha"]) if "alpha" in parts else None
        if alpha is not None and alpha.numel() != 1:
            raise InputError(f"{path}: {layer}.alpha has {alpha.numel()} values; expected one")
        layers[module] = A, B, told_alpha(module, A.shape[0], config) if alpha is None else float(alpha)
    if not layers:
        raise InputError(f"{path}: found no LoRA for this UNet, but {summary(left_out)}; expected the lora.safetensors "
                         "of a run, or a file of diffusers, PEFT or kohya")
    if left_out:
        print(f"{path}: {len(layers)} LoRA layers apply; left out: {summary(left_out)}")
    return layers, metadata


def summary(left_out):
    """What was left out, by kind, each with its number and its first names."""
    text = [layer for layer in left_out if layer.startswith(("lora_te", "text_encoder"))]
    rest = [layer for layer in left_out if layer not in text]
    kinds = [f"{len(names)} {what} ({', '.join(names[:2])}{', ...' * (len(names) > 2)})"
             for what, names in (("of the text encoder", text), ("that fit no layer", rest)) if names]
    return " and ".join(kinds) or "nothing at all"


def export_lora(path, form, scale=1.0):
    """Write a LoRA file again in one of FORMS, next to it as NAME-FORM.safetensors; returns that path.

    scale: multiplies every alpha. The tensors stay as they are, to the last bit.
    """
    with torch.device("meta"):      # every name that a UNet of four levels or fewer can have: no weights are needed
        unet = UNet(UNetConfig(attention=(True,) * 4))
    layers, metadata = read_lora(path, lora_modules(unet))
    target = Path(path).with_name(f"{Path(path).stem}-{form}.safetensors")
    write_lora(target, form, {name: (A, B, alpha * scale) for name, (A, B, alpha) in layers.items()}, metadata)
    return target


def lora_modules(unet):
    """Names of the layers that can take a LoRA: every linear layer and every convolution."""
    return [name for name, module in unet.named_modules() if type(module) in (torch.nn.Linear, torch.nn.Conv2d)]
