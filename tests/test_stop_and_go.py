"""One folder, one run: the lock, the command that starts or goes on, and the LoRAs that are kept."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import ROOT
from ddpo_min import files, run
from ddpo_min.cli import make_settings
from ddpo_min.files import TEMPORARY, InputError
from ddpo_min.folder import LOCK, Folder
from test_folder import EPOCHS, assert_same, go, refused
from test_train import metrics

HOLD = "import sys\nsys.path.insert(0, {root!r})\nfrom ddpo_min.files import Lock\nlock = Lock({path!r})\n" \
       "print('held', flush=True)\nimport time\ntime.sleep(60)"


@pytest.fixture
def other_process(tmp_path):
    """A process that holds the lock of tmp_path/run until it is killed."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(root=str(ROOT), path=str(tmp_path / "run" / LOCK))],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


def test_two_runs_do_not_write_to_one_folder(other_process, tmp_path):
    out = tmp_path / "run"
    refused(lambda: go(out), f"{out}: another run is writing to it; wait for its end, stop it, or choose another")
    assert [path.name for path in out.iterdir()] == [LOCK]
    refused(lambda: Folder(str(out), resume=True), "another run is writing to it")
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    assert (out / LOCK).exists()        # a file, but nobody's lock
    assert go(out).finished == EPOCHS
    assert not (out / LOCK).exists()


def test_the_second_of_two_runs_that_start_together_is_refused(tmp_path):
    out = tmp_path / "run"
    first, second = (run.Run(make_settings(out=str(out), samples=8, device="cpu")) for _ in range(2))
    first.files.create("jpeg")
    refused(lambda: second.files.create("jpeg"), f"{out}: another run is writing to it")
    (out / "config.json").write_text("{}")
    first.files.release()
    refused(lambda: second.files.create("jpeg"), f"--out {out}: already holds files; choose another")


