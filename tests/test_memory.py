"""What fits, what compiles, what is dropped and computed again: none of it may change a result."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from conftest import cut, plain_descent, random_lora_policy
from ddpo_min import memory
from ddpo_min.ddim import ddim_steps
from ddpo_min.ddpo import ddpo_update
from ddpo_min.files import InputError, is_out_of_memory, run_main
from ddpo_min.lora import add_lora, lora_state
from ddpo_min.optimizer import Optimizer
from ddpo_min.plan import Plan
from ddpo_min.policy import Policy
from ddpo_min.rollout import sample_trajectories
from ddpo_min.rwr import rwr_update
from ddpo_min.weights import load_stable_diffusion
from test_train import arguments, assert_same_run

DDPO = dict(clip_range=0.01, emphasis=[1.0] * 3)
pytestmark = pytest.mark.usefixtures("plain_curve")


def gradient(policy, parameters):
    """The gradient of the sum of eps at fixed latents, for each parameter."""
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    context = policy.model.encode_prompts(["a fox", "a cat"])
    for p in parameters:
        p.grad = None
    policy.eps(x_t, 500, context, policy.guidance).square().sum().backward()
    return [p.grad.clone() for p in parameters]


def kept_for_backward(policy):
    """Bytes that autograd keeps between forward and backward pass."""
    sizes = []
    x_t = torch.zeros(2, 4, 8, 8)
    context = policy.model.encode_prompts(["a fox", "a cat"])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
        policy.eps(x_t, 500, context, policy.guidance)
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

    monkeypatch.setattr(memory, "try_out", try_out)
    return attempts


def test_batch_auto_halves_until_it_fits_and_says_so(monkeypatch, capsys):
    attempts = needs_memory(monkeypatch, room=5)
    assert memory.fitting_batch(None, [torch.zeros(1)], 32) == 4
    assert attempts == [32, 16, 8, 4]
    assert "32 pictures at a time do not fit into memory, trying 16" in capsys.readouterr().out


def test_batch_auto_names_what_helps_where_one_picture_is_too_much(monkeypatch):
    needs_memory(monkeypatch, room=0)
    with pytest.raises(InputError, match="--checkpointing"):
        memory.fitting_batch(None, [torch.zeros(1)], 8)


def test_other_errors_are_not_taken_for_a_full_memory(monkeypatch):
    def broken(policy, parameters, batch, spare):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(memory, "try_out", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        memory.fitting_batch(None, [torch.zeros(1)], 8)


def test_trying_out_leaves_no_gradient_and_no_random_number_behind(tiny_file):
    policy, parameters = random_lora_policy(tiny_file, 1.0, 2)
    before, values = torch.get_rng_state(), [p.detach().clone() for p in parameters]
    memory.try_out(policy, parameters, 3)
    assert all(p.grad is None for p in parameters) and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, value) for p, value in zip(parameters, values))


def test_a_run_with_batch_auto_is_the_run_with_the_batch_it_finds(tiny_file, tmp_path, monkeypatch):
    train.main(arguments(tiny_file, tmp_path / "two", "--batch", "2", epochs=2))
    needs_memory(monkeypatch, room=2)
    train.main(arguments(tiny_file, tmp_path / "auto", "--batch", "auto", epochs=2))
    assert_same_run(tmp_path / "two", tmp_path / "auto")


def test_the_micro_batch_does_not_change_an_update(tiny_file):
    """Gradients of the parts of a minibatch add up to the minibatch's."""
    def update(batch):
        policy, parameters = random_lora_policy(tiny_file, 1.0, 2)
        path = sample_trajectories(policy, ["a fox"] * 4, range(4), cut(4, 4))
        ddpo_update(policy, plain_descent(parameters), path, torch.tensor([1.0, -1.0, 2.0, -0.5]),
                    np.random.default_rng(0), plan=Plan(4, 1, batch, range(2)), **DDPO)
        return parameters

    whole = update(4)
    for batch in (1, 3):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, update(batch)))


