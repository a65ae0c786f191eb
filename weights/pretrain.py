"""Make the shipped model from nothing: renders -> autoencoder -> CLIP -> classifier -> UNet -> weights/*.safetensors.

    python weights/pretrain.py                  everything, on the best device found; stop and start again at will
    python weights/pretrain.py --stages unet    one stage only (data vae clip classifier latents unet export)

Each stage checkpoints once a minute into --work and goes on from there; every batch is drawn from a generator seeded
by (seed, stage, step), so an interrupted run sees the batches that an uninterrupted one would have seen.
"""
import argparse
import json
import math
import os
import sys
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
import world  # noqa: E402
from ddpo_min.schedule import alphas_cumprod  # noqa: E402
from ddpo_min.text import TextConfig, TextEncoder, tokenize  # noqa: E402
from ddpo_min.unet import UNet, UNetConfig  # noqa: E402
from ddpo_min.vae import VAE, VAEConfig  # noqa: E402

UNET = UNetConfig(widths=(48, 96, 176), attention=(False, True, True), layers=1, context_width=48, heads=4, groups=16)
VAE_ = VAEConfig(widths=(16, 32, 64), layers=1, groups=8)
TEXT = TextConfig(width=48, layers=2, heads=4, inner=192)
CLIP_CONFIG = HERE / "clip_config.json"
STAGES = ["data", "vae", "clip", "classifier", "latents", "unet", "export"]


