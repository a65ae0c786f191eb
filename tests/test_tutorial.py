"""The tutorial's programs do what the project does."""
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, cut, plain_descent

sys.path.insert(0, str(ROOT / "tutorial"))
import one_page

from ddpo_min.ddim import ddim_steps
from ddpo_min.ddpo import ddpo_update, even_emphasis
from ddpo_min.plan import Plan
from ddpo_min.policy import Policy
from ddpo_min.rewards import jpeg
from ddpo_min.rollout import sample_trajectories
from ddpo_min.weights import load_stable_diffusion


def test_the_page_has_the_projects_settings():
    steps = ddim_steps(one_page.T)
    assert tuple(one_page.timesteps) == steps.t
    assert np.abs(np.array(one_page.EMPHASIS) - even_emphasis(steps)).max() <= 0.005
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    assert one_page.reward(images).numpy() == pytest.approx(np.array(jpeg(images, None)))
    a, b = torch.randn(2, 5, 4, 4, 4, dtype=torch.float64)
    theirs = torch.distributions.Normal(a, 0.3).log_prob(b).mean((1, 2, 3))
    ours = one_page.log_prob(b, a, torch.tensor(0.3))
    assert torch.allclose(ours - theirs, (ours - theirs)[:1].expand(5))        # but for a constant


def test_the_pages_gradient_is_the_updates(tiny_file, monkeypatch):
    """Off the policy that sampled, so that the ratio is not 1 and some of it is cut."""
    monkeypatch.setattr(one_page, "CLIP", 1e-3)
    model = load_stable_diffusion(tiny_file, dtype=torch.float64)
    steps, prompts = ddim_steps(one_page.T), ["a cat", "a dog", "a fox", "a cat", "an ant", "a bee"]
    policy = Policy(model, steps, 1.0)
    trajectories = sample_trajectories(policy, prompts, list(range(6)), cut(6, 6))
    unet = model.unet.requires_grad_(True)
    trained = {name: p for name, p in unet.named_parameters() if ".attn" in name}
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trained.values():
            p += 0.05 * torch.randn_like(p)
    A, i_of = torch.tensor([1.0, -0.5, 2.0, -1.5, 0.3, -2.0], dtype=torch.float64), range(one_page.T)
    with torch.no_grad():       # the page leaves a constant out of each step's log-probability
        x, context = trajectories.latents.transpose(0, 1), trajectories.context(slice(0, 6))
        moved = torch.stack([one_page.log_prob(x[i + 1], *one_page.step(unet, x[i], i, context)) for i in i_of])
        now = torch.stack([policy.log_prob(x[i + 1], x[i], i, context)[0] for i in i_of])
    log_p_old = moved - (now - trajectories.log_p_old.T)
    for i in i_of:
        loss = one_page.loss_of(unet, x[i], x[i + 1], i, context, A, log_p_old[i])
        (one_page.EMPHASIS[i] * loss / one_page.T).backward()
    ours = {name: p.grad.clone() for name, p in trained.items()}
    before = {name: p.detach().clone() for name, p in trained.items()}
    unet.zero_grad()
    ratio = torch.exp(now - trajectories.log_p_old.T)
    assert (ratio > 1 + one_page.CLIP).any() and ((ratio - 1).abs() < one_page.CLIP).any()
    metrics = ddpo_update(policy, plain_descent(list(trained.values())), trajectories, A, np.random.default_rng(0),
                          plan=Plan(6, 1, 6, steps=i_of), clip_range=one_page.CLIP, emphasis=one_page.EMPHASIS)
    assert metrics["clip_fraction"] > 0
    for name, p in trained.items():
        theirs = before[name] - p
        assert (ours[name] - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_the_page_runs_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in dict(PROMPTS=["a cat", "a dog"], SAMPLES=10, MINIBATCH=5, EPOCHS=1).items():
        monkeypatch.setattr(one_page, name, value)
    one_page.main()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("epoch 0: mean JPEG size ") and said[1].startswith("epoch 1: mean JPEG size ")
    assert said[0] != said[1].replace("epoch 1", "epoch 0")
    assert Image.open("one_page.png").size == (640, 128)
