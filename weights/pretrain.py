"""Make the shipped model from nothing: renders -> autoencoder, CLIP, classifiers -> UNet -> weights/*.safetensors.

    python weights/pretrain.py                  everything, on the best device found; stop and start again at will
    python weights/pretrain.py --stages unet    one stage only, and what it needs of those before it
    python weights/pretrain.py --check          minutes: would this machine make the same model?

Each stage checkpoints once a minute into --work and goes on from there; every batch is drawn from a generator seeded
by (seed, stage, step), so an interrupted run sees the batches that an uninterrupted one would have seen.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import rater  # noqa: E402
import world  # noqa: E402
from classifiers import Classifier, PatchClassifier, spoiled, to_float  # noqa: E402
from ddpo_min.device import keep_freed_memory  # noqa: E402
from ddpo_min.files import atomic  # noqa: E402
from ddpo_min.schedule import alphas_cumprod  # noqa: E402
from ddpo_min.text import TextConfig, TextEncoder, tokenize  # noqa: E402
from ddpo_min.unet import UNet, UNetConfig  # noqa: E402
from ddpo_min.vae import VAE, VAEConfig  # noqa: E402
from ddpo_min.weights import save_single_file  # noqa: E402
from sharper import Walks, predict  # noqa: E402

UNET = UNetConfig(widths=(48, 96, 176), attention=(False, True, True), layers=1, context_width=48, heads=4, groups=16)
VAE_ = VAEConfig(widths=(16, 32, 64), layers=1, groups=8)
TEXT = TextConfig(width=48, layers=2, heads=4, inner=192)
CLIP_CONFIG = HERE / "clip_config.json"
CHECK = HERE / "check.json"     # what --check compares with


def fit(name, modules, loss_of, args, steps, learning_rate, ema=None, weight_decay=0.01, dtype=torch.float32,
        warm_up=200):
    """Train with AdamW, warm-up (so many steps) and cosine decay; resume from and checkpoint to args.work/NAME.pt.

    loss_of(network, step, generator) -> (loss, figure for the progress bar and the log), of the modules or, where dtype
    is not float32, of a copy in that dtype, which gets the new weights after each step: weights, optimizer and average
    stay in float32. Returns modules, with the moving average of the weights if asked for.
    """
    path = args.work / f"{name}.pt"
    parameters = list(modules.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay,
                                  fused=True)
    average = {k: v.detach().clone() for k, v in modules.state_dict().items()} if ema else None
    first, figure, seconds = 0, None, 0.0
    if path.exists():
        saved = torch.load(path, map_location=args.device, weights_only=True)
        modules.load_state_dict(saved["modules"])
        first, average, figure, seconds = saved["step"], saved["average"], saved["figure"], saved["seconds"]
        if saved["optimizer"]:
            optimizer.load_state_dict(saved["optimizer"])

    def save(step):
        done = step == steps
        with atomic(path) as temporary:
            torch.save(dict(modules=modules.state_dict(), average=average, step=step, figure=figure,
                            seconds=seconds + time.time() - began, optimizer=None if done else optimizer.state_dict()),
                       temporary)

    network = modules if dtype == torch.float32 else copy.deepcopy(modules).to(dtype)
    last = min(steps, args.stop_at or steps)
    bar = tqdm(range(first, last), initial=first, total=steps, desc=name, mininterval=2)
    began = saved_at = time.time()
    network.train()
    for step in bar:
        warm = min(1, (step + 1) / warm_up)
        rate = learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, value = loss_of(network, step, generator_of(args.seed, name, step))
        network.zero_grad(set_to_none=True)
        loss.backward()
        if network is not modules:
            gradients = [torch.empty_like(p) for p in parameters]
            torch._foreach_copy_(gradients, [copied.grad for copied in network.parameters()])
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if network is not modules:
            with torch.no_grad():
                torch._foreach_copy_(list(network.parameters()), parameters)
        if ema:
            decay = min(ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), list(modules.state_dict().values()), 1 - decay)
        figure = value if figure is None else figure + 0.02 * (value - figure)
        bar.set_postfix_str(f"{figure:.4f}", refresh=False)
        if time.time() - saved_at > 60:
            save(step + 1)
            saved_at = time.time()
    if first < last:
        save(last)
        log(args, name, steps=last, figure=figure, weights=fingerprint(modules),
            minutes=(seconds + time.time() - began) / 60)
    if ema:
        modules.load_state_dict(average)
    modules.eval()
    return modules


def generator_of(*what):
    """A random generator of its own for each (seed, stage, step)."""
    return torch.Generator().manual_seed(zlib.crc32(" ".join(map(str, what)).encode()))


def fingerprint(network):
    """Names the values of all parameters of a network: 16 hex digits."""
    digest = hashlib.sha256()
    for p in network.parameters():
        digest.update(p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def log(args, stage, **figures):
    """Note what a stage took and reached in args.work/log.json."""
    path = args.work / "log.json"
    notes = json.loads(path.read_text()) if path.exists() else {}
    notes[stage] = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(notes, indent=1))


def _render_chunk(job):
    seed, part, options = job
    return world.render_many([seed, part], 1000, **options)


def render_set(args, part, **options):
    """args.renders pictures on all cores, as one world.Render of arrays; part: names a set of seeds of its own."""
    jobs = [(args.seed * 1_000_000 + i, part, options) for i in range(args.renders // 1000)]
    with Pool() as pool:
        parts = list(tqdm(pool.imap(_render_chunk, jobs), total=len(jobs), desc="renders"))
    return world.Render(*map(np.concatenate, zip(*parts)))


def load_or_render(args):
    """The pictures that all but the UNet are trained on, rendered once and kept: a world.Render of arrays."""
    path = args.work / "data.npz"
    if not path.exists():
        began, renders = time.time(), render_set(args, part=1)
        with atomic(path) as temporary:
            np.savez(temporary, **renders._asdict())
        log(args, "data", renders=len(renders.image), minutes=(time.time() - began) / 60)
    with np.load(path, allow_pickle=False) as data:
        return world.Render(**data)


def train_vae(args):
    """Mean squared error plus a little KL; the log-variance starts at -6, so that the first latents are not noise."""
    torch.manual_seed(args.seed)
    vae = VAE(VAE_).to(args.device, memory_format=torch.channels_last)
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -6.0
    images = load_or_render(args).image

    def loss_of(network, step, generator):
        index = torch.randint(len(images), (args.vae_batch,), generator=generator)
        x = to_float(images[index.numpy()], args.device)
        mean, log_variance = network.moments(x)
        noise = torch.randn(mean.shape, generator=generator).to(args.device)
        reconstruction = network.decode((mean + torch.exp(0.5 * log_variance) * noise) * VAE_.latent_scale)
        error = F.mse_loss(reconstruction, x)
        kl = 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).mean()
        return error + 3e-4 * kl, 10 * math.log10(4 / error.item())        # PSNR in dB, peak to peak 2

    fit("vae", vae, loss_of, args, args.vae_steps, 2e-3, ema=0.998, weight_decay=0.0)
    return vae


@torch.no_grad()
def fold_normalisation(vae, images, device):
    """Give each latent channel mean 0 and standard deviation 1 (after the scale), by changing the two 1x1 convolutions.

    The autoencoder's output stays the same, and Stable Diffusion's own scale 0.18215 is right for this model too.
    """
    means = torch.cat([vae.moments(to_float(images[i:i + 100], device))[0] for i in range(0, 2000, 100)])
    shift, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    gain = 1 / (std * vae.config.latent_scale)          # z' = (z - shift) * gain
    c = len(gain)
    vae.post_quant_conv.bias += (vae.post_quant_conv.weight[:, :, 0, 0] @ shift)
    vae.post_quant_conv.weight /= gain[None, :, None, None]
    vae.quant_conv.bias[:c] = (vae.quant_conv.bias[:c] - shift) * gain
    vae.quant_conv.weight[:c] *= gain[:, None, None, None]
    vae.quant_conv.bias[c:] += 2 * gain.log()           # the log-variance scales along


def clip_model():
    """The small CLIP, untrained: open_clip's model class with the sizes in clip_config.json."""
    from open_clip.model import CLIP
    return CLIP(**json.loads(CLIP_CONFIG.read_text()))


