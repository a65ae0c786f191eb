"""The texts agree with the code: what they name exists, and their commands and Python code work."""
import importlib
import inspect
import re
import shlex
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

import sample
import train
from conftest import ROOT
from ddpo_min import bench, cli
from ddpo_min.files import InputError
from ddpo_min.settings import PRESETS

PAGES = ["README.md", "CONTRIBUTING.md", "weights/README.md", "tutorial/README.md", "tutorial/exercises/README.md",
         "experiments/README.md", *(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))]
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
README, EQUATIONS = TEXT["README.md"], TEXT["docs/equations.md"]
ROWS = re.findall(r"^\| .* \| `(ddpo_min\.\w+)\.(\w+)` \| `tests/(\w+\.py)::(\w+)` \|$", EQUATIONS, re.M)
FILES = re.findall(r"^\d+\. `([\w/.]+)` .*\((\d+) lines\)$", README, re.M)
OTHERS = {"my_rewards.py", "FILE.py", "scripts/train.py", "config/dgx.py"}      # a reader's own, and other projects'


def fences(text):
    """The contents of the fenced blocks of a page: [(language, lines)]."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)


def inline(text):
    """The code within lines of a page, on one line each."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def commands():
    """Every python command of all pages: [(page, its file or module, its arguments)]."""
    found = []
    for page, text in TEXT.items():
        lines = [line for _, block in fences(text) for line in block.replace("\\\n", " ").splitlines()] + inline(text)
        for line in lines:
            for part in line.split(" && "):
                if part.startswith("python "):
                    words = shlex.split(part)[1:]
                    found.append((page, words[1], words[2:]) if words[0] == "-m" else (page, words[0], words[1:]))
    return found


# Tables

def test_the_tables_are_found():
    table = EQUATIONS.split("| equation |")[1].split("\n\n")[0]
    assert len(ROWS) == table.count("\n| ") >= 25
    assert len(FILES) == len(re.findall(r"^\d+\. ", README.split("## Reading order")[1], re.M)) == 9


@pytest.mark.parametrize("module, function, file, test", ROWS)
def test_every_equation_has_its_function_and_its_test(module, function, file, test):
    found = getattr(importlib.import_module(module), function)
    assert callable(found) and found.__module__ == module
    assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.M)


@pytest.mark.parametrize("file, lines", FILES)
def test_line_counts_are_true(file, lines):
    assert (ROOT / file).read_text().count("\n") == int(lines)


def test_the_table_of_presets_is_complete():
    section = TEXT["docs/algorithms.md"].split("## Presets")[1]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", section, re.M)))) == set(PRESETS)


def test_every_metric_and_file_of_a_run_is_named_in_the_code():
    code = "".join(path.read_text() for path in ROOT.glob("ddpo_min/*.py"))
    metrics, files = (re.findall(r"`([\w.]+)`", "".join(re.findall(r"^\| (`.*?) \|", section, re.M)))
                      for section in TEXT["docs/metrics.md"].split("\n## ")[1:3])
    assert len(metrics) > 20 and len(files) > 9
    assert [name for name in metrics if not re.search(rf"\b{name.removesuffix('NAME')}", code)] == []
    assert [name for name in files if f'"{name}"' not in code] == []
    written = set(re.findall(r'"([\w]+\.(?:json|jsonl|pt|npz|png|webp|safetensors))"', "".join(
        (ROOT / "ddpo_min" / name).read_text() for name in ("run.py", "folder.py", "learner.py"))))
    assert written <= set(files)


def test_contributing_has_every_file_once():
    named = re.findall(r"`([\w/]+\.py)`", "".join(re.findall(r"^\| \d? ?\| (.*?) \|", TEXT["CONTRIBUTING.md"], re.M)))
    paths = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("ddpo_min/*.py")] if path.stem != "__init__"]
    assert sorted(named) == sorted(path.relative_to(ROOT).as_posix() for path in paths)


# README

def test_the_readme_is_short():
    assert README.count("\n") <= 165


def test_the_readmes_loop_is_the_loop():
    loop = next(block for language, block in fences(README) if "run.epochs" in block)
    assert loop.startswith("with run.epochs(") and loop.rstrip().endswith("# log")
    assert textwrap.indent(loop, "    ") + "    return run\n" in inspect.getsource(train.train)


