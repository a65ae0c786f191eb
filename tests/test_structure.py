"""The structure of the house: which file may import which. CONTRIBUTING.md says what each file is for."""
import ast

import pytest

from conftest import ROOT

FLOORS = [
    "schedule v_prediction ddim layers layout settings files processes device",
    "lora weights checkpoint interchange hub unet vae text prompts chat",
    "policy rollout plan advantages losses rewards clip_rewards preference_rewards vlm",
    "ddpo forward_process rwr metrics optimizer learner scorer evaluation memory",
    "cli run folder progress figures bench",
    "train sample",
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names.split()}


def imports(path):
    """The modules of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").startswith("ddpo_min")):
            module = (node.module or "").removeprefix("ddpo_min").lstrip(".")
            found |= {module} if module else {alias.name for alias in node.names} & FLOOR.keys()
    return found


FILES = {path.stem: path for path in [*ROOT.glob("*.py"), *ROOT.glob("ddpo_min/*.py")] if path.stem != "__init__"}
GRAPH = {name: imports(path) for name, path in FILES.items()}


def test_every_file_has_a_floor():
    assert FILES.keys() == FLOOR.keys()


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_down(name):
    for other in GRAPH[name]:
        assert FLOOR[other] <= FLOOR[name], f"{name} (floor {FLOOR[name]}) imports {other} (floor {FLOOR[other]})"


def test_no_imports_in_a_circle():
    def below(name, seen):
        for other in GRAPH[name] - seen:
            seen.add(other)
            below(other, seen)
        return seen

    assert [name for name in GRAPH if name in below(name, set())] == []


def test_a_circle_and_an_arrow_up_would_be_found(tmp_path):
    (tmp_path / "a.py").write_text("from . import layers\nfrom .run import Run\n\n\n"
                                   "def f():\n    from ddpo_min.vlm import x\n")
    assert imports(tmp_path / "a.py") == {"layers", "run", "vlm"}


def test_the_loop_stays_on_one_screen():
    tree = ast.parse((ROOT / "train.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    assert (ROOT / "train.py").read_text().count("\n") <= 120
    assert all(len([n for n in ast.walk(f) if isinstance(n, ast.FunctionDef | ast.Lambda)]) == 1 for f in functions)
    assert [loop.end_lineno - loop.lineno + 1 <= 30 for loop in loops] == [True]
    update = next(node for node in ast.walk(ast.parse((ROOT / "ddpo_min/ddpo.py").read_text()))
                  if isinstance(node, ast.FunctionDef) and node.name == "ddpo_update")
    assert update.end_lineno - update.lineno + 1 <= 40
    core = ["train.py", *(f"ddpo_min/{name}.py" for name in
                          "schedule ddim losses advantages policy rollout ddpo".split())]
    assert sum((ROOT / name).read_text().count("\n") for name in core) <= 660
