"""Every figure and table of the experiments, from their CSV files alone:  python experiments/figures.py"""
import sys

import matplotlib
import numpy as np
from results import HERE, ROOT, column, mean_and_error, read_rows, runs_of
from run import SEEDS, finished

sys.path.insert(0, str(ROOT))
from ddpo_min.files import atomic, run_script

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REWARDS = ("jpeg", "incompressible", "aesthetic", "clip")
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",     # told apart by all
          "#882255", "#999999", "#999933"]
GOALS = dict(jpeg=(20, 30), aesthetic=(20, 30), clip=(1, 2))    # the leaderboard's: percent by which a reward rises
KEPT = 90       # so many percent of the pictures that were recognised before training must still be


def save(figure, name):
    """Write experiments/NAME.png."""
    figure.tight_layout()
    with atomic(HERE / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
    plt.close(figure)


def curve(axes, rows, run, color, label, of="reward", against="queries"):
    """The mean over seeds of a column, each seed thin behind it."""
    x, y = column(rows, run, against), column(rows, run, of)
    kept = ~np.isnan(y).any(axis=0)
    axes.plot(x[:, kept].T, y[:, kept].T, color=color, linewidth=0.7, alpha=0.5)
    axes.plot(x[:, kept].mean(0), y[:, kept].mean(0), color=color, marker="o", markersize=3, label=label)


def ends(rows, run, name="held_out"):
    """What the held-out evaluation was before and after training: two arrays (seeds,)."""
    values = column(rows, run, name)
    return values[:, 0], values[:, -1]


def percent(before, after):
    """By how many percent a value has changed; a negative one that grows has a positive change."""
    return 100 * (after - before) / np.abs(before)


def change(rows, run, name="held_out"):
    """By how many percent training changed it: (seeds,)."""
    return percent(*ends(rows, run, name))


def still_recognised(rows, run):
    """What the classifier recognises after training, in percent of before: (seeds,)."""
    before, after = ends(rows, run, "held_out_recognised")
    return 100 * after / before


def plus_minus(values, digits=1, sign=True):
    """Mean +- standard error over seeds, as text."""
    mean, error = mean_and_error(values)
    return f"{mean:{'+' if sign else ''}.{digits}f} ± {error:.{digits}f}"


def line(*cells):
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def legend(axes):
    """The same small one everywhere."""
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3)


def ticks(axes, values):
    """Whole numbers on a logarithmic x axis."""
    axes.minorticks_off()
    axes.set(xticks=values, xticklabels=[f"{value:.0f}" for value in values])


def changed(rows, run):
    """Two cells: the change of the reward, and how many pictures are still recognised."""
    return f"{plus_minus(change(rows, run))}%", f"{still_recognised(rows, run).mean():.1f}%"


def dots(axes, labels, values, title):
    """A row a label: every seed a dot, the mean a bar."""
    for y, own in enumerate(values):
        axes.plot(own, [y] * len(own), "o", color=COLORS[0], markersize=4, alpha=0.6)
        axes.plot([own.mean()] * 2, [y - 0.3, y + 0.3], color=COLORS[1])
    axes.set(yticks=range(len(labels)), yticklabels=labels, title=title)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)


def all_runs(rows, name, height):
    """A figure with a row a run: the change of the reward, and how many pictures are still recognised."""
    runs = runs_of(rows)
    figure, panels = plt.subplots(1, 2, figsize=(11, height), sharey=True)
    dots(panels[0], runs, [change(rows, run) for run in runs], "change of the reward (minus the JPEG size), %")
    dots(panels[1], runs, [still_recognised(rows, run) for run in runs], "still recognised, %")
    save(figure, name)


def defaults(rows):
    """The README's results, from the algorithms' table: a line a reward; JPEG sizes in kB are positive."""
    for reward in REWARDS:
        before, after = (np.abs(values) for values in ends(rows, f"ddpo_is {reward}"))
        values, unit = ", ".join(f"{value:.3f}" for value in after), " kB" * (reward in REWARDS[:2])
        yield line(f"`--reward {reward}`", f"{before[0]:.3f} -> {values}{unit}",
                   f"{plus_minus(percent(before, after))}%",
                   f"{still_recognised(rows, f'ddpo_is {reward}').mean():.1f}%",
                   f"{column(rows, f'ddpo_is {reward}', 'seconds')[:, -1].mean() / 60:.1f}")


