"""The device that the networks run on, and how it is used best."""
import ctypes
import os
import sys
from contextlib import contextmanager

import torch

from .files import InputError
from .processes import count


def pick_device(name, dtype="float32"):
    """The torch device of that name; auto takes cuda, then mps, then cpu.

    On cuda, for the whole process: float32 products with TF32's 10-bit mantissa, as its convolutions have by default,
    and one kind of attention with gradients and without, or rollout and training would round differently (cuDNN's is
    picked without gradients only at some of Stable Diffusion's head widths). On cpu: see keep_freed_memory().
    Raises InputError if the device is not there, or has no units for the networks' dtype.
    """
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if name == "auto":
        name = next(d for d in ("cuda", "mps", "cpu") if there[d])
    if not there.get(name):
        raise InputError(f"--device {name}: not there; expected auto, or one of "
                         f"{', '.join(d for d in there if there[d])}")
    if name == "cuda":
        if dtype == "bfloat16" != half_dtype():
            raise InputError("--dtype bfloat16: this GPU is older than that; start with --dtype float16")
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif name == "cpu":
        keep_freed_memory()
    if name == "cuda" and count() > 1:
        own, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if own >= there:
            raise InputError(f"--device cuda: process {own} of this machine has no GPU of its own, there are {there}; "
                             "start as many with --nproc_per_node")
        torch.cuda.set_device(own)
        return torch.device("cuda", own)
    return torch.device(name)


@contextmanager
def visiting(network, device):
    """Context manager: the network's weights are on the device for a block, then again where they were."""
    home = {p: p.data for p in network.parameters() if p.device != device}
    try:
        for p in home:
            p.data = p.data.to(device)
        yield
    finally:
        for p, data in home.items():
            p.data = data


def keep_freed_memory():
    """Have Linux's usual C library, glibc, keep the memory that tensors give back, for the next ones.

    Left alone, it returns every large piece to the system, which maps and clears it page by page when it is asked for
    again: a tenth of training's time. Other C libraries stay as they are.
    """
    mmap_threshold, trim_threshold = -3, -1       # as in malloc.h
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):
            return
        mallopt(mmap_threshold, 2 ** 25)        # the most it takes; pieces above still come and go
        mallopt(trim_threshold, 2 ** 31 - 1)


def half_dtype():
    """The 16-bit dtype that the GPU computes fastest in."""
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def peak_memory_mb(device):
    """The largest memory use so far in MB: the GPU's on cuda, else the process's (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    except ImportError:
        return 0.0
