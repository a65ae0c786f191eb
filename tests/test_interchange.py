"""LoRA files of other programs: diffusers loads ours, we load theirs, and conversion loses nothing."""
import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import train
from conftest import randomise, their_text, their_unet, their_vae, tiny_networks
from ddpo_min.advantages import PromptStatistics
from ddpo_min.cli import make_settings, read_settings
from ddpo_min.files import InputError
from ddpo_min.interchange import export_lora, kohya_form, kohya_name, lora_modules, read_lora, write_lora
from ddpo_min.learner import Learner
from ddpo_min.lora import add_lora, load_lora, lora_state, replace, save_lora
from ddpo_min.unet import UNet
from ddpo_min.weights import load_stable_diffusion, save_single_file

TRANSFORMER = "mid_block.attentions.0.transformer_blocks.0."

# Layers of every kind, each with its rank and alpha: what other trainers write
WIDE = {"down_blocks.0.resnets.0.conv1": (2, 1.0), "down_blocks.0.downsamplers.0.conv": (3, 3.0),
        "down_blocks.1.resnets.0.conv_shortcut": (1, 0.5), "mid_block.resnets.0.time_emb_proj": (2, 8.0),
        "mid_block.attentions.0.proj_in": (4, 2.0), "mid_block.attentions.0.proj_out": (2, 2.0),
        TRANSFORMER + "ff.net.0.proj": (3, 1.0), TRANSFORMER + "ff.net.2": (5, 4.0),
        TRANSFORMER + "attn1.to_q": (4, 1.0), TRANSFORMER + "attn2.to_out.0": (4, 3.0)}


def base(dtype=torch.float64):
    return randomise(tiny_networks()[0]).to(dtype)


def output(unet):
    generator = torch.Generator().manual_seed(3)
    x, context = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 16)))
    with torch.no_grad():
        result = unet.double()(x, torch.tensor([7, 900]), context)
    return getattr(result, "sample", result)


def with_layers(wide):
    """A network with a random LoRA of these {name: (rank, alpha)}, and its layers."""
    unet = base()
    torch.manual_seed(1)
    layers = {name: replace(unet, name, rank, alpha) for name, (rank, alpha) in wide.items()}
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.3)
    return unet, layers


def attention_only():
    """Every attention projection, with scale 2: what a run writes, except for alpha."""
    return dict.fromkeys(add_lora(base(), 3), (3, 6))


@pytest.fixture(params=[attention_only(), WIDE], ids=["attention", "wide"])
def saved(request, tmp_path):
    """(network, the file its LoRA was saved to)."""
    unet, layers = with_layers(request.param)
    save_lora(tmp_path / "lora.safetensors", layers, reward="jpeg", command="python train.py --reward jpeg")
    return unet, tmp_path / "lora.safetensors"


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def assert_same_file(a, b):
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


# ---- diffusers and PEFT load ours

