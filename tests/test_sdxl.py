"""Stable Diffusion XL: networks, files, pictures, gradients, LoRAs, against diffusers and transformers in float64."""
import gzip
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train
from conftest import cut, randomise, their_text, their_unet, their_vae
from ddpo_min import bench, device, layout, weights
from ddpo_min import vae as vae_module
from ddpo_min.cli import make_settings
from ddpo_min.ddim import ddim_steps
from ddpo_min.files import InputError
from ddpo_min.interchange import export_lora, kohya_form, kohya_name, lora_modules, write_lora
from ddpo_min.lora import add_lora, load_loras
from ddpo_min.policy import Policy
from ddpo_min.rollout import sample_noise, sample_trajectories
from ddpo_min.settings import Settings
from ddpo_min.text import TextConfig, TextEncoder, TextEncoders, tokenize
from ddpo_min.unet import UNet, UNetConfig
from ddpo_min.vae import VAE, VAEConfig
from ddpo_min.weights import _original_text, load_stable_diffusion, save_single_file
from diffusers_side import diffusers_policy
from test_interchange import assert_same_file, header
from test_train import arguments, metrics
from test_weights import read_layout
from xl_shaped import xl_shaped

# Small, with a different number wherever XL has the same one twice
UNET = UNetConfig(widths=(16, 32, 48), attention=(0, 1, 2), middle=2, context_width=40, groups=8, head_width=8,
                  linear=True, pooled=20, pixels=2)
VAE_ = VAEConfig(widths=(8, 16), layers=1, groups=4, latent_scale=0.13025)
TEXT = TextConfig(width=16, layers=3, heads=2, inner=32, used=2, norm=False)
TEXT_2 = TextConfig(width=24, layers=4, heads=3, inner=48, used=3, openclip=True, norm=False, projection=20)
REAL = UNetConfig(widths=(320, 640, 1280), attention=(0, 2, 10), middle=10, context_width=2048, head_width=64,
                  linear=True, pooled=1280)
REAL_TEXT = TextConfig(used=11, norm=False)
REAL_TEXT_2 = TextConfig(width=1280, layers=32, heads=20, inner=5120, used=31, openclip=True, norm=False,
                         projection=1280)
PROMPTS = ["a fox", "wait, two dogs on the moon", "one two three four " * 40]
pytestmark = pytest.mark.usefixtures("plain_curve")


def networks(dtype=torch.float64):
    """The small UNet, autoencoder and pair of text encoders, random and frozen."""
    unet, vae, *texts = (randomise(network, i).to(dtype) for i, network in enumerate(
        (UNet(UNET), VAE(VAE_), TextEncoder(TEXT), TextEncoder(TEXT_2))))
    return unet, vae, TextEncoders(*texts)


