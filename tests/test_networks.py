"""The networks against those of diffusers and transformers with the same random weights, in float64; the tokens."""
import gzip
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import their_text, their_unet, their_vae
from ddpo_min.files import NotFinite
from ddpo_min.layers import Attention, GroupNorm
from ddpo_min.text import TextConfig, TextEncoder, tokenize
from ddpo_min.unet import UNet, UNetConfig
from ddpo_min.vae import VAE, VAEConfig, decode_images

START, END = 49406, 49407

UNETS = [
    UNetConfig(widths=(16, 24, 32), attention=(False, True, True), layers=1, context_width=12, heads=4, groups=8),
    UNetConfig(widths=(8, 16, 16, 24), attention=(True, True, True, False), layers=2, context_width=20, heads=2,
               groups=4),
    UNetConfig(widths=(12, 12, 24), attention=(True, False, False), layers=3, context_width=8, heads=3, groups=6),
    # like Stable Diffusion 2.x: linear proj_in and proj_out, heads of one width
    UNetConfig(widths=(12, 24, 36, 36), attention=(True, True, True, False), layers=1, context_width=10, groups=6,
               head_width=6, linear=True),
]
VAES = [
    VAEConfig(widths=(8, 16, 24), layers=1, groups=4, latent_scale=0.3),
    VAEConfig(widths=(8, 8, 16, 16), layers=2, groups=8, latent_channels=3),
]
TEXTS = [
    TextConfig(vocabulary=50, positions=20, width=24, layers=2, heads=3, inner=40),
    TextConfig(vocabulary=90, positions=77, width=32, layers=3, heads=8, inner=64),
    TextConfig(vocabulary=90, positions=77, width=32, layers=2, heads=4, inner=64, openclip=True),
]


def same_weights(ours, theirs):
    """Our network in float64 with their weights, loaded strictly; transformers 5 leaves out the outer text_model."""
    state = theirs.state_dict()
    if isinstance(ours, TextEncoder):
        state = {n if n.startswith("text_model.") else f"text_model.{n}": t for n, t in state.items()}
    ours.double().requires_grad_(False).load_state_dict(state, strict=True)
    return ours.eval()


def assert_same(ours, theirs):
    """Equal up to 1e-9, and not only because both are nearly 0."""
    assert theirs.abs().max() > 0.01
    assert (ours - theirs).abs().max() < 1e-9


def unet_input(config, seed=1):
    """Three rectangular latents at three different timesteps, with seven tokens each."""
    torch.manual_seed(seed)
    side = 2 ** len(config.widths)
    x_t = torch.randn(3, 4, side, 2 * side, dtype=torch.float64)
    return x_t, torch.tensor([981, 0, 341]), torch.randn(3, 7, config.context_width, dtype=torch.float64)


def vae_input(config, seed=1):
    """Two rectangular latents, and images of the corresponding size."""
    torch.manual_seed(seed)
    latent = torch.randn(2, config.latent_channels, 2, 3, dtype=torch.float64)
    side = 2 ** (len(config.widths) - 1)
    return latent, torch.rand(2, 3, 2 * side, 3 * side, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("config", UNETS)
def test_unet_is_diffusers_unet(config):
    theirs = their_unet(config)
    x_t, t, context = unet_input(config)
    assert_same(same_weights(UNet(config), theirs)(x_t, t, context), theirs(x_t, t, context).sample)


@pytest.mark.parametrize("config", VAES)
def test_vae_moments_and_encode_are_diffusers(config):
    """Mean and log-variance, clamped at both ends, and the scaled sample for a given noise."""
    theirs, c = their_vae(config), config.latent_channels
    theirs.quant_conv.bias[c], theirs.quant_conv.bias[-1] = -40.0, 30.0
    ours = same_weights(VAE(config), theirs)
    noise, image = vae_input(config)
    gaussian = theirs.encode(image).latent_dist
    mean, log_variance = ours.moments(image)
    assert_same(mean, gaussian.mean)
    assert_same(log_variance, gaussian.logvar)
    assert log_variance.min() == -30 and log_variance.max() == 20
    assert_same(ours.encode(image), gaussian.mean * theirs.config.scaling_factor)
    assert_same(ours.encode(image, noise), (gaussian.mean + gaussian.std * noise) * theirs.config.scaling_factor)


@pytest.mark.parametrize("config", VAES)
def test_vae_decode_is_diffusers_decode(config):
    theirs = their_vae(config)
    latent, _ = vae_input(config)
    assert_same(same_weights(VAE(config), theirs).decode(latent),
                theirs.decode(latent / theirs.config.scaling_factor).sample)


@pytest.mark.parametrize("config", TEXTS)
def test_text_encoder_is_transformers_clip(config):
    """For full and shorter sequences, also with repeated tokens: only later tokens are masked."""
    theirs = their_text(config)
    ours = same_weights(TextEncoder(config), theirs)
    torch.manual_seed(1)
    for length in (config.positions, 9):
        ids = torch.randint(config.vocabulary, (2, length))
        ids[1, 4:] = config.vocabulary - 1
        assert_same(ours(ids), theirs(ids).last_hidden_state)


def test_the_output_of_the_last_used_layer_goes_through_the_final_norm():
    """It is transformers' normalised output of the second to last layer, which Stable Diffusion 2.x uses."""
    config = TextConfig(vocabulary=90, width=32, layers=3, heads=4, inner=64, used=2, openclip=True)
    theirs = their_text(config)
    ours = same_weights(TextEncoder(config), theirs)
    ids = torch.randint(config.vocabulary, (2, 77), generator=torch.Generator().manual_seed(1))
    states = theirs(ids, output_hidden_states=True).hidden_states
    assert len(states) == 4         # of the embeddings and three layers
    assert_same(ours(ids), ours.text_model.final_layer_norm(states[-2]))


def test_networks_do_not_change_their_inputs():
    """Neither the UNet nor the VAE changes a tensor that it is given."""
    unet, vae = UNet(UNETS[0]).double(), VAE(VAES[0]).double()
    latent, image = vae_input(VAES[0])
    for function, given in ((unet, unet_input(UNETS[0])), (vae.decode, (latent,)), (vae.encode, (image, latent))):
        before = [tensor.clone() for tensor in given]
        function(*given)
        assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True)), function


