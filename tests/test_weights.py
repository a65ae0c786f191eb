"""Loading and saving weights: the real names and shapes, round trips, diffusers folders, wrong files, memory."""
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from open_clip import get_tokenizer
from safetensors.torch import load_file, safe_open, save_file

from conftest import ROOT, noise_through, randomise, their_text, their_unet, their_vae
from ddpo_min import layout
from ddpo_min.files import InputError
from ddpo_min.schedule import alphas_cumprod
from ddpo_min.text import TextConfig, TextEncoder, tokenize
from ddpo_min.unet import UNet, UNetConfig
from ddpo_min.vae import VAE, VAEConfig
from ddpo_min.weights import _original_text, load_stable_diffusion, save_single_file

DATA = Path(__file__).parent / "data"

# Three levels, and no size or constant as in Stable Diffusion, so that each must be read from the file.
UNET = UNetConfig(widths=(8, 16, 24), attention=(True, False, True), layers=2, context_width=16, heads=2, groups=4)
VAE_ = VAEConfig(widths=(4, 8, 12), layers=1, groups=2, latent_scale=0.25)
TEXT = TextConfig(vocabulary=60, positions=10, width=16, layers=3, heads=4, inner=24)

# The structure and so the names of Stable Diffusion 1.x, with fewer channels.
NARROW = (UNetConfig(widths=(32, 64, 96, 96), context_width=24), VAEConfig(widths=(32, 64, 96, 96)),
          TextConfig(width=24, inner=48))

# Like Stable Diffusion 2.x: small; with its real sizes; with its names and constants but fewer channels.
SMALL_2 = (UNetConfig(widths=(8, 16, 24), attention=(True, False, True), context_width=16, groups=4, head_width=4,
                      linear=True),
           VAE_, TextConfig(positions=10, width=16, layers=3, heads=4, inner=24, used=2, openclip=True))
REAL_2 = (UNetConfig(context_width=1024, head_width=64, linear=True), VAEConfig(),
          TextConfig(width=1024, layers=24, heads=16, inner=4096, used=23, openclip=True))
NARROW_2 = (UNetConfig(widths=(64, 128, 64, 64), context_width=32, head_width=64, linear=True), NARROW[1],
            TextConfig(width=32, layers=24, heads=16, inner=48, used=23, openclip=True))


def networks(unet=UNET, vae=VAE_, text=TEXT, dtype=torch.float32):
    """The three networks with random weights."""
    return tuple(randomise(network, i).to(dtype) for i, network in enumerate((UNet(unet), VAE(vae), TextEncoder(text))))


def loaded(model):
    """The networks of a loaded model in the order of networks()."""
    return model.unet, model.vae, model.text_encoder


def real_layout(part):
    """{name: shape} of a network in a real Stable Diffusion 1.x file, without the prefix."""
    return read_layout(f"sd15_{part}.txt")


def read_layout(file):
    lines = [line.split(" ") for line in (DATA / file).read_text().splitlines() if line[0] != "#"]
    return {name: tuple(map(int, "".join(shape).split(","))) if shape else () for name, *shape in lines}


def real_layout_2(part):
    """The same of 2.x; its data files have only what differs in the UNet, and one text encoder layer for all."""
    if part == "text":
        return {name.replace("*", str(i)): shape for name, shape in read_layout("sd2_text.txt").items()
                for i in range(24 if "*" in name else 1)}
    return {**real_layout(part), **(read_layout("sd2_unet.txt") if part == "unet" else {})}


def edit(source, target, change, metadata=True):
    """Copy a safetensors file, with its {name: tensor} changed in place by `change`; returns the new path."""
    state = load_file(source)
    change(state)
    with safe_open(source, "pt") as file:
        save_file(state, target, metadata=file.metadata() if metadata else None)
    return target


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """A small random model in the original layout."""
    path = tmp_path_factory.mktemp("single") / "small.safetensors"
    save_single_file(path, *networks(), dtype=torch.float32, image_size=48)
    return path


