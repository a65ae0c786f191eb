"""The folder of a run: settings, metrics, checkpoints and pictures. Nothing of the algorithm is in here."""
import json
import os
import re
import shlex
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import figures
from .files import InputError, atomic
from .lora import add_lora, load_lora, lora_state, save_lora
from .settings import ON_RESUME, Settings, settings_from
from .weights import SHIPPED, save_single_file


def resumed_settings(folder, given, changes):
    """The settings a run was started with; only those of ON_RESUME may be given anew. Raises InputError."""
    path = Path(folder) / "config.json"
    if not path.is_file() or not (Path(folder) / "state.pt").is_file():
        raise InputError(f"--resume {folder}: not the folder of a run (config.json and state.pt are not both there)")
    wrong = sorted(set(given) - {"resume", *ON_RESUME})
    if wrong:
        raise InputError(f"--resume goes on with the run's own settings; drop --{wrong[0].replace('_', '-')} "
                         f"(only {', '.join('--' + name for name in sorted(ON_RESUME))} may change)")
    try:
        saved = json.loads(path.read_text())
    except ValueError:
        raise InputError(f"{path}: not valid JSON; restore it or start a new run")
    unknown = sorted(set(saved) - {field.name for field in fields(Settings)})
    if unknown:
        raise InputError(f"{path}: unknown setting {unknown[0]}; it was written by another version")
    return settings_from({**saved, **changes, "out": str(folder), "resume": str(folder)})


class Trainable:
    """What is trained: a LoRA on the UNet's attention, or the whole UNet. The rest of the model stays frozen."""

    def __init__(self, model, kind, rank, init_lora=""):
        """kind: lora or full; init_lora: a file whose layers and ranks are taken instead; changes model.unet."""
        self.model = model
        if kind == "full":
            self.layers = {}
            model.unet.requires_grad_(True)
        else:
            self.layers = load_lora(init_lora, model.unet) if init_lora else add_lora(model.unet, rank)
        self.file = f"{'lora' if kind == 'lora' else 'model'}.safetensors"

    def state(self):
        """{name: parameter}."""
        if self.layers:
            return lora_state(self.layers)
        return {f"unet.{name}": p for name, p in self.model.unet.named_parameters()}

    def save(self, folder, **story):
        """Write the LoRA, or the complete model in Stable Diffusion's single-file layout (float32)."""
        if self.layers:
            save_lora(folder / self.file, self.layers, **story)
        else:
            model = self.model
            save_single_file(folder / self.file, model.unet, model.vae, model.text_encoder, torch.float32,
                             model.image_size, **story)


