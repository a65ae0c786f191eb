"""The life of a run around its epochs: evaluations, log, checkpoints, how it stops and how it goes on."""
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import takewhile
from math import inf
from pathlib import Path
from threading import get_ident

from . import __version__, figures
from .cli import ON_RESUME, command, how_to_resume, stop_bound
from .device import peak_memory_mb
from .figures import number
from .files import OUT_OF_MEMORY, InputError, NotFinite, is_out_of_memory, uninterrupted
from .folder import Folder, sha256
from .metrics import spread
from .processes import count, gather, rank
from .progress import Progress
from .weights import SHIPPED

# What the line of an epoch shows of its metrics, where they are there
SHOWN = (("kl_to_base", "kl to base {:.1e}"), ("distance_to_base", "from base {:.1e}"),
         ("distance_to_old", "from old {:.1e}"), ("approx_kl", "kl {:.1e}"), ("clip_fraction", "clipped {:.2f}"),
         ("effective_samples", "worth {:.0f} samples"), ("loss", "loss {:.1e}"), ("grad_norm", "gradient {:.3f}"),
         ("max_ratio_error", "ratio error {:.0e}"))

ALL_EQUAL = "; all rewards are equal"


class Run:
    """One training: its settings, folder, history (a dict of metrics for each epoch) and, at last, its result.

    Of several processes only the first writes; the others come along, for their parts of the evaluations.
    """

    waiting = {}        # {thread: the run that has its folder and has not begun}

    def __init__(self, settings):
        """Raises InputError if the folder cannot be used, or cannot be resumed."""
        if failed := Run.waiting.pop(get_ident(), None):        # in a notebook: the error may still hold that run
            failed.files.release()
        self.settings = settings
        self.writes = rank() == 0
        self.files = Folder(settings.out, settings.resume, anew=settings.auto_resume, mine=self.writes)
        Run.waiting[get_ident()] = self
        if settings.resume and self.writes:
            try:
                self.files.check(self.kept)
            except InputError:
                self.files.release()
                raise
        self.progress = Progress(settings.epochs, settings.samples, settings.inner_epochs)
        self.history, self.result, self.finished, self.started = [], None, 0, time.time()
        name, self.bound = stop_bound(settings)
        self.bounded = "eval_reward" if name == settings.reward else f"eval_score_{name}"

    @property
    def folder(self):
        """Its path."""
        return self.files.path

    @property
    def kept(self):
        """{name: value} of the settings that a run keeps when it is resumed."""
        return {name: value for name, value in asdict(self.settings).items()
                if name not in {*ON_RESUME, "out", "resume", "auto_resume"}}

    @property
    def init_lora(self):
        """The file that the LoRA starts from, if any; resumed, the run's own: the same layers, ranks and alphas.

        A run that was killed right after its first checkpoint has none.
        """
        s, own = self.settings, Path(self.folder or "") / "lora.safetensors"
        return own if s.resume and s.init_lora and own.is_file() else s.init_lora

    @contextmanager
    def epochs(self, learner, evaluation):
        """Around the loop: yields the epochs that are left, from 0; then evaluates and draws the figures.

        An InputError (a reward that fails, numbers that are not finite, a full disk) ends the run at the last epoch
        that is finished, and so does memory that runs out; a stop, too, which leaves out the evaluation. All are raised
        again, memory as an InputError, and say how to go on.
        """
        self.learner, self.evaluation, self.reward_files = learner, evaluation, evaluation.scorer.files
        del Run.waiting[get_ident()]
        with self.files:        # nobody else's until the run is over
            self.go_on() if self.settings.resume else self.begin()
            self.progress.open(self.finished)
            try:
                try:
                    yield takewhile(lambda _: not self.has_fallen, self.progress.epochs_from(self.finished))
                finally:
                    self.progress.close()
                self.finish()
            except KeyboardInterrupt as stopped:
                on, evaluate = (f"{self.how_to_go_on} --epochs {n}" for n in (self.settings.epochs, self.finished))
                stopped.args = f"stopped after epoch {self.finished}; go on with {on}, or evaluate it with {evaluate}",
                raise
            except InputError as error:
                raise self.saved_before(error) from error
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise self.saved_before(InputError(OUT_OF_MEMORY)) from error

    def saved_before(self, error):
        """Back to the last checkpoint, published; returns the error that also says what is saved and how to go on."""
        try:
            self.load()
        except InputError:              # the folder itself is lost
            return error
        with suppress(InputError):      # a full disk has no room for it
            if self.writes:
                self.save_learned()
        return InputError(f"{error}; {self.finished} finished epochs are saved, go on with {self.how_to_go_on}")

    @property
    def how_to_go_on(self):
        """The flags of train.py that resume this run."""
        return how_to_resume(self.settings, self.folder)

    def begin(self):
        """The evaluation before training; only then the folder: a run that fails until then leaves none behind."""
        images, rewards, scores = self.evaluation.run()
        before = means(rewards, scores).get(self.bounded, -inf)
        if before < self.bound:
            raise InputError(f"--stop-when {self.settings.stop_when}: before training it is "
                             f"{'missing' if before == -inf else number(before)}; choose a bound below what it is then")
        if self.writes:
            self.found(images, rewards, scores)
        self.files.path = Path(gather(str(self.folder))[0])

    def found(self, images, rewards, scores):
        """Make the folder, with that evaluation and a checkpoint of 0 epochs."""
        shown = self.evaluation.shown
        self.files.create(self.settings.reward)
        try:
            self.write_config()
            self.files.keep_before(images, rewards, scores)
            self.files.add_row(0, images[shown], self.captions(rewards[shown]))
            self.save(0)
        finally:
            if not (self.folder / "state.pt").exists():
                self.files.remove()
        print(f"  {self.settings.reward} on {len(rewards)} held-out seeds: {number(rewards.mean())}; to {self.folder}/"
              + (ALL_EQUAL if len(rewards) > 1 and rewards.min() == rewards.max() else ""))

    def go_on(self):
        """Take up the last checkpoint, and write anew what a killed run had not written after it."""
        self.load()
        for name, now in self.evaluation.scorer.files.items():
            if self.reward_files.get(name, now) != now:
                print(f"  {name}: its file has changed since the run began; rewards from before are not comparable")
        if self.writes:
            self.write_config()
            self.publish()
            self.keep()
        self.show()

    def write_config(self):
        """config.json: every setting of the run, and their checksum."""
        config = dict(asdict(self.settings), out=str(self.folder), resume="")
        self.files.write_json("config.json", dict(config, sha256=sha256(config)))

    def log(self, epoch, rewards, scores, metrics):
        """An epoch is over: evaluate if it is time, save a checkpoint and the metrics, then print them, draw pictures.

        epoch: from 0; rewards: (N,); scores: {name: (N,)}; metrics: of the update.
        """
        s, finished = self.settings, epoch + 1
        line = dict(epoch=finished, reward_mean=rewards.mean(), reward_std=spread(rewards), reward_min=rewards.min(),
                    reward_max=rewards.max(), **metrics, **self.progress.rates())
        if s.eval_every and finished % s.eval_every == 0:
            line.update(self.evaluate_between())
        line.update({f"score_{name}": own.mean() for name, own in scores.items()},
                    peak_memory_mb=peak_memory_mb(self.learner.optimizer.parameters[0].device))
        self.history.append({name: value if isinstance(value, list) else float(value) for name, value in line.items()})
        with uninterrupted():
            if self.writes:
                self.save(finished)
                self.keep()
            self.finished = finished
        self.progress.write(describe_epoch(self.history[-1]), rewards.mean())
        self.show()

    def show(self):
        """A row of samples.png, if it is time for one."""
        if self.finished % self.settings.show_every == 0 and self.finished < self.settings.epochs:
            drawn = self.between(self.evaluation.run_shown)
            if drawn and self.writes:
                images, rewards, _ = drawn
                self.files.add_row(self.finished, images, self.captions(rewards))

    def captions(self, rewards):
        """What is written under the pictures that are shown: rewards, of these alone."""
        prompts = [self.evaluation.prompts[i] for i in self.evaluation.shown]
        return [f"{number(reward, 2)}  {prompt}" for reward, prompt in zip(rewards, prompts, strict=True)]

    def evaluate_between(self):
        """The means of an evaluation; none if a reward fails."""
        drawn = self.between(self.evaluation.run)
        if not drawn:
            return {}
        _, rewards, scores = drawn
        return means(rewards, scores)

    def evaluated(self, evaluate):
        """What an evaluation gives: of the average, with --ema."""
        with self.learner.optimizer.averaged():
            return evaluate()

    def between(self, evaluate):
        """What an evaluation between two epochs gives; None if a reward fails: the epoch before must not be lost."""
        try:
            return self.evaluated(evaluate)
        except NotFinite:
            raise
        except InputError as error:
            if count() > 1:         # the others have not failed, and wait for this one
                raise
            self.progress.write(f"no evaluation this time: {error}")
            return None

    def save(self, finished):
        """The checkpoint after so many epochs; once it is written they are safe."""
        self.files.write_state(dict(epoch=finished, learner=self.learner.state_dict(), history=self.history,
                                    settings=self.kept, reward_files=self.reward_files))
        self.finished = finished
        self.publish()

    def keep(self):
        """Copies of what was learned that later epochs do not replace: of every Nth epoch, the best evaluated, and the
        last above --stop-when's bound."""
        s, score = self.settings, "eval_reward"
        if not self.history:
            return
        if s.keep_every and self.finished % s.keep_every == 0:
            self.save_learned(f"_{self.finished:04d}")
        if score in self.history[-1] and self.history[-1][score] == max(h.get(score, -inf) for h in self.history):
            self.save_learned("_best", evaluated=self.history[-1][score])
        if s.stop_when and self.history[-1].get(self.bounded, -inf) >= self.bound:
            self.save_learned("_above", evaluated=self.history[-1][score])

    @property
    def has_fallen(self):
        """Whether the last epoch's evaluation is below the bound of --stop-when."""
        return bool(self.history) and self.history[-1].get(self.bounded, inf) < self.bound

    def publish(self):
        """What the checkpoint has, for other programs; a complete model at the end only, it is large."""
        self.files.write_metrics(self.history)
        if self.learner.lora:
            self.save_learned()

    def save_learned(self, mark="", **story):
        """Write the LoRA, or the complete model, with its story in its metadata; mark: a part of the file's name."""
        s = self.settings
        self.learner.save(self.folder, mark, reward=s.reward, epochs=self.finished, steps=s.steps, guidance=s.guidance,
                          base=Path(s.weights).name or SHIPPED.name, command=command(s), version=__version__, **story)

    def load(self):
        """Back to the last checkpoint."""
        state = self.files.read_state(self.learner)
        self.finished, self.history = state["epoch"], state["history"]
        self.reward_files = state["reward_files"]

    def finish(self):
        """The evaluation after training, what was learned, the curve and the comparison; prints what has changed."""
        if not self.writes:
            self.evaluated(self.evaluation.run)
            return
        if self.has_fallen:
            above = self.folder / self.learner.file.replace(".", "_above.")
            print(f"--stop-when {self.settings.stop_when}: {number(self.history[-1][self.bounded])} after epoch "
                  f"{self.finished}, so the run ends; "
                  + (f"{above} was the last above the bound" if above.exists() else "no epoch was above the bound")
                  + f"; go on with {self.how_to_go_on} --stop-when ''")
        print("evaluating on the held-out seeds ...")
        self.save_learned()         # these two before anything else can fail
        if self.history:
            figures.save_curve(self.folder / "curve.png", self.history, f"{self.settings.reward}: reward over training")
        images, rewards, scores = self.evaluated(self.evaluation.run)
        shown = self.evaluation.shown
        self.files.add_row(self.finished, images[shown], self.captions(rewards[shown]))
        images_before, rewards_before, scores_before = self.files.before()
        before, after = rewards_before.mean(), rewards.mean()
        self.save_learned(reward_before=before, reward_after=after)
        self.result = dict(epochs=self.finished, samples=len(rewards), reward_before=before, reward_after=after,
                           reward_std_before=spread(rewards_before), reward_std_after=spread(rewards),
                           scores={name: [scores_before[name].mean(), own.mean()] for name, own in scores.items()
                                   if name in scores_before})
        self.files.write_json("result.json", self.result)
        captions = [self.captions(r[shown]) for r in (rewards_before, rewards)]
        figures.save_png(self.folder / "before_after.png", figures.grid([images_before[shown], images[shown]], captions,
                                                                        labels=["before", "after"]))
        print(describe_result(self.settings.reward, self.result, time.time() - self.started))
        print(f"Look at {self.folder}/before_after.png, samples.webp, curve.png; {self.learner.file} has what was "
              "learned.")


