"""The loop around the update: what is drawn in which epoch, what each logged figure is, when files are written, what a
stop leaves behind, and that going on equals never having stopped."""
import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from ddpo_min import ddpo, evaluation, folder, learner, optimizer, policy, scorer
from ddpo_min.advantages import PromptStatistics
from ddpo_min.cli import make_settings, read_settings
from ddpo_min.ddim import ddim_mean, ddim_steps
from ddpo_min.files import InputError
from ddpo_min.prompts import draw_prompts, find_prompts, held_out
from ddpo_min.weights import load_stable_diffusion
from test_train import TIMES, arguments, assert_same_run, metrics

pytestmark = pytest.mark.usefixtures("plain_curve")


@pytest.fixture(scope="module")
def tiny_file(one_level):
    """The loop is tested here, not the networks."""
    return one_level


def spy(monkeypatch, owner, name, seen):
    """Call owner.name as always, and append (its arguments, what it returned) to `seen`."""
    call = getattr(owner, name)

    def spied(*given, **more):
        result = call(*given, **more)
        seen.append((given, more, result))
        return result

    monkeypatch.setattr(owner, name, spied)


def settings(tiny_file, out, *more, **changes):
    return read_settings(arguments(tiny_file, out, *more, **changes))


# What is drawn

@pytest.mark.parametrize("seed, group", [(0, 1), (5, 2)])
def test_each_epoch_draws_its_own_prompts_and_seeds_and_the_evaluation_always_the_same(
        tiny_file, tmp_path, monkeypatch, seed, group):
    trained, evaluated = [], []
    spy(monkeypatch, train, "sample_trajectories", trained)
    spy(monkeypatch, evaluation, "sample_trajectories", evaluated)
    train.train(settings(tiny_file, tmp_path / "run", "--seed", str(seed), "--group-size", str(group), "--eval-every",
                         "1", "--show-every", "9", epochs=3))
    animals = find_prompts("animals")
    for epoch, (given, _, _) in enumerate(trained):
        assert list(given[1:3]) == list(draw_prompts(animals, 8, seed=seed, epoch=epoch, group_size=group))
        assert all(given[1][i] == given[1][i + group - 1] for i in range(0, 8, group))
    assert len(trained) == 3 and len({tuple(given[2]) for given, _, _ in trained}) == 3
    assert len(evaluated) == 5 and all(list(given[1:3]) == list(held_out(animals, 5)) for given, _, _ in evaluated)
    seeds = [set(sum((list(given[2]) for given, _, _ in calls), [])) for calls in (trained, evaluated)]
    assert len(seeds[0]) == 24 and not seeds[0] & seeds[1]


def test_noise_in_the_first_steps_and_one_x_T_of_a_group_are_of_training_alone(tiny_file, tmp_path, monkeypatch):
    trained, evaluated = [], []
    spy(monkeypatch, train, "sample_trajectories", trained)
    spy(monkeypatch, evaluation, "sample_trajectories", evaluated)
    run = train.train(settings(tiny_file, tmp_path / "run", *shlex.split(
        "--steps 4 --noise-steps 3 --first-step 2 --timestep-fraction 1 --group-size 4 --same-start"), epochs=1))
    (given, _, drawn), = trained
    assert [s > 0 for s in given[0].steps.sigma] == [True] * 3 + [False]
    starts = drawn.latents[:, 0].flatten(1)
    assert [torch.equal(starts[n], starts[0]) for n in range(8)] == [True] * 4 + [False] * 4
    assert all(given[0].steps == ddim_steps(4) and "samples_per_start" not in more for given, more, _ in evaluated)
    assert [x is not None for x in run.history[0]["clip_fraction_by_step"]] == [False, True, True, False]
    assert run.history[0]["max_ratio_error"] == 0


# What is logged