# ---- names and shapes

@pytest.mark.parametrize("part, build, count", [
    ("unet", UNet, 859_520_964), ("vae", VAE, 83_653_863), ("text", TextEncoder, 123_060_480)])
def test_default_sizes_are_stable_diffusion_1(part, build, count):
    """All names and shapes of a real file, after renaming, and the known number of parameters; needs no memory."""
    with torch.device("meta"):
        network = build()
    pairs = dict(unet=layout.unet_prefixes((True, True, True, False), 2), vae=layout.vae_prefixes(4, 2),
                 text={"": "text_model"})[part]
    inverse = {ours: original for original, ours in pairs.items()}
    shapes = {layout.rename(name, inverse).lstrip("."): tuple(p.shape) for name, p in network.named_parameters()}
    if part == "vae":       # its attention is stored as 1x1 convolutions
        shapes = {name: s + (1, 1) if ".attn_1." in name and len(s) == 2 else s for name, s in shapes.items()}
    assert shapes == real_layout(part)
    assert sum(p.numel() for p in network.parameters()) == count


def test_the_sizes_of_stable_diffusion_2_give_its_names_and_shapes():
    """As above; the text encoder without its projection. diffusers has the same numbers of parameters."""
    with torch.device("meta"):
        unet, text = UNet(REAL_2[0]), TextEncoder(REAL_2[2])
    inverse = {ours: original for original, ours in layout.unet_prefixes(unet.config.attention, 2).items()}
    shapes = {layout.rename(name, inverse): tuple(p.shape) for name, p in unet.named_parameters()}
    assert shapes == real_layout_2("unet")
    shapes = {name.removeprefix("cond_stage_model.model."): tuple(p.shape) for name, p in _original_text(text).items()}
    assert shapes == {n: s for n, s in real_layout_2("text").items() if n not in ("text_projection", "logit_scale")}
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724
    used_layers = [p.numel() for n, p in text.named_parameters() if ".layers.23." not in n]
    assert sum(used_layers) == 340_387_840


def test_saved_file_has_the_names_of_a_real_one(tmp_path):
    """A model of Stable Diffusion's structure with fewer channels: the same names and numbers of dimensions."""
    save_single_file(tmp_path / "narrow.safetensors", *networks(*NARROW))
    ours = {name: tensor.ndim for name, tensor in load_file(tmp_path / "narrow.safetensors").items()}
    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
                "text": "cond_stage_model.transformer.text_model."}
    assert ours == {prefix + name: len(shape) for part, prefix in prefixes.items()
                    for name, shape in real_layout(part).items()}


@pytest.mark.parametrize("unet, vae", [NARROW[:2], (UNET, VAE_)])
def test_layout_pairs_the_names_as_diffusers_does(tmp_path, unet, vae):
    """diffusers' own converter gives our networks from our single file: no two tensors of equal shape are swapped."""
    from diffusers.loaders import single_file_utils as theirs
    parts = networks(unet, vae)
    save_single_file(tmp_path / "a.safetensors", *parts, dtype=torch.float32)
    state = load_file(tmp_path / "a.safetensors")
    levels = dict(down_block_types=vae.widths, up_block_types=vae.widths)       # only their number counts
    for ours, converted in (
            (parts[0], theirs.convert_ldm_unet_checkpoint(dict(state), {"layers_per_block": unet.layers})),
            (parts[1], theirs.convert_ldm_vae_checkpoint(dict(state), levels))):
        assert converted.keys() == ours.state_dict().keys()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(converted[name].reshape(tensor.shape), tensor), name


# ---- single files

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_bit_identical(tmp_path, dtype):
    path, before = tmp_path / "model.safetensors", networks()
    save_single_file(path, *before, dtype=dtype)
    for wanted in (dtype, torch.float32):
        for old, new in zip(before, loaded(load_stable_diffusion(path, dtype=wanted)), strict=True):
            state = new.state_dict()
            assert state.keys() == old.state_dict().keys()
            for name, tensor in old.state_dict().items():
                assert state[name].dtype == wanted
                assert torch.equal(state[name], tensor.to(dtype).to(wanted)), name