def algorithms(rows):
    figure, panels = plt.subplots(1, 4, figsize=(15, 4))
    for axes, reward in zip(panels, REWARDS):
        cells = [f"`{reward}`"]
        for color, algorithm in zip(COLORS, ("ddpo_is", "ddpo_sf", "rwr", "rwr_sparse")):
            run = f"{algorithm} {reward}"
            curve(axes, rows, run, color, algorithm)
            cells.append(f"{plus_minus(change(rows, run))}%, {still_recognised(rows, run).mean():.0f}%")
        axes.set(title=reward, xlabel="pictures scored", ylabel="mean reward of the samples")
        legend(axes)
        yield line(*cells)
    save(figure, "algorithms")


def fast(rows):
    """The preset laptop_fast beside the default: change, share kept and seconds of each."""
    usual = read_rows("algorithms")
    figure, panels = plt.subplots(1, 4, figsize=(15, 4))
    for axes, reward in zip(panels, REWARDS):
        cells = [f"`{reward}`"]
        for color, label, own, run in ((COLORS[0], "laptop", usual, f"ddpo_is {reward}"),
                                       (COLORS[1], "laptop_fast", rows, reward)):
            curve(axes, own, run, color, label, "held_out", "seconds")
            cells += [*changed(own, run), f"{column(own, run, 'seconds')[:, -1].mean():.0f}"]
        axes.set(title=reward, xlabel="seconds of sampling and training", ylabel="reward on held-out seeds")
        legend(axes)
        yield line(*cells)
    save(figure, "fast")


def settings(rows):
    all_runs(rows, "settings", height=6)
    for run in runs_of(rows):
        yield line(run, *changed(rows, run), f"{column(rows, run, 'seconds')[:, -1].mean() / 60:.1f}")


def guidance(rows):
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    for color, run in zip(COLORS, runs_of(rows)):
        for axes, of in zip(panels, ("reward", "recognised")):
            curve(axes, rows, run, color, f"guidance {run}" if run != "without" else "no guidance", of)
        yield line(run, *changed(rows, run))
    panels[0].set(xlabel="pictures scored", ylabel="mean reward of the samples: minus kB")
    panels[1].set(xlabel="pictures scored", ylabel="share of the samples recognised")
    legend(panels[0])
    legend(panels[1])
    save(figure, "guidance")


def interleaving(rows):
    runs = runs_of(rows)
    counts = [int(run.split()[0]) for run in runs]
    figure, axes = plt.subplots(figsize=(6, 4))
    mean, error = np.transpose([mean_and_error(change(rows, run)) for run in runs])
    axes.errorbar(counts, mean, error, marker="o", color=COLORS[2], capsize=3, label="rwr, 2,048 pictures in all")
    axes.set(xscale="log", xlabel="epochs of sampling and regression", ylabel="change of the reward, %")
    ticks(axes, counts)
    legend(axes)
    save(figure, "interleaving")
    for run in runs:
        yield line(run, *changed(rows, run))


def reuse(rows):
    all_runs(rows, "reuse", height=4)
    for run in runs_of(rows):
        yield line(run, *changed(rows, run), f"{np.nanmean(column(rows, run, 'clip_fraction')):.2f}",
                   f"{np.nanmax(column(rows, run, 'approx_kl')):.1e}")


def generalisation(rows):
    runs = runs_of(rows)
    figure, axes = plt.subplots(figsize=(8, 4))
    for n, run in enumerate(runs):
        reward = column(rows, run, "reward")[:, :-1]
        trained = percent(reward[:, 0], reward[:, -1])
        new = change(rows, run)
        for dx, values, color, label in ((-0.2, trained, COLORS[0], "prompts trained on (samples of the last epoch)"),
                                         (0.2, new, COLORS[1], "prompts never trained on")):
            mean, error = mean_and_error(values)
            axes.bar(n + dx, mean, 0.36, yerr=error, color=color, capsize=3, label=label if n == 0 else None)
        yield line(run, f"{plus_minus(trained)}%", *changed(rows, run))
    axes.set(xticks=range(len(runs)), xticklabels=[run.replace(", ", "\n") for run in runs],
             ylabel="change of the reward, %")
    legend(axes)
    save(figure, "generalisation")


def last_good(shares):
    """The epoch before the first at which less than 95% of what was recognised at first is; the last if none is."""
    bad = np.flatnonzero(shares < 0.95 * shares[0])
    return bad[0] - 1 if len(bad) else len(shares) - 1


