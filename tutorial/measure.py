"""What the tutorial's page measures; figures.py calls this, and draws it.

Each experiment gives rows, which are kept in measured/NAME.csv, and some also pictures, in measured/NAME.webp.
"""
import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent / "exercises"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "experiments"))
import curves
from results import write_rows

from ddpo_min import clip_rewards
from ddpo_min.advantages import epoch_advantages
from ddpo_min.ddim import ddim_step, ddim_steps, x0_hat
from ddpo_min.files import InputError, NotFinite, atomic
from ddpo_min.plan import micro_batches
from ddpo_min.policy import Policy
from ddpo_min.prompts import find_prompts
from ddpo_min.rewards import jpeg_kilobytes
from ddpo_min.rollout import sample_trajectories
from ddpo_min.vae import decode_images
from ddpo_min.weights import SHIPPED, load_stable_diffusion

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGE, MEASURED, RUNS = HERE / "README.md", HERE / "measured", ROOT / "runs" / "tutorial"
UPDATE = ("max_ratio_error", "clip_fraction", "approx_kl", "kl_to_base")     # what a row has of an update
MODEL, T = SHIPPED, 8

# one_page.py: which of the page's diffs are taken back, and which are made
PROGRAMS = dict(reinforce=(("clip", "ratio", "baseline"), ()), baseline=(("clip", "ratio"), ()), one_page=((), ()),
                summed=((), ("sum",)), ratio=(("clip",), ("passes",)), clipped=((), ("passes",)))
# train.py: the arguments of each, and what is watched besides; the learned reward has a rule that it stands for
TRAININGS = dict(healthy="--reward jpeg", too_fast="--reward jpeg --lr 3e-2 --epochs 5",
                 unstable="--reward jpeg --lr 6e-3 --epochs 10", hacked="--reward aesthetic --epochs 24",
                 with_kl="--reward aesthetic --epochs 24 --kl-weight 0.03")
JUDGE, RULE = "experiments/judges.py:recognised", "weights/rater.py:rule"
WATCH = {name: f"--watch {RULE},{JUDGE}" if "aesthetic" in arguments else f"--watch {JUDGE}"
         for name, arguments in TRAININGS.items()}
EVALUATIONS = "--eval-every 2 --eval-samples 90"
# toy2d.py: passes over the samples, whether by REINFORCE or the ratio, the clip range, whether with a baseline
PLANE = {"A = r": (1, True, 0, False), "A = (r - mean) / std": (1, True, 0, True),
         "8 passes, no ratio": (8, True, 0, True), "8 passes, ratio": (8, False, 1e9, True),
         "8 passes, clipped ratio": (8, False, 0.2, True)}


def write(name, rows):
    """Write measured/NAME.csv: a list of dicts."""
    write_rows(name, rows, MEASURED)


