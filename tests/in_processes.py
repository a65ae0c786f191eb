"""What tests/test_processes.py starts several processes of, joined as torchrun does it.

They are forked from a server that has imported everything: to start Python and import torch in each would take longer
than what they do. So would what is imported at its first use only: that is in LATER.
"""
import multiprocessing
import os
import socket
import sys
from functools import cache
from multiprocessing import forkserver

import pytest
import torch

import train
from conftest import ROOT
from ddpo_min.files import run_main
from ddpo_min.processes import gather, rank, together
from test_siblings import CASES as SIBLINGS
from test_update_oracle import CASES, run_train, settings_of, tiny_model

SERVER = multiprocessing.get_context("forkserver")
LATER = ["open_clip", "torch._dynamo"]      # by the tokenizer, and by a network whose weights come from a file

# One case for each algorithm, normalisation and kind of training, with several optimizer steps an epoch where it can
CHOSEN = list({(case["algorithm"], case["normalise"], case["trainable"]): case
               for case in sorted(CASES, key=lambda case: (case["updates"] * case["inner_epochs"], case["rank"] or 0))}
              .values()) + [SIBLINGS[1], SIBLINGS[3], SIBLINGS[7]]      # one of each


@cache
def start_server():
    """Start it, with this file imported: it looks for the file where PYTHONPATH says, and nowhere else."""
    SERVER.set_forkserver_preload(["in_processes", *LATER])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        forkserver.ensure_running()


class Group:
    """So many processes that call work(*given) in a folder; what they print is in its files out0, err0, out1, ..."""

    def __init__(self, count, folder, work, *given):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        start_server()
        self.folder = folder
        for number in range(count):
            (folder / f"out{number}").touch()
            (folder / f"err{number}").touch()
        self.processes = [SERVER.Process(target=one_of, args=(number, count, port, folder, work, given))
                          for number in range(count)]
        for process in self.processes:
            process.start()

    def ended(self):
        """Wait for all: their statuses, and (stdout, stderr) of each."""
        for process in self.processes:
            process.join(300)
        said = [tuple((self.folder / f"{name}{number}").read_text() for name in ("out", "err"))
                for number in range(len(self.processes))]
        return [process.exitcode for process in self.processes], said


def one_of(rank, count, port, folder, work, given):
    """In a process: its place among the others, its files, then the work."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{rank}", os.O_WRONLY), number)
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    work(*given)


def command(arguments):
    """python train.py with these arguments."""
    run_main(together(lambda: train.main(arguments)))


def trainings(folder, cases, arguments):
    """Some of CHOSEN on a tiny model in float64; then a run with its folder, and one that a single process began."""
    together(lambda: _trainings(folder, cases, arguments))()


def _trainings(folder, cases, arguments):
    own = folder / f"rank{rank()}"
    own.mkdir()
    results = [run_case(case, own) for case in cases]
    drawn = gather([[epoch.pop("drawn") for epoch in result] for result in results])
    if rank() == 0:
        torch.save(dict(results=results, drawn=drawn), folder / "results.pt")
    if arguments:
        train.main([*arguments, "--epochs", "2", "--out", str(folder / "both")])
        train.main(["--resume", str(folder / "alone"), "--epochs", "2"])


def run_case(case, folder):
    """The epochs of a case, [{name: anything}]."""
    settings, _ = settings_of(case, folder)
    with pytest.MonkeyPatch.context() as patch:
        epochs, _ = run_train(settings, tiny_model(), patch)
    return [dict(rewards=epoch.rewards, worth=epoch.worth, parameters=epoch.parameters, metrics=epoch.metrics,
                 drawn=len(epoch.log_p_old)) for epoch in epochs]
