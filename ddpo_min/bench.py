"""How fast, and in how much memory:  python -m ddpo_min.bench [--size sd15] [--against diffusers]

One minibatch is sampled and trained on (not scored), with the functions that train.py uses. Rates are given as
a fraction of the matrix product's, measured in the same run. sd15 and sdxl are files of Stable Diffusion's size with
random values, written first: time and memory do not depend on the values. --count only counts the memory.
"""
import argparse
import statistics
import tempfile
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .cli import OneLineParser, batch_size, check_settings
from .ddim import ddim_steps
from .ddpo import ddpo_update
from .device import peak_memory_mb, pick_device
from .files import InputError, run_main
from .interchange import read_lora
from .lora import add_lora, lora_state, save_lora
from .memory import prepare
from .optimizer import Optimizer
from .plan import Plan
from .policy import Policy
from .rewards import find_own
from .rollout import sample_trajectories
from .settings import DTYPES, Settings
from .text import TextConfig, TextEncoder, TextEncoders
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig, decode_images
from .weights import SHIPPED, StableDiffusion, load_stable_diffusion, save_single_file

ON_OFF = {True: "on", False: "off"}
THEIRS = Path(__file__).resolve().parent.parent / "tests" / "diffusers_side.py"

# What is timed unless flags say otherwise: a minibatch of the laptop preset; a few steps of sd_lora's
SIZES = dict(shipped=dict(samples=64, steps=8, guidance=1.0, batch=64),
             sd15=dict(samples=1, steps=2, guidance=5.0, batch=1),
             sd15_gpu=dict(samples=16, steps=10, guidance=5.0, batch=4, dtype="bfloat16"),
             sdxl=dict(samples=1, steps=2, guidance=5.0, batch=1),
             sdxl_gpu=dict(samples=4, steps=10, guidance=5.0, batch=1, dtype="bfloat16"))

# The sizes of Stable Diffusion XL
UNET_XL = UNetConfig(widths=(320, 640, 1280), attention=(0, 2, 10), middle=10, context_width=2048, head_width=64,
                     linear=True, pooled=1280)
VAE_XL = VAEConfig(latent_scale=0.13025)
TEXTS_XL = (TextConfig(used=11, norm=False), TextConfig(width=1280, layers=32, heads=20, inner=5120, used=31,
                                                        openclip=True, norm=False, projection=1280))


def parse(arguments):
    """The command line: (size, repeat, against, whether to profile, whether to count, device, Settings)."""
    parser = OneLineParser(prog="python -m ddpo_min.bench", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--size", default="shipped", choices=("shipped", "sd15", "sdxl"),
                        help="the shipped model, or the size of SD 1.5 or XL (shipped)")
    parser.add_argument("--count", action="store_true",
                        help="only count the memory that a GPU would need, with sd15 or sdxl; runs nothing")
    parser.add_argument("--against", choices=("diffusers",),
                        help="the same work with diffusers' networks and PEFT's LoRA")
    parser.add_argument("--repeat", type=int, default=3, help="how often; the median counts (3)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes the best there is")
    for name, kind in (("samples", int), ("steps", int), ("guidance", float), ("batch", batch_size)):
        parser.add_argument(f"--{name}", type=kind, help=f"as of train.py (shipped: {SIZES['shipped'][name]}, sd15: "
                                                         f"{SIZES['sd15'][name]}, on a GPU {SIZES['sd15_gpu'][name]})")
    parser.add_argument("--rank", type=int, help="as of train.py (4)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the networks (sd15 and sdxl on a GPU: bfloat16)")
    parser.add_argument("--profile", action="store_true", help="say where the time goes, operation by operation")
    for name in ("checkpointing", "compile"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=False, help="as of train.py")
    args = vars(parser.parse_args(arguments))
    if args["repeat"] < 1:
        raise InputError(f"--repeat {args['repeat']}: expected 1 or more")
    size, repeat, against, where, count, device = (
        args.pop(name) for name in ("size", "repeat", "against", "profile", "count", "device"))
    if count and (size == "shipped" or args["batch"] == 0):
        raise InputError("--count: needs --size sd15 or sdxl, and a number for --batch")
    kind = pick_device(device).type
    values = SIZES[size + ("_gpu" if size != "shipped" and (count or kind == "cuda") else "")]
    given = {name: value for name, value in args.items() if value is not None}
    device = pick_device(device, {**values, **given}.get("dtype", "float32")) if not count else torch.device("meta")
    settings = Settings(preset="laptop", updates=1, **{**values, **given})
    check_settings(settings)
    return size, repeat, against, where, count, device, settings