def read(name):
    """measured/NAME.csv as {column: array}: numbers, nan where a cell is empty, or text."""
    with open(MEASURED / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    table = {column: np.array([row[column] for row in rows]) for column in rows[0]}
    for column, cells in table.items():
        try:
            table[column] = np.where(cells == "", "nan", cells).astype(float)
        except ValueError:
            pass        # text
    return table


def keep(name, pictures):
    """Write measured/NAME.webp: rows of equally many pictures, uint8 (rows, columns, H, W, 3)."""
    pictures = np.asarray(pictures)
    rows, columns, height, width, _ = pictures.shape
    with atomic(MEASURED / f"{name}.webp") as temporary:
        sheet = Image.fromarray(pictures.swapaxes(1, 2).reshape(rows * height, columns * width, 3))
        sheet.save(temporary, "WEBP", quality=90)


def kept(name, side=64):
    """The pictures that keep() has written."""
    sheet = np.asarray(Image.open(MEASURED / f"{name}.webp").convert("RGB"))
    return sheet.reshape(len(sheet) // side, side, -1, side, 3).swapaxes(1, 2)


# The model as it is

@torch.no_grad()
def steps():
    """What is seen at each denoising step, and how open the end still is: eight ways on from it, for eight prompts."""
    policy, generator = Policy(load_stable_diffusion(MODEL), ddim_steps(T), 1.0), torch.Generator().manual_seed(0)
    context, side = policy.model.encode_prompts(find_prompts("animals")[:8]), policy.model.latent_size
    decode = partial(decode_images, policy.model.vae)
    x = torch.randn(8, 4, side, side, generator=generator)
    seen, guessed, ways, rows = [], [], [], []
    for i in range(T):
        eps = policy.eps(x, policy.steps.t[i], context, 1.0)
        seen.append(decode(x))
        guessed.append(decode(x0_hat(x, eps, policy.steps.alpha_bar[i])))
        y, same = x.repeat_interleave(8, dim=0), context.repeat_interleave(8, dim=0)
        for k in range(i, T):
            y, _ = policy.act(y, k, same, torch.randn(y.shape, generator=generator))
        ways.append(decode(y))
        sizes = np.array([jpeg_kilobytes(image) for image in ways[-1]]).reshape(8, 8)
        rows.append(dict(step=i + 1, t=policy.steps.t[i], sigma=policy.steps.sigma[i],
                         spread=float(sizes.std(axis=1, ddof=1).mean())))
        x, _ = ddim_step(x, eps, policy.steps, i, noise=torch.randn(x.shape, generator=generator))
    end = decode(x)
    keep("steps", [[*(images[n] for images in row), end[n]] for n in (0, 1) for row in (seen, guessed)])
    keep("ways", [images[:8] for images in ways])
    return rows


@torch.no_grad()
def ratios():
    """How far the first ratio is from 1 where training computes it in another way than sampling."""
    model, prompts = load_stable_diffusion(MODEL), (2 * find_prompts("animals"))[:64]
    policy, guided = (Policy(model, ddim_steps(T), guidance) for guidance in (1.0, 2.0))
    plain, strong = (sample_trajectories(p, prompts, range(64), micro_batches(0, 64, 64)) for p in (policy, guided))

    def errors(path, latents, size=64):
        log_p = [[policy.log_prob(latents[part, i + 1], latents[part, i], i, path.context(part))[0] for i in range(T)]
                 for part in micro_batches(0, 64, size)]
        return (torch.cat([torch.stack(of, dim=1) for of in log_p]) - path.log_p_old).exp().sub(1).abs()

    ways = {"the same function on the same micro-batches": errors(plain, plain.latents),
            "micro-batches of 7 in place of 64": errors(plain, plain.latents, size=7),
            "latents that were stored in bfloat16": errors(plain, plain.latents.bfloat16().float()),
            "no guidance, after sampling with guidance 2": errors(strong, strong.latents)}
    return [dict(way=way, largest=e.max().item(), beyond_1e_2=(e > 1e-2).double().mean().item(),
                 beyond_1e_4=(e > 1e-4).double().mean().item()) for way, e in ways.items()]


def prompts():
    """Eight pictures of each animal, and what three rewards say of them."""
    policy = Policy(load_stable_diffusion(MODEL), ddim_steps(T), 1.0)
    names = [prompt for prompt in find_prompts("animals") for _ in range(8)]
    parts = micro_batches(0, len(names), 60)
    images = sample_trajectories(policy, names, range(len(names)), parts, keep="images").images
    scores = dict(jpeg=[-jpeg_kilobytes(image) for image in images],
                  aesthetic=clip_rewards.aesthetic("cpu", small=True)(images, names),
                  clip=clip_rewards.clip("cpu", small=True)(images, names))
    return [dict(prompt=prompt, **{name: float(own[n]) for name, own in scores.items()})
            for n, prompt in enumerate(names)]


# From REINFORCE to DDPO

def plane(epochs=15, seeds=(1, 2, 3)):
    """In the plane of toy2d.py: each epoch is judged by the mean reward of 2000 samples."""
    import toy2d  # which sets torch's default dtype
    start, rows = toy2d.pretrain(torch.Generator().manual_seed(0)), []
    for name, (passes, sf, toy2d.CLIP, baseline) in PLANE.items():
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            theta = [p.detach().clone().requires_grad_() for p in start]
            optimizer = torch.optim.Adam(theta, lr=5e-3)
            for epoch in range(epochs + 1):
                judged = toy2d.reward(toy2d.sample(theta, 2000, torch.Generator().manual_seed(0))[0][-1])
                rows.append(dict(variant=name, seed=seed, epoch=epoch, reward=judged.mean().item()))
                x, log_p = toy2d.sample(theta, 200, generator)
                A = toy2d.reward(x[-1])
                if baseline:
                    A = torch.from_numpy(epoch_advantages(A.numpy()))
                for _ in range(passes):
                    for part in torch.randperm(200, generator=generator).split(50):
                        sum(toy2d.losses(theta, x[:, part], log_p[:, part], A[part], sf)).backward()
                        optimizer.step()
                        optimizer.zero_grad()
    torch.set_default_dtype(torch.float32)
    return rows


def changed(program, name, back=False):
    """The text of a program with one of the page's diffs made, or taken back."""
    diff = re.search(rf"<!-- diff:{name} -->\n```diff\n(.*?)^```$", PAGE.read_text(), re.M | re.S)[1]
    old, new = ("".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in f" {sign}") for sign in "-+")
    old, new = (new, old) if back else (old, new)
    if program.count(old) != 1:
        raise InputError(f"the page's diff {name} does not fit tutorial/one_page.py: write it anew")
    return program.replace(old, new)


def program(name):
    """The text of one_page.py as one of PROGRAMS."""
    text, (back, made) = (HERE / "one_page.py").read_text(), PROGRAMS[name]
    for diff in back:
        text = changed(text, diff, back=True)
    for diff in made:
        text = changed(text, diff)
    return text


def one_page(name, **constants):
    """Run it, and note the JPEG size of each epoch, and how far the epoch's updates have moved the policy."""
    rows, moved, log_p = [], [], []
    page = {"__name__": "page", "__file__": str(HERE / "one_page.py")}
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "one_page.png"
        exec(program(name).replace('"one_page.png"', repr(str(picture))), page)
        log_prob, loss_of = page["log_prob"], page["loss_of"]

        def noted_log_prob(*given):
            log_p[:] = [log_prob(*given)]
            return log_p[0]

        def noted_loss(*given):
            loss = loss_of(*given)
            moved.append((log_p[0] - given[-1]).detach())       # the last one is log_p_old
            return loss

        def noted_line(text):
            print(f"{name}: {text}", flush=True)
            if moved:
                log_ratio = torch.cat(moved).double()
                moved.clear()
                rows[-1].update(approx_kl=(log_ratio ** 2).mean().item() / 2,
                                beyond=((log_ratio.exp() - 1).abs() > page["CLIP"]).double().mean().item())
            if found := re.match(r"epoch (\d+): mean JPEG size (\S+) kB", text):
                rows.append(dict(epoch=int(found[1]), kilobytes=float(found[2])))

        page.update(log_prob=noted_log_prob, loss_of=noted_loss, print=noted_line,
                    EPOCHS=4 if "passes" in PROGRAMS[name][1] else 5)
        page.update(constants)
        try:
            page["main"]()
            if name == "one_page":
                keep(name, [np.split(row, 10, axis=1) for row in np.split(np.asarray(Image.open(picture)), len(rows))])
        except NotFinite as error:
            noted_line(str(error))
    return rows


# Healthy and sick

def training(name):
    """Run train.py. Row k: the policy after k epochs, its samples, its evaluation, and the update that follows."""
    flags = f"{TRAININGS[name]} {WATCH[name]} {EVALUATIONS}"
    arguments = [*shlex.split(flags), "--auto-resume", "--out", str(RUNS / name)]
    print(f"python train.py {shlex.join(arguments)}", flush=True)
    if subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT).returncode:
        raise InputError(f"{name} has stopped; python tutorial/figures.py goes on with it")
    rows = rows_of(RUNS / name)
    strips = [np.asarray(Image.open(path)) for path in sorted((RUNS / name).glob("samples/epoch_????.png"))]
    keep(name, [np.split(strip, 10, axis=1) for strip in strips])
    shutil.rmtree(RUNS / name)      # so that the next model's run does not go on with this one
    return rows


