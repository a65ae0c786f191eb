"""N processes are one: the same samples, rewards, gradients and files; and how they end when one of them fails."""
import os
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from ddpo_min import processes
from ddpo_min.plan import Plan, part_of
from in_processes import CHOSEN, Group, command, run_case, trainings
from test_train import arguments, metrics
from test_update_oracle import furthest

pytestmark = pytest.mark.usefixtures("plain_curve")

# Parts

@pytest.mark.parametrize("samples, updates, count", [(12, 2, 3), (8, 2, 3), (6, 3, 4), (16, 1, 5)])
def test_every_sample_has_one_process_which_draws_it_and_trains_on_it(samples, updates, count):
    plans = [Plan(samples, updates, 2, range(3), rank=rank, processes=count) for rank in range(count)]
    rollouts = [[n for part in plan.rollout() for n in range(part.start, part.stop)] for plan in plans]
    assert sorted(sum(rollouts, [])) == list(range(samples))
    assert max(map(len, rollouts)) - min(map(len, rollouts)) <= updates
    passes = [list(map(list, plan.minibatches(np.random.default_rng(0)))) for plan in plans]
    for minibatch in zip(*passes):
        assert sum(part for own in minibatch for _, _, part in own) == pytest.approx(1)
    for rollout, minibatches in zip(rollouts, passes):
        trained = [n for own in minibatches for part, i, _ in own if i == 0 for n in range(part.start, part.stop)]
        assert sorted(trained) == rollout
    assert part_of(3, 10, 0, 3) == slice(3, 5) and part_of(3, 10, 2, 3) == slice(7, 10)


def test_regression_draws_the_same_numbers_however_the_minibatch_is_divided():
    weights = np.array([1.0] * 9 + [0] + [2.0] * 2)
    whole = [list(own) for own in Plan(12, 2, 64, inner_epochs=3).random_minibatches(weights, np.random.default_rng(0))]
    plans = [Plan(12, 2, 2, inner_epochs=3, rank=rank, processes=4) for rank in range(4)]
    parts = [list(map(list, plan.random_minibatches(weights, np.random.default_rng(0)))) for plan in plans]
    for alone, *divided in zip(whole, *parts):
        (samples, t, seeds, part), = alone
        expected = sorted(zip(samples.tolist(), t.tolist(), seeds.tolist()))
        found = [row for own in divided for samples, t, seeds, _ in own
                 for row in zip(samples.tolist(), t.tolist(), seeds.tolist())]
        assert sorted(found) == expected and part == 1
        assert sum(part for own in divided for *_, part in own) == pytest.approx(1)
    for plan, minibatches in zip(plans, parts):
        drawn = {n for part in plan.rollout() for n in range(part.start, part.stop)}
        assert {n for own in minibatches for samples, *_ in own for n in samples.tolist()} <= drawn


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_bar_counts_the_samples_of_all_processes(rank):
    heard = []
    plan = Plan(16, 2, 1, range(2), rank=rank, processes=3, progress=lambda phase, n: heard.append(n))
    list(plan.rollout())
    assert sum(heard) == 16
    heard.clear()
    for own in plan.minibatches(np.random.default_rng(0)):
        list(own)
    assert sum(heard) == 16


# Trainings

