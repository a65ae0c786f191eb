"""Rewards of a user's own that misbehave: the same training as without that, or one line that says what to do."""
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT
from ddpo_min import figures, scorer
from ddpo_min.cli import make_settings
from ddpo_min.files import InputError
from ddpo_min.prompts import find_prompts
from ddpo_min.rewards import find_own, put_back, score
from ddpo_min.rollout import sample_noise
from test_train import arguments, metrics

IMAGES = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
PROMPTS = ["a cat", "a dog", "a fox"]

# Everything that the whole program shares, changed; at import and in every call
VANDAL = """
import argparse, os, random, sys
import numpy as np, torch

def change_everything():
    os.chdir("/")
    sys.argv = ["mine"]
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(7)

argparse.ArgumentParser().parse_args()
change_everything()
torch.set_num_threads(torch.get_num_threads() + 1)

def red(images, prompts):
    change_everything()
    values = images.mean((1, 2, 3))
    images[:] = 0
    prompts[:] = ["nothing"] * len(prompts)
    print("scored")
    return values
"""
TAME = "def red(images, prompts):\n    return images.mean((1, 2, 3))\n"


def shared():
    """What the whole program shares."""
    return (os.getcwd(), list(sys.argv), torch.is_grad_enabled(), torch.get_default_dtype(),
            torch.get_default_device(), torch.get_num_threads())


def written(folder, text, name="mine"):
    path = folder / f"{name}.py"
    path.write_text(text)
    return str(path)


