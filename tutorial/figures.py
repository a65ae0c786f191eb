"""Every picture and table of the tutorial's page:  python tutorial/figures.py

First it measures what is missing (measure.py), 50 minutes on 2 CPU cores if all is: the model as it is and the plane 2,
six programs made of one_page.py 12, the trainings healthy 4, too_fast 2, unstable 5, hacked 10, with_kl 12, sick_1 3;
one at a time. From measured/ alone it then draws pictures/ and fills in the tables of README.md. Stop whenever you
like. Delete a file of measured/ to have it anew: for another model all but plane.csv.
"""
import matplotlib
import numpy as np
from measure import HERE, PAGE, PLANE, PROGRAMS, kept, measure_what_is_missing, read, there
from PIL import Image

from ddpo_min.figures import grid
from ddpo_min.files import atomic, run_script

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURES = HERE / "pictures"
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
WATCHED = dict(healthy="healthy", sick_1="sick 1", too_fast="sick 2", unstable="sick 3")
LABELS = dict(reinforce="REINFORCE, A = r", baseline="with the baseline", one_page="as it is",
              summed="sum for mean", ratio="3 passes, ratio", clipped="3 passes, clipped ratio")


def save(name, picture):
    """Write pictures/NAME.webp: a figure, or a grid of pictures."""
    with atomic(PICTURES / f"{name}.webp") as temporary:
        if isinstance(picture, Image.Image):
            picture.save(temporary, "WEBP", quality=90)
        else:
            picture.savefig(temporary, format="webp", dpi=100)
            plt.close(picture)