@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of every case."""
    return [run_case(case, tmp_path_factory.mktemp("alone")) for case in CHOSEN]


def assert_same_trainings(folder, cases, alone):
    found = torch.load(folder / "results.pt", weights_only=False)
    for case, expected, got in zip(cases, alone, found["results"], strict=True):
        assert len(got) == len(expected) == 2
        for ours, theirs in zip(got, expected):
            assert ours["rewards"].tolist() == theirs["rewards"].tolist()
            assert ours["worth"].tolist() == theirs["worth"].tolist()
            for a, b in zip(ours["parameters"], theirs["parameters"], strict=True):
                assert furthest(a, b) < 1e-9, case
            assert ours["metrics"] == {name: pytest.approx(value, abs=1e-9) if name != "clip_fraction_by_step" else
                                       [v if v is None else pytest.approx(v) for v in value]
                                       for name, value in theirs["metrics"].items()}
    for own in zip(*found["drawn"]):        # each has drawn its part alone
        assert np.sum(own, axis=0).tolist() == [8, 8] and np.max(own) < 8


def test_training_is_the_same_in_three_processes(alone, tmp_path):
    cases = CHOSEN[::2]         # minibatches of 8, 4 and 2: a process has no sample of the last
    assert {case["updates"] for case in cases} == {1, 2, 4}
    statuses, said = Group(3, tmp_path, trainings, tmp_path, cases, None).ended()
    assert statuses == [0] * 3, said
    assert_same_trainings(tmp_path, cases, alone[::2])


def test_training_is_the_same_in_two_processes_and_a_run_may_change_how_many_it_has(alone, tiny_file, tmp_path):
    given = arguments(tiny_file, "OUT", "--eval-every", "1", "--watch", "incompressible", epochs=0)
    for flag in ("--out", "--epochs"):
        at = given.index(flag)
        del given[at:at + 2]
    train.main([*given, "--epochs", "2", "--out", str(tmp_path / "whole")])
    train.main([*given, "--epochs", "1", "--out", str(tmp_path / "alone")])
    statuses, said = Group(2, tmp_path, trainings, tmp_path, CHOSEN, given).ended()
    assert statuses == [0, 0], said
    assert said[1][0] == "" and "held-out seeds: " in said[0][0]
    assert len(CHOSEN) >= 10 and any(       # one whose processes begin within a group of one x_T
        case.get("same_start") and case["noise_steps"] and 4 // case["updates"] % case["group_size"] for case in CHOSEN)
    assert_same_trainings(tmp_path, CHOSEN, alone)
    train.main(["--resume", str(tmp_path / "both"), "--epochs", "2"])       # and back to one
    whole = load_file(tmp_path / "whole" / "lora.safetensors")
    for name in ("both", "alone"):
        saved = load_file(tmp_path / name / "lora.safetensors")
        assert all((saved[n] - whole[n]).abs().max() < 1e-4 for n in whole)
        ours, theirs = metrics(tmp_path / name), metrics(tmp_path / "whole")
        assert [line["epoch"] for line in ours] == [1, 2]
        for a, b in zip(ours, theirs):
            assert a == {key: value if isinstance(value, list) else pytest.approx(value, rel=1e-3, abs=1e-5)
                         for key, value in b.items()}
        before = [np.load(tmp_path / run / "before.npz") for run in (name, "whole")]
        assert np.abs(before[0]["images"].astype(int) - before[1]["images"]).max() <= 1
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            path.name for path in (tmp_path / "whole").iterdir()}


# Failures

FAILING = """import os, time

calls = []


def fails(images, prompts):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 4:
        raise ValueError("not today")
    return images.mean((1, 2, 3))


def slow(images, prompts):
    time.sleep(0.05)
    print("scored", flush=True)
    return images.mean((1, 2, 3))
"""


def run_of(tiny_file, tmp_path, reward, count=2):
    (tmp_path / "rate.py").write_text(FAILING)
    return Group(count, tmp_path, command, arguments(tiny_file, "run", "--reward", f"rate.py:{reward}", epochs=50))


def test_an_error_in_one_process_ends_all_with_its_message_once(tiny_file, tmp_path):
    statuses, said = run_of(tiny_file, tmp_path, "fails").ended()
    assert statuses == [2, 2]
    errors = "".join(err for _, err in said)
    assert errors.count("error: ") == 1 and "Traceback" not in errors
    assert "ValueError: not today); mend it there; 1 finished epochs are saved, go on with --resume run" in said[1][1]
    assert "error: " not in said[0][1] and "another process" not in errors
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_or_stopped_takes_the_others_along(how, tiny_file, tmp_path):
    group = run_of(tiny_file, tmp_path, "slow")
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text():
        time.sleep(0.05)
        assert all(process.is_alive() for process in group.processes)
    os.kill(group.processes[1].pid, how)
    statuses, said = group.ended()
    assert statuses[1] == (-how if how == signal.SIGKILL else 128 + how) and statuses[0] == 2
    errors = "".join(err for _, err in said)
    words = "error: another process has ended without a word; " if how == signal.SIGKILL else "stopped after epoch "
    assert errors.count(words) == 1 and "Traceback" not in errors and "go on with --resume run" in errors
    finished = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["epoch"]
    assert finished == len(metrics(tmp_path / "run")) >= 1


def test_alone_nothing_is_exchanged(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.together(lambda: (processes.rank(), processes.count()))() == (0, 1)
    images, p = np.zeros((2, 4, 4, 3), np.uint8), torch.nn.Parameter(torch.ones(2))
    assert processes.gather({"a": 1}) == [{"a": 1}] and processes.gather_images(images) is images
    processes.sum_gradients([p])
    assert p.grad is None and processes.is_first_to_fail()


def test_processes_that_do_not_find_each_other_are_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(processes.InputError, match="processes did not find each other .* start them all with torchrun"):
        processes.join()