def test_each_logged_figure_is_what_it_says(tiny_file, tmp_path, monkeypatch):
    """Recomputed from what was sampled, scored and predicted, with every number of the update at a value of its own."""
    sampled, collected, scored, based, stepped, losses = ([] for _ in range(6))
    spy(monkeypatch, train, "sample_trajectories", sampled)
    spy(monkeypatch, scorer.Scorer, "collect", collected)
    spy(monkeypatch, policy.Policy, "log_prob", scored)
    spy(monkeypatch, policy.Policy, "base_eps", based)
    spy(monkeypatch, optimizer.Optimizer, "step", stepped)
    spy(monkeypatch, ddpo, "ddpo_is_loss", losses)
    run = train.train(settings(tiny_file, tmp_path / "run", "--watch", "incompressible", "--kl-weight", "0.3", "--lr",
                               "0.05", "--timestep-fraction", "0.7", "--batch", "3", "--clip-range", "1e-5",
                               "--inner-epochs", "2", "--eval-every", "2", epochs=2))
    rewards = [result for _, _, result in collected]        # before, epoch 1, epoch 2, evaluation, after
    assert len(rewards) == 5
    calls = len(scored) // 2
    for epoch, line in enumerate(run.history):
        r, parts = rewards[1 + epoch]
        assert (line["reward_mean"], line["reward_std"]) == (pytest.approx(np.mean(r)), pytest.approx(np.std(r)))
        assert (line["reward_min"], line["reward_max"]) == (r.min(), r.max())
        assert line["score_incompressible"] == pytest.approx(parts["incompressible"].mean())
        path = sampled[epoch][2]
        rows = []                               # (i, size, log_p, log_p_old, loss, KL)
        for (given, _, (log_p, eps)), (_, _, eps_base), (_, _, loss) in zip(
                *(calls_of[epoch * calls:(epoch + 1) * calls] for calls_of in (scored, based, losses)), strict=True):
            own, x_prev, x_t, i, _ = given
            which = [k for x in x_t for k in range(8) if torch.equal(path.latents[k, i], x)]
            s, a, a_prev = own.steps.sigma[i], own.steps.alpha_bar[i], own.steps.alpha_bar_prev[i]
            moved = ddim_mean(x_t, eps, a, a_prev, s) - ddim_mean(x_t, eps_base, a, a_prev, s)
            rows.append((i, len(x_t), log_p.detach(), path.log_p_old[which, i], loss.item(),
                         (moved ** 2 / (2 * s ** 2)).mean().item()))
        sizes = [size for _, size, *_ in rows]
        ratios = [torch.exp(log_p - old) for _, _, log_p, old, _, _ in rows]
        outside = [((ratio - 1).abs() > 1e-5).double().mean().item() for ratio in ratios]
        assert line["loss"] == pytest.approx(np.average([row[4] for row in rows], weights=sizes), rel=1e-5, abs=1e-9)
        assert line["kl_to_base"] == pytest.approx(np.average([row[5] for row in rows], weights=sizes), rel=1e-3)
        assert line["approx_kl"] == pytest.approx(np.average(
            [((log_p - old) ** 2).mean().item() / 2 for _, _, log_p, old, _, _ in rows], weights=sizes), rel=1e-4)
        assert line["clip_fraction"] == pytest.approx(np.average(outside, weights=sizes)) and line["clip_fraction"] > 0
        assert line["clip_fraction_by_step"] == pytest.approx([np.average(
            [x for x, row in zip(outside, rows) if row[0] == i], weights=[row[1] for row in rows if row[0] == i])
            for i in range(3)])
        assert line["max_ratio_error"] == 0
        norms = [norm for _, _, norm in stepped[4 * epoch:4 * epoch + 4]]
        assert line["grad_norm"] == pytest.approx(np.mean(norms)) and len(set(norms)) == 4
        assert line["sampling_images_per_s"] > 0 and line["training_images_per_s"] > 0 and line["peak_memory_mb"] > 50
    assert "eval_reward" not in run.history[0]
    assert run.history[1]["eval_reward"] == rewards[3][0].mean() == rewards[4][0].mean()
    assert run.history[1]["eval_score_incompressible"] == rewards[3][1]["incompressible"].mean()
    assert metrics(run.folder) == [{k: v for k, v in line.items() if k not in TIMES} for line in run.history]
    assert run.result["reward_before"] == rewards[0][0].mean() and run.result["reward_after"] == rewards[4][0].mean()
    assert run.result["scores"] == {"incompressible": [rewards[k][1]["incompressible"].mean() for k in (0, 4)]}


def test_the_figures_of_weighted_regression(tiny_file, tmp_path, monkeypatch):
    losses, collected = [], []
    spy(monkeypatch, train, "rwr_update", losses)
    spy(monkeypatch, scorer.Scorer, "collect", collected)
    run = train.train(settings(tiny_file, tmp_path / "run", "--algorithm", "rwr", "--normalise", "epoch",
                               "--inverse-temperature", "30", epochs=1))
    w = np.exp(30 * collected[1][2][0])
    assert run.history[0]["effective_samples"] == pytest.approx(w.sum() ** 2 / (w ** 2).sum()) and w.std() > 0
    assert run.history[0]["loss"] == losses[0][2]["loss"] > 0


# When things happen