def networks(size):
    """UNet, autoencoder and text encoder of Stable Diffusion 1.5 or XL, on the meta device: without memory."""
    with torch.device("meta"):
        if size == "sdxl":
            return UNet(UNET_XL), VAE(VAE_XL), TextEncoders(*map(TextEncoder, TEXTS_XL))
        return UNet(), VAE(), TextEncoder()


def random_file(path, size="sd15"):
    """Write a single file of Stable Diffusion's names and shapes, float16, with random values of a sane size."""
    parts = [network.half() for network in networks(size)]
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        part.to_empty(device="cpu").requires_grad_(False)
        for name, p in part.named_parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5, generator=generator)
            else:
                p.fill_(float(name.endswith("weight")))
    save_single_file(path, *parts, image_size=1024 if size == "sdxl" else 512)


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once, at most; on the meta device, where they take none."""

    def __init__(self, *networks):
        super().__init__()
        self.alive, self.now, self.most = set(), 0, 0
        for p in (p for network in networks for p in network.parameters()):
            self.hold(p.untyped_storage())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor.untyped_storage())
        return result

    def hold(self, storage):
        """Count a tensor's memory until it is given back."""
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())

    def release(self, key, size):
        self.alive.discard(key)
        self.now -= size


def count_memory(size, settings):
    """GB that a GPU needs, {phase: {what: GB}}, from the shapes of all tensors of a training pass and of a decoding.

    Attention is counted as GPUs compute it, without its table of weights. What the GPU's libraries take is not counted.
    """
    unet, vae, text = (network.to(getattr(torch, settings.dtype)) for network in networks(size))
    vae = vae.float() if size == "sdxl" else vae
    model = StableDiffusion(unet, vae, text, image_size=1024 if size == "sdxl" else 512, report="")
    with torch.device("meta"):
        parameters = list(lora_state(add_lora(unet, settings.rank)).values())
        context = torch.empty(settings.batch, *model.encode_prompts(["a fox"]).shape[1:])
        x_t = torch.empty(settings.batch, 4, *model.shape)
    unet.checkpointing = settings.checkpointing
    policy = Policy(model, ddim_steps(settings.steps), settings.guidance)
    plain = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda q, k, v, is_causal: (
        torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=is_causal)[0])
    try:
        with Peak(unet) as training:
            policy.eps(x_t, 1, context, settings.guidance).sum().backward()
        with Peak(vae) as decoding, torch.no_grad():
            vae.decode(x_t[:1].to(vae.post_quant_conv.weight.dtype))
    finally:
        functional.scaled_dot_product_attention = plain
    weights, autoencoder, texts = (sum(p.nbytes for p in network.parameters()) / 1e9 for network in (unet, vae, text))
    lora = sum(p.nbytes for p in parameters) / 1e9
    kept = {"UNet": weights - lora, "LoRA, its gradient and AdamW's two moments": 4 * lora}
    away = {} if size == "sdxl" else {"autoencoder": autoencoder, "text encoder": texts}
    return {
        "training": {**kept, **away, "activations": training.most / 1e9 - weights - lora},
        "decoding": {**kept, **away, "autoencoder": autoencoder, "activations": decoding.most / 1e9 - autoencoder},
        "encoding prompts": {**kept, **away, "text encoder": texts}}


def print_count(size, settings):
    """The memory of each phase, and of what it consists."""
    print(f"{size}, {settings.dtype}, {settings.batch} at a time, guidance {settings.guidance:g}, LoRA of rank "
          f"{settings.rank}, checkpointing {ON_OFF[settings.checkpointing]}: counted, not measured")
    for phase, parts in count_memory(size, settings).items():
        print(f"  {phase:16} {sum(parts.values()):5.2f} GB: "
              + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()))


