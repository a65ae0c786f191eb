"""The files of a model: their tensors under this project's names, loaded lazily, and constants from their metadata.

Both formats of Stable Diffusion 1.x, 2.x and XL are read: one safetensors file in the original layout, and a diffusers
folder. Anything else is refused with one line that says what it is.
"""
import json
import re
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from . import layout
from .files import InputError, shown
from .hub import ENDINGS, PARTS, PARTS_XL, SCHEDULER, read_json, shards
from .schedule import alphas_cumprod
from .unet import SIZE_FEATURES
from .v_prediction import zero_terminal_snr

# Constants that tensor shapes do not show, of Stable Diffusion 1.x. A single file's metadata overrides them under the
# same names (the shipped model's does), a diffusers folder's config.json files under diffusers' names. 0: see
# UNetConfig and TextConfig.
CONSTANTS_1 = dict(unet_heads=8, unet_head_width=0, unet_groups=32, vae_groups=32, latent_scale=0.18215, text_heads=12,
                   text_used=0, text_openclip=0, text_2_heads=20, text_2_openclip=1, image_size=512)
# The same of 2.x, which is recognised by its linear proj_in layers; it uses 23 of OpenCLIP's 24 layers
CONSTANTS_2 = {**CONSTANTS_1, "unet_head_width": 64, "text_heads": 16, "text_used": 23, "text_openclip": 1}
# The same of XL, which has a second text encoder; both are used without their last layer
CONSTANTS_XL = {**CONSTANTS_1, "unet_head_width": 64, "latent_scale": 0.13025, "image_size": 1024}

# What a UNet predicts: in a single file's metadata, in a folder's scheduler config; our name for it
PREDICTION = "modelspec.prediction_type"
KINDS = {"epsilon": "eps", "v": "v", "v_prediction": "v"}
# Tensors without a number, by which single files say it to ComfyUI, and which of PREDICTIONS have them
V_KEYS = {"v_pred": ("v", "v_zsnr"), "ztsnr": ("v_zsnr",)}

# What a diffusers folder's JSON files may say where it changes the mathematics: these values, null, or nothing. All
# else in them is shown by the tensors, is read, or concerns other samplers than ddim.py.
EXPECTED = {
    SCHEDULER: dict(     # schedule.py has one schedule
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, trained_betas=None,
        rescale_betas_zero_snr=False, use_flow_sigmas=False, shift=None, sigma_data=None, snr_shift_scale=None),
    "unet/config.json": dict(
        act_fn="silu", flip_sin_to_cos=True, freq_shift=0, norm_eps=1e-5, downsample_padding=1,
        mid_block_scale_factor=1, center_input_sample=False, time_embedding_type="positional",
        resnet_time_scale_shift="default", resnet_out_scale_factor=1, resnet_skip_time_act=False,
        only_cross_attention=False, dual_cross_attention=False, attention_type="default", num_attention_heads=None,
        time_embedding_act_fn=None, timestep_post_act=None, class_embed_type=None, addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_FEATURES, encoder_hid_dim_type=None),
    "vae/config.json": dict(act_fn="silu", shift_factor=None, latents_mean=None, latents_std=None),
    "text_encoder/config.json": dict(layer_norm_eps=1e-5),
    "text_encoder_2/config.json": dict(layer_norm_eps=1e-5),
}

SUPPORTED = ("supported: Stable Diffusion 1.x, 2.x and XL, as one .safetensors file in the original layout, a "
             "diffusers folder, or the Hugging Face Hub's OWNER/REPO or OWNER/REPO:FILE.safetensors")

PICKLED = "a pickled checkpoint, which can run code when opened; convert it to .safetensors first and pass that"

# What files begin with that are often passed by mistake
FOREIGN = {b"PK": PICKLED, b"\x80": PICKLED,
           b"GGUF": "a GGUF file, whose weights are quantised; pass the model's .safetensors file",
           b"version ": "a Git LFS pointer, which stands for a file that was not downloaded; run `git lfs pull`, or "
                        "download the file itself"}