def test_sizes_come_from_shapes_and_metadata(single_file):
    """Configurations are the saved ones; networks are frozen; the report has the number of each part's tensors."""
    model = load_stable_diffusion(single_file)
    assert (model.unet.config, model.vae.config, model.text_encoder.config) == (UNET, VAE_, TEXT)
    assert (model.image_size, model.latent_size) == (48, 12)
    assert not any(p.requires_grad for network in loaded(model) for p in network.parameters())
    assert not any(network.training for network in loaded(model))
    counts = [len(network.state_dict()) for network in networks()]
    for part, count in zip(("unet", "vae", "text"), counts, strict=True):
        assert f"{part} {count} tensors, 0 missing, 0 unexpected" in model.report
    assert "\n" not in model.report


def test_without_metadata_the_constants_are_stable_diffusion_1s(tmp_path):
    """Files of other programs have none: 8 heads, 32 groups, 12 heads in the text encoder, 0.18215, 512 pixels."""
    unet, vae, text = networks(*NARROW)
    save_single_file(tmp_path / "a.safetensors", noise_through(unet), vae, text)
    path = edit(tmp_path / "a.safetensors", tmp_path / "b.safetensors", lambda state: None, metadata=False)
    model = load_stable_diffusion(path)
    assert (model.unet.config, model.vae.config, model.text_encoder.config) == NARROW
    assert (model.unet.config.heads, model.unet.config.groups, model.vae.config.groups) == (8, 32, 32)
    assert (model.text_encoder.config.heads, model.vae.config.latent_scale, model.image_size) == (12, 0.18215, 512)


# ---- Stable Diffusion 2.x in a single file

@pytest.mark.parametrize("layers, used", [(3, 2), (2, None)])
def test_round_trip_of_stable_diffusion_2(tmp_path, layers, used):
    """Configurations and all bits are the saved ones, also of a layer that is not used; float16 and float32."""
    path, text = tmp_path / "model.safetensors", replace(SMALL_2[2], layers=layers, used=used, vocabulary=60)
    configs = (*SMALL_2[:2], text)
    before = networks(*configs)
    for dtype in (torch.float32, torch.float16):
        save_single_file(path, *before, dtype=dtype)
        model = load_stable_diffusion(path, dtype=dtype)
        assert tuple(network.config for network in loaded(model)) == configs
        for old, new in zip(before, loaded(model), strict=True):
            state = new.state_dict()
            assert old.state_dict().keys() == state.keys()
            assert all(torch.equal(tensor.to(dtype), state[name]) for name, tensor in old.state_dict().items())


def test_openclips_own_tower_gives_the_context_of_a_2x_file(tmp_path):
    """A file with OpenCLIP's whole state dict, against the output of its ln_final without the last block."""
    from open_clip.model import CLIP
    unet, vae, text = SMALL_2
    theirs = randomise(CLIP(
        12, dict(image_size=8, patch_size=4, width=8, layers=1, head_width=4),
        dict(context_length=77, vocab_size=49408, width=text.width, heads=text.heads, layers=text.layers,
             mlp_ratio=1.5)))
    save_single_file(tmp_path / "a.safetensors", *networks(*SMALL_2), dtype=torch.float64)

    def put_openclip(state):
        remove("cond_stage_model.")(state)
        state.update({f"cond_stage_model.model.{name}": tensor for name, tensor in theirs.state_dict().items()
                      if not name.startswith("visual.")})
        state["cond_stage_model.model.attn_mask"] = torch.zeros(77, 77)     # old files have it

    path = edit(tmp_path / "a.safetensors", tmp_path / "b.safetensors", put_openclip)
    assert {"cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"} <= load_file(path).keys()
    kept = []
    theirs.ln_final.register_forward_hook(lambda module, given, output: kept.append(output))
    theirs.transformer.resblocks = theirs.transformer.resblocks[:-1]
    prompts = ["a fox", "two dogs on the moon", ""]
    theirs.encode_text(get_tokenizer("ViT-H-14")(prompts))
    ours = load_stable_diffusion(path, dtype=torch.float64).encode_prompts(prompts)
    assert ours.shape == (3, 77, 16) and kept[0].abs().max() > 0.1
    assert (ours - kept[0]).abs().max() < 1e-9


