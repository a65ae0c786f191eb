"""Draw pictures:  python sample.py --prompt "a fox" [--lora runs/jpeg/lora.safetensors]

With a LoRA, the base model's pictures and the LoRA's are drawn from the same noise and shown one above the other.
--export-lora writes the LoRA in another form, --merge the whole model with it; neither needs a prompt.
"""
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ddpo_min import figures
from ddpo_min.cli import OneLineParser
from ddpo_min.ddim import ddim_steps
from ddpo_min.device import half_dtype, pick_device
from ddpo_min.files import InputError, make_folder, run_main
from ddpo_min.interchange import FORMS, export_lora
from ddpo_min.lora import load_lora, merge_lora, switched_off
from ddpo_min.plan import micro_batches
from ddpo_min.policy import Policy
from ddpo_min.prompts import HELD_OUT, find_prompts
from ddpo_min.rollout import sample_trajectories
from ddpo_min.settings import DTYPES
from ddpo_min.weights import SD_SIZE, SHIPPED, is_small, load_stable_diffusion

COLUMNS = 10    # pictures in a row of the grid, at most


def parse(arguments):
    """The command line of sample.py."""
    parser = OneLineParser(prog="sample.py", description="Draw pictures from prompts.", allow_abbrev=False)
    parser.add_argument("--prompt", default="", help="what to draw")
    parser.add_argument("--prompts", default="", help="a prompt set (animals, ...) or a text file, one prompt a line")
    parser.add_argument("--num", type=int, help="pictures a prompt (8 for --prompt, 1 for --prompts)")
    parser.add_argument("--lora", default="", help="lora.safetensors of a run, or a file of diffusers, PEFT or kohya")
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the LoRA (1)")
    parser.add_argument("--export-lora", default="", choices=FORMS, metavar="FORM",
                        help="write the LoRA next to itself as NAME-FORM.safetensors; FORM is diffusers (and PEFT), or "
                             "kohya (and AUTOMATIC1111, ComfyUI)")
    parser.add_argument("--merge", default="", metavar="FILE", help="write a complete model with the LoRA in it, "
                        "one .safetensors file, each tensor in its dtype in --weights")
    parser.add_argument("--weights", default=str(SHIPPED), help="a Stable Diffusion 1.x or 2.x file, diffusers folder "
                        "or Hub name, OWNER/REPO or OWNER/REPO:FILE.safetensors (the shipped one)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up (0)")
    parser.add_argument("--steps", type=int, help="denoising steps (20 for the shipped model, 50 at 512 pixels)")
    parser.add_argument("--size", default="", help="of the pictures, WIDTHxHEIGHT in pixels like 768x512, or one "
                        "number for both; multiples of 64, of 16 for the shipped model (what it was trained on)")
    parser.add_argument("--guidance", type=float, help="classifier-free (2 for the shipped model, 5 at 512 pixels)")
    parser.add_argument("--batch", type=int, help="pictures at a time (32 for the shipped model, 1 at 512 pixels)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes the best there is")
    parser.add_argument("--dtype", choices=DTYPES, help="of the networks (float32; of a large model on cuda bfloat16, "
                        "or float16 where the GPU is older than that)")
    parser.add_argument("--out", default="samples", help="folder for the pictures (samples)")
    args = parser.parse_args(arguments)
    files = args.export_lora or args.merge
    if bool(args.prompt) == bool(args.prompts) and (args.prompt or not files):
        raise InputError("give either --prompt TEXT or --prompts FILE")
    if files and not args.lora:
        raise InputError("--export-lora, --merge: which LoRA? Give its file with --lora")
    if args.merge and not args.merge.endswith(".safetensors"):
        raise InputError(f"--merge {args.merge}: expected the name of a .safetensors file")
    if args.merge and Path(args.merge).exists():
        raise InputError(f"--merge {args.merge}: is already there; give another name")
    args.num = args.num if args.num is not None else (8 if args.prompt else 1)
    for name, highest in (("num", 10_000), ("batch", 10_000), ("steps", 500)):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= highest:
            raise InputError(f"--{name} {value}: expected 1 to {highest}")
    if not 0 <= args.seed < HELD_OUT:
        raise InputError(f"--seed {args.seed}: expected 0 to {HELD_OUT - 1}")
    for name in ("guidance", "scale"):
        if getattr(args, name) is not None and not np.isfinite(getattr(args, name)):
            raise InputError(f"--{name} {getattr(args, name)}: expected a number")
    if args.size and not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})?", args.size):
        raise InputError(f"--size {args.size}: expected WIDTHxHEIGHT in pixels, like 768x512, or one number for both")
    if args.size and max(map(int, args.size.split("x"))) > 4096:
        raise InputError(f"--size {args.size}: expected up to 4096 pixels a side")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise InputError(f"--out {args.out}: a file; expected a folder")
    return args