class Classifier(nn.Module):
    """A small convolutional network that names the animal, trained apart from everything else, to check samples."""

    def __init__(self, width=24):
        super().__init__()
        layers, channels = [], 3
        for out in (width, 2 * width, 4 * width, 6 * width):
            layers += [nn.Conv2d(channels, out, 3, padding=1, stride=2), nn.GroupNorm(8, out), nn.SiLU(),
                       nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            channels = out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(16 * channels, len(world.ANIMALS))

    def forward(self, images):
        """images: float (B, 3, 64, 64) in [-1, 1]; returns logits (B, 45) in the order of world.ANIMALS."""
        return self.head(self.features(images).flatten(1))


def to_float(images, device):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    images = torch.as_tensor(images, device=device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.contiguous(memory_format=torch.channels_last)


def fit(name, modules, loss_of, args, steps, learning_rate, ema=None, weight_decay=0.01):
    """Train with AdamW, warm-up and cosine decay; resume from and checkpoint to args.work/NAME.pt.

    loss_of(generator) -> (loss, figure for the progress bar). Returns modules, the moving average loaded if asked for.
    """
    path = Path(args.work) / f"{name}.pt"
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay,
                                  fused=True)
    average = {k: v.detach().clone() for k, v in modules.state_dict().items()} if ema else None
    first = 0
    if path.exists():
        saved = torch.load(path, map_location=args.device, weights_only=True)
        modules.load_state_dict(saved["modules"])
        first, average = saved["step"], saved["average"]
        if saved["optimizer"]:
            optimizer.load_state_dict(saved["optimizer"])

    def save(step):
        temporary = path.with_suffix(".tmp")
        done = step == steps
        torch.save(dict(modules=modules.state_dict(), average=average, step=step,
                        optimizer=None if done else optimizer.state_dict()), temporary)
        os.replace(temporary, path)

    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=2)
    saved_at, running = time.time(), None
    modules.train()
    for step in bar:
        warm = min(1, (step + 1) / 200)
        rate = learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(zlib.crc32(f"{args.seed} {name} {step}".encode()))
        loss, figure = loss_of(generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if ema:
            decay = min(ema, (step + 1) / (step + 10))
            for key, value in modules.state_dict().items():
                average[key].lerp_(value, 1 - decay)
        running = figure if running is None else running + 0.02 * (figure - running)
        bar.set_postfix_str(f"{running:.4f}", refresh=False)
        if time.time() - saved_at > 60:
            save(step + 1)
            saved_at = time.time()
    if first < steps:
        save(steps)
    if ema:
        modules.load_state_dict(average)
    modules.eval()
    return modules


def _render_chunk(job):
    seed, part, options = job
    return world.render_many([seed, part], 1000, **options)


def render_set(args, part, **options):
    """args.renders pictures on all cores: images uint8 (N, 64, 64, 3), captions, animals, backgrounds.

    part: names a set of seeds of its own; options: of world.render.
    """
    jobs = [(args.seed * 1_000_000 + i, part, options) for i in range(args.renders // 1000)]
    with Pool() as pool:
        parts = list(tqdm(pool.imap(_render_chunk, jobs), total=len(jobs), desc="renders"))
    images, captions, animals, kinds = zip(*parts)
    return np.concatenate(images), np.array(sum(captions, [])), np.concatenate(animals), np.concatenate(kinds)


def load_or_render(args):
    """The pictures that all but the UNet are trained on, rendered once and kept."""
    path = Path(args.work) / "data.npz"
    if not path.exists():
        images, captions, animals, kinds = render_set(args, part=1)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, images=images, captions=captions, animals=animals, kinds=kinds)
        os.replace(temporary, path)
    with np.load(path, allow_pickle=False) as data:
        return data["images"], data["captions"], data["animals"], data["kinds"]


def train_vae(args):
    """Mean squared error plus a little KL; the log-variance starts at -6, so that the first latents are not noise."""
    torch.manual_seed(args.seed)
    vae = VAE(VAE_).to(args.device, memory_format=torch.channels_last)
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -6.0
    images = load_or_render(args)[0]

    def loss_of(generator):
        index = torch.randint(len(images), (args.vae_batch,), generator=generator)
        x = to_float(images[index.numpy()], args.device)
        mean, log_variance = vae.moments(x)
        noise = torch.randn(mean.shape, generator=generator).to(args.device)
        reconstruction = vae.decode((mean + torch.exp(0.5 * log_variance) * noise) * VAE_.latent_scale)
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
    """Contrastive training; pictures of one batch that share a caption are all each other's positives."""
    torch.manual_seed(args.seed)
    clip = clip_model().to(args.device)
    images, captions, _, _ = load_or_render(args)
    names, which = np.unique(captions, return_inverse=True)
    token_ids = tokenize(names)
    which = torch.as_tensor(which)

    def loss_of(generator):
        index = torch.randint(len(images), (128,), generator=generator)
        x = to_float(images[index.numpy()], args.device)
        label = which[index].to(args.device)
        image = clip.encode_image(x, normalize=True)
        text = clip.encode_text(token_ids[which[index]].to(args.device), normalize=True)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
        target = (label[:, None] == label[None]).float()
        target = target / target.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, loss.item()

    fit("clip", clip, loss_of, args, args.clip_steps, 2e-3, weight_decay=0.02)
    return clip


def train_classifier(args):
    """The classifier: a network of its own, trained on renders blurred and grained at random."""
    torch.manual_seed(args.seed + 1)
    model = Classifier().to(args.device, memory_format=torch.channels_last)
    images, captions, animals, _ = load_or_render(args)
    labels = torch.as_tensor(animals)

    def loss_of(generator):
        index = torch.randint(len(images), (128,), generator=generator)
        x = to_float(images[index.numpy()], args.device)
        keep = torch.rand(128, 1, 1, 1, generator=generator).to(args.device)
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        x = x + keep * (blurred - x)
        noise = torch.randn(x.shape, generator=generator).to(args.device)
        x = x + 0.1 * torch.rand(128, 1, 1, 1, generator=generator).to(args.device) * noise
        loss = F.cross_entropy(model(x), labels[index].to(args.device), label_smoothing=0.05)
        return loss, loss.item()

    return fit("classifier", model, loss_of, args, args.classifier_steps, 2e-3)


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


def cache_latents(args):
    """The UNet's pictures, encoded once: latents (N, 4, 16, 16) fp16, caption index (N,), contexts of all captions.

    They are new ones, which the autoencoder has not seen, with more variety of size.
    """
    path = Path(args.work) / "latents.pt"
    if not path.exists():
        vae, encoder = train_vae(args), text_tower(train_clip(args).cpu())
        fold_normalisation(vae, load_or_render(args)[0], args.device)
        images, captions, _, _ = render_set(args, part=2, smallest=38)
        names, which = np.unique(captions, return_inverse=True)
        with torch.no_grad():
            latents = [vae.encode(to_float(images[i:i + 100], args.device)).half().cpu()
                       for i in tqdm(range(0, len(images), 100), desc="latents")]
            contexts = torch.cat([encoder(tokenize(part)) for part in np.array_split(np.append(names, ""), 50)])
        temporary = path.with_suffix(".tmp")
        torch.save(dict(latents=torch.cat(latents), which=torch.as_tensor(which), contexts=contexts), temporary)
        os.replace(temporary, path)
    return torch.load(path, weights_only=True)


def train_unet(args):
    """The denoising loss |eps - eps_theta(x_t, t, c)|^2, uniform t, the caption dropped for one picture in ten."""
    data = cache_latents(args)
    latents, which, contexts = (data[k].to(args.device) for k in ("latents", "which", "contexts"))
    torch.manual_seed(args.seed)
    unet = UNet(UNET).to(args.device, memory_format=torch.channels_last)
    alpha_bar = alphas_cumprod().float().to(args.device)

    def loss_of(generator):
        index = torch.randint(len(latents), (args.unet_batch,), generator=generator).to(args.device)
        t = torch.randint(1000, (args.unet_batch,), generator=generator).to(args.device)
        eps = torch.randn((args.unet_batch, *latents.shape[1:]), generator=generator).to(args.device)
        dropped = torch.rand(args.unet_batch, generator=generator).to(args.device) < 0.1
        caption = torch.where(dropped, len(contexts) - 1, which[index])     # the last context is the empty prompt's
        a = alpha_bar[t][:, None, None, None]
        x_t = (a.sqrt() * latents[index].float() + (1 - a).sqrt() * eps).contiguous(memory_format=torch.channels_last)
        loss = F.mse_loss(unet(x_t, t, contexts[caption]), eps)
        return loss, loss.item()

    return fit("unet", unet, loss_of, args, args.unet_steps, args.unet_lr, ema=0.999)


def export(args):
    """Write the single-file checkpoint, the CLIP and the classifier, all fp16, each replaced atomically."""
    from ddpo_min.weights import save_single_file
    images = load_or_render(args)[0]
    vae = train_vae(args)
    fold_normalisation(vae, images, args.device)
    clip = train_clip(args).cpu()
    half = lambda module: {k: v.half().contiguous().cpu() for k, v in module.state_dict().items()}   # noqa: E731
    save_single_file(HERE / "emoji.safetensors", train_unet(args).cpu(), vae.cpu(), text_tower(clip),
                     dtype=torch.float16, image_size=world.SIZE)
    for name, module in (("clip", clip), ("classifier", train_classifier(args).cpu())):
        save_file(half(module), HERE / f"{name}.tmp", metadata={"format": "pt"})
        os.replace(HERE / f"{name}.tmp", HERE / f"{name}.safetensors")
    for path in sorted(HERE.glob("*.safetensors")):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", default=str(HERE / "work"), help="where checkpoints and cached data go")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--renders", type=int, default=100_000, help="in each training set, a multiple of 1000")
    parser.add_argument("--vae-steps", type=int, default=7500)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--clip-steps", type=int, default=1000)
    parser.add_argument("--classifier-steps", type=int, default=1000)
    parser.add_argument("--unet-steps", type=int, default=6000)
    parser.add_argument("--unet-batch", type=int, default=64)
    parser.add_argument("--unet-lr", type=float, default=1e-3)
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)
    run = dict(data=load_or_render, vae=train_vae, clip=train_clip, classifier=train_classifier,
               latents=cache_latents, unet=train_unet, export=export)
    for stage in STAGES:
        if stage in args.stages:
            run[stage](args)


if __name__ == "__main__":
    main()