def test_the_page_of_every_subject_is_linked_once():
    links = re.findall(r"\]\((docs/[^)]+)\)", README)
    assert sorted(links) == sorted(page for page in PAGES if page.startswith("docs/")) and len(links) == 8


# All pages

def test_no_link_is_dead():
    for page, text in TEXT.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if not link.startswith("https://"):
                file, _, anchor = link.partition("#")
                file = (ROOT / page).parent / file
                assert file.is_file(), f"{page}: {link}"
                titles = re.findall(r"^#+ (.*)", file.read_text(), re.M) if anchor else []
                assert not anchor or anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
                                                for title in titles}, f"{page}: {link}"


def test_every_file_and_test_that_is_named_exists():
    places = (ROOT, ROOT / "ddpo_min", ROOT / "tests")
    tests = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    for page, text in TEXT.items():
        for code in [*inline(text), *(line for _, block in fences(text) for line in block.splitlines())]:
            for file in set(re.findall(r"[\w/]+\.py\b", code)) - OTHERS:
                assert any((place / file).is_file() for place in (*places, (ROOT / page).parent)), f"{page}: {file}"
            for test in re.findall(r"\btest_\w+\b(?!\.py)", code):
                assert f"def {test}(" in tests, f"{page}: {test}"


def test_every_command_can_be_parsed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parsers = {"train.py": cli.make_parser().parse_args, "sample.py": sample.parse, "ddpo_min.bench": bench.parse}
    found = commands()
    for page, command, arguments in found:
        try:
            if command in parsers:
                if arguments != ["--help"]:
                    parsers[command](arguments)
            else:
                assert command.startswith(("weights/", "tests/", "tutorial/", "experiments/"))
                flags = [word for word in arguments if word.startswith("--")]
                assert all(f'"{flag}"' in (ROOT / command).read_text() for flag in flags)
        except (SystemExit, InputError, AssertionError) as error:
            pytest.fail(f"{page}: {command} {' '.join(arguments)}: {error}")
    assert {command for _, command, _ in found} >= {*parsers, "weights/evaluate.py"} and len(found) > 20


def test_every_flag_that_is_named_exists():
    sources = "".join((ROOT / name).read_text() for name in (
        "sample.py", "ddpo_min/bench.py", "weights/evaluate.py", "weights/pretrain.py", "weights/world.py",
        "tests/beside_trl.py"))
    known = {"--nproc_per_node", "--nnodes"}        # torchrun's
    known |= set(cli.make_parser()._option_string_actions) | set(re.findall(r'"(--[a-z][\w-]*)"', sources))
    for page, text in TEXT.items():
        for code in inline(text):
            for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code):
                assert flag in known, f"{page}: {flag}"


@pytest.mark.parametrize("page", ["README.md", "docs/rewards.md"])
def test_the_reward_of_the_page_trains_from_python(page, monkeypatch):
    calls = []

    def pretend(settings, reward):
        calls.append((settings, reward))
        return SimpleNamespace(folder=settings.out, history=[{"reward_mean": 0}], result={"reward_after": 0})

    monkeypatch.setattr(train, "train", pretend)
    names = {}
    for language, block in fences(TEXT[page]):
        if language == "python" and "run.epochs" not in block:
            exec(block, names)
    (settings, reward), = calls
    assert (settings.epochs, settings.out) == (3, "runs/red")
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[1, ..., 0] = 200
    assert reward(images, ["a", "b"]).tolist() == [0, 200]


def test_the_product_imports_only_the_agreed_packages():
    agreed = {"torch", "numpy", "PIL", "open_clip", "huggingface_hub", "safetensors", "tqdm", "matplotlib",
              "ddpo_min", "world", "pretrain", "rater", "classifiers", "sharper", "evaluate"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("ddpo_min/*.py"), *ROOT.glob("weights/*.py")]:
        for name in re.findall(r"^\s*(?:import|from) ([A-Za-z_]\w*)", path.read_text(), re.M):
            assert name in agreed or name in sys.stdlib_module_names, f"{path.name} imports {name}"
