"""Which device is taken, and how torch is set up on it."""
from types import SimpleNamespace

import pytest
import torch

from ddpo_min import device
from ddpo_min.files import InputError


def on_a_gpu(monkeypatch, bfloat16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16 or including_emulation)


def test_a_gpu_without_bfloat16_is_told_about_float16(monkeypatch):
    on_a_gpu(monkeypatch, bfloat16=False)
    with pytest.raises(InputError, match="start with --dtype float16"):
        device.pick_device("auto", "bfloat16")
    assert device.half_dtype() == "float16"
    on_a_gpu(monkeypatch, bfloat16=True)
    assert device.half_dtype() == "bfloat16"


def test_on_a_gpu_attention_is_of_one_kind_and_products_are_of_the_precision_of_convolutions(monkeypatch):
    on_a_gpu(monkeypatch, bfloat16=True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("highest")
    try:
        device.pick_device("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled() and torch.get_float32_matmul_precision() == "highest"
        assert device.pick_device("auto", "bfloat16") == torch.device("cuda")
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.set_float32_matmul_precision("highest")


def test_on_a_cpu_glibc_keeps_freed_memory_and_other_libraries_are_left_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *given: calls.append(given)))
    device.pick_device("cpu")
    assert calls == [(-3, 32 * 1024 ** 2), (-1, 2 ** 31 - 1)]          # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: SimpleNamespace())
    device.pick_device("cpu")
    monkeypatch.setattr(device.sys, "platform", "win32")
    monkeypatch.setattr(device.ctypes, "CDLL", None)
    device.pick_device("cpu")