def their_networks(ours):
    """diffusers' and transformers' networks with the weights of these: (unet, vae, text encoder, text encoder 2)."""
    unet, vae, texts = ours
    theirs = their_unet(UNET, sample_size=8), their_vae(VAE_), their_text(TEXT), their_text(TEXT_2)
    for network, own in zip(theirs, (unet, vae, *texts.encoders), strict=True):
        state = own.state_dict()
        prefix = "" if state.keys() == network.state_dict().keys() else "text_model."     # transformers 5 leaves it out
        network.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return theirs


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """transformers' tokenizers of XL, built from the merges in open_clip: they pad with the end mark and with "!"."""
    import open_clip.tokenizer
    from transformers import CLIPTokenizer
    folder, ours = tmp_path_factory.mktemp("tokenizer"), open_clip.tokenizer.SimpleTokenizer()
    (folder / "vocab.json").write_text(json.dumps(
        {{"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(word, word): i
         for word, i in ours.encoder.items()}))
    lines = gzip.open(open_clip.tokenizer.default_bpe(), "rt", encoding="utf-8").read().split("\n")
    merges = ["#version: 0.2", *lines[1:49152 - 256 - 2 + 1]]
    (folder / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    return [CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=pad, model_max_length=77)
            for pad in ("<|endoftext|>", "!")]


def make_pipeline(tokenizers):
    """diffusers' pipeline with the weights of networks(), in float64."""
    unet, vae, *texts = their_networks(networks())
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading")
    pipe = StableDiffusionXLPipeline(vae, *texts, *tokenizers, unet, scheduler, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipeline(tokenizers):
    """The same, made once."""
    return make_pipeline(tokenizers)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    """What diffusers writes of it."""
    path = tmp_path_factory.mktemp("sdxl") / "folder"
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The small model as a single file."""
    path = tmp_path_factory.mktemp("sdxl") / "small.safetensors"
    save_single_file(path, *networks(), dtype=torch.float64, image_size=16)
    return path


def assert_same(ours, theirs, atol=1e-9):
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# ---- networks

def unet_input(unet=UNET):
    """Three rectangular latents at three different timesteps, their tokens and pooled texts."""
    torch.manual_seed(1)
    x_t, t = torch.randn(3, 4, 8, 12, dtype=torch.float64), torch.tensor([981, 0, 341])
    return x_t, t, torch.randn(3, 7, unet.context_width).double(), torch.randn(3, unet.pooled).double()


def test_the_unet_is_diffusers_with_the_pooled_text_and_the_size_of_the_picture():
    """A latent of 8 x 12 is a picture of 16 x 24 pixels here: original size, corner of the crop, target size."""
    ours, (x_t, t, tokens, pooled) = networks()[0], unet_input()
    theirs = their_networks(networks())[0]
    context = torch.cat([tokens, torch.nn.functional.pad(pooled, (0, 20))[:, None]], dim=1)
    sizes = torch.tensor([[16, 24, 0, 0, 16, 24]] * 3)
    wanted = theirs(x_t, t, tokens, added_cond_kwargs=dict(text_embeds=pooled, time_ids=sizes)).sample
    assert_same(ours(x_t, t, context), wanted)
    other = theirs(x_t, t, tokens, added_cond_kwargs=dict(text_embeds=pooled, time_ids=sizes.flip(1))).sample
    assert (other - wanted).abs().max() > 1e-3


def test_checkpointing_gives_the_same_gradient():
    x_t, t, tokens, pooled = unet_input()
    context, gradients = torch.cat([tokens, torch.nn.functional.pad(pooled, (0, 20))[:, None]], dim=1), []
    for checkpointing in (False, True):
        unet = networks()[0].requires_grad_(True)
        unet.checkpointing = checkpointing
        unet(x_t, t, context).square().sum().backward()
        gradients.append([p.grad for p in unet.parameters()])
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*gradients, strict=True))


def test_the_text_encoders_are_transformers(pipeline):
    """Hidden states before the last layer, side by side; the pooled text in a row of its own; each its padding."""
    ours = networks()[2].encode([*PROMPTS, ""])
    _, _, *texts = their_networks(networks())
    states, pooled = [], None
    for text, tokenizer in zip(texts, (pipeline.tokenizer, pipeline.tokenizer_2), strict=True):
        ids = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        out = text(ids, output_hidden_states=True)
        states.append(out.hidden_states[-2])
        pooled = out.text_embeds if "text_embeds" in out else None
    assert ours.shape == (4, 78, 40)
    assert_same(ours[:3, :77], torch.cat(states, dim=2))
    assert_same(ours[:3, 77, :20], pooled)
    assert (ours[:3, 77, 20:] == 0).all() and (ours[3] == 0).all()
    assert tokenize(["a fox"], padding=TEXT_2.padding)[0, 4:].eq(0).all() and TEXT.padding == 49407


def test_the_second_text_encoder_of_a_file_is_open_clips_own(file, tmp_path):
    """Its whole state dict under the file's names: the pooled text is that of encode_text, projected to another width.

    Also of "!", the second encoder's padding: transformers takes it for padding within a text, too, open_clip does not.
    """
    from open_clip import get_tokenizer
    from open_clip.model import CLIP
    theirs = randomise(CLIP(20, dict(image_size=8, patch_size=4, width=8, layers=1, head_width=4),
                            dict(context_length=77, vocab_size=49408, width=24, heads=3, layers=4, mlp_ratio=2.0)))
    state = {name: t for name, t in load_file(file).items() if not name.startswith("conditioner.embedders.1.")}
    state.update({f"conditioner.embedders.1.model.{name}": tensor.contiguous() for name, tensor in
                  theirs.state_dict().items() if not name.startswith("visual.")})
    state["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    assert "conditioner.embedders.1.model.logit_scale" in state
    save_file(state, tmp_path / "a.safetensors", {"image_size": "16", "unet_head_width": "8", "unet_groups": "8",
                                                  "vae_groups": "4", "text_heads": "2", "text_2_heads": "3",
                                                  "modelspec.prediction_type": "epsilon"})
    model = load_stable_diffusion(tmp_path / "a.safetensors", dtype=torch.float64)
    kept, prompts = [], ["a fox", "wait! two dogs on the moon!", PROMPTS[2]]
    theirs.transformer.resblocks[2].register_forward_hook(lambda module, given, output: kept.append(output))
    pooled, ours = theirs.encode_text(get_tokenizer("ViT-bigG-14")(prompts)), model.encode_prompts(prompts)
    assert_same(ours[:, :77, 16:], kept[0])
    assert_same(ours[:, 77, :20], pooled)


# ---- names and shapes of the real file

def real_layout(data, prefix):
    """{name: shape} of a part of a real file; *N in the data file stands for 0 to N - 1."""
    found = {}
    for name, shape in read_layout(data).items():
        star = re.search(r"\*(\d+)", name)
        for i in range(int(star[1])) if star else [0]:
            found[prefix + (name.replace(star[0], str(i)) if star else name)] = shape
    return found


def real_file():
    """{name: shape} of a real file of XL, without the buffer position_ids."""
    return {**real_layout("sdxl_unet.txt", layout.UNET), **real_layout("sd15_vae.txt", layout.VAE),
            **real_layout("sd15_text.txt", layout.TEXT_XL + "text_model."),
            **real_layout("sdxl_text_2.txt", layout.OPENCLIP_XL)}


class Header:
    """An open safetensors file of which only names and shapes are there."""

    def __init__(self, shapes):
        self.shapes = shapes

    def keys(self):
        return list(self.shapes)

    def metadata(self):
        return {}

    def get_tensor(self, name):
        return torch.empty(self.shapes[name], dtype=torch.float16, device="meta")

    def get_slice(self, name):
        return Slice(self.get_tensor(name))


class Slice:
    """What such a file says of a tensor before it is read."""

    def __init__(self, tensor):
        self.get_shape, self.get_dtype, self.tensor = lambda: tensor.shape, lambda: "F16", tensor

    def __getitem__(self, rows):
        return self.tensor[rows]


def test_a_file_with_the_names_and_shapes_of_the_real_one_is_loaded(tmp_path, monkeypatch):
    """Every one of its 2,514 tensors, and every parameter of the networks."""
    real, path = real_file(), tmp_path / "xl.safetensors"
    assert len(real) == 1680 + 248 + 196 + 390
    path.touch()
    monkeypatch.setattr("ddpo_min.checkpoint.open_safetensors", lambda path: Header(real))
    monkeypatch.setattr("ddpo_min.weights.base_name", lambda tensors: "")
    model = load_stable_diffusion(path, "meta", torch.bfloat16)
    first, second = model.text_encoder.encoders
    assert (model.unet.config, model.vae.config) == (REAL, VAEConfig(latent_scale=0.13025))
    assert (first.config, second.config) == (REAL_TEXT, REAL_TEXT_2) and model.image_size == 1024
    counts = [sum(p.numel() for p in network.parameters()) for network in (model.unet, model.vae, first, second)]
    assert counts == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]        # as in diffusers and transformers
    assert sum(counts) + 1 == sum(torch.Size(shape).numel() for shape in real.values())     # and logit_scale
    assert next(model.vae.parameters()).dtype == torch.float32        # it overflows in float16
    text = {name: tuple(tensor.shape) for name, tensor in _original_text(model.text_encoder).items()}
    assert text == {name: shape for name, shape in real.items()
                    if name.startswith("conditioner.") and not name.endswith("logit_scale")}


# ---- files

def equal(a, b):
    """Whether two models have the same weights, to the bit."""
    return all(torch.equal(x, y) for part in ("unet", "vae", "text_encoder") for x, y in zip(
        getattr(a, part).state_dict().values(), getattr(b, part).state_dict().values(), strict=True))


def test_a_folder_of_diffusers_and_a_single_file_give_the_same_tensors_and_configurations(folder, file, tmp_path):
    models = [load_stable_diffusion(path, dtype=torch.float64) for path in (folder, file)]
    for model in models:
        texts = tuple(text.config for text in model.text_encoder.encoders)
        assert (model.unet.config, model.vae.config, *texts) == (UNET, VAE_, TEXT, TEXT_2)
        assert model.image_size == 16 and model.report.count(" 0 missing, 0 unexpected") == 4
    assert equal(*models) and models[0].base == models[1].base
    model = models[0]
    save_single_file(tmp_path / "again.safetensors", model.unet, model.vae, model.text_encoder, torch.float64, 16)
    assert_same_file(tmp_path / "again.safetensors", file)


def test_diffusers_own_converter_gives_our_tensors_from_our_file(file):
    from diffusers.loaders import single_file_utils as theirs
    state, (unet, _, texts) = load_file(file), networks()
    converted = theirs.convert_ldm_unet_checkpoint(dict(state), dict(
        layers_per_block=2, class_embed_type=None, addition_embed_type="text_time"))
    second = theirs.convert_open_clip_checkpoint(SimpleNamespace(
        text_model=SimpleNamespace(embeddings=SimpleNamespace(position_embedding=SimpleNamespace(weight=torch.empty(
            77, 24)))), config=SimpleNamespace(hidden_size=24)), dict(state), prefix="conditioner.embedders.1.model.")
    for ours, found in ((unet, converted), (texts.text_encoder_2, second)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(found[name].reshape(tensor.shape), tensor), name
    assert converted.keys() == unet.state_dict().keys()


def without(*starts):
    return lambda state: [state.pop(name) for name in list(state) if name.startswith(starts)]


def rename_all(state):
    """A refiner has OpenCLIP's text encoder alone."""
    for name in [name for name in state if name.startswith("conditioner.embedders.")]:
        _, _, number, _, rest = name.split(".", 4)
        if number == "1":
            state["conditioner.embedders.0.model." + rest] = state[name]
        del state[name]


@pytest.mark.parametrize("change, words", [
    (rename_all, "the refiner of Stable Diffusion XL"),
    (lambda state: state.update({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}),
     "9 input channels, an inpainting model"),
    (without("conditioner.embedders.1."), "without its autoencoder or text encoder"),
    (without("conditioner.embedders.0."), "without its autoencoder or text encoder"),
    (without("conditioner.embedders.1.model.text_projection"), "text_2 has no tensor text_projection.weight"),
    (without("model.diffusion_model.label_emb."), "a pooled text of 0 numbers, its text encoder writes 20"),
    (without("model.diffusion_model.middle_block.1.transformer_blocks.1.norm1."), "2 missing|unexpected"),
    (lambda state: state.update(edm_mean=torch.zeros(4)), "1 unexpected tensors, the first is edm_mean"),
    (lambda state: state.update({"cond_stage_model.model.ln_final.bias": torch.zeros(8)}), "encoders of two models"),
])
def test_single_files_that_are_something_else_are_named_in_one_line(file, tmp_path, change, words):
    state = load_file(file)
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "a.safetensors", header(file))
    with pytest.raises(InputError, match=words) as caught:
        load_stable_diffusion(tmp_path / "a.safetensors")
    assert str(caught.value).isprintable() and "supported: Stable Diffusion 1.x, 2.x and XL" in str(caught.value)


def configured(folder, file, **values):
    """Change a config.json of a folder."""
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def as_lcm(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "time_embedding.cond_proj.weight": torch.zeros(16, 256)}, path)


