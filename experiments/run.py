"""Train what the claims of the paper need, and keep the numbers.

    python experiments/run.py                 which experiments there are, their minutes, what is done
    python experiments/run.py guidance        the runs of one that are missing; "all": of every one
    python experiments/figures.py             draws all figures from the numbers, without training

A run is a command of train.py and a seed. When it ends, what it has logged is added to experiments/NAME.csv, a row an
epoch. Stop and start at will: a run that was interrupted is resumed from runs/experiments/. One training at a time. A
command that several experiments have is run once.
"""
import argparse
import json
import shlex
import subprocess
import sys
from typing import NamedTuple

from results import HERE, ROOT, read_rows, runs_of, write_rows

sys.path.insert(0, str(ROOT))
from ddpo_min.cli import read_settings
from ddpo_min.files import InputError, run_main

SEEDS = (0, 1, 2)
WATCH = ("--watch", "clip,experiments/judges.py:recognised")
FIRST_HALF = "--prompts experiments/prompts/first_half.txt --eval-prompts animals"
RULE = ("--watch", "weights/rater.py:rule,weights/rater.py:uncut,experiments/judges.py:recognised")


class Experiment(NamedTuple):
    """What is run for a claim."""
    minutes: int            # for all runs and seeds, on 2 CPU cores
    runs: dict              # {name: arguments of train.py}
    watch: tuple = WATCH


EXPERIMENTS = dict(
    # Figure 4: four algorithms on four tasks, reward against pictures scored; the presets of RWR end after half as many
    algorithms=Experiment(180, {f"{algorithm} {reward}": f"--algorithm {algorithm} --reward {reward}"
                                for reward in ("jpeg", "incompressible", "aesthetic", "clip")
                                for algorithm in ("ddpo_is", "ddpo_sf", "rwr", "rwr_sparse")}),
    # Noise in the first four steps alone, and a pull to the base model; beside the algorithms' ddpo_is
    fast=Experiment(20, {reward: f"--preset laptop_fast --reward {reward}"
                         for reward in ("jpeg", "incompressible", "aesthetic", "clip")}),
    # One setting changed at a time
    settings=Experiment(150, {
        "default": "", "eta 0.3": "--eta 0.3", "eta 0.3, a third of the learning rate": "--eta 0.3 --lr 1e-3",
        "eta 0.6": "--eta 0.6", "4 steps": "--steps 4", "16 steps": "--steps 16",
        "clip range 0.001": "--clip-range 0.001", "clip range 0.1": "--clip-range 0.1",
        "compared with the epoch": "--normalise epoch",
        "compared with the group": "--normalise group --group-size 8",
        "a quarter of the steps trained": "--timestep-fraction 0.25", "all steps trained": "--timestep-fraction 1",
        "first 4 steps": "--last-step 4 --timestep-fraction 1", "last 4 steps": "--first-step 5 --timestep-fraction 1",
        "all steps weigh alike": "--step-weights paper", "rank 1": "--rank 1", "rank 16": "--rank 16",
        "whole UNet": "--trainable full"}),
    # Guidance in sampling, and in training, too
    guidance=Experiment(35, {"without": "", "in sampling only": "--guidance 5 --no-guidance-in-training",
                             "in both": "--guidance 5"}),
    # RWR: few large epochs or many small ones; 2,048 pictures and 128 optimizer steps in all
    interleaving=Experiment(80, {
        f"{n} epochs": f"--algorithm rwr --epochs {n} --samples {2048 // n} --updates {32 // n} --inner-epochs 4"
        for n in (1, 2, 4, 8)}),
    # How often the same pictures are used: minibatches, and passes over them
    reuse=Experiment(90, {
        **{f"{n} minibatches": f"--updates {n}" for n in (1, 2, 4, 8, 16)},
        "2 passes": "--inner-epochs 2", "4 passes": "--inner-epochs 4",
        "4 passes, no clipping": "--inner-epochs 4 --clip-range 1000"}),
    # Trained on half of the animals, measured on the others; trained on animals, measured on what they do, and pairs
    generalisation=Experiment(45, {f"{reward}, {others}": f"--reward {reward} {arguments}"
                                   for reward in ("jpeg", "aesthetic")
                                   for others, arguments in {"other animals": FIRST_HALF,
                                                             "activities": "--eval-prompts activities",
                                                             "counting": "--eval-prompts counting"}.items()}),
    # A learned reward followed too far (fast), and what a KL penalty does; 1e-9 does nothing, but the KL is logged
    overoptimisation=Experiment(40, {
        f"KL weight {weight}": f"--preset laptop_fast --reward aesthetic --epochs 8 --kl-weight {weight or 1e-9}"
        for weight in (0, 0.01, 0.03, 0.1)}, watch=RULE),
    # The comparison with DPOK: one prompt each, in this world's words
    dpok=Experiment(30, {name: f"--reward clip --prompts experiments/prompts/{name}.txt"
                         for name in ("colour", "count", "composition", "location")},
                    watch=("--watch", "experiments/judges.py:recognised")),
)
SCRIPTS = dict(gradient_noise=80, windows=60, guided_sampler=17, scaling=9)      # programs, and their minutes


def command_of(experiment, run, seed):
    """The arguments of train.py."""
    return [*shlex.split(experiment.runs[run]), *experiment.watch, "--seed", str(seed)]


