"""The recipe of the shipped model."""
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "weights"))
import pretrain
import sharper
import tried
from ddpo_min.ddim import ddim_mean
from ddpo_min.files import InputError
from ddpo_min.schedule import alphas_cumprod


@pytest.mark.parametrize("t, s", [(951, 701), (251, 1), (126, None)])
def test_the_jump_is_ddims_step_to_the_point_ahead(t, s):
    torch.manual_seed(0)
    x_t, x_s = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    a = alphas_cumprod().double().tolist()
    a_t, a_s = a[t], 1.0 if s is None else a[s]
    eps = sharper.jump_eps(x_t, x_s, a_t, a_s)
    assert (ddim_mean(x_t, eps, a_t, a_s, 0.0) - x_s).abs().max() < 1e-12


class Gaussian(torch.nn.Module):
    """The best prediction for latents drawn from N(mean, spread^2): with it, walks have a closed form."""
    mean, spread = 0.5, 0.8

    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Linear(1, 1)        # its dtype is asked for
        self.alpha_bar = alphas_cumprod()

    def forward(self, x_t, t, context):
        a = self.alpha_bar[t].reshape(-1, 1, 1, 1).to(x_t)
        mean = self.mean + 0.1 * context.mean((1, 2))[:, None, None, None]
        return (1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * self.spread ** 2 + 1 - a)


def toy_pictures():
    """60 random latents with two captions, whose contexts are all 1 and all 2; the empty prompt's is all 0."""
    torch.manual_seed(1)
    pictures = object.__new__(pretrain.Pictures)
    pictures.latents = Gaussian.mean + Gaussian.spread * torch.randn(60, 4, 4, 4)
    pictures.which = torch.arange(60) % 2
    pictures.contexts = torch.stack([torch.full((5, 3), v) for v in (1.0, 2.0, 0.0)])
    pictures.alpha_bar, pictures.device = alphas_cumprod().float(), "cpu"
    return pictures


def test_walks_follow_the_teacher_and_look_ten_points_ahead(monkeypatch):
    """For one Gaussian, a walk of small steps keeps (x_t - sqrt(a) mean) / sqrt(a spread^2 + 1 - a) constant."""
    monkeypatch.setattr(sharper, "GUIDED", (2000, 2000))
    monkeypatch.setattr(sharper, "WALKS", 40)
    monkeypatch.setattr(sharper, "STEP", 5)
    monkeypatch.setattr(sharper, "AHEAD", 50)
    walks = sharper.Walks(toy_pictures(), Gaussian(), seed=0)
    x_t, t, eps, context = walks.walk(torch.Generator().manual_seed(3))
    a = walks.pictures.alpha_bar[t].double()[:, None, None, None]
    a_s = torch.where(t > 250, walks.pictures.alpha_bar[(t - 250).clamp(min=0)].double(), 1.0)[:, None, None, None]
    mean = Gaussian.mean + 0.1 * context.mean((1, 2)).double()[:, None, None, None]
    spread = lambda a: (a * Gaussian.spread ** 2 + 1 - a).sqrt()        # noqa: E731
    x_s = a_s.sqrt() * mean + spread(a_s) * (x_t.double() - a.sqrt() * mean) / spread(a)
    found = ddim_mean(x_t.double(), eps.double(), a, a_s, 0.0)
    assert (found - x_s).abs().max() < 0.05 and (found - x_s).abs().mean() < 0.005
    assert sorted(set(t.tolist())) == list(range(1, 1000, 5))
    counts = torch.bincount(t)[1::5]                # walks begin everywhere: the less noise, the more of them pass
    assert (counts.diff() <= 0).all() and counts[0] == 40 and counts[-1] >= 1


def test_guidance_is_in_the_walks_where_it_is_wanted():
    walks = sharper.Walks(toy_pictures(), Gaussian(), seed=0)
    x, context = torch.randn(3, 4, 4, 4), torch.full((3, 5, 3), 2.0)
    eps = lambda t, mean: Gaussian()(x, torch.tensor([t] * 3), torch.full((3, 5, 3), mean))      # noqa: E731
    low, high = sharper.GUIDED
    for t in (low - 10, high + 10):
        assert torch.allclose(walks.guided_eps(x, t, context), eps(t, 2.0), atol=1e-6)
    for t in (low, 500, high):      # the prediction is linear in the context: guidance 2 doubles it
        assert torch.allclose(walks.guided_eps(x, t, context), eps(t, 4.0), atol=1e-5)


