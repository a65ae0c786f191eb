"""Read Stable Diffusion 1.x and 2.x weights: one safetensors file in the original layout, or a diffusers folder.

Sizes come from the tensors' shapes. Networks are built without memory (on the meta device) and the tensors assigned
one by one, so loading peaks at little more than the weights themselves.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from . import layout
from .files import InputError, atomic
from .hub import PARTS, fetch
from .text import TextConfig, TextEncoder, tokenize
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig

SHIPPED = Path(__file__).resolve().parent.parent / "weights" / "emoji.safetensors"

SD_SIZE = 256       # from so many pixels a side on a model is of Stable Diffusion's kind, below of the shipped one's

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


@dataclass
class StableDiffusion:
    """The three networks, frozen, and what is needed to use them."""
    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    image_size: int         # pixels a side of the pictures the model was trained on
    report: str             # one line on what was loaded

    @property
    def latent_size(self):
        """Side of the latent of a picture of image_size pixels."""
        return self.image_size // 2 ** (len(self.vae.config.widths) - 1)

    def latent_shape(self, width, height):
        """(h, w) of the latent of a picture of width x height pixels. Raises InputError if the networks need others."""
        factor = 2 ** (len(self.vae.config.widths) - 1)
        multiple = factor * 2 ** (len(self.unet.config.widths) - 1)
        if width % multiple or height % multiple:
            raise InputError(f"--size {width}x{height}: expected WIDTHxHEIGHT in pixels, multiples of {multiple}, "
                             "because this model's networks halve the picture so often")
        return height // factor, width // factor

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Prompts (list of B str) -> context (B, 77, width) for the UNet."""
        device, config = self.text_encoder.text_model.final_layer_norm.weight.device, self.text_encoder.config
        return self.text_encoder(tokenize(prompts, config.positions, config.padding).to(device))


def load_stable_diffusion(path=SHIPPED, device="cpu", dtype=torch.float32):
    """Load a model, strictly: every tensor of the file is used or knowingly skipped, every parameter is filled.

    path: a .safetensors file in the original layout, a diffusers folder, or either on the Hugging Face Hub (fetch());
    dtype: None keeps each tensor's own, to be written again rather than run. Raises InputError if it is anything else,
    or if it does not predict noise.
    """
    name, path = Path(path).name, fetch(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; {SUPPORTED}")
    try:
        sources, unseen = _open_folder(path) if path.is_dir() else _open_single_file(path)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"{path}: its metadata or config.json cannot be understood ({error}); {SUPPORTED}")
    builders = dict(unet=_build_unet, vae=_build_vae, text=_build_text)
    networks, lines = [], []
    for part, build in builders.items():
        tensors = sources[part]
        shapes = {name: shape for name, (shape, _) in tensors.items()}
        try:
            with torch.device("meta"):
                network = build(shapes, unseen)
        except (KeyError, IndexError, ValueError, TypeError, ArithmeticError) as error:
            raise InputError(f"{path}: its {part} does not have Stable Diffusion's structure ({error}); {SUPPORTED}")
        _assign(network, tensors, path, part, device, dtype)
        networks.append(network.requires_grad_(False).eval())
        lines.append(f"{part} {len(tensors)} tensors, 0 missing, 0 unexpected")
    model = StableDiffusion(*networks, image_size=unseen["image_size"], report=f"{name}: " + "; ".join(lines))
    if model.unet.config.linear and not unseen["prediction"] and dtype is not None:
        refuse_v_prediction(model, path)
    return model


@torch.no_grad()
def refuse_v_prediction(model, path):
    """Look what a 2.x model predicts from nothing but noise, because its file does not say. Raises InputError.

    At t = 999, x_t is nearly all noise. What predicts noise then answers with about x_t; v = sqrt(alpha_bar_t) eps -
    sqrt(1 - alpha_bar_t) x0 [Salimans and Ho, Sec. 4] is about -x0, which has little in common with it.
    """
    device, dtype = model.unet.conv_in.weight.device, model.unet.conv_in.weight.dtype
    x_t = torch.randn(1, 4, model.latent_size, model.latent_size, generator=torch.Generator().manual_seed(0))
    out = model.unet(x_t.to(device, dtype), torch.tensor([999], device=device), model.encode_prompts([""]).to(dtype))
    likeness = torch.corrcoef(torch.stack([x_t.flatten(), out.float().cpu().flatten()]))[0, 1].item()
    if not likeness >= 0.5:     # nor if it is not a number
        raise InputError(f"{path}: its UNet answers pure noise with something else (correlation {likeness:.2f}), so it "
                         "seems to predict v, as 2.x's 768-pixel models do; if it does not, give it as a diffusers "
                         f'folder whose scheduler/scheduler_config.json says "prediction_type": "epsilon"; {SUPPORTED}')


def is_small(path):
    """Whether a model is of the shipped one's kind, not of Stable Diffusion's: trained on under SD_SIZE pixels a side.

    path: a model; empty is the shipped one. Only the head of a single file is read; what cannot be is taken for large.
    """
    try:
        with safe_open(path or SHIPPED, framework="pt") as file:
            return int((file.metadata() or {}).get("image_size", UNSEEN["image_size"])) < SD_SIZE
    except Exception:       # a folder, or no model at all: the loader will say so
        return False


