"""Rewards of a user's own that misbehave: the same training as without that, or one line that says what to do."""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from ddpo_min.files import InputError
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
    torch.set_num_threads(torch.get_num_threads() + 1)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(7)

argparse.ArgumentParser().parse_args()
change_everything()

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


def test_pictures_and_prompts_are_the_same_for_the_reward_after_a_vandal():
    prompts = list(PROMPTS)

    def vandal(images, prompts):
        images[:] = 0
        prompts.clear()
        return [1, 2, 3]

    images = IMAGES.copy()
    score(vandal, images, prompts)
    assert (images == IMAGES).all() and prompts == PROMPTS


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
    (np.array([1, 2j, 3]), "type complex128"), ({"a": 1}, "a dict of"), (np.array(["x"] * 3, object), "type object")])
def test_what_is_not_one_number_for_each_picture_is_one_line(result, named):
    message = refused(score, lambda images, prompts: result, IMAGES, PROMPTS, "reward mine.py:f", 6)
    assert message.startswith("reward mine.py:f returned ") and named in message
    assert "images 6 to 8 of the epoch, the first of 'a cat'" in message and "shape (3,)" in message


@pytest.mark.parametrize("bad,named", [(np.nan, "nan"), (-np.inf, "-inf"), (1e301, "1e+301")])
def test_numbers_that_are_none_or_too_large_name_their_pictures(bad, named):
    message = refused(score, lambda images, prompts: [1, bad, 3], IMAGES, PROMPTS, "reward f", 6)
    assert message == (f"reward f is {named} for 1 of 3 images; by their number in the epoch: 7 ('a dog'); expected "
                       "numbers, at most 1e+300")


@pytest.mark.parametrize("code,named", [
    ("raise KeyError('lost\\nmore')", "KeyError: 'lost"), ("sys.exit(0)", "SystemExit: 0"), ("exit()", "SystemExit"),
    ("argparse.ArgumentParser().parse_args(['-x'])", "SystemExit: 2"), ("open('/no/such')", "FileNotFoundError"),
    ("assert False", "AssertionError: no message")])
def test_a_reward_that_raises_or_exits_names_its_line(code, named, tmp_path):
    path = written(tmp_path, f"import argparse, sys\n\n\ndef bad(images, prompts):\n    {code}\n")
    message = refused(score, find_own(f"{path}:bad"), IMAGES, PROMPTS, "reward bad")
    assert "reward bad failed on images 0 to 2 of the epoch, the first of 'a cat'" in message
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
    train.main(["--resume", str(tmp_path / "run"), "--epochs", "2"])        # its fifth call in this program is over
    assert len(metrics(tmp_path / "run")) == 2