def test_without_metadata_the_constants_of_a_2x_file_are_stable_diffusion_2s(tmp_path):
    """Names are those of a real file; heads have width 64, 16 in the text encoder, of which 23 layers are used."""
    unet, vae, text = networks(*NARROW_2)
    save_single_file(tmp_path / "a.safetensors", noise_through(unet), vae, text)
    path = edit(tmp_path / "a.safetensors", tmp_path / "b.safetensors", lambda state: None, metadata=False)
    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.model."}
    names = {prefix + name: len(shape) for part, prefix in prefixes.items()
             for name, shape in real_layout_2(part).items() if name not in ("text_projection", "logit_scale")}
    assert {name: tensor.ndim for name, tensor in load_file(path).items()} == names
    model = load_stable_diffusion(path)
    assert (model.unet.config, model.vae.config, model.text_encoder.config) == NARROW_2
    assert model.image_size == 512


@pytest.mark.parametrize("factor, says, words", [
    (1, "", []), (1, "epsilon", []), (-1, "epsilon", []), (1, "x0", ["predicts x0, neither epsilon"]),
    (-1, "", ["output for pure noise", "correlation -1.00", "seems to predict v"]),
    (0, "", ["output for pure noise", "seems to predict v"])])
@pytest.mark.parametrize("configs", [(UNET, VAE_, replace(TEXT, vocabulary=49408)), SMALL_2], ids=["1.x", "2.x"])
def test_a_model_that_says_or_seems_to_predict_something_else_is_refused(tmp_path, configs, factor, says, words):
    """By its metadata or, without it, by its UNet's output for pure noise: here the noise times `factor`."""
    unet, vae, text = networks(*configs)
    noise_through(unet).conv_out.weight.mul_(factor)
    save_single_file(tmp_path / "a.safetensors", unet, vae, text, image_size=64)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = {**file.metadata(), "modelspec.prediction_type": says}
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata)
    if words:
        assert_refused(tmp_path / "b.safetensors", [SUPPORTED, *words])
    else:
        load_stable_diffusion(tmp_path / "b.safetensors")


@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_no_header_length_is_taken_for_a_pickle(single_file, tmp_path, start):
    """A safetensors file begins with its header's length, which can have the first bytes of a pickle or a zip."""
    path, content = tmp_path / "model.safetensors", single_file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    longer = next(n for n in range(length, length + 2 ** 17) if n.to_bytes(8, "little").startswith(start))
    padding = b" " * (longer - length)      # the format allows spaces after the header
    path.write_bytes(longer.to_bytes(8, "little") + content[8:8 + length] + padding + content[8 + length:])
    assert load_stable_diffusion(path).report == load_stable_diffusion(single_file).report.replace(
        single_file.name, path.name)


def add_training_leftovers(state):
    """What full training checkpoints have besides the weights."""
    zeros = torch.zeros(1000)
    state["alphas_cumprod"] = alphas_cumprod().float()
    state.update({name: zeros.clone() for name in (
        "betas", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar",
        "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2")})
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(10)[None]
    state["model_ema.decay"], state["model_ema.num_updates"] = torch.tensor(0.9999), torch.tensor(7)
    for name in [name for name in state if name.startswith("model.diffusion_model.")]:
        state["model_ema." + name[len("model."):].replace(".", "")] = torch.zeros_like(state[name])


def drop_text_infix(state):
    """Rename the text encoder's tensors as some tools do."""
    for name in [name for name in state if ".text_model." in name]:
        state[name.replace(".text_model.", ".")] = state.pop(name)