def train_clip(args):
    """Contrastive training; pictures of one batch that share a text are all each other's positives.

    The text is the caption or, as often, the description: colours and patterns are worth knowing to a CLIP that rates.
    """
    torch.manual_seed(args.seed)
    clip = clip_model().to(args.device)
    renders = load_or_render(args)
    names, which = np.unique(np.stack([renders.caption, renders.description]), return_inverse=True)
    token_ids, which = tokenize(names), torch.as_tensor(which).reshape(2, -1)

    def loss_of(network, step, generator):
        index = torch.randint(len(renders.image), (args.clip_batch,), generator=generator)
        x = to_float(renders.image[index.numpy()], args.device)
        text = which[torch.randint(2, index.shape, generator=generator), index]
        image = network.encode_image(x, normalize=True)
        texts = network.encode_text(token_ids[text].to(args.device), normalize=True)
        logits = network.logit_scale.exp().clamp(max=100) * image @ texts.T
        target = (text[:, None] == text[None]).float().to(args.device)
        target = target / target.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, loss.item()

    return fit("clip", clip, loss_of, args, args.clip_steps, 2e-3, weight_decay=0.02)


def train_classifier(args, name="classifier", make=Classifier, seed=1, learning_rate=2e-3):
    """A network that names the animal on renders blurred and grained at random: see classifiers.py."""
    torch.manual_seed(args.seed + seed)
    model = make().to(args.device, memory_format=torch.channels_last)
    renders = load_or_render(args)
    labels = torch.as_tensor(renders.animal)

    def loss_of(network, step, generator):
        index = torch.randint(len(labels), (128,), generator=generator)
        x = spoiled(to_float(renders.image[index.numpy()], args.device), generator)
        loss = F.cross_entropy(network(x), labels[index].to(args.device), label_smoothing=0.05)
        return loss, loss.item()

    steps = getattr(args, f"{name}_steps")
    return fit(name, model, loss_of, args, steps, learning_rate)


