"""LoRA files beyond one LoRA of the UNet: several at once, the text encoder, other names, what must not be written."""
import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
from conftest import randomise, their_text, their_unet, their_vae, tiny_networks
from ddpo_min.files import InputError
from ddpo_min.interchange import export_lora, kohya_name, lora_modules, names_in_files, write_lora
from ddpo_min.learner import Learner
from ddpo_min.lora import load_lora, load_loras
from ddpo_min.unet import UNet
from ddpo_min.weights import load_stable_diffusion, save_single_file
from fuzz_lora_files import DAMAGES, outcome

TRANSFORMER = "mid_block.attentions.0.transformer_blocks.0."
TEXT = "text_model.encoder.layers.0."
UNET_LAYERS = {"down_blocks.0.resnets.0.conv1": (2, 1.0), "down_blocks.0.downsamplers.0.conv": (1, 3.0),
               "mid_block.resnets.1.time_emb_proj": (2, 8.0), "mid_block.attentions.0.proj_in": (4, 2.0),
               "up_blocks.0.upsamplers.0.conv": (2, 2.0), "up_blocks.1.resnets.1.conv_shortcut": (1, 1.0),
               TRANSFORMER + "attn2.to_out.0": (3, 3.0), "time_embedding.linear_1": (2, 1.0), "conv_out": (2, 2.0)}
TEXT_LAYERS = {TEXT + "self_attn.q_proj": (2, 2.0), TEXT + "self_attn.out_proj": (3, 1.5), TEXT + "mlp.fc1": (2, 4.0),
               TEXT + "mlp.fc2": (1, 1.0)}
ATTENTION = {TRANSFORMER + f"attn{i}.{name}": (2, 2.0) for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")}


def networks():
    """The tiny UNet and text encoder, random, in float64."""
    unet, _, text = tiny_networks()
    return randomise(unet), randomise(text, seed=1)


def random_lora(layers, seed=0, dtype=torch.float32):
    """{module: (A, B, alpha)} for {module: (rank, alpha)}."""
    torch.manual_seed(seed)
    unet, text = networks()
    result = {}
    for name, (rank, alpha) in layers.items():
        weight = (text if name.startswith("text_model.") else unet).get_submodule(name).weight
        A, B = torch.randn(rank, *weight.shape[1:]), 0.1 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2))
        result[name] = A.to(dtype), B.to(dtype), alpha
    return result


def write(path, layers, form="kohya", seed=0, metadata=None):
    """Write a random LoRA; returns it."""
    lora = random_lora(layers, seed)
    write_lora(path, form, lora, metadata or {})
    return lora


def add_by_hand(unet, text, lora, strength=1.0):
    """W <- W + strength alpha / rank B A, without a line of ours."""
    for name, (A, B, alpha) in lora.items():
        weight = (text if name.startswith("text_model.") else unet).get_submodule(name).weight
        change = torch.einsum("or,r...->o...", B.double().flatten(1), A.double())
        weight.data += strength * alpha / len(A) * change.reshape(weight.shape)


def output(unet, text):
    """The predicted noise for two prompts' tokens: what both networks do together."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=generator)
    ids = torch.randint(49408, (2, 77), generator=generator)
    with torch.no_grad():
        context = text.double()(ids)
        result = unet.double()(x, torch.tensor([7, 900]), getattr(context, "last_hidden_state", context))
    return getattr(result, "sample", result)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def their_pipeline():
    """diffusers' Stable Diffusion with the weights of networks()."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    unet, vae, text = tiny_networks()
    theirs = StableDiffusionPipeline(their_vae(vae.config), their_text(text.config), None, their_unet(unet.config),
                                     DDIMScheduler(steps_offset=1, clip_sample=False), None, None,
                                     requires_safety_checker=False)
    ours = networks()
    theirs.unet.load_state_dict(ours[0].state_dict())
    prefix = "text_model." if "text_model.final_layer_norm.weight" not in theirs.text_encoder.state_dict() else ""
    theirs.text_encoder.load_state_dict({name.removeprefix(prefix): t for name, t in ours[1].state_dict().items()})
    return theirs


# ---- several LoRAs