def test_a_lock_that_its_holder_takes_away_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Opened before the holder's release and locked after it: the file has another number by then, or none."""
    import fcntl
    lock, real, calls = files.Lock(tmp_path / LOCK), fcntl.flock, []

    def released_in_between(file, how):
        calls.append(1)
        if len(calls) == 1:
            lock.release()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", released_in_between)
    second = files.Lock(tmp_path / LOCK)
    assert len(calls) == 2 and os.stat(tmp_path / LOCK).st_ino == os.fstat(second.file.fileno()).st_ino
    with pytest.raises(InputError, match="another run"):
        files.Lock(tmp_path / LOCK)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run that nothing disturbed."""
    return go(tmp_path_factory.mktemp("whole") / "run").folder


class Killed(BaseException):
    """As if the process were gone: nothing that the program does about errors happens."""


def killed_at(monkeypatch, name):
    """The run dies when it is about to write this file."""
    written = Folder.write_state if name == "state.pt" else Folder.keep_before

    def dies(*given):
        if name == "state.pt":
            raise Killed
        written(*given)
        raise Killed

    monkeypatch.setattr(Folder, written.__name__, dies)
    monkeypatch.setattr(Folder, "remove", lambda self: None)


@pytest.mark.parametrize("name", ["state.pt", "before.npz"])
def test_the_same_command_starts_goes_on_and_ends(name, whole_run, tmp_path, monkeypatch):
    out, same = tmp_path / "run", dict(auto_resume=True, samples=8, show_every=1)
    with monkeypatch.context() as patch:        # killed before the first checkpoint
        killed_at(patch, name)
        with pytest.raises(Killed):
            started(out, **same)
    (out / f"{TEMPORARY}1.png").write_text("half")
    assert (out / "config.json").exists() and not (out / "state.pt").exists()
    with pytest.raises(KeyboardInterrupt):      # then after an epoch
        started(out, **same, on_log=lambda epoch: stop())
    assert len(metrics(out)) == 1
    own = started(out, **same)
    assert_same(whole_run, out)
    assert own.finished == EPOCHS and len(metrics(out)) == EPOCHS
    assert started(out, **same).result == own.result     # once more: nothing is left but the evaluation
    assert_same(whole_run, out)


def stop():
    raise KeyboardInterrupt


def started(out, on_log=lambda epoch: None, **given):
    """go() as for a command that says neither --resume nor its contrary."""
    settings = make_settings(out=str(out), epochs=EPOCHS, device="cpu", **given)
    return go(resume=out, on_log=on_log) if settings.resume else go(out, on_log, **given)


def test_auto_resume_refuses_another_run_and_files_that_are_no_runs(whole_run, tmp_path):
    same = dict(out=str(whole_run), epochs=EPOCHS, device="cpu", samples=8, show_every=1, auto_resume=True)
    assert make_settings(**same, batch=4, compile=True).batch == 4
    assert make_settings(**{**same, "batch": 0}).batch == 64 and make_settings(**{**same, "epochs": 9}).epochs == 9
    refused(lambda: make_settings(**same, lr=1.0), f"--auto-resume: the run in {whole_run} has --lr 0.003, not 1.0; ")
    refused(lambda: make_settings(**same, reward="incompressible"), "has --reward jpeg, not incompressible")
    refused(lambda: make_settings(auto_resume=True), "--auto-resume: goes on with the run in --out, which must be")
    refused(lambda: make_settings(auto_resume=True, out="a", resume="a"), "and --resume must not")
    refused(lambda: make_settings(auto_resume=True, out="a", init_lora="b", rank=8), "--rank: follows from the file")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    refused(lambda: Folder(str(tmp_path), False, anew=True), f"--out {tmp_path}: already holds files")
    assert (tmp_path / "config.json").exists()
    (tmp_path / "config.json").write_text('{"sha256": "0"}')
    (tmp_path / "thesis.txt").touch()
    refused(lambda: Folder(str(tmp_path), False, anew=True), f"--out {tmp_path}: already holds files")
    assert (tmp_path / "config.json").exists()


def test_every_nth_lora_and_the_best_one_are_kept(tmp_path, monkeypatch):
    loras, rewards = [], iter([5.0, 7.0, 6.0])
    monkeypatch.setattr(run.Run, "evaluate_between", lambda self: dict(eval_reward=next(rewards)))

    def after(epoch):
        loras.append(load_file(tmp_path / "run" / "lora.safetensors"))

    go(tmp_path / "run", after, keep_every=2, eval_every=1)
    kept = sorted(path.name for path in (tmp_path / "run").glob("lora*"))
    assert kept == ["lora.safetensors", "lora_0002.safetensors", "lora_best.safetensors"]
    for name in kept[1:]:       # both are epoch 2's: the 7 of the second evaluation is the best
        saved = load_file(tmp_path / "run" / name)
        assert all(torch.equal(saved[n], loras[1][n]) for n in saved)
        assert any(not torch.equal(saved[n], loras[2][n]) for n in saved)
    with safe_open(tmp_path / "run" / "lora_best.safetensors", "pt") as file:
        story = json.loads(file.metadata()["ddpo_min"])
    assert story["epochs"] == 2 and story["evaluated"] == 7.0
    (tmp_path / "run" / "lora_0002.safetensors").unlink()
    go(resume=tmp_path / "run")
    assert not (tmp_path / "run" / "lora_0002.safetensors").exists()       # only the last epoch's is written again


def test_a_resumed_run_can_begin_to_evaluate_and_to_keep_loras(tmp_path, whole_run):
    """Nothing else of it changes."""
    out = tmp_path / "run"
    go(out, epochs=1)
    go(resume=out, epochs=EPOCHS, eval_every=1, keep_every=2)
    assert ["eval_reward" in line for line in metrics(out)] == [False, True, True]
    assert sorted(path.name for path in out.glob("lora_*")) == ["lora_0002.safetensors", "lora_best.safetensors"]
    ours, theirs = load_file(out / "lora.safetensors"), load_file(whole_run / "lora.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_hanging_reward_does_not_hold_a_run_that_is_stopped(tiny_file, tmp_path):
    (tmp_path / "slow.py").write_text("import time\n\n\ndef hangs(images, prompts):\n    print('hangs', flush=True)\n"
                                      "    time.sleep(600)\n")
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--weights", tiny_file, "--preset", "laptop", "--samples", "4", "--steps",
         "2", "--updates", "1", "--eval-samples", "2", "--reward", "slow.py:hangs", "--device", "cpu", "--out", "run"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.stdout.readline() != "hangs\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and time.monotonic() - began < 30
    assert "Traceback" not in err and err.endswith("stopped\n") and not (tmp_path / "run").exists()
