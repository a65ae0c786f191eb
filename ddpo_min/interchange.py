"""LoRA files: two sets of names for the same tensors, and which layers of a file belong to this network.

    diffusers, PEFT               unet.mid_block.attentions.0.proj_in.lora_A.weight           A (rank, in)
                                  unet.mid_block.attentions.0.proj_in.lora_B.weight           B (out, rank)
    kohya, AUTOMATIC1111,         lora_unet_mid_block_attentions_0_proj_in.lora_down.weight   A
    ComfyUI                       lora_unet_mid_block_attentions_0_proj_in.lora_up.weight     B
                                  lora_unet_mid_block_attentions_0_proj_in.alpha              alpha; the rank if missing

In memory a LoRA is {module name: (A, B, alpha)}; rank and alpha can differ from layer to layer. Layers of the text
encoder have text_encoder. and lora_te_ instead of unet. and lora_unet_; their module names begin with text_model.
XL has two text encoders: text_encoder. and text_encoder_2., lora_te1_ and lora_te2_; module names begin as the former.
In a kohya file the blocks of XL's UNet have the original's names: lora_unet_middle_block_1_proj_in.
"""
import json
import math
import re
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from .checkpoint import open_safetensors
from .files import InputError, atomic, shown
from .layout import rename, unet_prefixes
from .text import TextConfig, TextEncoder, TextEncoders
from .unet import UNet, UNetConfig

FORMS = ("diffusers", "kohya")

# The names of a layer's parts: in diffusers and PEFT, in kohya, and twice in diffusers before PEFT
PARTS = {"lora_A.weight": "A", "lora_down.weight": "A", "lora.down.weight": "A", "lora_linear_layer.down.weight": "A",
         "lora_B.weight": "B", "lora_up.weight": "B", "lora.up.weight": "B", "lora_linear_layer.up.weight": "B",
         "alpha": "alpha"}

# Parts of layers that are no plain LoRA, by what their names begin with: what such a layer is
OTHER_KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr",
               "lora_mid": "LoCon with a core tensor", "oft_": "OFT", "ia3_": "IA3", "on_input": "IA3",
               "diff$": "full difference", "diff_b$": "full difference"}
DOTTED = re.compile(rf"(.*?)(?:[._](lora[._].+|alpha|(?<=\.)(?:{'|'.join(OTHER_KINDS)}).*))?", re.DOTALL)

# Metadata that is only true of the tensors, names and alphas that it came with; what each form needs is made anew
STALE = re.compile(r"sshs_|modelspec\.hash|ss_network_|lora_adapter_metadata")

# By the width of the text encoder's output
BASE_VERSIONS = {768: ("sd_v1", "False"), 1024: ("sd_v2", "True"), 2048: ("sdxl_base_v1-0", "False")}

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
XL = re.compile(r"transformer_blocks[._][1-9]|text_encoder_2|lora_te[12]_")     # in names of layers that only XL has


def network_of(module):
    """Which of NETWORKS has a module of this name."""
    first = module.partition(".")[0]
    return "text_encoder" if first == "text_model" else first if first in NETWORKS else "unet"


def kohya_name(module):
    """The name of a module in a kohya file: mid_block.resnets.0 -> lora_unet_mid_block_resnets_0."""
    first, _, rest = module.partition(".")
    prefix = dict(text_model="lora_te_text_model_", text_encoder="lora_te1_", text_encoder_2="lora_te2_").get(first)
    return (prefix + rest if prefix else "lora_unet_" + module).replace(".", "_")


def diffusers_form(layers):
    """{name: tensor} with the names of diffusers and PEFT, and the metadata in which diffusers >= 0.34 finds alpha."""
    state, config = {}, {}
    for network in sorted({network_of(name) for name in layers}):
        own = {name.removeprefix(f"{network}."): parts for name, parts in layers.items() if network_of(name) == network}
        state.update({f"{network}.{name}.lora_{part}.weight": tensor
                      for name, (A, B, _) in own.items() for part, tensor in (("A", A), ("B", B))})
        ranks, alphas = ranks_and_alphas({name.removeprefix("text_model."): parts      # which transformers 5 leaves out
                                          for name, parts in own.items()})
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        own = dict(r=rank, lora_alpha=alpha, target_modules=list(ranks),
                   rank_pattern={name: value for name, value in ranks.items() if value != rank},
                   alpha_pattern={name: value for name, value in alphas.items() if value != alpha})
        config.update({f"{network}.{key}": value for key, value in own.items()})
    return state, {"lora_adapter_metadata": json.dumps(config)}