def test_several_loras_add_up_each_with_its_strength(tmp_path):
    shared = TRANSFORMER + "attn2.to_out.0"
    first = write(tmp_path / "a.safetensors", {**UNET_LAYERS, **TEXT_LAYERS}, seed=1)
    second = write(tmp_path / "b.safetensors", {shared: (5, 1.0), "conv_in": (2, 2.0), TEXT + "mlp.fc1": (1, 1.0)},
                   seed=2)
    ours, wanted = networks(), networks()
    layers = load_loras([(tmp_path / "a.safetensors", 0.5), (tmp_path / "b.safetensors", -2.0)], *ours)
    add_by_hand(*wanted, first, 0.5)
    add_by_hand(*wanted, second, -2.0)
    assert layers.keys() == first.keys() | second.keys() and layers[shared].lora_A.weight.shape[0] == 3 + 5
    assert (output(*wanted) - output(*networks())).abs().max() > 0.01
    assert_same(output(*ours), output(*wanted))


def test_several_loras_are_diffusers_adapters_with_weights(tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    write(files[0], {**ATTENTION, **TEXT_LAYERS}, "diffusers", seed=1)
    write(files[1], {**ATTENTION, "mid_block.attentions.0.proj_in": (3, 1.0)}, "diffusers", seed=2)
    theirs, ours = their_pipeline(), networks()
    assert_same(output(theirs.unet, theirs.text_encoder), output(*ours))
    for file in files:
        theirs.load_lora_weights(file, adapter_name=file.stem)
    theirs.set_adapters(["a", "b"], [0.7, 1.5])
    load_loras([(files[0], 0.7), (files[1], 1.5)], *ours)
    assert (output(*ours) - output(*networks())).abs().max() > 0.01
    assert_same(output(*ours), output(theirs.unet, theirs.text_encoder))


# ---- the text encoder

@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_diffusers_loads_our_layers_of_the_text_encoder(form, tmp_path):
    """The alphas of both networks come along; diffusers takes one alpha for all attention layers of a kohya file."""
    text = TEXT_LAYERS if form == "diffusers" else {name: (rank, 1.5) for name, (rank, _) in TEXT_LAYERS.items()}
    write(tmp_path / "a.safetensors", {**dict.fromkeys(ATTENTION, (2, 1.0)), **text})
    theirs, ours = their_pipeline(), networks()
    theirs.load_lora_weights(export_lora(tmp_path / "a.safetensors", form))
    load_loras([(tmp_path / "a.safetensors", 1.0)], *ours)
    unet_alone = networks()
    load_lora(tmp_path / "a.safetensors", unet_alone[0])
    assert (output(*ours) - output(*unet_alone)).abs().max() > 0.01
    assert_same(output(*ours), output(theirs.unet, theirs.text_encoder))


def test_layers_of_the_text_encoder_that_diffusers_saved_are_loaded(tmp_path):
    import peft
    theirs, ours, given = their_pipeline(), networks(), {}
    for part, targets, rank, alpha in (("unet", ["to_q"], 2, 3), ("text_encoder", ["k_proj", "fc2"], 3, 1)):
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False,
                                 use_rslora=True)
        state = peft.get_peft_model_state_dict(peft.get_peft_model(getattr(theirs, part), config))      # changes it
        given[f"{part}_lora_layers"] = {name.removeprefix("base_model.model."): t for name, t in state.items()}
        given[f"{part}_lora_adapter_metadata"] = config.to_dict()
    theirs.save_lora_weights(tmp_path, **given)
    layers = load_loras([(tmp_path / "pytorch_lora_weights.safetensors", 1.0)], *ours)
    assert {TEXT + "self_attn.k_proj", TEXT + "mlp.fc2"} < layers.keys()
    assert (output(*ours) - output(*networks())).abs().max() > 0.01
    assert_same(output(*ours), output(theirs.unet, theirs.text_encoder))


@pytest.mark.parametrize("name, part", [
    ("text_encoder.text_model.encoder.layers.0.self_attn.{}_proj", "lora_linear_layer.{}.weight"),
    ("text_encoder.text_model.encoder.layers.0.self_attn.to_{}_lora", "{}.weight"),
    ("text_encoder.encoder.layers.0.self_attn.{}_proj", "lora.{}.weight"),
    ("base_model.model.text_model.encoder.layers.0.self_attn.{}_proj", "lora_{}.weight")])
