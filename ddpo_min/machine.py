"""Using the machine at hand: its device, its memory, what fits and what compiles."""
import ctypes
import sys

import torch

from .files import InputError, first_line, is_out_of_memory
from .rollout import decode

LARGEST = 64        # pictures at a time that --batch auto starts from: more gain nothing


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
        raise InputError(f"--device {name}: not on this machine; expected auto, or one of "
                         f"{', '.join(d for d in there if there[d])}")
    if name == "cuda":
        if dtype == "bfloat16" != half_dtype():
            raise InputError("--dtype bfloat16: this GPU is older than that; start with --dtype float16")
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif name == "cpu":
        keep_freed_memory()
    return torch.device(name)


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


def try_out(policy, parameters, batch, spare=False):
    """One step forward and back and one decoding of `batch` pictures, on zeros; the gradients are dropped again.

    parameters: what is trained; two more tensors of each size are held meanwhile, as AdamW will.
    spare: hold a twentieth of a GPU besides, for what is not tried: memory in pieces, the reward's network.
    """
    model, device = policy.model, parameters[0].device
    held = [torch.empty_like(p) for p in parameters for _ in range(2)]
    if spare and device.type == "cuda":
        held.append(torch.empty(torch.cuda.mem_get_info(device)[1] // 20, dtype=torch.uint8, device=device))
    x_t = torch.zeros(batch, 4, model.latent_size, model.latent_size, device=device)
    empty = model.encode_prompts([""]).expand(batch, -1, -1)
    try:
        policy.eps(x_t, policy.steps.t[0], empty, empty).sum().backward()
    finally:
        for p in parameters:
            p.grad = None
    decode(model, x_t, batch)
    del held


def fitting_batch(policy, parameters, largest):
    """The largest of `largest`, half of it, a quarter, ... pictures that fit into memory together.

    Raises InputError if not even one does.
    """
    batch = largest
    while True:
        try:
            try_out(policy, parameters, batch, spare=True)
            return batch
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if batch == 1:
            raise InputError("--batch auto: not even one picture at a time fits into memory; try --checkpointing on, "
                             "a --dtype of 16 bits, or another --device")
        batch //= 2         # here, where the error no longer holds on to what it was raised in
        device = parameters[0].device.type
        if device != "cpu":
            getattr(torch, device).empty_cache()
        print(f"  --batch auto: {2 * batch} pictures at a time do not fit into memory, trying {batch}")


def compile_unet(policy, parameters, batch):
    """Have the policy run its network compiled, or say why it cannot and leave it as it is; changes `policy`."""
    try:
        policy.compiled = torch.compile(policy.model.unet, dynamic=False)      # a graph for each size of group
        try_out(policy, parameters, batch)
    except Exception as error:      # of very many kinds: no compiler, a GPU too old, an unsupported Python
        if is_out_of_memory(error):
            raise
        policy.compiled = None
        print(f"  --compile: does not work here, going on without ({type(error).__name__}: {first_line(error)})")


def prepare(policy, parameters, settings):
    """Do what --checkpointing, --batch auto and --compile ask for; changes `policy`, returns the batch to use.

    Off the CPU a batch that was given is tried out, too.
    """
    policy.model.unet.checkpointing = settings.checkpointing == "on"
    share = settings.samples // settings.updates
    batch = settings.batch or fitting_batch(policy, parameters, min(share, LARGEST))
    if settings.batch and parameters[0].device.type != "cpu":
        try_out(policy, parameters, min(batch, share))      # a full memory ends the run here, not after an hour
    if settings.compile == "on":
        compile_unet(policy, parameters, min(batch, share))
    if parameters[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()        # of what was tried out
    return batch
