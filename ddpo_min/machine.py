"""Using the machine at hand: its device, its memory, what fits and what compiles."""
import torch

from .files import InputError, first_line, is_out_of_memory
from .rollout import decode

LARGEST = 64        # pictures at a time that --batch auto starts from: more gain nothing


def pick_device(name):
    """The torch device of that name; auto takes cuda, then mps, then cpu. Raises InputError if it is not there."""
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if name == "auto":
        name = next(d for d in ("cuda", "mps", "cpu") if there[d])
    if not there.get(name):
        raise InputError(f"--device {name}: not on this machine; expected auto, or one of "
                         f"{', '.join(d for d in there if there[d])}")
    return torch.device(name)


def peak_memory_mb(device):
    """The largest memory use so far in MB: the GPU's on cuda, else the process's (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
        import sys
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    except ImportError:
        return 0.0


def try_out(policy, parameters, batch):
    """One step forward and back and one decoding of `batch` pictures, on zeros; the gradients are dropped again.

    parameters: what is trained; two more tensors of each size are held meanwhile, as AdamW will.
    """
    model, device = policy.model, parameters[0].device
    moments = [torch.empty_like(p) for p in parameters for _ in range(2)]
    x_t = torch.zeros(batch, 4, model.latent_size, model.latent_size, device=device)
    empty = model.encode_prompts([""]).expand(batch, -1, -1)
    try:
        policy.eps(x_t, policy.steps.t[0], empty, empty).sum().backward()
    finally:
        for p in parameters:
            p.grad = None
    decode(model, x_t, batch)
    del moments


def fitting_batch(policy, parameters, largest):
    """The largest of `largest`, half of it, a quarter, ... pictures that fit into memory together.

    Raises InputError if not even one does.
    """
    batch = largest
    while True:
        try:
            try_out(policy, parameters, batch)
            return batch
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if batch == 1:
            raise InputError("--batch auto: not even one picture at a time fits into memory; try --checkpointing on, "
                             "--dtype bfloat16, or another --device")
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
    """Do what --checkpointing, --batch auto and --compile ask for; changes `policy`, returns the batch to use."""
    policy.model.unet.checkpointing = settings.checkpointing == "on"
    share = settings.samples // settings.updates
    batch = settings.batch or fitting_batch(policy, parameters, min(share, LARGEST))
    if settings.compile == "on":
        compile_unet(policy, parameters, min(batch, share))
    if parameters[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()        # of what was tried out
    return batch
