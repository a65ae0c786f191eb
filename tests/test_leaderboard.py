"""The leaderboard: its rule for minutes, what an entry may set, how it is measured, what is kept; without training."""
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import train
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import figures
import leaderboard
import results
import run

from ddpo_min import cli
from ddpo_min.files import InputError

pytestmark = pytest.mark.usefixtures("plain_curve")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder in place of experiments/ and of the repository; nothing is trained there."""
    monkeypatch.setattr(run.subprocess, "run", None)
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(figures, "HERE", tmp_path)
    monkeypatch.setattr(leaderboard, "ROOT", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")      # main() changes it
    return tmp_path


def fake(name, seed, rewards, shares, minutes=1.0):
    """The rows of a run, epochs of so many minutes."""
    return [dict(run=name, seed=seed, epoch=epoch, queries=256 * epoch, seconds=60 * minutes * epoch, held_out=reward,
                 held_out_recognised=share) for epoch, (reward, share) in enumerate(zip(rewards, shares, strict=True))]


def reached(rewards, shares, goal):
    """What the rule says of one run."""
    return figures.reached(*figures.progress(fake("jpeg: x", 0, rewards, shares), "jpeg: x")[0], goal)


# The rule

def test_a_goal_is_reached_at_the_first_epoch_with_reward_and_animals():
    rewards, shares = [-2.0, -1.5, -1.7, -1.5, -1.3], [0.95, 0.8, 0.95, 0.9, 0.9]
    minutes, kept = reached(rewards, shares, 20)        # epoch 1 has lost the animals, epoch 2 the reward
    assert (minutes, round(kept, 1)) == (3.0, 94.7)
    assert reached(rewards, shares, 30)[0] == 4.0
    assert reached(rewards, shares, 36)[0] == np.inf and np.isnan(reached(rewards, shares, 36)[1])
    assert reached([5.0, 6.0], [1, 1], 20)[0] == reached([-5.0, -4.0], [1, 1], 20)[0] == 1.0


def test_what_is_just_reached_is_reached_also_after_six_digits(elsewhere):
    """144 of 160 are 90%, but 0.8 is less than 0.9 times 0.888889."""
    results.write_rows("leaderboard", fake("jpeg: x", 0, [-2.79289, -0.8 * 2.79289], [160 / 180, 144 / 180]))
    rows = results.read_rows("leaderboard")
    assert figures.reached(*figures.progress(rows, "jpeg: x")[0], 20)[0] == 1
    results.write_rows("leaderboard", fake("jpeg: x", 0, [-2.79289, -0.8 * 2.79289], [160 / 180, 143 / 180]))
    assert figures.reached(*figures.progress(results.read_rows("leaderboard"), "jpeg: x")[0], 20)[0] == np.inf


def test_the_table_has_medians_seeds_and_never_and_the_fastest_first():
    slow, fast = [-2, -1.8, -1.6, -1.4], [-2, -1.5, -1.3]
    rows = [row for seed in (0, 1, 2) for row in fake("jpeg: slow", seed, slow, [1, 1, 0.96, 0.94], 1 + seed / 10)]
    rows += fake("jpeg: --lr 1", 0, fast, [1, 1, 0.5]) + fake("jpeg: --lr 1", 1, fast, [1, 0.95, 0.91])
    rows += fake("jpeg: --lr 1", 2, [-2, -2, -2], [1, 1, 1])
    rows += fake("jpeg: lost", 0, fast, [1, 0.1, 0.1]) + fake("clip: slow", 0, [0.7, 0.71, 0.715], [1, 1, 0.9])
    rows += fake("clip: slow", 2, [0.7, 0.705, 0.71], [1, 1, 0.9])    # seed 1 has stopped: longer than any time
    assert list(figures.standings(rows)) == [
        "| `jpeg` | `--lr 1` | 1.00 (1.00, 1.00, never), 97.5% kept | never (never, 2.00, never), 91.0% kept | "
        "+23.3%, 80.3% kept |",
        "| `jpeg` | slow | 2.20 (2.00, 2.20, 2.40), 96.0% kept | 3.30 (3.00, 3.30, 3.60), 94.0% kept | +30.0%, "
        "94.0% kept |",
        "| `jpeg` | lost | never (never, -, -) | never (never, -, -) | +35.0%, 10.0% kept |",
        "| `clip` | slow | 2.00 (1.00, 2.00, -), 95.0% kept | never (2.00, never, -), 90.0% kept | +1.8%, 90.0% kept |"]


# The figure and the page

def test_the_figure_copes_with_what_is_there(elsewhere, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, name: drawn.append((figure, name)))
    rows = fake("aesthetic: awm", 0, [5, 6, 7], [0.9, 0.9, 0.45]) + fake("aesthetic: awm", 2, [5, 7], [0.9, 0.72])
    rows += fake("jpeg: nft", 1, [-2, -1], [1, 1])
    results.write_rows("leaderboard", rows)
    results.write_rows("leaderboard_clock", [dict(run="aesthetic: awm", epoch=n, seconds=s)
                                             for n, s in enumerate((48, 30, 300), start=1)])
    # the runs' own seconds do not count; without a clock there is a curve, but no line
    assert figures.tables()["leaderboard"] == ["| `aesthetic` | awm | never (0.80, never, -), 100.0% kept | "
                                               "never (never, never, -) | +40.0%, 65.0% kept |"]
    (figure, name), = drawn
    jpeg, aesthetic = figure.axes
    assert name == "leaderboard" and (jpeg.get_title(), aesthetic.get_title()) == ("jpeg", "aesthetic")
    assert [line.get_label() for line in (jpeg.lines[0], aesthetic.lines[0])] == ["nft", "awm"]
    assert jpeg.lines[0].get_color() != aesthetic.lines[0].get_color()
    # the mean of two seeds, as far as both have come: +20% and +40%, all kept and 0.8 of it
    assert np.allclose(aesthetic.lines[0].get_xydata(), [[0, 100], [30, 90]])
    figures.plt.close(figure)


def test_the_page_says_whether_anything_was_run():
    page = (ROOT / "docs" / "leaderboard.md").read_text()
    assert ("No entry has been run yet" in page) == (not results.read_rows("leaderboard"))
    rules = page.split("## Rules")[1].split("##")[0]
    assert f"{figures.KEPT}%" in rules and "180 held-out" in rules and leaderboard.PLAIN.eval_samples == 180
    for goals in figures.GOALS.values():
        assert all(f"+{goal}%" in rules for goal in goals)
    assert f"{leaderboard.PLAIN.steps} steps, no guidance and eta {leaderboard.PLAIN.eta:g}" in rules
    assert leaderboard.PLAIN.guidance == 1


# Entries

@pytest.mark.parametrize("reward", figures.GOALS)
def test_every_standing_entry_is_accepted_with_its_preset(reward):
    for entry in leaderboard.ENTRIES:
        settings = leaderboard.settings_of(reward, entry)
        algorithm, _, how = entry.partition(", ")
        assert (settings.algorithm, settings.reward, settings.weights) == (algorithm, reward, "")
        fast = how.startswith("laptop_fast")
        assert settings.preset == ("laptop_fast" if fast else "laptop" if algorithm == "ddpo_is" or how else
                                   f"laptop_{algorithm}")
        assert not fast or (settings.noise_steps, settings.kl_weight) == (4, 0.0 if "without KL" in how else 0.1)
        if named := re.search(r"(\d+) samples", entry):
            assert settings.samples == int(named[1])


@pytest.mark.parametrize("own", [
    "--weights sd.safetensors", "--init-lora a.safetensors", "--resume runs/jpeg", "--auto-resume", "--out x",
    "--seed 3", "--reward clip", "--prompts dpok", "--keep-every 2", "--device cuda", "--eval-samples 5",
    "--eval-prompts dpok", "--eval-every 1", "--stop-when clip<0.7", "--watch clip", "--show-every 3",
    "--clip-model RN50", "--aesthetic-head a.pt"])
def test_what_would_break_the_rules_is_refused(own, elsewhere, monkeypatch, capsys):
    flag = own.split()[0]
    for given in ([own], ["--lr", "1e-3", *own.split()]):
        monkeypatch.setattr(sys, "argv", ["leaderboard.py", "jpeg", *given])
        with pytest.raises(InputError, match=f"^{flag}: the same for all entries of the leaderboard; drop it$"):
            leaderboard.main()
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("given, message", [
    (["jpeg", "--trainable full"], "--trainable full: leaves no LoRA of each epoch"),
    (["jpg"], "jpg: no reward of the leaderboard; expected jpeg, aesthetic, clip"),
    (["jpeg", "--lr '1"], "--lr '1: No closing quotation; expected arguments"),
    (["jpeg", "--updates 7"], "--samples 256: not divisible by --updates 7"),
    (["jpeg", "--preset paper_rwr"], "--preset paper_rwr: made for Stable Diffusion")])
def test_what_is_no_entry_is_refused(given, message, elsewhere, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", *given])
    with pytest.raises(InputError, match=f"^{message}"):
        leaderboard.main()


# Runs

def pretend_to_measure(monkeypatch):
    """No network draws: epoch n has n percent more reward, and the files are remembered."""
    asked = []

    def measure(reward, loras):
        for epoch, file in enumerate(loras):
            asked.append(file)
            yield -2 + 0.02 * epoch, 0.9

    monkeypatch.setattr(leaderboard, "measure", measure)
    return asked


def fake_training(folder, epochs):
    """What rows_of() reads of a finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    line = dict(reward_mean=-2, sampling_images_per_s=10, training_images_per_s=20)
    (folder / "metrics.jsonl").write_text(f"{json.dumps(line)}\n" * epochs)
    (folder / "config.json").write_text(json.dumps(dict(samples=200, inner_epochs=2)))
    (folder / "result.json").write_text(json.dumps(dict(epochs=epochs, reward_before=-2, reward_after=-1, scores={})))


