"""What tests/test_processes.py starts several of: trainings as one of N processes, their results in a file.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500 python tests/in_processes.py WHAT FOLDER
"""
import sys
from pathlib import Path

import pytest
import torch

import train
from conftest import ROOT  # noqa: F401
from ddpo_min.processes import gather, rank, together
from test_update_oracle import CASES, run_train, settings_of, tiny_model

# One case for each algorithm, normalisation and kind of training, with two optimizer steps an epoch where it can
CHOSEN = list({(case["algorithm"], case["normalise"], case["trainable"]): case
               for case in sorted(CASES, key=lambda case: (case["updates"] * case["inner_epochs"], case["rank"] or 0))}
              .values())


def run_case(case, folder):
    """The epochs of a case, [{name: anything}], on a tiny model in float64."""
    settings, _ = settings_of(case, folder)
    with pytest.MonkeyPatch.context() as patch:
        epochs, _ = run_train(settings, tiny_model(), patch)
    return [dict(rewards=epoch.rewards, worth=epoch.worth, parameters=epoch.parameters, metrics=epoch.metrics,
                 drawn=len(epoch.log_p_old)) for epoch in epochs]


def cases(folder):
    """All of CHOSEN; the first process writes what they gave, and how many samples each process has drawn."""
    own = folder / f"rank{rank()}"
    own.mkdir()
    results = [run_case(case, own) for case in CHOSEN]
    drawn = gather([[epoch.pop("drawn") for epoch in result] for result in results])
    if rank() == 0:
        torch.save(dict(results=results, drawn=drawn), folder / "results.pt")


def runs(folder):
    """A run with its folder, begun here; and one that a single process began, taken up."""
    arguments = (folder / "arguments.txt").read_text().split("\n")
    train.main([*arguments, "--epochs", "2", "--out", str(folder / "both")])
    train.main(["--resume", str(folder / "alone"), "--epochs", "2"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    together(lambda: dict(cases=cases, runs=runs)[sys.argv[1]](Path(sys.argv[2])))()