def test_compiled_the_network_runs_one_graph_in_both_phases(one_level, monkeypatch):
    """Sampling without gradients goes through the graph with them; the ratio stays exactly 1, the gradient the same."""
    policy, parameters = random_lora_policy(one_level, 2.0, 2)
    plain, compile, modes = gradient(policy, parameters), torch.compile, []

    def backend(graph, example):
        modes.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda network, **more: compile(network, backend=backend, **more))
    memory.compile_unet(policy, parameters, 2)
    assert policy.compiled is not None and modes and all(modes)
    with torch.no_grad():
        x, context = torch.zeros(2, 4, 8, 8), torch.zeros(2, 77, 16)
        assert not any(policy.eps(x, 500, context, guidance).requires_grad for guidance in (1.0, 2.0))
    path = sample_trajectories(policy, ["a fox"] * 2, [0, 1], cut(2, 2))
    assert not path.log_p_old.requires_grad and not path.latents.requires_grad and all(modes)
    for i in range(2):
        x_t, x_prev, _, context = path.at(slice(0, 2), i)
        log_p, _ = policy.log_prob(x_prev, x_t, i, context)
        assert log_p.requires_grad and torch.equal(log_p.detach(), path.log_p_old[:, i])
    for a, b in zip(plain, gradient(policy, parameters)):
        torch.testing.assert_close(a, b)


def test_compiled_micro_batches_of_two_sizes_keep_a_graph_each(one_level, monkeypatch):
    """A minibatch's smaller last micro-batch must not have the others compiled again: that would be another graph."""
    policy, _ = random_lora_policy(one_level, 1.0, 2)
    compile, graphs, ran = torch.compile, [], []

    def backend(graph, example):
        graphs.append(graph)
        number = len(graphs)
        return lambda *inputs: (ran.append(number), graph.forward(*inputs))[1]

    monkeypatch.setattr(torch, "compile", lambda network, **more: compile(network, backend=backend, **more))
    policy.compiled = torch.compile(policy.model.unet, dynamic=False)
    for _ in range(2):
        ran.clear()
        path = sample_trajectories(policy, ["a fox"] * 5, range(5), cut(5, 3))
        sampled = list(ran)
        for samples in cut(5, 3):
            for i in range(2):
                x_t, x_prev, _, context = path.at(samples, i)
                policy.log_prob(x_prev, x_t, i, context)
        assert ran == sampled * 2 and len(set(sampled)) == 2


def test_a_trial_whose_backward_pass_fails_leaves_no_gradient(tiny_file):
    policy, parameters = random_lora_policy(tiny_file, 1.0, 2)

    def broken(gradient):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    parameters[0].register_hook(broken)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        memory.try_out(policy, parameters, 2)
    assert all(p.grad is None for p in parameters)


def test_where_compiling_fails_the_run_says_so_and_goes_on(tiny_file, monkeypatch, capsys):
    def compile(network, **more):
        def broken(*inputs):
            raise AttributeError("no C compiler was found\nand a long explanation")
        return broken

    monkeypatch.setattr(torch, "compile", compile)
    policy, parameters = random_lora_policy(tiny_file, 1.0, 2)
    plain = gradient(policy, parameters)
    memory.compile_unet(policy, parameters, 2)
    assert capsys.readouterr().out.endswith("going on without (AttributeError: no C compiler was found)\n")
    assert all(torch.equal(a, b) for a, b in zip(plain, gradient(policy, parameters)))


def test_memory_running_out_is_one_line_and_status_2(capsys):
    def main():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 2 and "--batch auto" in capsys.readouterr().err


def direction(file, dtype, size, scaled):
    """The change of a LoRA by an update whose advantages, so gradients, are `size` times smaller; times 1 / size."""
    policy, parameters = random_lora_policy(file, 2.0, 3, getattr(torch, dtype))
    path = sample_trajectories(policy, ["a fox"] * 4, range(4), cut(4, 2))
    optimizer = plain_descent(parameters, lr=1 / size, scale_loss=scaled)
    before = [p.detach().clone() for p in parameters]
    metrics = ddpo_update(policy, optimizer, path, size * torch.linspace(-1, 1, 4), np.random.default_rng(0),
                          plan=Plan(4, 1, 2, range(3)), **DDPO)
    assert metrics["max_ratio_error"] == 0
    return torch.cat([(old - p.detach()).flatten() for old, p in zip(before, parameters)])


def test_in_float16_the_loss_is_scaled_so_that_small_gradients_do_not_round_to_zero(tiny_file):
    """At Stable Diffusion's size an update has 16 times the numbers and 20 times the decisions: gradients so small."""
    exact = direction(tiny_file, "float32", 1e-3, scaled=False)
    assert (direction(tiny_file, "float16", 1e-3, scaled=True) - exact).norm() < 0.01 * exact.norm()
    assert (direction(tiny_file, "float16", 1e-3, scaled=False) - exact).norm() > 0.5 * exact.norm()
    assert (direction(tiny_file, "bfloat16", 1e-3, scaled=False) - exact).norm() < 0.1 * exact.norm()


