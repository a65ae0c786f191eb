"""Load a Stable Diffusion 1.x, 2.x or XL model from its files (ddpo_min/checkpoint.py), and save one as a single file.

Sizes come from the tensors' shapes. Networks are built on the meta device, without memory, and the tensors are assigned
one by one, so the peak memory of loading is little more than the weights.
"""
import copy
import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from . import layout
from .checkpoint import CONSTANTS_1, PREDICTION, SUPPORTED, V_KEYS, count, open_folder, open_single_file
from .device import visiting
from .files import InputError, NotFinite, atomic, shown
from .hub import fetch
from .schedule import alphas_cumprod
from .text import TextConfig, TextEncoder, TextEncoders
from .unet import SIZE_FEATURES, UNet, UNetConfig
from .v_prediction import eps_from_v, zero_terminal_snr
from .vae import VAE, VAEConfig

SHIPPED = Path(__file__).resolve().parent.parent / "weights" / "emoji.safetensors"

FEW_STEPS = re.compile("turbo|lightning|lcm|hyper.?sd", re.IGNORECASE)      # in the names of models distilled for few

SD_SIZE = 256       # pixels a side: models with at least this many count as Stable Diffusion, others as small


@dataclass
class StableDiffusion:
    """The networks, frozen, and what is needed to use them."""
    unet: UNet
    vae: VAE
    text_encoder: TextEncoder       # in XL TextEncoders
    image_size: int         # pixels a side of the pictures the model was trained on
    report: str             # one line about what was loaded
    base: str = ""          # 16 hex digits that name the UNet's weights, see base_name()
    prediction: str = "eps"     # one of PREDICTIONS
    shape: tuple = None     # (h, w) of the latents to draw; None: of a picture with image_size pixels a side

    def __post_init__(self):
        self.shape = self.shape or (self.latent_size, self.latent_size)

    @cached_property
    def alpha_bar(self):
        """Its noise schedule alpha_bar_t, float64 (1000,)."""
        return zero_terminal_snr(alphas_cumprod()) if self.prediction == "v_zsnr" else alphas_cumprod()

    def noise(self, out, x_t, t):
        """The predicted noise, which is the UNet's output or what follows from it; t: (B,) timesteps."""
        if self.prediction == "eps":
            return out
        return eps_from_v(out, x_t, self.alpha_bar.to(x_t.device, x_t.dtype)[t][:, None, None, None])

    @property
    def latent_size(self):
        """Side of the latent of a picture with image_size pixels a side."""
        return self.image_size // 2 ** (len(self.vae.config.widths) - 1)

    def latent_shape(self, width, height):
        """(h, w) of the latent of a picture of width x height pixels. Raises InputError if they do not fit."""
        factor = 2 ** (len(self.vae.config.widths) - 1)
        if width % factor or height % factor:
            raise InputError(f"--size {width}x{height}: expected WIDTHxHEIGHT in pixels, multiples of {factor}, "
                             "because a pixel of this model's latents is that many pixels of the picture")
        return height // factor, width // factor

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Prompts (list of B str) -> context (B, 77, width) for the UNet; of XL with a row more, the pooled text."""
        with visiting(self.text_encoder, self.unet.conv_in.weight.device):
            return self.text_encoder.encode(prompts)


def parse_size(text):
    """The value of --size, WIDTHxHEIGHT in pixels or one number for both: (width, height). Raises InputError."""
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})?", text):
        raise InputError(f"--size {text}: expected WIDTHxHEIGHT in pixels, like 768x512, or one number for both")
    width, _, height = text.partition("x")
    width, height = int(width), int(height or width)
    if max(width, height) > 4096:
        raise InputError(f"--size {text}: expected up to 4096 pixels a side")
    return width, height


def load_stable_diffusion(path=SHIPPED, device="cpu", dtype=torch.float32, prediction="", size=""):
    """Load a model, strictly: every tensor of the file is used or listed in SKIPPED, every parameter is set.

    path: a .safetensors file in the original layout, a diffusers folder, or either on the Hugging Face Hub (fetch());
    dtype: of the networks; None keeps each tensor's own (to save them again, not to run them); prediction: one of
    PREDICTIONS, "": what its files say; size: of the pictures to draw, see parse_size(), "": what it was trained on.
    Raises InputError if it is no such model, or if it predicts something else. The text encoders and the autoencoder of
    XL stay on the CPU; a GPU has them only while they work, see visiting().
    """
    name, path = Path(path).name, fetch(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; {SUPPORTED}")
    sources, constants = (open_folder if path.is_dir() else open_single_file)(path, prediction)
    networks, lines, xl = [], [], "text_2" in sources
    if xl:
        levels = count(sources["vae"], "encoder.down_blocks.%d.resnets.0.conv1.weight")
        constants["pixels"] = 2 ** max(levels - 1, 0)
    for part, tensors in sources.items():
        build = dict(unet=_build_unet, vae=_build_vae).get(part, partial(_build_text, part=part, xl=xl))
        shapes = {name: shape for name, (shape, _) in tensors.items()}
        try:
            with torch.device("meta"):
                network = build(shapes, constants)
        except KeyError as error:
            raise InputError(f"{path}: its {part} has no tensor {shown(error.args[0])}, which Stable Diffusion has; "
                             f"{SUPPORTED}")
        except (IndexError, ValueError, ArithmeticError, RuntimeError):     # too few dimensions, groups that do not fit
            raise InputError(f"{path}: its {part} does not have Stable Diffusion's structure: shapes of tensors, or "
                             f"numbers in its metadata or config.json, do not fit together; {SUPPORTED}")
        wide = xl and part == "vae" and dtype and dtype.itemsize < 4        # XL's overflows in float16
        away = xl and part != "unet" and torch.device(device).type in ("cuda", "mps")
        _assign(network, tensors, path, part, "cpu" if away else device, torch.float32 if wide else dtype)
        networks.append(network.requires_grad_(False).eval())
        lines.append(f"{part} {len(tensors)} tensors, 0 missing, 0 unexpected")
    if match := FEW_STEPS.search(name):
        lines.append(f'by the "{match[0]}" in its name distilled for few steps, while DDPO needs many, each with noise')
    unet, vae, *texts = networks
    model = StableDiffusion(unet, vae, TextEncoders(*texts) if xl else texts[0], image_size=constants["image_size"],
                            report=f"{name}: " + "; ".join(lines), base=base_name(sources["unet"]),
                            prediction=constants["prediction"] or "eps")
    _refuse_misfits(model, path)
    model.shape = model.latent_shape(*parse_size(size)) if size else model.shape
    if not constants["prediction"] and torch.device(device).type != "meta":
        refuse_other_predictions(model, path)
    return model


def base_name(tensors):
    """Names a UNet's weights, so that a LoRA can say what it was trained on: 16 hex digits.

    tensors: {name: (shape, function that loads it)}. The same for a file, a folder, float32 and float16 of one model:
    two layers that every fine-tuning changes are hashed, as float16.
    """
    digest = hashlib.sha256()
    for name in ("conv_out.weight", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"):
        digest.update(tensors[name][1]().to("cpu", torch.float16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _refuse_misfits(model, path):
    """Raise InputError if the networks, each of which is complete, do not work with each other or with their sizes."""
    unet, vae, texts = model.unet.config, model.vae.config, [text.config for text in model.text_encoder.encoders]
    width, pooled = sum(text.width for text in texts), texts[-1].projection
    for fits, what in (
            (unet.context_width == width,
             f"its UNet reads texts as vectors of {unet.context_width} numbers, its text encoder writes {width}"),
            (unet.pooled == pooled <= width,
             f"its UNet reads a pooled text of {unet.pooled} numbers, its text encoder writes {pooled}"),
            (unet.in_channels == unet.out_channels == vae.latent_channels == 4,
             f"its UNet reads {unet.in_channels} channels and writes {unet.out_channels}, its autoencoder has "
             f"{vae.latent_channels}; expected 4"),
            (unet.widths[0] % 2 == 0
             and all(text.width % text.heads == 0 and (text.used or 0) <= text.layers for text in texts)
             and all(unet.heads_at(width) and width % unet.heads_at(width) == 0 for width in unet.widths),
             "the numbers of heads or layers in its metadata or config.json do not fit its tensors"),
            (model.latent_size > 0,
             f"its image size of {model.image_size} pixels is smaller than one pixel of its latents")):
        if not fits:
            raise InputError(f"{path}: {what}; {SUPPORTED}")


@torch.no_grad()
def refuse_other_predictions(model, path):
    """Test a model of which nobody says what it predicts. Raises InputError if it does not seem to be the noise.

    At t = 999, x_t is nearly all noise: a prediction of eps is about x_t, one of v about -x0, which hardly correlates
    with x_t.
    """
    dtypes = {p.dtype for network in (model.unet, model.text_encoder) for p in network.parameters()}
    if len(dtypes) > 1 or min(dtype.itemsize for dtype in dtypes) == 1:     # loaded to be saved again, not to be run
        model = replace(model, unet=copy.deepcopy(model.unet).float(),
                        text_encoder=copy.deepcopy(model.text_encoder).float())
    device, dtype = model.unet.conv_in.weight.device, model.unet.conv_in.weight.dtype
    side = min(model.latent_size, max(32, 2 ** (len(model.unet.config.widths) - 1)))      # a larger one tells no more
    x_t = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    out = model.unet(x_t.to(device, dtype), torch.tensor([999], device=device), model.encode_prompts([""]))
    if not torch.isfinite(out).all():
        raise NotFinite(f"{path}: its UNet's outputs for pure noise")
    correlation = torch.corrcoef(torch.stack([x_t.flatten(), out.float().cpu().flatten()]))[0, 1].item()
    if not correlation >= 0.5:      # also refuses nan, of an output that is the same everywhere
        raise InputError(f"{path}: its UNet's output for pure noise is not that noise (correlation {correlation:.2f}); "
                         "it seems to predict v; say so with --prediction v (or v_zsnr), or that it does predict the "
                         f"noise with --prediction eps; {SUPPORTED}")


def is_small(path):
    """Whether a model is small like the shipped one: trained on pictures of less than SD_SIZE pixels a side.

    path: a model, "" is the shipped one. Only the header of a single file is read; anything else counts as large.
    """
    try:
        with safe_open(path or SHIPPED, framework="pt") as file:
            return int((file.metadata() or {}).get("image_size", CONSTANTS_1["image_size"])) < SD_SIZE
    except Exception:       # a folder or no model; load_stable_diffusion() reports errors
        return False


def save_single_file(path, unet, vae, text_encoder, dtype=torch.float16, image_size=512, prediction="eps", **details):
    """Write the three networks as one safetensors file in the original layout, its constants in the metadata.

    dtype: None keeps each tensor's own; prediction: one of PREDICTIONS; details: JSON values for the metadata, under
    the name ddpo_min. OpenCLIP's projection is left out, but for XL's.
    """
    state = {}
    inverse = {b: a for a, b in layout.unet_prefixes(unet.config.attention, unet.config.layers).items()}
    for name, tensor in unet.state_dict().items():
        state[layout.UNET + layout.rename(name, inverse)] = tensor
    inverse = {b: a for a, b in layout.vae_prefixes(len(vae.config.widths), vae.config.layers).items()}
    for name, tensor in vae.state_dict().items():
        if ".attentions." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]           # the original stores these linear layers as 1x1 convolutions
        state[layout.VAE + layout.rename(name, inverse)] = tensor
    state.update(_original_text(text_encoder))
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    metadata = dict(unet_heads=unet.config.heads, unet_head_width=unet.config.head_width, image_size=image_size,
                    unet_groups=unet.config.groups, vae_groups=vae.config.groups, latent_scale=vae.config.latent_scale,
                    text_used=text_encoder.config.used or 0)
    for part, encoder in zip(("text", "text_2"), text_encoder.encoders):
        metadata.update({f"{part}_heads": encoder.config.heads, f"{part}_openclip": int(encoder.config.openclip)})
    metadata[PREDICTION] = "epsilon" if prediction == "eps" else "v"
    for key, models in V_KEYS.items():
        if prediction in models:
            state[key] = torch.empty(0)
    if details:
        metadata["ddpo_min"] = json.dumps(details)
    with atomic(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", **{k: str(v) for k, v in metadata.items()}})


def _original_text(text_encoder):
    """The text encoder's tensors, or those of XL's two, under a single file's names."""
    if len(text_encoder.encoders) == 2:
        first, second = text_encoder.encoders
        return {**_plain(layout.TEXT_XL, first), **_openclip(layout.OPENCLIP_XL, second)}
    if text_encoder.config.openclip:
        return _openclip(layout.OPENCLIP, text_encoder)
    return _plain(layout.TEXT, text_encoder)