def test_tokens_are_start_words_end_and_padded_with_end():
    ids = tokenize(["a fox", "", "A  Fox"])
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == [START, 320, 3240] + [END] * 74
    assert ids[1].tolist() == [START] + [END] * 76
    assert ids[2].tolist() == ids[0].tolist()
    assert tokenize(["a fox"], positions=5).tolist() == [[START, 320, 3240, END, END]]


def test_long_prompts_are_cut_to_77_tokens_with_the_end_token():
    for words in (75, 76, 200):
        assert tokenize(["fox " * words])[0].tolist() == [START] + [3240] * 75 + [END]
    assert tokenize(["fox " * 74])[0].tolist() == [START] + [3240] * 74 + [END, END]


def test_tokens_for_openclip_are_open_clips_own():
    """Padded with 0, which is also the id of "!" inside a word; a "!" that ends a word has another id and stays."""
    from open_clip import get_tokenizer
    prompts = ["a fox", "", "wait! a fox!", "one two three four " * 40]
    ours = tokenize(prompts, padding=TextConfig(openclip=True).padding)
    assert torch.equal(ours, get_tokenizer("ViT-H-14")(prompts))
    assert ours[0].tolist() == [START, 320, 3240, END] + [0] * 73
    assert TextConfig().padding == END


def test_tokens_are_those_of_transformers(tmp_path):
    """CLIPTokenizer, built from the merges in open_clip, padded and cut to 77."""
    import open_clip.tokenizer
    from transformers import CLIPTokenizer
    ours = open_clip.tokenizer.SimpleTokenizer()
    (tmp_path / "vocab.json").write_text(json.dumps(
        {{"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(word, word): i
         for word, i in ours.encoder.items()}))
    lines = gzip.open(open_clip.tokenizer.default_bpe(), "rt", encoding="utf-8").read().split("\n")
    merges = ["#version: 0.2", *lines[1:49152 - 256 - 2 + 1]]
    (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    theirs = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    prompts = ["a fox", "", "A photo of an Astronaut, riding a horse!", "it's 2 dogs & 13 cats (4k)", "café über",
               "one two three four " * 40]
    expected = theirs(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokenize(prompts), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_cpu_attention_and_norms_of_16_bits_run_in_32_and_are_rounded_once(dtype, monkeypatch):
    ran, norm, attend = [], F.group_norm, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "group_norm", lambda x, *rest: (ran.append(x.dtype), norm(x, *rest))[1])
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, *rest, **more: (ran.append(q.dtype), attend(q, *rest, **more))[1])
    torch.manual_seed(0)
    x = torch.randn(2, 12, 5, 5).to(dtype)
    layer = GroupNorm(3, 12, eps=1e-6).to(dtype)
    layer.weight.data.normal_()
    layer.bias.data.normal_()
    expected = norm(x.float(), 3, layer.weight.float(), layer.bias.float(), 1e-6).to(dtype)
    assert torch.equal(layer(x), expected) and layer(x.float()).dtype == torch.float32

    layer, tokens = Attention(12, 3).to(dtype), x.flatten(2).transpose(1, 2)
    q, k, v = (project(tokens).float().unflatten(-1, (3, 4)).transpose(1, 2)
               for project in (layer.to_q, layer.to_k, layer.to_v))
    expected = ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).to(dtype).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(tokens), layer.to_out[0](expected), rtol=0.02, atol=0.02)
    assert set(ran) == {torch.float32}


def test_images_are_decoded_in_batches_of_at_most_16_and_overflow_is_an_error(monkeypatch):
    torch.manual_seed(0)
    vae, sizes = VAE(VAES[0]), []
    latents, decode = torch.randn(19, 4, 2, 3, dtype=torch.float64), vae.decode
    monkeypatch.setattr(vae, "decode", lambda part: (sizes.append(len(part)), decode(part))[1])
    images = decode_images(vae, latents)       # 16 and 3
    exact = (decode(latents.float()).detach().clamp(-1, 1) + 1) * 127.5
    assert images.shape == (19, 8, 12, 3) and images.dtype == np.uint8 and images.std() > 5
    assert (torch.from_numpy(images).permute(0, 3, 1, 2) - exact).abs().max() < 0.501
    assert (decode_images(vae, latents[:5]) == images[:5]).mean() > 0.99
    assert sizes == [16, 3, 5]
    with pytest.raises(NotFinite, match="the decoded pictures"):
        decode_images(vae, latents * torch.inf)