def overoptimisation(rows):
    """The samples of each epoch; the table has the mean of the seeds, each at its last good epoch, and at the end."""
    labels = dict(epoch="epoch", reward="learned reward", uncut="the rule that it stands for, uncut",
                  recognised="share recognised")
    digits = dict(reward=".2f", uncut=".2f", recognised=".2f", kl_to_base=".2g")
    figure, panels = plt.subplots(1, 4, figsize=(17, 4))
    for axes, (x, y) in zip(panels, (("epoch", "reward"), ("epoch", "uncut"), ("epoch", "recognised"),
                                     ("reward", "recognised"))):
        for color, run in zip(COLORS, runs_of(rows)):
            curve(axes, rows, run, color, run, y, x)
        axes.set(xlabel=labels[x], ylabel=labels[y])
        legend(axes)
    for run in runs_of(rows):
        values = {of: column(rows, run, of)[:, :-1] for of in digits}
        seeds, epochs = values["recognised"].shape
        good = [last_good(shares) for shares in values["recognised"]]
        yield line(run, ", ".join(str(n) if n < epochs - 1 else "-" for n in good),
                   *(f"{values[of][range(seeds), at].mean():{how}}" for at in (good, epochs - 1)
                     for of, how in digits.items()))
    save(figure, "overoptimisation")


def dpok(rows):
    figure, axes = plt.subplots(figsize=(7, 4))
    for color, run in zip(COLORS, runs_of(rows)):
        prompt = (HERE / "prompts" / f"{run}.txt").read_text().strip()
        curve(axes, rows, run, color, f"{run}: {prompt}")
        before, after = ends(rows, run)
        yield line(run, f'"{prompt}"', f"{before.mean():.3f}", plus_minus(after, 3, sign=False))
    axes.set(xlabel="pictures scored", ylabel="similarity of picture and prompt")
    legend(axes)
    save(figure, "dpok")


def slope(x, y):
    """Of log y against log x; nan if some y is not positive, as the estimate of a signal that is lost in the noise."""
    return np.polyfit(np.log(x), np.log(y), 1)[0] if np.min(y) > 0 else np.nan


def gradient_noise(rows):
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    ours = [row for row in rows if row["run"] == "even"]
    for color, T in zip(COLORS, sorted({row["T"] for row in ours})):
        own = [row for row in ours if row["T"] == T]
        batches = sorted({row["batch"] for row in own})
        ratio = [np.mean([row["signal"] / row["measured_noise"] for row in own if row["batch"] == b]) for b in batches]
        panels[0].loglog(batches, ratio, "o-", color=color, label=f"T = {T:.0f}: slope {slope(batches, ratio):.2f}")
    panels[0].set(xlabel="samples in the batch", ylabel="signal-to-noise ratio of the gradient")
    ticks(panels[0], batches)
    for color, run in zip(COLORS, ("even", "paper")):
        own = [row for row in rows if row["run"] == run and row["batch"] == 64]
        T = sorted({row["T"] for row in own})
        seeds = np.array([[row["signal_to_noise"] for row in own if row["T"] == t] for t in T])
        fitted = slope(np.repeat(T, seeds.shape[1]), seeds.ravel())
        fitted = f"{fitted:.2f}" if np.isfinite(fitted) else "-"
        panels[1].loglog(T, seeds, "o", color=color, markersize=3, alpha=0.5)
        panels[1].loglog(T, seeds.mean(1), color=color, label=f"--step-weights {run}: slope {fitted}")
        yield line(f"`--step-weights {run}`", *(f"{value:.3f}" for value in seeds.mean(1)), fitted)
    panels[1].set(xlabel="denoising steps T", ylabel="the same, at 64 samples")
    awm = [row for row in rows if row["run"].startswith("awm") and row["batch"] == 64]
    for marker, run in zip("*^", runs_of(awm)):
        own = np.array([(row["T"], row["signal_to_noise"]) for row in awm if row["run"] == run])
        panels[1].loglog(*own.T, marker, color=COLORS[2], markersize=6, alpha=0.7, label=run)
        yield line(run, plus_minus(own[:, 1], 3, sign=False))
    ticks(panels[1], T)     # last: loglog() sets its own
    for run in runs_of([row for row in rows if np.isnan(row["batch"])]):       # directions are of all samples
        cosine, *moved = (column(rows, run, name)[:, 0] for name in ("cosine", "approx_kl", "clip_fraction"))
        yield line(run, plus_minus(cosine, 3, sign=False), *(f"{x.mean():.2g}" for x in moved if not np.isnan(x[0])))
    legend(panels[0])
    legend(panels[1])
    save(figure, "gradient_noise")


