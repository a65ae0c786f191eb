"""The optimizer: clipping, float16's scale, steps that are skipped, going on."""
from types import SimpleNamespace

import pytest
import torch

from ddpo_min.files import InputError
from ddpo_min.optimizer import Optimizer


def test_in_float16_an_update_that_overflows_is_skipped_and_the_scale_halved():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer([parameter], lr=0.1, scale_loss=True)
    small_enough = []
    for _ in range(4):
        optimizer.backward((parameter.half() * 2).sum())        # 2 times the scale: above 65504, twice
        small_enough.append(optimizer.step())
        assert parameter.grad is None and (parameter == 1).all().item() == (small_enough[-1] is None)
    assert [norm is None for norm in small_enough] == [True, True, False, False]
    assert small_enough[2:] == [pytest.approx(12 ** 0.5)] * 2 and optimizer.scaler.get_scale() == 2 ** 14


def test_gradients_add_up_until_a_step_and_are_forgotten_then():
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer, norms = Optimizer([parameter], lr=0.1), []
    for parts in ([3.0, 4.0], [0.5]):
        for part in parts:
            optimizer.backward(part * parameter.sum())
        norms.append(optimizer.step())
    assert norms == pytest.approx([14.0, 1.0])


@pytest.mark.parametrize("scale_loss, skipped", [(False, 0), (True, 16)])
def test_a_gradient_that_no_scale_makes_finite_ends_the_run(scale_loss, skipped):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer([parameter], lr=1e-3, scale_loss=scale_loss)
    for _ in range(skipped):
        optimizer.backward((parameter * float("inf")).sum())
        assert optimizer.step() is None
    optimizer.backward((parameter * float("inf")).sum())
    with pytest.raises(InputError, match="the gradients are not finite numbers; .*--lr"):
        optimizer.step()
    assert (parameter == 1).all()


def test_float16_is_not_trained_on_mps():
    parameter = SimpleNamespace(device=torch.device("mps"))
    with pytest.raises(InputError, match="bfloat16 or float32"):
        Optimizer([parameter], lr=1e-3, scale_loss=True)


def test_old_moments_go_before_new_ones_come(monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer([parameter], lr=1e-3)
    optimizer.backward(parameter.sum())
    optimizer.step()
    state = optimizer.state_dict()
    optimizer.backward(parameter.sum())
    load, there = optimizer.rule.load_state_dict, []
    monkeypatch.setattr(optimizer.rule, "load_state_dict", lambda s: (
        there.append((len(optimizer.rule.state), parameter.grad)), load(s)))
    state["param_groups"][0]["fused"] = True            # as if it came from a GPU
    optimizer.load_state_dict(state)
    assert optimizer.rule.param_groups[0]["fused"] is None
    assert there == [(0, None)] and optimizer.rule.state[parameter]["step"] == 1