def means(rewards, scores):
    """What an evaluation's means are called in the log: {name: mean}."""
    return dict(eval_reward=rewards.mean(), **{f"eval_score_{name}": own.mean() for name, own in scores.items()})


def describe_epoch(metrics):
    """A line on an epoch, from its metrics."""
    mean, std, least, most = (metrics[f"reward_{name}"] for name in ("mean", "std", "min", "max"))
    line = f"epoch {metrics['epoch']:.0f}: reward {number(mean)} +- {number(std)} ({number(least)} to {number(most)})"
    line += "".join(", " + form.format(metrics[name]) for name, form in SHOWN if name in metrics)
    named = {"eval_reward": "evaluation", **{name: name.removeprefix("score_") for name in metrics
                                             if name.startswith("score_")}}
    line += "".join(f", {shown} {number(metrics[name])}" for name, shown in named.items() if name in metrics)
    return (f"{line}, {metrics['sampling_images_per_s']:.1f} and {metrics['training_images_per_s']:.1f} images/s, "
            f"{metrics['peak_memory_mb']:.0f} MB" + (ALL_EQUAL if least == most else ""))


def describe_result(reward, result, seconds):
    """What the evaluation was before and after, in a line, and a line for each part or watched reward."""
    before, after = result["reward_before"], result["reward_after"]
    change = 100 * (after - before) / abs(before) if before else 0
    lines = [f"{reward} on {result['samples']} held-out seeds: {number(before)} before, {number(after)} after "
             f"{result['epochs']} epoch{'s' * (result['epochs'] != 1)}"
             f"{f' ({change:+.1f}%)' if before and abs(change) < 1e6 else ''}, "
             f"{seconds / 60:.1f} minutes."]
    lines += [f"  {name}: {number(a)} before, {number(b)} after" for name, (a, b) in result["scores"].items()]
    return "\n".join(lines)
