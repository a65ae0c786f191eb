"""Draw pictures:  python sample.py --prompt "a fox" [--lora runs/jpeg/lora.safetensors]

With LoRAs, the base model's pictures and the LoRAs' are drawn from the same noise and shown one above the other.
--export-lora writes the LoRA in another form, --merge the whole model with it; neither needs a prompt.
"""
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ddpo_min import figures
from ddpo_min.cli import OneLineParser, check_ranges
from ddpo_min.ddim import ddim_steps
from ddpo_min.device import half_dtype, pick_device
from ddpo_min.files import InputError, make_folder, run_main
from ddpo_min.interchange import FORMS, export_lora
from ddpo_min.lora import load_loras, merge_loras, switched_off
from ddpo_min.plan import micro_batches
from ddpo_min.policy import Policy
from ddpo_min.prompts import HELD_OUT, find_prompts
from ddpo_min.rollout import sample_trajectories
from ddpo_min.settings import DTYPES
from ddpo_min.text import cut_prompts
from ddpo_min.v_prediction import PREDICTIONS
from ddpo_min.weights import SD_SIZE, SHIPPED, is_small, load_stable_diffusion, parse_size

COLUMNS = 10    # pictures in a row of the grid, at most
RANGES = (("num", 1, 10_000), ("batch", 1, 10_000), ("steps", 1, 500), ("seed", -1, 2 ** 32 - 1), ("eta", 0, 1))


def make_parser():
    """The flags of sample.py."""
    parser = OneLineParser(prog="sample.py", description="Draw pictures from prompts.", allow_abbrev=False)
    parser.add_argument("--prompt", default="", help="what to draw")
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    parser.add_argument("--prompts", default="", help="a prompt set (animals, ...) or a text file, one prompt a line")
    parser.add_argument("--num", type=int, help="pictures a prompt (8 for --prompt, 1 for --prompts)")
    parser.add_argument("--lora", default=[], action="append", metavar="FILE[=STRENGTH]", help="lora.safetensors of a "
                        "run, or a file of diffusers, PEFT or kohya; given several times, the LoRAs are added")
    parser.add_argument("--scale", type=float, default=1.0, help="strength of a LoRA that has none of its own (1)")
    parser.add_argument("--export-lora", default="", choices=FORMS, metavar="FORM",
                        help="write the LoRA next to itself as NAME-FORM.safetensors; FORM is diffusers (and PEFT), or "
                             "kohya (and AUTOMATIC1111, ComfyUI)")
    parser.add_argument("--merge", default="", metavar="FILE", help="write a complete model with the LoRA in it, "
                        "one .safetensors file, each tensor in its dtype in --weights")
    parser.add_argument("--weights", default=str(SHIPPED), help="a Stable Diffusion 1.x, 2.x or XL file, diffusers "
                        "folder or Hub name, OWNER/REPO or OWNER/REPO:FILE.safetensors (the shipped one)")
    parser.add_argument("--prediction", default="", choices=PREDICTIONS, help="of the UNet: eps (the noise), v, or "
                        "v_zsnr (v, and nothing of the picture is left at t = 999) (what its files say)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture, up to 2^32 - 1; the next ones count "
                        "up; -1 takes a random one and prints it (0)")
    parser.add_argument("--eta", type=float, default=1.0, help="scale of DDIM's noise, 0 to 1; 0 is without (1)")
    parser.add_argument("--steps", type=int, help="denoising steps (20 for the shipped model, 50 at 512 pixels)")
    parser.add_argument("--size", default="", help="of the pictures, WIDTHxHEIGHT in pixels like 768x512, or one "
                        "number for both; multiples of 8, of 4 for the shipped model (what it was trained on)")
    parser.add_argument("--guidance", type=float, help="classifier-free (2 for the shipped model, 5 at 512 pixels)")
    parser.add_argument("--batch", type=int, help="pictures at a time (32 for the shipped model, 1 at 512 pixels)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes the best there is")
    parser.add_argument("--dtype", choices=DTYPES, help="of the networks (float32; of a large model on cuda bfloat16, "
                        "or float16 where the GPU is older than that)")
    parser.add_argument("--out", default="samples", help="folder for the pictures; those that are there stay, and "
                        "numbers go on after them (samples)")
    return parser


def parse(arguments):
    """The command line of sample.py, checked. Raises InputError for what does not go together."""
    args = make_parser().parse_args(arguments)
    args.lora = [file_and_strength(text, args.scale) for text in args.lora]
    files = args.export_lora or args.merge
    if bool(args.prompt) == bool(args.prompts) and (args.prompt or not files):
        raise InputError("give either --prompt TEXT or --prompts FILE")
    if files and not args.lora:
        raise InputError("--export-lora, --merge: which LoRA? Give its file with --lora")
    if args.export_lora and len(args.lora) > 1:
        raise InputError("--export-lora: expected one --lora; several can be merged into a model with --merge")
    if args.merge and not args.merge.endswith(".safetensors"):
        raise InputError(f"--merge {args.merge}: expected the name of a .safetensors file")
    if args.merge and Path(args.merge).exists():
        raise InputError(f"--merge {args.merge}: is already there; give another name")
    if args.negative_prompt and args.guidance == 1:
        raise InputError("--negative-prompt: has no effect with --guidance 1; expected another guidance, such as 5")
    args.num = args.num if args.num is not None else (8 if args.prompt else 1)
    args.seed = random.randrange(HELD_OUT) if args.seed == -1 else args.seed     # one that is never trained on
    check_ranges(args, RANGES)
    for name in ("guidance", "scale"):
        if getattr(args, name) is not None and not np.isfinite(getattr(args, name)):
            raise InputError(f"--{name} {getattr(args, name)}: expected a number")
    if args.size:
        parse_size(args.size)
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise InputError(f"--out {args.out}: a file; expected a folder")
    return args