def windows(rows):
    """The table has the mean of the seeds at the last good epoch of each, and at the end."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4))
    for color, run in zip(COLORS, runs_of(rows)):
        for axes, of in zip(panels, ("held_out", "held_out_recognised")):
            curve(axes, rows, run, color, run, of, "seconds")
        reward, shares, seconds = (column(rows, run, of) for of in ("held_out", "held_out_recognised", "seconds"))
        good = range(len(shares)), [last_good(own) for own in shares]
        yield line(run, f"{plus_minus(percent(reward[:, 0], reward[good]))}%", f"{seconds[good].mean():.0f}",
                   *changed(rows, run), f"{seconds[:, -1].mean():.0f}")
    for axes, label in zip(panels, ("reward on held-out seeds: minus kB", "share recognised")):
        axes.set(xlabel="seconds of sampling and training", ylabel=label)
        axes.grid(alpha=0.3)
    legend(panels[0])
    save(figure, "windows")


def guided_sampler(rows):
    """Guided at several scales, and trained; seconds are of 180 pictures drawn, of DDPO those of its training."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    runs = runs_of(rows)
    reward, seen, rule = (np.array([column(rows, run, f"held_out{of}")[:, 0].mean() for run in runs])
                          for of in ("", "_recognised", "_rule"))
    guided = np.array([run != "DDPO" for run in runs])
    for color, of, name in ((COLORS[0], reward, "score"), (COLORS[2], rule, "rule that it stands for")):
        panels[0].plot(seen[guided], of[guided], "o-", color=color, label=f"guided by the score's gradient: {name}")
        panels[0].plot(seen[~guided], of[~guided], "*", color=color, markersize=12, label=f"DDPO: {name}")
    for run, x, y in zip(runs, seen, reward):
        if run != "DDPO":
            panels[0].annotate(run.split()[1], (x, y), fontsize=8, xytext=(4, 4), textcoords="offset points")
    panels[0].set(xlabel="share recognised", ylabel="on held-out seeds")
    *per_picture, training = (column(rows, run, "seconds")[:, 0].mean() for run in runs)
    per_picture = np.array(per_picture) / 180
    n = np.logspace(1, 4, 50)
    panels[1].loglog(n, n * max(per_picture), color=COLORS[0], label="guided: all work is drawing")
    panels[1].loglog(n, training + n * per_picture[0], color=COLORS[1], label="DDPO: training, then plain drawing")
    panels[1].set(xlabel="pictures drawn", ylabel="seconds")
    legend(panels[0])
    legend(panels[1])
    save(figure, "guided_sampler")
    seconds = [f"{each:.3f}" for each in per_picture] + [f"{per_picture[0]:.3f}, and {training:.0f} of training"]
    for i, name in enumerate(runs):
        yield line(name, f"{reward[i]:.2f}", f"{rule[i]:.2f}", f"{100 * seen[i]:.1f}%", seconds[i])


def scaling(rows):
    figure, panels = plt.subplots(1, 3, figsize=(14, 4))
    for axes, (name, label, power) in zip(panels, (
            ("samples", "samples an epoch", 1), ("steps", "denoising steps T", 1), ("size", "pixels of a picture", 2))):
        own = [row for row in rows if row["run"] == name]
        x, seconds = np.array([(row[name] ** power, row["seconds"]) for row in own]).T
        each, start = np.polyfit(x, seconds, 1)
        axes.plot(x, seconds, "o", color=COLORS[0], label="measured")
        axes.plot([0, x[-1]], [start, start + each * x[-1]], color=COLORS[1],
                  label=f"{start:.2f} s + {each:.3g} s for each")
        axes.set(xlabel=label, ylabel="seconds an epoch", xlim=0, ylim=0)
        axes.locator_params(axis="x", nbins=5)
        legend(axes)
    save(figure, "scaling")
    for row in rows:
        yield line(*(f"{row[name]:.0f}" for name in ("samples", "steps", "size", "processes")),
                   *(f"{row[f'{phase}seconds']:.2f}" for phase in ("sampling_", "training_", "")),
                   f"{row['memory_mb']:.0f}")


def entry_of(run):
    """REWARD: ENTRY, without the reward."""
    return run.partition(": ")[2]


def on_the_clock(rows):
    """The leaderboard's rows with the seconds until then, epochs times the clock's median; none without a clock."""
    clock = read_rows("leaderboard_clock")
    seconds = {run: np.median([row["seconds"] for row in clock if row["run"] == run]) for run in runs_of(clock)}
    return [row | dict(seconds=row["epoch"] * seconds[row["run"]]) for row in rows if row["run"] in seconds]