LARGEST = 2048      # of the constants: pixels a side, heads, groups

FRACTIONS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")     # dtypes of weights

# Tensors of a single file that belong to no network here: moving averages, buffers of the noise schedule, position ids,
# V_KEYS, and CLIP's projection and logit scale, but for XL's second projection.
SKIPPED = re.compile(r"model_ema\.|.*position_ids$|(alphas_cumprod|betas|log_one_minus|logvar|posterior_|sqrt_)"
                     r"|(cond_stage_model|conditioner\.embedders\.0)\.((model|transformer)\.)?text_projection"
                     r"|(cond_stage_model|conditioner\.embedders\.[01])\.((model|transformer)\.)?(logit_scale|attn_mask)"
                     r"|embedding_manager\.|(denoiser\.sigmas|v_pred|ztsnr)$")


def open_safetensors(path):
    """Open a safetensors file lazily. Raises InputError if it is missing, incomplete or of another format."""
    path, head = Path(path), b""
    if path.is_dir():
        raise InputError(f"{path}: a folder; expected a .safetensors file")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            head = file.read(8)     # of a safetensors file: the length of its header, which is JSON
            opened = safe_open(path, framework="pt")
            json.loads(file.read(int.from_bytes(head, "little")), object_pairs_hook=_names_once)
        return opened
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions")
    except (SafetensorError, OSError, ValueError) as error:
        pickled = PICKLED if path.suffix in (".ckpt", ".pt", ".pth", ".bin") else None
        what = next((what for start, what in FOREIGN.items() if head.startswith(start)), pickled)
        raise InputError(f"{path}: " + (what or f"not a complete safetensors file ({shown(error)}); download it again"))


