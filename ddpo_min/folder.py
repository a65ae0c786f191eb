"""The files of a run, each replaced atomically and with the version that wrote it."""
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import __version__, figures
from .files import InputError, atomic


class Folder:
    """Where a run writes: config.json, metrics.jsonl, state.pt, before.npz, result.json and pictures."""

    def __init__(self, out, resume):
        """out: its path, "" for runs/REWARD, made by create(); resume: whether it is there already.

        Raises InputError if it cannot be written to, or holds something else.
        """
        self.path = Path(out) if out else None
        if out and self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {out}: a file; expected a folder, new or empty")
        if out and not resume and self.path.exists() and any(self.path.iterdir()):
            go_on = f", or --resume {out}" if (self.path / "state.pt").exists() else ""
            raise InputError(f"--out {out}: already holds files; choose another{go_on}")
        there = self.path or Path("runs")
        while not there.exists():
            there = there.absolute().parent
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise InputError(f"--out {out or 'runs'}: {there} is no folder that can be written to")

    def create(self, reward):
        """Choose runs/REWARD, or runs/REWARD-2, -3, ... if taken, also by a run that starts at the same moment."""
        n, reward = 1, re.sub(r"[^\w.+-]+", "_", reward.replace(",", "+"))
        while self.path is None:
            path = Path("runs") / (reward if n == 1 else f"{reward}-{n}")
            try:
                path.mkdir(parents=True)
                self.path = path
            except FileExistsError:
                n += 1

    def write_json(self, name, content):
        """One JSON object in a file of its own."""
        with atomic(self.path / name) as temporary:
            temporary.write_text(json.dumps(dict(content, version=__version__), indent=1) + "\n")

    def write_metrics(self, history):
        """One JSON object an epoch, each in a line of metrics.jsonl."""
        with atomic(self.path / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(dict(line, version=__version__)) + "\n" for line in history))

    def write_state(self, state):
        """The checkpoint: a dict of tensors and plain values."""
        with atomic(self.path / "state.pt") as temporary:
            torch.save(dict(state, version=__version__), temporary)

    def read_state(self, learner):
        """Load the last checkpoint into the learner; returns the rest of it. Raises InputError if it does not fit."""
        path = self.path / "state.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"{path}: cannot be read ({type(error).__name__}); the run cannot be resumed") from error
        if "learner" not in state:
            raise InputError(f"{path}: written by another version; start a new run")
        try:
            learner.load_state_dict(state["learner"])
        except ValueError as error:
            raise InputError(f"{path}: it does not fit the model ({error}); resume with the weights the run was "
                             "started with") from error
        return state

    def keep_before(self, images, rewards, scores):
        """The evaluation before training, kept for the comparison after it, also across a resume."""
        with atomic(self.path / "before.npz") as temporary:
            np.savez_compressed(temporary, images=images, rewards=rewards, names=np.array(list(scores)),
                                scores=np.array(list(scores.values())), version=np.array(__version__))

    def before(self):
        """(images, rewards, {name: scores}) of keep_before()."""
        with np.load(self.path / "before.npz", allow_pickle=False) as kept:
            return kept["images"], kept["rewards"], dict(zip(kept["names"].tolist(), kept["scores"], strict=True))

    def add_row(self, epoch, images):
        """Add a row to samples.png: the same prompts and seeds after `epoch` epochs; images uint8 (n, H, W, 3)."""
        strip = Image.fromarray(np.concatenate(list(images), axis=1))
        figures.save_png(self.path / "samples" / f"epoch_{epoch:04d}.png", strip)
        paths = sorted((self.path / "samples").glob("epoch_*.png"))
        rows = [np.stack(np.split(np.asarray(Image.open(path)), len(images), axis=1)) for path in paths]
        labels = [f"epoch {int(path.stem[6:])}" for path in paths]
        figures.save_png(self.path / "samples.png", figures.grid(rows, labels=labels))