def kohya_form(layers):
    """{name: tensor} with the names of kohya, AUTOMATIC1111 and ComfyUI, and kohya's metadata for them."""
    state, xl = {}, any(map(XL.search, layers))
    original = {b: a for a, b in unet_prefixes((0, 2, 10), 2).items()} if xl else {}
    for name, (A, B, alpha) in layers.items():
        layer = kohya_name(rename(name, original))
        state.update({f"{layer}.lora_down.weight": A, f"{layer}.lora_up.weight": B,
                      f"{layer}.alpha": exactly(alpha, A.dtype)})
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

    metadata: {name: str} to write too, without what is STALE; ranks and alphas are added to its JSON under ddpo_min.
    """
    state, form_metadata = diffusers_form(layers) if form == "diffusers" else kohya_form(layers)
    rank, alpha = (one_or_all(values) for values in ranks_and_alphas(layers))
    details = {**json.loads(metadata.get("ddpo_min", "{}")), "rank": rank, "alpha": alpha}
    kept = {name: text for name, text in metadata.items() if not STALE.match(name)}
    metadata = {**kept, **form_metadata, "format": "pt", "ddpo_min": json.dumps(details)}
    with atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata=metadata)


def split_name(name):
    """The name of a tensor in a file of any form -> (layer name in that file, part: a key of PARTS or another)."""
    if name.startswith("lora_"):                # kohya's layer names have no dots
        layer, _, part = name.partition(".")
        return layer, part
    return DOTTED.fullmatch(name).groups()


def common_name(layer):
    """A layer's name in a file of any form -> its kohya name, which is the same for all forms."""
    if layer.startswith("lora_"):
        return layer
    layer = layer.removeprefix("base_model.model.")     # a folder saved by PEFT
    for network in ("unet.", "diffusion_model.", "text_encoder."):
        layer = layer.removeprefix(network)
    second = "text_encoder_2." if layer.startswith("text_encoder_2.") else ""
    layer = layer.removeprefix(second)
    layer = layer.replace(".processor.", ".")       # attn1.processor.to_q: diffusers before PEFT
    layer = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", layer)      # the same, of the text encoder
    if layer.startswith("encoder.layers."):
        layer = "text_model." + layer               # transformers 5 leaves it out
    return kohya_name(second + layer + ".0" * layer.endswith(".to_out"))


def names_in_files(modules):
    """{kohya name: module}; of the UNet also with the original's blocks, lora_unet_input_blocks_1_1_proj_in."""
    levels = len({module.split(".")[1] for module in modules if module.startswith("down_blocks.")})
    layers = len({module.split(".")[3] for module in modules if module.startswith("down_blocks.0.resnets.")})
    attention = [any(module.startswith(f"down_blocks.{i}.attentions.") for module in modules) for i in range(levels)]
    known = {kohya_name(module): module for module in modules}
    known.update({kohya_name(module.removeprefix("text_encoder.")): module      # XL's first, which has no number there
                  for module in modules if module.startswith("text_encoder.")})
    for levels_with_attention in (attention, [False] * levels):     # export_lora() does not know which have none
        inverse = {b: a for a, b in unet_prefixes(levels_with_attention, layers).items()}
        known.update({kohya_name(rename(module, inverse)): module for module in modules})
    return known


def config_alpha(module, rank, config):
    """The alpha of a layer in PEFT's configuration (see peft_config); the rank (scale 1) if it has none."""
    patterns, default, rslora = config
    matches = [alpha for pattern, alpha in patterns if pattern.match(module)]
    alpha = matches[0] if matches else float(rank) if default is None else default
    return alpha * rank ** 0.5 if rslora else alpha         # rslora: scale alpha / sqrt(rank)


def peft_config(path, metadata, network):
    """The alphas in PEFT's configuration: ([(pattern of names, alpha)], alpha of the other layers or None, rslora).

    It is in the metadata or, of a file adapter_model.safetensors, in adapter_config.json in the same folder; network:
    one of NETWORKS. Raises ValueError, TypeError, AttributeError, OverflowError, RecursionError or re.error if it is
    malformed.
    """
    config_file = Path(path).with_name("adapter_config.json")
    text = metadata.get("lora_adapter_metadata", "{}")
    if Path(path).name == "adapter_model.safetensors" and config_file.is_file():
        text = config_file.read_text()
    config = {key.removeprefix(f"{network}."): value for key, value in json.loads(text).items()}
    alphas = config.get("alpha_pattern") or {}
    if any(re.search(r"\)[*+?{]", pattern) or len(re.findall("[*+?{]", pattern)) > 3 for pattern in alphas):
        raise ValueError("a pattern that can take for ever to match")
    patterns = [(re.compile(rf"(.*\.)?({pattern})$"), float(alpha)) for pattern, alpha in alphas.items()]
    return patterns, float(config["lora_alpha"]) if "lora_alpha" in config else None, bool(config.get("use_rslora"))