def missing(name):
    """The runs of an experiment whose numbers are not kept yet: [(run, seed)]."""
    kept = {(row["run"], row["seed"]) for row in read_rows(name)}
    return [(run, seed) for run in EXPERIMENTS[name].runs for seed in SEEDS if (run, seed) not in kept]


def finished(name):
    """Whether the numbers of an experiment or a script are kept, of all runs and seeds."""
    if name in EXPERIMENTS:
        return not missing(name)
    rows = read_rows(name)
    return bool(rows) and ("seed" not in rows[0] or all(
        {row["seed"] for row in rows if row["run"] == own} >= set(SEEDS) for own in runs_of(rows)))


def rows_elsewhere(settings, seed):
    """The rows of a run with the same settings, of any experiment, without its name and seed; [] if there is none."""
    for name, experiment in EXPERIMENTS.items():
        rows = [row for row in read_rows(name) if row["seed"] == seed and row["run"] in experiment.runs]
        for run in runs_of(rows):
            if read_settings(command_of(experiment, run, seed)) == settings:
                return [{column: value for column, value in row.items() if column not in ("run", "seed")}
                        for row in rows if row["run"] == run]
    return []


def carry_out(name, run, seed):
    """Train, or go on with a training that was interrupted, then keep its numbers."""
    experiment = EXPERIMENTS[name]
    if rows := rows_elsewhere(read_settings(command_of(experiment, run, seed)), seed):
        return keep(name, run, seed, rows)
    folder = ROOT / "runs" / "experiments" / name / f"{run.replace(' ', '_')}-{seed}"
    train_in(folder, command_of(experiment, run, seed), f"{name}: {run}, seed {seed}")
    keep(name, run, seed, rows_of(folder))


def train_in(folder, command, title, epochs=0):
    """Train in this folder, or go on with a training there that was interrupted or ended before so many epochs."""
    result = folder / "result.json"
    if not result.is_file() or epochs and json.loads(result.read_text())["epochs"] < epochs:
        print(f"\n{title}: python train.py {shlex.join(command)}", flush=True)
        command = [sys.executable, "train.py", *command, "--auto-resume", "--out", str(folder)]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise InputError(f"{title} has stopped; the same command goes on with it")


def rows_of(folder):
    """A finished run as rows: epoch 0 is the untrained model, whose pictures the first epoch samples.

    reward: mean over the samples drawn at this point of training; held_out: over the evaluation; both for what is
    watched, too; queries: pictures scored until then; seconds: of sampling and training until then; what the update
    on these samples logged.
    """
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result, config = (json.loads((folder / f"{file}.json").read_text()) for file in ("result", "config"))
    scores, rows, seconds = {name.split(":")[-1]: name for name in result["scores"]}, [], 0.0
    for epoch, line in enumerate(history):
        row = dict(epoch=epoch, queries=epoch * config["samples"], seconds=seconds, reward=line["reward_mean"])
        row.update({short: line[f"score_{name}"] for short, name in scores.items()})
        row.update({name: line[name] for name in ("approx_kl", "clip_fraction", "max_ratio_error", "kl_to_base",
                                                  "distance_to_base", "distance_to_old", "effective_samples",
                                                  "grad_norm") if name in line})
        seconds += config["samples"] * (1 / line["sampling_images_per_s"] +
                                        config["inner_epochs"] / line["training_images_per_s"])
        rows.append(row)
    rows.append(dict(epoch=len(history), queries=len(history) * config["samples"], seconds=seconds))
    for row, when in ((rows[0], 0), (rows[-1], 1)):
        row["held_out"] = (result["reward_before"], result["reward_after"])[when]
        row.update({f"held_out_{short}": result["scores"][name][when] for short, name in scores.items()})
    return rows


def keep(name, run, seed, rows):
    """Add a run's rows to the table, in the order of the experiment."""
    kept = [row for row in read_rows(name) if (row["run"], row["seed"]) != (run, seed)]
    order = list(EXPERIMENTS[name].runs)
    kept += [dict(run=run, seed=seed, **row) for row in rows]
    write_rows(name, sorted((row for row in kept if row["run"] in order),
                            key=lambda row: (order.index(row["run"]), row["seed"], row["epoch"])))


def overview():
    """A line an experiment."""
    for name, experiment in EXPERIMENTS.items():
        left, of = len(missing(name)), len(experiment.runs) * len(SEEDS)
        print(f"{name:18} {experiment.minutes:4} minutes   {of - left} of {of} runs done")
    for name, minutes in SCRIPTS.items():
        print(f"{name:18} {minutes:4} minutes   {'done' if finished(name) else 'missing'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=", ".join([*EXPERIMENTS, *SCRIPTS, "all"]))
    names = parser.parse_args().names
    if names == ["all"]:
        names = [*EXPERIMENTS, *SCRIPTS]
    for name in names:
        if name not in EXPERIMENTS and name not in SCRIPTS:
            raise InputError(f"{name}: no experiment; expected some of {', '.join([*EXPERIMENTS, *SCRIPTS, 'all'])}")
    for name in names:
        if name in EXPERIMENTS:
            for run, seed in missing(name):
                carry_out(name, run, seed)
        elif not finished(name) and subprocess.run([sys.executable, HERE / f"{name}.py"], cwd=ROOT).returncode:
            raise InputError(f"{name} has stopped; start it again")
    if not names:
        overview()


if __name__ == "__main__":
    run_main(main)