@pytest.mark.parametrize("change", [add_training_leftovers, drop_text_infix])
def test_variants_of_the_file_load_the_same(single_file, tmp_path, change):
    path = edit(single_file, tmp_path / "variant.safetensors", change)
    assert load_file(path).keys() != load_file(single_file).keys()
    models = load_stable_diffusion(single_file), load_stable_diffusion(path)
    for a, b in zip(*map(loaded, models), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- diffusers folders

def old_attention_names(folder):
    """Give the autoencoder's attention the names of diffusers before 0.15."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for name in [name for name in state if ".attentions.0.to_" in name]:
        old = name
        for a, b in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            old = old.replace(a, b)
        state[old] = state.pop(name)
    assert any(name.endswith("attentions.0.proj_attn.weight") for name in state)
    save_file(state, path)


@pytest.mark.parametrize("variant", ["plain", "fp16", "old names", "2.x"])
def test_diffusers_folder_gives_the_outputs_of_diffusers(tmp_path, variant):
    """Saved by diffusers' save_pretrained; the constants are in the config.json files, none is the default."""
    text = TextConfig(width=16, layers=2, heads=4, inner=24, openclip=variant == "2.x")
    unet = SMALL_2[0] if variant == "2.x" else UNET
    theirs = [their_unet(unet, sample_size=8), their_vae(VAE_), their_text(text)]
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        tmp_path / "scheduler")
    for network, folder in zip(theirs, ("unet", "vae", "text_encoder"), strict=True):
        if variant == "fp16":
            network.half().save_pretrained(tmp_path / folder, variant="fp16")
            network.double()        # the values stay float16's
        else:
            network.save_pretrained(tmp_path / folder)
    if variant == "old names":
        old_attention_names(tmp_path)
    model = load_stable_diffusion(tmp_path, dtype=torch.float64)
    assert (model.unet.config, model.vae.config, model.text_encoder.config) == (unet, VAE_, text)
    assert (model.image_size, model.latent_size) == (32, 8)

    torch.manual_seed(1)
    prompts, t = ["a fox", "two dogs on the moon"], torch.tensor([721, 3])
    latent, image = torch.randn(2, 4, 8, 4, dtype=torch.float64), torch.rand(2, 3, 8, 16, dtype=torch.float64)
    context = model.encode_prompts(prompts)
    assert context.shape == (2, 77, 16)
    pairs = [(context, theirs[2](tokenize(prompts, padding=text.padding)).last_hidden_state),
             (model.unet(latent, t, context), theirs[0](latent, t, context).sample),
             (model.vae.moments(image)[0], theirs[1].encode(image).latent_dist.mean),
             (model.vae.decode(latent), theirs[1].decode(latent / VAE_.latent_scale).sample)]
    for ours, other in pairs:
        assert other.abs().max() > 0.01
        assert (ours - other).abs().max() < 1e-9


# ---- wrong files

FIRST_CONV = "model.diffusion_model.input_blocks.0.0.weight"
DEEP = "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.2.weight"
VAE_CONV = "first_stage_model.decoder.up.1.block.0.conv2.bias"
SUPPORTED = "supported: Stable Diffusion 1.x"


def rename_all(state, old, new):
    for name in [name for name in state if name.startswith(old)]:
        state[new + name[len(old):]] = state.pop(name)


def remove(*starts):
    def change(state):
        for name in [name for name in state if name.startswith(starts)]:
            del state[name]
    return change


def put(name, *shape):
    return lambda state: state.update({name: torch.zeros(shape)})