def test_minibatches_are_functions_of_seed_and_step_and_use_each_point_once(monkeypatch):
    monkeypatch.setattr(sharper, "WALKS", 32)
    def minibatches(seed, steps):
        walks = sharper.Walks(toy_pictures(), Gaussian(), seed)
        return walks, [walks.minibatch(step, torch.Generator().manual_seed(step)) for step in steps]
    walks, first = minibatches(0, range(12))
    assert walks.minibatches == 10                  # 32 walks of 20.5 points on average
    again = minibatches(0, [11, 3])[1]
    for mine, other in ((first[11], again[0]), (first[3], again[1])):
        assert all(torch.equal(a, b) for a, b in zip(mine, other))
    assert not torch.equal(first[0][0], minibatches(1, [0])[1][0][0])
    captioned = torch.cat([x[context[:, 0, 0] > 0] for x, _, _, context, _ in first[:10]]).flatten(1)
    assert len(captioned.unique(dim=0)) == len(captioned)
    plain = torch.cat([context[:, 0, 0] == 0 for *_, context, _ in first])
    assert 0.05 < plain.float().mean() < 0.16
    for x_t, t, eps, context, weight in first:      # without a caption, a sample is an ordinary noised latent
        own, a = context[:, 0, 0] == 0, walks.pictures.alpha_bar[t][:, None, None, None]
        x_0 = ((x_t - (1 - a).sqrt() * eps) / a.sqrt())[own]
        far = (x_0[:, None] - walks.pictures.latents[None]).abs().amax((2, 3, 4)).amin(1)
        assert (far < 1e-3 * (1 / a[own]).flatten().sqrt()).all() and (weight[own] == 1).all()
        assert torch.allclose(weight[~own], (1 / a[~own]).flatten().clamp(max=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stage_that_was_stopped_ends_as_one_that_was_not(tmp_path, dtype):
    def stage(folder, stop_at=None):
        torch.manual_seed(0)
        (tmp_path / folder).mkdir(exist_ok=True)
        args = SimpleNamespace(work=tmp_path / folder, seed=5, device="cpu", stop_at=stop_at)

        def loss_of(network, step, generator):
            x = torch.randn(8, 3, generator=generator)
            loss = ((network(x.to(dtype)).float() - x.sum(1, keepdim=True) - step / 20) ** 2).mean()
            return loss, loss.item()

        return pretrain.fit("toy", torch.nn.Linear(3, 1), loss_of, args, 20, 0.5, ema=0.9, dtype=dtype)

    whole = stage("whole")
    stage("parts", stop_at=7)
    parts = stage("parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    assert whole.weight.dtype == torch.float32 and (whole.weight.bfloat16().float() != whole.weight).any()
    assert (tmp_path / "whole/log.json").exists()


def test_the_check_tells_the_same_model_from_another(tmp_path, monkeypatch, capsys):
    made = dict(vae=20.5, unet=0.1)

    def stage(args):
        assert (args.renders, args.stop_at) == (2000, 200)
        for name, figure in made.items():
            pretrain.log(args, name, figure=figure, weights=f"weights of {figure}")

    for name in ("train_second_classifier", "train_classifier", "train_sharper"):
        monkeypatch.setattr(pretrain, name, stage)
    monkeypatch.setattr(pretrain, "CHECK", tmp_path / "check.json")
    pretrain.check(SimpleNamespace())
    assert "written" in capsys.readouterr().out
    for figure, verdict in ((0.1, "to the bit"), (0.1001, "but for rounding"), (0.11, "ANOTHER MODEL")):
        made["unet"] = figure
        pretrain.check(SimpleNamespace())
        said = capsys.readouterr().out.splitlines()
        assert said[0].endswith("the same to the bit") and said[1].endswith(verdict) and len(said) == 2


class Student(Gaussian):
    """The teacher with a context that counts `factor` times."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x_t, t, context):
        return super().forward(x_t, t, self.factor * context)


@pytest.mark.parametrize("way", tried.FINE_TUNED)
def test_every_way_that_is_tried_has_a_loss_to_learn_from(way, monkeypatch):
    for name, value in tried.OWN.items():
        monkeypatch.setattr(sharper, name, value)       # ways change them
    monkeypatch.setattr(sharper, "WALKS", 32)
    loss, steps = tried.FINE_TUNED[way]
    student = Student(0.5)
    value = loss(toy_pictures(), Gaussian(), student, 0, torch.Generator().manual_seed(0))
    value.backward()
    assert value.isfinite() and student.factor.grad != 0 and steps >= 100


def test_the_way_with_guidance_built_in_is_satisfied_where_the_context_counts_twice():
    """The toy prediction is linear in the context, which is 0 without a caption."""
    pictures, seed = toy_pictures(), torch.Generator().manual_seed
    assert tried.guided(pictures, Gaussian(), Student(2.0), 0, seed(0)) < 1e-10
    assert tried.guided(pictures, Gaussian(), Student(1.0), 0, seed(0)) > 1e-4
    inside = tried.guided(pictures, Gaussian(), Student(2.0), 0, seed(0), between=(200, 750))
    assert inside > 1e-4 and tried.guided(pictures, Gaussian(), Student(1.0), 0, seed(0), between=(5000, 6000)) < 1e-10


def test_half_of_the_timesteps_are_the_samplers_and_min_snr_counts_quiet_ones_less(monkeypatch):
    seen = []
    monkeypatch.setattr(tried, "denoising", lambda network, x_t, t, context, eps, weight=1.0: seen.append((t, weight)))
    for way in (tried.on_the_grid, tried.min_snr):
        way(toy_pictures(), None, None, 0, torch.Generator().manual_seed(0))
    (on_grid, _), (t, weight) = seen
    assert set(on_grid[::2].tolist()) <= {876, 751, 626, 501, 376, 251, 126, 1}
    assert len(set(on_grid[1::2].tolist())) > 16
    a = alphas_cumprod()[t]
    assert torch.allclose(weight.double(), torch.where(a / (1 - a) > 5, 5 * (1 - a) / a, 1.0), rtol=1e-4)
    assert (weight < 0.1).any() and (weight == 1).any()


@pytest.mark.parametrize("there", [(), ("latents.pt",), ("unet.pt",)])
def test_ways_are_only_tried_after_the_recipe(tmp_path, there):
    for file in there:
        (tmp_path / file).touch()
    with pytest.raises(InputError, match=r"\.pt: not there; python weights/pretrain\.py leaves it, run that first$"):
        tried.main(tmp_path)
