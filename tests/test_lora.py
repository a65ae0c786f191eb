"""LoRA: compared with PEFT and with its formula, saved and loaded."""
import copy
import json

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import randomise, tiny_networks
from ddpo_min.files import InputError
from ddpo_min.lora import TARGETS, LoRALinear, add_lora, load_lora, lora_state, save_lora
from ddpo_min.unet import UNet, UNetConfig


def base(dtype=torch.float64):
    return randomise(tiny_networks()[0]).to(dtype)


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x, context = (torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)
                  for shape in ((2, 4, 8, 8), (2, 5, 16)))
    return x, torch.tensor([7, 900]), context


def trained(rank=3, alpha=6, dtype=torch.float64):
    """A network with a LoRA that changes its output, and its layers."""
    unet = base(dtype)
    layers = add_lora(unet, rank, alpha)
    torch.manual_seed(1)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B.weight)
    return unet.to(dtype), layers


def output(unet):
    with torch.no_grad():
        return unet(*inputs(unet.conv_in.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_at_the_start_the_output_is_the_base_models_to_the_last_bit(dtype):
    unet = base(dtype)
    before = output(unet)
    layers = add_lora(unet, 4)
    assert torch.equal(output(unet), before) and before.dtype == dtype
    for layer in layers.values():
        assert layer.lora_B.weight.eq(0).all() and layer.lora_A.weight.ne(0).all()
        assert layer.lora_A.weight.dtype == torch.float32


def test_a_layer_adds_alpha_over_rank_times_b_a_x():
    torch.manual_seed(0)
    linear = torch.nn.Linear(7, 5, dtype=torch.float64)
    layer = LoRALinear(linear, rank=2, alpha=3).double()
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(4, 6, 7, dtype=torch.float64)
    wanted = linear(x) + 1.5 * x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)


def peft_copy(unet, layers, rank, alpha):
    """PEFT's LoRA on the same base model with the same tensors."""
    plain = base()
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS), lora_dropout=0.0)
    theirs = peft.get_peft_model(plain, config).double().eval()
    for name, layer in layers.items():
        their_layer = theirs.base_model.model.get_submodule(name)
        their_layer.lora_A["default"].weight.data.copy_(layer.lora_A.weight)
        their_layer.lora_B["default"].weight.data.copy_(layer.lora_B.weight)
    return theirs


@pytest.mark.parametrize("rank, alpha", [(4, 4), (3, 6), (2, 1)])
def test_the_network_with_lora_is_pefts(rank, alpha):
    unet, layers = trained(rank, alpha)
    theirs = peft_copy(unet, layers, rank, alpha)
    ours, wanted = output(unet), output(theirs.base_model.model)
    assert (wanted - output(base())).abs().max() > 0.01
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
    assert theirs.get_nb_trainable_parameters()[0] == sum(p.numel() for p in unet.parameters() if p.requires_grad)


def test_gradients_are_pefts():
    unet, layers = trained()
    theirs = peft_copy(unet, layers, 3, 6).base_model.model
    for network in (unet, theirs):
        network(*inputs()).square().mean().backward()
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            wanted = getattr(theirs.get_submodule(name), part)["default"].weight.grad
            assert wanted.abs().max() > 0
            torch.testing.assert_close(getattr(layer, part).weight.grad, wanted, rtol=1e-8, atol=1e-12)


def test_names_in_the_file_are_pefts_under_unet(tmp_path):
    unet, layers = trained()
    save_lora(tmp_path / "lora.safetensors", layers)
    theirs = peft.get_peft_model_state_dict(peft_copy(unet, layers, 3, 6))
    wanted = {name.replace("base_model.model.", "unet."): tensor for name, tensor in theirs.items()}
    saved = load_file(tmp_path / "lora.safetensors")
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in saved)
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.weight" in saved


def test_at_the_size_of_stable_diffusion_rank_4_trains_797184_parameters():
    with torch.device("meta"):
        unet = UNet()
    layers = add_lora(unet, rank=4)
    trainable = [p for p in unet.parameters() if p.requires_grad]
    assert len(layers) == 128 and sum(p.numel() for p in trainable) == 797_184
    assert {p.device.type for p in unet.parameters()} == {"meta"}


def test_on_stable_diffusion_2_the_layers_are_the_same_and_the_output_pefts():
    """None on the linear proj_in and proj_out; 829,952 parameters at its size and rank 4."""
    two = dict(linear=True, context_width=1024, head_width=64)
    with torch.device("meta"):
        large = [add_lora(UNet(UNetConfig(**more)), rank=4) for more in ({}, two)]
    assert large[0].keys() == large[1].keys()
    assert sum(layer.lora_A.weight.numel() + layer.lora_B.weight.numel() for layer in large[1].values()) == 829_952

    unet = randomise(UNet(UNetConfig(widths=(16, 32), attention=(False, True), layers=1, context_width=16, groups=8,
                                     head_width=8, linear=True)))
    theirs = peft.get_peft_model(copy.deepcopy(unet), peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(TARGETS)))
    before, layers = output(unet), add_lora(unet, 3, 6)
    for name, layer in layers.items():
        torch.nn.init.normal_(layer.lora_B.weight)
        their_layer = theirs.base_model.model.get_submodule(name)
        their_layer.lora_A["default"].weight.data.copy_(layer.lora_A.weight)
        their_layer.lora_B["default"].weight.data.copy_(layer.lora_B.weight)
    wanted = output(theirs.double().eval().base_model.model)
    assert (wanted - before).abs().max() > 0.01
    torch.testing.assert_close(output(unet.double()), wanted, rtol=1e-9, atol=1e-9)


