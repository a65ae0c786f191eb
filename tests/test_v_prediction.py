"""Models that predict v: the noise it implies and the schedule, against diffusers; files that say so; whole runs."""
import json
import math
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file

import sample
import train
from conftest import cut, random_lora_policy, tiny_networks
from ddpo_min import rollout, rwr
from ddpo_min.cli import make_settings
from ddpo_min.ddim import ddim_step, ddim_steps, x0_hat
from ddpo_min.files import InputError
from ddpo_min.forward_process import forward_process_update
from ddpo_min.lora import add_lora, save_lora
from ddpo_min.plan import Plan
from ddpo_min.policy import Policy
from ddpo_min.prompts import find_prompts, held_out
from ddpo_min.rollout import sample_trajectories
from ddpo_min.schedule import alphas_cumprod
from ddpo_min.v_prediction import LAST, PREDICTIONS, eps_from_v, zero_terminal_snr
from ddpo_min.weights import load_stable_diffusion, save_single_file
from fuzz_model_files import make_models
from test_model_files import edit, negate
from test_train import arguments, metrics

SCALED = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def schedule(zero_snr):
    return zero_terminal_snr(alphas_cumprod()) if zero_snr else alphas_cumprod()


# ---- equations

def test_the_schedule_without_signal_at_its_end_is_that_of_diffusers():
    ours = schedule(True)
    beta = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    theirs = (1 - rescale_zero_terminal_snr(beta)).cumprod(0)
    torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=1e-9, atol=0)
    assert theirs[-1] == 0 and ours[-1] == LAST < ours[-2] and (ours.diff() < 0).all()
    assert ours[0] == pytest.approx(1 - 0.00085, rel=1e-12)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_eps_from_v_undoes_the_definition_of_v(zero_snr):
    a, x_0, eps = schedule(zero_snr), normal(1000, seed=1), normal(1000, seed=2)
    x_t, v = a.sqrt() * x_0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * x_0
    torch.testing.assert_close(eps_from_v(v, x_t, a), eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(x0_hat(x_t, eps_from_v(v, x_t, a), a), x_0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("n, eta, zero_snr", [(10, 1.0, False), (20, 0.5, True), (500, 1.0, True)])
def test_whole_trajectories_of_v_are_those_of_diffusers(n, eta, zero_snr):
    """Theirs takes x_0 from v. Steps of 2 visit t = 999, where the schedule without signal has next to none."""
    theirs = DDIMScheduler(**SCALED, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=
                           "v_prediction", timestep_spacing="leading", rescale_betas_zero_snr=zero_snr)
    a = schedule(zero_snr)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), a, rtol=2e-3, atol=1e-7)     # theirs is float32
    theirs.alphas_cumprod, theirs.final_alpha_cumprod = a, a[0]
    theirs.set_timesteps(n)
    steps = ddim_steps(n, eta, a)
    x = y = normal(2, 4, 3, 3, seed=n)
    for i, t in enumerate(theirs.timesteps):
        noise = normal(2, 4, 3, 3, seed=100 + i)

        def v(z):
            return torch.tanh(1.3 * z) * math.cos(int(t) / 300) + 0.4 * torch.sin(z.roll(1, -1)) + 0.1
        x, _ = ddim_step(x, eps_from_v(v(x), x, steps.alpha_bar[i]), steps, i, noise=noise)
        y = theirs.step(v(y), t, y, eta=eta, variance_noise=noise).prev_sample
        assert steps.t[i] == t and (x - y).abs().max() < 1e-9
    assert (theirs.timesteps[0] == 999) == (n == 500)


# ---- the policy

def model_of(prediction, dtype=torch.float64):
    from ddpo_min.weights import StableDiffusion
    networks = (network.to(dtype).requires_grad_(False).eval() for network in tiny_networks())
    return StableDiffusion(*networks, image_size=16, report="", prediction=prediction)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_policy_guides_v_and_returns_the_noise(prediction, guidance):
    """For one timestep, as in sampling, and for several, as in regression."""
    model, x = model_of(prediction), normal(3, 4, 8, 8, seed=1)
    policy = Policy(model, ddim_steps(4, alpha_bar=model.alpha_bar), guidance)
    context, empty = model.encode_prompts(["a cat", "a dog", "a fox"]), model.encode_prompts([""] * 3)
    for t in (751, torch.tensor([3, 500, 998])):
        times = torch.full((3,), t) if isinstance(t, int) else t
        unguided, out = model.unet(x, times, empty), model.unet(x, times, context)
        out = unguided + guidance * (out - unguided)
        a = schedule(prediction == "v_zsnr")[times][:, None, None, None]
        wanted = out if prediction == "eps" else a.sqrt() * out + (1 - a).sqrt() * x
        assert (wanted - out).abs().max() > 0.1 or prediction == "eps"
        torch.testing.assert_close(policy.eps(x, t, context, guidance), wanted, rtol=0, atol=1e-9)


