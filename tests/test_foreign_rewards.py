"""Rewards that were written for TRL's or ddpo-pytorch's trainers run unchanged; those of ours stay ours."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from ddpo_min import rewards
from ddpo_min.cli import make_settings
from ddpo_min.files import InputError
from ddpo_min.rewards import adapt, score
from ddpo_min.scorer import find_reward
from test_train import arguments, metrics

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
PROMPTS = ["a cat", "a dog", "a fox"]

# The JPEG size as those trainers' users write it: a float tensor or a uint8 array, pictures of each in PIL's form
THEIRS = """
import io

import numpy as np
import torch
from PIL import Image


def kilobytes(images):
    if isinstance(images, torch.Tensor):
        images = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy().transpose(0, 2, 3, 1)
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return np.array(sizes)


def trl(images, prompts, prompt_metadata):
    return torch.as_tensor(-kilobytes(images)), {}


def made():
    def _fn(images, prompts, metadata):
        return -kilobytes(images), {"sizes": kilobytes(images)}

    return _fn


def made_on(device):
    return lambda images, prompts, metadata, *more: (-kilobytes(images), {}) if device == images.device else None


class Made:
    def __call__(self, images, prompts, metadata=None):
        return list(-kilobytes(images)), None
"""


@pytest.fixture
def theirs(tmp_path):
    (tmp_path / "theirs.py").write_text(THEIRS)
    return f"{tmp_path / 'theirs.py'}:"


@pytest.mark.parametrize("name", ["trl", "made", "made_on", "Made"])
def test_it_gives_what_our_own_gives(theirs, name, capsys):
    reward = find_reward(theirs + name, device=torch.device("cpu"))
    assert score(reward, IMAGES, PROMPTS).tolist() == rewards.jpeg(IMAGES, PROMPTS).tolist()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{name}: called as in TRL and ddpo-pytorch" in said


def test_what_it_is_given_is_what_those_trainers_give():
    given = []

    def reward(images, prompts, metadata):
        given.append((images, prompts, metadata))
        return images.mean((1, 2, 3)), {"anything": 1}

    values = score(adapt(reward), IMAGES, PROMPTS)
    (images, prompts, metadata), = given
    assert images.dtype == torch.float32 and images.shape == (3, 3, 8, 6) and images.is_contiguous()
    expected = np.stack([[np.asarray(Image.fromarray(image).getchannel(c)) for c in "RGB"] for image in IMAGES]) / 255
    assert np.abs(images.numpy() - expected).max() < 1e-7 and images.max() <= 1
    assert prompts == tuple(PROMPTS) and metadata == ({}, {}, {}) and metadata[0] is not metadata[1]
    assert np.abs(values - IMAGES.mean((1, 2, 3)) / 255).max() < 1e-6
    assert (images * 255).round().to(torch.uint8).numpy().transpose(0, 2, 3, 1).tobytes() == IMAGES.tobytes()


def test_it_gets_its_pictures_on_the_training_device():
    where = []
    score(adapt(lambda images, prompts, metadata: (where.append(images.device.type), ([1, 2, 3], {}))[1], "x", "meta"),
          IMAGES, PROMPTS)
    assert where == ["meta"]


@pytest.mark.parametrize("reward", [
    lambda images, prompts: [1] * len(images), lambda *both: [1] * len(both[0]),
    lambda images, prompts, strength=1: [strength] * len(images),
    lambda images, prompts, *, metadata=None: [1] * len(images), max])
def test_one_of_ours_stays_as_it_is(reward, capsys):
    assert adapt(reward) is reward and capsys.readouterr().out == ""


def test_a_run_on_theirs_is_the_run_on_ours_and_notices_a_change_of_its_file(theirs, tiny_file, tmp_path, capsys):
    train.main(arguments(tiny_file, tmp_path / "ours", epochs=2))
    train.main(arguments(tiny_file, tmp_path / "theirs", "--reward", theirs + "made", epochs=2))
    assert metrics(tmp_path / "ours") == metrics(tmp_path / "theirs")
    ours, other = (load_file(tmp_path / name / "lora.safetensors") for name in ("ours", "theirs"))
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    for text, said in ((THEIRS, 0), (THEIRS + "# other\n", 1)):
        (tmp_path / "theirs.py").write_text(text)
        capsys.readouterr()
        train.main(["--resume", str(tmp_path / "theirs"), "--reward", theirs + "made"])
        assert capsys.readouterr().out.count("its file has changed since the run began") == said


def test_from_python_too(tiny_file, tmp_path):
    def both(images, prompts, metadata):
        return images.mean((1, 2, 3)), {}

    settings = make_settings(weights=tiny_file, preset="laptop", samples=8, updates=2, steps=3, epochs=1,
                             eval_samples=5, prompt_minimum=2, device="cpu", out=tmp_path / "run")
    train.train(settings, reward=both)
    assert 0 < json.loads((tmp_path / "run" / "result.json").read_text())["reward_before"] < 1


@pytest.mark.parametrize("code, named", [
    ("def f(images, prompts, metadata):\n    return 1 / 0, {}", r"failed on images 0 to 2.*in line 2 of .*mine.py "
     r"\(ZeroDivisionError"),
    ("def f(images, prompts, metadata):\n    return metadata[0]['question'], {}", "KeyError"),
    ("def f(images, prompts, metadata):\n    return [1, 2], {}", r"expected one real number for each image"),
    ("def f(images, prompts, metadata):\n    return {}", "returned a dict"),
    ("def f():\n    return 3", r"takes no pictures and makes no reward; expected parameters \(images, prompts\)"),
    ("def f():\n    raise OSError('no GPU')", "called to make the reward, and failed \\(OSError: no GPU\\)"),
    ("def f(device):\n    exit(3)", r"failed \(SystemExit: 3\)")])
def test_one_that_fails_is_one_line(tmp_path, code, named):
    (tmp_path / "mine.py").write_text(code + "\n")
    with pytest.raises(InputError, match=named) as caught:
        score(find_reward(f"{tmp_path / 'mine.py'}:f"), IMAGES, PROMPTS)
    assert str(caught.value).isprintable()


def test_a_pair_of_numbers_for_two_pictures_is_not_taken_for_rewards_and_info():
    with pytest.raises(InputError, match="returned a float of shape"):
        score(adapt(lambda images, prompts, metadata: (1.0, 2.0)), IMAGES[:2], PROMPTS[:2])