def refused(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_reward_that_changes_everything_trains_as_one_that_does_not(tiny_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--reward", "x"])
    before = shared()
    for name, text in (("tame", TAME), ("vandal", VANDAL)):
        reward = f"{written(tmp_path, text, f'of_{name}')}:red"
        train.main(arguments(tiny_file, name, "--reward", f"{reward}=1,jpeg=0.5", "--watch", "incompressible",
                             epochs=2))
        assert shared() == before
    tame, vandal = ([[value for _, value in sorted(line.items())] for line in metrics(Path(name))]
                    for name in ("tame", "vandal"))
    assert tame == vandal and len(tame) == 2
    tame, vandal = (load_file(f"{name}/lora.safetensors") for name in ("tame", "vandal"))
    assert all(torch.equal(tame[name], vandal[name]) for name in tame) and tame.keys() == vandal.keys()


def test_the_noise_is_the_same_whatever_the_defaults_of_torch_are_meanwhile():
    expected = sample_noise([3, 2 ** 32 - 1], 1, (1, 2, 2))
    with put_back():
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        assert torch.equal(sample_noise([3, 2 ** 32 - 1], 1, (1, 2, 2)), expected)


def test_pictures_prompts_and_program_are_the_same_for_the_reward_after_a_vandal():
    prompts = list(PROMPTS)

    def vandal(images, prompts):
        images[:] = 0
        prompts.clear()
        return [1, 2, 3]

        torch.set_num_threads(torch.get_num_threads() + 1)
        os.chdir("/")
        return [1, 2, 3]

    images, before = IMAGES.copy(), shared()
    score(vandal, images, prompts)
    assert (images == IMAGES).all() and prompts == PROMPTS and shared() == before


@pytest.mark.parametrize("result", [
    [1, 2.5, True], (1, 2, 3), np.array([1, 2, 3], np.float16), torch.tensor([1.0, 2, 3], requires_grad=True),
    torch.tensor([1, 2, 3], dtype=torch.bfloat16), [torch.tensor(1), torch.tensor(2.0), 3], np.array([1, 0, 1]) > 0])
def test_numbers_of_all_kinds_are_taken(result):
    expected = [float(value) for value in (result.detach() if isinstance(result, torch.Tensor) else result)]
    got = score(lambda images, prompts: result, IMAGES, PROMPTS)
    assert got.dtype == np.float64 and got.tolist() == expected


@pytest.mark.parametrize("result,named", [
    ((np.zeros(3), {}), "a tuple of"), ([1, 2], "a list of shape (2,)"), (np.zeros((3, 1)), "shape (3, 1)"),
    ([1, None, 2], "type object"), (None, "a NoneType"), (1.0, "a float of shape ()"), ("abc", "a str of shape ()"),
    (["1", "2", "3"], "a list of shape (3,) and type <U1"), ([[1], [2, 3], []], "a list of parts"),
    (np.array([1, 2j, 3]), "type complex128"), (torch.tensor([1, 2j, 3]), "type complex64"),
    ({"a": 1}, "a dict of"), (np.array(["x"] * 3, object), "type object")])
def test_what_is_not_one_number_for_each_picture_is_one_line(result, named):
    message = refused(score, lambda images, prompts: result, IMAGES, PROMPTS, "reward mine.py:f", 6)
    assert message.startswith("reward mine.py:f returned ") and named in message
    assert "images 6 to 8, the first for the prompt 'a cat'" in message and "shape (3,)" in message


@pytest.mark.parametrize("bad,named", [(np.nan, "nan"), (-np.inf, "-inf"), (1e301, "1e+301")])
def test_numbers_that_are_none_or_too_large_name_their_pictures(bad, named):
    message = refused(score, lambda images, prompts: [1, bad, 3], IMAGES, PROMPTS, "reward f", 6)
    assert message == (f"reward f is {named} for 1 of 3 images; by their number in the epoch: 7 ('a dog'); expected "
                       "numbers, at most 1e+300")


@pytest.mark.parametrize("code,named", [
    ("raise KeyError('lost\\nmore')", "KeyError: 'lost"), ("sys.exit(0)", "SystemExit: 0"), ("exit()", "SystemExit"),
    ("argparse.ArgumentParser().parse_args(['-x'])", "SystemExit: 2"), ("open('/no/such')", "FileNotFoundError"),
    ("assert False", "AssertionError: no message"), ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
    ("raise OSError('\\x1b[31mred')", "OSError: [31mred")])
def test_a_reward_that_raises_or_exits_names_its_line(code, named, tmp_path):
    path = written(tmp_path, f"import argparse, sys\n\n\ndef bad(images, prompts):\n    {code}\n")
    message = refused(score, find_own(f"{path}:bad"), IMAGES, PROMPTS, "reward bad")
    assert "reward bad failed on images 0 to 2, the first for the prompt 'a cat'" in message
    assert f"in line 5 of {path} ({named}" in message


@pytest.mark.parametrize("code,named", [
    ("import sys\nsys.exit(0)", "SystemExit: 0"), ("1 / 0", "ZeroDivisionError"),
    ("import argparse\np = argparse.ArgumentParser()\np.add_argument('needed')\np.parse_args()", "SystemExit: 2")])
def test_a_file_that_exits_or_raises_when_imported_is_one_line(code, named, tmp_path):
    path = written(tmp_path, code + "\n\n\n" + TAME)
    before = shared()
    message = refused(find_own, f"{path}:red")
    assert path in message and named in message and ("__main__" in message) == ("SystemExit" in named)
    assert shared() == before


def test_a_reward_that_exits_ends_the_run_with_the_finished_epochs_saved(tiny_file, tmp_path):
    path = written(tmp_path, "import sys\ncalls = []\n\n\ndef bad(images, prompts):\n    calls.append(1)\n"
                             "    return sys.exit(0) if len(calls) == 5 else images.mean((1, 2, 3))\n")
    message = refused(train.main, arguments(tiny_file, tmp_path / "run", "--reward", f"{path}:bad"))
    assert "SystemExit: 0" in message and f"go on with --resume {tmp_path / 'run'}" in message
    assert len(metrics(tmp_path / "run")) == 1
    again = ["--resume", str(tmp_path / "run"), "--reward", f"{path}:bad", "--epochs", "2"]
    train.main(again)       # its fifth call in this program is over
    assert len(metrics(tmp_path / "run")) == 2


# Rewards that teach nothing, of an odd scale, or only watched

def test_a_watched_reward_that_fails_is_left_out_said_once_and_back_when_it_works(tiny_file, tmp_path, capsys):
    """Called twice in an evaluation and in an epoch: it fails in the first and second epoch and works in the third."""
    path = written(tmp_path, "calls = []\n\n\ndef bad(images, prompts):\n    calls.append(1)\n"
                             "    return 1 / (len(calls) not in (4, 5)) * images.mean((1, 2, 3))\n")
    out = tmp_path / "run"
    train.main(arguments(tiny_file, out, "--watch", f"{path}:bad", epochs=3))
    assert [f"score_{path}:bad" in line for line in metrics(out)] == [False, False, True]
    said = "".join(capsys.readouterr())
    assert said.count("ZeroDivisionError") == 1 and "it is only watched" in said
    assert list(json.loads((out / "result.json").read_text())["scores"]) == [f"{path}:bad"]
    assert (out / "curve.png").exists()
    (tmp_path / "mine.py").unlink()
    assert "--watch" in refused(train.main, ["--resume", str(out)])
    train.main(["--resume", str(out), "--watch", ""])


def test_one_that_failed_before_training_is_missing_in_the_result_but_not_in_the_log(tiny_file, tmp_path):
    path = written(tmp_path, "calls = []\n\n\ndef bad(images, prompts):\n    calls.append(1)\n"
                             "    return images.mean((1, 2, 3)) if len(calls) > 1 else [None]\n")
    train.main(arguments(tiny_file, tmp_path / "run", "--watch", f"{path}:bad", epochs=1))
    assert metrics(tmp_path / "run")[0][f"score_{path}:bad"] > 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["scores"] == {}


def test_a_failure_in_the_last_evaluation_leaves_curve_and_advice_that_holds(tiny_file, tmp_path):
    path, out = tmp_path / "mine.py", tmp_path / "run"
    written(tmp_path, "calls = []\n\n\ndef bad(images, prompts):\n    calls.append(1)\n"
                      "    return images.mean((1, 2, 3)) if len(calls) != 5 else [None]\n")
    message = refused(train.main, arguments(tiny_file, out, "--reward", f"{path}:bad", epochs=1))
    assert message.endswith(f"; 1 finished epochs are saved, go on with --resume {out} --reward {path}:bad")
    assert (out / "curve.png").exists() and not (out / "result.json").exists()
    train.main(["--resume", str(out), "--reward", f"{path}:bad"])
    assert (out / "result.json").exists() and (out / "before_after.png").exists()


def test_a_reward_whose_file_has_changed_is_said_at_every_resume(tiny_file, tmp_path, capsys):
    path, out = written(tmp_path, TAME), str(tmp_path / "run")
    train.main(arguments(tiny_file, out, "--reward", f"{path}:red=1,jpeg=1", epochs=1))
    for text, said in ((TAME, 0), (TAME + "# other\n", 1), (TAME + "# other\n", 1)):
        capsys.readouterr()
        written(tmp_path, text)
        train.main(["--resume", out, "--reward", f"{path}:red=1,jpeg=1"])
        assert capsys.readouterr().out.count(f"{path}:red: its file has changed since the run began") == said


def test_a_reward_that_takes_long_is_named_once(monkeypatch, capsys):
    monkeypatch.setattr(scorer, "PATIENCE", 0.05)
    release = threading.Event()
    slow = scorer.Scorer({"mine.py:slow": 1.0}, {"mine.py:slow": lambda images, prompts: (release.wait(), [1.0])[1]})
    threading.Timer(0.3, release.set).start()
    slow.add(IMAGES[:1], PROMPTS[:1], 0)
    assert slow.collect()[0].tolist() == [1]
    assert capsys.readouterr().out.count("reward mine.py:slow: no answer for 0.05 s; if it hangs, press Ctrl-C") == 1
    slow.add(IMAGES[:1], PROMPTS[:1], 0)
    slow.collect()
    assert capsys.readouterr().out == ""


def test_a_command_whose_reward_hangs_ends_with_ctrl_c():
    code = ("import threading; from concurrent.futures import ThreadPoolExecutor; from ddpo_min.files import run_main\n"
            "def main():\n    print('said')\n    ThreadPoolExecutor().submit(threading.Event().wait)\n"
            "    raise KeyboardInterrupt\nrun_main(main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "said\n", "stopped\n")


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e10, 1e297])
def test_rewards_of_any_scale_are_printed_and_written_readably(tiny_file, tmp_path, scale, capsys):
    out, pictures = tmp_path / "run", []

    def reward(images, prompts):
        pictures.append(images.mean((1, 2, 3)))
        return scale * pictures[-1]

    train.train(train.read_settings(arguments(tiny_file, out, "--eval-every", "1", epochs=1)), reward=reward)
    line, result = metrics(out)[0], json.loads((out / "result.json").read_text())
    assert line["reward_std"] == pytest.approx(scale * np.std(np.concatenate(pictures[2:4])))
    assert result["reward_std_before"] == pytest.approx(scale * np.std(np.concatenate(pictures[:2])))
    assert not {"Infinity", "NaN"} & set(" ".join(path.read_text() for path in out.glob("*.json*")).split())
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) < 300 and "reward 0.000" not in said and "inf" not in said