def read_lora(path, modules):
    """Read a LoRA file of either form: ({module name: (A, B, alpha)}, its metadata).

    modules: names of the layers that can have a LoRA. Other layers and layers with more than A, B and alpha (DoRA,
    LoHa, ...) are left out; one printed line names them. Raises InputError if no layer is left, if the tensors of a
    layer do not fit together, or if they have numbers that are not finite.
    """
    file = open_safetensors(path)
    metadata = dict(file.metadata() or {})
    try:
        configs = {network: peft_config(path, metadata, network) for network in NETWORKS}
        dict(json.loads(metadata.get("ddpo_min", "{}")).items())        # must be an object: write_lora() adds to it
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, re.error) as error:
        raise InputError(f"{path}: its metadata cannot be understood (ranks and alphas in lora_adapter_metadata, "
                         "ddpo_min or adapter_config.json); download or export it again") from error
    known, found = names_in_files(modules), {}
    for name in file.keys():
        layer, part = split_name(name)
        parts = found.setdefault(known.get(common_name(layer), layer), {})
        part = PARTS.get(part, part)
        if part in parts:
            raise InputError(f"{path}: {shown(name)} and {shown(parts[part])} are two names for the same tensor; "
                             "export it again with one")
        parts[part] = name
    layers, left_out = {}, {}
    for module, parts in found.items():
        if module in modules and parts.keys() <= {"A", "B", "alpha"}:
            A, B, alpha = read_layer(path, file, module, parts)
            if alpha is None:
                alpha = config_alpha(module, A.shape[0], configs[network_of(module)])
            if not math.isfinite(alpha):
                raise InputError(f"{path}: {module} has alpha {alpha}; the file is damaged, download or export it "
                                 "again")
            layers[module] = A, B, alpha
        else:
            layer, _ = split_name(next(iter(parts.values())))
            left_out.setdefault(kind_of(layer, parts), []).append(layer)
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
    tensors = {part: file.get_tensor(name) for part, name in parts.items()}
    for part, tensor in tensors.items():
        if tensor.is_complex() or not (tensor.is_floating_point() or part == "alpha"):
            raise InputError(f"{path}: {parts[part]} has dtype {str(tensor.dtype).removeprefix('torch.')}; expected "
                             "floating-point numbers, so export it again without quantisation")
        if not tensor.float().isfinite().all():
            raise InputError(f"{path}: {parts[part]} has numbers that are not finite; the file is damaged, download or "
                             "export it again")
    A, B, alpha = tensors["A"], tensors["B"], tensors.get("alpha")
    if min(A.ndim, B.ndim) < 2 or not A.shape[0] == B.shape[1] > 0:
        raise InputError(f"{path}: {layer} has shapes {tuple(A.shape)} and {tuple(B.shape)}; expected "
                         "(rank, in) and (out, rank)")
    if alpha is not None and alpha.numel() != 1:
        raise InputError(f"{path}: {layer}.alpha has {alpha.numel()} values; expected one")
    return A, B, None if alpha is None else float(alpha)


def kind_of(layer, parts):
    """What a layer is that cannot be applied, in words; parts: the names of its parts."""
    for start, kind in OTHER_KINDS.items():
        if any(re.match(start, part or "") for part in parts):
            return f"of the kind {kind}"
    text = layer.startswith(("lora_te", "text_encoder", "base_model.model.text_model"))
    return "of the text encoder" if text else "that fit no layer"


def summary(left_out):
    """The layers that were left out, {kind: [layer]}: of each kind the number and the first names."""
    most = 2 if len(left_out) <= 2 else 1
    return " and ".join(f"{len(names)} {kind} ({', '.join(shown(name) for name in names[:most])}"
                        f"{', ...' * (len(names) > most)})" for kind, names in left_out.items()) or "nothing at all"


def export_lora(path, form, scale=1.0):
    """Write a LoRA file in one of FORMS, in the same folder as NAME-FORM.safetensors; returns that path.

    scale: multiplies every alpha. The tensors do not change, to the last bit.
    """
    layers, metadata = read_lora(path, all_modules(xl=any(map(XL.search, open_safetensors(path).keys()))))
    if any(abs(alpha * scale) > torch.finfo(torch.float32).max for _, _, alpha in layers.values()):
        raise InputError(f"{path}: its alphas times {scale:g} are too large for float32; take a smaller strength")
    target = Path(path).with_name(f"{Path(path).stem}-{form}.safetensors")
    write_lora(target, form, {name: (A, B, alpha * scale) for name, (A, B, alpha) in layers.items()}, metadata)
    return target


@cache
def all_modules(xl):
    """Names of the layers of a UNet and the text encoder, of 1.x and 2.x or of XL; needs no weights."""
    unet, text = UNetConfig(attention=(1,) * 4), TextConfig(layers=24)
    if xl:
        unet, text = UNetConfig(widths=(32,) * 3, attention=(10,) * 3, middle=10, pooled=1), TextConfig(layers=32)
    with torch.device("meta"):
        text = TextEncoders(TextEncoder(text), TextEncoder(text)) if xl else TextEncoder(text)
        networks = UNet(unet), text
    return [name for network in networks for name in lora_modules(network)]


def lora_modules(network):
    """Names of the layers that can have a LoRA: every linear layer and every convolution."""
    return [name for name, module in network.named_modules() if type(module) in (torch.nn.Linear, torch.nn.Conv2d)]
