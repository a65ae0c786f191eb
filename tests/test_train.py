"""The training loop from the outside: exact resume, clean Ctrl-C, the gradient it takes, refusal of bad input."""
import json
import os
import subprocess
import sys
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample
import train
from conftest import ROOT, cut, plain_descent, random_lora_policy
from ddpo_min import optimizer, rewards
from ddpo_min.ddim import ddim_steps, step_weights
from ddpo_min.ddpo import ddpo_update, even_emphasis
from ddpo_min.files import InputError, atomic
from ddpo_min.plan import Plan
from ddpo_min.policy import Policy
from ddpo_min.prompts import HELD_OUT, draw_prompts, find_prompts, held_out
from ddpo_min.rollout import sample_noise, sample_trajectories
from ddpo_min.settings import Settings
from ddpo_min.weights import load_stable_diffusion

TIMES = ("sampling_images_per_s", "training_images_per_s", "peak_memory_mb")
pytestmark = pytest.mark.usefixtures("plain_curve")


def arguments(model_file, out, *more, epochs=4):
    return ["--weights", str(model_file), "--preset", "laptop", "--samples", "8", "--updates", "2", "--steps", "3",
            "--epochs", str(epochs), "--eval-samples", "5", "--show-every", "2", "--device", "cpu", "--prompt-minimum",
            "2", "--out", str(out), *more]


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in (*TIMES, "version")} for line in lines]


