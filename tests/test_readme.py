"""The README keeps its word: every row of its tables names things that exist."""
import importlib
import re

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"^\| .* \| `(ddpo_min\.\w+)\.(\w+)` \| `tests/(\w+\.py)::(\w+)` \|$", README, re.M)
FILES = re.findall(r"^\d+\. \[?`([\w/.]+)`\]?.*?\((\d+) lines\)", README, re.M)


def test_the_tables_are_found():
    table = README.split("## Equation, function, test")[1].split("##")[0]
    assert len(ROWS) == table.count("\n| ") - 1 >= 10
    assert len(FILES) >= 10


@pytest.mark.parametrize("module,function,file,test", ROWS)
def test_every_equation_has_its_function_and_its_test(module, function, file, test):
    assert callable(getattr(importlib.import_module(module), function))
    assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.M)


@pytest.mark.parametrize("file,lines", FILES)
def test_line_counts_are_true(file, lines):
    assert abs((ROOT / file).read_text().count("\n") - int(lines)) <= 5


def test_the_product_imports_only_the_agreed_packages():
    agreed = {"torch", "numpy", "PIL", "open_clip", "huggingface_hub", "safetensors", "tqdm", "matplotlib",
              "ddpo_min", "world", "pretrain", "rater"}
    import sys
    for path in [*ROOT.glob("*.py"), *ROOT.glob("ddpo_min/*.py"), *ROOT.glob("weights/*.py")]:
        for name in re.findall(r"^\s*(?:import|from) ([A-Za-z_]\w*)", path.read_text(), re.M):
            assert name in agreed or name in sys.stdlib_module_names, f"{path.name} imports {name}"
