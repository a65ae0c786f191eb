"""Rewards by name, their sums, prompt sets, and the rewards by a CLIP."""
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import train
from conftest import ROOT
from ddpo_min import clip_rewards
from ddpo_min.files import InputError
from ddpo_min.prompts import PROMPT_SETS, evaluation_prompts, find_prompts
from ddpo_min.scorer import Scorer, find_reward, parse_rewards
from test_train import arguments, metrics

sys.path.insert(0, str(ROOT / "weights"))
import rater
import world

OWN = "import numpy as np\n\n\ndef red(images, prompts):\n    return images[..., 0].mean((1, 2))\nnot_a_function = 3\n"


# Names and sums

def test_a_sum_is_parsed_and_each_part_can_be_named_or_be_a_users_own(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    own = f"{tmp_path / 'mine.py'}:red"
    assert parse_rewards("jpeg") == {"jpeg": 1}
    assert parse_rewards(f"aesthetic=1, jpeg=0.05,{own}=-2") == {"aesthetic": 1, "jpeg": 0.05, own: -2}
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[1, ..., 0] = 200
    assert find_reward(own)(images, ["", ""]).tolist() == [0, 200]
    assert find_reward("statistics:mean") is sys.modules["statistics"].mean


@pytest.mark.parametrize("spec,named", [
    ("beauty", "beauty"), ("jpeg=much", "much"), ("jpeg=nan", "nan"), ("jpeg=0", "0"), ("none.py:red", "none.py"),
    ("no_such_module:f", "no_such_module"), ("statistics:nothing", "nothing"),
    ("{mine}:not_a_function", "not_a_function"),
    ("{mine}:blue", "blue"), ("{broken}:red", "SyntaxError"), ("", "without a name"), ("jpeg=1,jpeg=2", "twice")])
def test_a_reward_that_is_not_there_is_one_line(spec, named, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("def red(:")
    with pytest.raises(InputError, match=named) as caught:
        parse_rewards(spec.format(mine=tmp_path / "mine.py", broken=tmp_path / "broken.py"))
    assert "\n" not in str(caught.value)


def test_the_scorer_keeps_the_order_and_weighs_the_sum():
    def slow_at_first(images, prompts):
        time.sleep(0.2 if images[0, 0, 0, 0] == 0 else 0)
        return images[:, 0, 0, 0]

    scorer = Scorer({"jpeg": 2.0, "vlm": -1.0}, {"jpeg": slow_at_first,
                                                 "vlm": lambda images, prompts: [len(p) for p in prompts],
                                                 "incompressible": lambda images, prompts: np.ones(len(images))})
    assert scorer.pool._max_workers > 1
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(3, 3)
    for part in (slice(0, 2), slice(2, 5), slice(5, 6)):
        scorer.add(images[part], ["x" * int(n) for n in images[part, 0, 0, 0]], part.start)
    total, scores = scorer.collect()
    assert total.tolist() == [0, 1, 2, 3, 4, 5] == scores["vlm"].tolist() and scores["incompressible"].sum() == 6
    scorer.add(images[:1], ["x"], 0)
    assert len(scorer.collect()[0]) == 1


def test_a_reward_that_writes_into_its_pictures_changes_nobodys():
    def vandal(images, prompts):
        images[:] = 0
        return np.zeros(len(images))

    scorer = Scorer({"jpeg": 1.0}, {"jpeg": vandal, "watched": lambda images, prompts: images.max((1, 2, 3))})
    images = np.full((2, 4, 4, 3), 9, np.uint8)
    scorer.add(images, ["", ""], 0)
    assert scorer.collect()[1]["watched"].tolist() == [9, 9] and images.min() == 9


def test_a_reward_that_is_no_number_names_its_images():
    scorer = Scorer({"mine": 1.0}, {"mine": lambda images, prompts: [1, np.nan if "a fox" in prompts else 1]})
    for prompts in (["a cat", "a dog"], ["a cat", "a fox"]):
        scorer.add(np.zeros((2, 4, 4, 3), np.uint8), prompts, 2 * len(scorer.pending))
    with pytest.raises(InputError, match=r"mine is nan for 1 of 2 images.*epoch: 3 \('a fox'\)"):
        scorer.collect()


def test_scoring_beside_sampling_changes_nothing(tiny_file, tmp_path):
    """A sum of rewards logs each part; the parts are those of the pictures in order."""
    train.main(arguments(tiny_file, tmp_path / "sum", "--reward", "jpeg=2,incompressible=1", epochs=2))
    train.main(arguments(tiny_file, tmp_path / "one", epochs=2))
    for line, single in zip(metrics(tmp_path / "sum"), metrics(tmp_path / "one")):
        assert line["reward_mean"] == pytest.approx(2 * line["score_jpeg"] + line["score_incompressible"])
        assert line["reward_mean"] == pytest.approx(single["reward_mean"])


def test_a_reward_that_raises_ends_the_run_in_one_line_with_the_run_saved(tiny_file, tmp_path):
    (tmp_path / "mine.py").write_text("calls = []\ndef bad(images, prompts):\n    calls.append(1)\n"
                                      "    if len(calls) > 4: raise KeyError('lost\\nmore')\n"
                                      "    return [1.0] * len(images)\n")
    with pytest.raises(InputError, match="mine.py:bad failed on images 0 to 3, .*KeyError") as caught:
        train.main(arguments(tiny_file, tmp_path / "run", "--reward", f"{tmp_path / 'mine.py'}:bad"))
    assert "\n" not in str(caught.value)
    assert len(metrics(tmp_path / "run")) == 1 and (tmp_path / "run" / "state.pt").exists()


# Prompt sets

def test_the_prompt_sets_are_the_papers():
    sizes = {name: len(make()) for name, make in PROMPT_SETS.items()}
    assert sizes == dict(animals=45, imagenet_animals=398, activities=135, counting=154, dpok=4)
    assert all(len(set(make())) == len(make()) for make in PROMPT_SETS.values())
    activities = find_prompts("activities")
    assert "an ant riding a bike" in activities and "a cat washing dishes" in activities
    assert find_prompts("imagenet_animals")[0] == "a tench" and "an axolotl" in find_prompts("imagenet_animals")
    assert find_prompts("counting")[0] == "two cats" and "eight wolves" in find_prompts("counting")


def test_evaluation_prompts_are_never_trained_on():
    trained = find_prompts("animals")[:40]
    assert evaluation_prompts("", trained) == trained
    assert evaluation_prompts("animals", trained) == find_prompts("animals")[40:]
    with pytest.raises(InputError, match="trained on"):
        evaluation_prompts("animals", find_prompts("animals"))


# The rewards by a CLIP

def test_the_head_is_linear_layers_without_activation(tmp_path):
    torch.manual_seed(0)
    weights = [(torch.randn(3, 4), torch.randn(3)), (torch.randn(1, 3), torch.randn(1))]
    head = clip_rewards.AestheticHead(weights)
    z = torch.randn(5, 4)
    (w1, b1), (w2, b2) = weights
    assert torch.allclose(head(z), (z @ w1.T @ w2.T + (w2 @ b1 + b2))[:, 0], atol=1e-5)
    state = {"layers.0.weight": w1, "layers.0.bias": b1, "layers.2.weight": w2, "layers.2.bias": b2}
    torch.save(state, tmp_path / "h.pth")
    assert torch.equal(clip_rewards.load_head(tmp_path / "h.pth")(z), head(z))


def test_a_head_of_laions_shapes_is_read(tmp_path):
    """Names and shapes of sac+logos+ava1-l14-linearMSE.pth: the dropouts between take numbers, too."""
    widths, state = (768, 1024, 128, 64, 16, 1), {}
    torch.manual_seed(0)
    for n, a, b in zip((0, 2, 4, 6, 7), widths, widths[1:]):
        state.update({f"layers.{n}.weight": torch.randn(b, a) / a ** 0.5, f"layers.{n}.bias": torch.randn(b)})
    torch.save(state, tmp_path / clip_rewards.LAION_HEAD)
    x = z = torch.nn.functional.normalize(torch.randn(3, 768), dim=1)
    for n in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{n}.weight"].T + state[f"layers.{n}.bias"]
    assert torch.allclose(clip_rewards.load_head(tmp_path / clip_rewards.LAION_HEAD)(z), x[:, 0], atol=1e-5)


@pytest.mark.parametrize("shapes", [[(3, 4), (1, 2)], [(3, 4), (2, 3)], []])
def test_a_head_whose_layers_do_not_fit_is_refused(shapes, tmp_path):
    state = {}
    for n, shape in enumerate(shapes):
        state.update({f"layers.{n}.weight": torch.zeros(shape), f"layers.{n}.bias": torch.zeros(shape[0])})
    save_file(state or {"other": torch.zeros(1)}, tmp_path / "h.safetensors")
    with pytest.raises(InputError, match="--aesthetic-head"):
        clip_rewards.load_head(tmp_path / "h.safetensors")


@pytest.mark.parametrize("change", [
    {"layers.0.bias": torch.tensor([0.0, float("nan"), 1])}, {"layers.2.weight": torch.full((1, 3), float("inf"))},
    {"layers.2.weight": torch.ones(1, 3, dtype=torch.int64)}, {"layers.0.scale": torch.ones(3)}])
def test_a_head_with_wrong_numbers_or_tensors_of_another_kind_is_refused(change, tmp_path):
    state = {"layers.0.weight": torch.zeros(3, 4), "layers.0.bias": torch.zeros(3),
             "layers.2.weight": torch.zeros(1, 3), "layers.2.bias": torch.zeros(1)}
    save_file(state, tmp_path / "h.safetensors")
    clip_rewards.load_head(tmp_path / "h.safetensors")
    save_file({**state, **change}, tmp_path / "h.safetensors")
    with pytest.raises(InputError, match="--aesthetic-head"):
        clip_rewards.load_head(tmp_path / "h.safetensors")


def test_a_head_for_another_clip_and_unknown_models_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"layers.0.weight": torch.zeros(1, 768), "layers.0.bias": torch.zeros(1)}, tmp_path / "h.safetensors")
    for wrong, named in ((["--reward", "aesthetic", "--aesthetic-head", "h.safetensors"], "768"),
                         (["--reward", "clip", "--clip-model", "ViT-X"], "ViT-X"), (["--reward", "vlm"], "--vlm-model"),
                         (["--reward", "vlm", "--vlm-model", "m", "--vlm-reference", "x"], "--vlm-reference")):
        with pytest.raises(InputError, match=named):
            train.main(wrong)
    assert not (tmp_path / "runs").exists()