def test_what_is_done_is_not_done_again_and_what_was_interrupted_goes_on(elsewhere, monkeypatch, capsys):
    calls, clocks, asked = [], [], pretend_to_measure(monkeypatch)

    class Ended:
        returncode = 0

    def pretend(command, cwd):
        assert leaderboard.os.environ["OMP_NUM_THREADS"] == "2"
        (clocks if "--eval-samples" in command else calls).append(command[2:])
        Ended.returncode = int(len(calls) == 2 and not clocks)
        if not Ended.returncode:
            fake_training(elsewhere / command[command.index("--out") + 1], cli.make_settings(
                **vars(cli.make_parser().parse_args(command[2:command.index("--auto-resume")]))).epochs)
        return Ended

    monkeypatch.setattr(run.subprocess, "run", pretend)
    monkeypatch.setattr(leaderboard, "ENTRIES", {"ddpo_is": "", "awm": "--algorithm awm"})

    def lead(*arguments):
        monkeypatch.setattr(sys, "argv", ["leaderboard.py", *arguments])
        leaderboard.main()
        return capsys.readouterr().out.strip().splitlines()

    with pytest.raises(InputError, match="jpeg: ddpo_is, seed 1 has stopped; the same command goes on with it"):
        lead("jpeg", "ddpo_is")
    assert len(calls) == 3 and len(asked) == 2 * 9      # seed 2 and the clock were not kept waiting
    assert len(clocks) == 1 and not Path(clocks[0][-1]).exists()
    capsys.readouterr()
    lead("jpeg", "ddpo_is")
    said = lead("jpeg", "--algorithm awm --lr 2e-3")
    assert [text.split(" | ")[1] for text in said if text.startswith("|")] == ["`--algorithm awm --lr 2e-3`", "ddpo_is"]
    assert said[-1] == "missing: awm (3 of 3 runs), TRL (see --help)"
    lead("jpeg", "--algorithm", "awm")      # a standing entry by its arguments
    before = len(calls)
    said = lead("jpeg") + lead("jpeg", "--algorithm", "awm", "--lr", "2e-3") + lead()
    assert len(calls) == before == 10 and calls[3] == calls[1]
    assert "missing: TRL (see --help)" in said and said[-1].startswith("missing: ddpo_is (3 of 3 runs), awm (3 of 3 ")
    assert shlex.join(calls[4][:-3]) == "--algorithm awm --lr 2e-3 --reward jpeg --seed 0 --keep-every 1 --device cpu"
    assert all(call[-3:-1] == ["--auto-resume", "--out"] for call in calls)
    assert len({call[-1] for call in calls}) == 9
    rows, kept = results.read_rows("leaderboard"), {"ddpo_is": 8, "awm": 5, "--algorithm awm --lr 2e-3": 5}
    assert [(row["run"], row["seed"], row["epoch"]) for row in rows] == [
        (f"jpeg: {entry}", seed, epoch) for entry in kept for seed in (0, 1, 2) for epoch in range(kept[entry] + 1)]
    assert rows[1] == dict(run="jpeg: ddpo_is", seed=0, epoch=1, queries=200, reward=-2, held_out=-1.98,
                           held_out_recognised=0.9)
    assert asked[0] is None and [file.name for file in asked[1:9]] == [f"lora_000{n}.safetensors" for n in range(1, 9)]
    assert str(asked[1].parent) == calls[0][-1]
    # each entry's clock: three short epochs of 40 s, once; again if it is asked for
    commands = [shlex.join(own[:-3]) for own in clocks]
    assert commands == [f"{given}--reward jpeg --seed 0 --keep-every 1 --device cpu --epochs 3 --eval-samples 10"
                        for given in ("", "--algorithm awm --lr 2e-3 ", "--algorithm awm ")]
    assert results.read_rows("leaderboard_clock")[1] == dict(run="jpeg: ddpo_is", epoch=2, seconds=40)
    results.write_rows("leaderboard", [*rows, dict(rows[0], run="jpeg: TRL 1", seed=0, epoch=0)])
    said = lead("jpeg", "clock")
    assert [shlex.join(own[:-3]) for own in clocks[3:]] == [commands[n] for n in (0, 2, 1)]
    assert said[-1] == "missing: the clock of TRL 1"
    assert len(results.read_rows("leaderboard_clock")) == 9
    # one epoch more than are kept: the runs go on where they ended
    monkeypatch.setitem(leaderboard.ENTRIES, "awm", "--algorithm awm --epochs 6")
    lead("jpeg")
    assert len(calls) == 13 and calls[-1][-1] == calls[9][-1]
    assert [row["epoch"] for row in results.read_rows("leaderboard")[27:34]] == list(range(7))


