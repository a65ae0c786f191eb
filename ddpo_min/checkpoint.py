"""The files of a model: their tensors under this project's names, read when needed, and what only their metadata say.

Both ways of keeping Stable Diffusion 1.x and 2.x are understood, one safetensors file in the original layout and a
diffusers folder. What is something else is named in one line.
"""
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from . import layout
from .files import InputError
from .hub import PARTS

# What shapes do not tell, as it is in Stable Diffusion 1.x. A single file's metadata overrides it under the same names
# (the shipped model does so), a diffusers folder's config.json files under diffusers' names. Zero: see the networks.
UNSEEN = dict(unet_heads=8, unet_head_width=0, unet_groups=32, vae_groups=32, latent_scale=0.18215, text_heads=12,
              text_used=0, image_size=512)
# The same of 2.x, which is known by the linear layers around its transformers: it reads 23 of OpenCLIP's 24 layers
UNSEEN_2 = {**UNSEEN, "unet_head_width": 64, "text_heads": 16, "text_used": 23}

PREDICTION = "modelspec.prediction_type"       # the name in a single file's metadata of what its UNet predicts

SUPPORTED = ("supported: Stable Diffusion 1.x and 2.x that predicts noise, as one .safetensors file in the original "
             "layout, a diffusers folder, or the Hugging Face Hub's OWNER/REPO or OWNER/REPO:FILE.safetensors")

# Tensors of a single file that belong to no network: moving averages, buffers of the noise schedule, position ids, and
# what a CLIP compares pictures and texts with.
SKIPPED = re.compile(r"model_ema\.|.*position_ids$|(alphas_cumprod|betas|log_one_minus|logvar|posterior_|sqrt_)"
                     r"|cond_stage_model\.(model\.)?(logit_scale|text_projection|attn_mask)|embedding_manager\.")