def test_the_laion_head_is_kept_only_with_its_checksum(tmp_path, monkeypatch):
    class Answer:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self):
            return b"something else"

    monkeypatch.setattr(clip_rewards.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(clip_rewards.urllib.request, "urlopen", lambda *_, **__: Answer())
    with pytest.raises(InputError, match="sha256"):
        clip_rewards.laion_head_path()
    assert not list(tmp_path.rglob("*.pth"))
    monkeypatch.setattr(clip_rewards, "LAION_SHA256", clip_rewards.hashlib.sha256(b"something else").hexdigest())
    assert clip_rewards.laion_head_path().read_bytes() == b"something else"


def test_the_small_clip_prefers_the_right_prompt():
    reward = find_reward("clip")
    images, captions = world.render_many(123, 60, activities=False)[:2]
    captions = captions.tolist()
    right = reward(images, captions)
    assert right.shape == (60,) and np.abs(right).max() <= 1
    assert (right > reward(images, captions[7:] + captions[:7])).mean() > 0.9


def test_the_small_clip_sees_pictures_of_other_sizes():
    images, captions = world.render_many(123, 20, activities=False)[:2]
    larger = np.stack([Image.fromarray(image).resize((96, 96), Image.BICUBIC) for image in images])
    wide = np.pad(larger, ((0, 0), (0, 0), (48, 48), (0, 0)))      # the middle is looked at
    for name in ("clip", "aesthetic"):
        scores = find_reward(name)(images, captions.tolist())
        for others in (larger, wide):
            found = find_reward(name)(others, captions.tolist())
            assert np.abs(found - scores).max() < 0.05 * np.abs(scores).max()


def test_the_learned_aesthetic_follows_the_rule_behind_it():
    images = world.render_many(rater.RATER_SEED + 1, 300).image
    learned, rule = find_reward("aesthetic")(images, [""] * 300), rater.rule(images)
    assert np.corrcoef(learned, rule)[0, 1] > 0.5 and np.abs(learned - rule).mean() < 1.5


def test_two_rewards_look_with_one_clip(monkeypatch):
    made = []
    small = SimpleNamespace(name=clip_rewards.SMALL, similarity=None)
    monkeypatch.setattr(clip_rewards, "ClipScorer", lambda *given: (made.append(given), small)[1])
    clip_rewards.clip_scorer.cache_clear()
    for name in ("clip", "aesthetic"):
        find_reward(name, device=torch.device("cpu"))
    clip_rewards.clip_scorer.cache_clear()
    assert len(made) == 1


def test_the_rule_of_the_rater_by_hand():
    flat = np.zeros((1, 32, 32, 3), np.uint8)
    assert rater.rule(flat).item() == pytest.approx(4.5)
    flat[..., 0], flat[..., 2] = 102, 51            # 0.4 red, 0.2 blue: warmth 0.2, saturation 0.4
    assert rater.rule(flat).item() == pytest.approx(4.5 + 1.2 + 1.6)
    middle = flat.copy()
    middle[:, 12:20, 12:20] = 255
    assert rater.rule(middle).item() < rater.rule(flat).item()     # less colour; the border stays quiet
    noisy = flat.copy()
    noisy[:, ::2] //= 2
    assert rater.rule(noisy).item() < rater.rule(flat).item() - 0.5
