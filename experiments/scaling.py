"""What an epoch costs, in seconds and memory: against samples, denoising steps, the pictures' size and processes.

    python experiments/scaling.py       nine minutes on 2 CPU cores with nothing else to do; writes scaling.csv

Each row is a run of train.py of two epochs, of which the second counts. A run of N processes has 2 / N threads in each,
so that all of them use two cores.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from results import ROOT, write_rows
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from ddpo_min.files import run_script

CORES = 2
START = dict(samples=128, steps=8, size=64, processes=1)
VALUES = dict(samples=(64, 128, 256, 512), steps=(4, 8, 16, 32), size=(32, 64, 96, 128), processes=(1, 2))


def train(folder, samples, steps, size, processes):
    """Two epochs; returns the log's line of the second."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command = [*(start if processes > 1 else [sys.executable]), "train.py", "--reward", "jpeg", "--epochs", "2",
               "--samples", str(samples), "--updates", str(samples // 64), "--steps", str(steps), "--size", str(size),
               "--eval-samples", "2", "--show-every", "9", "--out", str(folder)]
    threads = dict(os.environ, OMP_NUM_THREADS=str(CORES // processes))
    subprocess.run(command, cwd=ROOT, env=threads, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])


def main():
    rows, runs = [], [(name, value) for name, values in VALUES.items() for value in values]
    with tempfile.TemporaryDirectory() as folder:
        for name, value in tqdm(runs):
            what = {**START, name: value}
            line = train(Path(folder) / f"{name}-{value}", **what)
            sampling, training = (what["samples"] / line[f"{phase}_images_per_s"] for phase in ("sampling", "training"))
            rows.append(dict(run=name, **what, sampling_seconds=sampling, training_seconds=training,
                             seconds=sampling + training, memory_mb=line["peak_memory_mb"]))
    write_rows("scaling", rows)


if __name__ == "__main__":
    run_script(main, __doc__)
