"""What fits, what compiles, what is dropped and computed again: none of it may change a result."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import plain_descent, random_lora_policy
from ddpo_min import machine
from ddpo_min.ddim import ddim_steps
from ddpo_min.files import InputError, is_out_of_memory, run_main
from ddpo_min.lora import add_lora, lora_state
from ddpo_min.rollout import Policy, rescore, sample_trajectories
from ddpo_min.settings import Settings, parse
from ddpo_min.update import Optimiser, ddpo_update, of_norms, rwr_update
from ddpo_min.weights import load_stable_diffusion
from test_train import arguments, assert_same_run
import train

SMALL = Settings(samples=4, updates=2, batch=2, steps=2)


def gradient(policy, parameters):
    """The gradient of the sum of eps at fixed latents, for each parameter."""
    x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    context = policy.model.encode_prompts(["a fox", "a cat", "a dog"])
    for p in parameters:
        p.grad = None
    policy.eps(x_t, 500, context, policy.model.encode_prompts([""]).expand(3, -1, -1)).square().sum().backward()
    return [p.grad.clone() for p in parameters]


def kept_for_backward(policy):
    """Bytes that autograd keeps between forward and backward pass."""
    sizes = []
    x_t = torch.zeros(2, 4, 8, 8)
    context = policy.model.encode_prompts(["a fox", "a cat"])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
        policy.eps(x_t, 500, context, context)
    return sum(sizes)


def test_checkpointing_keeps_less_and_gives_the_same_gradient_to_the_last_bit(tiny_file):
    policy, parameters = random_lora_policy(tiny_file, 2.0, 2)
    plain, kept = gradient(policy, parameters), kept_for_backward(policy)
    policy.model.unet.checkpointing = True
    assert kept_for_backward(policy) < 0.5 * kept
    assert all(torch.equal(a, b) for a, b in zip(plain, gradient(policy, parameters)))


def needs_memory(monkeypatch, room):
    """Have every attempt at more than `room` pictures end as on a full GPU; returns the attempts."""
    attempts = []

    def try_out(policy, parameters, batch, spare=False):
        attempts.append(batch)
        if batch > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(machine, "try_out", try_out)
    return attempts


def test_batch_auto_halves_until_it_fits_and_says_so(monkeypatch, capsys):
    attempts = needs_memory(monkeypatch, room=5)
    assert machine.fitting_batch(None, [torch.zeros(1)], 32) == 4
    assert attempts == [32, 16, 8, 4]
    assert "32 pictures at a time do not fit into memory, trying 16" in capsys.readouterr().out


def test_batch_auto_names_what_helps_where_one_picture_is_too_much(monkeypatch):
    needs_memory(monkeypatch, room=0)
    with pytest.raises(InputError, match="--checkpointing on"):
        machine.fitting_batch(None, [torch.zeros(1)], 8)


def test_other_errors_are_not_taken_for_a_full_memory(monkeypatch):
    def broken(policy, parameters, batch, spare):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(machine, "try_out", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        machine.fitting_batch(None, [torch.zeros(1)], 8)


def test_trying_out_leaves_no_gradient_and_no_random_number_behind(tiny_file):
    policy, parameters = random_lora_policy(tiny_file, 1.0, 2)
    before, values = torch.get_rng_state(), [p.detach().clone() for p in parameters]
    machine.try_out(policy, parameters, 3)
    assert all(p.grad is None for p in parameters) and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, value) for p, value in zip(parameters, values))


def test_a_run_with_batch_auto_is_the_run_with_the_batch_it_finds(tiny_file, tmp_path, monkeypatch):
    train.main(arguments(tiny_file, tmp_path / "two", "--batch", "2", epochs=2))
    needs_memory(monkeypatch, room=2)
    train.main(arguments(tiny_file, tmp_path / "auto", "--batch", "auto", epochs=2))
    assert_same_run(tmp_path / "two", tmp_path / "auto")


def test_the_micro_batch_does_not_change_an_update(tiny_file):
    """Gradients of halves of a share add up to the share's."""
    def update(batch):
        policy, parameters = random_lora_policy(tiny_file, 1.0, 2)
        settings = replace(SMALL, batch=batch, updates=1)
        path = sample_trajectories(policy, ["a fox"] * 4, range(4), 4, policy.model.latent_size)
        ddpo_update(policy, plain_descent(parameters, settings), path, torch.tensor([1.0, -1.0, 2.0, -0.5]), settings,
                    np.random.default_rng(0), lambda n: None)
        return parameters

    whole = update(4)
    for batch in (1, 3):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, update(batch)))