def progress(rows, run):
    """What each seed has reached: a list of (minutes, change of the reward, share kept), arrays (epochs + 1,).

    The last two are in percent of what they were before; rounded, because the table has six digits.
    """
    found = []
    for seed in sorted({row["seed"] for row in rows if row["run"] == run}):
        seconds, reward, share = (np.array([row.get(name, np.nan) for row in rows
                                            if (row["run"], row["seed"]) == (run, seed)])
                                  for name in ("seconds", "held_out", "held_out_recognised"))
        found.append((seconds / 60, percent(reward[0], reward).round(3),
                      (100 * share / share[0]).round(3)))
    return found


def reached(minutes, change, kept, goal):
    """(minutes, share kept) at the first epoch that reaches the goal and keeps KEPT; (inf, nan) if there is none.

    The others: see progress(); goal: a change of the reward, in percent.
    """
    there = np.flatnonzero((change >= goal) & (kept >= KEPT))
    return (minutes[there[0]], kept[there[0]]) if len(there) else (np.inf, np.nan)


def standings(rows):
    """A line an entry of the leaderboard, the fastest first: for each goal the minutes, median and seeds, and what is
    kept then; change and share kept at the end. A seed without rows, which has stopped or is to come, is "-" and counts
    as never."""
    for reward, goals in GOALS.items():
        lines = []
        for run in (run for run in runs_of(rows) if run.startswith(f"{reward}: ")):
            seeds, medians, cells = progress(rows, run), [], []
            absent = len(SEEDS) - len(seeds)
            for goal in goals:
                minutes, kept = np.array([reached(*seed, goal) for seed in seeds]).T
                medians.append(np.median([*minutes, *[np.inf] * absent]))
                median, *each = (f"{x:.2f}" if np.isfinite(x) else "never" for x in (medians[-1], *minutes))
                each += ["-"] * absent
                some = f", {np.nanmean(kept):.1f}% kept" if np.isfinite(minutes).any() else ""
                cells.append(f"{median} ({', '.join(each)}){some}")
            change, kept = np.mean([(own[1][-1], own[2][-1]) for own in seeds], axis=0)
            entry = entry_of(run)
            lines.append((*medians, line(f"`{reward}`", f"`{entry}`" if entry.startswith("-") else entry, *cells,
                                         f"{change:+.1f}%, {kept:.1f}% kept")))
        yield from (own[-1] for own in sorted(lines))


def leaderboard(rows):
    entries = list(dict.fromkeys(map(entry_of, runs_of(rows))))
    rewards = [reward for reward in GOALS if any(run.startswith(f"{reward}: ") for run in runs_of(rows))]
    figure, panels = plt.subplots(1, len(rewards), figsize=(6 * len(rewards), 6), squeeze=False)
    for axes, reward in zip(panels[0], rewards):
        for n, entry in enumerate(entries):
            if seeds := progress(rows, f"{reward}: {entry}"):
                epochs = min(len(minutes) for minutes, _, _ in seeds)
                change, kept = np.mean([(change[:epochs], kept[:epochs]) for _, change, kept in seeds], axis=0)
                axes.plot(change, kept, color=COLORS[n % len(COLORS)], marker="os^D"[n // len(COLORS) % 4],
                          markersize=4, linewidth=1, label=entry)
        axes.axhline(KEPT, color="grey", linewidth=0.8)
        for goal in GOALS[reward]:
            axes.axvline(goal, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=reward, xlabel="change of the reward, %", ylabel="animals kept, %", ylim=(60, 101))
        legend(axes)
    save(figure, "leaderboard")
    yield from standings(on_the_clock(rows))


FIGURES = (algorithms, fast, settings, guidance, interleaving, reuse, generalisation, overoptimisation, dpok,
           gradient_noise, windows, guided_sampler, scaling, leaderboard)


def tables():
    """{experiment: the lines of its table}; draws the figures on the way.

    Those with runs missing are left out, but not the leaderboard: it has room for any entry.
    """
    return {name: list(figure(rows)) for figure in FIGURES if (rows := read_rows(name := figure.__name__))
            and (figure is leaderboard or finished(name))}


def main():
    for name, lines in tables().items():
        print(f"\n{name}", *lines, sep="\n")
    if rows := read_rows("algorithms"):
        print("\nresults of the README", *defaults(rows), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