def their_pipeline():
    """diffusers' Stable Diffusion with our base UNet's weights."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    unet, vae, text = tiny_networks()
    pipeline = StableDiffusionPipeline(their_vae(vae.config), their_text(text.config), None, their_unet(unet.config),
                                       DDIMScheduler(steps_offset=1, clip_sample=False), None, None,
                                       requires_safety_checker=False)
    pipeline.unet.load_state_dict(base().state_dict())
    return pipeline


# diffusers 0.42 uses one alpha for all attention projections of a kohya file, the most frequent one
ONE_ALPHA = {name: (rank, 1.0 if ".attn" in name else alpha) for name, (rank, alpha) in WIDE.items()}


@pytest.mark.parametrize("form, wide", [("as saved", attention_only()), ("as saved", WIDE), ("diffusers", WIDE),
                                        ("kohya", attention_only()), ("kohya", ONE_ALPHA)])
def test_diffusers_loads_every_form_and_predicts_the_same_noise(form, wide, tmp_path):
    (unet, layers), path = with_layers(wide), tmp_path / "lora.safetensors"
    save_lora(path, layers)
    pipeline = their_pipeline()
    torch.testing.assert_close(output(pipeline.unet), output(base()), rtol=1e-9, atol=1e-9)
    pipeline.load_lora_weights(path if form == "as saved" else export_lora(path, form))
    wanted = output(unet)
    assert (wanted - output(base())).abs().max() > 0.01
    torch.testing.assert_close(output(pipeline.unet), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wide", [attention_only(), WIDE])
def test_peft_loads_a_saved_file_with_the_configuration_in_it(wide, tmp_path):
    import peft
    unet, layers = with_layers(wide)
    save_lora(tmp_path / "lora.safetensors", layers)
    config = json.loads(header(tmp_path / "lora.safetensors")["lora_adapter_metadata"])
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(**{key.removeprefix("unet."): value for key, value in config.items()}), base())
    state = {name.removeprefix("unet."): t for name, t in load_file(tmp_path / "lora.safetensors").items()}
    assert not peft.set_peft_model_state_dict(theirs, state).unexpected_keys
    torch.testing.assert_close(output(theirs), output(unet), rtol=1e-9, atol=1e-9)


def test_a_folder_saved_by_peft_is_loaded_with_its_configuration(tmp_path):
    """adapter_model.safetensors: names begin with base_model.model., alpha is only in adapter_config.json."""
    import peft
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "conv1"],
                                                         init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    ours = base()
    load_lora(tmp_path / "adapter_model.safetensors", ours)
    torch.testing.assert_close(output(ours), output(theirs.base_model.model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metadata", [
    {"lora_adapter_metadata": '{"unet.lora_alpha": "abc"}'}, {"lora_adapter_metadata": '{"unet.lora_alpha": null}'},
    {"lora_adapter_metadata": '{"unet.alpha_pattern": ["a"]}'},
    {"lora_adapter_metadata": '{"unet.alpha_pattern": {"*(": 2}}'},
    {"lora_adapter_metadata": '{"unet.alpha_pattern": {"to_q": "abc"}}'},
    {"lora_adapter_metadata": "[]"}, {"ddpo_min": "[]"}, {"ddpo_min": "3"}])
def test_malformed_metadata_is_refused_in_one_line(metadata, saved, tmp_path):
    save_file(load_file(saved[1]), tmp_path / "odd.safetensors", metadata=metadata)
    with pytest.raises(InputError, match="odd.safetensors: its metadata cannot be understood"):
        read_lora(tmp_path / "odd.safetensors", lora_modules(base()))


def test_files_of_diffusers_with_patterns_and_rank_stabilised_scale_are_loaded(tmp_path):
    """PEFT's configuration is in the metadata: ranks and alphas by pattern, and rslora's alpha / sqrt(rank)."""
    import peft
    from diffusers.training_utils import _collate_lora_metadata
    pipeline = their_pipeline()
    pipeline.unet.add_adapter(peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "to_out.0", "proj_in", "conv1"], rank_pattern={"to_q": 2},
        alpha_pattern={"attn2.to_q": 5, "proj_in": 1}, use_rslora=True, init_lora_weights=False))
    state = peft.get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(tmp_path, state, **_collate_lora_metadata({"unet": pipeline.unet}))
    ours = base()
    assert len(load_lora(tmp_path / "pytorch_lora_weights.safetensors", ours)) == len(state) // 2
    wanted = output(pipeline.unet)
    assert (wanted - output(base())).abs().max() > 0.01
    torch.testing.assert_close(output(ours), wanted, rtol=1e-9, atol=1e-9)


def test_the_names_that_diffusers_used_before_peft_are_loaded(tmp_path):
    """attn1.processor.to_out_lora.down and ff.net.2.lora.down: to_out has no number."""
    unet, layers = with_layers({TRANSFORMER + name: (2, 2) for name in ("attn1.to_q", "attn2.to_out.0", "ff.net.2")})
    state = {}
    for name, old in (("attn1.to_q", "attn1.processor.to_q_lora"), ("attn2.to_out.0", "attn2.processor.to_out_lora"),
                      ("ff.net.2", "ff.net.2.lora")):
        layer = layers[TRANSFORMER + name]
        state[f"unet.{TRANSFORMER}{old}.down.weight"] = layer.lora_A.weight.detach()
        state[f"unet.{TRANSFORMER}{old}.up.weight"] = layer.lora_B.weight.detach()
    for prefix in ("unet.", ""):        # the first releases had no unet. prefix either
        save_file({name.replace("unet.", prefix): t for name, t in state.items()}, tmp_path / "old.safetensors")
        ours = base()
        assert load_lora(tmp_path / "old.safetensors", ours).keys() == layers.keys()
        torch.testing.assert_close(output(ours), output(unet), rtol=1e-9, atol=1e-9)


# ---- names, shapes and metadata of the kohya form

def real_kohya():
    """{name: shape} of a kohya file for Stable Diffusion 1.x with layers of rank 7."""
    shapes = {}
    for line in (Path(__file__).parent / "data" / "sd15_kohya.txt").read_text().splitlines():
        if line[0] != "#":
            name, *parts = line.split()
            down, up = (tuple(int(n) for n in part.replace("r", "7").split(",")) for part in parts)
            shapes.update({f"lora_unet_{name}.lora_down.weight": down, f"lora_unet_{name}.lora_up.weight": up,
                           f"lora_unet_{name}.alpha": ()})
    return shapes


def stable_diffusion(add):
    """{name: shape}, metadata of the kohya form of the LoRA that `add` puts on a UNet of SD 1.x's size."""
    with torch.device("meta"):
        unet = UNet()
    layers = {name: (layer.lora_A.weight, layer.lora_B.weight, 7.0) for name, layer in add(unet).items()}
    state, metadata = kohya_form(layers)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}, metadata