def test_compiled_the_network_runs_one_graph_in_both_phases(tiny_file, monkeypatch):
    """Sampling without gradients goes through the graph with them; the ratio stays exactly 1, the gradient the same."""
    policy, parameters = random_lora_policy(tiny_file, 2.0, 2)
    plain, compile, modes = gradient(policy, parameters), torch.compile, []

    def backend(graph, example):
        modes.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda network, **more: compile(network, backend=backend, **more))
    machine.compile_unet(policy, parameters, 2)
    assert policy.compiled is not None and modes and all(modes)
    with torch.no_grad():
        x, context = torch.zeros(2, 4, 8, 8), torch.zeros(2, 77, 16)
        assert not policy.eps(x, 500, context, context).requires_grad
    path = sample_trajectories(policy, ["a fox"] * 2, [0, 1], 2, policy.model.latent_size)
    assert not path.log_p_old.requires_grad and not path.latents.requires_grad and all(modes)
    context, empty = path.context(torch.arange(2))
    for i in range(2):
        _, log_p = policy.step(path.latents[:, i], i, context, empty, x_prev=path.latents[:, i + 1])
        assert log_p.requires_grad and torch.equal(log_p.detach(), path.log_p_old[:, i])
    for a, b in zip(plain, gradient(policy, parameters)):
        torch.testing.assert_close(a, b)


def test_compiled_groups_of_two_sizes_keep_a_graph_each(tiny_file, monkeypatch):
    """The smaller last group of a share must not have the others compiled again: that would be another graph."""
    policy, _ = random_lora_policy(tiny_file, 1.0, 2)
    compile, graphs, ran = torch.compile, [], []

    def backend(graph, example):
        graphs.append(graph)
        number = len(graphs)
        return lambda *inputs: (ran.append(number), graph.forward(*inputs))[1]

    monkeypatch.setattr(torch, "compile", lambda network, **more: compile(network, backend=backend, **more))
    policy.compiled = torch.compile(policy.model.unet, dynamic=False)
    for _ in range(2):
        ran.clear()
        path = sample_trajectories(policy, ["a fox"] * 5, range(5), 3, policy.model.latent_size)
        sampled = list(ran)
        rescore(policy, path, 3)
        assert ran == sampled * 2 and len(set(sampled)) == 2


def test_a_trial_that_fails_on_its_way_back_leaves_no_gradient(tiny_file):
    policy, parameters = random_lora_policy(tiny_file, 1.0, 2)

    def broken(gradient):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    parameters[0].register_hook(broken)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        machine.try_out(policy, parameters, 2)
    assert all(p.grad is None for p in parameters)


def test_where_compiling_fails_the_run_says_so_and_goes_on(tiny_file, monkeypatch, capsys):
    def compile(network, **more):
        def broken(*inputs):
            raise AttributeError("no C compiler was found\nand a long explanation")
        return broken

    monkeypatch.setattr(torch, "compile", compile)
    policy, parameters = random_lora_policy(tiny_file, 1.0, 2)
    plain = gradient(policy, parameters)
    machine.compile_unet(policy, parameters, 2)
    assert capsys.readouterr().out.endswith("going on without (AttributeError: no C compiler was found)\n")
    assert all(torch.equal(a, b) for a, b in zip(plain, gradient(policy, parameters)))


def test_memory_running_out_is_one_line_and_status_2(capsys):
    def main():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 2 and "--batch auto" in capsys.readouterr().err


def direction(file, dtype, size, scaled):
    """The change of a LoRA by an update whose advantages, and so gradients, are `size` times smaller; times 1 / size."""
    policy, parameters = random_lora_policy(file, 2.0, 3, getattr(torch, dtype))
    settings = replace(SMALL, samples=8, updates=1, batch=4, steps=3, guidance=2.0, grad_clip=1e9, dtype=dtype)
    path = sample_trajectories(policy, ["a fox"] * 8, range(8), 4, policy.model.latent_size)
    optimiser = plain_descent(parameters, settings, lr=1 / size)
    if not scaled:
        optimiser.scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = [p.detach().clone() for p in parameters]
    metrics = ddpo_update(policy, optimiser, path, size * torch.linspace(-1, 1, 8), settings,
                          np.random.default_rng(0), lambda n: None)
    assert metrics["max_ratio_error"] == 0
    return torch.cat([(old - p.detach()).flatten() for old, p in zip(before, parameters)])