def line(axes, x, y, label=None, color=BLUE):
    """The points that are there, joined."""
    known = ~np.isnan(y)
    axes.plot(x[known], y[known], color=color, label=label, marker="o", markersize=3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def in_the_plane(axes, names):
    """Variants of toy2d.py: each seed thin, their mean thick."""
    measured = read("plane")
    for name, color in zip(names, (ORANGE, BLUE, GREEN)):
        own = measured["variant"] == name
        reward, epoch = (measured[column][own].reshape(3, -1) for column in ("reward", "epoch"))
        axes.plot(epoch.T, reward.T, color=color, linewidth=0.7, alpha=0.6)
        line(axes, epoch[0], reward.mean(axis=0), name, color)
    axes.set(title="in the plane, 3 seeds", xlabel="epoch", ylabel="reward", ylim=(-3.2, 0.1))
    axes.legend(fontsize=8)


def on_the_page(axes, names, column="kilobytes", **look):
    """Variants of one_page.py."""
    for name, color in zip(names, (ORANGE, BLUE)):
        line(axes, read(name)["epoch"], read(name)[column], LABELS[name], color)
    axes.set(**{**dict(title="one_page.py", xlabel="epoch", ylabel="mean JPEG size, kB"), **look})
    axes.legend(fontsize=8)


def panels(count):
    """A figure with so many panels side by side."""
    return plt.subplots(1, count, figsize=(4.8 * count, 3.8), layout="constrained")


# Pictures

def draw_steps():
    measured, rows = read("steps"), kept("steps")
    times, steps = ([f"{word} {n:.0f}" for n in measured[column]] for word, column in (("t =", "t"), ("step", "step")))
    save("steps", grid(rows, captions=[[*times, "x_0"], [*steps, "the end"]] * 2, labels=["x_t", "x0_hat"] * 2))
    chosen = [0, 2, 4, 6, 7]
    save("ways", grid(kept("ways")[chosen], labels=[f"from step {i + 1}" for i in chosen]))


def draw_prompts():
    measured = read("prompts")
    figure, both = plt.subplots(2, 1, figsize=(12, 7), layout="constrained")
    for axes, reward in zip(both, ("jpeg", "aesthetic")):
        own = measured[reward].reshape(-1, 8)
        order = own.mean(axis=1).argsort()
        axes.plot(own[order], ".", color=BLUE, markersize=4)
        axes.plot(own[order].mean(axis=1), "_", color=ORANGE, markersize=9)
        axes.axhline(own.mean(), color="0.5", linewidth=1)
        axes.set(ylabel=f"reward: {reward}", xlim=(-1, len(own)))
        names = [prompt.split()[-1] for prompt in measured["prompt"][::8][order]]
        axes.set_xticks(range(len(own)), names, rotation=90, fontsize=8)
    save("prompts", figure)


def draw_programs():
    names = list(PLANE)
    figure, (left, right) = panels(2)
    in_the_plane(left, names[:2])
    on_the_page(right, ("reinforce", "baseline"))
    save("baseline", figure)
    figure, (left, middle, right) = panels(3)
    in_the_plane(left, names[2:])
    on_the_page(middle, ("ratio", "clipped"))
    on_the_page(right, ("ratio", "clipped"), "approx_kl", title="how far an epoch moves", ylabel="approximate KL",
                yscale="log")
    save("clipping", figure)
    figure, (left, right) = panels(2)
    on_the_page(left, ("summed", "one_page"))
    on_the_page(right, ("summed", "one_page"), "beyond", title="ratio beyond 1 +- CLIP", ylim=(0, 1),
                ylabel="share of samples and steps")
    save("sum", figure)
    save("one_page", grid(kept("one_page"), labels=[f"epoch {epoch:.0f}" for epoch in read("one_page")["epoch"]]))


def draw_watched():
    titles = dict(max_ratio_error="max_ratio_error", clip_fraction="clip_fraction", approx_kl="approx_kl",
                  reward="reward (squares: held-out)", recognised="recognised")
    figure, axes = plt.subplot_mosaic([list(titles), *([label] * 5 for label in WATCHED.values())], figsize=(15, 9.5),
                                      height_ratios=(3, 1, 1, 1, 1), layout="constrained")
    for (name, label), color in zip(WATCHED.items(), (GREEN, ORANGE, PINK, BLUE)):
        measured = read(name)
        for column in titles.keys() & measured.keys():
            line(axes[column], measured["epoch"], measured[column], label, color)
        axes["reward"].plot(measured["epoch"], measured["held_out"], "s", color=color, markersize=5)
        axes[label].imshow(np.concatenate(kept(name)[-1], axis=1))
        axes[label].set(ylabel=label, xticks=[], yticks=[])
    for column, title in titles.items():
        axes[column].set(title=title, xlabel="epochs finished")
    axes["approx_kl"].set(yscale="log")
    axes["max_ratio_error"].legend(fontsize=8)
    save("watched", figure)


def last_good(measured):
    """The last epoch after which 95% of the held-out pictures that were recognised at first still are."""
    seen = measured["held_out_recognised"]
    return int(np.flatnonzero(seen >= 0.95 * seen[0])[-1])


def draw_overoptimisation():
    free, held = read("hacked"), read("with_kl")
    stop, figure, axes_of = last_good(free), *panels(3)
    for axes, column, title in zip(axes_of, ("", "_rule", "_recognised"), ("the reward", "the rule", "recognised")):
        line(axes, free["epoch"], free[f"held_out{column}"], "aesthetic", BLUE)
        line(axes, held["epoch"], held[f"held_out{column}"], "with --kl-weight 0.03", GREEN)
        axes.axvline(stop, color="0.5", linestyle=":", label="stop here")
        axes.set(title=f"{title}, held-out seeds", xlabel="epoch")
    axes_of[0].legend(fontsize=8)
    save("overoptimisation", figure)
    rows = [kept("hacked")[0], kept("hacked")[stop], kept("hacked")[-1], kept("with_kl")[-1]]
    save("stopping", grid(rows, labels=["before", f"epoch {stop}", f"epoch {free['epoch'][-1]:.0f}", "with KL"]))


# Tables: their rows, the first one the header

def table_steps():
    yield "step", "t", "sigma_t", "spread of the JPEG size that is still open"
    m = read("steps")
    for step, t, sigma, spread in zip(m["step"], m["t"], m["sigma"], m["spread"]):
        yield f"{step:.0f}", f"{t:.0f}", f"{sigma:.2f}", f"{spread:.3f} kB"


def table_ratios():
    yield "training computes log p with", "largest abs(ratio - 1)", "beyond 1e-2", "beyond 1e-4"
    m = read("ratios")
    for way, largest, *beyond in zip(m["way"], m["largest"], m["beyond_1e_2"], m["beyond_1e_4"]):
        yield way, f"{largest:.1g}", *(f"{share:.0%}" for share in beyond)


def table_prompts():
    yield "reward", "standard deviation", "within a prompt", "of the variance, between prompts"
    for reward in ("jpeg", "aesthetic", "clip"):
        own = read("prompts")[reward].reshape(-1, 8)
        within = own.var(axis=1, ddof=1).mean()
        yield f"`{reward}`", f"{own.std():.3f}", f"{within ** 0.5:.3f}", f"{max(0, 1 - within / own.var()):.0%}"


def table_plane():
    m = read("plane")
    yield f"in the plane, from {m['reward'][0]:.2f}", "reward after 15 epochs, 3 seeds", "lowest from epoch 6 on"
    for name in PLANE:
        own = m["reward"][m["variant"] == name].reshape(3, -1)
        yield name, ", ".join(f"{r:.2f}" for r in own[:, -1]), f"{own[:, 6:].min():.2f}"


def table_programs():
    yield "`one_page.py`", "epochs", "mean JPEG size, kB", "approximate KL", "beyond 1 +- CLIP"
    for name, label in LABELS.items():
        m = read(name)
        ended = "" if np.isnan(m["beyond"][-1]) else ", then not finite"
        yield (label, f"{m['epoch'][-1]:.0f}{ended}", f"{m['kilobytes'][0]:.3f} -> {m['kilobytes'][-1]:.3f}",
               "" if name == "summed" else f"{np.nanmean(m['approx_kl']):.1e}", f"{np.nanmean(m['beyond']):.0%}")


def table_watched():
    yield "run", "max_ratio_error", "clip_fraction", "approx_kl", "held-out reward", "recognised"
    for name, label in WATCHED.items():
        m = read(name)
        seen = m.get("held_out_recognised", "")
        yield (label, f"{np.nanmax(m['max_ratio_error']):.1g}", f"{np.nanmean(m['clip_fraction']):.2f}",
               f"{np.nanmean(m['approx_kl']):.1e}", f"{m['held_out'][0]:.3f} -> {m['held_out'][-1]:.3f}",
               seen if isinstance(seen, str) else f"{seen[0]:.0%} -> {seen[-1]:.0%}")


def table_overoptimisation():
    yield "", "the reward", "the rule", "recognised"
    free, held = read("hacked"), read("with_kl")
    stop, end = last_good(free), len(free["epoch"]) - 1
    for label, m, k in (("before", free, 0), (f"stopped after {stop} epochs", free, stop),
                        (f"after {end} epochs", free, end),
                        (f"after {end} epochs with `--kl-weight 0.03`", held, -1)):
        yield (label, f"{m['held_out'][k]:.2f}", f"{m['held_out_rule'][k]:.2f}",
               f"{m['held_out_recognised'][k]:.0%}")


# What each is made from
DRAWINGS = {draw_steps: ["steps"], draw_prompts: ["prompts"], draw_programs: ["plane", *PROGRAMS],
            draw_watched: WATCHED, draw_overoptimisation: ["hacked", "with_kl"]}
TABLES = {table_steps: ["steps"], table_ratios: ["ratios"], table_prompts: ["prompts"], table_plane: ["plane"],
          table_programs: PROGRAMS, table_watched: WATCHED, table_overoptimisation: ["hacked", "with_kl"]}


def filled(page):
    """The page's text, with the tables of what has been measured."""
    for table, names in TABLES.items():
        if there(*names):
            header, *rows = table()
            text = "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))
            begin = f"<!-- figures:{table.__name__.removeprefix('table_')} -->\n"
            before, _, after = page.partition(begin)
            page = before + begin + text + after[after.index("<!-- end -->"):]
    return page


def main():
    measure_what_is_missing()
    PICTURES.mkdir(exist_ok=True)
    for draw, names in DRAWINGS.items():
        if there(*names):
            draw()
    page = filled(PAGE.read_text())
    with atomic(PAGE) as temporary:
        temporary.write_text(page)


if __name__ == "__main__":
    run_script(main, __doc__)
