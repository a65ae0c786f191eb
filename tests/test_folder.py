"""The folder of a run: full disks, lost and damaged files, folders of others, stops while something is written.

The runs are real but for their networks, pictures and gradients, which are made up: an epoch takes milliseconds.
"""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import ROOT
from ddpo_min import cli, files, folder, run
from ddpo_min.advantages import PromptStatistics
from ddpo_min.cli import make_settings
from ddpo_min.files import TEMPORARY, InputError
from ddpo_min.folder import Folder, sha256
from ddpo_min.learner import Learner
from ddpo_min.lora import save_lora
from test_train import metrics

EPOCHS = 3
pytestmark = pytest.mark.usefixtures("plain_curve")


def learner_of(s, **more):
    """The Learner of these settings, on a network of two layers."""
    torch.manual_seed(0)
    attention = torch.nn.ModuleDict(dict(to_q=torch.nn.Linear(8, 8), to_v=torch.nn.Linear(6, 8)))
    unet = torch.nn.ModuleDict(dict(mid=torch.nn.ModuleDict(dict(attn1=attention))))
    given = dict(trainable=s.trainable, rank=s.rank, init_lora=s.init_lora, seed=s.seed, lr=0.01)
    return Learner(SimpleNamespace(base="", unet=unet), statistics=PromptStatistics(), **{**given, **more})


def pictures(learner):
    """Five pictures that the weights decide."""
    seed = int(next(iter(learner.parameters.values())).abs().sum() * 1e6)
    return np.random.default_rng(seed).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)


def go(out="", on_log=lambda epoch: None, epochs=EPOCHS, **given):
    """train() with made-up pictures and gradients; returns the Run."""
    given = given if "resume" in given else dict(dict(samples=8, show_every=1, out=str(out)), **given)
    s = make_settings(epochs=epochs, device="cpu", **given)
    own = run.Run(s)
    learner = learner_of(s, init_lora=own.init_lora)
    evaluation = SimpleNamespace(shown=[0, 2], prompts=list("abcde"), scorer=SimpleNamespace(files={}), run=
                                 lambda: (pictures(learner), pictures(learner).mean((1, 2, 3)), {}),
                                 run_shown=
                                 lambda: (pictures(learner)[[0, 2]], pictures(learner).mean((1, 2, 3))[[0, 2]], {}))
    with own.epochs(learner, evaluation) as left:
        for epoch in left:
            own.progress("sampling", 8)
            own.progress("training", 8)
            rng = np.random.default_rng(epoch)
            for p in learner.optimizer.parameters:
                p.grad = torch.from_numpy(rng.standard_normal(p.shape, dtype=np.float32))
            learner.optimizer.step()
            learner.statistics.advantages(["a"], [epoch])
            own.log(epoch, rng.standard_normal(8), {}, dict(loss=0.0, clip_fraction=0.0))
            on_log(epoch)
    return own


