"""Kill many runs at random moments, go on with the same command, and compare each with a run that nothing disturbed.

    python tests/kill_runs.py 200       12 minutes on 2 CPU cores

A run is of one or two processes, is stopped once or twice (SIGKILL, SIGTERM or Ctrl-C, one process or all of them),
while it samples, trains, saves, evaluates or begins. In the end all its files must be those of the undisturbed run, and
nothing else may lie in its folder.
"""
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from conftest import ROOT, tiny_networks
from in_processes import Group, command
from test_train import metrics

sys.path.insert(0, str(ROOT))
from ddpo_min.weights import save_single_file

KINDS = (("--updates", "2", "--inner-epochs", "2"), ("--algorithm", "rwr", "--normalise", "epoch", "--updates", "2"),
         ("--algorithm", "ddpo_sf", "--normalise", "group", "--group-size", "2"),
         ("--normalise", "epoch", "--kl-weight", "0.1", "--keep-every", "2"))
SAME = ("before.npz", "samples.png", "samples.webp", "before_after.png", "result.json")
LORAS = ("lora.safetensors", "lora_best.safetensors", "lora_0002.safetensors")


def start(folder, out, kind, processes):
    """The command that starts the run or goes on with it, in so many processes."""
    logs = Path(tempfile.mkdtemp(dir=folder))
    arguments = ["--weights", str(folder / "tiny.safetensors"), "--preset", "laptop", "--samples", "8", "--steps", "3",
                 "--epochs", "4", "--eval-samples", "4", "--eval-every", "2", "--device", "cpu", "--prompt-minimum",
                 "2", *kind, "--auto-resume", "--out", str(out)]
    return Group(processes, logs, command, arguments)


def disturb(group, rng, longest):
    """Stop the run at a random moment; returns what was done, "" if the run was over before that."""
    while not (group.folder / "out0").read_text() and any(process.is_alive() for process in group.processes):
        time.sleep(0.01)        # it has begun, and hears signals
    time.sleep(rng.uniform(0, longest))
    how = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    hit = group.processes if rng.random() < 0.5 else [rng.choice(group.processes)]
    alive = [process for process in hit if process.is_alive()]
    for process in alive:
        os.kill(process.pid, how)
    statuses, said = group.ended()
    told = "".join(err for _, err in said)
    assert "Traceback" not in told, told
    assert not alive or set(statuses) <= {0, 2, -how, 128 + how}, (statuses, told)
    return f"{len(group.processes)} processes, {how.name}" if alive and any(statuses) else ""


def content(path):
    """The tensors and metadata of a LoRA: the order of the latter in the file is chance."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).tolist() for name in file.keys()}, file.metadata()


def differences(run, whole):
    """What is not as in the undisturbed run: names of files."""
    names = [{path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in (run, whole)]
    wrong = sorted(names[0] ^ names[1])
    wrong += [name for name in SAME if (run / name).read_bytes() != (whole / name).read_bytes()]
    wrong += [name for name in LORAS if (whole / name).exists() and content(run / name) != content(whole / name)]
    return wrong + ([] if metrics(run) == metrics(whole) else ["metrics.jsonl"])


def main(count, seed=0):
    signal.signal(signal.SIGINT, signal.default_int_handler)    # under nohup children ignore Ctrl-C
    rng, tally = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_single_file(folder / "tiny.safetensors", *tiny_networks(), dtype=torch.float32, image_size=16)
        longest = {}
        for number in tqdm(range(count)):
            kind, processes = rng.randrange(len(KINDS)), rng.choice([1, 2])
            reference, run = folder / f"whole{kind}{processes}", folder / f"run{number}"
            if not reference.exists():
                began = time.monotonic()
                statuses, said = start(folder, reference, KINDS[kind], processes).ended()
                assert not any(statuses), said
                longest[kind, processes] = time.monotonic() - began
            for _ in range(rng.choice([1, 2])):
                tally[disturb(start(folder, run, KINDS[kind], processes), rng, longest[kind, processes])] += 1
            statuses, said = start(folder, run, KINDS[kind], processes).ended()
            assert not any(statuses), (number, said)
            wrong = differences(run, reference)
            assert not wrong, f"run {number}, {KINDS[kind]}, {processes} processes: {wrong}"
    over = tally.pop("", 0)
    print(f"{count} runs equal the undisturbed ones after {tally.total()} stops; {over} were over before")
    for what, times in sorted(tally.items()):
        print(f"  {what}: {times}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