def test_only_the_lora_is_trained():
    unet, layers = trained()
    unet(*inputs()).square().mean().backward()
    for name, p in unet.named_parameters():
        assert p.requires_grad == (".lora_" in name) == (p.grad is not None), name
    assert len(lora_state(layers)) == 2 * len(layers) == sum(p.requires_grad for p in unet.parameters())


def test_train_and_eval_change_nothing():
    unet, layers = trained(dtype=torch.float32)
    before, weights = output(unet), {name: p.clone() for name, p in unet.named_parameters()}
    for mode in (unet.train, unet.eval, unet.train):
        mode()
        assert torch.equal(output(unet), before)
    assert all(torch.equal(p, weights[name]) for name, p in unet.named_parameters())


def test_merging_keeps_the_output():
    unet, layers = trained()
    before, weights = output(unet), copy.deepcopy(unet.state_dict())
    for _ in range(2):                                      # merging twice must not add twice
        for layer in layers.values():
            layer.merge()
        torch.testing.assert_close(output(unet), before, rtol=1e-9, atol=1e-9)
    name = next(iter(layers))
    assert (layers[name].weight - weights[f"{name}.weight"]).abs().max() > 0.01
    plain = base()                                          # merged weights alone are the whole network
    plain.load_state_dict({k: v for k, v in unet.state_dict().items() if ".lora_" not in k})
    torch.testing.assert_close(output(plain), before, rtol=1e-9, atol=1e-9)


@pytest.fixture
def saved(tmp_path):
    """(network, its layers, the file they were saved to), in float32."""
    unet, layers = trained(dtype=torch.float32)
    save_lora(tmp_path / "lora.safetensors", layers, reward="jpeg")
    return unet, layers, tmp_path / "lora.safetensors"


def test_a_saved_lora_is_loaded_to_the_last_bit_with_its_alpha(saved):
    unet, layers, path = saved
    other = base(torch.float32)
    loaded = load_lora(path, other)
    assert loaded.keys() == layers.keys() and all(layer.scale == 2.0 for layer in loaded.values())
    for name, tensor in lora_state(loaded).items():
        assert torch.equal(tensor, lora_state(layers)[name]) and tensor.requires_grad
    assert torch.equal(output(other), output(unet))
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["ddpo_min"]) == dict(rank=3, alpha=6.0, reward="jpeg")


def test_scale_0_is_the_base_model_to_the_last_bit_and_scale_a_half_is_half_the_alpha(saved):
    off, half = base(torch.float32), base()
    load_lora(saved[2], off, scale=0.0)
    assert torch.equal(output(off), output(base(torch.float32)))
    load_lora(saved[2], half, scale=0.5)
    torch.testing.assert_close(output(half.double()), output(trained(3, 3)[0]), rtol=1e-9, atol=1e-9)


def test_without_our_metadata_alpha_is_the_rank(saved, tmp_path):
    save_file(load_file(saved[2]), tmp_path / "plain.safetensors")
    assert {layer.scale for layer in load_lora(tmp_path / "plain.safetensors", base()).values()} == {1.0}


def without_one(state, name):
    del state[name]


def with_another(state, name):
    state["unet.conv_in.lora_B.weight"] = torch.zeros(3, 3)


def with_a_longer_one(state, name):
    state[name] = torch.zeros(state[name].shape[0] + 1, 3)


def with_a_transposed_one(state, name):
    state[name] = state[name].T.contiguous()


@pytest.mark.parametrize("change, message", [(without_one, "to_k has only .*lora_A.weight of its two halves"),
                                             (with_another, "conv_in has only .*lora_B.weight of its two halves"),
                                             (with_a_longer_one, "shape"), (with_a_transposed_one, "shape")])
def test_a_file_that_does_not_fit_is_refused(change, message, saved, tmp_path):
    state = load_file(saved[2])
    change(state, "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight")
    save_file(state, tmp_path / "changed.safetensors")
    with pytest.raises(InputError, match=message):
        load_lora(tmp_path / "changed.safetensors", base(torch.float32))


def test_layers_of_two_ranks_and_files_without_a_lora_are_refused(saved, tmp_path):
    state = load_file(saved[2])
    name = next(name for name in state if name.endswith("lora_A.weight"))
    state[name] = state[name][:2].contiguous()
    for wrong, words in ((state, "shapes [(]2, 32[)] and [(]32, 3[)]"),
                         ({"unet.conv_in.weight": torch.zeros(2)}, "no LoRA for this UNet")):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(InputError, match=words):
            load_lora(tmp_path / "wrong.safetensors", base(torch.float32))