@pytest.fixture(scope="module")
def finished(tiny_file, tmp_path_factory):
    """A run of four epochs that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.main(arguments(tiny_file, out))
    return out


def assert_same_run(a, b):
    ours, theirs = load_file(a / "lora.safetensors"), load_file(b / "lora.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metrics(a) == metrics(b)
    assert (a / "samples.png").read_bytes() == (b / "samples.png").read_bytes()
    assert (a / "samples.webp").read_bytes() == (b / "samples.webp").read_bytes()
    assert (a / "before_after.png").read_bytes() == (b / "before_after.png").read_bytes()


def test_a_resumed_run_is_the_uninterrupted_run_to_the_last_bit(finished, tiny_file, tmp_path):
    out = tmp_path / "halves"
    train.main(arguments(tiny_file, out, epochs=2))
    train.main(["--resume", str(out), "--epochs", "4"])
    assert_same_run(finished, out)


def test_ctrl_c_saves_everything_and_the_run_can_go_on(finished, tiny_file, tmp_path, monkeypatch):
    out, calls = tmp_path / "stopped", []

    def interrupted(images, prompts):
        calls.append(1)
        if len(calls) == 7:         # two groups for the evaluation before, two an epoch: this is the third epoch's
            raise KeyboardInterrupt
        return rewards.jpeg(images, prompts)

    monkeypatch.setitem(rewards.REWARDS, "jpeg", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped after epoch 2"):
        train.main(arguments(tiny_file, out))
    assert len(metrics(out)) == 2 and (out / "lora.safetensors").exists()
    monkeypatch.undo()
    train.main(["--resume", str(out), "--epochs", "4"])
    assert_same_run(finished, out)


def test_the_first_update_starts_at_ratio_one(finished):
    assert [line["max_ratio_error"] for line in metrics(finished)] == [0.0] * 4
    assert any(line["approx_kl"] > 0 for line in metrics(finished))


def test_the_run_learns_something_and_says_so(finished):
    state = load_file(finished / "lora.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in state.items() if "lora_B" in name)
    result = json.loads((finished / "result.json").read_text())
    assert result["epochs"] == 4 and result["reward_before"] != result["reward_after"]
    config = json.loads((finished / "config.json").read_text())
    assert config["steps"] == 3 and set(config) == {field.name for field in fields(Settings)} | {"version", "sha256"}


@pytest.mark.parametrize("algorithm, guidance, batch, weights", [
    ("ddpo_sf", 1.0, 8, "paper"), ("ddpo_is", 3.0, 3, "even")])
def test_an_update_takes_the_mean_gradient_over_samples_and_steps(tiny_file, algorithm, guidance, batch, weights):
    """With plain gradient descent at rate 1, the change of the LoRA is the policy gradient, written here by hand."""
    policy, parameters = random_lora_policy(tiny_file, guidance, 3)
    prompts, seeds = draw_prompts(find_prompts("animals"), 8, seed=0, epoch=0)
    trajectories = sample_trajectories(policy, prompts, seeds, cut(8, batch))
    advantages = torch.randn(8)

    objective, w = 0.0, step_weights(policy.steps)
    context = trajectories.context(slice(0, 8))
    for i in range(3):
        log_p, _ = policy.log_prob(trajectories.latents[:, i + 1], trajectories.latents[:, i], i, context)
        v = 1 if weights == "paper" else 3 / w[i] / sum(1 / x for x in w)
        objective = objective + v * (advantages * log_p).sum() / (8 * 3)
    expected = torch.autograd.grad(objective, parameters)
    before = [p.detach().clone() for p in parameters]
    ddpo_update(policy, plain_descent(parameters), trajectories, advantages, np.random.default_rng(0),
                plan=Plan(8, 1, batch, range(3)), clip_range=0.01 if algorithm == "ddpo_is" else None,
                emphasis=even_emphasis(policy.steps) if weights == "even" else [1.0] * 3)
    largest = max(g.abs().max() for g in expected)
    assert largest > 1e-4
    for p, old, gradient in zip(parameters, before, expected):
        assert (p.detach() - old - gradient).abs().max() < 1e-4 * largest + 1e-6


def test_timestep_fraction_trains_on_so_many_of_the_steps(tiny_file):
    policy, parameters = random_lora_policy(tiny_file, 1.0, 4)
    trajectories = sample_trajectories(policy, *draw_prompts(["a cat"], 4, seed=0, epoch=0), cut(4, 2))
    scored, eps = [], policy.eps
    policy.eps = lambda x_t, t, *rest: (scored.append(int(t)), eps(x_t, t, *rest))[1]
    ddpo_update(policy, plain_descent(parameters), trajectories, torch.ones(4), np.random.default_rng(0),
                plan=Plan(4, 2, 64, range(4), fraction=0.5), clip_range=0.01, emphasis=[1.0] * 4)
    assert len(scored) == 4 and len(set(scored[:2])) == 2 and len(set(scored[2:])) == 2


def test_prompts_are_drawn_evenly_and_seeds_never_meet_the_held_out_ones():
    prompts = find_prompts("animals")
    draw = partial(draw_prompts, prompts, 256)
    drawn, seeds = draw(seed=3, epoch=7)
    counts = [drawn.count(prompt) for prompt in prompts]
    assert len(prompts) == 45 and sum(counts) == 256 and max(counts) - min(counts) <= 1
    assert "an ant" in prompts and "a cat" in prompts
    assert draw(seed=3, epoch=7) == (drawn, seeds) != draw(seed=3, epoch=8)
    assert draw(seed=4, epoch=7) != (drawn, seeds)
    held = held_out(prompts, 1000)[1]
    assert HELD_OUT == min(held) and max(held) < 2 ** 31 <= min(seeds) and max(seeds) < 2 ** 32
    assert len(set(seeds)) == 256


def test_seeds_that_differ_draw_noise_that_differs():
    """torch keeps 32 bits of a seed: the three ranges must not meet there."""
    seeds = [0, 1, HELD_OUT, HELD_OUT + 1, *draw_prompts(["a cat"], 4, seed=0, epoch=0)[1]]
    noise = sample_noise(seeds, 1, (1, 2, 2)).flatten(1)
    assert len({tuple(row.tolist()) for row in noise}) == len(seeds)


def test_sample_writes_numbered_pictures_and_a_lora_at_scale_zero_changes_nothing(finished, tiny_file, tmp_path):
    lora = str(finished / "lora.safetensors")
    common = ["--weights", str(tiny_file), "--prompt", "a fox", "--num", "3", "--steps", "3", "--batch", "2"]
    sample.main([*common, "--out", str(tmp_path / "base")])
    sample.main([*common, "--out", str(tmp_path / "off"), "--lora", lora, "--scale", "0"])
    sample.main([*common, "--out", str(tmp_path / "on"), "--lora", lora, "--scale", "50"])
    names = ["0000.png", "0001.png", "0002.png"]
    base, off, on = ([(tmp_path / folder / name).read_bytes() for name in names] for folder in ("base", "off", "on"))
    assert base == off and len(set(base)) == 3
    assert all(a != b for a, b in zip(base, on))
    assert (tmp_path / "on" / "grid.png").exists()


@pytest.mark.parametrize("size, wanted", [("26x12", (26, 12)), ("12x20", (12, 20)), ("8", (8, 8)), (None, (16, 16))])
def test_sample_draws_pictures_of_the_size_asked_for(tiny_file, tmp_path, size, wanted):
    """Width first; the noise is that of a latent of this shape, so what is tall is no wide picture turned over."""
    given = [] if size is None else ["--size", size]
    sample.main(["--weights", str(tiny_file), "--prompt", "a fox", "--num", "1", "--steps", "2", "--device", "cpu",
                 "--out", str(tmp_path), *given])
    image = Image.open(tmp_path / "0000.png")
    assert image.size == wanted
    model = load_stable_diffusion(tiny_file)
    model.shape = (wanted[1] // 2, wanted[0] // 2)
    drawn = sample_trajectories(Policy(model, ddim_steps(2), 2.0), ["a fox"], [0], cut(1, 1), keep="images")
    assert np.array_equal(np.asarray(image), drawn.images[0])


@pytest.mark.parametrize("size, words", [
    ("31x16", "--size 31x16: expected WIDTHxHEIGHT in pixels, multiples of 2"), ("16x31", "multiples of 2"),
    ("0", "--size 0: expected WIDTHxHEIGHT"), ("16x", "expected WIDTHxHEIGHT"), ("16x16x16", "expected WIDTHxHEIGHT"),
    ("-16x16", "expected WIDTHxHEIGHT"), ("wide", "expected WIDTHxHEIGHT")])
def test_sizes_that_cannot_be_drawn_are_refused(tiny_file, tmp_path, size, words):
    with pytest.raises(InputError, match=words):
        sample.main(["--weights", str(tiny_file), "--prompt", "a fox", f"--size={size}", "--device", "cpu",
                     "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_sample_draws_num_pictures_for_every_line_of_a_file(tiny_file, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n\na cow\n")
    sample.main(["--weights", str(tiny_file), "--prompts", str(tmp_path / "prompts.txt"), "--num", "2", "--steps", "2",
                 "--out", str(tmp_path / "out")])
    assert sorted(p.name for p in (tmp_path / "out").glob("0*.png")) == [f"{i:04d}.png" for i in range(4)]


@pytest.mark.parametrize("wrong,named", [
    (["--reward", "beauty"], "beauty"), (["--preset", "huge"], "huge"), (["--algorithm", "grpo"], "grpo"),
    (["--samples", "10", "--updates", "4"], "--samples 10"), (["--prompt-minimum", "40"], "--prompt-minimum 40"),
    (["--eta", "0"], "--eta"), (["--steps", "501"], "--steps 501"), (["--epochs", "0"], "--epochs 0"),
    (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"), (["--timestep-fraction", "1.5"], "--timestep-fraction"),
    (["--device", "tpu"], "tpu"), (["--dtype", "float64"], "float64"),
    (["--algorithm", "ddpo_sf", "--updates", "4"], "ddpo_sf"),
    (["--prompts", "nowhere.txt"], "nowhere.txt"), (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
    (["--resume", "nowhere"], "nowhere"), (["--lr", "fast"], "fast"), (["--colour", "red"], "--colour"),
    (["--epoch", "3"], "--epoch"),
])
def test_bad_input_is_one_line_that_names_it(wrong, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        train.main(wrong)
    except InputError as error:
        message = str(error)
    except SystemExit as stop:
        assert stop.code == 2
        message = capsys.readouterr().err.strip()
    assert named in message and "\n" not in message
    assert not (tmp_path / "runs").exists()


def test_prompt_files_that_are_empty_or_no_text_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x9f")
    for name in ("empty.txt", "binary.txt"):
        with pytest.raises(InputError, match=name):
            find_prompts(str(tmp_path / name))


def test_a_bad_reward_ends_the_run_with_the_finished_epochs_saved(tiny_file, tmp_path, monkeypatch):
    calls = []

    def breaks(images, prompts):
        calls.append(1)
        return np.full(len(images), np.nan if len(calls) == 5 else 1.0) + np.arange(len(images))

    monkeypatch.setitem(rewards.REWARDS, "jpeg", breaks)
    with pytest.raises(InputError, match="nan"):
        train.main(arguments(tiny_file, tmp_path / "run"))
    assert len(metrics(tmp_path / "run")) == 1 and (tmp_path / "run" / "state.pt").exists()


def test_a_command_line_mistake_exits_with_status_2_and_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--weights", "no.safetensors"], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no.safetensors" in done.stderr


def test_an_existing_folder_is_not_written_over(finished, tiny_file):
    before = (finished / "lora.safetensors").read_bytes()
    with pytest.raises(InputError, match="--resume"):
        train.main(arguments(tiny_file, finished))
    with pytest.raises(InputError, match="--lr"):
        train.main(["--resume", str(finished), "--lr", "0.1"])
    assert (finished / "lora.safetensors").read_bytes() == before


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_evaluation_that_fails_between_costs_no_epoch(tiny_file, tmp_path, capsys):
    """Its reward is called twice before, in an epoch and in an evaluation: the fifth call is an evaluation's."""
    (tmp_path / "fails.py").write_text("calls = []\n\n\ndef fifth(images, prompts):\n    calls.append(1)\n"
                                       "    if len(calls) == 5:\n        raise OSError('no answer')\n"
                                       "    return images.mean((1, 2, 3))\n")
    train.main(arguments(tiny_file, tmp_path / "out", "--reward", f"{tmp_path}/fails.py:fifth", "--eval-every", "1",
                         epochs=2))
    first, second = metrics(tmp_path / "out")
    assert "eval_reward" not in first and second["eval_reward"] > 0 and second["epoch"] == 2
    assert "no evaluation this time: " in "".join(capsys.readouterr())