def rows_of(folder):
    """The rows of a finished run, from its files."""
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    watched = {name.split(":")[-1]: name for name in result["scores"]}      # recognised, rule
    rows = [dict(epoch=k) for k in range(len(history) + 1)]
    for k, line in enumerate(history):
        rows[k].update({name: line[name] for name in UPDATE if name in line}, reward=line["reward_mean"],
                       **{short: line[f"score_{name}"] for short, name in watched.items()})
        if "eval_reward" in line:
            rows[k + 1].update(held_out=line["eval_reward"], **{f"held_out_{short}": line[f"eval_score_{name}"]
                                                                for short, name in watched.items()})
    for k, when in ((0, "before"), (-1, "after")):
        rows[k].update(held_out=result[f"reward_{when}"], **{f"held_out_{short}": result["scores"][name][k]
                                                             for short, name in watched.items()})
    return rows


def exercise(number=1):
    """A sick run of the exercises': their curves.py makes it, unless it has it, and keeps it."""
    name = f"sick_{number}"
    if name not in curves.read():
        curves.make(name, curves.exercises()[number], HERE / "exercises" / f"{number}.patch")
    shutil.copy(HERE / "exercises" / "rows" / f"{name}.webp", MEASURED)
    lines = curves.read()[name]         # the first has the evaluation before training alone
    rows = [dict(epoch=k, held_out=line.get("held_out", "")) for k, line in enumerate(lines)]
    for row, line in zip(rows, lines[1:]):
        row.update({name: line[name] for name in UPDATE if name in line}, reward=line["reward_mean"])
    return rows


EXPERIMENTS = dict(steps=steps, ratios=ratios, prompts=prompts, plane=plane,
                   **{name: partial(one_page, name) for name in PROGRAMS},
                   **{name: partial(training, name) for name in TRAININGS}, sick_1=exercise)


def there(*names):
    """Whether these have been measured."""
    return all((MEASURED / f"{name}.csv").is_file() for name in names)


def measure_what_is_missing():
    """Carry out the experiments whose numbers are not there, one after the other."""
    MEASURED.mkdir(exist_ok=True)
    for name, experiment in EXPERIMENTS.items():
        if not there(name):
            print(f"{name} ...", flush=True)
            write(name, experiment())