def open_safetensors(path):
    """Open a safetensors file lazily, or say in one line why it is none. Raises InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        head = file.read(9)     # of a safetensors file: 8 bytes of any value, the header's length, then "{"
    pickled = head[:2] == b"PK" or head[:1] == b"\x80"
    if pickled and head[8:] != b"{" or path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise InputError(f"{path}: a pickled checkpoint, which can run code when opened; "
                         "convert it to .safetensors first and pass that")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error}); download it again")


def _lazy(file, names):
    """{new name: (shape, load)} for {new name: name in the file}."""
    return {new: (tuple(file.get_slice(old).get_shape()), lambda old=old: file.get_tensor(old))
            for new, old in names.items()}


def open_single_file(path):
    """The tensors of a single file under diffusers names, by network, and the constants that hold for it."""
    file = open_safetensors(path)
    found, metadata = list(file.keys()), file.metadata() or {}
    _refuse_other_models(path, file, found)
    inside = [name[len(layout.UNET):] for name in found if name.startswith(layout.UNET)]
    downs = sorted(int(name.split(".")[1]) for name in inside
                   if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name))
    layers = downs[0] - 1 if downs else 1
    attention = [f"input_blocks.{i * (layers + 1) + 1}.1.norm.weight" in inside for i in range(len(downs) + 1)]
    inside_vae = [name[len(layout.VAE):] for name in found if name.startswith(layout.VAE)]
    vae_layers = len([n for n in inside_vae if re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", n)])
    vae_levels = len({n.split(".")[2] for n in inside_vae if n.startswith("encoder.down.")})
    unet_pairs = layout.unet_prefixes(attention, layers)
    vae_pairs = layout.vae_prefixes(vae_levels, vae_layers)
    text_pairs = layout.openclip_prefixes(count(found, layout.OPENCLIP + "transformer.resblocks.%d.ln_1.weight"))

    names, unexpected = dict(unet={}, vae={}, text={}), []
    for name in found:
        if SKIPPED.match(name):
            continue
        elif name.startswith(layout.UNET):
            names["unet"][layout.rename(name[len(layout.UNET):], unet_pairs)] = name
        elif name.startswith(layout.VAE):
            names["vae"][layout.rename(name[len(layout.VAE):], vae_pairs)] = name
        elif name.startswith(layout.TEXT):
            names["text"][_text_name(name[len(layout.TEXT):])] = name
        elif name.startswith(layout.OPENCLIP):
            names["text"][layout.rename(name[len(layout.OPENCLIP):], text_pairs)] = name
        else:
            unexpected.append(name)
    if unexpected:
        raise InputError(f"{path}: {len(unexpected)} unexpected tensors, the first is {unexpected[0]}; {SUPPORTED}")
    sources = {part: _lazy(file, renamed) for part, renamed in names.items()}
    sources["text"] = _split_in_proj(file, names["text"], sources["text"])
    unseen = {key: type(value)(metadata.get(key, value)) for key, value in _usual(sources).items()}
    unseen.update(openclip=any(name.startswith(layout.OPENCLIP) for name in found),
                  prediction=_prediction(path, metadata.get(PREDICTION)))
    return sources, unseen


def _split_in_proj(file, names, tensors):
    """q, k and v for OpenCLIP's in_proj, which holds them one below the other; names, tensors: as of _lazy()."""
    split = dict(tensors)
    for name in [name for name, (shape, _) in tensors.items() if ".in_proj_" in name and shape]:
        (rows, *columns), _ = split.pop(name)
        ends = [0, rows // 3, 2 * (rows // 3), rows]
        for part, start, stop in zip("qkv", ends, ends[1:]):
            split[name.replace("in_proj_", f"{part}_proj.")] = (
                (stop - start, *columns), lambda old=names[name], rows=slice(start, stop): file.get_slice(old)[rows])
    return split


def _usual(sources):
    """The constants of the version that a UNet's shapes speak for."""
    shape, _ = sources["unet"].get("mid_block.attentions.0.proj_in.weight", ((), None))    # missing: named later
    return UNSEEN_2 if len(shape) == 2 else UNSEEN


def _prediction(path, prediction):
    """What a model says it predicts, "" if it does not say. Raises InputError if it is not the noise."""
    if prediction not in (None, "", "epsilon"):
        raise InputError(f"{path}: found a model that predicts {prediction}, not epsilon, the noise; {SUPPORTED}")
    return prediction or ""


def _refuse_other_models(path, file, found):
    """One clear line for the files people pass by mistake."""
    def has(*starts):
        return any(name.startswith(starts) for name in found)
    if any("lora_" in name or ".lora" in name for name in found):
        what = "a LoRA, not a whole model; give the base model (sample.py takes the LoRA with --lora)"
    elif has("conditioner.embedders."):
        what = "a Stable Diffusion XL model"
    elif has("down_blocks.", "encoder.", "text_model."):
        what = "one network of a diffusers folder; pass the folder that holds unet/, vae/ and text_encoder/"
    elif not has(layout.UNET):
        what = f"no Stable Diffusion checkpoint (its first tensor is {found[0] if found else 'missing'})"
    elif not (has(layout.VAE) and has(layout.TEXT, layout.OPENCLIP)):
        what = "a checkpoint without its autoencoder or text encoder"
    elif has(layout.TEXT) and has(layout.OPENCLIP):
        what = "a checkpoint with two text encoders"
    else:
        first = layout.UNET + "input_blocks.0.0.weight"
        channels = file.get_slice(first).get_shape()[1] if first in found else 4       # a missing one is named later
        if channels == 4:
            return
        what = f"a UNet with {channels} input channels" + (", an inpainting model" if channels == 9 else "")
    raise InputError(f"{path}: found {what}; {SUPPORTED}")


def open_folder(path):
    """The tensors of a diffusers folder, by network, and the constants that its config.json files tell."""
    if not (path / "unet").is_dir():
        raise InputError(f"{path}: a folder without unet/; {SUPPORTED}")
    sources, configs = {}, dict(scheduler=_config(path / "scheduler" / "scheduler_config.json"))
    for part, folder, stem in PARTS:
        candidates = [path / folder / f"{stem}{variant}.safetensors" for variant in ("", ".fp16")]
        file = next((c for c in candidates if c.is_file()), None)
        if file is None:
            others = sorted(p.name for p in (path / folder).glob("*")) if (path / folder).is_dir() else []
            raise InputError(f"{path}: {folder}/{stem}.safetensors (or .fp16.safetensors) is missing; "
                             f"found {', '.join(others) or 'nothing'} there; {SUPPORTED}")
        opened = open_safetensors(file)
        clean = {"unet": str, "vae": _vae_name, "text": _text_name}[part]
        sources[part] = _lazy(opened, {clean(n): n for n in opened.keys() if not n.endswith("position_ids")})
        configs[part] = _config(path / folder / "config.json")
    shape = sources["unet"].get("conv_in.weight", ((0, 4),))[0]     # a missing one is named later
    if shape[1] != 4:
        raise InputError(f"{path}: found a UNet with {shape[1]} input channels; {SUPPORTED}")
    if configs["unet"].get("addition_embed_type"):
        raise InputError(f"{path}: found a Stable Diffusion XL UNet; {SUPPORTED}")
    usual = _usual(sources)
    levels = len(configs["vae"].get("block_out_channels", [1] * 4))
    unseen = dict(
        _heads(path, configs["unet"], usual), unet_groups=configs["unet"].get("norm_num_groups", usual["unet_groups"]),
        vae_groups=configs["vae"].get("norm_num_groups", usual["vae_groups"]),
        latent_scale=configs["vae"].get("scaling_factor", usual["latent_scale"]),
        text_heads=configs["text"].get("num_attention_heads", usual["text_heads"]), text_used=0,
        openclip=configs["text"].get("hidden_act", "gelu" if usual is UNSEEN_2 else "quick_gelu") == "gelu",
        prediction=_prediction(path, configs["scheduler"].get("prediction_type")),
        image_size=int(configs["unet"].get("sample_size", 64) * 2 ** (levels - 1)))
    return sources, unseen


def _config(path):
    """The content of a JSON file; empty where there is none."""
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not JSON ({error}); download it again")


def _heads(path, config, usual):
    """A UNet's heads as diffusers' config tells them: attention_head_dim is their number, of 2.x one for each level."""
    heads = config.get("attention_head_dim")
    if heads is None or isinstance(heads, int):
        return dict(unet_heads=heads or usual["unet_heads"], unet_head_width=0 if heads else usual["unet_head_width"])
    widths = {divmod(width, n) for width, n in zip(config.get("block_out_channels", (320, 640, 1280, 1280)), heads)}
    head_width, rest = max(widths)
    if len(widths) > 1 or rest:
        raise InputError(f"{path}: found a UNet whose heads are not of one width ({heads} of them); {SUPPORTED}")
    return dict(unet_heads=usual["unet_heads"], unet_head_width=head_width)


def _text_name(name):
    """The text encoder's name of a tensor; some files leave out the outer text_model."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def _vae_name(name):
    """The autoencoder's attention had other names in old diffusers releases."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return name


def count(shapes, pattern):
    """How many names match a pattern with one %d, counted from 0."""
    n = 0
    while pattern % n in shapes:
        n += 1
    return n
