"""The files of a run, each replaced atomically and with the version that wrote it."""
import hashlib
import io
import json
import os
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import __version__, figures
from .files import TEMPORARY, InputError, Lock, atomic, make_folder

MOST_ROWS = 9       # of samples.png, and frames of samples.webp
LOCK = ".lock"      # the file that says that a run is writing to the folder
EARLY = ("config.json", "before.npz", "samples.png", "samples.webp")       # written before the first checkpoint


def sha256(content):
    """The checksum of bytes, or of a dict of plain values in any order."""
    if isinstance(content, dict):
        content = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def sha256_of_file(file, size):
    """The checksum of the first `size` bytes of an open file, 32 bytes; it is left at their end."""
    digest, chunk = hashlib.sha256(), 2 ** 20
    file.seek(0)
    for start in range(0, size, chunk):
        digest.update(file.read(min(chunk, size - start)))
    return digest.digest()


def instead_of_resuming(folder):
    """What to do where a run cannot be resumed, by what it has left."""
    ways = [f", or go on from what it learned with {given} {folder / file}"
            for given, file in (("--init-lora", "lora.safetensors"), ("--weights", "model.safetensors"))
            if (folder / file).is_file()]
    return f"start a new run{''.join(ways)}"


class Folder:
    """Where a run writes: config.json, metrics.jsonl, state.pt, before.npz, result.json and pictures.

    sums: {name: SHA-256} of before.npz. state.pt keeps it, and ends with its own SHA-256.
    """

    def __init__(self, out, resume, anew=False, mine=True):
        """out: its path, "" for runs/REWARD, made by create(); resume: whether it is there already; anew: whether what
        a run has left there that was killed before its first checkpoint may be taken away; mine: whether this process
        writes to it, and not another one of the same run.

        Raises InputError if it cannot be written to, holds something else, or if another run is writing to it.
        """
        self.path, self.sums, self.made, self.lock = Path(out) if out else None, {}, False, None
        if not mine:
            return
        try:
            if out and self.path.exists() and not self.path.is_dir():
                raise InputError(f"--out {out}: a file; expected a folder, new or empty")
            if out and self.path.exists() and (resume or anew):
                self.lock = Lock(self.path / LOCK)
            if out and not resume and self.path.exists():
                if anew and self._is_early():
                    self.remove()
                self._refuse_a_full_one()
            there = self.path or Path("runs")
            while not there.exists():
                there = there.absolute().parent
        except OSError as error:
            raise InputError(f"--out {out or 'runs'}: cannot be looked into ({error.strerror}); choose another")
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise InputError(f"--out {out or 'runs'}: {there} is no folder that can be written to")

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.release()

    def _refuse_a_full_one(self):
        if self.path.exists() and {path.name for path in self.path.iterdir()} - {LOCK}:
            self.release()
            go_on = f", or --resume {self.path}" if (self.path / "state.pt").exists() else ""
            raise InputError(f"--out {self.path}: already holds files; choose another{go_on}")

    def _is_early(self):
        """Whether nothing is there but what a run leaves that is killed before its first checkpoint."""
        names = {path.name for path in self.path.iterdir() if not path.name.startswith(TEMPORARY)} - {LOCK, "samples"}
        try:
            ours = not names or "sha256" in json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError, TypeError):
            ours = False
        return ours and names <= set(EARLY)

    def create(self, reward):
        """Choose runs/REWARD, or runs/REWARD-2, -3, ... if taken, also by a run that starts at the same moment."""
        n, reward = 1, re.sub(r"[^\w.+-]+", "_", reward.replace(",", "+"))[-60:]     # names have up to 255 bytes
        self.made = not (self.path and self.path.exists())
        while self.path is None:
            path = Path("runs") / (reward if n == 1 else f"{reward}-{n}")
            make_folder("runs")
            try:
                path.mkdir()
                self.path = path
            except FileExistsError:
                n += 1
        make_folder(self.path)
        self.lock = self.lock or Lock(self.path / LOCK)
        self._refuse_a_full_one()       # another run may have started at the same moment, and ended
        make_folder(self.path / "samples")

    def remove(self):
        """Take back what create() made and what came before the first checkpoint: it could not be resumed."""
        with suppress(OSError):     # also if somebody has put something there
            for name in (*EARLY, "samples/epoch_0000.png"):
                (self.path / name).unlink(missing_ok=True)
            self._take_away_half_written()
            (self.path / "samples").rmdir()
            if self.made:
                self.release()
                self.path.rmdir()

    def release(self):
        """The run is over: another may have the folder."""
        if self.lock:
            self.lock.release()

    def _take_away_half_written(self):
        for stale in [*self.path.glob(f"{TEMPORARY}*"), *self.path.glob(f"samples/{TEMPORARY}*")]:
            stale.unlink()

    def write_json(self, name, content):
        """One JSON object in a file of its own."""
        with atomic(self.path / name) as temporary:
            temporary.write_text(json.dumps(dict(content, version=__version__), indent=1) + "\n")

    def write_metrics(self, history):
        """One JSON object an epoch, each in a line of metrics.jsonl."""
        with atomic(self.path / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(dict(line, version=__version__)) + "\n" for line in history))

    def write_state(self, state):
        """The checkpoint: a dict of tensors and plain values, and the checksums."""
        with atomic(self.path / "state.pt") as temporary, open(temporary, "w+b") as file:
            torch.save(dict(state, files=self.sums, version=__version__), file)     # a name would hide disk errors
            file.write(sha256_of_file(file, file.tell()))       # torch reads what is before it

    def check(self, settings):
        """Refuse to resume if anything that this needs is missing, damaged or another run's. Raises InputError.

        settings: {name: value} of those that a run keeps. Takes away what a killed run was about to write.
        """
        path = self.path / "state.pt"
        try:
            with open(path, "rb") as file:
                intact = sha256_of_file(file, path.stat().st_size - 32) == file.read()
        except OSError:
            intact = False
        if not intact:
            raise InputError(f"{path}: damaged, it cannot be read; {instead_of_resuming(self.path)}")
        state = self._state(mmap=True)
        kept, self.sums = state["settings"], state["files"]
        differ = sorted(name for name in kept.keys() | settings.keys() if kept.get(name) != settings.get(name))
        if differ:
            raise InputError(f"{self.path}: config.json and state.pt are of two runs ({differ[0]} differs); restore "
                             f"the right one, or {instead_of_resuming(self.path)}")
        for name in self.sums:
            self._read(name)
        self._take_away_half_written()

    def _read(self, name):
        """The content of a file whose checksum is kept. Raises InputError if it is not what was written."""
        try:
            content = (self.path / name).read_bytes()
        except OSError:
            content = b""
        if sha256(content) != self.sums[name]:
            raise InputError(f"{self.path / name}: {'damaged, or of another run' if content else 'missing or empty'}; "
                             f"restore it, or {instead_of_resuming(self.path)}")
        return content

    def _state(self, **how):
        """The last checkpoint as a dict. Raises InputError."""
        path = self.path / "state.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, **how)
        except Exception as error:
            raise InputError(f"{path}: cannot be read ({type(error).__name__}); {instead_of_resuming(self.path)}")
        kinds = dict(epoch=int, learner=dict, history=list, settings=dict, reward_files=dict, files=dict)
        if not isinstance(state, dict) or any(not isinstance(state.get(name), kind) for name, kind in kinds.items()):
            raise InputError(f"{path}: written by another version; {instead_of_resuming(self.path)}")
        return state

    def read_state(self, learner):
        """Load the last checkpoint into the learner; returns all of it. Raises InputError if it does not fit."""
        state = self._state()
        try:
            learner.load_state_dict(state["learner"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = error if type(error) is ValueError else "parts are missing"
            raise InputError(f"{self.path / 'state.pt'}: it does not fit the model ({why}); resume with the weights "
                             "the run was started with")
        return state

    def keep_before(self, images, rewards, scores):
        """The evaluation before training, kept for the comparison after it, also across a resume."""
        with atomic(self.path / "before.npz") as temporary:
            np.savez_compressed(temporary, images=images, rewards=rewards, names=np.array(list(scores)),
                                scores=np.array(list(scores.values())), version=np.array(__version__))
        self.sums["before.npz"] = sha256((self.path / "before.npz").read_bytes())

    def before(self):
        """(images, rewards, {name: scores}) of keep_before(). Raises InputError if they are lost."""
        with np.load(io.BytesIO(self._read("before.npz")), allow_pickle=False) as kept:
            return kept["images"], kept["rewards"], dict(zip(kept["names"].tolist(), kept["scores"], strict=True))

    def add_row(self, epoch, images, captions):
        """Add a row to samples.png and a frame to samples.webp: the same prompts and seeds after `epoch` epochs.

        images: uint8 (n, H, W, 3); captions: n str. Of many rows, MOST_ROWS are shown, evenly chosen.
        """
        strip, rows = np.concatenate(list(images), axis=1), {}
        figures.save_png(self.path / "samples" / f"epoch_{epoch:04d}.png", Image.fromarray(strip),
                         captions=json.dumps(captions))
        paths = sorted((self.path / "samples").glob("epoch_????.png"))
        for i in np.linspace(0, len(paths) - 1, min(len(paths), MOST_ROWS)).round().astype(int):
            with suppress(OSError, SyntaxError, ValueError, TypeError):     # damage costs its row, not the run
                kept = Image.open(paths[i])
                drawn, below = np.asarray(kept), [str(text) for text in json.loads(kept.info.get("captions", "[]"))]
                if drawn.shape == strip.shape:
                    below = (below + [""] * len(images))[:len(images)]
                    rows[f"epoch {int(paths[i].stem[6:])}"] = np.stack(np.split(drawn, len(images), axis=1)), below
        frames = [figures.grid([figures.thumbnails(row)], [below], labels=[label], room=list(rows))
                  for label, (row, below) in rows.items()]
        figures.save_moving(self.path / "samples.webp", frames)
        figures.save_png(self.path / "samples.png", figures.grid([row for row, _ in rows.values()], labels=list(rows)))