def test_kohya_names_and_shapes_are_those_of_a_real_file():
    real = real_kohya()
    assert len(real) == 576
    ours, metadata = stable_diffusion(lambda unet: add_lora(unet, 7))
    assert ours == {name: shape for name, shape in real.items() if "_attn1_to_" in name or "_attn2_to_" in name}
    assert metadata == {"ss_network_module": "networks.lora", "ss_network_dim": "7", "ss_network_alpha": "7.0",
                        "ss_base_model_version": "sd_v1", "ss_v2": "False"}
    names = {name.split(".")[0] for name in real}
    whole, _ = stable_diffusion(lambda unet: {name: replace(unet, name, 7, 7) for name in lora_modules(unet)
                                              if kohya_name(name) in names})
    assert whole == real


def test_both_forms_keep_the_details_of_the_run(saved):
    details = dict(reward="jpeg", command="python train.py --reward jpeg")
    wide = len({tensor.shape[0] for name, tensor in load_file(saved[1]).items() if "lora_A" in name}) > 1
    ranks = dict(rank=[1, 2, 3, 4, 5], alpha=[0.5, 1, 2, 3, 4, 8]) if wide else dict(rank=3, alpha=6)
    for form in ("kohya", "diffusers"):
        metadata = header(export_lora(saved[1], form))
        assert json.loads(metadata["ddpo_min"]) == {**details, **ranks}
        assert ("lora_adapter_metadata" in metadata) == (form == "diffusers")
        if form == "kohya":
            values = metadata["ss_network_dim"], metadata["ss_network_alpha"]
            assert values == (("Dynamic", "Dynamic") if wide else ("3", "6.0"))
            assert "ss_base_model_version" not in metadata      # the width is not that of SD's text encoder


# ---- round trips, exact

def test_ours_to_kohya_and_back_is_ours_to_the_last_bit(saved, tmp_path):
    back = export_lora(export_lora(saved[1], "kohya"), "diffusers")
    assert_same_file(back, saved[1])
    unet = base()
    load_lora(back, unet)
    assert torch.equal(output(unet), output(saved[0]))


