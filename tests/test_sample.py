"""sample.py: what is drawn with each flag, against a loop written here; nothing overwritten, nothing cut silently."""
import re

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from conftest import their_unet
from ddpo_min.cli import describe, make_settings
from ddpo_min.ddim import ddim_step, ddim_steps
from ddpo_min.files import InputError
from ddpo_min.interchange import write_lora
from ddpo_min.lora import load_loras
from ddpo_min.schedule import alphas_cumprod
from ddpo_min.text import cut_prompts, tokenize
from ddpo_min.unet import UNet, UNetConfig
from ddpo_min.weights import load_stable_diffusion

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
TEXT_LAYER = "text_model.encoder.layers.0.mlp.fc2"


@pytest.fixture
def draw(tiny_file, tmp_path, monkeypatch):
    """A function that draws with more flags and returns {file name: its bytes} of the folder "out"."""
    monkeypatch.chdir(tmp_path)

    def run(*more, out="out"):
        sample.main(["--weights", str(tiny_file), "--prompt", "a fox", "--num", "2", "--steps", "3", "--device", "cpu",
                     "--out", out, *more])
        return {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}
    return run


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


def drawn_here(model, seed, negative="", eta=1.0, guidance=2.0, steps=3):
    """One picture by the equations of DDIM and guidance, without ddim.py, policy.py and rollout.py."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps + 1, 4, 8, 8, generator=generator)
    context, unwanted = model.encode_prompts(["a fox"]), model.encode_prompts([negative])
    alpha_bar, x = alphas_cumprod(), noise[:1]
    with torch.no_grad():
        for i, t in enumerate(range((steps - 1) * (1000 // steps) + 1, 0, -(1000 // steps))):
            a, b = alpha_bar[t].item(), alpha_bar[max(t - 1000 // steps, 0)].item()
            eps_u, eps_c = (model.unet(x, torch.tensor([t]), c) for c in (unwanted, context))
            eps = eps_u + guidance * (eps_c - eps_u)
            sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
            x = b ** 0.5 * (x - (1 - a) ** 0.5 * eps) / a ** 0.5 + (1 - b - sigma ** 2) ** 0.5 * eps
            x = x + sigma * noise[i + 1:i + 2]
        return ((model.vae.decode(x)[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).int().numpy()


@pytest.mark.parametrize("flags, how", [
    ([], {}), (["--eta", "0"], dict(eta=0.0)), (["--eta", "0.5"], dict(eta=0.5)),
    (["--guidance", "30", "--negative-prompt", "a cow"], dict(guidance=30.0, negative="a cow"))])
def test_pictures_are_those_of_the_equations(flags, how, draw, tiny_file, tmp_path):
    draw("--seed", "7", *flags)
    model = load_stable_diffusion(tiny_file)
    for i in range(2):
        assert abs(picture(tmp_path / f"out/{i:04d}.png") - drawn_here(model, 7 + i, **how)).max() <= 1
    if how:
        plain = drawn_here(model, 7, guidance=how.get("guidance", 2.0))
        assert abs(picture(tmp_path / "out/0000.png") - plain).max() > 5


def lora(path, names, seed):
    """Write a random LoRA of rank 2 for these layers of the tiny model; returns the path."""
    torch.manual_seed(seed)
    sizes = {LAYER: (16, 32), TEXT_LAYER: (32, 16)}
    write_lora(path, "kohya", {name: (torch.randn(2, sizes[name][0]), torch.randn(sizes[name][1], 2), 2.0)
                               for name in names}, {})
    return path


def test_loras_on_the_text_encoder_too_change_the_pictures_and_not_the_base_models(draw, tiny_file, tmp_path, capsys):
    """The base model's row of the grid is drawn with its own embeddings, of the prompt and of the negative prompt."""
    lora(tmp_path / "a.safetensors", [LAYER, TEXT_LAYER], 1)
    lora(tmp_path / "b=2.safetensors", [LAYER], 2)
    flags = ["--negative-prompt", "a cow", "--num", "1", "--guidance", "4"]
    with_loras = draw("--lora", "a.safetensors=0.5", "--lora", "b=2.safetensors", "--scale", "-1", *flags)
    assert "2 layers with a.safetensors at 0.5 + b=2.safetensors at -1" in capsys.readouterr().out
    model = load_stable_diffusion(tiny_file)
    base = drawn_here(model, 0, "a cow", guidance=4.0)
    load_loras([("a.safetensors", 0.5), ("b=2.safetensors", -1.0)], model.unet, model.text_encoder)
    wanted = drawn_here(model, 0, "a cow", guidance=4.0)
    assert abs(base - wanted).max() > 10 and len(with_loras) == 2
    assert abs(picture("out/0000.png") - wanted).max() <= 1
    above = picture("out/grid.png")
    left = above.shape[1] - 128 - 4     # the first picture of the first row, each pixel eight times as wide and high
    assert abs(above[4:4 + 128:8, left:left + 128:8] - base).max() <= 1


