"""LoRA files: two sets of names for the same tensors, and which layers of a file belong to this network.

    diffusers, PEFT               unet.mid_block.attentions.0.proj_in.lora_A.weight           A (rank, in)
                                  unet.mid_block.attentions.0.proj_in.lora_B.weight           B (out, rank)
    kohya, AUTOMATIC1111,         lora_unet_mid_block_attentions_0_proj_in.lora_down.weight   A
    ComfyUI                       lora_unet_mid_block_attentions_0_proj_in.lora_up.weight     B
                                  lora_unet_mid_block_attentions_0_proj_in.alpha              alpha; the rank if missing

In memory a LoRA is {module name: (A, B, alpha)}; rank and alpha can differ from layer to layer.
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

# The names of a layer's parts: in diffusers and PEFT, in kohya, and in diffusers before PEFT
PARTS = {"lora_A.weight": "A", "lora_down.weight": "A", "lora.down.weight": "A",
         "lora_B.weight": "B", "lora_up.weight": "B", "lora.up.weight": "B", "alpha": "alpha"}

BASE_VERSIONS = {768: ("sd_v1", "False"), 1024: ("sd_v2", "True")}     # by the width of the text encoder's output


def kohya_name(module):
    """The name of a UNet's module in a kohya file: mid_block.resnets.0 -> lora_unet_mid_block_resnets_0."""
    return "lora_unet_" + module.replace(".", "_")


def diffusers_form(layers):
    """{name: tensor} with the names of diffusers and PEFT, and the metadata in which diffusers >= 0.34 finds alpha."""
    state = {f"unet.{name}.lora_{part}.weight": tensor
             for name, (A, B, _) in layers.items() for part, tensor in (("A", A), ("B", B))}
    ranks, alphas = ranks_and_alphas(layers)
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = dict(r=rank, lora_alpha=alpha, target_modules=list(layers),
                  rank_pattern={name: value for name, value in ranks.items() if value != rank},
                  alpha_pattern={name: value for name, value in alphas.items() if value != alpha})
    return state, {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}


def kohya_form(layers):
    """{name: tensor} with the names of kohya, AUTOMATIC1111 and ComfyUI, and kohya's metadata for them."""
    state = {}
    for name, (A, B, alpha) in layers.items():
        state.update({kohya_name(name) + ".lora_down.weight": A, kohya_name(name) + ".lora_up.weight": B,
                      kohya_name(name) + ".alpha": exactly(alpha, A.dtype)})
    metadata = {"ss_network_module": "networks.lora"}
    for key, values in zip(("ss_network_dim", "ss_network_alpha"), ranks_and_alphas(layers), strict=True):
        value = one_or_all(values)
        metadata[key] = "Dynamic" if isinstance(value, list) else str(value)
    widths = {A.shape[1] for name, (A, _, _) in layers.items() if name.endswith("attn2.to_k")}
    for width in widths & BASE_VERSIONS.keys():
        metadata["ss_base_model_version"], metadata["ss_v2"] = BASE_VERSIONS[width]
    return state, metadata


def exactly(number, dtype):
    """The number as a tensor of `dtype`, or of float32 if `dtype` would round it."""
    tensor = torch.tensor(number, dtype=dtype)
    return tensor if tensor.item() == number else torch.tensor(number)


def ranks_and_alphas(layers):
    """({name: rank}, {name: alpha})."""
    return ({name: A.shape[0] for name, (A, _, _) in layers.items()},
            {name: alpha for name, (_, _, alpha) in layers.items()})


def one_or_all(values):
    """The value of {name: number} if all are equal, else the sorted list of its different values."""
    values = sorted(set(values.values()))
    return values[0] if len(values) == 1 else values


def write_lora(path, form, layers, metadata):
    """Write {module name: (A, B, alpha)} in one of FORMS, atomically.

    metadata: {name: str} to write too; the ranks and alphas are added to its JSON under ddpo_min.
    """
    state, form_metadata = diffusers_form(layers) if form == "diffusers" else kohya_form(layers)
    rank, alpha = (one_or_all(values) for values in ranks_and_alphas(layers))
    details = {**json.loads(metadata.get("ddpo_min", "{}")), "rank": rank, "alpha": alpha}
    metadata = {**metadata, **form_metadata, "format": "pt", "ddpo_min": json.dumps(details)}
    with atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata=metadata)


def split_name(name):
    """The name of a tensor in a file of any form -> (layer name in that file, part: a key of PARTS or another)."""
    if name.startswith("lora_"):                # kohya's layer names have no dots
        layer, _, part = name.partition(".")
        return layer, part
    return re.fullmatch(r"(.+?)(?:[._](lora[._].+|alpha))?", name).groups()


def common_name(layer):
    """A layer's name in a file of any form -> its kohya name, which is the same for all forms."""
    if layer.startswith("lora_"):
        return layer
    layer = layer.removeprefix("base_model.model.").removeprefix("unet.")   # the first: a folder saved by PEFT
    layer = layer.replace(".processor.", ".")       # attn1.processor.to_q: diffusers before PEFT
    return kohya_name(layer + ".0" if layer.endswith(".to_out") else layer)


