"""The experiments: their commands, how runs become rows, and rows figures and tables; without training."""
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, plain_descent, random_lora_policy

sys.path.insert(0, str(ROOT / "experiments"))
import figures
import gradient_noise
import guided_sampler
import judges
import one_pass
import results
import run
import scaling
import windows

import train
from ddpo_min import cli
from ddpo_min.ddim import ddim_steps
from ddpo_min.ddpo import ddpo_update
from ddpo_min.files import InputError
from ddpo_min.forward_process import forward_process_update
from ddpo_min.plan import Plan
from ddpo_min.rollout import sample_trajectories
from ddpo_min.weights import load_stable_diffusion

ALL = [(name, own) for name, experiment in run.EXPERIMENTS.items() for own in experiment.runs]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder in place of experiments/ and of the repository."""
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "HERE", tmp_path)
    return tmp_path


def fake_run(folder, before, after, epochs=3):
    """The files that a run leaves, with numbers that can be told apart."""
    folder.mkdir(parents=True)
    lines = [dict(epoch=e + 1, reward_mean=before + e, sampling_images_per_s=10, training_images_per_s=5,
                  grad_norm=e, **{"score_a/b.py:recognised": 1 - e / 10}) for e in range(epochs)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps(dict(samples=20, inner_epochs=2)))
    (folder / "result.json").write_text(json.dumps(dict(
        reward_before=before, reward_after=after, scores={"a/b.py:recognised": [0.9, 0.6]})))


@pytest.mark.parametrize("name, own", ALL)
def test_every_run_is_a_command_that_is_accepted(name, own, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = cli.read_settings(run.command_of(run.EXPERIMENTS[name], own, 1))
    cli.check_settings(settings)
    assert settings.seed == 1
    if name == "interleaving":
        pictures, steps = settings.epochs * settings.samples, settings.epochs * settings.updates
        assert (pictures, steps * settings.inner_epochs) == (2048, 128)
    if name == "algorithms":
        assert settings.epochs * settings.samples == (1024 if settings.regression else 2048)


def test_a_run_becomes_rows(tmp_path):
    fake_run(tmp_path / "run", -3.0, -2.0)
    first, second, third, last = run.rows_of(tmp_path / "run")
    assert first == dict(epoch=0, queries=0, seconds=0, reward=-3, recognised=1, grad_norm=0, held_out=-3,
                         held_out_recognised=0.9)
    assert second == dict(epoch=1, queries=20, seconds=pytest.approx(10), reward=-2, recognised=0.9, grad_norm=1)
    assert last == dict(epoch=3, queries=60, seconds=pytest.approx(30), held_out=-2.0, held_out_recognised=0.6)


def test_what_is_done_is_not_done_again_and_what_was_interrupted_goes_on(elsewhere, monkeypatch):
    calls = []

    def pretend(command, cwd):
        calls.append(command[2:])
        where = command[command.index("--out") + 1]
        if len(calls) == 2:         # killed after its first checkpoint
            (elsewhere / where).mkdir(parents=True)
            (elsewhere / where / "state.pt").touch()
            return subprocess.CompletedProcess(command, 1)
        (elsewhere / where / "state.pt").unlink(missing_ok=True)
        if (elsewhere / where).exists():
            (elsewhere / where).rmdir()
        fake_run(elsewhere / where, -3.0, -2.0 - len(calls))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", pretend)
    monkeypatch.setattr(sys, "argv", ["run.py", "guidance"])
    with pytest.raises(InputError, match="guidance: without, seed 1 has stopped"):
        run.main()
    run.main()
    run.main()
    assert len(calls) == 10 and calls[2] == calls[1]
    assert all("--auto-resume" in call and "--seed" in call for call in calls)
    assert len({call[call.index("--out") + 1] for call in calls}) == 9
    assert [shlex.join(call[:call.index("--watch")]) for call in calls[4:]] == [
        *["--guidance 5 --no-guidance-in-training"] * 3, *["--guidance 5"] * 3]
    rows = results.read_rows("guidance")
    assert [(row["run"], row["seed"], row["epoch"]) for row in rows] == [
        (name, seed, epoch) for name in run.EXPERIMENTS["guidance"].runs for seed in run.SEEDS for epoch in range(4)]
    assert results.column(rows, "without", "held_out")[:, -1].tolist() == [-3, -5, -6]
    assert np.isnan(results.column(rows, "in both", "grad_norm")[0]).tolist() == [False, False, False, True]


def test_a_command_that_two_experiments_have_is_run_once(elsewhere, monkeypatch):
    rows = {run_: [dict(run=run_, seed=seed, epoch=0, held_out=seed + number) for seed in run.SEEDS]
            for number, run_ in enumerate(("ddpo_is clip", "ddpo_is jpeg", "rwr jpeg"))}
    results.write_rows("algorithms", sum(rows.values(), []))
    trained = []
    monkeypatch.setattr(run.subprocess, "run", lambda command, cwd: trained.append(command)
                        or fake_run(elsewhere / command[command.index("--out") + 1], -3.0, -2.0)
                        or subprocess.CompletedProcess(command, 0))
    monkeypatch.setattr(sys, "argv", ["run.py", "reuse"])
    run.main()
    assert len(trained) == 3 * (len(run.EXPERIMENTS["reuse"].runs) - 1)
    kept = results.read_rows("reuse")
    assert [row["held_out"] for row in kept if row["run"] == "4 minibatches"] == [1, 2, 3]
    assert {row["held_out"] for row in kept if row["run"] != "4 minibatches" and row["epoch"] == 3} == {-2}
    assert len(results.read_rows("algorithms")) == 9


def test_an_unknown_experiment_is_named(elsewhere, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "guidance", "guidence"])
    with pytest.raises(InputError, match="guidence: no experiment; expected some of algorithms, .*, all"):
        run.main()
    assert list(elsewhere.iterdir()) == []


def fake_rows(name):
    """A table as an experiment would write it."""
    rng, rows = np.random.default_rng(0), []
    if name == "gradient_noise":
        for kind in ("even", "paper"):
            rows += [dict(run=kind, seed=s, T=T, batch=b, signal=2.0, noise=100 / b * T, measured_noise=100 / b * T,
                          signal_to_noise=2.0 * b / 100 / T) for s in range(3) for T in (4, 8, 16) for b in (8, 64)]
        rows += [dict(run="awm, 2 timesteps", seed=s, T=8, batch=b, signal_to_noise=b * (s + 1)) for s in range(3)
                 for b in (8, 64)]
        rows += [dict(run="awm, 2 timesteps: direction", seed=s, T=8, cosine=0.25) for s in range(3)]
        return rows + [dict(run="after 4 steps: IS", seed=s, T=8, cosine=0.5 + s / 10, approx_kl=2e-4 * s,
                            clip_fraction=0.125) for s in range(3)]
    if name == "guided_sampler":
        return [dict(run=f"scale {scale}", seed=s, scale=scale, held_out=6 + scale, held_out_rule=5, seconds=18 + scale,
                     held_out_recognised=0.9 - scale / 10) for scale in (0, 1, 2) for s in range(3)] + [
            dict(run="DDPO", seed=s, held_out=7, held_out_rule=8, seconds=44 + s, held_out_recognised=0.6)
            for s in range(3)]
    if name == "windows":
        return [dict(run=own, seed=s, epoch=e, seconds=e * 9 * (s + 1), reward=-3 + e / 10, held_out=-4 + e / 10,
                     held_out_recognised=0.88 if (s, e) == (1, 1) else 0.9 - e / 10)
                for own in windows.WAYS for s in range(3) for e in range(3)]
    if name == "scaling":       # 2 s and 30 ms a sample, or 600 ms a step, or 100 us a pixel
        return [dict(run=own, samples=128, steps=8, size=64, processes=1, **cost) | {own: value}
                for own, values in scaling.VALUES.items() for value in values for cost in [dict(
                    sampling_seconds=1, training_seconds=2, memory_mb=900,
                    seconds=2 + value * dict(samples=0.03, steps=0.6, size=1e-4 * value, processes=0)[own])]]
    for own in run.EXPERIMENTS[name].runs:
        for seed in run.SEEDS:
            for epoch in range(4):
                row = dict(run=own, seed=seed, epoch=epoch, queries=epoch * 256, seconds=epoch * 15)
                if epoch < 3:
                    row.update(reward=-3 + 0.1 * epoch, recognised=0.9 - 0.02 * epoch * seed, uncut=epoch,
                               clip_fraction=0.25, approx_kl=1e-4 * (epoch + 1), kl_to_base=0.01 * epoch)
                if epoch in (0, 3):
                    row.update(held_out=-4 + epoch * (1 + seed) / 10, held_out_recognised=0.9 - epoch / 10)
                rows.append(row)
    rng.shuffle(rows)       # a reader may sort as he likes, but within a run and seed the epochs are in order
    return sorted(rows, key=lambda row: (list(run.EXPERIMENTS[name].runs).index(row["run"]), row["seed"], row["epoch"]))


def test_figures_and_tables_come_from_the_numbers(elsewhere, monkeypatch):
    for name in [*run.EXPERIMENTS, *run.SCRIPTS]:
        results.write_rows(name, fake_rows(name))
    (elsewhere / "prompts").mkdir()
    for name in run.EXPERIMENTS["dpok"].runs:
        (elsewhere / "prompts" / f"{name}.txt").write_text("a cat\n")
    tables = figures.tables()
    assert tables.keys() == {*run.EXPERIMENTS, *run.SCRIPTS} == {path.stem for path in elsewhere.glob("*.png")}
    # held out: -4 -> -3.7, -3.4, -3.1 are +7.5, +15, +22.5%: mean 15, standard error 7.5 / sqrt(3); kept: 0.6 of 0.9
    assert tables["settings"][0] == "| default | +15.0 ± 4.3% | 66.7% | 0.8 |"
    assert tables["algorithms"][1] == f"| `incompressible` | {' | '.join(['+15.0 ± 4.3%, 67%'] * 4)} |"
    first, *_ = figures.defaults(results.read_rows("algorithms"))
    assert first == "| `--reward jpeg` | 4.000 -> 3.700, 3.400, 3.100 kB | -15.0 ± 4.3% | 66.7% | 0.8 |"
    assert tables["fast"][0] == "| `jpeg` | +15.0 ± 4.3% | 66.7% | 45 | +15.0 ± 4.3% | 66.7% | 45 |"
    assert tables["reuse"][0] == "| 1 minibatches | +15.0 ± 4.3% | 66.7% | 0.25 | 3.0e-04 |"
    assert tables["generalisation"][0] == "| jpeg, other animals | +6.7 ± 0.0% | +15.0 ± 4.3% | 66.7% |"
    # of seed 2 0.82 of 0.9 are recognised at epoch 2, 0.86 at epoch 1, of seed 1 0.86 at epoch 2: 95% of 0.9 is 0.855
    assert tables["overoptimisation"][0] == (
        "| KL weight 0 | -, -, 1 | -2.83 | 1.67 | 0.87 | 0.017 | -2.80 | 2.00 | 0.86 | 0.02 |")
    assert tables["gradient_noise"] == ["| `--step-weights even` | 0.320 | 0.160 | 0.080 | -1.00 |",
                                        "| `--step-weights paper` | 0.320 | 0.160 | 0.080 | -1.00 |",
                                        "| awm, 2 timesteps | 128.000 ± 36.950 |",
                                        "| awm, 2 timesteps: direction | 0.250 ± 0.000 |",
                                        "| after 4 steps: IS | 0.600 ± 0.058 | 0.0002 | 0.12 |"]
    assert np.isnan(figures.slope([4, 8, 16], [0.2, 0.1, -0.01]))
    # of seed 1 0.88 of 0.9 are recognised at epoch 1, of the others 0.8: 95% of 0.9 is 0.855
    assert tables["windows"][4] == "| noise in 4, moving | +0.8 ± 0.8% | 6 | +5.0 ± 0.0% | 77.8% | 36 |"
    assert len(tables["windows"]) == 6
    assert tables["scaling"][3] == "| 512 | 8 | 64 | 1 | 1.00 | 2.00 | 17.36 | 900 |"
    assert tables["guided_sampler"][2:] == ["| scale 2 | 8.00 | 5.00 | 70.0% | 0.111 |",
                                            "| DDPO | 7.00 | 8.00 | 60.0% | 0.100, and 45 of training |"]


def test_a_script_of_which_a_seed_is_missing_goes_on_and_has_no_figure_yet(elsewhere, monkeypatch, capsys):
    rows, measured = fake_rows("gradient_noise"), []
    results.write_rows("gradient_noise", [row for row in rows if row["seed"] != 1])
    assert figures.tables() == {} and not list(elsewhere.glob("*.png"))
    run.overview()
    assert re.search(r"gradient_noise +80 minutes +missing", capsys.readouterr().out)
    monkeypatch.setattr(gradient_noise, "rows_of", lambda seed, T: (
        measured.append((seed, T)), [row for row in rows if (row["seed"], row["T"]) == (seed, T)])[1])
    monkeypatch.setattr(gradient_noise, "STEPS", (4, 8, 16))
    gradient_noise.main()
    assert measured == [(1, 4), (1, 8), (1, 16)] and len(results.read_rows("gradient_noise")) == len(rows)
    assert figures.tables().keys() == {"gradient_noise"}
    run.overview()
    assert re.search(r"gradient_noise +80 minutes +done", capsys.readouterr().out)


def test_an_experiment_with_a_run_missing_has_no_figure_yet(elsewhere, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", (figures.guidance,))
    rows = fake_rows("guidance")
    results.write_rows("guidance", [row for row in rows if (row["run"], row["seed"]) != ("in both", 2)])
    assert figures.tables() == {} and not (elsewhere / "guidance.png").exists()
    results.write_rows("guidance", rows)
    assert len(figures.tables()["guidance"]) == 3


def test_the_cost_of_an_epoch_is_that_of_the_second_of_a_run(elsewhere, monkeypatch):
    def pretend(command, cwd, env, **quiet):
        given = {name: int(command[command.index(f"--{name}") + 1]) for name in ("samples", "updates", "steps", "size")}
        processes = int(command[command.index("--nproc_per_node") + 1]) if "torch.distributed.run" in command else 1
        assert given["samples"] == 64 * given["updates"] and env["OMP_NUM_THREADS"] == str(2 // processes)
        monkeypatch.chdir(ROOT)
        cli.check_settings(cli.read_settings(command[command.index("train.py") + 1:]))
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        line = dict(sampling_images_per_s=64, training_images_per_s=given["steps"] * given["size"] / 2,
                    peak_memory_mb=500 + processes)
        folder.joinpath("metrics.jsonl").write_text(json.dumps(dict(line, peak_memory_mb=1)) + "\n" + json.dumps(line))

    monkeypatch.setattr(subprocess, "run", pretend)
    scaling.main()
    rows = results.read_rows("scaling")
    assert len(rows) == 14
    assert rows[3] == dict(run="samples", samples=512, steps=8, size=64, processes=1, sampling_seconds=8,
                           training_seconds=2, seconds=10, memory_mb=501)
    assert rows[4]["training_seconds"] == 1 and rows[-1]["memory_mb"] == 502
    assert rows[8]["training_seconds"] == 1 and rows[8]["size"] == 32


def test_the_tables_of_the_pages_are_those_of_the_numbers(monkeypatch):
    monkeypatch.setattr(figures, "save", lambda figure, name: figures.plt.close(figure))
    for name, lines in figures.tables().items():
        page = ROOT / ("docs/leaderboard.md" if name == "leaderboard" else "experiments/README.md")
        text = page.read_text()
        for line in lines:
            assert line in text, f"{name}: {line}"
        links = [(page.parent / link).resolve() for link in re.findall(r"\]\(([^)]+)\)", text)]
        assert ROOT / "experiments" / f"{name}.png" in links
    readme = (ROOT / "README.md").read_text()
    for line in figures.defaults(results.read_rows("algorithms")):
        assert line in readme, line


def test_the_judge_reads_the_animal_from_the_prompt(monkeypatch):
    asked = []
    monkeypatch.setattr(judges, "classifier", lambda: None)
    monkeypatch.setattr(judges.evaluate, "recognised", lambda _, images, animals: asked.extend(animals)
                        or np.array([True] * len(animals)))
    prompts = ["a dog", "three wolves", "a cat riding a bike", "a rabbit on a green background", "two mice"]
    assert judges.recognised(np.zeros((5, 64, 64, 3), np.uint8), prompts).tolist() == [1.0] * 5
    from ddpo_min.prompts import ANIMALS
    assert [ANIMALS[i] for i in asked] == ["dog", "wolf", "cat", "rabbit", "mouse"]


def test_the_signal_and_the_noise_of_a_gradient_are_those_it_was_made_of():
    torch.manual_seed(0)
    truth, spread = torch.linspace(-1, 1, 50), 2.0
    groups = truth + spread / gradient_noise.GROUP ** 0.5 * torch.randn(4000, 50)
    signal, noise = gradient_noise.signal_and_noise(groups)
    assert signal == pytest.approx(truth.square().sum().item(), rel=0.02)
    assert noise == pytest.approx(50 * spread ** 2, rel=0.02)
    for batch in (8, 32, 256):
        assert gradient_noise.measured_noise(groups, batch) == pytest.approx(50 * spread ** 2 / batch, rel=0.1)


def test_the_gradient_of_groups_is_the_updates(tiny_file, monkeypatch):
    """Their mean, on the policy that sampled, is what a step of gradient descent takes."""
    monkeypatch.setattr(gradient_noise, "MINIBATCH", 8)
    policy, parameters = random_lora_policy(tiny_file, 1.0, 3)
    trajectories, A = gradient_noise.draw(policy, 0, 0, 16)
    emphasis = [0.5, 2.0, 0.5]
    found = gradient_noise.gradients(policy, parameters, trajectories, A, list(gradient_noise.LOSSES),
                                     dict(ours=emphasis, even=[1.0] * 3))
    before = torch.cat([p.detach().flatten() for p in parameters])
    ddpo_update(policy, plain_descent(parameters), trajectories, A, np.random.default_rng(0),
                plan=Plan(16, 1, 8, range(3)), clip_range=0.01, emphasis=emphasis)
    theirs = before - torch.cat([p.detach().flatten() for p in parameters])
    for loss in gradient_noise.LOSSES:
        ours = found[loss, "ours"].mean(0) / 3
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()
        assert (found[loss, "even"].mean(0) / 3 - theirs).norm() > 0.1 * theirs.norm()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_reinforce_in_one_pass_is_ddpo_sfs_update(tiny_file, guidance):
    policy, parameters = random_lora_policy(tiny_file, guidance, 3, torch.float64)
    prompts, seeds, emphasis = ["a fox", "a cat", "a fox", "a dog", "a cat"], [3, 5, 8, 13, 21], [0.5, 2.0, 0.7]
    A, plan = np.array([1.0, -2.0, 0.5, 3.0, -0.1]), Plan(5, 1, 2, range(3))
    latents, images, own = one_pass.sample_with_gradients(policy, prompts, seeds, plan.rollout(), emphasis)
    trajectories = sample_trajectories(policy, prompts, seeds, plan.rollout(), keep="images")
    assert np.array_equal(images, trajectories.images)
    trajectories = sample_trajectories(policy, prompts, seeds, plan.rollout())
    assert (latents - trajectories.latents[:, -1]).abs().max() < 1e-12
    start, changes = [p.detach().clone() for p in parameters], []
    for one in (True, False):
        optimizer = plain_descent(parameters)
        if one:
            one_pass.one_pass_update(optimizer, own, A)
        else:
            ddpo_update(policy, optimizer, trajectories, A, np.random.default_rng(0), plan=plan, clip_range=None,
                        emphasis=emphasis)
        changes.append(torch.cat([(p.detach() - s).flatten() for p, s in zip(parameters, start)]))
        for p, s in zip(parameters, start):
            p.data.copy_(s)
    assert (changes[0] - changes[1]).norm() < 1e-6 * changes[1].norm()
    assert changes[1].norm() > 0


def test_a_window_of_all_steps_is_what_train_does(tiny_file, tmp_path):
    learner = gradient_noise.learner_of(3, tiny_file)
    logged = list(windows.train(learner, 3, windows.Way(epochs=2, fraction=0.75), samples=16))
    theirs = train.train(cli.make_settings(weights=str(tiny_file), preset="laptop", seed=3, epochs=2, samples=16,
                                           eval_samples=1, timestep_fraction=0.75, out=str(tmp_path / "run")))
    for own, line in zip(logged, theirs.history, strict=True):
        assert own["reward"] == pytest.approx(line["reward_mean"], rel=1e-6)
        assert own["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4) and own["seconds"] > 0
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    wanted = state["learner"]["parameters"]
    for name, p in learner.parameters.items():
        torch.testing.assert_close(p.detach(), wanted[name], rtol=0, atol=1e-6)


def test_a_group_shares_its_prompt_and_x_T_and_is_compared_with_itself(tiny_file, monkeypatch):
    seen, prompts, update, weigh = [], [], windows.ddpo_update, windows.clipped_advantages
    monkeypatch.setattr(windows, "ddpo_update", lambda policy, optimizer, trajectories, A, rng, *, plan, **how: (
        seen.append((trajectories, A, plan.steps)),
        update(policy, optimizer, trajectories, A, rng, plan=plan, **how))[1])
    monkeypatch.setattr(windows, "clipped_advantages", lambda asked, rewards, **how: (
        prompts.append(asked), weigh(asked, rewards, **how))[1])
    learner = gradient_noise.learner_of(3, tiny_file)
    list(windows.train(learner, 3, windows.Way(epochs=2, window=3, moves=True, trained=2, group=4), samples=16))
    for (trajectories, advantages, steps), asked, first in zip(seen, prompts, (0, 5)):
        assert steps == range(first, first + 2)
        groups = trajectories.latents.unflatten(0, (4, 4))
        for i in range(9):      # equal in a group until the window's first step, and nowhere between groups
            same = (groups[:, 0, i] - groups[:, 1, i]).abs().amax((1, 2, 3))
            assert (same < 1e-4).all() if i <= first else (same > 0.01).all(), (i, same)
            assert (groups[0, 0, i] - groups[1, 0, i]).abs().max() > 0.1
        assert np.allclose(advantages.reshape(4, 4).mean(1), 0) and np.allclose(advantages.reshape(4, 4).std(1), 1)
        assert all(len(set(asked[k:k + 4])) == 1 for k in range(0, 16, 4))


def test_windows_are_run_a_seed_at_a_time_and_go_on(elsewhere, monkeypatch):
    rows, ran = fake_rows("windows"), []
    stopped = [row for row in rows if row["seed"] < 2 or row["run"] == "the default"]
    results.write_rows("windows", stopped)
    assert figures.tables() == {} and not run.finished("windows")
    monkeypatch.setattr(windows, "rows_of", lambda own, seed: (
        ran.append((own, seed)), [row for row in rows if (row["run"], row["seed"]) == (own, seed)])[1])
    windows.main()
    assert ran == [(own, 2) for own in list(windows.WAYS)[1:]] and run.finished("windows")
    assert [row["run"] for row in results.read_rows("windows")] == [row["run"] for row in rows]


def test_the_window_goes_from_the_first_steps_to_the_last():
    moving = [windows.window_of(windows.WAYS["noise in 2, moving"], epoch) for epoch in range(11)]
    assert moving[0] == range(2) and moving[10] == range(6, 8) and moving[5] == range(3, 5)
    assert {windows.window_of(windows.WAYS["noise in the first 4"], epoch) for epoch in range(8)} == {range(4)}
    assert windows.window_of(windows.Way(), 5) == range(8)


def test_a_row_of_windows_has_what_its_epoch_began_with(monkeypatch):
    """Two epochs: three evaluations, and what is logged stands in the row that the epoch begins at."""
    sizes, logged = iter((-3.0, -2.5, -2.0)), [dict(reward=-3.1, seconds=10.0), dict(reward=-2.6, seconds=20.0)]
    monkeypatch.setattr(windows, "learner_of", lambda seed: None)
    monkeypatch.setattr(windows, "evaluate", lambda learner: dict(held_out=next(sizes)))
    monkeypatch.setattr(windows, "train", lambda learner, seed, way: iter(logged))
    where = dict(run="the default", seed=1)
    assert windows.rows_of("the default", 1) == [
        where | dict(epoch=0, queries=0, seconds=0.0, reward=-3.1, held_out=-3.0),
        where | dict(epoch=1, queries=256, seconds=10.0, reward=-2.6, held_out=-2.5),
        where | dict(epoch=2, queries=512, seconds=30.0, held_out=-2.0)]


def test_the_cosine_is_that_of_the_expected_gradients():
    """Two directions 60 degrees apart, under noise that is far longer, shared by the same samples or not."""
    torch.manual_seed(0)
    a, b = torch.zeros(2, 50)
    a[0], b[0], b[1] = 1.0, 0.5, 0.75 ** 0.5
    noise, other = 3 * torch.randn(2, 4000, 50)
    assert gradient_noise.cosine(a + noise, b + other) == pytest.approx(0.5, abs=0.1)
    assert gradient_noise.cosine(a + noise[:1000], b + noise[:1000]) > 0.8      # the noise that both share counts
    assert gradient_noise.cosine_on_the_same(a + noise[:1000], b + noise[:1000]) == pytest.approx(0.5, abs=0.2)
    assert np.isnan(gradient_noise.cosine(noise[:4] - noise[:4].mean(0), b + other))


def test_after_updates_the_old_samples_are_compared_with_fresh_ones(tiny_file, monkeypatch):
    monkeypatch.setattr(gradient_noise, "Settings", type("Small", (gradient_noise.Settings,), dict(samples=16)))
    monkeypatch.setattr(gradient_noise, "MINIBATCH", 8)
    learner = gradient_noise.learner_of(3, tiny_file)
    policy = gradient_noise.Policy(learner.model, ddim_steps(2), 1.0, lora=learner.lora)
    drawn, draw = [], gradient_noise.draw
    monkeypatch.setattr(gradient_noise, "draw", lambda policy, seed, epoch, count=16: (
        drawn.append(epoch), draw(policy, seed, epoch, count))[1])
    trajectories, A = draw(policy, 3, 0, 16)
    assert gradient_noise.how_far(policy, trajectories) == dict(approx_kl=0, clip_fraction=0)
    rows = gradient_noise.after_updates(learner, policy, trajectories, A, [1.0, 1.0], 3)
    losses = gradient_noise.LOSSES
    assert [row["run"] for row in rows] == [f"after {n} steps: {loss}" for n in (4, 16) for loss in losses]
    assert len(set(drawn)) == 3 and 0 not in drawn      # neither the measured samples nor those trained on are fresh
    assert rows[3]["approx_kl"] > rows[0]["approx_kl"] > 0
    log_ratio = torch.cat([policy.log_prob(trajectories.latents[:, i + 1], trajectories.latents[:, i], i,
                                           trajectories.context(slice(0, 16)))[0] - trajectories.log_p_old[:, i]
                           for i in range(2)])
    assert rows[3]["approx_kl"] == pytest.approx(log_ratio.square().mean().item() / 2, rel=1e-3)
    assert rows[3]["clip_fraction"] == pytest.approx(((log_ratio.exp() - 1).abs() > 0.01).float().mean().item())


def test_the_gradient_of_groups_is_awms_update(tiny_file, monkeypatch):
    monkeypatch.setattr(gradient_noise, "MINIBATCH", 8)
    policy, parameters = random_lora_policy(tiny_file, 1.0, 3)
    trajectories, A = gradient_noise.draw(policy, 0, 0, 16)
    found = gradient_noise.matching_gradients(policy, parameters, trajectories, A, 3, np.random.default_rng(1))
    before = torch.cat([p.detach().flatten() for p in parameters])
    forward_process_update(policy, plain_descent(parameters), trajectories, A, np.random.default_rng(1),
                           plan=Plan(16, 1, 8), algorithm="awm", timesteps=3, grid=False, step_weights="even",
                           clip_range=0.1, power=1.0, beta=1.0, advantage_clip=5.0)
    theirs = before - torch.cat([p.detach().flatten() for p in parameters])
    assert (found.mean(0) / 3 - theirs).norm() < 1e-3 * theirs.norm()


def test_the_guided_sampler_follows_the_gradient_of_the_reward(tiny_file, monkeypatch):
    """For a reward that is linear in x_0, against finite differences of the reward of x0_hat in x_t."""
    model = load_stable_diffusion(tiny_file, dtype=torch.float64)
    direction = torch.randn(4, 8, 8, dtype=torch.float64)
    monkeypatch.setattr(guided_sampler, "differentiable", lambda reward, vae, x_0: (x_0 * direction).sum((1, 2, 3)))
    steps = ddim_steps(4)
    plain, guided = (guided_sampler.GuidedPolicy(model, steps, 1.0, scale=scale) for scale in (0, 3.0))
    x_t, towards = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    context, i, h = model.encode_prompts(["a cat", "a dog"]), 1, 1e-5
    with torch.no_grad():
        a = steps.alpha_bar[i]
        rewards = [(guided_sampler.x0_hat(x, plain.eps(x, steps.t[i], context, 1.0), a) * direction).sum((1, 2, 3))
                   for x in (x_t + h * towards, x_t - h * towards)]
        shift = guided.eps(x_t, steps.t[i], context, 1.0) - plain.eps(x_t, steps.t[i], context, 1.0)
    slope = (rewards[0] - rewards[1]) / (2 * h)
    assert torch.allclose((shift * towards).sum((1, 2, 3)), -3 * (1 - a) ** 0.5 * slope, rtol=1e-6)
