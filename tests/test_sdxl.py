"""Stable Diffusion XL: networks, files, pictures, gradients and LoRAs against diffusers and transformers, in float64."""
import gzip
import json
import re

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from conftest import noise_through, randomise, their_text, their_unet, their_vae
from ddpo_min import layout
from ddpo_min.files import InputError
from ddpo_min.text import TextConfig, TextEncoder, TextEncoders, tokenize
from ddpo_min.unet import UNet, UNetConfig
from ddpo_min.vae import VAE, VAEConfig
from ddpo_min.weights import _original_text, load_stable_diffusion, save_single_file
from test_weights import read_layout

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


@pytest.fixture(scope="module")
def pipeline(tokenizers):
    """diffusers' pipeline with the weights of networks(), in float64; its sampler computes in float64, too."""
    unet, vae, *texts = their_networks(networks())
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading")
    pipe = StableDiffusionXLPipeline(vae, *texts, *tokenizers, unet, scheduler, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
