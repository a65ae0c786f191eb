"""What fits into memory, and what compiles: tried out before training begins."""
import torch

from .files import InputError, first_line, is_out_of_memory
from .processes import gather
from .vae import decode_images

LARGEST = 64        # the micro-batch that --batch auto starts from: larger ones gain nothing


def try_out(policy, parameters, batch, spare=False):
    """A forward and a backward pass and a decoding of `batch` pictures, on zeros; the gradients are dropped again.

    parameters: what is trained; two more tensors of each size are held meanwhile, as AdamW will.
    spare: hold a twentieth of a GPU besides, for what is not tried: memory in pieces, the reward's network.
    """
    model, device = policy.model, parameters[0].device
    held = [torch.empty_like(p) for p in parameters for _ in range(2)]
    if spare and device.type == "cuda":
        held.append(torch.empty(torch.cuda.mem_get_info(device)[1] // 20, dtype=torch.uint8, device=device))
    x_t = torch.zeros(batch, 4, *model.shape, device=device)
    context = policy.empty.expand(batch, -1, -1)
    try:
        policy.eps(x_t, policy.steps.t[0], context, policy.guidance).sum().backward()
    finally:
        for p in parameters:
            p.grad = None
    decode_images(model.vae, x_t)
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
            raise InputError("--batch auto: not even one picture at a time fits into memory; try --checkpointing, "
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


def prepare(policy, parameters, *, batch, minibatch, checkpointing, compile):
    """Do what --checkpointing, --batch auto and --compile ask for; changes `policy`, returns the micro-batch to use.

    batch: 0 for auto. Off the CPU one that was given is tried out, too: a full memory ends the run here, not after an
    hour.
    """
    policy.model.unet.checkpointing = checkpointing
    size = batch or min(gather(fitting_batch(policy, parameters, min(minibatch, LARGEST))))
    if batch and parameters[0].device.type != "cpu":
        try_out(policy, parameters, min(size, minibatch))
    if compile:
        compile_unet(policy, parameters, min(size, minibatch))
    if parameters[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()        # of what was tried out
    return size