@pytest.mark.parametrize("change, words", [
    (lambda folder: (folder / "text_encoder").rename(folder / "other"), "the refiner of Stable Diffusion XL"),
    (lambda folder: (folder / "text_encoder_2").rename(folder / "other"), "text_encoder_2/model.safetensors"),
    (as_lcm, "found an LCM"),
    (lambda folder: configured(folder, "scheduler/scheduler_config.json", _class_name="LCMScheduler"), "found an LCM"),
    (lambda folder: configured(folder, "unet/config.json", addition_time_embed_dim=128), "addition_time_embed_dim"),
    (lambda folder: configured(folder, "unet/config.json", addition_embed_type="image"), "addition_embed_type"),
    (lambda folder: configured(folder, "unet/config.json", addition_embed_type=None), "vectors of 40 numbers"),
    (lambda folder: configured(folder, "text_encoder_2/config.json", hidden_act="relu"), "hidden_act relu"),
    (lambda folder: configured(folder, "text_encoder_2/config.json", num_attention_heads=5), "numbers of heads"),
])
def test_folders_that_are_something_else_are_named_in_one_line(folder, tmp_path, change, words):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy)
    with pytest.raises(InputError, match=words) as caught:
        load_stable_diffusion(copy)
    assert str(caught.value).isprintable()