def test_evaluations_rows_and_checkpoints_come_in_their_epochs(tiny_file, tmp_path, monkeypatch):
    events = []
    for owner, name in ((evaluation.Evaluation, "run"), (folder.Folder, "add_row"), (folder.Folder, "write_state")):
        call = getattr(owner, name)

        def told(own, *given, call=call, name=name):
            what = given[0] if name == "add_row" else given[0]["epoch"] if name == "write_state" else ""
            events.append(f"{name} {what}".strip())
            return call(own, *given)

        monkeypatch.setattr(owner, name, told)
    train.train(settings(tiny_file, tmp_path / "run", "--eval-every", "3", "--eval-samples", "12", epochs=5))
    assert events == ["run", "add_row 0", "write_state 0", "write_state 1", "write_state 2", "add_row 2", "run",
                      "write_state 3", "write_state 4", "add_row 4", "write_state 5", "run", "add_row 5"]


def test_every_file_of_a_run_names_the_version(tiny_file, tmp_path, plain_curve, monkeypatch):
    from PIL import Image
    from safetensors import safe_open

    from ddpo_min import __version__, figures
    monkeypatch.setattr(figures, "save_curve", plain_curve)         # the real one
    out = tmp_path / "run"
    train.train(settings(tiny_file, out, epochs=1))
    assert json.loads((out / "config.json").read_text())["version"] == __version__
    assert json.loads((out / "result.json").read_text())["version"] == __version__
    assert [json.loads(line)["version"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [__version__]
    assert torch.load(out / "state.pt", weights_only=True)["version"] == __version__
    assert np.load(out / "before.npz")["version"] == __version__
    with safe_open(out / "lora.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ddpo_min"])["version"] == __version__
    assert Image.open(out / "samples.webp").getexif()[0x131] == f"ddpo_min {__version__}"
    pictures = [*out.glob("*.png"), *out.glob("samples/*.png")]
    assert [Image.open(path).text["Software"] for path in pictures] == [f"ddpo_min {__version__}"] * 5


# Stopping and going on

PHASES = {"sampling": (train, "sample_trajectories"), "scoring": (scorer.Scorer, "collect"),
          "advantages": (PromptStatistics, "advantages"), "update": (optimizer.Optimizer, "step"),
          "checkpoint": (folder.Folder, "write_state")}


@pytest.fixture(scope="module")
def three_epochs(tiny_file, tmp_path_factory):
    """A run of three epochs that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.train(settings(tiny_file, out, epochs=3))
    return out


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_in_any_phase_of_the_second_epoch_leaves_the_first(phase, error, three_epochs, tiny_file, tmp_path,
                                                                  monkeypatch, capsys):
    """Parameters, optimizer, statistics and log are those after epoch 1; going on gives the run without a stop."""
    owner, name = PHASES[phase]
    call, count = getattr(owner, name), []
    in_first_epoch = {"scoring": 2, "update": 3, "checkpoint": 2}.get(phase, 1)     # also before training; 2 updates

    def stops(*given, **more):
        count.append(1)
        if len(count) == in_first_epoch + 1:
            raise error("stop" if error is not torch.cuda.OutOfMemoryError else "CUDA out of memory.")
        return call(*given, **more)

    monkeypatch.setattr(owner, name, stops)
    out = tmp_path / "run"
    if error is not KeyboardInterrupt:
        said = "stop" if error is InputError else "^out of memory; .*--batch.*"
        with pytest.raises(InputError, match=f"{said}; 1 finished epochs are saved, go on with --resume"):
            train.train(settings(tiny_file, out, epochs=3))
    else:
        with pytest.raises(KeyboardInterrupt, match=f"stopped after epoch 1; go on with --resume {out} --epochs 3, "):
            train.train(settings(tiny_file, out, epochs=3))
    monkeypatch.undo()
    assert metrics(out) == metrics(three_epochs)[:1]
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["epoch"] == 1 and not list(out.glob(".*"))
    saved = load_file(out / "lora.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in state["learner"]["parameters"].items())
    train.main(["--resume", str(out), "--epochs", "3"])
    if phase == "sampling" or error is not KeyboardInterrupt:
        assert_same_run_but_rows(three_epochs, out)
    assert metrics(out) == metrics(three_epochs)


def assert_same_run_but_rows(a, b):
    """samples.png may hold a row more, that of the epoch where the run was stopped."""
    ours, theirs = load_file(a / "lora.safetensors"), load_file(b / "lora.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (a / "before_after.png").read_bytes() == (b / "before_after.png").read_bytes()


@pytest.mark.parametrize("more", [
    ("--algorithm", "ddpo_is", "--normalise", "prompt", "--inner-epochs", "2"),
    ("--algorithm", "ddpo_is", "--normalise", "epoch", "--kl-weight", "0.1"),
    ("--algorithm", "ddpo_is", "--normalise", "group", "--group-size", "2", "--timestep-fraction", "0.5"),
    ("--preset", "laptop_fast", "--noise-steps", "2", "--group-size", "4"),
    ("--algorithm", "ddpo_sf", "--normalise", "prompt", "--updates", "1"),
    ("--algorithm", "ddpo_sf", "--normalise", "group", "--group-size", "4", "--updates", "1"),
    ("--algorithm", "rwr", "--normalise", "epoch"), ("--algorithm", "rwr", "--normalise", "prompt", "--prompts", "dpok",
                                                     "--samples", "16"),
    ("--algorithm", "rwr_sparse", "--normalise", "epoch", "--percentile", "0.5"),
    ("--trainable", "full", "--lr", "1e-4")])
def test_resumed_equals_never_stopped_for_every_algorithm_and_normalisation(more, tiny_file, tmp_path):
    more = (*more, "--prompt-buffer", "3", "--show-every", "1")
    train.main(arguments(tiny_file, tmp_path / "whole", *more, epochs=2))
    train.main(arguments(tiny_file, tmp_path / "parts", *more, epochs=1))
    train.main(["--resume", str(tmp_path / "parts"), "--epochs", "2"])
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts")]
    for name, p in states[0]["learner"]["parameters"].items():
        assert torch.equal(p, states[1]["learner"]["parameters"][name])
    assert states[0]["learner"]["statistics"] == states[1]["learner"]["statistics"]
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    whole, parts = ((tmp_path / name / "before_after.png").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_two_seeds_are_two_runs_and_the_first_is_repeated_to_the_last_bit(three_epochs, tiny_file, tmp_path):
    train.main(arguments(tiny_file, tmp_path / "again", epochs=3))
    assert_same_run(three_epochs, tmp_path / "again")
    train.main(arguments(tiny_file, tmp_path / "other", "--seed", "1", epochs=3))
    ours, theirs = (load_file(path / "lora.safetensors") for path in (three_epochs, tmp_path / "other"))
    assert all((ours[name] - theirs[name]).abs().max() > 1e-4 for name in ours)


def test_a_lora_starts_where_its_seed_says(tiny_file):
    def start(seed):
        model = load_stable_diffusion(tiny_file)
        return learner.Learner(model, trainable="lora", rank=2, init_lora="", seed=seed, lr=1e-3,
                               statistics=PromptStatistics()).parameters

    first, again, other = start(3), start(3), start(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


@pytest.mark.parametrize("state, words", [({"epoch": 1}, "written by another version"), ("missing", "does not fit"),
                                          (b"no zip", "cannot be read")])
def test_a_checkpoint_that_does_not_fit_is_one_line(state, words, three_epochs, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(three_epochs, out)
    if state == "missing":
        state = torch.load(out / "state.pt", weights_only=True)
        state["learner"]["parameters"].popitem()
    if isinstance(state, bytes):
        (out / "state.pt").write_bytes(state)
    else:
        folder.Folder(out, True).write_state(state)
    with pytest.raises(InputError, match=words) as caught:
        train.main(["--resume", str(out), "--epochs", "4"])
    assert "\n" not in str(caught.value)


# From Python

def test_a_notebook_trains_on_a_function_and_gets_the_run(tiny_file, tmp_path, monkeypatch):
    def green(images, prompts):
        assert images.dtype == np.uint8 and images.shape[1:] == (16, 16, 3) and len(prompts) == len(images)
        return images[..., 1].mean((1, 2))

    own = make_settings(weights=str(tiny_file), samples=8, updates=2, steps=3, epochs=2, eval_samples=5, watch="jpeg",
                        prompt_minimum=2, out=str(tmp_path / "run"))
    run = train.train(own, reward=green)
    assert run.folder == tmp_path / "run" and [line["epoch"] for line in run.history] == [1, 2]
    assert 0 < run.result["reward_before"] < 256 and run.history[0]["score_jpeg"] < 0
    assert set(run.result["scores"]) == {"jpeg"} and run.settings.reward == "green"
    more = train.train(make_settings(resume=str(run.folder), epochs=3), reward=green)
    assert len(more.history) == 3 and more.history[:2] == run.history


def test_a_start_that_fails_leaves_the_folder_to_the_next_one(three_epochs, tmp_path, monkeypatch):
    """In one process, where the error that is kept (here: `failed`) keeps the run, too."""
    shutil.copytree(three_epochs, tmp_path / "run")
    again = make_settings(resume=str(tmp_path / "run"), epochs=4)
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_scorer", lambda *given, **more: folder.no_such_name)
        with pytest.raises(AttributeError) as failed:
            train.train(again)
    assert failed.traceback and len(train.train(again).history) == 4
    with pytest.raises(InputError, match="already holds files"):
        train.train(make_settings(out=str(tmp_path / "run")))
    assert len(train.train(make_settings(resume=str(tmp_path / "run"), epochs=5)).history) == 5