def kohya_file(path, dtype=torch.float16):
    """Write WIDE as another trainer does, without our code; returns {module: (A, B, alpha)} as stored."""
    torch.manual_seed(2)
    unet, state, layers = base(), {}, {}
    for name, (rank, alpha) in WIDE.items():
        weight = unet.get_submodule(name).weight
        A, B = torch.randn(rank, *weight.shape[1:]).to(dtype), torch.randn(len(weight), rank).to(dtype)
        B = B.view(*B.shape, *[1] * (weight.ndim - 2))
        key = "lora_unet_" + name.replace(".", "_")
        state.update({f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B,
                      f"{key}.alpha": torch.tensor(alpha, dtype=dtype)})
        layers[name] = A, B, alpha
    save_file(state, path, metadata={"ss_network_dim": "5", "ss_output_name": "theirs"})
    return layers


def test_a_kohya_file_through_the_diffusers_form_is_the_same_to_the_last_bit(tmp_path):
    kohya_file(tmp_path / "theirs.safetensors")
    back = export_lora(export_lora(tmp_path / "theirs.safetensors", "diffusers"), "kohya")
    assert back.name == "theirs-diffusers-kohya.safetensors"
    assert_same_file(back, tmp_path / "theirs.safetensors")
    assert header(back)["ss_output_name"] == "theirs"


def test_scale_multiplies_every_alpha_of_an_export(saved):
    modules = lora_modules(base())
    before, after = (read_lora(path, modules)[0] for path in (saved[1], export_lora(saved[1], "kohya", 0.5)))
    assert before.keys() == after.keys()
    for name, (_, B, alpha) in before.items():
        assert after[name][2] == alpha / 2 and torch.equal(after[name][1], B)


def test_all_names_of_the_shipped_model_and_of_stable_diffusion_can_be_exported(tmp_path):
    with torch.device("meta"):
        sd = UNet()
    for unet in (load_stable_diffusion().unet, sd):
        layers = {name: (torch.ones(1, 1), torch.ones(1, 1), 1.0) for name in lora_modules(unet)}
        write_lora(tmp_path / "all.safetensors", "kohya", layers, {})
        back = load_file(export_lora(tmp_path / "all.safetensors", "diffusers"))
        assert back.keys() == {f"unet.{name}.lora_{part}.weight" for name in layers for part in "AB"}


# ---- files of other programs on a network

def test_a_wider_file_adds_alpha_over_rank_b_a_to_each_layer(tmp_path):
    theirs = kohya_file(tmp_path / "theirs.safetensors")
    unet, wanted = base().requires_grad_(True), base()
    layers = load_lora(tmp_path / "theirs.safetensors", unet)
    assert list(layers) == [name for name in lora_modules(wanted) if name in WIDE]      # the network's order
    for name, (A, B, alpha) in theirs.items():
        weight = wanted.get_submodule(name).weight
        weight += alpha / WIDE[name][0] * torch.einsum("or,r...->o...", B.double().flatten(1), A.double())
    assert (output(wanted) - output(base())).abs().max() > 0.01
    for layer in layers.values():
        assert layer.lora_A.weight.dtype == torch.float32
    torch.testing.assert_close(output(unet), output(wanted), rtol=1e-9, atol=1e-9)
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{part}.weight" for name in WIDE for part in "AB"}


def test_a_1x1_convolution_can_be_stored_as_a_linear_layer_and_vice_versa(tmp_path):
    unet, layers = with_layers({"mid_block.attentions.0.proj_in": (2, 2), TRANSFORMER + "attn1.to_q": (2, 2)})
    save_lora(tmp_path / "a.safetensors", layers)
    state = {name: t[:, :, 0, 0] if t.ndim == 4 else t[:, :, None, None]
             for name, t in load_file(tmp_path / "a.safetensors").items()}
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "b.safetensors")
    ours = base()
    load_lora(tmp_path / "b.safetensors", ours)
    assert torch.equal(output(ours), output(unet))


