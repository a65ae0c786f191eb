"""The files of a model: their tensors under this project's names, loaded lazily, and constants from their metadata.

Both formats of Stable Diffusion 1.x and 2.x are read: one safetensors file in the original layout, and a diffusers
folder. Anything else is refused with one line that says what it is.
"""
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from . import layout
from .files import InputError
from .hub import PARTS

# Constants that tensor shapes do not show, of Stable Diffusion 1.x. A single file's metadata overrides them under the
# same names (the shipped model's does), a diffusers folder's config.json files under diffusers' names. 0: see
# UNetConfig and TextConfig.
CONSTANTS_1 = dict(unet_heads=8, unet_head_width=0, unet_groups=32, vae_groups=32, latent_scale=0.18215, text_heads=12,
                   text_used=0, image_size=512)
# The same of 2.x, which is recognised by its linear proj_in layers; it uses 23 of OpenCLIP's 24 layers
CONSTANTS_2 = {**CONSTANTS_1, "unet_head_width": 64, "text_heads": 16, "text_used": 23}

PREDICTION = "modelspec.prediction_type"       # in a single file's metadata: what its UNet predicts

SUPPORTED = ("supported: Stable Diffusion 1.x and 2.x models that predict noise, as one .safetensors file in the "
             "original layout, a diffusers folder, or the Hugging Face Hub's OWNER/REPO or OWNER/REPO:FILE.safetensors")

# Tensors of a single file that belong to no network here: moving averages, buffers of the noise schedule, position ids,
# and CLIP's projection and logit scale.
SKIPPED = re.compile(r"model_ema\.|.*position_ids$|(alphas_cumprod|betas|log_one_minus|logvar|posterior_|sqrt_)"
                     r"|cond_stage_model\.(model\.)?(logit_scale|text_projection|attn_mask)|embedding_manager\.")