@pytest.mark.parametrize("value,text", [(0, "0.000"), (1.2345, "1.234"), (-0.5, "-0.500"), (1e-9, "1e-09"),
                                        (-4.56e-4, "-0.000456"), (123456.7, "123456.700"), (-1e300, "-1e+300")])
def test_a_number_is_short_at_any_scale(value, text):
    assert figures.number(value) == text


def test_a_reward_that_never_differs_is_said_at_the_start_and_every_epoch(tiny_file, tmp_path, capsys):
    def constant(images, prompts):
        return [1.0] * len(images)

    run = train.train(train.read_settings(arguments(tiny_file, tmp_path / "run", epochs=2)), reward=constant)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in said if line.endswith("all rewards are equal")] == [
        "", "epoch", "epoch"]
    assert run.history[0]["reward_std"] == 0
    train.main(arguments(tiny_file, tmp_path / "jpeg", epochs=1))
    assert "all rewards are equal" not in capsys.readouterr().out


def test_one_sample_has_nothing_to_be_compared_with(tmp_path):
    message = refused(train.main, ["--samples", "1", "--updates", "1", "--normalise", "epoch", "--out",
                                   str(tmp_path / "x")])
    assert message.startswith("--samples 1: nothing to compare it with") and not (tmp_path / "x").exists()