def assert_same(a, b):
    """Two finished runs: what was learned, the log and the pictures."""
    ours, theirs = load_file(a / "lora.safetensors"), load_file(b / "lora.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metrics(a) == metrics(b) and len(metrics(a)) == EPOCHS
    for name in ("samples.png", "samples.webp", "before_after.png"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert not [*a.rglob(f"{TEMPORARY}*"), *b.rglob(f"{TEMPORARY}*")]


@pytest.fixture(autouse=True)
def printed_to_memory(capsys):
    """Else the limits of files would hit what is printed, too."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    return go(tmp_path_factory.mktemp("whole") / "run").folder


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """The same, two epochs long; another of seed 1 is beside it."""
    folder = tmp_path_factory.mktemp("part")
    go(folder / "other", epochs=2, seed=1)
    return go(folder / "run", epochs=2).folder


@pytest.fixture
def copy(part, tmp_path):
    """A copy of that run, to be damaged."""
    return shutil.copytree(part, tmp_path / "copy")


def refused(call, *words):
    """The one line with which a call ends."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


# Disks that fill up, folders that go away

@contextmanager
def trouble_at(monkeypatch, number, begin):
    """begin() happens just before the write number `number` of all that atomic() makes; yields the names written."""
    names, mkstemp, replace = [], files.tempfile.mkstemp, os.replace

    def counted(**given):
        if len(names) == number:
            begin()
        names.append(None)
        return mkstemp(**given)

    def named(source, path):
        names[-1] = path.name
        replace(source, path)

    with monkeypatch.context() as patch:
        patch.setattr(files.tempfile, "mkstemp", counted)
        patch.setattr(files.os, "replace", named)
        yield names


@contextmanager
def full_disk_from(monkeypatch, number, size=0):
    """From this write on no file can be larger than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with trouble_at(monkeypatch, number, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))) as names:
            yield names
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The names of all files in the order in which a run writes them."""
    with trouble_at(pytest.MonkeyPatch(), -1, None) as names:
        go(tmp_path_factory.mktemp("written") / "run")
    return names


@pytest.mark.parametrize("size", [0, 150])
def test_a_disk_that_fills_up_at_any_write_is_one_line_and_costs_nothing(size, written, whole, tmp_path,
                                                                         monkeypatch):
    """Every file from the first to the last: then there is no folder, or one that resumes to the undisturbed run."""
    assert len(written) >= 20 and None not in written
    for number, name in enumerate(written):
        out = tmp_path / str(number)
        with full_disk_from(monkeypatch, number, size):
            message = refused(lambda: go(out), "cannot be written (File too large; its disk has", "MB free)")
        if not size and name != "metrics.jsonl":        # empty at first
            assert f"{out}/" in message and f"{name}: cannot be written" in message
        saved = written[:number].count("state.pt")
        if saved:
            assert saved == 1 or f"{saved - 1} finished epochs are saved, go on with --resume {out}" in message
            go(resume=out)
            assert_same(whole, out)
        else:
            assert not out.exists()


def test_an_empty_folder_of_the_users_stays_and_can_be_tried_again(whole, tmp_path, monkeypatch):
    with full_disk_from(monkeypatch, 1):
        refused(lambda: go(tmp_path), "before.npz: cannot be written")
    assert list(tmp_path.iterdir()) == []
    go(tmp_path)
    assert_same(whole, tmp_path)


def test_a_folder_that_goes_away_or_becomes_a_file_is_named_and_not_made_again(tmp_path):
    def deleted():
        shutil.rmtree(tmp_path / "run")

    def replaced():
        deleted()
        (tmp_path / "run").write_text("a file")

    for trouble, words in ((deleted, "No such file or directory"), (replaced, "Not a directory")):
        message = refused(lambda: go(tmp_path / "run", on_log=lambda epoch: epoch == 1 and trouble()),
                          f"{tmp_path}/run/state.pt: cannot be written ({words}", "folder that can be written to")
        assert "are saved" not in message
        assert not (tmp_path / "run").is_dir()
        (tmp_path / "run").unlink(missing_ok=True)


def test_every_kind_of_disk_error_is_told_in_the_systems_words():
    assert files.disk_trouble(OSError(28, "x")) == "No space left on device"
    assert files.disk_trouble(RuntimeError("I/O error: x (os error 122)")) == os.strerror(122)
    error = RuntimeError("inline_container")
    error.__context__ = PermissionError(13, "x")
    assert files.disk_trouble(error) == "Permission denied"
    assert files.disk_trouble(ValueError("x")) == files.disk_trouble(OSError("x")) == ""


# Files lost, damaged, or of another run

def flipped(content):
    """A bit in the middle; of a PNG, in its pixels."""
    k = content.find(b"IDAT") + 8 if b"IDAT" in content else len(content) // 2
    return content[:k] + bytes([content[k] ^ 16]) + content[k + 1:]


DAMAGES = dict(emptied=lambda content: b"", truncated=lambda content: content[:len(content) * 2 // 3], flipped=flipped,
               deleted=None, swapped="other")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["state.pt", "config.json", "before.npz", "samples/epoch_0000.png",
                                  "samples/epoch_0001.png", "samples/epoch_0002.png", "lora.safetensors",
                                  "metrics.jsonl", "result.json", "samples.png", "samples.webp", "curve.png",
                                  "before_after.png"])
def test_a_damaged_file_is_refused_at_the_start_or_does_not_matter(name, damage, copy, part, whole):
    path, change = copy / name, DAMAGES[damage]
    if change is None:
        path.unlink()
    else:
        path.write_bytes((part.parent / "other" / name).read_bytes() if change == "other" else
                         change(path.read_bytes()))
    if name in ("state.pt", "config.json", "before.npz"):
        left = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
        with pytest.raises(InputError) as caught:
            run.Run(make_settings(resume=copy, epochs=EPOCHS))      # before any network is loaded
        assert "\n" not in str(caught.value) and str(copy) in str(caught.value)
        assert damage == "deleted" or name.partition("/")[0] in str(caught.value)
        assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == left
    elif name.startswith("samples/"):       # costs a row of samples.png at most
        go(resume=copy)
        assert (whole / "before_after.png").read_bytes() == (copy / "before_after.png").read_bytes()
        saved = [load_file(path / "lora.safetensors") for path in (whole, copy)]
        assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
        ours, theirs = (Image.open(path / "samples.png").size for path in (copy, whole))
        lost = not name.endswith("2.png") and damage != "swapped"       # the last is drawn again
        assert ours[0] == theirs[0] and (ours[1] < theirs[1]) == lost
    else:
        go(resume=copy)
        assert_same(whole, copy)


def test_the_moving_picture_shows_every_row_with_its_rewards(whole, part, copy):
    moving = Image.open(whole / "samples.webp")
    assert moving.n_frames == EPOCHS + 1
    for epoch in range(EPOCHS + 1):
        kept = Image.open(whole / "samples" / f"epoch_{epoch:04d}.png")
        images, captions = np.split(np.asarray(kept), 2, axis=1), json.loads(kept.info["captions"])
        assert captions == [f"{image.mean():.2f}  {prompt}" for image, prompt in zip(images, "ac")]
        ours = np.asarray(run.figures.grid([np.stack(images)], [captions], [f"epoch {epoch}"])).astype(int)
        moving.seek(epoch)
        theirs = np.asarray(moving.convert("RGB")).astype(int)
        assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.9
        texts = (ours[-16:, :], ours[:, :50]), (theirs[-16:, :], theirs[:, :50])       # captions and label
        assert all(np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.8 for a, b in zip(*texts))


def test_a_moving_picture_takes_labels_of_every_length(tmp_path):
    """A frame that is wider than the first is none."""
    own = Folder(str(tmp_path / "run"), resume="")
    own.create("jpeg")
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    for epoch in (0, 9, 10, 100):
        own.add_row(epoch, images, ["a", "b"])
    moving = Image.open(tmp_path / "run" / "samples.webp")
    ours = []
    for frame in range(4):
        moving.seek(frame)
        ours.append(np.asarray(moving.convert("RGB")).astype(int))
    assert moving.n_frames == 4
    left = ours[0].shape[1] - 2 * (128 + run.figures.GAP) - run.figures.GAP
    assert all(np.abs(a[:, left:] - ours[0][:, left:]).mean() < 1 for a in ours)        # the pictures stay in place
    assert all(np.abs(a[:, :left] - ours[0][:, :left]).max() > 50 for a in ours[1:])    # the labels do not


def test_many_rows_are_thinned(copy, monkeypatch):
    monkeypatch.setattr(folder, "MOST_ROWS", 2)
    shown = []
    monkeypatch.setattr(folder.figures, "grid", lambda rows, *given, labels=None, grid=folder.figures.grid, **more:
                        shown.append(labels) or grid(rows, *given, labels=labels, **more))
    go(resume=copy)
    assert shown[-2] == ["epoch 0", f"epoch {EPOCHS}"]
    assert Image.open(copy / "samples.webp").n_frames == 2


def test_large_pictures_are_shrunk_in_the_moving_picture():
    large = np.random.default_rng(0).integers(0, 256, (2, 512, 1024, 3), dtype=np.uint8)
    small = run.figures.thumbnails(large)
    assert small.shape == (2, 128, 256, 3)
    blocks = large.reshape(2, 128, 4, 256, 4, 3).mean((2, 4))
    assert np.corrcoef(small.ravel(), blocks.ravel())[0, 1] > 0.8
    assert run.figures.thumbnails(blocks) is blocks


def test_a_run_that_is_stopped_in_its_first_epoch_twice_goes_on_with_another_batch(tmp_path):
    """Its first row is drawn again each time, and may be rounded differently."""
    whole = go(tmp_path / "run", epochs=1).folder
    for batch in (1, 2):
        path = whole / "samples" / "epoch_0000.png"
        pixels = np.array(Image.open(path))
        pixels[0, 0] ^= 1
        Image.fromarray(pixels).save(path)
        go(resume=whole, epochs=1 + batch, batch=batch)
    rows = sorted(path.name for path in (whole / "samples").iterdir())
    assert rows == [f"epoch_000{i}.png" for i in range(4)]
    height = Image.open(whole / "samples.png").height
    assert height > 3 * Image.open(path).height


def test_every_flipped_bit_of_the_checkpoint_is_found(copy):
    """In the headers of its records, too: torch reads one that calls itself a folder as numbers from nowhere."""
    path = copy / "state.pt"
    content, where = path.read_bytes(), random.Random(0)
    own = run.Run(make_settings(resume=copy))
    for k in [where.randrange(len(content)) for _ in range(100)]:
        path.write_bytes(content[:k] + bytes([content[k] ^ 1 << where.randrange(8)]) + content[k + 1:])
        refused(lambda: own.files.check(own.kept), f"{path}: damaged")


@pytest.mark.parametrize("change", [dict(rank=8), dict(lr=1.0), dict(epochs=9), "missing", "signed", "empty", "marks"])
def test_a_config_changed_by_hand_is_refused(change, copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    marks = {name: config.pop(name) for name in ("version", "sha256")}
    if isinstance(change, dict):
        config.update(change)
    elif change in ("missing", "signed"):
        del config["rank"]
    else:
        config = {}
    if change == "signed":
        marks["sha256"] = sha256(config)
    path.write_text(json.dumps(config if change == "empty" else {**config, **marks}))
    refused(lambda: make_settings(resume=copy), str(copy), "written by an older version" if change == "empty" else
            "config.json: not as it was written; restore it, or start a new run, or go on from what it learned with "
            f"--init-lora {copy}/lora.safetensors")


def test_another_runs_config_with_its_checksum_is_refused_by_what_differs(copy, part):
    shutil.copy(part.parent / "other" / "config.json", copy)
    refused(lambda: run.Run(make_settings(resume=copy)), "config.json and state.pt are of two runs (seed differs)")


def test_a_checkpoint_without_checksums_is_of_another_version(copy):
    state = torch.load(copy / "state.pt", weights_only=True)
    del state["settings"]
    write_state(copy, state)
    refused(lambda: run.Run(make_settings(resume=copy)), "state.pt: written by another version; start a new run, or go")


def write_state(path, state):
    """Another checkpoint with right checksums."""
    own = Folder(path, True)
    own.sums = state["files"]
    own.write_state(state)


def smaller(state):
    name = next(iter(state["parameters"]))
    state["parameters"][name] = state["parameters"][name][:1, :1]       # one element: it would be broadcast


def transposed(state):
    name = next(name for name, p in state["parameters"].items() if len(p) != p.shape[1])
    state["parameters"][name] = state["parameters"][name].T


def first(change):
    def changed(state):
        name = next(iter(state["parameters"]))
        state["parameters"][name] = change(state["parameters"][name])
    return changed


BAD_STATES = {
    "one element": smaller, "transposed": transposed, "half": first(lambda p: p.half()),
    "nan": first(lambda p: p * float("nan")), "no tensor": first(lambda p: None),
    "a key less": lambda state: state["parameters"].popitem(),
    "a key more": lambda state: state["parameters"].update(x=torch.zeros(1)),
    "no parameters": lambda state: state.pop("parameters"), "no optimizer": lambda state: state.pop("optimizer"),
    "no statistics": lambda state: state.pop("statistics"), "no scaler": lambda state: state["optimizer"].pop("scaler"),
    "no groups": lambda state: state["optimizer"].pop("param_groups"),
    "moments of one element": lambda state: state["optimizer"]["state"][2].update(exp_avg=torch.ones(1, 1)),
    "moments missing": lambda state: state["optimizer"]["state"][2].pop("exp_avg_sq"),
    "moments of a layer more": lambda state: state["optimizer"]["state"].update({999: {}}),
    "an average of fewer": lambda state: state["optimizer"].update(ahead=list(state["parameters"].values())[:-1]),
    "an average of one element": lambda state: state["optimizer"].update(
        ahead=[torch.ones(1) for _ in state["parameters"]]),
    "another alpha": lambda state: state["alphas"].update({next(iter(state["alphas"])): 7.0}),
}


@pytest.mark.parametrize("what", BAD_STATES)
def test_nothing_is_loaded_unless_all_fits(what, copy):
    state = torch.load(copy / "state.pt", weights_only=True)
    BAD_STATES[what](state["learner"])
    write_state(copy, state)
    own = run.Run(make_settings(resume=copy))
    learner = learner_of(own.settings)
    before = {name: p.clone() for name, p in learner.parameters.items()}
    refused(lambda: own.files.read_state(learner), f"{copy}/state.pt: it does not fit the model (")
    assert all(torch.equal(p, before[name]) for name, p in learner.parameters.items())
    assert not learner.optimizer.rule.state and not learner.statistics.rewards


def test_a_run_that_starts_from_a_lora_resumes_and_knows_its_alphas(tmp_path):
    layers = learner_of(make_settings(rank=3)).lora
    for layer in layers.values():
        layer.alpha = 6.0
    save_lora(tmp_path / "start.safetensors", layers)
    given = dict(init_lora=tmp_path / "start.safetensors")
    go(tmp_path / "whole", **given)
    go(tmp_path / "run", epochs=1, **given)
    damaged, killed = (shutil.copytree(tmp_path / "run", tmp_path / name) for name in ("damaged", "killed"))
    (killed / "lora.safetensors").unlink()      # it is written after state.pt
    for own in (tmp_path / "run", killed):
        go(resume=own)
        assert_same(tmp_path / "whole", own)
    for layer in layers.values():
        layer.alpha = 3.0
    save_lora(damaged / "lora.safetensors", layers)
    refused(lambda: go(resume=damaged), "state.pt: it does not fit the model (its LoRA has other alphas); ")


# Stops

@pytest.mark.parametrize("number", files.STOPS)
def test_a_stop_while_the_checkpoint_is_written_keeps_its_epoch(number, whole, tmp_path, monkeypatch):
    saved, save = [], torch.save

    def stopped(*given):
        saved.append(1)
        if len(saved) == 3:             # epoch 2
            os.kill(os.getpid(), number)
        save(*given)

    out, usual = tmp_path / "run", {n: signal.signal(n, files.stop) for n in files.STOPS}       # as run_main() does
    try:
        with monkeypatch.context() as patch, pytest.raises(files.Stopped) as caught:
            patch.setattr(torch, "save", stopped)
            go(out)
        assert all(signal.getsignal(n) is files.stop for n in files.STOPS)
    finally:
        for n, handler in usual.items():
            signal.signal(n, handler)
    assert str(caught.value) == (f"stopped after epoch 2; go on with --resume {out} --epochs 3, or evaluate it with "
                                 f"--resume {out} --epochs 2")
    assert caught.value.number == number and len(metrics(out)) == 2 and not (out / "result.json").exists()
    shutil.copytree(out, tmp_path / "copy")
    assert go(resume=tmp_path / "copy", epochs=2).result["epochs"] == 2
    go(resume=out)
    assert_same(whole, out)


def test_an_epoch_is_safe_before_it_is_announced(whole, tmp_path, monkeypatch):
    def reader_gone(progress, line, reward=None):
        raise BrokenPipeError

    monkeypatch.setattr(run.Progress, "write", reader_gone)
    with pytest.raises(BrokenPipeError):
        go(tmp_path / "run")
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["epoch"] == len(metrics(tmp_path / "run")) == 1
    monkeypatch.undo()
    go(resume=tmp_path / "run")
    assert_same(whole, tmp_path / "run")


def test_what_a_killed_run_left_half_written_is_taken_away_and_written_again(whole, copy):
    (copy / f"{TEMPORARY}1.pt").write_text("half")
    (copy / "samples" / f"{TEMPORARY}1.png").write_text("half")
    (copy / "metrics.jsonl").write_text("")         # killed between the checkpoint and the rest
    (copy / "samples" / "epoch_0002.png").unlink()
    go(resume=copy)
    assert_same(whole, copy)


def test_ctrl_c_before_the_first_checkpoint_leaves_no_folder(tmp_path, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    for number in range(5):
        with trouble_at(monkeypatch, number, stop), pytest.raises(KeyboardInterrupt):
            go(tmp_path / "run")
        assert not (tmp_path / "run").exists()


# Folders of others

@pytest.mark.parametrize("name, value", [("reward", "rate.py:red"), ("reward", "jpeg=1,rate.py:red=2"),
                                         ("watch", "rate.py:red"), ("vlm_encoder", "rate.py:red"),
                                         ("vlm_url", "http://elsewhere/v1")])
def test_code_and_servers_that_a_folder_names_are_given_again(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rate.py").write_text("import pathlib\npathlib.Path('ran').touch()\n\n\n"
                                      "def red(images, prompts):\n    return images[:, 0, 0, 0]\n")
    go("run", epochs=1, **{name: value})
    (tmp_path / "ran").unlink(missing_ok=True)
    told = f"--resume run --{name.replace('_', '-')} {value}"
    message = refused(lambda: make_settings(resume="run"), told)
    assert not (tmp_path / "ran").exists()
    assert make_settings(resume="run", **{name: value}).epochs == 1
    assert cli.how_to_resume(make_settings(resume="run", **{name: value}), "run") == told in message
    if name not in cli.ON_RESUME:       # a server may move
        refused(lambda: make_settings(resume="run", **{name: "other.py:red"}),
                f"--{name.replace('_', '-')} other.py:red: expected {value}")


# Names, numbers, terminals

def test_a_long_reward_names_a_folder_that_can_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ("é" * 100)).mkdir()
    path = tmp_path / ("é" * 100) / "rate.py"
    path.write_text("def red(images, prompts):\n    return images[:, 0, 0, 0]\n")
    one, two = (go(epochs=1, reward=f"{path}:red").folder for _ in range(2))
    assert one.name.endswith("é_rate.py_red") and two.name == f"{one.name}-2"


@pytest.mark.parametrize("given", [dict(out="x" * 300), dict(out="file/below")])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_starts(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    refused(lambda: run.Run(make_settings(**given)), f"--out {given['out']}: ")


def test_the_largest_seed_works():
    learner_of(make_settings(seed=2 ** 64 - 1))


def command(code, *, shell="{}", **environment):
    """A command whose main() is this code, in a shell line where {} stands for it: (status, stdout, stderr)."""
    script = f"import os, runpy, signal, sys\nmain = lambda: exec({code!r}, globals())\n" \
             f"runpy.run_path({str(ROOT / 'ddpo_min/files.py')!r})['run_main'](main)"
    line = shell.format(f"{sys.executable} -c \"$SCRIPT\"")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "SCRIPT": script, **environment})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("code, shell, status, out, err", [
    ("print('a')", "{}", 0, "a\n", ""), ("sys.exit(3)", "{}", 3, "", ""),
    ("[print('long ' * 9999) for _ in range(99)]", "{} | head -c 4", 141, "long", ""),
    ("print('a', flush=True)", "{} | true; exit 0", 0, "", ""),
    ("print('a' * 9)", "{} > /dev/full", 2, "", "error: No space left on device: something could not be written or "
     "read that has no name; look at the room on the disk, at the connection, and at where the output goes\n"),
    ("print('a')", "{} >&-", 0, "", ""),
    ("raise OSError('no errno')", "{} 2>&1 | tail -1", 1, "OSError: no errno\n", ""),
    ("os.kill(os.getpid(), signal.SIGTERM)", "{}", 143, "", "stopped\n"),
    ("os.kill(os.getpid(), signal.SIGHUP)", "{}", 129, "", "stopped\n"),
    ("os.kill(os.getpid(), signal.SIGHUP); print('a')", "nohup {} 2>&1", 0, "a\n", ""),
    ("print('a'); os.kill(os.getpid(), signal.SIGINT)", "{}", 130, "a\n", "stopped\n"),
    ("import time\nclass Dying:\n def __del__(self): os.kill(os.getpid(), signal.SIGTERM)\nDying()\ntime.sleep(99)",
     "{}", 143, "", "stopped\n"),
    ("class Dying:\n def __del__(self): 1 / 0\nDying()", "{} 2>&1 | tail -1", 0,
     "ZeroDivisionError: division by zero\n", ""),
    ("import threading, time\nthreading.Thread(target=time.sleep, args=[999]).start()\n"
     "os.kill(os.getpid(), signal.SIGINT)", "{}", 130, "", "stopped\n"),
    ("open('x' * 300)", "{}", 2, "", f"error: {'x' * 300}: File name too long; expected a file or folder that can be "
                                     "used\n"),
    (r"print('l\u00e4ufe \udcff')", "PYTHONIOENCODING=ascii {}", 0, "l\\xe4ufe \\udcff\n", "")])
def test_commands_end_without_a_traceback_and_with_the_right_status(code, shell, status, out, err):
    assert command(code, shell=shell) == (status, out, err)