def synchronised(device):
    """The time, once the device has done all it was asked for."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def seconds(device, work):
    """(seconds that work() takes, what it returns)."""
    begin = synchronised(device)
    result = work()
    return synchronised(device) - begin, result


def matrix_rate(device, dtype):
    """FLOP/s of a large matrix product: the ceiling of everything here, which is made of them."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n ** 3 / min(seconds(device, lambda: a @ a)[0] for _ in range(5))


def flops(model, settings):
    """FLOPs of (sampling, training) one picture, counted on networks without memory."""
    passes = settings.steps * (1 if settings.guidance == 1 else 2)
    tokens = model.text_encoder.config.positions
    with torch.device("meta"):
        unet, vae = UNet(model.unet.config), VAE(model.vae.config)
        add_lora(unet, settings.rank)
        x_t, t = torch.empty(1, 4, *model.shape), torch.empty(1)
        context = torch.empty(1, tokens + bool(unet.config.pooled), unet.config.context_width)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            unet(x_t, t, context)
        with FlopCounterMode(display=False) as decoding, torch.no_grad():
            vae.decode(x_t)
        with FlopCounterMode(display=False) as both:
            unet(x_t, t, context).sum().backward()
    return passes * forward.get_total_flops() + decoding.get_total_flops(), passes * both.get_total_flops()


def diffusers_work(model, settings):
    """The same on diffusers' networks, which only the tests know how to build. Raises InputError without diffusers."""
    try:
        build = find_own(f"{THEIRS}:diffusers_policy", "--against")
    except InputError as error:
        raise InputError(f"{error}; pip install -r requirements-dev.txt")
    return Work(*build(model, settings), settings)


class Work:
    """A minibatch, sampled and trained on again and again; keeps the seconds of each phase."""

    def __init__(self, policy, parameters, settings):
        self.policy, self.settings = policy, settings
        self.optimizer = Optimizer(parameters, lr=settings.lr, scale_loss=settings.dtype == "float16")
        self.plan = Plan(settings.samples, 1, settings.batch, range(settings.steps))
        self.sampling, self.training = [], []

    def do(self, keep=True):
        """Sample and train once; keep=False only warms up."""
        s, plan, device = self.settings, self.plan, self.optimizer.parameters[0].device
        prompts, seeds, rng = ["a fox"] * s.samples, range(s.samples), np.random.default_rng(0)
        advantages = torch.linspace(-1, 1, s.samples, device=device)
        sampling, path = seconds(device, lambda: sample_trajectories(self.policy, prompts, seeds, plan.rollout()))
        training, _ = seconds(device, lambda: ddpo_update(
            self.policy, self.optimizer, path, advantages, rng, plan=plan, clip_range=s.clip_range,
            emphasis=[1.0] * s.steps))
        if keep:
            self.sampling.append(sampling)
            self.training.append(training)


def rate_line(name, times, settings, operations, ceiling):
    """One line on a phase: pictures a second, and how much of the matrix product's rate that is."""
    middle = statistics.median(times)
    return (f"  {name:9} {settings.samples / middle:8.3f} images/s ({middle:.2f} s, {min(times):.2f} to "
            f"{max(times):.2f}), {100 * settings.samples * operations / middle / ceiling:.0f}% of the matrix product")


def print_rates(works, model, settings, rates):
    """Each side's pictures a second, then the ratio of the two if there are two, of neighbours in time."""
    ceiling = statistics.median(rates)
    print(f"matrix product: {ceiling / 1e9:.0f} GFLOP/s ({min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f})")
    to_sample, to_train = flops(model, settings)
    together = {}
    for name, work in works.items():
        together[name] = [a + b for a, b in zip(work.sampling, work.training)]
        print(f"{name}:")
        print(rate_line("sampling", work.sampling, settings, to_sample, ceiling))
        print(rate_line("training", work.training, settings, to_train, ceiling))
        print(rate_line("together", together[name], settings, to_sample + to_train, ceiling))
    for name in works.keys() - {"ours"}:
        ratios = [theirs / ours for ours, theirs in zip(together["ours"], together[name])]
        print(f"{name} takes {statistics.median(ratios):.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f})")