def test_older_and_newer_names_of_the_text_encoder_are_understood(name, part, tmp_path):
    wanted, ours, state = networks(), networks(), {}
    lora = random_lora({TEXT + f"self_attn.{kind}_proj": (2, 2.0) for kind in ("q", "k", "v", "out")})
    for module, (A, B, _) in lora.items():
        kind = module.split(".")[-1].removesuffix("_proj")
        state.update({f"{name.format(kind)}.{part.format(way)}": t for way, t in (("down", A), ("up", B))})
    save_file(state, tmp_path / "a.safetensors")
    load_loras([(tmp_path / "a.safetensors", 1.0)], *ours)
    add_by_hand(*wanted, lora)
    assert_same(output(*ours), output(*wanted))


def test_training_starts_without_the_text_encoders_layers_and_says_so(tmp_path, capsys):
    write(tmp_path / "a.safetensors", {**ATTENTION, **TEXT_LAYERS})
    assert load_lora(tmp_path / "a.safetensors", networks()[0]).keys() == ATTENTION.keys()
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "8 LoRA layers apply; left out: 4 of the text encoder" in line


# ---- other names

def test_the_originals_block_names_are_those_that_diffusers_converts():
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
    with torch.device("meta"):
        unet = UNet()
    known = names_in_files(lora_modules(unet))
    blocks = ("input_blocks", "middle_block", "output_blocks")
    ours = {name: module for name, module in known.items() if any(b in name for b in blocks) and "attentions" in module}
    assert len(ours) == 16 * 12         # sixteen transformers with twelve layers each
    for name, module in ours.items():
        theirs, = _maybe_map_sgm_blocks_to_diffusers({name: 0}, SimpleNamespace(layers_per_block=2))
        for block, new in zip(blocks, ("down_blocks", "mid_block", "up_blocks")):
            theirs = theirs.replace(block, new)
        assert theirs == kohya_name(module)
    assert [known[f"lora_unet_{name}"] for name in (
        "time_embed_0", "input_blocks_0_0", "input_blocks_3_0_op", "input_blocks_4_0_skip_connection",
        "middle_block_2_out_layers_3", "output_blocks_2_1_conv", "output_blocks_5_2_conv",
        "output_blocks_0_0_in_layers_2", "input_blocks_1_0_emb_layers_1", "out_2")] == [
        "time_embedding.linear_1", "conv_in", "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1.resnets.0.conv_shortcut", "mid_block.resnets.1.conv2", "up_blocks.0.upsamplers.0.conv",
        "up_blocks.1.upsamplers.0.conv", "up_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.time_emb_proj",
        "conv_out"]


@pytest.mark.parametrize("dotted", [False, True])
def test_a_file_with_the_originals_block_names_is_the_same_lora(dotted, tmp_path):
    """By --lora, and by --export-lora, which does not know the model."""
    names = {"down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
             "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
             "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
             "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
             "up_blocks.1.resnets.1.conv_shortcut": "output_blocks.3.0.skip_connection",
             "time_embedding.linear_1": "time_embed.0", "conv_out": "out.2",
             TRANSFORMER + "attn2.to_out.0": "middle_block.1.transformer_blocks.0.attn2.to_out.0",
             "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv"}
    assert names.keys() == UNET_LAYERS.keys()
    write(tmp_path / "a.safetensors", UNET_LAYERS)
    state = {}
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        layer, _, part = name.partition(".")
        original, = (names[module] for module in names if kohya_name(module) == layer)
        state[f"diffusion_model.{original}.{part}" if dotted else
              f"lora_unet_{original.replace('.', '_')}.{part}"] = tensor
    save_file(state, tmp_path / "b.safetensors")
    first, second = networks(), networks()
    load_lora(tmp_path / "a.safetensors", first[0])
    load_lora(tmp_path / "b.safetensors", second[0])
    assert torch.equal(output(*first), output(*second))


def test_an_export_understands_the_originals_block_names_of_stable_diffusion(tmp_path):
    state = {}
    for name in ("input_blocks_4_1_proj_in", "output_blocks_2_1_conv", "output_blocks_5_2_conv"):
        state.update({f"lora_unet_{name}.lora_{way}.weight": torch.ones(1, 1) for way in ("down", "up")})
    save_file(state, tmp_path / "a.safetensors")
    found = load_file(export_lora(tmp_path / "a.safetensors", "diffusers"))
    assert {name.split(".lora_")[0] for name in found} == {
        "unet.down_blocks.1.attentions.0.proj_in", "unet.up_blocks.0.upsamplers.0.conv",
        "unet.up_blocks.1.upsamplers.0.conv"}