def test_in_float16_the_loss_is_scaled_so_that_small_gradients_do_not_round_to_zero(tiny_file):
    """At Stable Diffusion's size an update has 16 times the numbers and 20 times the decisions: gradients so small."""
    exact = direction(tiny_file, "float32", 1e-3, scaled=False)
    assert (direction(tiny_file, "float16", 1e-3, scaled=True) - exact).norm() < 0.01 * exact.norm()
    assert (direction(tiny_file, "float16", 1e-3, scaled=False) - exact).norm() > 0.5 * exact.norm()
    assert (direction(tiny_file, "bfloat16", 1e-3, scaled=False) - exact).norm() < 0.1 * exact.norm()


def test_in_float16_an_update_that_overflows_is_skipped_and_the_scale_halved():
    settings, parameter = Settings(dtype="float16", lr=0.1), torch.nn.Parameter(torch.ones(3))
    optimiser = Optimiser([parameter], settings)
    small_enough = []
    for _ in range(4):
        optimiser.backward((parameter.half() * 2).sum())        # 2 times the scale: above 65504, twice
        small_enough.append(optimiser.step())
        assert parameter.grad is None and (parameter == 1).all().item() == (small_enough[-1] is None)
    assert [norm is None for norm in small_enough] == [True, True, False, False]
    assert small_enough[2:] == [pytest.approx(12 ** 0.5)] * 2 and optimiser.scaler.get_scale() == 2 ** 14
    assert of_norms([None, 3.0, 5.0]) == dict(grad_norm=4, skipped_updates=1) and of_norms([3.0]) == dict(grad_norm=3)


@pytest.mark.parametrize("dtype, skipped", [("float32", 0), ("bfloat16", 0), ("float16", 16)])
def test_a_gradient_that_no_scale_makes_finite_ends_the_run(dtype, skipped):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = Optimiser([parameter], Settings(dtype=dtype))
    for _ in range(skipped):
        optimiser.backward((parameter * float("inf")).sum())
        assert optimiser.step() is None
    optimiser.backward((parameter * float("inf")).sum())
    with pytest.raises(InputError, match="the gradients are not finite numbers; .*--lr"):
        optimiser.step()
    assert (parameter == 1).all()


def test_a_float16_run_resumes_exactly_with_its_scale(tiny_file, tmp_path):
    more = "--dtype", "float16", "--lr", "1e-3", "--show-every", "1"
    train.main(arguments(tiny_file, tmp_path / "whole", *more, epochs=2))
    train.main(arguments(tiny_file, tmp_path / "halves", *more, epochs=1))
    state = torch.load(tmp_path / "halves" / "state.pt", weights_only=True)
    assert state["optimizer"]["scaler"]["scale"] == 2 ** 16 and state["optimizer"]["scaler"]["_growth_tracker"] == 2
    train.main(["--resume", str(tmp_path / "halves"), "--epochs", "2"])
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    state = torch.load(tmp_path / "halves" / "state.pt", weights_only=True)
    assert state["optimizer"]["scaler"]["_growth_tracker"] == 4


def test_numbers_that_are_not_finite_are_one_line_and_no_picture(tiny_file):
    policy, parameters = random_lora_policy(tiny_file, 1.0, 2)
    parameters[-1].data[0] = float("nan")
    with pytest.raises(InputError, match="not finite numbers; .*float16"):
        sample_trajectories(policy, ["a fox"], [0], 1, policy.model.latent_size)


def test_pictures_that_are_not_finite_are_one_line_and_not_black(tiny_file):
    policy, _ = random_lora_policy(tiny_file, 1.0, 2)
    policy.model.vae.post_quant_conv.weight.data *= float("inf")
    with pytest.raises(InputError, match="decoded pictures are not finite numbers"):
        sample_trajectories(policy, ["a fox"], [0], 1, policy.model.latent_size)


def test_float16_is_not_trained_on_mps():
    parameter = SimpleNamespace(device=torch.device("mps"))
    with pytest.raises(InputError, match="bfloat16 or float32"):
        Optimiser([parameter], Settings(dtype="float16"))


