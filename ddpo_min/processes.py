"""Several processes as one: torchrun starts them, torch.distributed joins them; alone, nothing here does anything.

Each process draws its own part of every minibatch and trains on what it drew. What all must know, rewards and
gradients, is exchanged here. Every process then does the same with it, so no settings and no weights are ever sent.
"""
import json
import os
import signal
import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from .files import STOPS, InputError

PATIENCE = timedelta(days=7)        # a collective may wait for a slow reward; whoever has failed says so itself
FAILED = "failed"
STORE = []          # the store of a joined process: what each can read at any time


class Elsewhere(InputError):
    """Another process has failed, or was stopped, and says why."""


def count():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def join():
    """Join the processes that torchrun has started; only the first of them prints. Nothing happens alone.

    Tensors are exchanged by gloo on a CPU and by nccl on cuda. Raises InputError if they do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, own, processes = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")     # the store outlives a restart
        STORE[:] = [dist.PrefixStore(f"ddpo_min-{attempt}", store)]
        dist.init_process_group(backend, store=store, rank=own, world_size=processes, timeout=PATIENCE)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"torchrun: the processes did not find each other ({type(error).__name__}); start them all "
                         "with torchrun --nproc_per_node N train.py ...")
    if own:
        sys.stdout = open(os.devnull, "w")


def together(main):
    """A command's main() as one of torchrun's processes: whichever fails first says why, the others end in silence."""
    def joined():
        join()
        try:
            result = main()
        except BaseException as error:
            if not is_first_to_fail():
                stopped = isinstance(error, KeyboardInterrupt)
                os._exit(128 + getattr(error, "number", signal.SIGINT) if stopped else 2)
            if count() > 1:         # torchrun stops the others when one ends; this one still has to say why
                for number in STOPS:
                    signal.signal(number, signal.SIG_IGN)
            raise
        if dist.is_initialized():
            dist.destroy_process_group()
        return result

    return joined


def is_first_to_fail():
    """Tell the others that this process fails; whether it is the first to do so, and so the one that says why."""
    try:
        return not STORE or STORE[0].compare_set(FAILED, "", str(rank())) == str(rank()).encode()
    except RuntimeError:        # the process that had the store is gone
        return True


def wait(work):
    """Wait for an exchange, and meanwhile look whether another process has failed. Raises Elsewhere then."""
    pause = 1e-4
    try:
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            if pause == 0.05 and STORE[0].check([FAILED]):
                raise Elsewhere("another process has failed")
        work.wait()
    except RuntimeError:
        raise Elsewhere("another process has ended without a word")


def exchange(content):
    """Bytes of any length from each process: a list of those of all, in their order."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count())]
    wait(dist.all_gather(sizes, torch.tensor([len(content)]), async_op=True))
    longest = max(size.item() for size in sizes)
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    own = torch.zeros(longest, dtype=torch.uint8)
    own[:len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else own[:0]
    wait(dist.all_gather(parts, own, async_op=True))
    return [part[:size.item()].numpy().tobytes() for part, size in zip(parts, sizes)]


def gather(thing):
    """What each process has of this (numbers, texts, lists, dicts of them): a list, in the order of the processes."""
    if count() == 1:
        return [thing]
    return [json.loads(part) for part in exchange(json.dumps(thing).encode())]


def gather_images(images):
    """The pictures of all processes, one after another: each gives uint8 (n, H, W, 3), returns uint8 (N, H, W, 3)."""
    if count() == 1:
        return images
    shapes, parts = gather(images.shape), exchange(images.tobytes())
    return np.concatenate([np.frombuffer(part, np.uint8).reshape(shape) for part, shape in zip(parts, shapes)
                           if shape[0]])


def sum_gradients(parameters):
    """Add up the gradients of all processes, in place; one without any sample of a minibatch has none to add."""
    if count() == 1:
        return
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    wait(dist.all_reduce(flat, async_op=True))
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)