# Captions and prompts

def test_captions_begin_with_the_number_and_end_where_their_picture_ends():
    """Long captions on white pictures: where a picture and its gap end, the next caption's first pixels begin."""
    white = np.full((2, 128, 128, 3), 255, np.uint8)
    long = "-12.34  a hedgehog washing dishes beside a kangaroo playing chess"
    strip = np.asarray(figures.grid([white], [[long, long]]).convert("L"))[figures.GAP + 128:]
    first, second = strip[:, figures.GAP:][:, :132], strip[:, figures.GAP + 132:][:, :132]
    assert (first == second).all() and first.min() < 100        # nothing of the first reaches into the second
    assert (strip[:, figures.GAP + 128:][:, :figures.GAP] == 255).all()
    font = figures.ImageFont.load_default(11)
    text = figures.cut_to(long, 128, font)
    assert text.startswith("-12.34  a hedgehog") and text.endswith("...") and font.getlength(text) <= 128
    assert figures.cut_to("-1.63  a cat", 128, font) == "-1.63  a cat" and figures.cut_to(long, 3, font) == "..."


def test_a_prompt_ends_where_its_line_ends(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\na\u2028dog \r\n\na\x0cfox\na\x85b\x1cc\ra [red] cow\n".encode())
    assert find_prompts(str(path)) == ["a cat", "a\u2028dog", "a\x0cfox", "a\x85b\x1cc", "a [red] cow"]


@pytest.mark.parametrize("text", ['["a cat", "a dog"]', '[\n "a cat",\n "a dog"\n]\n', '{"prompts": ["a cat"]}',
                                  '{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "[]"])
def test_a_json_file_is_no_file_of_prompts(text, tmp_path):
    (tmp_path / "prompts.json").write_text(text)
    message = refused(find_prompts, str(tmp_path / "prompts.json"))
    assert "a JSON file; expected a text file, one prompt a line" in message


@pytest.mark.parametrize("part", [torch.tensor(1.5, requires_grad=True), torch.tensor([1.5], dtype=torch.bfloat16)])
def test_a_list_of_single_tensors_is_a_list_of_numbers(part):
    assert score(lambda images, prompts: [part] * 3, np.zeros((3, 4, 4, 3), np.uint8), ["a"] * 3).tolist() == [1.5] * 3


def test_a_run_from_python_resumes_with_its_own_function_only(tiny_file, tmp_path):
    def one(images, prompts):
        return images[:, 0, 0, 0]

    def other(images, prompts):
        return images[:, 0, 0, 0]

    folder = train.train(train.read_settings(arguments(tiny_file, tmp_path / "run", epochs=1)), reward=one).folder
    with pytest.raises(InputError, match="reward other: the run in .* was trained on one; give that function"):
        train.train(make_settings(resume=folder, epochs=2), reward=other)
    assert train.train(make_settings(resume=folder, epochs=2), reward=one).finished == 2


def test_a_function_with_the_name_of_another_reward_is_trained_on_and_that_one_watched(tiny_file, tmp_path):
    def jpeg(images, prompts):
        return images.mean((1, 2, 3))

    given = dict(weights=str(tiny_file), preset="laptop", epochs=1, samples=4, updates=1, steps=2, eval_samples=2)
    run = train.train(make_settings(**given, watch="jpeg", out=str(tmp_path / "run")), reward=jpeg)
    assert run.settings.reward == "own_jpeg"
    assert run.history[0]["reward_mean"] > 0 > run.history[0]["score_jpeg"]


def test_an_edited_file_is_run_anew_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    """Also within a second, where Python's own cache of the file would not see it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file, written = tmp_path / "edited.py", time.time_ns()
    for scale in (1, 2):
        file.write_text(f"def red(images, prompts):\n    return {scale} * images.mean((1, 2, 3))\n")
        os.utime(file, ns=(written, written))
        reward = find_own(f"{file}:red")
        assert reward(IMAGES, PROMPTS).tolist() == (scale * IMAGES.mean((1, 2, 3))).tolist()
        assert find_own(f"{file}:red") is reward and sys.modules["edited"].red is reward
    assert sys.path.count(str(tmp_path)) == 1


def test_a_file_that_is_called_like_a_module_leaves_that_module(tmp_path):
    for name in ("time", "json"):       # one is built in
        (tmp_path / f"{name}.py").write_text(TAME)
        assert find_own(f"{tmp_path}/{name}.py:red")(IMAGES, PROMPTS).shape == (3,)
        assert not hasattr(sys.modules[name], "red")


@pytest.mark.parametrize("gpu", [None, 3])
def test_a_reward_finds_its_processes_gpu_in_the_thread_that_scores(gpu, monkeypatch):
    chosen, own = {}, lambda images, prompts: [chosen.get(threading.get_ident(), -1)] * len(images)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: chosen.update({threading.get_ident(): number}))
    scores = scorer.Scorer({"own": 1.0}, {"own": own}, gpu=gpu)
    scores.add(IMAGES, PROMPTS, 0)
    assert scores.collect()[0].tolist() == [-1 if gpu is None else 3] * 3


@pytest.mark.parametrize("device, gpu", [("cpu", None), ("cuda", None), ("cuda:1", 1)])
def test_the_gpu_is_the_one_that_the_process_has_picked(device, gpu, monkeypatch):
    made = []
    monkeypatch.setattr(scorer, "Scorer", lambda *given, **more: made.append(more))
    scorer.make_scorer("jpeg", "", None, torch.device(device), prompts=PROMPTS, small=True, clip={}, files={},
                       vlm={})
    assert made == [dict(total="jpeg", gpu=gpu)]


def test_threads_that_score_at_once_leave_the_folder_as_it_was(tmp_path, monkeypatch):
    """vlm is scored in several threads, and its encoder may go to another folder."""
    monkeypatch.chdir(tmp_path)
    away, second, back = (threading.Event() for _ in range(3))

    def reward(images, prompts):
        if away.is_set():
            second.set()
            assert back.wait(20)        # what this thread puts back now, it saw while the other was away
        else:
            with put_back():
                os.chdir("/")
                away.set()
                assert second.wait(20)
            back.set()
        return [1.0] * len(images)

    s = scorer.Scorer({"vlm": 1.0}, {"vlm": reward})
    for _ in range(2):
        s.add(np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"], 0)
        assert away.wait(20)
    assert s.collect()[0].tolist() == [1.0] * 4 and Path.cwd() == tmp_path