def file_and_strength(text, usual):
    """FILE or FILE=STRENGTH -> (file, strength); `usual` is the strength of the former. Raises InputError."""
    file, equals, strength = text.rpartition("=")
    if not equals or Path(text).exists():       # a file may have = in its name
        return text, usual
    if not file:
        raise InputError(f"--lora {text}: which file? expected FILE or FILE=STRENGTH, like lora.safetensors=0.5")
    try:
        if np.isfinite(float(strength)):
            return file, float(strength)
    except ValueError:
        pass
    raise InputError(f"--lora {text}: no such file, and {strength or 'nothing'} is no strength; expected FILE or "
                     "FILE=STRENGTH, like lora.safetensors=0.5")


def draw(policy, prompts, seeds, batch, out, first):
    """Draw a picture for each prompt and write it as soon as it is there; with a LoRA, draw the base model's, too.

    first: the first picture's number. Returns (pictures, the base model's pictures), lists of uint8 (H, W, 3).
    """
    images, base = [], []
    base_policy = replace(policy)       # its embedding of the negative prompt is without the text encoder's LoRA
    with tqdm(total=len(prompts), unit="picture") as bar:
        for part in micro_batches(0, len(prompts), batch):
            given = prompts[part], seeds[part], [slice(None)]
            if policy.lora:
                with switched_off(policy.lora):
                    drawn = sample_trajectories(base_policy, *given, keep="images")
                base.extend(drawn.images)
            for image in sample_trajectories(policy, *given, keep="images").images:
                figures.save_png(out / f"{first + len(images):04d}.png", Image.fromarray(image))
                images.append(image)
                bar.update()
    return images, base


def next_number(out):
    """The number after the last picture in a folder, so that none is overwritten."""
    return 1 + max((int(path.stem) for path in out.glob("*.png") if re.fullmatch("[0-9]{4,}", path.stem)), default=-1)


def sheet(images, base, prompts, columns):
    """All pictures in rows, the base model's above the LoRA's if there are any: a PIL image."""
    rows, labels, captions = [], [], []
    for part in micro_batches(0, len(images), columns):
        for name, pictures in (("base", base), ("LoRA", images)):
            if pictures:
                rows.append(np.stack(pictures[part]))
                labels.append(name)
                captions.append(prompts[part])
    return figures.grid(rows, captions, labels if base else None)


def main(arguments=None):
    """The command: python sample.py --help."""
    args = parse(arguments)
    if args.export_lora:
        (file, strength), = args.lora
        print(f"wrote {export_lora(file, args.export_lora, strength)}")
    if args.merge:
        merge_loras(args.lora, args.weights, args.merge, args.prediction)
        print(f"wrote {args.merge}")
    if not (args.prompt or args.prompts):
        return
    lines = [args.prompt] if args.prompt else find_prompts(args.prompts)
    prompts = [line for line in lines for _ in range(args.num)]
    seeds = [args.seed + i for i in range(len(prompts))]        # 0 comes after the last, as torch uses 32 bits
    device, out = pick_device(args.device, args.dtype), Path(args.out)
    dtype = args.dtype or (half_dtype() if device.type == "cuda" and not is_small(args.weights) else "float32")
    model = load_stable_diffusion(args.weights, device, getattr(torch, dtype), args.prediction, args.size)
    print(model.report)
    layers = load_loras(args.lora, model.unet, model.text_encoder, base=model.base)
    steps, guidance, batch = (given if given is not None else (small if model.image_size < SD_SIZE else real)
                              for given, small, real in ((args.steps, 20, 50), (args.guidance, 2.0, 5.0),
                                                         (args.batch, 32, 1)))
    if warning := cut_prompts([*lines, args.negative_prompt], model.text_encoder.config.positions):
        print(warning)
    loras = " + ".join(f"{Path(file).name} at {strength:g}" for file, strength in args.lora)
    print(f"{len(prompts)} pictures, {steps} steps, guidance {guidance:g}, seed {args.seed}, on {device}"
          + f", {len(layers)} layers with {loras}" * bool(loras))
    policy = Policy(model, ddim_steps(steps, args.eta, model.alpha_bar), guidance, lora=layers,
                    negative=args.negative_prompt)
    make_folder(out)
    first = next_number(out)
    images, base = draw(policy, prompts, seeds, batch, out, first)
    columns = min(args.num if args.num > 1 else len(images), COLUMNS)
    grid = out / (f"grid-{first:04d}.png" if first else "grid.png")
    figures.save_png(grid, sheet(images, base, prompts, columns))
    print(f"{out}/{first:04d}.png ... {out}/{first + len(images) - 1:04d}.png, all of them in {grid}")


if __name__ == "__main__":
    run_main(main)