@pytest.mark.parametrize("name, kind", [
    ("lora_unet_conv_in.hada_w1_a", "LoHa"), ("lora_unet_conv_in.lokr_w2", "LoKr"), ("lora_unet_conv_in.diff", "full"),
    ("lora_unet_conv_in.dora_scale", "DoRA"), ("unet.conv_in.lora_magnitude_vector.weight", "DoRA"),
    ("base_model.model.conv_in.lora_magnitude_vector", "DoRA"), ("base_model.model.conv_in.hada_w1_b", "LoHa"),
    ("lora_unet_conv_in.lora_mid.weight", "LoCon with a core"), ("unet.conv_in.oft_R.weight", "OFT"),
    ("lora_unet_conv_in.on_input", "IA3"), ("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w2_b", "LoHa")])
def test_layers_of_another_kind_are_called_what_they_are(name, kind, tmp_path):
    save_file({name: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=f"a.safetensors: found no LoRA for this UNet, but 1 of the kind {kind}"):
        load_loras([(tmp_path / "a.safetensors", 1.0)], *networks())


def test_a_whole_model_is_no_lora_of_any_kind(model_file):
    with pytest.raises(InputError, match=r"but 352 that fit no layer [(]cond_stage_model\.\S+, \S+, ...[)]"):
        load_loras([(model_file, 1.0)], *networks())


def test_patterns_that_would_take_for_ever_are_refused_and_others_are_read(tmp_path):
    state = {f"unet.{TRANSFORMER}attn1.to_q.lora_{part}.weight": torch.ones(shape) for part, shape in
             (("A", (2, 32)), ("B", (32, 2)))}
    for pattern in (r"(.*)*x", r".*.*.*.*.*x", r"mid_block\..*to_q", r"^mid_block.+attn\d+.*to_q"):
        metadata = {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {pattern: 6}})}
        save_file(state, tmp_path / "a.safetensors", metadata=metadata)
        if pattern.endswith("x"):
            with pytest.raises(InputError, match="metadata cannot be understood"):
                load_lora(tmp_path / "a.safetensors", networks()[0])
        else:
            layer, = load_lora(tmp_path / "a.safetensors", networks()[0]).values()
            assert layer.alpha == 6


def test_an_alpha_of_peft_that_is_not_finite_is_refused(tmp_path):
    write(tmp_path / "a.safetensors", ATTENTION, "diffusers")
    for text in ('{"unet.lora_alpha": Infinity}', '{"unet.alpha_pattern": {"to_q": NaN}}'):
        save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors",
                  metadata={"lora_adapter_metadata": text})
        with pytest.raises(InputError, match=r"b.safetensors: mid_block\S+ has alpha (inf|nan); the file is damaged"):
            load_lora(tmp_path / "b.safetensors", networks()[0])


@pytest.mark.parametrize("name", ["", "\n", ".", "alpha", "lora_", "x" * 5000])
def test_strange_names_are_left_out_in_one_line(name, tmp_path, capsys):
    write(tmp_path / "a.safetensors", ATTENTION)
    save_file({**load_file(tmp_path / "a.safetensors"), name: torch.ones(1)}, tmp_path / "a.safetensors")
    assert load_lora(tmp_path / "a.safetensors", networks()[0]).keys() == ATTENTION.keys()
    line = capsys.readouterr().out.removesuffix("\n")
    assert line.isprintable() and "8 LoRA layers apply; left out: 1 that fit no layer" in line and len(line) < 400


def test_two_names_for_one_tensor_are_refused(tmp_path):
    write(tmp_path / "a.safetensors", ATTENTION)
    state = load_file(tmp_path / "a.safetensors")
    twice = kohya_name(TRANSFORMER + "attn1.to_q") + ".lora_down.weight"
    for other in (f"unet.{TRANSFORMER}attn1.to_q.lora_A.weight",
                  "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_down.weight"):
        save_file({**state, other: 2 * state[twice]}, tmp_path / "b.safetensors")
        with pytest.raises(InputError, match="two names for the same tensor"):
            load_loras([(tmp_path / "b.safetensors", 1.0)], *networks())


# ---- merging

@pytest.fixture
def model_file(tmp_path):
    """The tiny model in float32, and what writes it in another dtype."""
    save_single_file(tmp_path / "model.safetensors", *tiny_networks(), dtype=torch.float32, image_size=16)
    return tmp_path / "model.safetensors"


def merge(model_file, *arguments):
    sample.main(["--weights", str(model_file), "--merge", str(model_file.with_name("merged.safetensors")), *arguments])
    return load_file(model_file.with_name("merged.safetensors"))