def draw(policy, prompts, seeds, batch, latent_shape, out):
    """Draw a picture for each prompt and write it as soon as it is there; with a LoRA, draw the base model's, too.

    Returns (pictures, the base model's pictures), lists of uint8 (H, W, 3).
    """
    images, base = [], []
    with tqdm(total=len(prompts), unit="picture") as bar:
        for part in micro_batches(0, len(prompts), batch):
            given = policy, prompts[part], seeds[part], [slice(None)]
            if policy.lora:
                with switched_off(policy.lora):
                    base.extend(sample_trajectories(*given, keep="images", latent_shape=latent_shape).images)
            for image in sample_trajectories(*given, keep="images", latent_shape=latent_shape).images:
                figures.save_png(out / f"{len(images):04d}.png", Image.fromarray(image))
                images.append(image)
                bar.update()
    return images, base


def sheet(images, base, prompts, columns):
    """All pictures in rows, the base model's above the LoRA's if there are any: a PIL image."""
    rows, labels, captions = [], [], []
    for part in micro_batches(0, len(images), columns):
        for name, pictures in (("base", base), ("LoRA", images)):
            if pictures:
                rows.append(np.stack(pictures[part]))
                labels.append(name)
                captions.append([prompt[:24] for prompt in prompts[part]])
    return figures.grid(rows, captions, labels if base else None)


def main(arguments=None):
    """The command: python sample.py --help."""
    args = parse(arguments)
    if args.export_lora:
        print(f"wrote {export_lora(args.lora, args.export_lora, args.scale)}")
    if args.merge:
        merge_lora(args.lora, args.weights, args.merge, args.scale)
        print(f"wrote {args.merge}")
    if not (args.prompt or args.prompts):
        return
    lines = [args.prompt] if args.prompt else find_prompts(args.prompts)
    prompts = [line for line in lines for _ in range(args.num)]
    seeds = [args.seed + i for i in range(len(prompts))]
    device, out = pick_device(args.device, args.dtype), Path(args.out)
    dtype = args.dtype or (half_dtype() if device.type == "cuda" and not is_small(args.weights) else "float32")
    model = load_stable_diffusion(args.weights, device, getattr(torch, dtype))
    print(model.report)
    width, _, height = args.size.partition("x")
    latent_shape = model.latent_shape(int(width), int(height or width)) if args.size else None
    layers = load_lora(args.lora, model.unet, args.scale) if args.lora else {}
    steps, guidance, batch = (given if given is not None else (small if model.image_size < SD_SIZE else real)
                              for given, small, real in ((args.steps, 20, 50), (args.guidance, 2.0, 5.0),
                                                         (args.batch, 32, 1)))
    print(f"{len(prompts)} pictures, {steps} steps, guidance {guidance:g}, on {device}"
          + (f", {len(layers)} LoRA layers at scale {args.scale:g}" if layers else ""))
    policy = Policy(model, ddim_steps(steps), guidance, lora=layers)
    make_folder(out)
    images, base = draw(policy, prompts, seeds, batch, latent_shape, out)
    columns = min(args.num if args.num > 1 else len(images), COLUMNS)
    figures.save_png(out / "grid.png", sheet(images, base, prompts, columns))
    print(f"{out}/0000.png ... {out}/{len(images) - 1:04d}.png, all of them in {out}/grid.png")


if __name__ == "__main__":
    run_main(main)