def print_whole_pictures(work, model):
    """What Stable Diffusion's usual 50 steps would take, from the few that were timed."""
    s, device = work.settings, work.optimizer.parameters[0].device
    latents = torch.zeros(min(s.batch, s.samples), 4, *model.shape, device=device)       # as many as in sampling
    decoding = min(seconds(device, lambda: decode_images(model.vae, latents))[0] for _ in range(2)) / len(latents)
    a_step = (statistics.median(work.sampling) / s.samples - decoding) / s.steps
    a_training_step = statistics.median(work.training) / s.samples / s.steps
    print(f"at 50 steps, from these: {50 * a_step + decoding:.1f} s to sample a picture, {50 * a_training_step:.1f} s "
          f"to train on it: {1 / (50 * (a_step + a_training_step) + decoding):.4f} images/s together")


def print_profile(work):
    """Where the time goes: torch's operations by their part of one more micro-batch, the largest first."""
    settings, parameters = work.settings, work.optimizer.parameters
    work = Work(work.policy, parameters, replace(settings, samples=min(settings.samples, settings.batch)))
    on_gpu = parameters[0].is_cuda
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as record:
        work.do(keep=False)
    operations = [op for op in record.key_averages() if op.device_type == DeviceType.CPU]      # not a GPU's kernels
    spent = {op.key: op.self_device_time_total if on_gpu else op.self_cpu_time_total for op in operations}
    total = sum(spent.values()) or 1        # 0 where the system forbids to profile the GPU
    print("of the time of ours:")
    for name in sorted(spent, key=spent.get, reverse=True)[:12]:
        print(f"  {100 * spent[name] / total:4.1f}%  {name.removeprefix('aten::')}")


def print_round_trip(layers, path):
    """Save the LoRA, read it back, say whether it is the same."""
    save_lora(path, layers)
    again, _ = read_lora(path, list(layers))
    same = all(torch.equal(own.weight.cpu(), read) for name, layer in layers.items()
               for own, read in zip((layer.lora_A, layer.lora_B), again[name]))
    print("LoRA saved and read back: " + ("the same to the last bit" if same else "NOT THE SAME"))


def main(arguments=None):
    size, repeat, against, where, count, device, settings = parse(arguments)
    if count:
        return print_count(size, settings)
    dtype = getattr(torch, settings.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = SHIPPED
        if size != "shipped":
            path = Path(folder) / f"random-{size}.safetensors"
            took, _ = seconds(device, lambda: random_file(path, size))
            print(f"wrote a random file of the size of {size} in {took:.0f} s", flush=True)
        loading, model = seconds(device, lambda: load_stable_diffusion(path, device, dtype))
        print(f"{model.report}\nloaded in {loading:.1f} s, on {device}, {settings.dtype}")
        layers = add_lora(model.unet, settings.rank)
        parameters = list(lora_state(layers).values())
        policy = Policy(model, ddim_steps(settings.steps), settings.guidance, lora=layers)
        settings = replace(settings, batch=prepare(
            policy, parameters, batch=settings.batch, minibatch=settings.samples, checkpointing=settings.checkpointing,
            compile=settings.compile))
        works = dict(ours=Work(policy, parameters, settings))
        if against:
            works[against] = diffusers_work(model, settings)
        print(f"{settings.samples} pictures, {settings.steps} steps, guidance {settings.guidance:g}, "
              f"{settings.batch} at a time, LoRA of rank {settings.rank}, "
              f"checkpointing {ON_OFF[settings.checkpointing]}, compile {ON_OFF[settings.compile]}"
              + " (ours alone)" * bool(against and settings.compile), flush=True)
        if size == "shipped" or device.type == "cuda":
            for work in works.values():
                work.do(keep=False)
        rates = [matrix_rate(device, dtype)]
        for _ in range(repeat):
            for work in works.values():
                work.do()
            rates.append(matrix_rate(device, dtype))
        print_rates(works, model, settings, rates)
        if size != "shipped":
            print_whole_pictures(works["ours"], model)
        if where:
            print_profile(works["ours"])
        print_round_trip(layers, Path(folder) / "lora.safetensors")
        print(f"peak memory: {peak_memory_mb(device):.0f} MB" + (" with diffusers' copy" if against else ""))


if __name__ == "__main__":
    run_main(main)