def open_safetensors(path):
    """Open a safetensors file lazily. Raises InputError if it is missing, incomplete or of another format."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        head = file.read(9)     # a safetensors file begins with its header's length in 8 bytes, then "{"
    pickled = head[:2] == b"PK" or head[:1] == b"\x80"
    if pickled and head[8:] != b"{" or path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise InputError(f"{path}: a pickled checkpoint, which can run code when opened; "
                         "convert it to .safetensors first and pass that")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error}); download it again") from error


def _lazy(file, names):
    """{new name: (shape, load)} for {new name: name in the file}."""
    return {new: (tuple(file.get_slice(old).get_shape()), lambda old=old: file.get_tensor(old))
            for new, old in names.items()}


def open_single_file(path):
    """(tensors {network: {diffusers name: (shape, load)}}, constants) of a single file. Raises InputError."""
    file = open_safetensors(path)
    found, metadata = list(file.keys()), file.metadata() or {}
    _refuse_other_models(path, file, found)
    unet_pairs, vae_pairs, text_pairs = _prefixes(found)
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
    constants = {key: type(value)(metadata.get(key, value)) for key, value in _defaults(sources).items()}
    constants.update(openclip=any(name.startswith(layout.OPENCLIP) for name in found),
                     prediction=_prediction(path, metadata.get(PREDICTION)))
    return sources, constants


def _prefixes(found):
    """Original -> diffusers prefixes of the UNet, the VAE and OpenCLIP, with the structure that the names show."""
    unet = [name[len(layout.UNET):] for name in found if name.startswith(layout.UNET)]
    downs = sorted(int(name.split(".")[1]) for name in unet if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name))
    layers = downs[0] - 1 if downs else 1
    attention = [f"input_blocks.{i * (layers + 1) + 1}.1.norm.weight" in unet for i in range(len(downs) + 1)]
    vae = [name[len(layout.VAE):] for name in found if name.startswith(layout.VAE)]
    vae_layers = len([name for name in vae if re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name)])
    vae_levels = len({name.split(".")[2] for name in vae if name.startswith("encoder.down.")})
    text_layers = count(found, layout.OPENCLIP + "transformer.resblocks.%d.ln_1.weight")
    return (layout.unet_prefixes(attention, layers), layout.vae_prefixes(vae_levels, vae_layers),
            layout.openclip_prefixes(text_layers))


def _split_in_proj(file, names, tensors):
    """`tensors` with q, k and v instead of OpenCLIP's in_proj, which stacks their rows; names, tensors: see _lazy()."""
    split = dict(tensors)
    for name in [name for name, (shape, _) in tensors.items() if ".in_proj_" in name and shape]:
        (rows, *columns), _ = split.pop(name)
        ends = [0, rows // 3, 2 * (rows // 3), rows]
        for part, start, stop in zip("qkv", ends[:-1], ends[1:], strict=True):
            split[name.replace("in_proj_", f"{part}_proj.")] = (
                (stop - start, *columns), lambda old=names[name], rows=slice(start, stop): file.get_slice(old)[rows])
    return split


def _defaults(sources):
    """The constants of 1.x or 2.x, according to the shape of the UNet's proj_in."""
    shape, _ = sources["unet"].get("mid_block.attentions.0.proj_in.weight", ((), None))    # missing: refused later
    return CONSTANTS_2 if len(shape) == 2 else CONSTANTS_1


def _prediction(path, prediction):
    """The prediction type in a model's metadata, "" if there is none. Raises InputError if it is not the noise."""
    if prediction not in (None, "", "epsilon"):
        raise InputError(f"{path}: found a model that predicts {prediction}, not epsilon (the noise); {SUPPORTED}")
    return prediction or ""


def _refuse_other_models(path, file, found):
    """Raise InputError with one clear line for files that are often passed by mistake."""
    def has(*starts):
        return any(name.startswith(starts) for name in found)
    if any("lora_" in name or ".lora" in name for name in found):
        what = "a LoRA, not a whole model; pass the base model (and the LoRA to sample.py with --lora)"
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
        channels = file.get_slice(first).get_shape()[1] if first in found else 4       # a missing one is refused later
        if channels == 4:
            return
        what = f"a UNet with {channels} input channels" + (", an inpainting model" if channels == 9 else "")
    raise InputError(f"{path}: found {what}; {SUPPORTED}")


def open_folder(path):
    """As open_single_file(), of a diffusers folder; the constants are in its config.json files. Raises InputError."""
    if not (path / "unet").is_dir():
        raise InputError(f"{path}: a folder without unet/; {SUPPORTED}")
    sources, configs = {}, dict(scheduler=_config(path / "scheduler" / "scheduler_config.json"))
    for part, folder, stem in PARTS:
        candidates = [path / folder / f"{stem}{variant}.safetensors" for variant in ("", ".fp16")]
        file = next((c for c in candidates if c.is_file()), None)
        if file is None:
            others = sorted(p.name for p in (path / folder).glob("*")) if (path / folder).is_dir() else []
            raise InputError(f"{path}: {folder}/{stem}.safetensors (or .fp16.safetensors) is missing; "
                             f"found {', '.join(others) or 'nothing'}; {SUPPORTED}")
        opened = open_safetensors(file)
        clean = {"unet": str, "vae": _vae_name, "text": _text_name}[part]
        sources[part] = _lazy(opened, {clean(n): n for n in opened.keys() if not n.endswith("position_ids")})
        configs[part] = _config(path / folder / "config.json")
    shape = sources["unet"].get("conv_in.weight", ((0, 4),))[0]     # a missing one is refused later
    if shape[1] != 4:
        raise InputError(f"{path}: found a UNet with {shape[1]} input channels; {SUPPORTED}")
    unet, vae, text, default = configs["unet"], configs["vae"], configs["text"], _defaults(sources)
    if unet.get("addition_embed_type"):
        raise InputError(f"{path}: found a Stable Diffusion XL UNet; {SUPPORTED}")
    levels = len(vae.get("block_out_channels", [1] * 4))
    constants = dict(
        _heads(path, unet, default), unet_groups=unet.get("norm_num_groups", default["unet_groups"]),
        vae_groups=vae.get("norm_num_groups", default["vae_groups"]),
        latent_scale=vae.get("scaling_factor", default["latent_scale"]),
        text_heads=text.get("num_attention_heads", default["text_heads"]), text_used=0,
        openclip=text.get("hidden_act", "gelu" if default is CONSTANTS_2 else "quick_gelu") == "gelu",
        prediction=_prediction(path, configs["scheduler"].get("prediction_type")),
        image_size=int(unet.get("sample_size", 64) * 2 ** (levels - 1)))
    return sources, constants


def _config(path):
    """The content of a JSON file; {} if there is no file."""
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not a JSON object ({error}); download it again") from error


def _heads(path, config, default):
    """`default` with the UNet's heads: diffusers' attention_head_dim is their number, in 2.x a list, one per level."""
    heads = config.get("attention_head_dim")
    if heads is None or isinstance(heads, int):
        return {**default, "unet_heads": heads, "unet_head_width": 0} if heads else default
    channels = config.get("block_out_channels", (320, 640, 1280, 1280))
    widths = {divmod(width, n) for width, n in zip(channels, heads, strict=True)}
    head_width, rest = max(widths)
    if len(widths) > 1 or rest:
        raise InputError(f"{path}: found a UNet whose heads have different widths (attention_head_dim {heads}); "
                         f"{SUPPORTED}")
    return {**default, "unet_head_width": head_width}


def _text_name(name):
    """A tensor's name in the text encoder; some files leave out text_model."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def _vae_name(name):
    """A tensor's name in the autoencoder; old diffusers releases named its attention otherwise."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return name


def count(shapes, pattern):
    """How many of pattern % 0, pattern % 1, ... are in `shapes`, without a gap."""
    n = 0
    while pattern % n in shapes:
        n += 1
    return n