def test_a_network_of_16_bits_does_not_round_the_clean_latent():
    """x_0 is a small difference of x_t and eps, so eps is computed from the latent as it is stored."""
    model, x, t = model_of("v_zsnr", torch.bfloat16), normal(2, 4, 8, 8, dtype=torch.float32), 981
    context, a = model.encode_prompts(["a cat", "a dog"]), model.alpha_bar[981].item()
    v = model.unet(x.bfloat16(), torch.tensor([t, t]), context).float()
    got = x0_hat(x, Policy(model, ddim_steps(2), 1.0).eps(x, t, context, 1.0), a)
    assert a < 1e-4
    torch.testing.assert_close(got, a ** 0.5 * x - (1 - a) ** 0.5 * v, rtol=0, atol=1e-3)


@pytest.mark.parametrize("prediction", ["eps", "v_zsnr"])
@pytest.mark.parametrize("algorithm", ["rwr", "awm"])
def test_pictures_are_noised_anew_by_the_models_own_schedule(algorithm, prediction, tiny_file, monkeypatch):
    policy, _ = random_lora_policy(tiny_file, 2.0, 2)
    policy.model.prediction = prediction
    path, seen = sample_trajectories(policy, ["a fox"] * 4, range(4), cut(4, 4), keep="x_0"), []
    monkeypatch.setattr(rollout, "sample_noise", lambda seeds, *rest: torch.ones(len(seeds), 1, 4, 8, 8))
    monkeypatch.setattr(policy, "eps", lambda x_t, t, *rest: (seen.append((x_t, t)), x_t.requires_grad_())[1])

    class Ignores:
        def backward(self, loss):
            pass

        def step(self):
            return 0.0

        epoch = old_policy = nullcontext
    given = policy, Ignores(), path, np.ones(4), np.random.default_rng(0)
    if algorithm == "rwr":
        rwr.rwr_update(*given, plan=Plan(4, 1, 4))
    else:
        forward_process_update(*given, plan=Plan(4, 1, 4), algorithm=algorithm, timesteps=1, grid=False,
                               step_weights="paper", clip_range=1.0, power=1.0, beta=1.0, advantage_clip=5.0)
    x_t, t = seen[0]
    a = schedule(prediction == "v_zsnr").float()[t][:, None, None, None]
    x_0 = (x_t.detach() - (1 - a).sqrt()) / a.sqrt()
    distance = torch.cdist(x_0.flatten(1), path.latents[:, -1].flatten(1)).min(1).values
    assert (distance < 0.01 * path.latents[:, -1].flatten(1).norm(dim=1).min()).all()


# ---- files that say it

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with model.safetensors and folder/, two tiny models that predict noise, without saying so."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture
def single(models, tmp_path):
    """A function that writes the single file with more tensors and metadata, and returns its path."""
    def write(change=lambda state: None, keys=(), **metadata):
        state = load_file(models / "model.safetensors")
        with safe_open(models / "model.safetensors", "pt") as file:
            metadata = {**file.metadata(), **metadata}
        change(state)
        state.update({key: torch.tensor([]) for key in keys})
        save_file(state, tmp_path / "a.safetensors", metadata)
        return tmp_path / "a.safetensors"
    return write


SAYS = "modelspec.prediction_type"
RESCALED = dict(alphas_cumprod=rescale_zero_terminal_snr(1 - alphas_cumprod() / torch.cat(
    [torch.ones(1), alphas_cumprod()[:-1]])).neg().add(1).cumprod(0).float())


@pytest.mark.parametrize("keys, metadata, wanted", [
    ([], {}, "eps"), (["v_pred"], {}, "v"), (["v_pred", "ztsnr"], {}, "v_zsnr"), (["v_pred"], {SAYS: "epsilon"}, "v"),
    ([], {SAYS: "v"}, "v"), ([], {SAYS: "v_prediction"}, "v"), (["ztsnr"], {SAYS: "v"}, "v_zsnr"),
    (["ztsnr"], {}, "eps"), ([], {SAYS: "epsilon"}, "eps")])
def test_a_single_file_says_what_it_predicts(single, keys, metadata, wanted):
    model = load_stable_diffusion(single(keys=keys, **metadata))
    assert model.prediction == wanted
    torch.testing.assert_close(model.alpha_bar, schedule(wanted == "v_zsnr"), rtol=0, atol=0)


def test_the_schedule_in_a_file_must_be_the_one_that_is_used(single):
    load_stable_diffusion(single(lambda state: state.update(RESCALED), ["v_pred", "ztsnr"]))
    model = load_stable_diffusion(single(lambda state: state.update(RESCALED)), prediction="v_zsnr")
    assert model.alpha_bar[-1] == LAST
    for keys in ([], ["v_pred"]):
        with pytest.raises(InputError, match="alphas_cumprod"):
            load_stable_diffusion(single(lambda state: state.update(RESCALED), keys))