def _plain(prefix, text_encoder):
    """A text encoder's tensors under its own names."""
    return {prefix + name: tensor for name, tensor in text_encoder.state_dict().items()}


def _openclip(prefix, text_encoder):
    """A text encoder's tensors under OpenCLIP's names: q, k and v are one tensor, the projection is transposed."""
    state, config = text_encoder.state_dict(), text_encoder.config
    if config.projection:
        state["text_projection.weight"] = state["text_projection.weight"].T
    for name in [name for name in state if "q_proj." in name]:
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(
            [state.pop(name.replace("q_proj.", f"{part}_proj.")) for part in "qkv"])
    inverse = {b: a for a, b in layout.openclip_prefixes(config.layers).items()}
    return {prefix + layout.rename(name, inverse): tensor for name, tensor in state.items()}


def _build_unet(shapes, constants):
    levels = count(shapes, "down_blocks.%d.resnets.0.conv1.weight")
    return UNet(UNetConfig(
        in_channels=shapes["conv_in.weight"][1], out_channels=shapes["conv_out.weight"][0],
        widths=tuple(shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)),
        attention=tuple(count(shapes, f"down_blocks.{i}.attentions.0.transformer_blocks.%d.norm1.weight")
                        for i in range(levels)),
        middle=count(shapes, "mid_block.attentions.0.transformer_blocks.%d.norm1.weight"),
        layers=count(shapes, "down_blocks.0.resnets.%d.conv1.weight"),
        context_width=shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
        heads=constants["unet_heads"], groups=constants["unet_groups"], head_width=constants["unet_head_width"],
        linear=len(shapes["mid_block.attentions.0.proj_in.weight"]) == 2, pixels=constants.get("pixels", 8),
        pooled=shapes.get("add_embedding.linear_1.weight", (0, 6 * SIZE_FEATURES))[1] - 6 * SIZE_FEATURES))