def test_several_loras_and_the_text_encoders_layers_are_merged(model_file, tmp_path):
    first = write(tmp_path / "a.safetensors", {**UNET_LAYERS, **TEXT_LAYERS}, seed=1)
    second = write(tmp_path / "b.safetensors", {**TEXT_LAYERS, **ATTENTION}, seed=2)
    merge(model_file, "--lora", f"{tmp_path}/a.safetensors=0.5", "--lora", f"{tmp_path}/b.safetensors", "--scale", "2")
    wanted, merged = (load_stable_diffusion(tmp_path / f"{name}.safetensors") for name in ("model", "merged"))
    plain = output(wanted.unet, wanted.text_encoder)
    add_by_hand(wanted.unet, wanted.text_encoder, first, 0.5)
    add_by_hand(wanted.unet, wanted.text_encoder, second, 2.0)
    assert (output(merged.unet, merged.text_encoder) - plain).abs().max() > 0.01
    assert_same(output(merged.unet, merged.text_encoder), output(wanted.unet, wanted.text_encoder))
    with safe_open(tmp_path / "merged.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["ddpo_min"])["lora"] == ["a.safetensors=0.5", "b.safetensors=2"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_a_merge_sums_in_float32_and_rounds_once(dtype, model_file, tmp_path):
    lora = write(tmp_path / "a.safetensors", {**UNET_LAYERS, **TEXT_LAYERS})
    save_file({name: t.to(dtype) for name, t in load_file(model_file).items()}, model_file,
              metadata=safe_open(model_file, framework="pt").metadata())
    merged, before = merge(model_file, "--lora", f"{tmp_path}/a.safetensors"), load_file(model_file)
    assert all(t.dtype == dtype for t in merged.values())
    assert len([name for name in merged if not torch.equal(merged[name].float(), before[name].float())]) == len(lora)
    for name, original in ((TEXT + "mlp.fc1", "cond_stage_model.transformer." + TEXT + "mlp.fc1.weight"),
                           ("conv_out", "model.diffusion_model.out.2.weight")):
        A, B, alpha = lora[name]
        change = (alpha / len(A) * (B.flatten(1) @ A.flatten(1))).view_as(before[original])
        wanted = (before[original].float() + change).to(dtype)
        assert torch.equal(merged[original].float(), wanted.float())


@pytest.mark.parametrize("dtype, strength", [(torch.float16, "1e7"), (torch.float8_e4m3fn, "1e5"),
                                             (torch.float32, "1e39")])
def test_a_merge_that_overflows_is_refused_and_writes_nothing(dtype, strength, model_file, tmp_path):
    write(tmp_path / "a.safetensors", {"conv_out": (2, 2.0)})
    save_file({name: t.to(dtype) for name, t in load_file(model_file).items()}, model_file,
              metadata=safe_open(model_file, framework="pt").metadata())
    files = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="merged.safetensors: not written, because conv_out plus the LoRA"):
        merge(model_file, "--lora", f"{tmp_path}/a.safetensors={strength}")
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("part, value", [("lora_down.weight", torch.nan), ("lora_up.weight", torch.inf),
                                         ("alpha", -torch.inf)])
def test_a_lora_with_numbers_that_are_not_finite_is_refused_when_it_is_loaded(part, value, model_file, tmp_path):
    write(tmp_path / "a.safetensors", ATTENTION)
    state, broken = load_file(tmp_path / "a.safetensors"), f"{kohya_name(TRANSFORMER + 'attn2.to_k')}.{part}"
    state[broken].view(-1)[-1] = value
    save_file(state, tmp_path / "a.safetensors")
    for command in (["--merge", f"{tmp_path}/m.safetensors"], ["--export-lora", "diffusers"],
                    ["--prompt", "a fox", "--out", f"{tmp_path}/out", "--device", "cpu"]):
        with pytest.raises(InputError, match=f"a.safetensors: {broken} has numbers that are not finite"):
            sample.main(["--weights", str(model_file), "--lora", f"{tmp_path}/a.safetensors", *command])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "model.safetensors"]


def test_a_lora_of_whole_numbers_is_refused(tmp_path):
    state = {name: t.to(torch.int8) for name, t in random_state(tmp_path).items()}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="has dtype int8; expected floating-point numbers"):
        load_loras([(tmp_path / "a.safetensors", 1.0)], *networks())


def random_state(folder):
    write(folder / "a.safetensors", ATTENTION)
    return load_file(folder / "a.safetensors")