def test_what_cannot_be_applied_is_named_in_one_line(tmp_path, capsys):
    path = tmp_path / "theirs.safetensors"
    kohya_file(path)
    state = load_file(path)
    text = "lora_te_text_model_encoder_layers_{}_mlp_fc1"
    for i in range(3):
        state.update({f"{text.format(i)}.lora_{part}.weight": torch.ones(2, 2) for part in ("down", "up")})
    dora = kohya_name(TRANSFORMER + "attn1.to_q")
    state[dora + ".dora_scale"] = torch.ones(32, 1)
    state["lora_unet_somewhere_else.hada_w1_a"] = torch.ones(2, 2)
    save_file(state, path)
    layers = load_lora(path, base())
    assert layers.keys() == WIDE.keys() - {TRANSFORMER + "attn1.to_q"}       # DoRA is more than B A, so it is left out
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and f"{path}: 9 LoRA layers apply" in line
    assert f"3 of the text encoder ({text.format(0)}, ...)" in line
    assert f"1 of the kind DoRA ({dora})" in line and "1 of the kind LoHa (lora_unet_somewhere_else)" in line
    kohya_file(path)
    load_lora(path, base())
    assert capsys.readouterr().out == ""


CONV = "unet.conv_in."      # (16, 4, 3, 3)


@pytest.mark.parametrize("state, words", [
    ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 2)}, "for this UNet, but 1 of the text"),
    ({"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": (2, 2)}, "for this UNet, but 1 of the text"),
    ({"conv_in.weight": (2, 2)}, "no LoRA for this UNet, but 1 that fit no layer [(]conv_in.weight[)]"),
    ({}, "no LoRA for this UNet, but nothing at all"),
    ({CONV + "lora_A.weight": (2, 4, 3, 3)}, "conv_in has only unet.conv_in.lora_A.weight of its two halves"),
    ({CONV + "lora_A.weight": (2, 4, 3, 3), CONV + "lora_B.weight": (16, 3, 1, 1)}, "expected [(]rank, in[)]"),
    ({CONV + "lora_A.weight": (0, 4, 3, 3), CONV + "lora_B.weight": (16, 0, 1, 1)}, "expected [(]rank, in[)]"),
    ({CONV + "lora_A.weight": (2,), CONV + "lora_B.weight": (16, 2, 1, 1)}, "expected [(]rank, in[)]"),
    ({CONV + "lora_A.weight": (2, 4, 3, 3), CONV + "lora_B.weight": (16, 2, 1, 1), CONV + "alpha": (2,)}, "2 values"),
    ({CONV + "lora_A.weight": (2, 4, 1, 1), CONV + "lora_B.weight": (16, 2, 1, 1)}, "this model needs"),
])
def test_lora_files_that_do_not_fit_are_refused_in_one_line(state, words, tmp_path):
    save_file({name: torch.ones(shape) for name, shape in state.items()}, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match=words) as error:
        load_lora(tmp_path / "wrong.safetensors", base())
    assert "\n" not in str(error.value)


def test_metadata_that_is_no_json_is_refused(tmp_path, saved):
    for key, text in (("lora_adapter_metadata", "{"), ("lora_adapter_metadata", "[]"), ("ddpo_min", "x")):
        save_file(load_file(saved[1]), tmp_path / "wrong.safetensors", metadata={key: text})
        with pytest.raises(InputError, match="metadata"):
            load_lora(tmp_path / "wrong.safetensors", base())


# ---- merging

