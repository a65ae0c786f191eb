"""Train every exercise's program, healthy and sick, and draw what the two show:  python tutorial/exercises/curves.py

Each run is made in a clone of the repository, so no patch touches your files, and nothing counts that is not committed.
The numbers go to curves.csv, the last row of pictures to rows/. A run that is in curves.csv is not made again: stop
whenever you like, and delete a run's lines to have it anew. About three minutes a run on 2 CPU cores, one at a time.
"""
import csv
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ddpo_min.files import run_script

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
PANELS = ["reward", "loss", "grad_norm", "approx_kl", "clip_fraction", "clip_fraction_by_step", "max_ratio_error",
          "kl_to_base"]
COLUMNS = ["run", "epoch", "reward_mean", "held_out", *PANELS[1:]]


def exercises():
    """{number: the flags of its command}, as the page has them."""
    page = (HERE / "README.md").read_text()
    return {int(number): shlex.split(flags) for number, flags in
            re.findall(r"^## Exercise (\d+)\n.*?^python train\.py (.*?)$", page, re.M | re.S)}


def healthy(number, all_flags):
    """The healthy run to compare an exercise with: exercises with the same command share it."""
    return f"healthy_{min(n for n, flags in all_flags.items() if flags == all_flags[number])}"


def read():
    """curves.csv: {run: its lines}; the first has the reward on held-out seeds before training, the last that after."""
    runs = {}
    if (HERE / "curves.csv").exists():
        with open(HERE / "curves.csv", newline="") as file:
            for line in csv.DictReader(file):
                runs.setdefault(line["run"], []).append({name: json.loads(value) for name, value in line.items()
                                                         if name != "run" and value})
    return runs


def make(run, flags, patch=None):
    """Train in a clone, with the patch if there is one; adds the run to curves.csv, its last pictures to rows/."""
    print(f"{run}: python train.py {shlex.join(flags)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", HERE.parent.parent, folder], check=True)
        if patch:
            subprocess.run(["git", "apply", patch], cwd=folder, check=True)
        subprocess.run([sys.executable, "train.py", *flags, "--out", "run"], cwd=folder, check=True)
        out = Path(folder) / "run"
        result = json.loads((out / "result.json").read_text())
        lines = [{"epoch": 0, "held_out": result["reward_before"]},
                 *map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]
        lines[-1]["held_out"] = result["reward_after"]
        (HERE / "rows").mkdir(exist_ok=True)
        Image.open(max(out.glob("samples/epoch_*.png"))).save(HERE / "rows" / f"{run}.webp", quality=90)
    new = not (HERE / "curves.csv").exists()
    with open(HERE / "curves.csv", "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({"run": run, **{name: json.dumps(value) for name, value in line.items()}} for line in lines)


def draw(number, runs):
    """One picture: the same eight panels for every exercise, healthy against sick, and the last pictures of both.

    runs: {"healthy" or "sick": (name, lines)}.
    """
    figure, axes = plt.subplot_mosaic([PANELS[:4], PANELS[4:], ["healthy"] * 4, ["sick"] * 4], figsize=(13, 8),
                                      height_ratios=(3, 3, 1.4, 1.4), layout="constrained")
    for (label, (name, lines)), colour in zip(runs.items(), ("tab:green", "tab:red")):
        look = dict(color=colour, marker="o", markersize=3, label=label)
        column = lambda of, lines=lines: np.array([line.get(of, np.nan) for line in lines[1:]], dtype=float)  # noqa: E731
        epochs = column("epoch")
        axes["reward"].plot(epochs - 1, column("reward_mean"), **look)      # sampled before the epoch's updates
        held_out = {line["epoch"]: line["held_out"] for line in lines if "held_out" in line}
        axes["reward"].plot(*zip(*held_out.items()), color=colour, marker="s", linestyle=":", label=f"{label} held-out")
        for panel in set(PANELS[1:]) - {"clip_fraction_by_step"}:
            axes[panel].plot(epochs, column(panel), **look)
        clipped = np.array([line["clip_fraction_by_step"] for line in lines[1:]], dtype=float)     # (epochs, T)
        clipped = np.ma.masked_invalid(clipped).mean(axis=0)
        axes["clip_fraction_by_step"].plot(range(1, len(clipped) + 1), clipped, **look)
        axes[label].imshow(Image.open(HERE / "rows" / f"{name}.webp"))
        axes[label].set(ylabel=label, xticks=[], yticks=[])
    for panel in PANELS:
        logged = panel == "reward" or any(panel in line for _, lines in runs.values() for line in lines)
        axes[panel].set_visible(logged)     # the distance to the base is logged with a penalty on it alone
        axes[panel].set(title=panel, xlabel="denoising step" if panel.endswith("by_step") else "epoch")
        axes[panel].xaxis.get_major_locator().set_params(integer=True)
        axes[panel].grid(alpha=0.3)
    axes["reward"].legend(fontsize=8)
    figure.savefig(HERE / f"{number}.webp", dpi=80)
    plt.close(figure)


def main():
    all_flags = exercises()
    for number, flags in all_flags.items():
        pair = {"healthy": healthy(number, all_flags), "sick": f"sick_{number}"}
        for label, run in pair.items():
            if run not in read():
                make(run, flags, patch=HERE / f"{number}.patch" if label == "sick" else None)
        runs = read()
        draw(number, {label: (run, runs[run]) for label, run in pair.items()})


if __name__ == "__main__":
    run_script(main, __doc__)
