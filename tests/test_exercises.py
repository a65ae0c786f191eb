"""The exercises "find the silent bug": every patch applies, leaves a program that runs, and is found by its test."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT

EXERCISES = ROOT / "tutorial" / "exercises"
PAGE = (EXERCISES / "README.md").read_text()
SECTIONS = re.findall(r"^## Exercise (\d+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
OURS = {ROOT, ROOT / "ddpo_min", ROOT / "tests"}


@contextmanager
def modules_of(folder):
    """Within the block the project's modules are imported afresh, from `folder`; torch and the like stay as they are.

    Ten programs in one process: to start Python and import torch for each would take most of the time."""
    of = lambda *folders: {name: module for name, module in sys.modules.items()         # noqa: E731
                           if Path(getattr(module, "__file__", None) or "/").parent in folders}
    before, path = of(*OURS), list(sys.path)
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        for name in of(folder, folder / "ddpo_min", folder / "tests"):
            del sys.modules[name]
        sys.modules.update(before)
        sys.path[:] = path


class Failures:
    """A plugin of pytest: what went wrong in which phase, the last line of each."""

    def __init__(self):
        self.found = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.found.append((report.when, report.longrepr.reprcrash.message))


def test_the_page_and_the_patches_belong_together():
    numbers = [number for number, _ in SECTIONS]
    assert numbers == [str(n) for n in range(1, len(numbers) + 1)] and len(numbers) >= 8
    assert {path.name for path in EXERCISES.glob("*.patch")} == {f"{number}.patch" for number in numbers}
    for number, section in SECTIONS:
        assert f"git apply tutorial/exercises/{number}.patch" in section
        assert f"]({number}.webp)" in section and (EXERCISES / f"{number}.webp").is_file()
        assert re.findall(r"<summary>(.*?)</summary>", section) == ["Hint 1", "Hint 2", "Hint 3", "Answer"]
        assert section.count("<details>") == section.count("</details>") == 4
        changed = re.findall(r"^[-+](?![-+])", (EXERCISES / f"{number}.patch").read_text(), re.M)
        assert 1 <= len(changed) <= 4


@pytest.mark.parametrize("number, test", [(number, re.search(r"`pytest (tests/\w+\.py::\w+)`", section).group(1))
                                          for number, section in SECTIONS])
def test_a_patched_program_trains_and_its_test_finds_the_bug(number, test, tiny_file, tmp_path):
    for folder in ("ddpo_min", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "data"))
    shutil.copy(ROOT / "train.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    no_repository = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}     # whatever it lies in
    subprocess.run(["git", "apply", EXERCISES / f"{number}.patch"], cwd=tmp_path, check=True, env=no_repository)
    with modules_of(tmp_path):
        import train
        from ddpo_min import figures
        from ddpo_min.cli import make_settings
        figures.save_curve = lambda path, history, title: None      # it takes time, and no patch changes it
        assert Path(train.__file__).parent == tmp_path
        run = train.train(make_settings(
            weights=str(tiny_file), preset="laptop", samples=8, updates=2, steps=3, epochs=1, kl_weight=0.1,
            guidance=3.0, eval_samples=2, prompt_minimum=2, device="cpu", out=str(tmp_path / "run")))
        assert len(run.history) == 1 and all(math.isfinite(line[name]) for line in run.history
                                             for name in ("reward_mean", "loss", "grad_norm", "max_ratio_error"))
        assert all(0 < line["grad_norm"] < 10 and abs(line["loss"]) < 5 for line in run.history)
        failures = Failures()
        pytest.main(["-q", "-p", "no:cacheprovider", "--assert=plain", f"--basetemp={tmp_path / 'pytest'}",
                     str(tmp_path / test)], [failures])         # plain: nobody reads what it says
    assert failures.found and all(when == "call" and message.startswith(("assert", "AssertionError"))
                                  for when, message in failures.found)


def test_the_curves_train_each_program_once_and_show_healthy_and_sick(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXERCISES)
    import curves
    monkeypatch.setattr(curves, "HERE", tmp_path)
    (tmp_path / "README.md").write_text("".join(
        f"## Exercise {n}\n\n```\npython train.py --seed {seed}\n```\n" for n, seed in ((1, 7), (2, 8), (3, 7))))
    trained, colours = [], iter([(0, 200, 0), (200, 0, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)])

    def pretend(command, cwd=None, check=False):
        if command[:2] == ["git", "apply"]:
            trained.append(command[2].name)
        elif command[1] == "train.py":
            trained.append(command[2:])
            out = Path(cwd) / command[-1]
            (out / "samples").mkdir(parents=True)
            Image.new("RGB", (640, 64), next(colours)).save(out / "samples" / "epoch_0002.png")
            (out / "result.json").write_text(json.dumps({"reward_before": -2.5, "reward_after": -1.5}))
            (out / "metrics.jsonl").write_text("".join(json.dumps(
                {"epoch": epoch, "reward_mean": -epoch, "loss": 0.1, "clip_fraction_by_step": [None, 0.5], "more": 1})
                + "\n" for epoch in (1, 2)))

    monkeypatch.setattr(curves.subprocess, "run", pretend)
    monkeypatch.setattr(curves, "draw", lambda number, runs: None)
    curves.main()
    first, second = (["--seed", seed, "--out", "run"] for seed in "78")
    assert trained == [first, "1.patch", first, second, "2.patch", second, "3.patch", first]
    runs = curves.read()
    assert list(runs) == ["healthy_1", "sick_1", "healthy_2", "sick_2", "sick_3"]
    assert runs["sick_3"] == [{"epoch": 0, "held_out": -2.5},
                              {"epoch": 1, "reward_mean": -1, "loss": 0.1, "clip_fraction_by_step": [None, 0.5]},
                              {"epoch": 2, "reward_mean": -2, "loss": 0.1, "clip_fraction_by_step": [None, 0.5],
                               "held_out": -1.5}]
    monkeypatch.undo()
    monkeypatch.setattr(curves, "HERE", tmp_path)
    monkeypatch.setattr(curves, "make", None)           # everything is there: nothing is trained
    curves.main()
    for number, colour in ((1, (200, 0, 0)), (3, (0, 200, 200))):
        pixels = np.asarray(Image.open(tmp_path / f"{number}.webp").convert("RGB")).astype(int)
        for wanted in ((0, 200, 0), colour):
            assert (np.abs(pixels - wanted).max(axis=2) < 25).sum() > 5000