@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_merged_file_is_the_base_with_the_lora(saved, scale, tiny_file, tmp_path, capsys):
    before, out = tiny_file.read_bytes(), tmp_path / "merged.safetensors"
    sample.main(["--lora", str(saved[1]), "--merge", str(out), "--weights", str(tiny_file), "--scale", str(scale)])
    assert capsys.readouterr().out == f"wrote {out}\n" and tiny_file.read_bytes() == before
    merged, separate = load_stable_diffusion(out), load_stable_diffusion(tiny_file)
    plain = output(load_stable_diffusion(tiny_file).unet)
    load_lora(saved[1], separate.unet, scale)
    wanted = output(separate.unet)
    assert (wanted - plain).abs().max() > 1e-3 and merged.image_size == 16
    torch.testing.assert_close(output(merged.unet), wanted, rtol=1e-5, atol=1e-5)      # the file is float32
    assert load_file(out).keys() == load_file(tiny_file).keys()


def test_a_merged_file_keeps_dtypes_and_is_rounded_once(tmp_path):
    unet, layers = with_layers(WIDE)
    save_lora(tmp_path / "lora.safetensors", layers)
    parts = tiny_networks()
    for dtype in (torch.float16, torch.bfloat16):
        save_single_file(tmp_path / "base.safetensors", *parts, dtype=dtype, image_size=16)
        sample.main(["--lora", str(tmp_path / "lora.safetensors"), "--merge", str(tmp_path / "merged.safetensors"),
                     "--weights", str(tmp_path / "base.safetensors")])
        with pytest.raises(InputError, match="already there"):
            sample.main(["--lora", str(tmp_path / "lora.safetensors"), "--merge", str(tmp_path / "base.safetensors")])
        model, merged = (load_stable_diffusion(tmp_path / name, dtype=None)
                         for name in ("base.safetensors", "merged.safetensors"))
        for name, parameter in merged.unet.named_parameters():
            wanted, layer = model.unet.get_parameter(name), layers.get(name.removesuffix(".weight"))
            if layer is not None and name.endswith(".weight"):
                change = layer.lora_B.weight.detach().flatten(1) @ layer.lora_A.weight.detach().flatten(1)
                rank, alpha = WIDE[name.removesuffix(".weight")]
                wanted = (wanted.float() + (alpha / rank * change).view_as(wanted)).to(dtype)
            assert parameter.dtype == dtype and torch.equal(parameter, wanted), name
        (tmp_path / "merged.safetensors").unlink()


# ---- the commands

def test_exporting_needs_no_prompt_and_no_weights_and_replaces_an_older_file(saved, capsys, monkeypatch):
    target = saved[1].with_name("lora-kohya.safetensors")
    target.write_text("older")
    monkeypatch.setattr(sample, "load_stable_diffusion", None)
    for form in ("kohya", "diffusers"):
        sample.main(["--lora", str(saved[1]), "--export-lora", form])
        assert capsys.readouterr().out == f"wrote {saved[1].with_name(f'lora-{form}.safetensors')}\n"
    sample.main(["--lora", str(saved[1]), "--export-lora", "kohya", "--scale", "3"])
    three = load_file(target)
    half = torch.zeros(1, 1, dtype=torch.bfloat16)      # alpha is not rounded to its dtype
    assert kohya_form({"a": (half, half, 0.3)})[0]["lora_unet_a.alpha"] == torch.tensor(0.3)
    assert_same_file(export_lora(saved[1], "kohya", 3.0), target)
    export_lora(saved[1], "kohya")
    assert all(torch.equal(3 * t, three[name]) for name, t in load_file(target).items() if name.endswith("alpha"))
    assert sorted(p.name for p in saved[1].parent.iterdir()) == [
        "lora-diffusers.safetensors", "lora-kohya.safetensors", "lora.safetensors"]


@pytest.mark.parametrize("wrong, words", [
    (["--export-lora", "kohya"], "--lora"), (["--merge", "x.safetensors"], "--lora"), ([], "--prompt"),
    (["--lora", "a.safetensors", "--merge", "x.ckpt"], "x.ckpt"),
    (["--lora", "a.safetensors", "--export-lora", "kohya", "--prompt", "a", "--prompts", "animals"], "--prompt"),
    (["--lora", "missing.safetensors", "--export-lora", "kohya"], "missing.safetensors: no such file"),
    (["--lora", "..", "--export-lora", "kohya"], r"^\.\.: a folder; expected a \.safetensors file$")])
