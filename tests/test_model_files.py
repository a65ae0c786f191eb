"""Model files as they occur: what they predict, their schedule, their spelling, shards, damage."""
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

import sample
from conftest import their_text, their_unet
from ddpo_min.files import InputError
from ddpo_min.lora import add_lora, save_lora
from ddpo_min.text import TextConfig, tokenize
from ddpo_min.unet import UNetConfig
from ddpo_min.weights import load_stable_diffusion, save_single_file
from fuzz_model_files import fuzz, join, make_models, split
from test_weights import SMALL_2, networks

OUT = "model.diffusion_model.out.2.weight"
VAE_Q = "first_stage_model.decoder.mid.attn_1.q.weight"
TEXT_NORM = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
REAL_SCHEDULERS = {     # scheduler/scheduler_config.json of the repositories
    "1.4": dict(_class_name="PNDMScheduler", _diffusers_version="0.7.0.dev0", beta_end=0.012,
                beta_schedule="scaled_linear", beta_start=0.00085, num_train_timesteps=1000, set_alpha_to_one=False,
                skip_prk_steps=True, steps_offset=1, trained_betas=None, clip_sample=False),
    "2.1": dict(_class_name="DDIMScheduler", beta_end=0.012, beta_schedule="scaled_linear", beta_start=0.00085,
                clip_sample=False, num_train_timesteps=1000, prediction_type="epsilon", set_alpha_to_one=False,
                skip_prk_steps=True, steps_offset=1, trained_betas=None),
    "newer": dict(beta_schedule="scaled_linear", rescale_betas_zero_snr=False, timestep_spacing="trailing",
                  thresholding=False, use_flow_sigmas=None, use_karras_sigmas=True, variance_type="fixed_small"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with model.safetensors and folder/, two tiny models that predict noise, without saying so."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture
def single(models, tmp_path):
    """A function that writes the single file with changed {name: tensor} and metadata, and returns its path."""
    def write(change=lambda state: None, **metadata):
        state = load_file(models / "model.safetensors")
        with safe_open(models / "model.safetensors", "pt") as file:
            metadata = {**file.metadata(), **metadata}
        change(state)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "a.safetensors", metadata)
        return tmp_path / "a.safetensors"
    return write


@pytest.fixture
def folder(models, tmp_path):
    """A copy of the diffusers folder, whose UNet is in two shards."""
    return shutil.copytree(models / "folder", tmp_path / "folder")


def edit(path, **changes):
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_refused(path, *words, dtype=torch.float32):
    with pytest.raises(InputError) as caught:
        load_stable_diffusion(path, dtype=dtype)
    message = str(caught.value)
    assert message.isprintable()
    for word in [str(path), *words]:
        assert word in message, message


def equal(a, b):
    """Whether two models have the same weights, to the bit."""
    return all(torch.equal(x, y) for part in ("unet", "vae", "text_encoder") for x, y in zip(
        getattr(a, part).state_dict().values(), getattr(b, part).state_dict().values(), strict=True))


# ---- what a model predicts

def negate(state):
    for name in (OUT, OUT.replace("weight", "bias")):
        state[name] = -state[name]


def half(state):
    for name in state:
        if name.startswith("model."):
            state[name] = state[name].half()


def float8(state):
    for name in state:
        state[name] = state[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("stored", [lambda state: None, half, float8])
def test_no_way_to_load_a_model_skips_the_check(single, dtype, stored):
    """Also where the tensors are loaded as they are, to be saved again, in dtypes that cannot be computed in."""
    kept = load_stable_diffusion(single(stored), dtype=dtype).unet.conv_in.weight.dtype
    assert kept == (dtype or load_file(single(stored))["model.diffusion_model.input_blocks.0.0.weight"].dtype)
    assert_refused(single(lambda state: negate(state) or stored(state)), "output for pure noise", dtype=dtype)


def test_merging_checks_what_the_base_predicts_and_says_so(single, tmp_path):
    lora = tmp_path / "lora.safetensors"
    save_lora(lora, add_lora(load_stable_diffusion(single()).unet))
    sample.main(["--lora", str(lora), "--weights", str(single()), "--merge", str(tmp_path / "good.safetensors")])
    with safe_open(tmp_path / "good.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "epsilon"
    with pytest.raises(InputError, match="output for pure noise"):
        sample.main(["--lora", str(lora), "--weights", str(single(negate)), "--merge", str(tmp_path / "b.safetensors")])
    assert not (tmp_path / "b.safetensors").exists()


# ---- its schedule, and other things that its files say of the mathematics

@pytest.mark.parametrize("version", REAL_SCHEDULERS)
def test_the_schedulers_of_real_repositories_are_accepted(folder, models, version):
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(REAL_SCHEDULERS[version]))
    assert equal(load_stable_diffusion(folder), load_stable_diffusion(models / "folder"))


@pytest.mark.parametrize("file, key, value", [
    ("scheduler/scheduler_config.json", "beta_schedule", "linear"),
    ("scheduler/scheduler_config.json", "beta_start", 0.0001),
    ("scheduler/scheduler_config.json", "beta_end", 0.02),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 4000),
    ("scheduler/scheduler_config.json", "trained_betas", [0.01] * 1000),
    ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", True),
    ("scheduler/scheduler_config.json", "use_flow_sigmas", True),
    ("scheduler/scheduler_config.json", "shift", 3.0),
    ("scheduler/scheduler_config.json", "prediction_type", "sample"),
    ("unet/config.json", "flip_sin_to_cos", False),
    ("unet/config.json", "act_fn", "gelu"),
    ("unet/config.json", "resnet_time_scale_shift", "scale_shift"),
    ("vae/config.json", "shift_factor", 0.1),
    ("text_encoder/config.json", "hidden_act", "relu"),
    ("text_encoder/config.json", "layer_norm_eps", 1e-3),
])
def test_what_is_computed_otherwise_is_refused(folder, file, key, value):
    edit(folder / file, **{key: value})
    assert_refused(folder, *((str(value),) if key == "prediction_type" else (key,)))


def test_a_checkpoint_of_another_schedule_is_refused(single):
    """Its alphas_cumprod, here rescaled to zero signal at the end as by rescale_betas_zero_snr."""
    from diffusers import DDIMScheduler
    ours, other = (DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                 rescale_betas_zero_snr=zero).alphas_cumprod for zero in (False, True))
    load_stable_diffusion(single(lambda state: state.update(alphas_cumprod=ours.half())))
    assert_refused(single(lambda state: state.update(alphas_cumprod=other)), "alphas_cumprod")


