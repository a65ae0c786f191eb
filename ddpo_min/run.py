"""The folder of a run: settings, metrics, checkpoints and pictures. Nothing of the algorithm is in here."""
import json
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import figures
from .files import InputError, atomic
from .lora import lora_state, save_lora
from .settings import Settings, settings_from
from .weights import SHIPPED


def pick_device(name):
    """The torch device of that name; auto takes cuda, then mps, then cpu. Raises InputError if it is not there."""
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if name == "auto":
        name = next(d for d in ("cuda", "mps", "cpu") if there[d])
    if not there.get(name):
        raise InputError(f"--device {name}: not on this machine; expected auto, or one of "
                         f"{', '.join(d for d in there if there[d])}")
    return torch.device(name)


def peak_memory_mb(device):
    """The largest memory use so far in MB: the GPU's on cuda, else the process's (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
        import sys
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    except ImportError:
        return 0.0


def resumed_settings(folder, given, changes):
    """The settings a run was started with; only --epochs and --device may be given anew. Raises InputError."""
    path = Path(folder) / "config.json"
    if not path.is_file() or not (Path(folder) / "state.pt").is_file():
        raise InputError(f"--resume {folder}: not the folder of a run (config.json and state.pt are not both there)")
    wrong = sorted(set(given) - {"resume", "epochs", "device"})
    if wrong:
        raise InputError(f"--resume goes on with the run's own settings; drop --{wrong[0].replace('_', '-')} "
                         "(only --epochs and --device may change)")
    try:
        saved = json.loads(path.read_text())
    except ValueError:
        raise InputError(f"{path}: not valid JSON; restore it or start a new run")
    unknown = sorted(set(saved) - {field.name for field in fields(Settings)})
    if unknown:
        raise InputError(f"{path}: unknown setting {unknown[0]}; it was written by another version")
    return settings_from({**saved, **changes, "out": str(folder), "resume": str(folder)})


class Run:
    """Everything a run writes. Files are replaced atomically; metrics.jsonl gets one line an epoch."""

    def __init__(self, settings):
        self.settings = settings
        self.folder = Path(settings.out) if settings.out else None      # else chosen by start()
        if settings.out and self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"--out {self.folder}: a file; expected a folder, new or empty")
        if settings.out and not settings.resume and self.folder.exists() and any(self.folder.iterdir()):
            go_on = f", or --resume {self.folder}" if (self.folder / "state.pt").exists() else ""
            raise InputError(f"--out {self.folder}: already holds files; choose another{go_on}")
        self.history = []
        self.started = time.time()

    def start(self):
        """Make the folder (runs/REWARD, or -2, -3, ... if taken) and write config.json: every setting of the run."""
        if self.folder is None:
            self.folder = _new_folder(self.settings.reward)
        settings = asdict(self.settings)
        settings.update(out=str(self.folder), resume="")
        self._write_json("config.json", settings)

    def _write_json(self, name, content):
        with atomic(self.folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")

    def log(self, epoch, metrics):
        """Keep an epoch's metrics, one JSON object a line; returns a line to show."""
        as_plain = {name: value if isinstance(value, list) else float(value) for name, value in metrics.items()}
        self.history.append(dict(epoch=epoch, **as_plain))
        self._write_metrics()
        return ("epoch {epoch}: reward {reward_mean:.3f} +- {reward_std:.3f} ({reward_min:.3f} to {reward_max:.3f}), "
                "kl {approx_kl:.1e}, clipped {clip_fraction:.2f}, loss {loss:.1e}, gradient {grad_norm:.3f}, ratio error "
                "{max_ratio_error:.0e}, {sampling_images_per_s:.0f} and {training_images_per_s:.0f} images/s, "
                "{peak_memory_mb:.0f} MB").format(**self.history[-1])

    def _write_metrics(self):
        with atomic(self.folder / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.history))

    def save(self, epoch, layers, optimizer, statistics):
        """A checkpoint after `epoch` finished epochs; prompts, seeds and shuffles are functions of (seed, epoch)."""
        state = dict(epoch=epoch, lora={k: v.detach().cpu() for k, v in lora_state(layers).items()},
                     optimizer=optimizer.state_dict(), statistics=statistics.state(), history=self.history,
                     random=torch.get_rng_state())
        with atomic(self.folder / "state.pt") as temporary:
            torch.save(state, temporary)
        self._save_lora(layers, epoch)

    def _save_lora(self, layers, epoch, **story):
        s = self.settings
        save_lora(self.folder / "lora.safetensors", layers, reward=s.reward, epochs=epoch, steps=s.steps,
                  guidance=s.guidance, base=Path(s.weights).name or SHIPPED.name, **story)

    def load(self, layers, optimizer, statistics):
        """Go on from the last checkpoint; returns how many epochs are finished. Raises InputError if it is damaged."""
        path = self.folder / "state.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"{path}: cannot be read ({type(error).__name__}); the run cannot be resumed")
        own = lora_state(layers)
        if own.keys() != state["lora"].keys():
            raise InputError(f"{path}: its LoRA does not fit the model; resume with the weights the run was started with")
        for name, tensor in own.items():
            tensor.data.copy_(state["lora"][name])
        optimizer.load_state_dict(state["optimizer"])
        statistics.load_state(state["statistics"])
        torch.set_rng_state(state["random"])
        self.history = state["history"]
        self._write_metrics()       # an epoch that was logged but not saved is dropped
        return state["epoch"]

    def keep_before(self, images, rewards):
        """The evaluation before training, kept for the comparison after it, also across a resume."""
        with atomic(self.folder / "before.npz") as temporary:
            np.savez_compressed(temporary, images=images, rewards=rewards)

    def before(self):
        """(images, rewards) of keep_before()."""
        with np.load(self.folder / "before.npz", allow_pickle=False) as kept:
            return kept["images"], kept["rewards"]

    def show(self, epoch, images):
        """Add a row to samples.png: the same prompts and seeds after `epoch` epochs."""
        strip = Image.fromarray(np.concatenate(list(images), axis=1))
        figures.save_png(self.folder / "samples" / f"epoch_{epoch:04d}.png", strip)
        paths = sorted((self.folder / "samples").glob("epoch_*.png"))
        rows = [np.stack(np.split(np.asarray(Image.open(path)), len(images), axis=1)) for path in paths]
        labels = [f"epoch {int(path.stem[6:])}" for path in paths]
        figures.save_png(self.folder / "samples.png", figures.grid(rows, labels=labels))

    def finish(self, layers, prompts, images, rewards, chosen, epochs):
        """The LoRA with its story, the curve, and the comparison on held-out seeds; returns (before, after) means."""
        images_before, rewards_before = self.before()
        before, after = rewards_before.mean(), rewards.mean()
        self._save_lora(layers, epochs, reward_before=before, reward_after=after)
        self._write_json("result.json", dict(epochs=epochs, samples=len(rewards), reward_before=before,
                                             reward_after=after, reward_std_before=rewards_before.std(),
                                             reward_std_after=rewards.std()))
        if self.history:
            figures.save_curve(self.folder / "curve.png", self.history, f"{self.settings.reward}: reward over training")
        captions = [[f"{prompts[i]}: {r[i]:.2f}" for i in chosen] for r in (rewards_before, rewards)]
        sheet = figures.grid([images_before[chosen], images[chosen]], captions, labels=["before", "after"])
        figures.save_png(self.folder / "before_after.png", sheet)
        return before, after


def _new_folder(reward):
    """Make runs/REWARD, or runs/REWARD-2, -3, ... if taken, also by a run that starts at the same moment."""
    n = 1
    while True:
        path = Path("runs") / (reward if n == 1 else f"{reward}-{n}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            n += 1
