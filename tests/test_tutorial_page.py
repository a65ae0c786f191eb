"""The tutorial's page: its lines print what it says, its diffs are one_page.py's, its tables are what was measured."""
import ast
import importlib.util
import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tutorial"))
import measure

import ddpo_min.weights
from ddpo_min.cli import read_settings
from ddpo_min.files import InputError
from test_readme import fences, inline

spec = importlib.util.spec_from_file_location("tutorial_figures", ROOT / "tutorial" / "figures.py")
figures = importlib.util.module_from_spec(spec)         # not "figures": experiments/ has one, too
spec.loader.exec_module(figures)

TEXT = measure.PAGE.read_text()
CODE = "".join(path.read_text() for folder in (".", "ddpo_min", "tutorial", "tutorial/exercises")
               for path in (ROOT / folder).glob("*.py"))
MARKERS = re.findall(r"^<!-- figures:(\w+) -->$", TEXT, re.M)


def random_pictures(rows, columns):
    return np.random.default_rng(0).integers(0, 256, (rows, columns, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A folder with numbers of every experiment, as from runs."""
    monkeypatch.setattr(measure, "MEASURED", tmp_path / "measured")
    monkeypatch.setattr(figures, "PICTURES", tmp_path / "pictures")
    measure.MEASURED.mkdir()
    figures.PICTURES.mkdir()
    rng = np.random.default_rng(0)
    measure.write("steps", [dict(step=i + 1, t=876 - 125 * i, sigma=0.8 - i / 10, spread=(8 - i) / 20)
                            for i in range(8)])
    measure.write("ratios", [dict(way="a", largest=0.0, beyond_1e_2=0.0, beyond_1e_4=0.0),
                             dict(way="b, c", largest=0.0123, beyond_1e_2=0.25, beyond_1e_4=0.5)])
    measure.write("prompts", [dict(prompt=f"a {n}", jpeg=-n + k / 8, aesthetic=5.0 + k, clip=0.1 * n + k)
                              for n in range(45) for k in range(8)])
    measure.write("plane", [dict(variant=name, seed=s, epoch=e, reward=-2.7 + 0.1 * e + 0.01 * s)
                            for name in measure.PLANE for s in (1, 2, 3) for e in range(16)])
    for n, name in enumerate(measure.PROGRAMS):
        measure.write(name, [dict(epoch=e, kilobytes=2.5 - 0.1 * e * n, approx_kl=1e-4 * (n + 1), beyond=0.1 * n)
                             for e in range(5)] + [dict(epoch=5, kilobytes=2.0)])
    for name in measure.TRAININGS:
        measure.write(name, [dict(epoch=0, reward=-2.3, recognised=0.9, held_out=-2.4, held_out_recognised=0.9,
                                  max_ratio_error=0.0, clip_fraction=0.1, approx_kl=1e-4),
                             dict(epoch=1, reward=-2.0, recognised=0.8, max_ratio_error=0.0, clip_fraction=0.3,
                                  approx_kl=3e-4),
                             dict(epoch=2, reward=-1.9, held_out=-1.95, held_out_recognised=0.88, max_ratio_error=0.0,
                                  clip_fraction=0.2, approx_kl=2e-4),
                             dict(epoch=3, held_out=-1.75, held_out_recognised=float(rng.uniform(0.3, 0.8)))])
    for name in ("hacked", "with_kl"):
        table = measure.read(name)
        measure.write(name, [dict(zip(table, values), held_out_rule=5 + k) for k, values in
                             enumerate(zip(*table.values()))])
    measure.write("sick_1", [dict(epoch=0, held_out=-2.6, reward=-2.6, max_ratio_error=0.4, clip_fraction=0.6,
                                  approx_kl=1e-3), dict(epoch=1, held_out=-2.2)])
    for name, shape in dict(steps=(4, 9), ways=(8, 8), one_page=(6, 10), healthy=(4, 10), too_fast=(4, 10),
                            unstable=(4, 10), hacked=(4, 10), with_kl=(4, 10), sick_1=(1, 10)).items():
        measure.keep(name, random_pictures(*shape))


# The page as it is

def test_the_pages_python_prints_what_it_says(capsys):
    names, state = {}, torch.get_rng_state()
    blocks = [block for language, block in fences(TEXT) if language == "python"]
    for block in blocks:
        exec(block, names)
        said = re.findall(r"^ *print\(.*\) +# (.*)$", block, re.M)
        assert len(said) == block.count("print(") and capsys.readouterr().out.splitlines() == said
    torch.set_rng_state(state)
    assert len(blocks) >= 7


def test_every_name_on_the_page_is_in_the_code():
    names = [code for code in inline(TEXT) if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\(\))?", code)]
    assert len(names) > 40
    for name in names:
        if not name.endswith((".md", ".py", ".png", ".webp", ".jsonl")):
            last = name.removesuffix("()").split(".")[-1]
            assert re.search(rf"\b{last}\b", CODE), name
    named = ast.walk(ast.parse((ROOT / "train.py").read_text()))
    loop = next(node for node in named if isinstance(node, ast.With))
    assert f"It is {loop.end_lineno - loop.lineno + 1} lines long" in TEXT


def test_the_trainings_are_the_pages_commands(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = [block.replace("\\\n", "") for _, block in fences(TEXT)]
    said = {" ".join(line.split()) for line in [*inline(TEXT), *"\n".join(blocks).splitlines()]}
    for name, arguments in measure.TRAININGS.items():
        whole = f"{arguments} {measure.WATCH[name]} {measure.EVALUATIONS}"
        read_settings(shlex.split(whole))
        assert said & {f"python train.py {arguments}", f"python train.py {whole}"}
        assert name not in ("healthy", "hacked") or f"python train.py {whole}" in said
    assert f"python train.py {shlex.join(measure.curves.exercises()[1])}" in said


def test_there_are_twenty_questions_with_folded_answers():
    questions = re.findall(r"^<details><summary>(\d+)\. .*?</summary>\n.+?</details>$", TEXT, re.M | re.S)
    assert questions == [str(n + 1) for n in range(20)]
    named = re.findall(r"[Ss]ection (\d+)", " ".join(TEXT.split()))
    assert set(named) <= set(re.findall(r"^## (\d+)\. ", TEXT, re.M)) and len(named) >= 20


def test_everything_is_measured_and_the_tables_are_its_numbers():
    assert [name for name in measure.EXPERIMENTS if not measure.there(name)] == []
    assert figures.filled(TEXT) == TEXT


# Its diffs

def loss_of(name):
    """loss_of() of one of the programs, as a function of log_p, log_p_old and A."""
    page = {"__name__": "page", "__file__": str(ROOT / "tutorial" / "one_page.py")}
    exec(measure.program(name), page)
    page["step"] = lambda *_: (None, None)

    def loss(log_p, log_p_old, A):
        page["log_prob"] = lambda *_: log_p
        return page["loss_of"](None, None, None, 0, None, A, log_p_old)

    return loss, page


def test_the_diffs_lead_from_reinforce_to_one_page():
    A, old = torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    moved = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64)
    expected = dict(reinforce=-A, baseline=-A, ratio=-A * moved.exp(),
                    one_page=-A * moved.exp() * torch.tensor([0, 1, 1, 0]))     # the others are where they should be
    assert measure.program("one_page") == (ROOT / "tutorial" / "one_page.py").read_text()
    for name, gradient in expected.items():
        loss, _ = loss_of(name)
        for log_p, grad in ((old, -A), (moved, gradient)):
            log_p = log_p.clone().requires_grad_()
            loss(log_p, old, A).backward()
            assert torch.allclose(log_p.grad, grad / 4)
    rewards = torch.arange(90.0).view(2, 45).T.reshape(90)
    assert loss_of("reinforce")[1]["advantages"](rewards).equal(rewards)
    assert loss_of("baseline")[1]["advantages"](rewards).view(45, 2).sum(1).abs().max() < 1e-6
    x, mu = torch.randn(2, 3, 4, 16, 16)
    by_mean, by_sum = (loss_of(name)[1]["log_prob"](x, mu, torch.tensor(0.5)) for name in ("one_page", "summed"))
    assert torch.allclose(by_sum, 1024 * by_mean)


def test_a_diff_that_does_not_fit_is_named():
    with pytest.raises(InputError, match="the page's diff clip does not fit"):
        measure.changed("return 1", "clip")


def test_a_program_is_run_and_measured(tiny_file, measured, monkeypatch):
    tiny, count = ddpo_min.weights.load_stable_diffusion(tiny_file), []
    monkeypatch.setattr(ddpo_min.weights, "load_stable_diffusion", lambda: tiny)
    plain = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *given: (count.append(1), plain(*given)))
    small = dict(PROMPTS=["a cat", "a dog"], SAMPLES=20, MINIBATCH=10, EPOCHS=1)
    (measure.MEASURED / "one_page.webp").unlink()
    for name, steps in dict(one_page=2, ratio=6).items():
        first, last = measure.one_page(name, **small)
        assert len(count) == steps
        count.clear()
        assert (first["epoch"], last["epoch"]) == (0, 1) and first["kilobytes"] > 0 and "approx_kl" not in last
        assert 0 < first["approx_kl"] < 1 and 0 <= first["beyond"] <= 1
    assert measure.kept("one_page", side=32).shape == (2, 10, 32, 32, 3)        # the tiny model's are of 32 pixels here


# Numbers and pictures

def test_what_is_written_is_read_again(measured):
    measure.write("some", [dict(a=1, b=0.1234567, c="x, y"), dict(a=2, c="z"), dict(a=3, b="", d=float("nan"))])
    table = measure.read("some")
    assert table["a"].tolist() == [1, 2, 3] and table["c"].tolist() == ["x, y", "z", ""]
    assert table["b"][0] == 0.123457 and np.isnan(table["b"][1:]).all() and np.isnan(table["d"]).all()
    pictures = np.broadcast_to(np.arange(0, 240, 40, dtype=np.uint8).reshape(2, 3, 1, 1, 1), (2, 3, 64, 64, 3))
    measure.keep("some", pictures)
    assert np.abs(measure.kept("some").astype(int) - pictures).max() <= 3


def test_a_run_becomes_rows(tmp_path):
    judge, rule = measure.JUDGE, measure.RULE
    lines = [dict(reward_mean=-2.5, clip_fraction=0.1, approx_kl=0.2, max_ratio_error=0,
                  **{f"score_{judge}": 0.9, f"score_{rule}": 5}),
             dict(reward_mean=-2.0, clip_fraction=0.3, approx_kl=0.4, max_ratio_error=0, eval_reward=-1.9,
                  **{f"score_{judge}": 0.8, f"eval_score_{judge}": 0.7, f"score_{rule}": 6, f"eval_score_{rule}": 7})]
    lines.append(dict(lines[0], reward_mean=-1.8, kl_to_base=0.5))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "result.json").write_text(json.dumps(dict(reward_before=-2.4, reward_after=-1.7,
                                                          scores={judge: [0.95, 0.6], rule: [4, 8]})))
    first, second, third, last = measure.rows_of(tmp_path)
    assert first == dict(epoch=0, held_out=-2.4, held_out_recognised=0.95, held_out_rule=4, reward=-2.5,
                         recognised=0.9, rule=5, clip_fraction=0.1, approx_kl=0.2, max_ratio_error=0)
    assert second == dict(epoch=1, reward=-2.0, recognised=0.8, rule=6, clip_fraction=0.3, approx_kl=0.4,
                          max_ratio_error=0)
    assert [third[name] for name in ("held_out", "held_out_recognised", "held_out_rule", "kl_to_base")] == [
        -1.9, 0.7, 7, 0.5]
    assert last == dict(epoch=3, held_out=-1.7, held_out_recognised=0.6, held_out_rule=8)


def test_an_exercises_run_becomes_rows(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "HERE", tmp_path)
    (tmp_path / "exercises" / "rows").mkdir(parents=True)
    (tmp_path / "exercises" / "rows" / "sick_1.webp").write_bytes(b"a picture")
    made, runs = [], {}
    monkeypatch.setattr(measure.curves, "read", lambda: runs)
    monkeypatch.setattr(measure.curves, "make", lambda *given: (made.append(given), runs.update(sick_1=[
        dict(epoch=0, held_out=-2.6), dict(epoch=1, reward_mean=-2.5, clip_fraction=0.6, approx_kl=0.1),
        dict(epoch=2, reward_mean=-2.4, max_ratio_error=0.3, held_out=-2.2)])))
    for _ in range(2):
        rows = measure.exercise()
    assert [(name, patch.name) for name, _, patch in made] == [("sick_1", "1.patch")]
    assert rows == [dict(epoch=0, held_out=-2.6, clip_fraction=0.6, approx_kl=0.1, reward=-2.5),
                    dict(epoch=1, held_out="", max_ratio_error=0.3, reward=-2.4), dict(epoch=2, held_out=-2.2)]
    assert (measure.MEASURED / "sick_1.webp").read_bytes() == b"a picture"


def test_every_picture_of_the_page_is_drawn_and_every_table_filled(measured, monkeypatch):
    page = figures.PICTURES / "README.md"
    page.write_text(re.sub(r"(<!-- figures:\w+ -->\n).*?(<!-- end -->)", r"\1\2", TEXT, flags=re.S))
    monkeypatch.setattr(figures, "PAGE", page)
    monkeypatch.setattr(figures, "measure_what_is_missing", lambda: None)
    figures.main()
    drawn = {path.stem for path in figures.PICTURES.glob("*.webp")}
    assert drawn == set(re.findall(r"\(pictures/(\w+)\.webp\)", TEXT)) and len(drawn) >= 9
    assert sorted(MARKERS) == sorted(table.__name__.removeprefix("table_") for table in figures.TABLES)
    text = page.read_text()
    for line in ("| 3 | 626 | 0.60 | 0.300 kB |", "| b, c | 0.01 | 25% | 50% |",
                 "| REINFORCE, A = r | 5 | 2.500 -> 2.000 | 1.0e-04 | 0% |",
                 "| healthy | 0 | 0.20 | 2.0e-04 | -2.400 -> -1.750 | 90% -> ", "| sick 1 | 0.4 | 0.60 | 1.0e-03 | ",
                 "| stopped after 2 epochs | -1.95 | 7.00 | 88% |", "| after 3 epochs | -1.75 | 8.00 | "):
        assert line in text
    assert figures.filled(text.replace("-1.95 ", "-1.96 ")) == text


def test_the_share_between_prompts_is_the_analysis_of_variance(measured):
    rng = np.random.default_rng(1)
    between, within = rng.normal(0, 2.0, (4000, 1)), rng.normal(0, 1.0, (4000, 8))
    own = between + within
    measure.write("prompts", [dict(prompt="a b", jpeg=r, aesthetic=r, clip=r) for r in own.ravel()])
    _, row, *_ = figures.table_prompts()
    assert row[0] == "`jpeg`" and float(row[2]) == pytest.approx(1, abs=0.03) and row[3] in ("79%", "80%", "81%")


def test_only_what_is_missing_is_measured(measured, monkeypatch):
    done = []
    monkeypatch.setattr(measure, "EXPERIMENTS", {name: lambda name=name: done.append(name) or [dict(a=1)]
                                                 for name in ("plane", "new", "other")})
    measure.measure_what_is_missing()
    measure.measure_what_is_missing()
    assert done == ["new", "other"] and measure.read("new")["a"].tolist() == [1]
