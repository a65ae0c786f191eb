"""--stop-when: a run ends when a second reward falls below a bound on the held-out seeds, and keeps the last above."""
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import train
from ddpo_min import run
from ddpo_min.cli import read_settings
from ddpo_min.files import InputError
from test_train import arguments, assert_same_run, metrics

FALLS = [0.84, 0.8, 0.7, 0.6, 0.5]       # of the watched reward, after each epoch
pytestmark = pytest.mark.usefixtures("plain_curve")


@pytest.fixture
def falling(monkeypatch):
    """Evaluations between epochs: the watched reward falls, the trained one rises."""
    def evaluate(own):
        n = len(own.history)
        return dict(eval_reward=-5.0 + n, eval_score_incompressible=FALLS[n])

    monkeypatch.setattr(run.Run, "evaluate_between", evaluate)


def stopping(tiny_file, out, bound, *more, epochs=5):
    train.main(arguments(tiny_file, out, "--watch", "incompressible", "--eval-every", "1", "--stop-when",
                         f"incompressible{bound}", *more, epochs=epochs))


def same(a, b):
    one, other = load_file(a), load_file(b)
    return all(torch.equal(one[name], other[name]) for name in one)


def story(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["ddpo_min"])


def test_the_run_ends_below_the_bound_and_keeps_the_last_lora_above_it(tiny_file, tmp_path, falling, capsys):
    out = tmp_path / "run"
    stopping(tiny_file, out, "<0.7", "--keep-every", "1")       # 0.7 itself is not below it
    assert [line["eval_score_incompressible"] for line in metrics(out)] == FALLS[:4]
    assert same(out / "lora_above.safetensors", out / "lora_0003.safetensors")
    assert same(out / "lora.safetensors", out / "lora_0004.safetensors")
    assert not same(out / "lora.safetensors", out / "lora_above.safetensors")
    assert story(out / "lora_above.safetensors")["epochs"] == 3
    said = capsys.readouterr().out
    assert (f"--stop-when incompressible<0.7: 0.600 after epoch 4, so the run ends; {out}/lora_above.safetensors was "
            f"the last above the bound; go on with --resume {out} --stop-when ''") in said
    assert json.loads((out / "result.json").read_text())["epochs"] == 4 and (out / "before_after.png").exists()


def test_given_again_it_stays_ended_and_without_the_bound_goes_on_to_the_same_run(tiny_file, tmp_path, falling, capsys):
    out, other = tmp_path / "run", tmp_path / "other"
    for _ in range(2):
        capsys.readouterr()
        stopping(tiny_file, out, "<0.82", "--auto-resume", epochs=4)
        assert "so the run ends" in capsys.readouterr().out and len(metrics(out)) == 2
    train.main(["--resume", str(out), "--stop-when", "incompressible < 0.75"])
    assert len(metrics(out)) == 3 and story(out / "lora_above.safetensors")["epochs"] == 2
    train.main(["--resume", str(out), "--stop-when", ""])
    stopping(tiny_file, other, "<-1", epochs=4)
    assert len(metrics(out)) == 4 and "so the run ends" not in capsys.readouterr().out.split("epoch 4:")[1]
    assert same(out / "lora.safetensors", other / "lora.safetensors") and metrics(out) == metrics(other)


def test_a_run_that_never_falls_is_the_run_without_a_bound(tiny_file, tmp_path):
    """With true evaluations; the bound is on the trained reward, of which a mean JPEG size of a kB is far below."""
    more = ["--watch", "incompressible", "--eval-every", "1"]
    train.main(arguments(tiny_file, tmp_path / "free", *more, epochs=2))
    train.main(arguments(tiny_file, tmp_path / "bound", *more, "--stop-when", "jpeg<-99", epochs=2))
    assert_same_run(tmp_path / "free", tmp_path / "bound")
    assert same(tmp_path / "bound" / "lora_above.safetensors", tmp_path / "bound" / "lora.safetensors")
    assert not (tmp_path / "free" / "lora_above.safetensors").exists()


def test_none_above_it_is_said(tiny_file, tmp_path, falling, capsys):
    stopping(tiny_file, tmp_path / "run", "<0.85")      # before training it is the true one, 0.865 kB
    assert "after epoch 1, so the run ends; no epoch was above the bound; go on" in capsys.readouterr().out
    assert not (tmp_path / "run" / "lora_above.safetensors").exists()


def test_an_evaluation_that_failed_ends_nothing(tiny_file, tmp_path, monkeypatch):
    monkeypatch.setattr(run.Run, "evaluate_between", lambda own: {})
    stopping(tiny_file, tmp_path / "run", "<0.1", epochs=2)
    assert len(metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize("given, message", [
    ("incompressible", "--stop-when incompressible: expected the name of a reward, < and a number"),
    ("incompressible>0.7", "--stop-when incompressible>0.7: expected the name"), ("<0.7", "--stop-when <0.7: expected"),
    ("incompressible<", "expected the name"), ("incompressible<nan", "expected the name"),
    ("incompressible<low", "expected the name"),
    ("clip<0.7", "--stop-when clip<0.7: clip is neither trained on nor watched; add --watch clip"),
    ("incompressible<99", "--stop-when incompressible<99: before training it is 0.865; choose a bound below"),
    ("jpeg<5", "--stop-when jpeg<5: before training it is -0.865")])
def test_a_bound_that_cannot_work_is_one_line(tiny_file, tmp_path, given, message):
    with pytest.raises(InputError, match=message) as caught:
        train.main(arguments(tiny_file, tmp_path / "run", "--watch", "incompressible", "--eval-every", "1",
                             "--stop-when", given))
    assert str(caught.value).isprintable() and not (tmp_path / "run").exists()


def test_a_bound_that_nothing_looks_at_is_one_line():
    with pytest.raises(InputError, match="looks at the evaluations between epochs; add --eval-every 1"):
        read_settings(["--watch", "clip", "--stop-when", "clip<0.7"])


def test_a_watched_reward_that_fails_before_training_cannot_bound_the_run(tiny_file, tmp_path):
    (tmp_path / "mine.py").write_text("def bad(images, prompts):\n    return 1 / 0\n")
    name = f"{tmp_path / 'mine.py'}:bad"
    with pytest.raises(InputError, match="bad<0: before training it is missing"):
        train.main(arguments(tiny_file, tmp_path / "run", "--watch", name, "--eval-every", "1", "--stop-when",
                             f"{name}<0"))
