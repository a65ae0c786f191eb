"""--ema: the average of what is trained is evaluated and saved; training does not know of it."""
import pytest
import torch
from safetensors.torch import load_file

import train
from ddpo_min import learner
from ddpo_min.ddim import ddim_steps
from ddpo_min.lora import load_lora
from ddpo_min.optimizer import Optimizer
from ddpo_min.policy import Policy
from ddpo_min.prompts import find_prompts, held_out
from ddpo_min.rewards import jpeg
from ddpo_min.rollout import sample_trajectories
from ddpo_min.weights import load_stable_diffusion
from test_train import arguments, assert_same_run, metrics

MORE = "--lr", "0.02", "--eval-every", "1", "--keep-every", "3"
pytestmark = pytest.mark.usefixtures("plain_curve")


@pytest.fixture(scope="module")
def tiny_file(one_level):
    """The run is tested here, not the networks."""
    return one_level


@pytest.fixture(scope="module")
def runs(tiny_file, tmp_path_factory):
    """(folder of a run with an average, of the same run without, {name: its values before and after each step})."""
    folder, values, made = tmp_path_factory.mktemp("runs"), {}, learner.Learner.__init__

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        step = self.optimizer.step
        note = lambda: [values.setdefault(name, []).append(p.detach().clone())       # noqa: E731
                        for name, p in self.parameters.items()]
        note()
        self.optimizer.step = lambda: (step(), note())[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner.Learner, "__init__", make)
        train.main(arguments(tiny_file, folder / "average", *MORE, "--ema", "0.3"))
    train.main(arguments(tiny_file, folder / "plain", *MORE))
    return folder / "average", folder / "plain", values


def averages(values, ema, steps):
    """After so many steps, in float64."""
    average = values[0].double()
    for n, value in enumerate(values[1:steps + 1], start=1):
        decay = min(ema, n / (n + 9))
        average = decay * average + (1 - decay) * value.double()
    return average


@pytest.mark.parametrize("file, steps", [("lora_0003", 6), ("lora", 8)])
def test_what_is_saved_is_the_average_over_the_steps(runs, file, steps):
    saved = load_file(runs[0] / f"{file}.safetensors")
    assert saved.keys() == runs[2].keys() and len(runs[2]["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
                                                          ".lora_B.weight"]) == 9
    for name, values in runs[2].items():
        assert (saved[name] - averages(values, 0.3, steps)).abs().max() < 1e-6
        if "lora_B" in name:
            assert (saved[name] - values[steps]).abs().max() > 1e-3


def test_training_is_that_of_a_run_without(runs):
    average, plain, _ = runs
    ours, theirs = (torch.load(path / "state.pt", weights_only=True)["learner"]["parameters"]
                    for path in (average, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = metrics(average), metrics(plain)
    assert [line.pop("eval_reward") for line in ours] != [line.pop("eval_reward") for line in theirs]
    assert ours == theirs


def test_what_is_evaluated_is_the_average(runs, tiny_file):
    model = load_stable_diffusion(tiny_file)
    layers = load_lora(runs[0] / "lora.safetensors", model.unet)
    prompts, seeds = held_out(find_prompts("animals"), 5)
    drawn = sample_trajectories(Policy(model, ddim_steps(3), 1.0, lora=layers), prompts, seeds,
                                [slice(0, 4), slice(4, 5)], keep="images")
    assert metrics(runs[0])[-1]["eval_reward"] == pytest.approx(jpeg(drawn.images, prompts).mean(), abs=1e-6)


def test_resuming_is_exact(runs, tiny_file, tmp_path):
    train.main(arguments(tiny_file, tmp_path / "halves", *MORE, "--ema", "0.3", epochs=2))
    train.main(["--resume", str(tmp_path / "halves"), "--epochs", "4"])
    assert_same_run(runs[0], tmp_path / "halves")


def test_a_skipped_step_does_not_count():
    p = torch.nn.Parameter(torch.zeros(1))
    made = Optimizer([p], lr=1.0, ema=0.9, scale_loss=True)
    made.backward((p * torch.inf).sum())
    assert made.step() is None and made.steps == 0
    made.backward(p.sum())
    made.step()
    with made.averaged():
        assert p.item() == pytest.approx(-0.9, rel=1e-3)        # d = 1 / 10, AdamW's first step is its rate
    assert p.item() == pytest.approx(-1, rel=1e-3)