def save_single_file(path, unet, vae, text_encoder, dtype=torch.float16, image_size=512, **story):
    """Write the three networks as one safetensors file in the original layout, with what shapes do not tell.

    dtype: None keeps each tensor's own; story: whatever else its metadata should say, under the name ddpo_min.
    OpenCLIP's projection is left out.
    """
    state = {}
    inverse = {b: a for a, b in layout.unet_prefixes(unet.config.attention, unet.config.layers).items()}
    for name, tensor in unet.state_dict().items():
        state[layout.UNET + layout.rename(name, inverse)] = tensor
    inverse = {b: a for a, b in layout.vae_prefixes(len(vae.config.widths), vae.config.layers).items()}
    for name, tensor in vae.state_dict().items():
        if ".attentions." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]           # the original writes these linear layers as 1x1 convolutions
        state[layout.VAE + layout.rename(name, inverse)] = tensor
    state.update(_original_text(text_encoder))
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    metadata = dict(unet_heads=unet.config.heads, unet_head_width=unet.config.head_width, image_size=image_size,
                    unet_groups=unet.config.groups, vae_groups=vae.config.groups, latent_scale=vae.config.latent_scale,
                    text_heads=text_encoder.config.heads, text_used=text_encoder.config.used or 0)
    metadata[PREDICTION] = "epsilon"
    if story:
        metadata["ddpo_min"] = json.dumps(story)
    with atomic(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", **{k: str(v) for k, v in metadata.items()}})


def _original_text(text_encoder):
    """The text encoder's tensors under a single file's names; OpenCLIP's q, k and v in one."""
    state, config = text_encoder.state_dict(), text_encoder.config
    if not config.openclip:
        return {layout.TEXT + name: tensor for name, tensor in state.items()}
    for name in [name for name in state if "q_proj." in name]:
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(
            [state.pop(name.replace("q_proj.", f"{part}_proj.")) for part in "qkv"])
    inverse = {b: a for a, b in layout.openclip_prefixes(config.layers).items()}
    return {layout.OPENCLIP + layout.rename(name, inverse): tensor for name, tensor in state.items()}


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


def _open_single_file(path):
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
    text_pairs = layout.openclip_prefixes(_count(found, layout.OPENCLIP + "transformer.resblocks.%d.ln_1.weight"))

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


def _open_folder(path):
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


def _count(shapes, pattern):
    """How many names match a pattern with one %d, counted from 0."""
    n = 0
    while pattern % n in shapes:
        n += 1
    return n


def _build_unet(shapes, unseen):
    levels = _count(shapes, "down_blocks.%d.resnets.0.conv1.weight")
    return UNet(UNetConfig(
        in_channels=shapes["conv_in.weight"][1], out_channels=shapes["conv_out.weight"][0],
        widths=tuple(shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)),
        attention=tuple(f"down_blocks.{i}.attentions.0.norm.weight" in shapes for i in range(levels)),
        layers=_count(shapes, "down_blocks.0.resnets.%d.conv1.weight"),
        context_width=shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
        heads=unseen["unet_heads"], groups=unseen["unet_groups"], head_width=unseen["unet_head_width"],
        linear=len(shapes["mid_block.attentions.0.proj_in.weight"]) == 2))


def _build_vae(shapes, unseen):
    levels = _count(shapes, "encoder.down_blocks.%d.resnets.0.conv1.weight")
    return VAE(VAEConfig(
        widths=tuple(shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)),
        layers=_count(shapes, "encoder.down_blocks.0.resnets.%d.conv1.weight"),
        latent_channels=shapes["post_quant_conv.weight"][0], groups=unseen["vae_groups"],
        latent_scale=unseen["latent_scale"]))


def _build_text(shapes, unseen):
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return TextEncoder(TextConfig(
        vocabulary=vocabulary, width=width, positions=shapes["text_model.embeddings.position_embedding.weight"][0],
        layers=_count(shapes, "text_model.encoder.layers.%d.mlp.fc1.weight"), heads=unseen["text_heads"],
        inner=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0], used=unseen["text_used"] or None,
        openclip=unseen["openclip"]))


def _assign(network, tensors, path, part, device, dtype):
    """Fill a network that lives on the meta device; refuse any name or shape that does not fit."""
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unexpected:
        raise InputError(f"{path}: {part} {len(tensors)} tensors, {len(missing)} missing, {len(unexpected)} "
                         f"unexpected; the first is {(missing + unexpected)[0]}; {SUPPORTED}")
    for name, (shape, load) in tensors.items():
        as_linear = len(shape) == 4 and len(wanted[name]) == 2 and shape[2:] == (1, 1)
        if (shape[:2] if as_linear else shape) != wanted[name]:
            raise InputError(f"{path}: {part} tensor {name} has shape {shape}, expected {wanted[name]}; {SUPPORTED}")
        tensor = load().reshape(wanted[name]).to(device, dtype)
        if tensor.ndim == 4:        # convolutions are faster so, and pass the order of memory on to what they compute
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