def test_every_tensor_meets_others_on_its_own_device_only(tiny_file, monkeypatch):
    """A round of sampling, scoring again and both kinds of update, with tensors that have a device but no values.

    The device is not the CPU, as with a GPU; torch refuses to mix the two. What ends on the CPU is named.
    """
    model = load_stable_diffusion(tiny_file, device="meta", dtype=torch.bfloat16)
    layers = add_lora(model.unet, 2)
    policy, parameters = Policy(model, ddim_steps(2), 5.0, layers), list(lora_state(layers).values())
    settings = replace(SMALL, guidance=5.0, kl_weight=0.1)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: [0.0] * len(self))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: True)
    monkeypatch.setattr("ddpo_min.rollout.to_uint8", lambda images: np.zeros((len(images), 1, 1, 3), np.uint8))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(RuntimeError, match="same device"):
            parameters[0] + torch.zeros(parameters[0].shape)
        machine.try_out(policy, parameters, 2)
        path = sample_trajectories(policy, ["a fox", "a cat"] * 2, range(4), 2, model.latent_size, share=2)
        assert (path.latents.device.type, path.log_p_old.device.type, path.contexts.device.type) == ("cpu", "meta", "meta")
        path.log_p_old = rescore(policy, path, 2, share=2)
        rest = settings, np.random.default_rng(0), lambda n: None
        optimiser = Optimiser(parameters, settings)
        ddpo_update(policy, optimiser, path, torch.zeros(4, device="meta"), *rest)
        rwr_update(policy, optimiser, path, np.ones(4), *rest)
        assert all(p.device.type == "meta" and len(optimiser.rule.state[p]) == 3 for p in parameters)


def on_a_gpu(monkeypatch, bfloat16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16 or including_emulation)


def test_a_gpu_without_bfloat16_is_told_about_float16(monkeypatch):
    on_a_gpu(monkeypatch, bfloat16=False)
    with pytest.raises(InputError, match="start with --dtype float16"):
        machine.pick_device("auto", "bfloat16")
    assert machine.half_dtype() == "float16"
    on_a_gpu(monkeypatch, bfloat16=True)
    assert machine.half_dtype() == "bfloat16"


def test_on_a_gpu_attention_is_of_one_kind_and_products_are_of_the_precision_of_convolutions(monkeypatch):
    on_a_gpu(monkeypatch, bfloat16=True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("highest")
    try:
        machine.pick_device("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled() and torch.get_float32_matmul_precision() == "highest"
        assert machine.pick_device("auto", "bfloat16") == torch.device("cuda")
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.set_float32_matmul_precision("highest")


def test_on_a_cpu_glibc_keeps_freed_memory_and_other_libraries_are_left_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *given: calls.append(given)))
    machine.pick_device("cpu")
    assert calls == [(-3, 32 * 1024 ** 2), (-1, 2 ** 31 - 1)]          # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: SimpleNamespace())
    machine.pick_device("cpu")
    monkeypatch.setattr(machine.sys, "platform", "win32")
    monkeypatch.setattr(machine.ctypes, "CDLL", None)
    machine.pick_device("cpu")


def test_a_given_batch_is_tried_out_before_anything_is_drawn(monkeypatch):
    attempts = needs_memory(monkeypatch, room=2)
    policy = SimpleNamespace(model=SimpleNamespace(unet=SimpleNamespace()))
    assert machine.prepare(policy, [torch.empty(1, device="meta")], replace(SMALL, batch=2)) == 2
    assert machine.prepare(policy, [torch.empty(1, device="meta")], replace(SMALL, batch=64)) == 64     # a share is 2
    with pytest.raises(torch.cuda.OutOfMemoryError):
        machine.prepare(policy, [torch.empty(1, device="meta")], replace(SMALL, batch=4, samples=8))
    assert attempts == [2, 2, 4]


@pytest.mark.parametrize("text, full", [
    ("CUDA out of memory. Tried to allocate 2.00 GiB.", True), ("Invalid buffer size: 34.36 GB", True),
    ("GET was unable to find an engine to execute this computation", True), ("mat1 and mat2 have other shapes", False)])
def test_full_memories_have_many_names(text, full):
    assert is_out_of_memory(RuntimeError(text)) is full


def test_old_moments_go_before_new_ones_come(monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = Optimiser([parameter], Settings())
    optimiser.backward(parameter.sum())
    optimiser.step()
    state = optimiser.state_dict()
    optimiser.backward(parameter.sum())
    load, there = optimiser.rule.load_state_dict, []
    monkeypatch.setattr(optimiser.rule, "load_state_dict", lambda s: (
        there.append((len(optimiser.rule.state), parameter.grad)), load(s)))
    state["param_groups"][0]["fused"] = True            # as if it came from a GPU
    optimiser.load_state_dict(state)
    assert optimiser.rule.param_groups[0]["fused"] is None
    assert there == [(0, None)] and optimiser.rule.state[parameter]["step"] == 1


def test_batch_is_a_number_or_auto(capsys):
    assert parse(["--batch", "auto"])[0].batch == 0 and parse(["--batch", "16"])[0].batch == 16
    for wrong in ("many", "-1"):
        with pytest.raises((SystemExit, InputError)):
            parse(["--batch", wrong])
