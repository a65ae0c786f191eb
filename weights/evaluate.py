"""Measure the shipped model, and what a LoRA does to it.

    python weights/evaluate.py                                    the whole model card
    python weights/evaluate.py --lora runs/jpeg/lora.safetensors  recognised animals and JPEG sizes, base and LoRA

The classifier is weights/classifier.safetensors, a network that neither the model nor any reward has seen.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import world  # noqa: E402
from ddpo_min import figures, load_stable_diffusion  # noqa: E402
from ddpo_min.clip_rewards import SMALL, ClipScorer  # noqa: E402
from ddpo_min.ddim import ddim_steps  # noqa: E402
from ddpo_min.files import run_main  # noqa: E402
from ddpo_min.lora import load_lora  # noqa: E402
from ddpo_min.plan import micro_batches  # noqa: E402
from ddpo_min.policy import Policy  # noqa: E402
from ddpo_min.prompts import ANIMALS, find_prompts  # noqa: E402
from ddpo_min.rewards import jpeg_kilobytes  # noqa: E402
from ddpo_min.rollout import sample_trajectories  # noqa: E402
from ddpo_min.settings import Settings  # noqa: E402
from pretrain import Classifier, to_float  # noqa: E402

HELD_OUT_WORLD = 99_000_000     # seeds of renders that no stage of pretraining draws


def load_half(module, name):
    """An fp16 file of weights/ into a float32 module, strictly."""
    module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(HERE / name).items()})
    return module.eval()


@torch.no_grad()
def recognised(classifier, images, animals):
    """Which pictures (uint8 (N, 64, 64, 3)) the classifier names rightly: bool (N,); animals: int (N,)."""
    logits = torch.cat([classifier(to_float(part, "cpu")) for part in np.array_split(images, -(-len(images) // 100))])
    return (logits.argmax(dim=1) == torch.as_tensor(animals)).numpy()


def kilobytes(images):
    """JPEG sizes in kB: (N,)."""
    return np.array([jpeg_kilobytes(image) for image in images])


def within_prompt_std(values, animals):
    """The standard deviation within a prompt, averaged over prompts."""
    return np.mean([values[animals == a].std(ddof=1) for a in np.unique(animals)])


@torch.no_grad()
def measure_parts(model, classifier):
    """The CLIP, the classifier and the autoencoder on 1,800 held-out renders."""
    clip = ClipScorer(SMALL, "", "cpu")
    images, _, animals, kinds = world.render_many(HELD_OUT_WORLD, 1800, activities=False)
    text = clip.texts(find_prompts("animals"))
    named = torch.cat([(clip.images(part) @ text.T).argmax(1) for part in np.array_split(images, 18)]).numpy()
    print(f"CLIP names the animal of {100 * (named == animals).mean():.1f}% of {len(images)} held-out renders")
    print(f"the classifier of {100 * recognised(classifier, images, animals).mean():.1f}%")
    images, _, animals, kinds = world.render_many(HELD_OUT_WORLD + 1, 700)
    x = [to_float(part, "cpu") for part in np.array_split(images, 7)]
    error = torch.cat([((model.vae.decode(model.vae.encode(part)).clamp(-1, 1) - part) ** 2).mean((1, 2, 3))
                       for part in x]).numpy()
    psnr = lambda e: 10 * np.log10(4 / e.mean())        # noqa: E731
    by_kind = ", ".join(f"{kind} {psnr(error[kinds == i]):.1f}" for i, kind in enumerate(world.BACKGROUNDS))
    print(f"autoencoder: {psnr(error):.2f} dB over {len(images)} held-out renders ({by_kind})")


def draw(model, per_animal, steps, guidance, seed=0):
    """per_animal pictures of each of the 45 prompts, as sample.py draws them: images, animals."""
    prompts = [prompt for prompt in find_prompts("animals") for _ in range(per_animal)]
    policy = Policy(model, ddim_steps(steps), guidance)
    seeds = [seed + i for i in range(len(prompts))]
    images = sample_trajectories(policy, prompts, seeds, micro_batches(0, len(prompts), 50), keep="images").images
    return images, np.arange(len(prompts)) // per_animal


def report(name, images, animals, classifier):
    """One line on a set of samples; returns whether each is recognised."""
    right, size = recognised(classifier, images, animals), kilobytes(images)
    counts = [right[animals == a].sum() for a in range(len(ANIMALS))]
    per_animal = len(images) // len(ANIMALS)
    weakest = ", ".join(f"{ANIMALS[a]} {counts[a]}" for a in np.argsort(counts, kind="stable")[:5])
    print(f"{name}: recognised {100 * right.mean():.1f}% of {len(images)}, weakest of {per_animal}: {weakest}; JPEG "
          f"size {size.mean():.2f} kB, standard deviation within a prompt {within_prompt_std(size, animals):.2f} kB")
    return right


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", default=str(HERE / "emoji.safetensors"))
    parser.add_argument("--lora", default="", help="compare base and LoRA instead")
    parser.add_argument("--num", type=int, default=10, help="pictures an animal")
    parser.add_argument("--steps", type=int, help="20, sample.py's; with --lora train.py's default")
    parser.add_argument("--guidance", type=float, help="2, sample.py's; with --lora train.py's default")
    parser.add_argument("--sheet", default="", help="write one sample of every animal here (the first seed of each)")
    args = parser.parse_args()
    usual = (Settings.steps, Settings.guidance) if args.lora else (20, 2.0)
    steps, guidance = (own if own is not None else default for own, default in zip((args.steps, args.guidance), usual))
    model = load_stable_diffusion(args.weights)
    classifier = load_half(Classifier(), "classifier.safetensors")
    if not args.lora:
        measure_parts(model, classifier)
    how = f"{steps} steps, guidance {guidance:g}"
    images, animals = draw(model, args.num, steps, guidance)
    before = report(how, images, animals, classifier)
    if args.lora:
        load_lora(args.lora, model.unet)
        images, _ = draw(model, args.num, steps, guidance)
        after = report(f"{how}, with the LoRA", images, animals, classifier)
        print(f"still recognised: {100 * after.mean() / before.mean():.1f}% of what was recognised before")
    if args.sheet:
        first = images[::args.num]
        rows, names = [first[i:i + 9] for i in range(0, 45, 9)], [ANIMALS[i:i + 9] for i in range(0, 45, 9)]
        figures.save_png(args.sheet, figures.grid(rows, names))


if __name__ == "__main__":
    run_main(main)