class Run:
    """Everything a run writes. Files are replaced atomically; metrics.jsonl gets one line an epoch."""

    def __init__(self, settings, arguments=None):
        """arguments: the command line, for the record; sys.argv's if None."""
        self.settings = settings
        self.commands = [shlex.join(["python", "train.py", *(sys.argv[1:] if arguments is None else arguments)])]
        self.folder = Path(settings.out) if settings.out else None      # else chosen by start()
        if settings.out and self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"--out {self.folder}: a file; expected a folder, new or empty")
        if settings.out and not settings.resume and self.folder.exists() and any(self.folder.iterdir()):
            go_on = f", or --resume {self.folder}" if (self.folder / "state.pt").exists() else ""
            raise InputError(f"--out {self.folder}: already holds files; choose another{go_on}")
        there = self.folder or Path("runs")
        while not there.exists():
            there = there.absolute().parent
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise InputError(f"--out {self.folder or 'runs'}: {there} is no folder that can be written to")
        self.history = []
        self.started = time.time()

    @property
    def init_lora(self):
        """The file that the LoRA starts from, if any; resumed, the run's own: the same layers, ranks and alphas."""
        s = self.settings
        return self.folder / "lora.safetensors" if s.resume and s.init_lora else s.init_lora

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
        now = self.history[-1]
        line = "epoch {epoch}: reward {reward_mean:.3f} +- {reward_std:.3f} ({reward_min:.3f} to {reward_max:.3f})"
        for name, shown in (("kl_to_base", "kl to base {:.1e}"), ("approx_kl", "kl {:.1e}"),
                            ("clip_fraction", "clipped {:.2f}"), ("effective_samples", "worth {:.0f} samples"),
                            ("loss", "loss {:.1e}"), ("grad_norm", "gradient {:.3f}"),
                            ("max_ratio_error", "ratio error {:.0e}"), ("eval_reward", "evaluation {:.3f}")):
            line += ", " + shown.format(now[name]) if name in now else ""
        line += "".join(f", {name.removeprefix('score_')} {value:.3f}" for name, value in now.items()
                        if name.startswith("score_"))
        return (line + ", {sampling_images_per_s:.1f} and {training_images_per_s:.1f} images/s, "
                "{peak_memory_mb:.0f} MB").format(**now)

    def _write_metrics(self):
        with atomic(self.folder / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.history))

    def save(self, epoch, trained, optimiser, statistics):
        """A checkpoint after `epoch` finished epochs; prompts, seeds and shuffles are functions of (seed, epoch)."""
        state = dict(epoch=epoch, trained={k: v.detach().cpu() for k, v in trained.state().items()},
                     optimizer=optimiser.state_dict(), statistics=statistics.state(), history=self.history,
                     random=torch.get_rng_state(), commands=self.commands)
        if trained.layers:      # a complete model is written at the end only: state.pt has it already
            self.save_trained(trained, epoch)
        with atomic(self.folder / "state.pt") as temporary:
            torch.save(state, temporary)

    def save_trained(self, trained, epoch, **story):
        """Write the LoRA, or the complete model, with its story."""
        s = self.settings
        trained.save(self.folder, reward=s.reward, epochs=epoch, steps=s.steps, guidance=s.guidance,
                     base=Path(s.weights).name or SHIPPED.name, command=" && ".join(self.commands), **story)

    def load(self, trained, optimiser, statistics):
        """Go on from the last checkpoint; returns how many epochs are finished. Raises InputError if it is damaged."""
        path = self.folder / "state.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"{path}: cannot be read ({type(error).__name__}); the run cannot be resumed")
        if "trained" not in state:
            raise InputError(f"{path}: written by another version; start a new run")
        own = trained.state()
        if own.keys() != state["trained"].keys():
            raise InputError(f"{path}: it does not fit the model; resume with the weights the run was started with")
        for name, tensor in own.items():
            tensor.data.copy_(state["trained"][name])
        optimiser.load_state_dict(state["optimizer"])
        statistics.load_state(state["statistics"])
        torch.set_rng_state(state["random"])
        self.history = state["history"]
        self.commands = list(dict.fromkeys([*state.get("commands", []), *self.commands]))      # each once, in order
        self._write_metrics()       # an epoch that was logged but not saved is dropped
        return state["epoch"]

    def keep_before(self, images, rewards, scores):
        """The evaluation before training, kept for the comparison after it, also across a resume.

        scores: {name: (N,)}, the parts of a sum and the watched rewards.
        """
        with atomic(self.folder / "before.npz") as temporary:
            np.savez_compressed(temporary, images=images, rewards=rewards, names=np.array(list(scores)),
                                scores=np.array(list(scores.values())))

    def before(self):
        """(images, rewards, scores) of keep_before()."""
        with np.load(self.folder / "before.npz", allow_pickle=False) as kept:
            return kept["images"], kept["rewards"], dict(zip(kept["names"].tolist(), kept["scores"]))

    def show(self, epoch, images):
        """Add a row to samples.png: the same prompts and seeds after `epoch` epochs."""
        strip = Image.fromarray(np.concatenate(list(images), axis=1))
        figures.save_png(self.folder / "samples" / f"epoch_{epoch:04d}.png", strip)
        paths = sorted((self.folder / "samples").glob("epoch_*.png"))
        rows = [np.stack(np.split(np.asarray(Image.open(path)), len(images), axis=1)) for path in paths]
        labels = [f"epoch {int(path.stem[6:])}" for path in paths]
        figures.save_png(self.folder / "samples.png", figures.grid(rows, labels=labels))

    def finish(self, trained, prompts, images, rewards, scores, chosen, epochs):
        """What was trained, the curve and the comparison on held-out seeds; returns a line that says what changed."""
        images_before, rewards_before, scores_before = self.before()
        before, after = rewards_before.mean(), rewards.mean()
        parts = {name: [scores_before[name].mean(), scores[name].mean()] for name in scores
                 if name != self.settings.reward}
        self.save_trained(trained, epochs, reward_before=before, reward_after=after)
        self._write_json("result.json", dict(epochs=epochs, samples=len(rewards), reward_before=before,
                                             reward_after=after, reward_std_before=rewards_before.std(),
                                             reward_std_after=rewards.std(), scores=parts))
        if self.history:
            figures.save_curve(self.folder / "curve.png", self.history, f"{self.settings.reward}: reward over training")
        captions = [[f"{prompts[i]}: {r[i]:.2f}" for i in chosen] for r in (rewards_before, rewards)]
        sheet = figures.grid([images_before[chosen], images[chosen]], captions, labels=["before", "after"])
        figures.save_png(self.folder / "before_after.png", sheet)
        change = f" ({100 * (after - before) / abs(before):+.1f}%)" if before else ""
        line = (f"{self.settings.reward} on {len(rewards)} held-out seeds: {before:.3f} before, {after:.3f} after "
                f"{epochs} epochs{change}, {(time.time() - self.started) / 60:.1f} minutes.")
        return line + "".join(f"\n  {name}: {a:.3f} before, {b:.3f} after" for name, (a, b) in parts.items())


def _new_folder(reward):
    """Make runs/REWARD, or runs/REWARD-2, -3, ... if taken, also by a run that starts at the same moment."""
    n, reward = 1, re.sub(r"[^\w.+-]+", "_", reward.replace(",", "+"))
    while True:
        path = Path("runs") / (reward if n == 1 else f"{reward}-{n}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            n += 1