def _names_once(pairs):
    """An object of a JSON header as a dict. Raises ValueError if it has a name twice: a file has one tensor a name."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)} is there twice")
    return dict(pairs)


def _lazy(path, names):
    """{new name: (shape, load)} of [(new name, the tensor's name in the file, the open file)].

    Raises InputError if two names are one tensor's, and if a tensor is empty or does not hold fractions.
    """
    tensors, old_names = {}, {}
    for new, old, file in names:
        piece = file.get_slice(old)
        shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
        if new in tensors:
            raise InputError(f"{path}: {shown(old_names[new])} and {shown(old)} are two names for the same weights, "
                             f"{shown(new)}; remove one of them")
        if 0 in shape or dtype not in FRACTIONS:
            raise InputError(f"{path}: tensor {shown(old)} has shape {shown(shape)} and dtype {dtype}; expected "
                             f"no empty tensor, and one of {', '.join(FRACTIONS)}")
        tensors[new], old_names[new] = (shape, lambda file=file, old=old: file.get_tensor(old)), old
    return tensors


def open_single_file(path, prediction=""):
    """(tensors {network: {diffusers name: (shape, load)}}, constants) of a single file. Raises InputError.

    prediction: one of PREDICTIONS, "": what the file says; so it is under that name in the constants.
    """
    file = open_safetensors(path)
    found, metadata = list(file.keys()), file.metadata() or {}
    _refuse_other_models(path, file, found)
    unet_pairs, vae_pairs, text_pairs = _prefixes(found)
    openclip = partial(layout.rename, pairs=text_pairs)
    parts = {layout.UNET: ("unet", partial(layout.rename, pairs=unet_pairs)),
             layout.VAE: ("vae", partial(layout.rename, pairs=vae_pairs)),
             layout.TEXT: ("text", _text_name), layout.OPENCLIP: ("text", openclip),
             layout.TEXT_XL: ("text", _text_name), layout.OPENCLIP_XL: ("text_2", openclip)}
    names, unexpected = dict(unet=[], vae=[], text=[], text_2=[]), []
    for name in found:
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if SKIPPED.match(name):
            continue
        elif prefix:
            part, clean = parts[prefix]
            names[part].append((clean(name[len(prefix):]), name, file))
        else:
            unexpected.append(name)
    if unexpected:
        raise InputError(f"{path}: {len(unexpected)} unexpected tensors, the first is {shown(unexpected[0])}; "
                         f"{SUPPORTED}")
    sources = {part: _lazy(path, renamed) for part, renamed in names.items() if renamed or part != "text_2"}
    for part in sources.keys() & {"text", "text_2"}:
        sources[part] = _from_openclip(path, names[part], sources[part])
    prediction = prediction or _prediction(path, "v" if "v_pred" in found else metadata.get(PREDICTION),
                                           zero_snr="ztsnr" in found)
    if "alphas_cumprod" in found:       # checkpoints of a training have their schedule
        theirs, ours = file.get_tensor("alphas_cumprod").double(), alphas_cumprod()
        ours = zero_terminal_snr(ours) if prediction == "v_zsnr" else ours
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=0.2, atol=1e-6):     # it can be rounded
            raise InputError(f"{path}: its alphas_cumprod are another noise schedule than Stable Diffusion's; "
                             f"{SUPPORTED}")
    constants = _constants(path, metadata, str, _defaults(sources))
    return sources, {**constants, "prediction": prediction}


def _prefixes(found):
    """Original -> diffusers prefixes of the UNet, the VAE and OpenCLIP, with the structure that the names show."""
    unet = {name[len(layout.UNET):] for name in found if name.startswith(layout.UNET)}
    downs = [re.fullmatch(r"input_blocks\.(\d{1,3})\.0\.op\.weight", name) for name in unet]
    downs = sorted(int(match[1]) for match in downs if match)
    layers = downs[0] - 1 if downs else 1
    attention = [f"input_blocks.{i * (layers + 1) + 1}.1.norm.weight" in unet for i in range(len(downs) + 1)]
    vae = [name[len(layout.VAE):] for name in found if name.startswith(layout.VAE)]
    vae_layers = len([name for name in vae if re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name)])
    vae_levels = len({name.split(".")[2] for name in vae if name.startswith("encoder.down.")})
    text_layers = max(count(found, prefix + "transformer.resblocks.%d.ln_1.weight")
                      for prefix in (layout.OPENCLIP, layout.OPENCLIP_XL))
    return (layout.unet_prefixes(attention, layers), layout.vae_prefixes(vae_levels, vae_layers),
            layout.openclip_prefixes(text_layers))


def _from_openclip(path, names, tensors):
    """`tensors` with q, k and v instead of OpenCLIP's in_proj, which stacks their rows, and with the transpose of its
    text_projection; names: see _lazy()."""
    split = dict(tensors)
    for name, old, file in names:
        if old.endswith(".text_projection"):
            shape, load = split[name]
            split[name] = shape[::-1], lambda load=load: load().T.contiguous()
        if ".in_proj_" not in name or not tensors[name][0]:
            continue
        (rows, *columns), _ = split.pop(name)
        ends = [0, rows // 3, 2 * (rows // 3), rows]
        for part, start, stop in zip("qkv", ends[:-1], ends[1:], strict=True):
            new = name.replace("in_proj_", f"{part}_proj.")
            if new in split:
                raise InputError(f"{path}: {shown(old)} and another tensor both hold {shown(new)}; remove one of them")
            split[new] = ((stop - start, *columns),
                          lambda file=file, old=old, rows=slice(start, stop): file.get_slice(old)[rows])
    return split


def _defaults(sources):
    """The constants of 1.x, 2.x or XL, according to the text encoders and the shape of the UNet's proj_in."""
    if "text_2" in sources:
        return CONSTANTS_XL
    shape, _ = sources["unet"].get("mid_block.attentions.0.proj_in.weight", ((), None))    # missing: refused later
    return CONSTANTS_2 if len(shape) == 2 else CONSTANTS_1


def _prediction(path, said, zero_snr):
    """Which of PREDICTIONS a model's files say, "" if they say nothing. Raises InputError if it is another one."""
    if said and str(said) not in KINDS:
        raise InputError(f"{path}: found a model that predicts {shown(said)}, neither epsilon (the noise) nor v; "
                         f"{SUPPORTED}")
    prediction = KINDS[str(said)] if said else ""
    return "v_zsnr" if prediction == "v" and zero_snr else prediction


def _refuse_other_models(path, file, found):
    """Raise InputError with one clear line for files that are often passed by mistake."""
    def has(*starts):
        return any(name.startswith(starts) for name in found)
    texts = [has(layout.TEXT), has(layout.OPENCLIP), has(layout.TEXT_XL)]
    if any("lora_" in name or ".lora" in name for name in found):
        what = "a LoRA, not a whole model; pass the base model (and the LoRA to sample.py with --lora)"
    elif has("conditioner.embedders.0.model."):
        what = "the refiner of Stable Diffusion XL, which only improves another model's pictures; pass the base model"
    elif has("down_blocks.", "encoder.", "text_model."):
        what = "one network of a diffusers folder; pass the folder that holds unet/, vae/ and text_encoder/"
    elif not has(layout.UNET):
        what = f"no Stable Diffusion checkpoint (its first tensor is {shown(found[0]) if found else 'missing'})"
    elif not has(layout.VAE) or not any(texts) or has(layout.TEXT_XL) != has(layout.OPENCLIP_XL):
        what = "a checkpoint without its autoencoder or text encoder"
    elif sum(texts) > 1:
        what = "a checkpoint with the text encoders of two models"
    else:
        first = layout.UNET + "input_blocks.0.0.weight"
        shape = file.get_slice(first).get_shape() if first in found else ()
        channels = shape[1] if len(shape) > 1 else 4       # a missing one is refused later
        if channels == 4:
            return
        what = f"a UNet with {channels} input channels" + (", an inpainting model" if channels == 9 else "")
    raise InputError(f"{path}: found {what}; {SUPPORTED}")


def open_folder(path, prediction=""):
    """As open_single_file(), of a diffusers folder; the constants are in its config.json files. Raises InputError."""
    if not (path / "unet").is_dir():
        raise InputError(f"{path}: a folder without unet/; {SUPPORTED}")
    sources, xl = {}, bool(read_json(path / "unet" / "config.json").get("addition_embed_type"))
    if xl and not (path / "text_encoder").is_dir():
        raise InputError(f"{path}: found the refiner of Stable Diffusion XL, or a part of a model: a folder without "
                         f"text_encoder/; {SUPPORTED}")
    for part, folder, stem in PARTS_XL if xl else PARTS:
        candidates = [path / folder / f"{stem}{ending}" for ending in ENDINGS]
        first = next((c for c in candidates if c.is_file()), None)
        if first is None:
            others = sorted(p.name for p in (path / folder).glob("*")) if (path / folder).is_dir() else []
            raise InputError(f"{path}: {folder}/{stem}.safetensors (or .fp16.safetensors) is missing; "
                             f"found {shown(', '.join(others)) or 'nothing'}; {SUPPORTED}")
        clean = {"unet": str, "vae": _vae_name}.get(part, _text_name)
        opened = [open_safetensors(file) for file in shards(first)]
        sources[part] = _lazy(path / folder, [(clean(name), name, file) for file in opened for name in file.keys()
                                              if not name.endswith("position_ids")])
    shape = sources["unet"].get("conv_in.weight", ((0, 4),))[0]     # a missing one is refused later
    if len(shape) > 1 and shape[1] != 4:
        raise InputError(f"{path}: found a UNet with {shape[1]} input channels; {SUPPORTED}")
    configs = {file: read_json(path / file) for file in EXPECTED}
    scheduler, unet, vae, *texts = configs.values()
    if "time_embedding.cond_proj.weight" in sources["unet"] or scheduler.get("_class_name") == "LCMScheduler":
        raise InputError(f"{path}: found an LCM, a model distilled for few steps, which DDIM cannot draw with; "
                         f"{SUPPORTED}")
    rescaled = scheduler.get("rescale_betas_zero_snr")
    prediction = prediction or _prediction(path, scheduler.get("prediction_type"), zero_snr=rescaled is True)
    for file, expected in EXPECTED.items():
        for key, value in expected.items():
            found = configs[file].get(key)
            if found is True and key == "rescale_betas_zero_snr" and prediction == "v_zsnr":
                continue
            if found not in (None, value):
                raise InputError(f'{path}: {file} says "{key}": {shown(json.dumps(found))}; this project computes with '
                                 f"{json.dumps(value)}; {SUPPORTED}")
    constants = _constants(path, _folder_constants(path, sources, unet, vae, texts), int | float, _defaults(sources))
    return sources, {**constants, "prediction": prediction}


def _folder_constants(path, sources, unet, vae, texts):
    """What the config.json files of a diffusers folder say of the constants, under our names; None: nothing."""
    found = dict(unet_groups=unet.get("norm_num_groups"), vae_groups=vae.get("norm_num_groups"),
                 latent_scale=vae.get("scaling_factor"))
    layers = count(sources["text"], "text_model.encoder.layers.%d.mlp.fc1.weight")
    used = texts[0].get("num_hidden_layers", layers)
    found["text_used"] = 0 if used == layers else used
    for part, text in zip(("text", "text_2"), texts, strict=True):
        found[f"{part}_heads"], act = text.get("num_attention_heads"), text.get("hidden_act")
        if act is not None:
            acts = ["quick_gelu", "gelu"]       # OpenAI's, OpenCLIP's
            if act not in acts:
                raise InputError(f"{path}: its text encoder has hidden_act {shown(act)}; expected "
                                 f"{' or '.join(acts)}; {SUPPORTED}")
            found[f"{part}_openclip"] = acts.index(act)
    size = unet.get("sample_size")      # of latents; diffusers writes null or [height, width], too
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if size is not None:
        levels = count(sources["vae"], "encoder.down_blocks.%d.resnets.0.conv1.weight")
        found["image_size"] = size * 2 ** max(levels - 1, 0) if isinstance(size, int | float) else size
    heads = unet.get("attention_head_dim")      # their number; in 2.x a list of it, one for each level
    if not isinstance(heads, list):
        return {**found, **({"unet_heads": heads, "unet_head_width": 0} if heads is not None else {})}
    shapes = sources["unet"]
    levels = count(shapes, "down_blocks.%d.resnets.0.conv1.weight")
    widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0][:1] for i in range(levels)]
    fits = len(heads) == levels and all(isinstance(n, int) and n > 0 for n in heads)
    head_widths = {width[0] / n for width, n in zip(widths, heads) if width} if fits else ()
    if len(head_widths) != 1 or min(head_widths) < 1:
        raise InputError(f"{path}: found a UNet whose heads have different widths (attention_head_dim {shown(heads)}); "
                         f"{SUPPORTED}")
    return {**found, "unet_head_width": head_widths.pop()}


def _constants(path, given, types, default):
    """`default` with the numbers that a model's metadata (as str) or config.json files give. Raises InputError."""
    constants = dict(default)
    for name in default.keys() & {key for key, value in given.items() if value is not None}:
        kind, lowest = type(default[name]), 0 if name.endswith(("head_width", "used", "openclip")) else 1
        try:
            number = float(given[name]) if isinstance(given[name], types) else -1
        except (ValueError, OverflowError):
            number = -1
        if not (lowest <= number <= LARGEST and number == int(number) if kind is int else 0 < number <= LARGEST):
            raise InputError(f"{path}: its metadata or config.json files say {name} {shown(given[name])}; expected a "
                             f"{'whole ' * (kind is int)}number from {lowest if kind is int else 0} to {LARGEST}; "
                             f"{SUPPORTED}")
        constants[name] = kind(number)
    return constants


def _text_name(name):
    """A tensor's name in the text encoder; some files leave out text_model."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


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