def test_what_is_given_comes_before_what_the_file_says_and_what_the_test_finds(single):
    with pytest.raises(InputError, match="seems to predict v; say so with --prediction v .* --prediction eps"):
        load_stable_diffusion(single(negate))
    for prediction in PREDICTIONS:
        assert load_stable_diffusion(single(negate), prediction=prediction).prediction == prediction
        assert load_stable_diffusion(single(keys=["v_pred"]), prediction=prediction).prediction == prediction


@pytest.mark.parametrize("says, rescaled, wanted", [
    ("epsilon", False, "eps"), ("v_prediction", None, "v"), ("v_prediction", False, "v"),
    ("v_prediction", True, "v_zsnr")])
def test_a_folder_says_what_it_predicts(models, tmp_path, says, rescaled, wanted):
    folder = shutil.copytree(models / "folder", tmp_path / "folder")
    config = folder / "scheduler" / "scheduler_config.json"
    edit(config, prediction_type=says, rescale_betas_zero_snr=rescaled)
    assert load_stable_diffusion(folder).prediction == wanted
    edit(config, prediction_type="epsilon", rescale_betas_zero_snr=True)        # there the noise shows nothing
    with pytest.raises(InputError, match="rescale_betas_zero_snr"):
        load_stable_diffusion(folder)


@pytest.mark.parametrize("prediction, keys", [("eps", set()), ("v", {"v_pred"}), ("v_zsnr", {"v_pred", "ztsnr"})])
def test_what_is_saved_or_merged_says_it_too(tmp_path, prediction, keys):
    path, lora, merged = (tmp_path / f"{name}.safetensors" for name in ("a", "lora", "merged"))
    save_single_file(path, *tiny_networks(), torch.float32, 16, prediction)
    model = load_stable_diffusion(path)
    save_lora(lora, add_lora(model.unet))
    sample.main(["--lora", str(lora), "--weights", str(path), "--merge", str(merged)])
    for file in (path, merged):
        assert load_stable_diffusion(file).prediction == prediction
        assert load_file(file).keys() & {"v_pred", "ztsnr"} == keys


def test_an_unknown_prediction_is_refused_by_the_flags():
    with pytest.raises(InputError, match="--prediction x0: unknown; expected one of eps, v, v_zsnr"):
        make_settings(prediction="x0")


# ---- whole runs

@pytest.fixture(scope="module")
def v_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("v") / "v.safetensors"
    save_single_file(path, *tiny_networks(), torch.float32, 16, "v_zsnr")
    return path


def test_sample_draws_by_v(v_file, tmp_path, monkeypatch):
    """x_0 and eps each from v, as diffusers' sampler takes them, without ddim.py, policy.py and v_prediction.py."""
    monkeypatch.chdir(tmp_path)
    sample.main(["--weights", str(v_file), "--prompt", "a fox", "--num", "1", "--steps", "4", "--guidance", "2",
                 "--seed", "5", "--device", "cpu"])
    model, noise = load_stable_diffusion(v_file), normal(5, 4, 8, 8, seed=5, dtype=torch.float32)
    x, a = noise[:1], RESCALED["alphas_cumprod"].double().tolist()
    with torch.no_grad():
        for i, t in enumerate((751, 501, 251, 1)):
            now, then = a[t], a[max(t - 250, 0)]
            without, v = (model.unet(x, torch.tensor([t]), model.encode_prompts([p])) for p in ("", "a fox"))
            v = without + 2 * (v - without)
            x_0, eps = now ** 0.5 * x - (1 - now) ** 0.5 * v, now ** 0.5 * v + (1 - now) ** 0.5 * x
            sigma = ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
            x = then ** 0.5 * x_0 + (1 - then - sigma ** 2) ** 0.5 * eps + sigma * noise[i + 1:i + 2]
        wanted = ((model.vae.decode(x)[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).int().numpy()
    drawn = np.asarray(Image.open(tmp_path / "samples" / "0000.png")).astype(int)
    assert abs(drawn - wanted).max() <= 1 and drawn.std() > 2


@pytest.mark.parametrize("more", [["--kl-weight", "0.1"], ["--algorithm", "rwr", "--normalise", "epoch",
                                                           "--timestep-fraction", "1"]])
def test_a_run_trains_a_model_of_v(v_file, tmp_path, more):
    train.main(arguments(v_file, tmp_path / "run", *more, epochs=2))
    lines = metrics(tmp_path / "run")
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    if "rwr" not in more:
        assert [line["max_ratio_error"] for line in lines] == [0.0, 0.0] and lines[-1]["kl_to_base"] > 0
    settings, model = json.loads((tmp_path / "run" / "config.json").read_text()), load_stable_diffusion(v_file)
    assert settings["prediction"] == ""
    policy = Policy(model, ddim_steps(3, alpha_bar=model.alpha_bar), 1.0)       # the evaluation drew by v's schedule
    prompts, seeds = held_out(find_prompts("animals"), 5)
    drawn = sample_trajectories(policy, prompts, seeds, cut(5, 4), keep="images")
    assert np.array_equal(np.load(tmp_path / "run" / "before.npz")["images"], drawn.images)