# ---- what an export says of itself

def test_an_export_drops_metadata_that_is_no_longer_true_and_keeps_the_rest(tmp_path):
    stale = {"sshs_model_hash": "1", "sshs_legacy_hash": "2", "modelspec.hash_sha256": "3",
             "ss_network_args": '{"conv_dim": "9"}', "lora_adapter_metadata": '{"unet.lora_alpha": 9}'}
    kept = {"ss_output_name": "fox", "modelspec.title": "Fox", "ss_sd_model_hash": "4", "ss_tag_frequency": "{}"}
    write(tmp_path / "a.safetensors", ATTENTION)
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors", metadata={
        **stale, **kept, "ss_network_dim": "9", "ss_network_alpha": "9.0", "ss_network_module": "lycoris.kohya"})
    for form in ("diffusers", "kohya"):
        with safe_open(export_lora(tmp_path / "a.safetensors", form, 0.5), framework="pt") as file:
            metadata = file.metadata()
        assert kept.items() <= metadata.items() and not set(stale) - {"lora_adapter_metadata"} & metadata.keys()
        assert json.loads(metadata["ddpo_min"]) == dict(rank=2, alpha=1.0)
        if form == "kohya":
            assert [metadata.get(f"ss_network_{key}") for key in ("dim", "alpha", "module")] == [
                "2", "1.0", "networks.lora"] and "lora_adapter_metadata" not in metadata
        else:
            assert not any(name.startswith("ss_network_") for name in metadata)
            assert json.loads(metadata["lora_adapter_metadata"])["unet.lora_alpha"] == 1.0


def test_an_export_whose_alphas_overflow_is_refused(tmp_path):
    write(tmp_path / "a.safetensors", ATTENTION)
    for strength in ("1e39", "1e308"):
        with pytest.raises(InputError, match="a.safetensors: its alphas times 1e[+]3.* are too large"):
            sample.main(["--lora", f"{tmp_path}/a.safetensors={strength}", "--export-lora", "kohya"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


# ---- damaged files

def test_damaged_files_are_read_right_or_refused_in_one_line(tmp_path, monkeypatch):
    """A few of each kind; python tests/fuzz_lora_files.py makes thousands."""
    monkeypatch.chdir(tmp_path)
    results = [outcome(number) for number in range(6 * len(DAMAGES))]
    assert {kind for kind, _ in results} == {damage.__name__ for damage in DAMAGES}
    assert {result for kind, result in results if kind == "good"} == {"read"}
    assert {result for kind, result in results if kind in ("length", "truncated", "longer", "empty")} == {"refused"}


def test_a_lora_on_another_base_model_than_its_own_is_said(tmp_path, monkeypatch, capsys):
    """The same weights in float32, float16 and in a folder are one base; other weights are another."""
    monkeypatch.chdir(tmp_path)
    unet, vae, text = tiny_networks()
    for network in (unet, vae, text):
        for p in network.parameters():
            p.data.copy_(p.data.half().float())
    save_single_file("full.safetensors", unet, vae, text, torch.float32, 16)
    save_single_file("half.safetensors", unet, vae, text, torch.float16, 16)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    unet.get_parameter(f"{name}.weight").data[0, 0] += 0.01
    save_single_file("other.safetensors", unet, vae, text, torch.float32, 16)
    full, half, other = (load_stable_diffusion(f"{name}.safetensors") for name in ("full", "half", "other"))
    assert full.base == half.base != other.base and re.fullmatch("[0-9a-f]{16}", full.base)
    learner = Learner(full, trainable="lora", rank=2, init_lora="", seed=0, statistics=None, lr=1e-3, grad_clip=1)
    learner.save(tmp_path, base="full.safetensors")
    capsys.readouterr()
    for weights, said in (("full", 0), ("half", 0), ("other", 1)):
        for out in (["--merge", f"merged-{weights}.safetensors"], ["--prompt", "a fox", "--num", "1", "--steps", "2"]):
            sample.main(["--weights", f"{weights}.safetensors", "--lora", "lora.safetensors", *out])
            printed = capsys.readouterr().out
            assert printed.count("lora.safetensors: trained on another base model (full.safetensors)") == said
    Learner(load_stable_diffusion("other.safetensors"), trainable="lora", rank=2, init_lora="lora.safetensors", seed=0,
            statistics=None, lr=1e-3, grad_clip=1)
    assert "another base model" in capsys.readouterr().out
