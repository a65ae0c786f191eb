"""The shipped model and the world it was made for."""
import json
import re
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from conftest import ROOT, tiny_networks

sys.path.insert(0, str(ROOT / "weights"))
import evaluate
import pretrain
import rater
import world
from classifiers import to_float
from ddpo_min import clip_rewards
from ddpo_min.files import InputError
from ddpo_min.prompts import ANIMALS, find_prompts
from ddpo_min.weights import load_stable_diffusion


def test_a_seed_names_a_render_for_ever():
    a, b = world.render_many(5, 8), world.render_many(5, 8)
    assert all((x == y).all() for x, y in zip(a, b))
    assert (a.image != world.render_many(6, 8).image).any()


def test_captions_say_what_is_drawn():
    renders = world.render_many(7, 400)
    assert list(world.ANIMALS) == ANIMALS
    for caption, animal, kind in zip(renders.caption, renders.animal, renders.kind):
        name = ANIMALS[animal]
        assert any(caption.startswith(start) for start in (world.article(name), f"two {world.plural(name)}",
                                                           f"three {world.plural(name)}"))
        if " on a" in caption:
            said, kind = caption.split(" on ")[1], list(world.BACKGROUNDS)[kind]
            assert kind in said or kind == "plain" and any(color in said for color in world.COLORS)
    silent = [kind for caption, kind in zip(renders.caption, renders.kind) if " on a" not in caption]
    assert len(set(silent)) == len(world.BACKGROUNDS)


def test_descriptions_name_the_background_and_its_colours():
    renders = world.render_many(8, 300, activities=False)
    for image, caption, description, _, kind in zip(*renders):
        subject, said = re.fullmatch("(.*) on an? (.*) background", description).groups()
        kind = list(world.BACKGROUNDS)[kind]
        assert caption.startswith(subject) and (kind == "plain" or said.endswith(" " + kind))
        named = said.removesuffix(" " + kind).split(" and ")
        assert len(named) == (1 if kind in ("plain", "busy") else 2)
        border = np.concatenate([image[:4].reshape(-1, 3), image[-4:].reshape(-1, 3), image[:, :4].reshape(-1, 3),
                                 image[:, -4:].reshape(-1, 3)]).astype(float)
        for color in named if kind not in ("gradient", "busy") else ():
            assert np.abs(border - world.COLORS[color]).max(1).min() < 40


def test_every_animal_has_a_glyph_of_its_own():
    pictures = [np.asarray(world.glyph(name).resize((16, 16))).tobytes() for name in world.NAMES]
    assert len(set(pictures)) == len(world.NAMES) == 48


def test_folding_the_normalisation_keeps_the_autoencoder_and_whitens_its_latents():
    torch.manual_seed(0)
    vae = tiny_networks()[1].eval()
    vae.quant_conv.bias.data[:4] = torch.tensor([3.0, -1.0, 0.5, 0.0])
    images = world.render_many(1, 20).image[:, ::4, ::4]
    images = np.concatenate([images] * 100)         # it looks at 2000
    x = to_float(images[:20], "cpu")
    with torch.no_grad():
        before, variance = vae.decode(vae.encode(x)), vae.moments(x)[1]
        std = vae.moments(x)[0].std((0, 2, 3))
        pretrain.fold_normalisation(vae, images, "cpu")
        after, latent = vae.decode(vae.encode(x)), vae.encode(x)
        gain = 2 * torch.log(1 / (std * vae.config.latent_scale))
    assert (after - before).abs().max() < 1e-4
    assert latent.mean((0, 2, 3)).abs().max() < 1e-3 and (latent.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert (vae.moments(x)[1] - variance - gain[None, :, None, None]).abs().max() < 1e-2


@torch.no_grad()
@pytest.mark.parametrize("steps, guidance", [(8, 1.0), (10, 2.0)], ids=["as train.py", "guided"])
def test_the_shipped_model_draws_what_it_is_asked_for(steps, guidance):
    images, animals = evaluate.draw(load_stable_diffusion(), 1, steps=steps, guidance=guidance)
    for classifier in evaluate.load_classifiers().values():
        assert evaluate.recognised(classifier, images, animals).mean() >= 0.9
        assert evaluate.recognised(classifier, images, np.roll(animals, 1)).mean() <= 0.1


@torch.no_grad()
def test_the_shipped_parts_do_their_work():
    model = load_stable_diffusion()
    images, _, _, animals, _ = world.render_many(evaluate.HELD_OUT_WORLD, 140, activities=False)
    x = to_float(images, "cpu")
    error = ((model.vae.decode(model.vae.encode(x)).clamp(-1, 1) - x) ** 2).mean().item()
    assert 10 * np.log10(4 / error) >= 25.5
    clip = evaluate.load_half(pretrain.clip_model(), "clip.safetensors")
    text = clip.encode_text(pretrain.tokenize(find_prompts("animals")), normalize=True)
    named = (clip.encode_image(x, normalize=True) @ text.T).argmax(dim=1).numpy()
    assert (named == animals).mean() >= 0.97


@pytest.mark.parametrize("wrong, message", [
    ("--num 1", "--num 1: expected 2 to 10000"), ("--num 0", "--num 0: expected 2 to 10000"),
    ("--steps 501", "--steps 501: expected 1 to 500"), ("--lora nowhere", "--lora nowhere: no such file")])
def test_what_cannot_be_measured_is_refused_before_anything_is_drawn(wrong, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        evaluate.main(wrong.split())


@torch.no_grad()
def test_the_shipped_head_knows_the_rule_of_its_rater():
    images = world.render_many(evaluate.HELD_OUT_WORLD, 140, activities=False).image
    scores = clip_rewards.aesthetic("cpu", small=True)(images, ["a cat"] * len(images))
    assert np.corrcoef(scores, rater.rule(images))[0, 1] > 0.88


def test_the_shipped_files_name_the_command_that_made_them():
    origins = {path.name: json.loads(safe_open(path, "np").metadata()["ddpo_min"])
               for path in (ROOT / "weights").glob("*.safetensors")}
    for origin in origins.values():
        assert [origin[name] for name in ("command", "seed", "commit")] == [
            "python weights/pretrain.py", 0, origins["emoji.safetensors"]["commit"]]


def test_clip_and_stable_diffusion_share_their_text_tower():
    """The file's text encoder is CLIP's: pooled at the end token and projected it gives CLIP's own text embedding."""
    model = load_stable_diffusion()
    clip = evaluate.load_half(pretrain.clip_model(), "clip.safetensors")
    ids = pretrain.tokenize(["a fox", "two cats on a striped background"])
    with torch.no_grad():
        end = (ids == 49407).int().argmax(dim=1)
        pooled = model.text_encoder(ids)[torch.arange(2), end] @ clip.text_projection
        assert (pooled - clip.encode_text(ids)).abs().max() < 1e-4