@pytest.mark.parametrize("change, words", [
    (put("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", 4, 8), ["a LoRA", "--lora"]),
    (put(FIRST_CONV, 8, 9, 3, 3), ["9 input channels", "inpainting"]),
    (put("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", 8), ["without its autoencoder"]),
    (put("cond_stage_model.model.ln_final.bias", 8), ["the text encoders of two models"]),
    (remove("first_stage_model."), ["without its autoencoder"]),
    (remove("cond_stage_model."), ["without its autoencoder or text encoder"]),
    (remove("model.", "cond_stage_model."), ["first tensor is first_stage_model.decoder.conv_in.bias"]),
    (remove(""), ["first tensor is missing"]),
    (lambda state: rename_all(state, "model.diffusion_model.", "down_blocks."), ["network of a diffusers folder"]),
    (remove(DEEP), ["1 missing", "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"]),
    (remove(VAE_CONV), ["1 missing", "decoder.up_blocks.1.resnets.0.conv2.bias"]),
    (put("model.diffusion_model.extra.weight", 3), ["1 unexpected", "extra.weight"]),
    (put("first_stage_model.extra.weight", 3), ["1 unexpected", "extra.weight"]),
    (put("something.else", 3), ["1 unexpected", "something.else"]),
    (put(DEEP, 24, 5), ["(24, 5)", "(24, 96)", "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"]),
    (put(VAE_CONV, 3), ["(3,)", "(8,)", "decoder.up_blocks.1.resnets.0.conv2.bias"]),
])
def test_wrong_contents_are_named_in_one_line(single_file, tmp_path, change, words):
    path = edit(single_file, tmp_path / "wrong.safetensors", change)
    assert_refused(path, [SUPPORTED, *words])


def test_any_missing_tensor_or_wrong_shape_is_an_input_error(tiny_file, tmp_path):
    """One weight of each kind is removed, or has one dimension too many: each time the error is one line."""
    state, path = load_file(tiny_file), tmp_path / "wrong.safetensors"
    state = {name: tensor[:9] if "token_embedding" in name else tensor for name, tensor in state.items()}
    kinds = {re.sub(r"\d+", "#", name): name for name in state if name.endswith("weight")}
    for name in kinds.values():
        for wrong in ({}, {name: state[name][None].clone()}):
            save_file({n: t for n, t in state.items() if n != name} | wrong, path)
            assert_refused(path, [SUPPORTED])


def missing(folder, single):
    return folder / "nowhere.safetensors"


def truncated(folder, single):
    path = folder / "cut.safetensors"
    path.write_bytes(single.read_bytes()[:-1000])
    return path


def cut_header(folder, single):
    path = folder / "cut.safetensors"
    path.write_bytes(single.read_bytes()[:100])
    return path


def text(folder, single):
    path = folder / "model.safetensors"
    path.write_text("<html>\n<body>Access denied</body>\n</html>\n" * 20)
    return path


def empty(folder, single):
    path = folder / "model.safetensors"
    path.touch()
    return path


def pickled(folder, single):
    path = folder / "model.ckpt"
    torch.save({"state_dict": {}}, path)
    return path


def pickle_renamed(folder, single):
    return pickled(folder, single).rename(folder / "model.safetensors")


def empty_folder(folder, single):
    return folder


def diffusers_folder(folder, single, **unet_config):
    """A folder with the three files, but without the tensors of Stable Diffusion in them."""
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                       ("text_encoder", "model")):
        (folder / part).mkdir()
        channels = unet_config.get("in_channels", 4)
        save_file({"conv_in.weight": torch.zeros(8, channels, 3, 3)}, folder / part / f"{stem}.safetensors")
    (folder / "unet" / "config.json").write_text(json.dumps(unet_config))
    return folder


def folder_with_pickles(folder, single):
    (diffusers_folder(folder, single) / "vae" / "diffusion_pytorch_model.safetensors").rename(
        folder / "vae" / "diffusion_pytorch_model.bin")
    return folder


def folder_with_broken_config(folder, single):
    (diffusers_folder(folder, single) / "unet" / "config.json").write_text('{"a": 1,\n')
    return folder


def inpainting_folder(folder, single):
    return diffusers_folder(folder, single, in_channels=9)


def folder_of_uneven_heads(folder, single):
    return diffusers_folder(folder, single, attention_head_dim=[5, 10, 10, 20])


def folder_of_broken_heads(folder, single):
    return diffusers_folder(folder, single, attention_head_dim=["5"])