def test_every_epoch_of_a_run_draws_the_pictures_of_its_last_evaluation(elsewhere, tiny_file, monkeypatch, capsys):
    """Drawn plainly: as the default draws in training, not as an entry with guidance and fewer steps does."""
    monkeypatch.setattr(leaderboard, "SHIPPED", tiny_file)
    monkeypatch.setattr(leaderboard, "PLAIN", replace(leaderboard.PLAIN, eval_samples=9, batch=4))
    seen, folders, runs = [], [], []
    monkeypatch.setattr(leaderboard, "recognised", lambda images, prompts: np.array([seen.append(images) or 0.5]))

    def train_in(folder, command, title, epochs=0):
        train.main([*command, "--weights", str(tiny_file), "--preset", "laptop", "--eval-samples", "9", "--out",
                    str(folder)])
        folders.append(folder)

    monkeypatch.setattr(leaderboard, "train_in", train_in)
    common = "--epochs 2 --samples 8 --updates 2 --prompt-minimum 2 --lr 0.1"
    for entry in (common, f"{common} --guidance 3 --steps 2"):
        leaderboard.carry_out("jpeg", entry, 0)
        rows = [row for row in results.read_rows("leaderboard") if row["run"] == f"jpeg: {entry}"]
        result = json.loads((folders[-1] / "result.json").read_text())
        runs.append(([row["held_out"] for row in rows], result["reward_before"], result["reward_after"]))
    (measured, before, after), (other, guided, _) = runs
    assert len(measured) == len(set(measured)) == 3
    assert (measured[0], measured[-1]) == pytest.approx((before, after), rel=1e-5)      # six digits
    assert other[0] == measured[0] and abs(guided - other[0]) > 1e-3
    leaderboard.clock("jpeg", common)
    assert [row["seconds"] > 0 for row in results.read_rows("leaderboard_clock")] == [True, True, True]
    with np.load(folders[0] / "before.npz") as kept:
        assert np.array_equal(seen[0], kept["images"]) and not np.array_equal(seen[0], seen[2])