def test_flags_that_do_not_go_together_are_refused(wrong, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        sample.main(wrong)
    assert not list(tmp_path.iterdir())


# ---- training that starts from a LoRA

def arguments(model_file, out, *more, epochs=3):
    return ["--weights", str(model_file), "--preset", "laptop", "--samples", "8", "--updates", "2", "--steps", "3",
            "--epochs", str(epochs), "--eval-samples", "5", "--device", "cpu", "--prompt-minimum", "2",
            "--out", str(out), *more]


def test_training_starts_from_a_lora_of_any_layers_and_resumes_exactly(tiny_file, tmp_path, capsys):
    start = tmp_path / "theirs.safetensors"
    kohya_file(start)
    weaker = {name: tensor * 0.1 if "lora_up" in name else tensor for name, tensor in load_file(start).items()}
    save_file(weaker, start)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train.main(arguments(tiny_file, whole, "--init-lora", str(start)))
    train.main(arguments(tiny_file, halves, "--init-lora", str(start), epochs=1))
    start.unlink()                                  # the run has its own copy
    train.main(["--resume", str(halves), "--epochs", "3"])
    assert_same_file(whole / "lora.safetensors", halves / "lora.safetensors")
    trained = load_file(whole / "lora.safetensors")
    assert trained.keys() == {f"unet.{name}.lora_{part}.weight" for name in WIDE for part in "AB"}
    changed = [name for name in WIDE if not torch.equal(
        trained[f"unet.{name}.lora_B.weight"], weaker[kohya_name(name) + ".lora_up.weight"].float())]
    assert len(changed) == len(WIDE)
    alphas = {name: alpha for name, (_, _, alpha) in read_lora(whole / "lora.safetensors", WIDE)[0].items()}
    assert alphas == {name: alpha for name, (_, alpha) in WIDE.items()}
    details = json.loads(header(halves / "lora.safetensors")["ddpo_min"])
    command = shlex.split(details["command"])
    assert command[:2] == ["python", "train.py"] and command[command.index("--epochs") + 1] == "3"
    assert read_settings([*command[2:], "--out", str(whole)]) == make_settings(
        init_lora=str(start), weights=str(tiny_file), samples=8, updates=2, steps=3, epochs=3, eval_samples=5,
        device="cpu", prompt_minimum=2, out=str(whole))
    assert details["base"] == tiny_file.name and details["epochs"] == 3 and details["reward"] == "jpeg"
    result = json.loads((halves / "result.json").read_text())
    assert all(details[name] == result[name] for name in ("reward_before", "reward_after"))


def test_the_evaluation_before_a_run_already_has_the_lora_it_starts_from(tiny_file, tmp_path):
    unet, layers = with_layers(attention_only())
    save_lora(tmp_path / "a.safetensors", layers)
    model = load_stable_diffusion(tiny_file)
    learner = Learner(model, trainable="lora", rank=4, init_lora=tmp_path / "a.safetensors", seed=0, lr=1e-3,
                      statistics=PromptStatistics())
    plain = load_stable_diffusion(tiny_file)
    load_lora(tmp_path / "a.safetensors", plain.unet)
    assert torch.equal(output(model.unet), output(plain.unet))
    assert all(torch.equal(tensor, lora_state(layers)[name]) for name, tensor in learner.parameters.items())


def test_an_init_lora_has_its_own_ranks_and_cannot_start_a_training_of_the_whole_unet():
    with pytest.raises(InputError, match="--rank"):
        read_settings(["--init-lora", "a.safetensors", "--rank", "8"])
    assert read_settings(["--init-lora", "a.safetensors"]).init_lora == "a.safetensors"
    with pytest.raises(InputError, match="--merge"):
        make_settings(init_lora="a.safetensors", trainable="full")