def test_the_configurations_of_the_real_repository_are_accepted(folder, tmp_path):
    """What else its scheduler, UNet, autoencoder and second text encoder say."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    configured(copy, "scheduler/scheduler_config.json", _class_name="EulerDiscreteScheduler", sample_max_value=1.0,
               interpolation_type="linear", prediction_type="epsilon", set_alpha_to_one=False, skip_prk_steps=True,
               steps_offset=1, timestep_spacing="leading", trained_betas=None, use_karras_sigmas=False)
    configured(copy, "unet/config.json", addition_embed_type_num_heads=64, class_embeddings_concat=False,
               conv_in_kernel=3, conv_out_kernel=3, cross_attention_norm=None, encoder_hid_dim=None,
               encoder_hid_dim_type=None, mid_block_type="UNetMidBlock2DCrossAttn", num_attention_heads=None,
               num_class_embeds=None, time_cond_proj_dim=None, upcast_attention=None)
    configured(copy, "vae/config.json", force_upcast=True, sample_size=1024)
    configured(copy, "text_encoder_2/config.json", hidden_act="gelu", projection_dim=1280)
    assert equal(load_stable_diffusion(copy), load_stable_diffusion(folder))


@pytest.mark.parametrize("name, words", [
    ("sdxl-Turbo", "Turbo"), ("dreamshaperXL_lightningDPMSDE", "lightning"), ("LCM_x", "LCM"),
    ("Hyper-SDXL", "Hyper-SD"), ("juggernautXL", "")])
def test_the_name_of_a_model_for_few_steps_is_pointed_out(file, tmp_path, name, words):
    report = load_stable_diffusion(shutil.copy(file, tmp_path / f"{name}.safetensors")).report
    assert (f'by the "{words}" in its name distilled for few steps' in report) == bool(words) and "\n" not in report


def test_the_hub_is_asked_for_the_second_text_encoder(folder, tmp_path, monkeypatch):
    import huggingface_hub

    from test_hub import FakeHub
    hub = FakeHub("a/xl", folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    monkeypatch.chdir(tmp_path)
    assert equal(load_stable_diffusion("a/xl", dtype=torch.float64), load_stable_diffusion(folder, dtype=torch.float64))
    assert {"text_encoder_2/config.json", "text_encoder_2/model.safetensors"} < set(hub.requested)
    assert not any("tokenizer" in name for name in hub.requested)


# ---- pictures and gradients

class Given(DDIMScheduler):
    """diffusers' sampler with the noise of its steps given."""

    def step(self, out, t, sample, eta=0.0, generator=None, return_dict=True):
        return super().step(out, t, sample, eta=eta, variance_noise=self.noise.pop(0), return_dict=return_dict)