def test_an_evaluation_that_is_not_finite_ends_the_run_at_the_last_good_epoch(tiny_file, tmp_path, monkeypatch):
    """Else the weights that overflow would replace those that did not."""
    step, count = optimizer.Optimizer.step, []

    def breaks(own):
        norm = step(own)
        count.append(norm)
        if len(count) == 4:         # the last step of the second epoch
            own.parameters[-1].data[:] = float("nan")
        return norm

    monkeypatch.setattr(optimizer.Optimizer, "step", breaks)
    with pytest.raises(InputError, match="not finite numbers.*1 finished epochs are saved"):
        train.main(arguments(tiny_file, tmp_path / "out", "--eval-every", "1", epochs=3))
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    assert state["epoch"] == 1 and all(tensor.isfinite().all() for tensor in state["learner"]["parameters"].values())


def test_a_mistake_of_the_code_is_raised_as_it_is(tiny_file, tmp_path, monkeypatch):
    """It is no bad input; the epochs before it are saved all the same."""
    step, count = optimizer.Optimizer.step, []

    def breaks(own):
        count.append(own)
        if len(count) == 4:         # the last step of the second epoch
            raise RuntimeError("a mistake of the code")
        return step(own)

    monkeypatch.setattr(optimizer.Optimizer, "step", breaks)
    with pytest.raises(RuntimeError, match="^a mistake of the code$"):
        train.main(arguments(tiny_file, tmp_path / "out", epochs=3))
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    own, saved = state["learner"]["parameters"], load_file(tmp_path / "out" / "lora.safetensors")
    assert state["epoch"] == 1 and all(torch.equal(saved[name], p) for name, p in own.items())