def folder_that_predicts_x_0(folder, single):
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "sample"}')
    return diffusers_folder(folder, single)


def sdxl_folder_without_its_second_text_encoder(folder, single):
    return diffusers_folder(folder, single, addition_embed_type="text_time")


@pytest.mark.parametrize("make, words", [
    (missing, ["no such file or folder", SUPPORTED]),
    (truncated, ["not a complete safetensors file", "download it again"]),
    (cut_header, ["not a complete safetensors file", "download it again"]),
    (text, ["not a complete safetensors file", "download it again"]),
    (empty, ["not a complete safetensors file", "download it again"]),
    (pickled, ["pickled checkpoint", "convert it to .safetensors"]),
    (pickle_renamed, ["pickled checkpoint", "convert it to .safetensors"]),
    (empty_folder, ["a folder without unet/", SUPPORTED]),
    (folder_with_pickles, ["vae/diffusion_pytorch_model.safetensors", "found diffusion_pytorch_model.bin", SUPPORTED]),
    (folder_with_broken_config, ["unet/config.json", "not a JSON object"]),
    (inpainting_folder, ["9 input channels", SUPPORTED]),
    (folder_of_uneven_heads, ["heads have different widths", SUPPORTED]),
    (folder_of_broken_heads, ["attention_head_dim ['5']", SUPPORTED]),
    (folder_that_predicts_x_0, ["predicts sample, neither epsilon", SUPPORTED]),
    (sdxl_folder_without_its_second_text_encoder, ["text_encoder_2/model.safetensors", "is missing", SUPPORTED]),
    (diffusers_folder, ["its unet has no tensor", "which Stable Diffusion has", SUPPORTED]),
])
def test_wrong_paths_are_named_in_one_line(single_file, tmp_path, make, words):
    assert_refused(make(tmp_path, single_file), words)


def assert_refused(path, words):
    """Loading raises InputError, one line with the path and the words."""
    with pytest.raises(InputError) as caught:
        load_stable_diffusion(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in [str(path), *words]:
        assert word in message, message


# ---- memory

def test_loading_initialises_no_weights(single_file, monkeypatch):
    """Networks are built on the meta device, where random initial values cost no time."""
    devices, original = set(), torch.nn.init.kaiming_uniform_
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_",
                        lambda tensor, *a, **k: devices.add(tensor.device.type) or original(tensor, *a, **k))
    load_stable_diffusion(single_file)
    assert devices == {"meta"}


MEASURE = """
import sys
import torch
from ddpo_min.weights import load_stable_diffusion

def memory(key):        # kB; not ru_maxrss, which a child process inherits
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

with torch.device("meta"):      # the first embedding built there imports about 150 MB of torch code
    torch.nn.Embedding(1, 1)
before = memory("VmRSS:")
model = load_stable_diffusion(sys.argv[1])
total = sum(p.sum().item() for part in (model.unet, model.vae, model.text_encoder) for p in part.parameters())
print(memory("VmHWM:") - before, total)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_peaks_at_little_more_than_the_weights(tmp_path):
    """Nothing is in memory twice: a 200 MB float32 file, loaded and read once, takes less than 1.65 times its size.

    Convolutions are copied into another memory format, and the mapped pages of their file still count.
    """
    with torch.device("meta"):
        parts = UNet(UNetConfig(widths=(128, 256, 416), attention=(False, True, True), layers=1,
                                context_width=TEXT.width)), VAE(VAE_), TextEncoder(TEXT)
    parts = [part.to_empty(device="cpu").requires_grad_(False) for part in parts]
    for parameter in (p for part in parts for p in part.parameters()):
        parameter.fill_(0.5)
    path = tmp_path / "large.safetensors"
    save_single_file(path, *parts, dtype=torch.float32)
    size = path.stat().st_size
    assert size > 150e6
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    grown, total = done.stdout.split()
    assert float(total) == pytest.approx(0.5 * sum(p.numel() for part in parts for p in part.parameters()))
    assert 0.5 * size < int(grown) * 1024 < 1.65 * size
