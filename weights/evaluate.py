"""Measure the shipped model, and what a LoRA does to it.

    python weights/evaluate.py                                    the whole model card
    python weights/evaluate.py --lora runs/jpeg/lora.safetensors  recognised animals and JPEG sizes, base and LoRA

The classifiers are two networks that neither the model nor any reward has seen: see classifiers.py.
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
from classifiers import Classifier, PatchClassifier, to_float  # noqa: E402
from ddpo_min import figures, load_stable_diffusion  # noqa: E402
from ddpo_min.cli import check_ranges  # noqa: E402
from ddpo_min.clip_rewards import SMALL, ClipScorer  # noqa: E402
from ddpo_min.ddim import ddim_steps  # noqa: E402
from ddpo_min.files import InputError, run_main  # noqa: E402
from ddpo_min.lora import load_lora  # noqa: E402
from ddpo_min.plan import micro_batches  # noqa: E402
from ddpo_min.policy import Policy  # noqa: E402
from ddpo_min.prompts import ANIMALS, find_prompts  # noqa: E402
from ddpo_min.rewards import jpeg_kilobytes  # noqa: E402
from ddpo_min.rollout import sample_trajectories  # noqa: E402
from ddpo_min.settings import Settings  # noqa: E402

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


def load_classifiers():
    """The two classifiers by name: {name: network}."""
    return {"the classifier": load_half(Classifier(), "classifier.safetensors"),
            "the second": load_half(PatchClassifier(), "second_classifier.safetensors")}


def contrast(images):
    """How crisp pictures are: the mean difference of neighbouring pixels' channels, 0 to 255."""
    x = images.astype(np.float32)
    return (np.abs(np.diff(x, axis=1)).mean() + np.abs(np.diff(x, axis=2)).mean()) / 2


def kilobytes(images):
    """JPEG sizes in kB: (N,)."""
    return np.array([jpeg_kilobytes(image) for image in images])


def within_prompt_std(values, animals):
    """The standard deviation within a prompt, averaged over prompts."""
    return np.mean([values[animals == a].std(ddof=1) for a in np.unique(animals)])


@torch.no_grad()
def measure_parts(model, classifiers):
    """The CLIP, the classifiers and the autoencoder on held-out renders."""
    clip = ClipScorer(SMALL, "", "cpu")
    images, _, _, animals, _ = world.render_many(HELD_OUT_WORLD, 1800, activities=False)
    text = clip.texts(find_prompts("animals"))
    named = torch.cat([(clip.images(part) @ text.T).argmax(1) for part in np.array_split(images, 18)]).numpy()
    print(f"CLIP names the animal of {100 * (named == animals).mean():.1f}% of {len(images)} held-out renders")
    for name, classifier in classifiers.items():
        print(f"{name} of {100 * recognised(classifier, images, animals).mean():.1f}%")
    size = kilobytes(images)
    print(f"the renders: JPEG size {size.mean():.2f} kB, standard deviation within a prompt "
          f"{within_prompt_std(size, animals):.2f} kB, contrast {contrast(images):.1f}")
    images, _, _, _, kinds = world.render_many(HELD_OUT_WORLD + 1, 700)
    x = [to_float(part, "cpu") for part in np.array_split(images, 7)]
    error = torch.cat([((model.vae.decode(model.vae.encode(part)).clamp(-1, 1) - part) ** 2).mean((1, 2, 3))
                       for part in x]).numpy()
    psnr = lambda e: 10 * np.log10(4 / e.mean())        # noqa: E731
    by_kind = ", ".join(f"{kind} {psnr(error[kinds == i]):.1f}" for i, kind in enumerate(world.BACKGROUNDS))
    print(f"autoencoder: {psnr(error):.2f} dB over {len(images)} held-out renders ({by_kind})")


def draw(model, per_animal, steps, guidance, eta=1.0, seed=0):
    """per_animal pictures of each of the 45 prompts: images, animals."""
    prompts = [prompt for prompt in find_prompts("animals") for _ in range(per_animal)]
    policy = Policy(model, ddim_steps(steps, eta), guidance)
    seeds = [seed + i for i in range(len(prompts))]
    images = sample_trajectories(policy, prompts, seeds, micro_batches(0, len(prompts), 50), keep="images").images
    return images, np.arange(len(prompts)) // per_animal


def report(name, images, animals, classifiers):
    """A few lines on a set of samples; returns whether the first classifier recognises each."""
    right, size = [recognised(network, images, animals) for network in classifiers.values()], kilobytes(images)
    per_animal = len(images) // len(ANIMALS)
    print(f"{name}: JPEG size {size.mean():.2f} kB, standard deviation within a prompt "
          f"{within_prompt_std(size, animals):.2f} kB, contrast {contrast(images):.1f}")
    for classifier, own in zip(classifiers, right):
        counts = [own[animals == a].sum() for a in range(len(ANIMALS))]
        weakest = ", ".join(f"{ANIMALS[a]} {counts[a]}" for a in np.argsort(counts, kind="stable")[:5])
        print(f"  {classifier} recognises {100 * own.mean():.1f}% of {len(images)}, weakest of {per_animal}: {weakest}")
    return right[0]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", default=str(HERE / "emoji.safetensors"))
    parser.add_argument("--lora", default="", help="compare base and LoRA instead")
    parser.add_argument("--num", type=int, help="pictures an animal: 40, with --lora 4")
    parser.add_argument("--steps", type=int, help="instead of train.py's and sample.py's")
    parser.add_argument("--guidance", type=float, help="instead of train.py's and sample.py's")
    parser.add_argument("--sheet", default="", help="write one sample of every animal here (the first seed of each)")
    args = parser.parse_args(arguments)
    check_ranges(args, (("num", 2, 10_000), ("steps", 1, 500)))
    if args.lora and not Path(args.lora).is_file():
        raise InputError(f"--lora {args.lora}: no such file")
    num = args.num or (4 if args.lora else 40)
    ways = {"train.py": (Settings.steps, Settings.guidance, Settings.eta), "sample.py": (20, 2.0, 1.0)}
    if args.lora:
        del ways["sample.py"]
    if args.steps or args.guidance is not None:
        own = (args.steps or Settings.steps, Settings.guidance if args.guidance is None else args.guidance, 1.0)
        ways = {"own settings": own}
    model, classifiers = load_stable_diffusion(args.weights), load_classifiers()
    if not args.lora:
        measure_parts(model, classifiers)
    for program, (steps, guidance, eta) in ways.items():
        how = f"{program}: {steps} steps, guidance {guidance:g}, eta {eta:g}"
        images, animals = draw(model, num, steps, guidance, eta)
        before = report(how, images, animals, classifiers)
    if args.lora:
        load_lora(args.lora, model.unet, base=model.base)
        images, _ = draw(model, num, steps, guidance, eta)
        after = report(f"{how}, with the LoRA", images, animals, classifiers)
        print(f"still recognised: {100 * after.mean() / before.mean():.1f}% of what was recognised before")
    if args.sheet:
        first = images[::num]
        rows, names = [first[i:i + 9] for i in range(0, 45, 9)], [ANIMALS[i:i + 9] for i in range(0, 45, 9)]
        figures.save_png(args.sheet, figures.grid(rows, names))


if __name__ == "__main__":
    run_main(main)
