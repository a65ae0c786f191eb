"""What fits, what compiles, what is dropped and computed again: none of it may change a result."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import random_lora_policy
from ddpo_min import machine
from ddpo_min.files import InputError, run_main
from ddpo_min.rollout import rescore, sample_trajectories
from ddpo_min.settings import Settings, parse
from ddpo_min.update import ddpo_update
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

    def try_out(policy, parameters, batch):
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
    def broken(policy, parameters, batch):
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
        optimizer = torch.optim.SGD(parameters, 1.0)
        ddpo_update(policy, parameters, optimizer, path, torch.tensor([1.0, -1.0, 2.0, -0.5]), settings,
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


def test_batch_is_a_number_or_auto(capsys):
    assert parse(["--batch", "auto"])[0].batch == 0 and parse(["--batch", "16"])[0].batch == 16
    for wrong in ("many", "-1"):
        with pytest.raises((SystemExit, InputError)):
            parse(["--batch", wrong])