def test_one_lora_given_twice_counts_twice(draw, tmp_path):
    lora(tmp_path / "a.safetensors", [LAYER, TEXT_LAYER], 1)
    draw("--lora", "a.safetensors=0.25", "--lora", "a.safetensors=0.5", out="twice")
    draw("--lora", "a.safetensors=0.75", out="once")
    draw("--lora", "a.safetensors=0.5", out="last")
    assert abs(picture("twice/0001.png") - picture("once/0001.png")).max() <= 1
    assert abs(picture("last/0001.png") - picture("once/0001.png")).max() > 1


@pytest.mark.parametrize("text, parsed", [
    ("a.safetensors", ("a.safetensors", 0.3)), ("a.safetensors=2", ("a.safetensors", 2.0)),
    ("b=2.safetensors", ("b=2.safetensors", 0.3)), ("b=2.safetensors=-1e-1", ("b=2.safetensors", -0.1)),
    ("c=5", ("c=5", 0.3))])
def test_a_lora_has_its_own_strength_or_scale_and_a_file_may_have_an_equals_sign(text, parsed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b=2.safetensors", "c=5"):
        (tmp_path / name).touch()
    assert sample.parse(["--prompt", "a", "--lora", text, "--scale", "0.3"]).lora == [parsed]


@pytest.mark.parametrize("flags, words", [
    (["--lora", "a.safetensors="], "--lora a.safetensors=: no such file, and nothing is no strength"),
    (["--lora", "a=x"], "--lora a=x: no such file, and x is no strength; expected FILE or FILE=STRENGTH"),
    (["--lora", "=0.5"], "--lora =0.5: which file? expected FILE or FILE=STRENGTH"),
    (["--lora", "a=nan"], "nan is no strength"), (["--lora", "a=inf"], "inf is no strength"),
    (["--lora", "a", "--lora", "b", "--export-lora", "kohya"], "--export-lora: expected one --lora"),
    (["--seed", "4294967296"], "--seed 4294967296: expected -1 to 4294967295"), (["--seed", "-2"], "--seed -2"),
    (["--eta", "1.5"], "--eta 1.5: expected 0 to 1"), (["--eta", "nan"], "--eta nan"), (["--eta", "-1"], "--eta -1"),
    (["--negative-prompt", "a", "--guidance", "1"], "--negative-prompt: has no effect with --guidance 1")])
def test_flags_that_cannot_work_are_refused(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(words)):
        sample.parse(["--prompt", "a", *flags])


def test_the_highest_seed_counts_on_from_0_and_a_random_one_is_printed(draw, capsys):
    last = draw("--seed", str(2 ** 32 - 1), out="last")
    assert last["0001.png"] == draw("--seed", "0", out="zero")["0000.png"] != last["0000.png"]
    capsys.readouterr()
    drawn = draw("--seed", "-1", out="random")
    seed = re.search(r"seed (\d+)", capsys.readouterr().out)[1]
    assert draw("--seed", seed, out="again") == drawn
    assert len({sample.parse(["--prompt", "a", "--seed", "-1"]).seed for _ in range(5)}) == 5


def test_a_second_command_counts_on_and_overwrites_nothing(draw, tmp_path, capsys):
    first = draw()
    (tmp_path / "out" / "0007.png").write_bytes(b"mine")
    capsys.readouterr()
    second = draw("--seed", "2")
    assert second.keys() - first.keys() == {"0007.png", "0008.png", "0009.png", "grid-0008.png"}
    assert first.items() <= second.items() and second["0007.png"] == b"mine"
    assert capsys.readouterr().out.splitlines()[-1] == "out/0008.png ... out/0009.png, all of them in out/grid-0008.png"


# ---- prompts that are too long

LONG = "a fox " * 40        # 80 tokens


def test_a_prompt_that_is_cut_is_named_once_with_the_tokens_that_it_loses(draw, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(f"a cow\n{LONG}\n{LONG} and a cow\n")
    draw()
    assert "warning" not in capsys.readouterr().out
    sample.main(["--prompts", "prompts.txt", "--num", "2", "--steps", "1", "--size", "16", "--device", "cpu",
                 "--negative-prompt", "fox " * 76])
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(lines) == 1 and "its last 8 tokens" in lines[0] and f'prompt "{LONG[:77]}..."' in lines[0]
    assert lines[0].endswith("because the model reads 75 (also cut: 2 more)")


def test_training_names_prompts_that_are_cut_when_it_starts(tmp_path):
    (tmp_path / "long.txt").write_text(f"a cow\n{LONG}\n")
    (tmp_path / "other.txt").write_text("fox " * 79)
    assert "warning" not in describe(make_settings())
    assert describe(make_settings(prompts=tmp_path / "long.txt")).splitlines()[-1].startswith(
        '  warning: the prompt "a fox a fox')
    assert "its last 4 tokens" in describe(make_settings(eval_prompts=tmp_path / "other.txt")).splitlines()[-1]


@pytest.mark.parametrize("text, lost", [
    ("fox " * 75, 0), ("fox " * 76, 1), ("photorealistic, 8k, " * 20, None), ("🦊" * 30, None), ("a&amp;b " * 30, 15)])
def test_the_tokens_that_are_lost_are_those_that_tokenize_leaves_out(text, lost):
    """Counted by a longer sequence, in which the end token stands further back."""
    whole = tokenize([text], positions=500)[0].tolist().index(49407) - 1
    assert lost in (None, max(whole - 75, 0))
    line = cut_prompts([text])
    assert bool(line) == (whole > 75) and (not line or f"loses its last {whole - 75} token" in line)


# ---- steps and sizes

def test_a_step_with_eta_0_is_diffusers_step_and_has_no_log_probability():
    from diffusers import DDIMScheduler
    theirs = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                           set_alpha_to_one=False, steps_offset=1)
    theirs.set_timesteps(10)
    steps = ddim_steps(10, eta=0.0)
    x, eps, noise = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for i in (0, 4, 9):
        ours, log_p = ddim_step(x, eps, steps, i, noise)
        torch.testing.assert_close(ours, theirs.step(eps, theirs.timesteps[i], x, eta=0.0).prev_sample)
        assert log_p.shape == (2,) and log_p.isnan().all()
        with pytest.raises(ValueError, match="no log-probability"):
            ddim_step(x, eps, steps, i, x_prev=ours)        # what training would do


@pytest.mark.parametrize("height, width", [(7, 8), (9, 13), (5, 6), (1, 3), (8, 16)])
def test_a_latent_of_any_size_is_diffusers(height, width):
    """Sides that cannot be halved twice are rounded up, and the skip's size is taken on the way back."""
    config = UNetConfig(widths=(8, 16, 24), attention=(True, False, True), layers=1, context_width=6, heads=2, groups=4)
    theirs = their_unet(config)
    ours = UNet(config).double()
    ours.load_state_dict(theirs.state_dict())
    torch.manual_seed(1)
    x, t, context = torch.randn(2, 4, height, width).double(), torch.tensor([5, 900]), torch.randn(2, 3, 6).double()
    with torch.no_grad():
        wanted = theirs(x, t, context).sample
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(ours(x, t, context), wanted, rtol=1e-9, atol=1e-9)