# ---- the text encoder of 2.x in transformers' spelling

def test_the_text_encoder_of_2x_in_transformers_spelling(tmp_path):
    """The file says nothing of it: 16 heads, OpenCLIP's GELU and padding, 23 of 24 layers; against transformers."""
    save_single_file(tmp_path / "a.safetensors", *networks(replace(SMALL_2[0], context_width=32), *SMALL_2[1:]),
                     dtype=torch.float32, image_size=64)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if not name.startswith("text_")}
    state = {name: tensor for name, tensor in load_file(tmp_path / "a.safetensors").items()
             if not name.startswith("cond_stage_model.")}
    theirs = their_text(TextConfig(width=32, layers=24, heads=16, inner=48, openclip=True))
    for name, tensor in theirs.state_dict().items():
        state["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = tensor
    state["cond_stage_model.transformer.text_projection.weight"] = torch.zeros(32, 32)
    save_file(state, tmp_path / "b.safetensors", metadata)
    prompts = ["a fox", "two dogs on the moon"]
    ours = load_stable_diffusion(tmp_path / "b.safetensors", dtype=torch.float64).encode_prompts(prompts)
    hidden = theirs(tokenize(prompts, padding=0), output_hidden_states=True).hidden_states[23]
    norm = next(module for name, module in theirs.named_modules() if name.endswith("final_layer_norm"))
    assert (ours - norm(hidden)).abs().max() < 1e-9


# ---- one name for one tensor

@pytest.mark.parametrize("name, again", [
    (VAE_Q, "first_stage_model.decoder.mid_block.attentions.0.to_q.weight"),
    (OUT, "model.diffusion_model.conv_out.weight"),
    (TEXT_NORM, TEXT_NORM.replace("text_model.", ""))])
def test_two_names_for_one_tensor_are_refused(single, name, again):
    assert_refused(single(lambda state: state.update({again: state[name] + 1})), name, again, "two names")


def test_two_names_for_one_tensor_of_openclip_are_refused(tmp_path):
    """in_proj holds the rows of q, k and v."""
    save_single_file(tmp_path / "a.safetensors", *networks(*SMALL_2), image_size=64)
    state = load_file(tmp_path / "a.safetensors")
    q = "cond_stage_model.model.transformer.resblocks.0.attn.q_proj.weight"
    state[q] = torch.zeros(16, 16)
    save_file(state, tmp_path / "a.safetensors")
    assert_refused(tmp_path / "a.safetensors", "in_proj_weight", "self_attn.q_proj.weight")


def test_two_names_for_one_tensor_of_a_folder_are_refused(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["decoder.mid_block.attentions.0.query.weight"] = state["decoder.mid_block.attentions.0.to_q.weight"] + 1
    save_file(state, path)
    assert_refused(folder, "attentions.0.query.weight", "two names")


def test_one_name_twice_is_refused(models, tmp_path):
    """In a header a later entry could hide the first."""
    header, body = split((models / "model.safetensors").read_bytes())
    again = dict(header[OUT], dtype="I32")
    (tmp_path / "a.safetensors").write_bytes(join(json.dumps({OUT: again})[:-1] + ", " + json.dumps(header)[1:], body))
    assert_refused(tmp_path / "a.safetensors", OUT, "twice")


# ---- config.json

@pytest.mark.parametrize("size, pixels", [(None, 512), (8, 16), ([8, 8], 16), (7, 14)])
def test_sample_size_as_diffusers_writes_it(folder, size, pixels):
    """null says nothing, so it is Stable Diffusion's."""
    edit(folder / "unet" / "config.json", sample_size=size)
    assert load_stable_diffusion(folder).image_size == pixels


@pytest.mark.parametrize("file, key, value, words", [
    ("unet", "sample_size", [8, 16], ["image_size [8, 16]", "expected a whole number"]),
    ("unet", "sample_size", "64", ["image_size 64"]),
    ("unet", "sample_size", 0, ["image_size 0"]),
    ("unet", "sample_size", 10 ** 400, ["image_size"]),
    ("unet", "norm_num_groups", "x\n" * 100, ["unet_groups x\\nx\\n", "expected a whole number from 1"]),
    ("unet", "norm_num_groups", 5, ["do not fit together"]),
    ("unet", "attention_head_dim", 3, ["numbers of heads"]),
    ("unet", "attention_head_dim", [1, 2, 4], ["different widths"]),
    ("unet", "attention_head_dim", {"a": 1}, ["unet_heads {'a': 1}"]),
    ("vae", "scaling_factor", float("nan"), ["latent_scale nan"]),
    ("vae", "norm_num_groups", 0, ["vae_groups 0"]),
    ("text_encoder", "num_attention_heads", 2.5, ["text_heads 2.5"]),
    ("text_encoder", "num_hidden_layers", 2, ["numbers of heads or layers"])])
def test_malformed_configurations_are_refused_in_our_words(folder, file, key, value, words):
    edit(folder / file / "config.json", **{key: value})
    assert_refused(folder, *words, "supported: ")


@pytest.mark.parametrize("content", [b"", b"[]", b'[["a", 1]]', b"\xff{}", b"[" * 100_000, b"1" * 9000])
def test_what_is_no_json_object_is_refused(folder, content):
    (folder / "unet" / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"unet/config.json: not a JSON object; download it again$"):
        load_stable_diffusion(folder)


def test_networks_of_different_models_are_refused(folder):
    """A text encoder of another width, like 2.x's with a UNet of 1.x."""
    their_text(TextConfig(width=24, layers=1, heads=2, inner=24)).save_pretrained(folder / "text_encoder")
    assert_refused(folder, "reads texts as vectors of 16 numbers, its text encoder writes 24")


# ---- files of another kind, and in several parts

@pytest.mark.parametrize("content, words", [
    (b"GGUF\3\0\0\0" + bytes(100), "a GGUF file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n", "a Git LFS pointer"),
    (b"\x80\2", "pickled"), (b"<html>", "not a complete safetensors file"), (b"", "not a complete safetensors file")])
def test_a_file_is_named_for_what_it_is(folder, tmp_path, content, words):
    for path, model in ((folder / "vae" / "diffusion_pytorch_model.safetensors", folder),
                        (tmp_path / "a.safetensors", tmp_path / "a.safetensors")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=words):
            load_stable_diffusion(model)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_networks_as_diffusers_and_transformers_write_them(folder, variant):
    unet = their_unet(UNetConfig(widths=(16, 32), attention=(False, True), layers=1, context_width=16, heads=2,
                                 groups=8), sample_size=8)
    text = their_text(TextConfig(width=16, layers=1, heads=2, inner=32))
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    for network, part, size in ((unet, "unet", "100KB"), (text, "text_encoder", "1MB")):
        shutil.rmtree(folder / part)
        network.save_pretrained(folder / part, max_shard_size=size, variant=variant)
        assert len(list((folder / part).glob("*.safetensors"))) > 1
    model = load_stable_diffusion(folder, dtype=torch.float64)
    states = [{name.removeprefix("text_model."): tensor for name, tensor in network.state_dict().items()}
              for network in (model.unet, unet, model.text_encoder, text)]
    for ours, theirs in (states[:2], states[2:]):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items() if name in ours)
        assert len(ours) == len(set(ours) & set(theirs)) > 10


@pytest.mark.parametrize("change, words", [
    (lambda unet: (unet / "diffusion_pytorch_model-1.safetensors").unlink(), ["no such file"]),
    (lambda unet: edit(unet / INDEX, weight_map={"a": "../vae/diffusion_pytorch_model.safetensors"}), ["weight_map"]),
    (lambda unet: edit(unet / INDEX, weight_map=[]), ["weight_map"]),
    (lambda unet: edit(unet / INDEX, weight_map={"a": "diffusion_pytorch_model-0.safetensors"}),
     ["has no tensor"]),
    (lambda unet: shutil.copy(unet / "diffusion_pytorch_model-0.safetensors",
                              unet / "diffusion_pytorch_model-1.safetensors"), ["two names"])])
def test_broken_shards_are_refused(folder, change, words):
    change(folder / "unet")
    assert_refused(folder, *words)


INDEX = "diffusion_pytorch_model.safetensors.index.json"


# ---- numbers that are not finite

@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_weights_that_are_not_finite_are_named_when_they_are_loaded(single, number, dtype):
    def put(state):
        state[VAE_Q][3, 4] = number
    assert_refused(single(put), "vae tensor decoder.mid_block.attentions.0.to_q.weight", "not finite", dtype=dtype)


def test_weights_that_overflow_in_float16_are_named(single):
    def put(state):
        state[OUT][0, 0, 0, 0] = 1e5
    path = single(put, **{"modelspec.prediction_type": "epsilon"})
    assert_refused(path, "unet tensor conv_out.weight overflows in torch.float16", "--dtype", dtype=torch.float16)
    load_stable_diffusion(path, dtype=torch.bfloat16)


# ---- damage of all kinds

def test_damaged_models_load_rightly_or_are_refused_in_one_line(tmp_path):
    """The first of the models of tests/fuzz_model_files.py, four of each kind of damage."""
    found = list(fuzz(tmp_path, 108))
    assert [each for each in found if each[3]] == []
    assert len({kind for _, kind, _, _ in found}) == 27
    assert {what for _, _, what, _ in found} == {"refused", "loaded", "same"}