@pytest.mark.parametrize("negative, size", [(None, (16, 16)), ("blurry, a cat", (24, 16))])
def test_whole_pictures_are_those_of_diffusers_pipeline(pipeline, file, negative, size):
    """Guidance away from nothing at all, which is zeros, or from a prompt; square, and wide with its size numbers."""
    model, (width, height) = load_stable_diffusion(file, dtype=torch.float64, size="x".join(map(str, size))), size
    noise = sample_noise([5, 6], 4, (4, height // 2, width // 2)).double()
    policy = Policy(model, ddim_steps(4), 3.0, negative=negative or "")
    drawn = sample_trajectories(policy, PROMPTS[:2], [5, 6], cut(2, 2), keep="x_0")
    pictures = (model.vae.decode(drawn.latents[:, -1]) / 2 + 0.5).clamp(0, 1)
    a = model.alpha_bar
    pipeline.scheduler = Given.from_config(pipeline.scheduler.config)
    pipeline.scheduler.alphas_cumprod, pipeline.scheduler.final_alpha_cumprod = a, a[0]
    pipeline.scheduler.noise = list(noise[:, 1:].transpose(0, 1))
    theirs = pipeline(PROMPTS[:2], negative_prompt=negative and [negative] * 2, height=height, width=width,
                      num_inference_steps=4, guidance_scale=3.0, eta=1.0, latents=noise[:, 0], output_type="pt").images
    assert theirs.shape[-2:] == (height, width) and theirs.std() > 0.05
    assert_same(pictures, theirs, atol=1e-8)


def test_the_gradient_of_a_training_step_is_that_of_diffusers_network(file):
    """Of log p(x_prev | x_t, c), guided, for every weight of the UNet; log p is written here again."""
    model, steps = load_stable_diffusion(file, dtype=torch.float64), ddim_steps(5)
    theirs, i, (x_t, _, _, _) = their_networks(networks())[0], 2, unet_input()
    x_prev = x_t + 0.3 * torch.randn(x_t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    context, advantage = model.encode_prompts(PROMPTS), torch.tensor([1.0, -0.5, 2.0])
    model.unet.requires_grad_(True)
    log_p, _ = Policy(model, steps, 3.0).log_prob(x_prev, x_t, i, context)
    (advantage * log_p).sum().backward()

    theirs.requires_grad_(True)
    sizes = torch.tensor([[16, 24, 0, 0, 16, 24]] * 3)
    without, eps = (theirs(x_t, steps.t[i], c[:, :77], added_cond_kwargs=dict(
        text_embeds=c[:, 77, :20], time_ids=sizes)).sample for c in (torch.zeros_like(context), context))
    eps, a, b, sigma = without + 3.0 * (eps - without), steps.alpha_bar[i], steps.alpha_bar_prev[i], steps.sigma[i]
    mean = (b / a) ** 0.5 * (x_t - (1 - a) ** 0.5 * eps) + (1 - b - sigma ** 2) ** 0.5 * eps
    (advantage * torch.distributions.Normal(mean, sigma).log_prob(x_prev).mean((1, 2, 3))).sum().backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    assert wanted.keys() == dict(model.unet.named_parameters()).keys() and len(wanted) > 200
    for name, p in model.unet.named_parameters():
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-7, atol=1e-10)


# ---- LoRAs

ATTENTION = [name for name in lora_modules(UNet(UNET)) if re.search(r"attn\d\.to_", name)]
OTHERS = ["down_blocks.0.resnets.0.conv1", "down_blocks.1.downsamplers.0.conv", "mid_block.resnets.1.time_emb_proj",
          "up_blocks.0.attentions.2.proj_in", "up_blocks.1.upsamplers.0.conv", "up_blocks.2.resnets.0.conv_shortcut",
          "mid_block.attentions.0.transformer_blocks.1.ff.net.2"]
TEXTS = [f"text_encoder{which}.text_model.encoder.layers.{layer}" for which in ("", "_2") for layer in (
    "0.self_attn.q_proj", "0.self_attn.out_proj", "1.mlp.fc1", "1.mlp.fc2")]     # diffusers needs attention among them


def random_lora(names, seed=0):
    """{module: (A, B, alpha)} of rank 2 with scale 1/2, for modules of the small UNet and text encoders."""
    torch.manual_seed(seed)
    unet, _, texts = networks()
    lora = {}
    for name in names:
        weight = (texts if name.startswith("text_") else unet).get_submodule(name).weight
        B = 0.2 * torch.randn(len(weight), 2, *[1] * (weight.ndim - 2))
        lora[name] = torch.randn(2, *weight.shape[1:]), B, 1.0
    return lora


def added_by_hand(lora):
    """The networks with a LoRA in their weights, without a line of lora.py."""
    unet, vae, texts = networks()
    for name, (A, B, alpha) in lora.items():
        weight = (texts if name.startswith("text_") else unet).get_submodule(name).weight
        weight += alpha / 2 * torch.einsum("or,r...->o...", B.double().flatten(1), A.double()).reshape(weight.shape)
    return unet, vae, texts


def output(unet, texts):
    """The predicted noise for two prompts: what UNet and text encoders do together."""
    x_t, t, _, _ = unet_input()
    return unet(x_t[:2], t[:2], texts.encode(PROMPTS[:2]))


def their_output(pipeline):
    x_t, t, _, _ = unet_input()
    tokens, _, pooled, _ = pipeline.encode_prompt(PROMPTS[:2], do_classifier_free_guidance=False)
    sizes = torch.tensor([[16, 24, 0, 0, 16, 24]] * 2)
    return pipeline.unet(x_t[:2], t[:2], tokens, added_cond_kwargs=dict(text_embeds=pooled, time_ids=sizes)).sample


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("start", ["diffusers", "kohya"])
def test_both_forms_are_loaded_by_diffusers_and_by_us(form, start, tokenizers, tmp_path):
    """Written in one form, converted to the other, or to the same: exact, also of both text encoders."""
    lora, path = random_lora([*ATTENTION, *OTHERS, *TEXTS]), tmp_path / "lora.safetensors"
    write_lora(path, start, lora, {})
    names = load_file(export_lora(path, form))
    prefixes = {name.split("_input_")[0].split(".")[0] for name in names}
    if form == "kohya":
        assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in names
        assert any(name.startswith("lora_te1_text_model_") for name in names)
        assert any(name.startswith("lora_te2_text_model_") for name in names)
        assert not any("down_blocks" in name or "lora_te_" in name for name in names)
    else:
        assert prefixes == {"unet", "text_encoder", "text_encoder_2"}
    exported = tmp_path / f"lora-{form}.safetensors"
    unet, _, texts = networks()
    layers = load_loras([(exported, 1.0)], unet, texts)
    assert layers.keys() == lora.keys()
    wanted = output(*added_by_hand(lora)[::2])
    assert (wanted - output(*networks()[::2])).abs().max() > 0.01
    assert_same(output(unet, texts), wanted, atol=1e-6)
    theirs = make_pipeline(tokenizers)
    theirs.load_lora_weights(exported)
    assert_same(their_output(theirs), wanted, atol=1e-6)
    back = export_lora(exported, start)
    assert_same_file(back, path)


@pytest.mark.parametrize("first, second, part", [
    ("text_encoder.encoder.layers.0.self_attn.q_proj", "text_encoder_2.encoder.layers.0.self_attn.q_proj", "lora_{}"),
    ("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora",
     "text_encoder_2.text_model.encoder.layers.0.self_attn.to_q_lora", "{}"),
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
     "lora_{}")])
def test_other_names_of_the_text_encoders_are_understood(first, second, part, tmp_path):
    """Without text_model, as transformers 5 has it; as diffusers named them before PEFT; the first without a number."""
    lora, state = random_lora([name for name in TEXTS if name.endswith("q_proj")]), {}
    for name, (A, B, _) in zip((first, second), lora.values(), strict=True):
        state.update({f"{name}.{part.format(way)}.weight": t for way, t in (("down", A), ("up", B / 2))})
    save_file(state, tmp_path / "a.safetensors")
    unet, _, texts = networks()
    assert load_loras([(tmp_path / "a.safetensors", 1.0)], unet, texts).keys() == lora.keys()
    assert_same(texts.encode(PROMPTS), added_by_hand(lora)[2].encode(PROMPTS), atol=1e-6)


def test_kohya_names_and_shapes_are_those_of_a_real_file():
    """All 788 layers that a file of XL can have, three tensors each."""
    real = {}
    for line in (Path(__file__).parent / "data" / "sdxl_kohya.txt").read_text().splitlines():
        if line[0] != "#":
            name, *parts = line.split()
            star = re.search(r"\*(\d+)", name)
            for i in range(int(star[1])) if star else [0]:
                layer = "lora_unet_" + (name.replace(star[0], str(i)) if star else name)
                down, up = (tuple(int(n) for n in part.replace("r", "7").split(",")) for part in parts)
                real.update({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": ()})
    with torch.device("meta"):
        unet = UNet(REAL)
        layers = {}
        for name in lora_modules(unet):
            w = unet.get_submodule(name).weight
            layers[name] = torch.empty(7, *w.shape[1:]), torch.empty(len(w), 7, *[1] * (w.ndim - 2)), 7.0
    state, metadata = kohya_form(layers)
    ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
    left = {name.partition(".")[0] for name in ours.keys() - real.keys()}
    assert len(real) == 3 * 788 and real.items() <= ours.items()
    untrained = "input_blocks_0_0 time_embed_0 time_embed_2 label_emb_0_0 label_emb_0_2 out_2"      # by kohya
    assert left == {f"lora_unet_{name}" for name in untrained.split()}
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert len(add_lora(unet, 4)) == 560 and kohya_name("text_model.a") == "lora_te_text_model_a"


def test_sample_draws_and_merges_with_a_lora_of_all_three_networks(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora = random_lora([*ATTENTION, *TEXTS])
    write_lora("lora.safetensors", "kohya", lora, {})
    given = ["--prompt", "a fox", "--num", "1", "--steps", "3", "--guidance", "2", "--device", "cpu", "--seed", "5"]
    sample.main(["--weights", str(file), "--lora", "lora.safetensors", *given])
    sample.main(["--weights", str(file), "--lora", "lora.safetensors", "--merge", "merged.safetensors"])
    sample.main(["--weights", "merged.safetensors", *given, "--out", "merged"])
    sample.main(["--weights", str(file), *given, "--out", "base"])
    assert load_file("merged.safetensors").keys() == load_file(file).keys()
    merged = load_stable_diffusion("merged.safetensors", dtype=torch.float64)
    for ours, wanted in zip((merged.unet, merged.text_encoder), added_by_hand(lora)[::2]):
        for name, tensor in wanted.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=1e-6)
    with_lora, merged, base = (np.asarray(Image.open(f"{name}/0000.png")).astype(int)
                               for name in ("samples", "merged", "base"))
    assert abs(with_lora - merged).max() <= 1 and abs(with_lora - base).max() > 5


# ---- runs, sizes, where the weights are

def test_a_run_trains_xl_and_resumes_exactly(file, tmp_path):
    more = "--guidance", "3", "--kl-weight", "0.1", "--steps", "2"
    train.main(arguments(file, tmp_path / "whole", *more, epochs=2))
    train.main(arguments(file, tmp_path / "halves", *more, epochs=1))
    train.main(["--resume", str(tmp_path / "halves"), "--epochs", "2"])
    lines = metrics(tmp_path / "whole")
    assert lines == metrics(tmp_path / "halves")
    assert [line["max_ratio_error"] for line in lines] == [0.0, 0.0] and all(line["grad_norm"] > 0 for line in lines)
    assert len(load_file(tmp_path / "whole" / "lora.safetensors")) == 2 * len(ATTENTION)


def test_the_whole_unet_is_trained_and_saved_as_a_model_of_xl(file, tmp_path):
    train.main(arguments(file, tmp_path / "run", "--trainable", "full", "--lr", "1e-3", epochs=1))
    trained, before = load_file(tmp_path / "run" / "model.safetensors"), load_file(file)
    assert trained.keys() == before.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(trained[name], tensor.float())}
    assert "model.diffusion_model.label_emb.0.0.weight" in changed
    assert all(name.startswith("model.diffusion_model.") for name in changed)


@pytest.mark.parametrize("size, wanted", [("24x12", (12, 24)), ("10", (10, 10)), ("", (16, 16))])
@pytest.mark.parametrize("model", ["file", "tiny_file"])
def test_a_run_trains_pictures_of_the_size_asked_for(size, wanted, model, tmp_path, request):
    """Width first, of XL and of 1.x; the evaluation's pictures, too."""
    more = "--size", size, "--steps", "2", "--updates", "1"
    train.main(arguments(request.getfixturevalue(model), tmp_path / "run", *more, epochs=1))
    shapes = [pictures["images"].shape[1:3] for pictures in [np.load(tmp_path / "run" / "before.npz")]]
    assert shapes == [wanted] and metrics(tmp_path / "run")[0]["max_ratio_error"] == 0


@pytest.mark.parametrize("size, words", [("31x16", "multiples of 2"), ("16x", "expected WIDTHxHEIGHT"),
                                         ("5000", "up to 4096 pixels")])
def test_a_size_that_does_not_divide_is_refused_before_a_run_begins(size, words, tiny_file, tmp_path):
    with pytest.raises(InputError, match=f"--size {size}: .*{words}"):
        train.main(arguments(tiny_file, tmp_path / "run", "--size", size))
    assert not (tmp_path / "run").exists()


def test_the_autoencoder_is_never_of_16_bits_and_decodes_what_overflows_there(file, tmp_path):
    unet, vae, texts = networks()
    vae.decoder.conv_in.weight.mul_(1e6)
    save_single_file(tmp_path / "a.safetensors", unet, vae, texts, torch.float32, 16)
    for dtype in (torch.float16, torch.bfloat16):
        model = load_stable_diffusion(tmp_path / "a.safetensors", dtype=dtype)
        assert next(model.vae.parameters()).dtype == torch.float32
        assert next(model.unet.parameters()).dtype == next(model.text_encoder.parameters()).dtype == dtype
    assert next(load_stable_diffusion(file, dtype=None).vae.parameters()).dtype == torch.float64
    drawn = sample_trajectories(Policy(model, ddim_steps(2), 2.0), ["a fox"], [0], cut(1, 1), keep="images")
    assert drawn.images.std() > 0


@pytest.mark.parametrize("side, sizes", [(16, [16, 4]), (64, [4] * 5), (128, [1] * 20), (512, [1] * 20)])
def test_large_pictures_are_decoded_a_few_at_a_time(side, sizes):
    seen, weight = [], torch.zeros(1)
    vae = SimpleNamespace(post_quant_conv=SimpleNamespace(weight=weight), parameters=lambda: [weight],
                          decode=lambda part: (seen.append(len(part)), torch.zeros(len(part), 3, 1, 1))[1])
    assert vae_module.decode_images(vae, torch.zeros(20, 1, side, side)).shape == (20, 1, 1, 3) and seen == sizes


def test_weights_visit_the_device_and_come_home_also_after_an_error(monkeypatch):
    """A GPU is played by copies on the CPU: in the block the weights are copies, afterwards the same memory."""
    network, there = torch.nn.Linear(3, 2), torch.device("cuda")
    home = [p.data_ptr() for p in network.parameters()]
    monkeypatch.setattr(torch.Tensor, "to", lambda self, place: self.clone() if place == there else self)
    with pytest.raises(RuntimeError, match="full"):
        with device.visiting(network, there):
            assert not set(home) & {p.data_ptr() for p in network.parameters()}
            raise RuntimeError("the memory is full")
    assert [p.data_ptr() for p in network.parameters()] == home
    with device.visiting(network, torch.device("cpu")):
        assert [p.data_ptr() for p in network.parameters()] == home


def test_on_a_gpu_only_the_unet_stays(file, monkeypatch):
    """Text encoders and autoencoder are loaded to the CPU, and visit where the UNet is when they work."""
    placed, visits = {}, []
    assign = weights._assign
    monkeypatch.setattr(weights, "_assign", lambda network, tensors, path, part, where, dtype: (
        placed.update({part: str(where)}), assign(network, tensors, path, part, "cpu", dtype)))
    model = load_stable_diffusion(file, "cuda", prediction="eps")
    assert placed == dict(unet="cuda", vae="cpu", text="cpu", text_2="cpu")
    for module in (weights, vae_module):
        monkeypatch.setattr(module, "visiting", lambda network, where: (
            visits.append((type(network).__name__, where.type)), nullcontext())[1])
    sample_trajectories(Policy(model, ddim_steps(2), 1.0), ["a fox", "a cat"], [0, 1], cut(2, 1))
    assert visits == [("TextEncoders", "cpu"), ("VAE", "cpu"), ("VAE", "cpu")]


# ---- memory

def test_the_most_memory_at_once_is_counted_as_by_hand():
    """A weight of 40 kB and steps of 4 kB: two of them are alive at once, with gradients all that are saved.

    At the end of the backward pass: the weight and its gradient, x and the gradient of x @ weight, and two numbers.
    """
    weight, x = torch.nn.Parameter(torch.empty(100, 100, device="meta")), torch.empty(10, 100, device="meta")
    network = SimpleNamespace(parameters=lambda: [weight])
    with bench.Peak(network) as peak, torch.no_grad():
        y = x @ weight
        for _ in range(3):
            y = y + 1
    assert (peak.most, peak.now) == (48_000, 44_000)
    with bench.Peak(network) as peak:
        y = (x @ weight).exp().exp().exp()         # exp saves its result
        assert peak.now == 40_000 + 3 * 4_000
        y = y.sum()
        y.backward()
    assert peak.most == 2 * 40_000 + 2 * 4_000 + 2 * 4


@pytest.mark.parametrize("size", ["sdxl", "sd15"])
def test_memory_is_counted_for_each_phase(size, monkeypatch, capsys):
    def small(size):
        with torch.device("meta"):
            if size == "sdxl":
                return UNet(UNET), VAE(VAE_), TextEncoders(TextEncoder(TEXT), TextEncoder(TEXT_2))
            unet = replace(UNET, widths=(16, 32), attention=(0, 1), layers=1, middle=1, pooled=0)
            return UNet(unet), VAE(VAE_), TextEncoder(replace(TEXT, width=40))

    monkeypatch.setattr(bench, "networks", small)
    unet, vae, text = (sum(p.numel() for p in network.parameters()) / 1e9 for network in small(size))
    given = dict(preset="laptop", updates=1, samples=2, batch=2, steps=2, guidance=5.0, dtype="bfloat16")
    plain, other = (bench.count_memory(size, Settings(**{**given, **more})) for more in (
        {}, dict(checkpointing=True, rank=8)))
    for found in (plain, other):
        assert found["training"]["UNet"] == pytest.approx(2 * unet)
        assert found["decoding"]["autoencoder"] == pytest.approx((4 if size == "sdxl" else 2) * vae)
        assert found["encoding prompts"]["text encoder"] == pytest.approx(2 * text)
        assert ("text encoder" in found["training"]) == (size == "sd15")
    lora = "LoRA, its gradient and AdamW's two moments"
    parameters = sum(4 * sum(module.weight.shape) for name, module in small(size)[0].named_modules()
                     if re.search(r"attn\d\.to_(q|k|v|out\.0)$", name))
    assert plain["training"][lora] == pytest.approx(4 * 4 * parameters / 1e9)
    assert other["training"][lora] == pytest.approx(2 * plain["training"][lora])
    assert 0 < other["training"]["activations"] < 0.7 * plain["training"]["activations"]
    if size == "sdxl":
        bench.main(["--size", size, "--count"])
        out = capsys.readouterr().out
        assert out.count(" GB: UNet ") == 3 and "sdxl, bfloat16, 1 at a time" in out and "counted, not measured" in out


def test_the_bench_writes_a_random_file_of_xl_and_counts_its_operations(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "networks", lambda size: [network.to("meta") for network in networks()])
    bench.random_file(tmp_path / "a.safetensors", "sdxl")
    model = load_stable_diffusion(tmp_path / "a.safetensors")
    assert model.image_size == 1024 and model.unet.config == UNET
    sampling, training = bench.flops(replace(model, shape=(8, 8)), Settings(steps=2, guidance=5.0))
    assert training > sampling > 0


def test_the_benchs_other_side_does_the_same_work(file):
    """diffusers' networks with our weights: same noise, same pictures, also of a wide one."""
    model = load_stable_diffusion(file, size="24x16")
    settings = Settings(samples=2, updates=1, steps=2, guidance=2.0)
    theirs, trained = diffusers_policy(model, settings)
    ours, x_t = Policy(model, theirs.steps, 2.0), unet_input()[0][:2].float()
    context = model.encode_prompts(PROMPTS[:2])
    assert_same(ours.eps(x_t, 500, context, 2.0), theirs.eps(x_t, 500, context, 2.0), atol=1e-4)
    ours, theirs = (vae_module.decode_images(p.model.vae, x_t).astype(int) for p in (ours, theirs))
    assert abs(ours - theirs).max() <= 1
    assert sum(p.numel() for p in trained) == sum(p.numel() for layer in add_lora(model.unet, 4).values()
                                                  for p in (layer.lora_A.weight, layer.lora_B.weight))


# ---- the preset

def test_the_preset_of_xl_is_the_public_run_it_names():
    s = make_settings(weights="a/b", preset="sdxl_lora")
    assert (s.steps, s.guidance, s.eta, s.rank, s.lr) == (20, 5.0, 1.0, 64, 1e-5)
    assert (s.beta1, s.beta2, s.weight_decay, s.adam_eps, s.grad_clip) == (0.9, 0.999, 1e-4, 1e-8, 1.0)
    assert s.batch == 1 and s.checkpointing and s.dtype == "bfloat16" and s.guidance_in_training
    assert s.clip_range * 4 * 128 * 128 == pytest.approx(1e-4 * 4 * 64 * 64)


@torch.no_grad()
def test_the_shipped_model_in_xls_structure_draws_what_the_shipped_one_draws(tmp_path):
    """tests/xl_shaped.py, through a file: what the text says counts ten times as much as the difference."""
    own = load_stable_diffusion(weights.SHIPPED)
    save_single_file(tmp_path / "xl.safetensors", *xl_shaped(own), dtype=torch.float32, image_size=64)
    xl = load_stable_diffusion(tmp_path / "xl.safetensors")
    x_t, prompts = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), ["a fox", "two cats", "a hen"]
    for t in torch.tensor([[900] * 3, [300] * 3]):
        wanted, got = (model.unet(x_t, t, model.text_encoder.encode(prompts)) for model in (own, xl))
        unread = own.unet(x_t, t, own.text_encoder.encode([""] * 3))
        assert (got - wanted).norm() < 0.1 * (unread - wanted).norm()
    torch.testing.assert_close(xl.vae.decode(x_t), own.vae.decode(x_t), rtol=0, atol=1e-4)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(xl.vae.encode(image), own.vae.encode(image), rtol=0, atol=1e-4)