def _build_vae(shapes, constants):
    levels = count(shapes, "encoder.down_blocks.%d.resnets.0.conv1.weight")
    return VAE(VAEConfig(
        widths=tuple(shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)),
        layers=count(shapes, "encoder.down_blocks.0.resnets.%d.conv1.weight"),
        latent_channels=shapes["post_quant_conv.weight"][0], groups=constants["vae_groups"],
        latent_scale=constants["latent_scale"]))


def _build_text(shapes, constants, part, xl):
    layers = count(shapes, "text_model.encoder.layers.%d.mlp.fc1.weight")
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return TextEncoder(TextConfig(
        vocabulary=vocabulary, width=width, positions=shapes["text_model.embeddings.position_embedding.weight"][0],
        layers=layers, heads=constants[f"{part}_heads"], inner=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        used=layers - 1 if xl else constants["text_used"] or None, openclip=bool(constants[f"{part}_openclip"]),
        norm=not xl, projection=shapes["text_projection.weight"][0] if part == "text_2" else 0))


def _assign(network, tensors, path, part, device, dtype):
    """Set the parameters of a network on the meta device. Raises InputError if a name or shape does not fit."""
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unexpected:
        raise InputError(f"{path}: {part} {len(tensors)} tensors, {len(missing)} missing, {len(unexpected)} "
                         f"unexpected; the first is {shown((missing + unexpected)[0])}; {SUPPORTED}")
    for name, (shape, load) in tensors.items():
        as_linear = len(shape) == 4 and len(wanted[name]) == 2 and shape[2:] == (1, 1)
        if (shape[:2] if as_linear else shape) != wanted[name]:
            raise InputError(f"{path}: {part} tensor {name} has shape {shown(shape)}, expected {wanted[name]}; "
                             f"{SUPPORTED}")
        loaded = load()
        tensor = loaded.reshape(wanted[name]).to(device, dtype)
        if not _finite(tensor):
            raise InputError(f"{path}: {part} tensor {name} " + (
                f"overflows in {dtype}; give another --dtype" if _finite(loaded) else
                "has numbers that are not finite; the file is damaged, or was saved by a training that failed"))
        if tensor.ndim == 4:        # convolutions are faster in this memory format, and their outputs keep it
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def _finite(tensor):
    """Whether all numbers of a tensor are finite; on the meta device, where it has none, True."""
    if tensor.is_meta:
        return True
    tensor = tensor.float() if tensor.itemsize == 1 else tensor     # float8 has no aminmax
    return all(map(math.isfinite, torch.aminmax(tensor)))           # 20 to 90 times faster than isfinite().all()