def train_second_classifier(args):
    """The other one, which chooses nothing."""
    return train_classifier(args, "second_classifier", PatchClassifier, seed=2, learning_rate=1e-3)


def text_tower(clip):
    """open_clip's text tower under the names of Stable Diffusion's text encoder: a TextEncoder."""
    state, out = clip.state_dict(), {}
    out["embeddings.token_embedding.weight"] = state["token_embedding.weight"]
    out["embeddings.position_embedding.weight"] = state["positional_embedding"]
    for i in range(TEXT.layers):
        theirs, ours = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            q, k, v = state[theirs + f"attn.in_proj_{kind}"].chunk(3)
            out.update({ours + f"self_attn.q_proj.{kind}": q, ours + f"self_attn.k_proj.{kind}": k,
                        ours + f"self_attn.v_proj.{kind}": v})
            for a, b in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                         ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                out[f"{ours}{b}.{kind}"] = state[f"{theirs}{a}.{kind}"]
    for kind in ("weight", "bias"):
        out[f"final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
    encoder = TextEncoder(TEXT)
    encoder.load_state_dict({"text_model." + k: v.clone() for k, v in out.items()})
    return encoder.eval()


def frozen_parts(args):
    """The finished autoencoder, normalised, and text encoder: (VAE, TextEncoder)."""
    vae, encoder = train_vae(args), text_tower(train_clip(args).cpu())
    fold_normalisation(vae, load_or_render(args).image, args.device)
    return vae, encoder


def cache_latents(args):
    """The UNet's pictures, encoded once: latents (N, 4, 16, 16) fp16, caption index (N,), contexts of all captions.

    They are new ones, which the autoencoder has not seen, with more variety of size.
    """
    path = args.work / "latents.pt"
    if not path.exists():
        began = time.time()
        vae, encoder = frozen_parts(args)
        renders = render_set(args, part=2, smallest=38)
        names, which = np.unique(renders.caption, return_inverse=True)
        with torch.no_grad():
            latents = [vae.encode(to_float(renders.image[i:i + 100], args.device)).half().cpu()
                       for i in tqdm(range(0, len(which), 100), desc="latents")]
            contexts = torch.cat([encoder(tokenize(part)) for part in np.array_split(np.append(names, ""), 50)])
        with atomic(path) as temporary:
            torch.save(dict(latents=torch.cat(latents), which=torch.as_tensor(which), contexts=contexts), temporary)
        log(args, "latents", pictures=len(which), minutes=(time.time() - began) / 60)
    return torch.load(path, weights_only=True)


class Pictures:
    """The UNet's training data: cached latents, noised, and the contexts of their captions."""

    def __init__(self, args):
        data = cache_latents(args)
        self.latents, self.which, self.contexts = (data[k].to(args.device) for k in ("latents", "which", "contexts"))
        self.alpha_bar = alphas_cumprod().float().to(args.device)
        self.device = args.device

    def draw(self, count, generator, captions=0.9):
        """Latents x_0, noise eps and contexts of `count` pictures: float (B, 4, 16, 16) twice, (B, 77, 48).

        captions: the share that has its caption; the others have the empty prompt's.
        """
        index = torch.randint(len(self.latents), (count,), generator=generator).to(self.device)
        eps = torch.randn((count, *self.latents.shape[1:]), generator=generator).to(self.device)
        dropped = torch.rand(count, generator=generator).to(self.device) >= captions
        caption = torch.where(dropped, len(self.contexts) - 1, self.which[index])   # the last is the empty prompt's
        return self.latents[index].float(), eps, self.contexts[caption]

    def noised(self, x_0, eps, t):
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps    [DDPM Eq. 4]."""
        a = self.alpha_bar[t].reshape(-1, 1, 1, 1)
        return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def train_unet(args):
    """The denoising loss |eps - eps_theta(x_t, t, c)|^2, uniform t, the caption dropped for one picture in ten."""
    pictures = Pictures(args)
    torch.manual_seed(args.seed)
    unet = UNet(UNET).to(args.device, memory_format=torch.channels_last)

    def loss_of(network, step, generator):
        x_0, eps, context = pictures.draw(args.unet_batch, generator)
        t = torch.randint(1000, (len(x_0),), generator=generator).to(args.device)
        loss = F.mse_loss(predict(network, pictures.noised(x_0, eps, t), t, context), eps)
        return loss, loss.item()

    return fit("unet", unet, loss_of, args, args.unet_steps, args.unet_lr, ema=0.999, dtype=getattr(torch, args.dtype))


def train_sharper(args):
    """See sharper.py."""
    pictures, teacher = Pictures(args), train_unet(args)
    dtype = getattr(torch, args.dtype)
    walks = Walks(pictures, copy.deepcopy(teacher).to(dtype), args.seed)

    def loss_of(network, step, generator):
        x_t, t, eps, context, weight = walks.minibatch(step, generator)
        error = (predict(network, x_t, t, context) - eps) ** 2
        loss = (weight * error.mean((1, 2, 3))).mean()
        return loss, loss.item()

    return fit("sharper", teacher, loss_of, args, args.sharper_steps, args.sharper_lr, ema=0.998, dtype=dtype)


def export(args):
    """Write the model, the CLIP and the two classifiers, fp16; their metadata name command, seed and commit."""
    vae, encoder = frozen_parts(args)
    origin = origin_of(args)
    save_single_file(args.out / "emoji.safetensors", train_sharper(args).cpu(), vae.cpu(), encoder,
                     dtype=torch.float16, image_size=world.SIZE, **origin)
    for name, module in (("clip", train_clip(args)), ("classifier", train_classifier(args)),
                         ("second_classifier", train_second_classifier(args))):
        with atomic(args.out / f"{name}.safetensors") as temporary:
            save_file({k: v.half().contiguous().cpu() for k, v in module.state_dict().items()}, temporary,
                      metadata={"format": "pt", "ddpo_min": json.dumps(origin)})


def train_head(args):
    """The aesthetic head on the exported CLIP: see rater.py."""
    began = time.time()
    log(args, "head", correlation=rater.main(args.out, **origin_of(args)), minutes=(time.time() - began) / 60)


def origin_of(args):
    """What the files' metadata say: command, seed, and the commit that is checked out, or "unknown"."""
    try:
        commit = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True, check=True,
                                ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return dict(command=args.command, seed=args.seed, commit=commit)


STAGES = dict(data=load_or_render, vae=train_vae, clip=train_clip, classifier=train_classifier,
              second_classifier=train_second_classifier, latents=cache_latents, unet=train_unet, sharper=train_sharper,
              export=export, head=train_head)


def check(args):
    """Say whether this machine would make the same model: 200 steps of each stage on 2,000 renders, from nothing.

    They are compared with CHECK, which is written if there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        args.work, args.renders, args.stop_at = Path(folder), 2000, 200
        train_second_classifier(args)
        train_classifier(args)
        train_sharper(args)         # and all that it needs
        found = {name: stage for name, stage in json.loads((args.work / "log.json").read_text()).items()
                 if "weights" in stage}
    if not CHECK.exists():
        with atomic(CHECK) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{CHECK}: written")
        return
    for name, expected in json.loads(CHECK.read_text()).items():
        stage, difference = found[name], found[name]["figure"] / expected["figure"] - 1
        verdict = ("the same to the bit" if stage["weights"] == expected["weights"] else
                   "the same but for rounding" if abs(difference) < 0.02 else "ANOTHER MODEL")
        print(f"{name}: {stage['figure']} after 200 steps, expected {expected['figure']}: {verdict}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=HERE / "work", help="where checkpoints and cached data go")
    parser.add_argument("--out", type=Path, default=HERE, help="where the finished files go")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"],
                        help="in which the UNet computes")
    parser.add_argument("--renders", type=int, default=100_000, help="in each training set, a multiple of 1000")
    parser.add_argument("--vae-steps", type=int, default=7500)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--clip-steps", type=int, default=1500)
    parser.add_argument("--clip-batch", type=int, default=128)
    parser.add_argument("--classifier-steps", type=int, default=1000)
    parser.add_argument("--second-classifier-steps", type=int, default=2000)
    parser.add_argument("--unet-steps", type=int, default=16_000)
    parser.add_argument("--unet-batch", type=int, default=64)
    parser.add_argument("--unet-lr", type=float, default=1e-3)
    parser.add_argument("--sharper-steps", type=int, default=3000)
    parser.add_argument("--sharper-lr", type=float, default=2e-4)
    parser.add_argument("--stop-at", type=int, help="end each stage after this step, to go on later")
    parser.add_argument("--check", action="store_true", help="say whether this machine would make the same model")
    args = parser.parse_args()
    if args.device == "cpu":
        keep_freed_memory()
    if args.check:
        return check(args)
    args.command = "python weights/pretrain.py" + "".join(
        f" --{name.replace('_', '-')} {value}" for name, value in vars(args).items()
        if name not in ("work", "out", "stages", "device", "stop_at", "check") and value != parser.get_default(name))
    for folder in (args.work, args.out):
        os.makedirs(folder, exist_ok=True)
    for stage in args.stages:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
