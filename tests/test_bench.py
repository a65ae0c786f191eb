"""The benchmark measures what it says: the same work on both sides, and as many operations as there are."""
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import cut, random_lora_policy
from ddpo_min import bench
from ddpo_min.layers import Attention
from ddpo_min.lora import add_lora, lora_state
from ddpo_min.policy import Policy
from ddpo_min.rollout import sample_trajectories
from ddpo_min.settings import Settings
from ddpo_min.vae import decode_images
from ddpo_min.weights import load_stable_diffusion
from diffusers_side import diffusers_policy


def test_diffusers_side_does_the_same_work(tiny_file):
    """Same eps, same pictures, as many trained numbers: the ratio compares like with like."""
    settings = Settings(samples=2, updates=1, steps=2, guidance=2.0)
    model = load_stable_diffusion(tiny_file)
    theirs, trained = diffusers_policy(model, settings)
    ours = Policy(model, theirs.steps, 2.0)
    paths = [sample_trajectories(p, ["a fox", "a cat"], [0, 1], cut(2, 2)) for p in (ours, theirs)]
    torch.testing.assert_close(paths[0].latents, paths[1].latents, atol=1e-4, rtol=1e-4)
    images = [decode_images(p.model.vae, path.latents[:, -1]).astype(int) for p, path in zip((ours, theirs), paths)]
    assert abs(images[0] - images[1]).max() <= 1
    layers = add_lora(model.unet, settings.rank)
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in lora_state(layers).values())


def operations(unet, *inputs):
    """FLOPs of a forward pass, two for each multiplication of a weight, by what every layer is asked for."""
    total = 0

    def count(module, given, result):
        nonlocal total
        if isinstance(module, Attention):
            x = given[0]
            keys = given[1].shape[1] if len(given) > 1 and given[1] is not None else x.shape[1]
            total += 2 * 2 * x.shape[1] * keys * x.shape[2]                     # q k, and the weights times v
        else:
            total += 2 * result[0].numel() * module.weight[0].numel()

    hooks = [module.register_forward_hook(count) for module in unet.modules()
             if type(module) in (nn.Linear, nn.Conv2d, Attention)]
    with torch.no_grad():
        unet(*inputs)
    for hook in hooks:
        hook.remove()
    return total


def test_operations_are_counted_as_by_hand(tiny_file):
    model = load_stable_diffusion(tiny_file)
    by_hand = operations(model.unet, torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 77, 16))
    counted = [bench.flops(model, Settings(steps=steps, guidance=g)) for steps, g in ((1, 1.0), (2, 1.0), (2, 2.0))]
    sampling, (_, training, _) = zip(*counted)
    passes = sampling[1] - sampling[0]
    assert passes == pytest.approx(by_hand, rel=0.1) and passes > by_hand       # the LoRA comes on top
    assert sampling[2] - sampling[1] == pytest.approx(2 * passes)
    assert 1.5 * 2 * passes < training < 3 * 2 * passes     # back through frozen layers: no gradient of their weights


def test_the_command_says_what_it_measured(capsys):
    bench.main(["--samples", "2", "--batch", "2", "--steps", "1", "--repeat", "1", "--device", "cpu", "--profile"])
    out = capsys.readouterr().out
    for words in ("2 pictures, 1 steps", "matrix product:", "sampling", "training", "peak memory", "to the last bit"):
        assert words in out
    assert "NOT" not in out
    shares = [float(share) for share in re.findall(r"^ +([\d.]+)%  \S+$", out, re.M)]
    assert len(shares) == 12 and shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100.6
    assert re.search(r"%  \w*convolution", out) and re.search(r"%  mm$", out, re.M)


def test_whole_pictures_are_decoded_as_many_at_a_time_as_in_sampling(tiny_file, monkeypatch, capsys):
    """16 pictures in 12.8 s, 0.2 s of each decoding: 0.06 s a step; 0.1 s a step of training."""
    model, decoded = load_stable_diffusion(tiny_file), []
    monkeypatch.setattr(bench, "decode_images", lambda vae, latents: decoded.append(len(latents)))
    monkeypatch.setattr(bench, "seconds", lambda device, work: (0.8, work()))
    bench.print_whole_pictures(SimpleNamespace(
        settings=Settings(samples=16, batch=4, steps=10), sampling=[12.8], training=[16.0],
        optimizer=SimpleNamespace(parameters=[torch.zeros(1)])), model)
    assert capsys.readouterr().out == ("at 50 steps, from these: 3.2 s to sample a picture, 5.0 s to train on it: "
                                       "0.1220 images/s together\n")
    assert set(decoded) == {4}


@pytest.mark.parametrize("arguments", [["--samples", "0"], ["--size", "flux"], ["--count"], ["--against", "trl"],
                                       ["--nonsense"]])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises((SystemExit, bench.InputError)):
        bench.main(arguments)


def test_the_random_file_has_sane_values(tmp_path, monkeypatch, tiny_file):
    """Its numbers neither vanish nor explode on their way through the networks."""
    small = [type(part) for part in random_lora_policy(tiny_file, 1.0, 1)[0].model.__dict__.values()][:3]
    model = load_stable_diffusion(tiny_file)
    configs = (model.unet.config, model.vae.config, model.text_encoder.config)
    for name, kind, config in zip(("UNet", "VAE", "TextEncoder"), small, configs):
        monkeypatch.setattr(bench, name, lambda kind=kind, config=config: kind(config))
    bench.random_file(tmp_path / "random.safetensors")
    from safetensors.torch import load_file
    for name, tensor in load_file(tmp_path / "random.safetensors").items():
        assert tensor.dtype == torch.float16 and tensor.isfinite().all(), name
        if tensor.ndim > 1 and tensor.numel() > 500:
            assert tensor.float().std().item() == pytest.approx(tensor[0].numel() ** -0.5, rel=0.2), name