def test_a_float16_run_resumes_exactly_with_its_scale(tiny_file, tmp_path):
    more = "--dtype", "float16", "--lr", "1e-3", "--show-every", "1"
    train.main(arguments(tiny_file, tmp_path / "whole", *more, epochs=2))
    train.main(arguments(tiny_file, tmp_path / "halves", *more, epochs=1))
    state = torch.load(tmp_path / "halves" / "state.pt", weights_only=True)
    scaler = state["learner"]["optimizer"]["scaler"]
    assert scaler["scale"] == 2 ** 16 and scaler["_growth_tracker"] == 2
    train.main(["--resume", str(tmp_path / "halves"), "--epochs", "2"])
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    state = torch.load(tmp_path / "halves" / "state.pt", weights_only=True)
    assert state["learner"]["optimizer"]["scaler"]["_growth_tracker"] == 4


def test_numbers_that_are_not_finite_are_one_line_and_no_picture(tiny_file):
    policy, parameters = random_lora_policy(tiny_file, 1.0, 2)
    parameters[-1].data[0] = float("nan")
    with pytest.raises(InputError, match="not finite numbers; .*float16"):
        sample_trajectories(policy, ["a fox"], [0], cut(1, 1))


def test_pictures_that_are_not_finite_are_one_line_and_not_black(tiny_file):
    policy, _ = random_lora_policy(tiny_file, 1.0, 2)
    policy.model.vae.post_quant_conv.weight.data *= float("inf")
    with pytest.raises(InputError, match="decoded pictures are not finite numbers"):
        sample_trajectories(policy, ["a fox"], [0], cut(1, 1))


def test_every_tensor_meets_others_on_its_own_device_only(tiny_file, monkeypatch):
    """An epoch of sampling and both kinds of update, with tensors that have a device but no values.

    The device is not the CPU, as with a GPU; torch refuses to mix the two. What ends on the CPU is named.
    """
    model = load_stable_diffusion(tiny_file, device="meta", dtype=torch.bfloat16)
    layers = add_lora(model.unet, 2)
    policy = Policy(model, ddim_steps(2), 5.0, training_guidance=1.0, lora=layers)
    parameters, plan = list(lora_state(layers).values()), Plan(2, 1, 2, range(2))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: [0.0] * len(self))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: True)
    monkeypatch.setattr("ddpo_min.vae.to_uint8", lambda images: np.zeros((len(images), 1, 1, 3), np.uint8))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(RuntimeError, match="same device"):
            parameters[0] + torch.zeros(parameters[0].shape)
        memory.try_out(policy, parameters, 2)
        path = sample_trajectories(policy, ["a fox", "a cat"], range(2), plan.rollout())
        places = [tensor.device.type for tensor in (path.latents, path.log_p_old, path.contexts)]
        assert places == ["cpu", "meta", "meta"]
        optimizer, rng = Optimizer(parameters, lr=1e-3), np.random.default_rng(0)
        ddpo_update(policy, optimizer, path, np.zeros(2), rng, plan=plan, kl_weight=0.1, **DDPO)
        rwr_update(policy, optimizer, path, np.ones(2), rng, plan=plan)
        assert all(p.device.type == "meta" and len(optimizer.rule.state[p]) == 3 for p in parameters)


def test_a_given_batch_is_tried_out_before_anything_is_drawn(monkeypatch):
    attempts = needs_memory(monkeypatch, room=2)
    policy = SimpleNamespace(model=SimpleNamespace(unet=SimpleNamespace()))
    rest = dict(minibatch=2, checkpointing=True, compile=False)
    assert memory.prepare(policy, [torch.empty(1, device="meta")], batch=2, **rest) == 2
    assert memory.prepare(policy, [torch.empty(1, device="meta")], batch=64, **rest) == 64
    with pytest.raises(torch.cuda.OutOfMemoryError):
        memory.prepare(policy, [torch.empty(1, device="meta")], batch=4, **{**rest, "minibatch": 4})
    assert policy.model.unet.checkpointing
    assert attempts == [2, 2, 4]


@pytest.mark.parametrize("text, full", [
    ("CUDA out of memory. Tried to allocate 2.00 GiB.", True), ("Invalid buffer size: 34.36 GB", True),
    ("GET was unable to find an engine to execute this computation", True), ("mat1 and mat2 have other shapes", False)])
def test_full_memories_have_many_names(text, full):
    assert is_out_of_memory(RuntimeError(text)) is full