def config_alpha(module, rank, config):
    """The alpha of a layer in PEFT's configuration (see peft_config); the rank (scale 1) if it has none."""
    patterns, default, rslora = config
    matches = [alpha for pattern, alpha in patterns if pattern.match(module)]
    alpha = matches[0] if matches else float(rank) if default is None else default
    return alpha * rank ** 0.5 if rslora else alpha         # rslora: scale alpha / sqrt(rank)


def peft_config(path, metadata):
    """The alphas in PEFT's configuration: ([(pattern of names, alpha)], alpha of the other layers or None, rslora).

    It is in the metadata or, of a file adapter_model.safetensors, in adapter_config.json in the same folder. Raises
    ValueError, TypeError, AttributeError or re.error if it is malformed.
    """
    config_file = Path(path).with_name("adapter_config.json")
    text = metadata.get("lora_adapter_metadata", "{}")
    if Path(path).name == "adapter_model.safetensors" and config_file.is_file():
        text = config_file.read_text()
    config = {key.removeprefix("unet."): value for key, value in json.loads(text).items()}
    patterns = [(re.compile(rf"(.*\.)?({pattern})$"), float(alpha))
                for pattern, alpha in (config.get("alpha_pattern") or {}).items()]
    return patterns, float(config["lora_alpha"]) if "lora_alpha" in config else None, bool(config.get("use_rslora"))


def read_lora(path, modules):
    """Read a LoRA file of either form: ({module name: (A, B, alpha)}, its metadata).

    modules: names of the UNet's layers that can have a LoRA. Other layers (the text encoder's) and layers with more
    than A, B and alpha (DoRA, LoHa, ...) are left out; one printed line names them. Raises InputError if no layer is
    left, or if the tensors of a layer do not fit together.
    """
    file = open_safetensors(path)
    metadata = dict(file.metadata() or {})
    try:
        config = peft_config(path, metadata)
        dict(json.loads(metadata.get("ddpo_min", "{}")).items())        # must be an object: write_lora() adds to it
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise InputError(f"{path}: its metadata cannot be understood ({first_line(error)}); "
                         "download or export it again") from error
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
        A, B, alpha = read_layer(path, file, layer, parts)
        layers[module] = A, B, config_alpha(module, A.shape[0], config) if alpha is None else alpha
    if not layers:
        raise InputError(f"{path}: found no LoRA for this UNet, but {summary(left_out)}; expected the lora.safetensors "
                         "of a run, or a file of diffusers, PEFT or kohya")
    if left_out:
        print(f"{path}: {len(layers)} LoRA layers apply; left out: {summary(left_out)}")
    return layers, metadata


def read_layer(path, file, layer, parts):
    """(A, B, alpha or None) of one layer of an open file; parts: {"A", "B", "alpha": name}. Raises InputError."""
    if not {"A", "B"} <= parts.keys():
        raise InputError(f"{path}: {layer} has only {', '.join(parts.values())} of its two halves; "
                         "the file is damaged, download or export it again")
    A, B = file.get_tensor(parts["A"]), file.get_tensor(parts["B"])
    if min(A.ndim, B.ndim) < 2 or not A.shape[0] == B.shape[1] > 0:
        raise InputError(f"{path}: {layer} has shapes {tuple(A.shape)} and {tuple(B.shape)}; expected "
                         "(rank, in) and (out, rank)")
    if "alpha" not in parts:
        return A, B, None
    alpha = file.get_tensor(parts["alpha"])
    if alpha.numel() != 1:
        raise InputError(f"{path}: {layer}.alpha has {alpha.numel()} values; expected one")
    return A, B, float(alpha)


def summary(left_out):
    """The layers that were left out: of each kind the number and the first two names."""
    text = [layer for layer in left_out if layer.startswith(("lora_te", "text_encoder"))]
    rest = [layer for layer in left_out if layer not in text]
    kinds = [f"{len(names)} {what} ({', '.join(names[:2])}{', ...' * (len(names) > 2)})"
             for what, names in (("of the text encoder", text), ("that fit no layer", rest)) if names]
    return " and ".join(kinds) or "nothing at all"


def export_lora(path, form, scale=1.0):
    """Write a LoRA file in one of FORMS, in the same folder as NAME-FORM.safetensors; returns that path.

    scale: multiplies every alpha. The tensors do not change, to the last bit.
    """
    with torch.device("meta"):      # all names that a UNet of up to four levels can have; needs no weights
        unet = UNet(UNetConfig(attention=(True,) * 4))
    layers, metadata = read_lora(path, lora_modules(unet))
    target = Path(path).with_name(f"{Path(path).stem}-{form}.safetensors")
    write_lora(target, form, {name: (A, B, alpha * scale) for name, (A, B, alpha) in layers.items()}, metadata)
    return target


def lora_modules(unet):
    """Names of the layers that can have a LoRA: every linear layer and every convolution."""
    return [name for name, module in unet.named_modules() if type(module) in (torch.nn.Linear, torch.nn.Conv2d)]
