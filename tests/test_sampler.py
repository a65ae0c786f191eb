"""The schedule, the DDIM step as a Gaussian policy, guidance, and the trajectories that sampling leaves behind."""
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from conftest import cut, tiny_networks
from ddpo_min import ddim
from ddpo_min.ddim import Steps, ddim_mean, ddim_sigma, ddim_step, ddim_steps, gaussian_log_prob, guide, step_weights
from ddpo_min.ddpo import even_emphasis
from ddpo_min.lora import add_lora
from ddpo_min.policy import Policy
from ddpo_min.rollout import sample_noise, sample_trajectories
from ddpo_min.schedule import alphas_cumprod, sampling_timesteps
from ddpo_min.vae import decode_images
from ddpo_min.weights import StableDiffusion

PROMPTS = ["a cat", "a Dog", "a cat", "two wolves in the park", "a fish"]
SEEDS = [11, 5, 3, 2 ** 31 + 7, 0]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def tiny_model(dtype=torch.float32, lora=False):
    """Tiny and random; embeddings of prompts made larger, so that a wrong one shows; the LoRA does something."""
    unet, vae, text = (network.to(dtype).requires_grad_(False).eval() for network in tiny_networks())
    text.text_model.final_layer_norm.weight.data *= 5
    for layer in add_lora(unet, rank=2).values() if lora else ():
        torch.nn.init.normal_(layer.lora_B.weight)
    return StableDiffusion(unet, vae, text, image_size=16, report="")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# The schedule

def test_betas_are_the_squares_of_evenly_spaced_roots():
    a = alphas_cumprod()
    beta = 1 - a / torch.cat([torch.ones(1, dtype=a.dtype), a[:-1]])
    wanted = [(math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * t / 999) ** 2 for t in range(1000)]
    torch.testing.assert_close(beta, torch.tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=1e-14)


def test_alpha_bar_falls_from_one_minus_the_first_beta_to_half_a_percent():
    a = alphas_cumprod()
    assert a.dtype == torch.float64 and len(a) == 1000 and (a.diff() < 0).all()
    assert a[0].item() == pytest.approx(1 - 0.00085, abs=1e-15)
    assert a[-1].item() == pytest.approx(0.00466, abs=5e-6)


def test_fifty_steps_visit_981_to_1_and_the_last_goes_to_alpha_bar_0_with_noise_left():
    steps, a = ddim_steps(50), alphas_cumprod().tolist()
    assert list(steps.t) == list(range(981, 0, -20)) and len(steps) == 50
    assert list(steps.alpha_bar) == [a[t] for t in steps.t]
    assert list(steps.alpha_bar_prev) == [a[t] for t in range(961, 0, -20)] + [a[0]]
    assert steps.sigma[-1] == pytest.approx(0.0206, abs=5e-5)
    assert steps.sigma[-1] ** 2 == pytest.approx((1 - a[0]) / (1 - a[1]) * (1 - a[1] / a[0]), rel=1e-12)


@pytest.mark.parametrize("steps", [0, -1, 501])
def test_a_number_of_steps_that_cannot_be_is_refused(steps):
    with pytest.raises(ValueError, match="1 to 500"):
        sampling_timesteps(steps)


@pytest.mark.parametrize("eta", [-0.5, 1.5])
def test_eta_outside_0_to_1_is_refused(eta):
    with pytest.raises(ValueError, match="eta"):
        ddim_steps(50, eta)


def test_sigma_is_proportional_to_eta_and_positive_at_every_number_of_steps():
    for n in (1, 2, 6, 50, 333, 500):
        full, half = torch.tensor(ddim_steps(n).sigma), torch.tensor(ddim_steps(n, 0.5).sigma)
        assert (full > 0).all() and torch.allclose(half, full / 2, rtol=1e-6, atol=0)


def weights_by_hand(steps):
    """w = |C| / sigma, where C is what mu gains for a unit of eps."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return [abs(ddim_mean(zero, one, *row).item()) / row[2]
            for row in zip(steps.alpha_bar, steps.alpha_bar_prev, steps.sigma)]


@pytest.mark.parametrize("n, largest", [(50, 3.27), (20, 5.4), (10, 8.3)])
def test_the_weight_of_a_step_peaks_at_the_last_but_one(n, largest):
    w = weights_by_hand(ddim_steps(n))
    assert step_weights(ddim_steps(n)) == pytest.approx(w, rel=1e-9)
    assert max(w) == pytest.approx(largest, abs=0.05 if n < 50 else 0.005) and w.index(max(w)) == n - 2
    if n == 50:
        assert min(w) == pytest.approx(0.37, abs=0.005)


# One step

def test_with_eta_1_and_consecutive_timesteps_the_step_is_the_ddpm_posterior():
    """q(x_{t-1} | x_t, x_0), DDPM Eq. 6-7, at the x_0 from which x_t was made."""
    a = alphas_cumprod()
    t = torch.arange(1, 1000)
    a_t, a_prev, beta = a[t], a[t - 1], 1 - a[t] / a[t - 1]
    x_0, eps = normal(999, seed=1), normal(999, seed=2)
    x_t = a_t.sqrt() * x_0 + (1 - a_t).sqrt() * eps
    sigma = ddim_sigma(a_t, a_prev, 1.0)
    mean = a_prev.sqrt() * beta / (1 - a_t) * x_0 + (1 - beta).sqrt() * (1 - a_prev) / (1 - a_t) * x_t
    torch.testing.assert_close(sigma ** 2, (1 - a_prev) / (1 - a_t) * beta, rtol=1e-10, atol=0)
    torch.testing.assert_close(ddim_mean(x_t, eps, a_t, a_prev, sigma), mean, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sigma", [1e-3, 0.0206, 0.7, 3.0])
def test_log_prob_is_the_mean_over_dimensions_of_the_normal_log_density(sigma):
    x, mu = normal(3, 4, 5, 6, seed=1), normal(3, 4, 5, 6, seed=2)
    wanted = Normal(mu, sigma).log_prob(x).mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian_log_prob(x, mu, sigma), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_a_step_without_noise_has_no_log_prob(sigma):
    with pytest.raises(ValueError, match="sigma"):
        gaussian_log_prob(torch.zeros(1, 4), torch.zeros(1, 4), sigma)


@pytest.mark.parametrize("given", [{}, dict(noise=torch.zeros(1, 4), x_prev=torch.zeros(1, 4))])
def test_a_step_is_either_taken_or_scored(given):
    with pytest.raises(ValueError, match="either"):
        ddim_step(torch.zeros(1, 4), torch.zeros(1, 4), ddim_steps(5), 0, **given)


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("n", [10, 20, 50])
def test_whole_trajectories_are_those_of_diffusers(n, eta):
    theirs = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                           set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading")
    a = alphas_cumprod()
    torch.testing.assert_close(theirs.alphas_cumprod.double(), a, rtol=1e-5, atol=0)    # theirs is float32
    theirs.alphas_cumprod, theirs.final_alpha_cumprod = a, a[0]
    theirs.set_timesteps(n)
    steps = ddim_steps(n, eta)
    x = y = normal(2, 4, 3, 3, seed=n)
    for i, t in enumerate(theirs.timesteps):
        noise = normal(2, 4, 3, 3, seed=100 + i)

        def eps(z):
            return torch.tanh(1.3 * z) * math.cos(int(t) / 300) + 0.4 * torch.sin(z.roll(1, -1)) + 0.1
        x, _ = ddim_step(x, eps(x), steps, i, noise=noise)
        y = theirs.step(eps(y), t, y, eta=eta, variance_noise=noise).prev_sample
        assert steps.t[i] == t and x.dtype == torch.float64
        assert (x - y).abs().max() < 1e-9


def test_outside_a_window_of_steps_nothing_is_random():
    """Steps 2 to 4 of 8 are those of eta = 1, the others those of eta = 0."""
    steps = ddim.with_noise_in(ddim_steps(8), range(2, 5))
    x_t, eps, noise = normal(3, 1, 4, 8, 8)
    for i in range(8):
        theirs = ddim_step(x_t, eps, ddim_steps(8, eta=1.0 if 2 <= i < 5 else 0.0), i, noise)
        for got, expected in zip(ddim_step(x_t, eps, steps, i, noise), theirs):
            assert torch.equal(got.nan_to_num(9), expected.nan_to_num(9))
    assert all((w < math.inf) == (2 <= i < 5) for i, w in enumerate(step_weights(steps)))


def test_the_emphasis_of_the_steps_with_noise_has_mean_1_and_undoes_their_weights():
    emphasis = even_emphasis(ddim.with_noise_in(ddim_steps(8), range(2, 5)))
    products = [e * w for e, w in zip(emphasis[2:5], step_weights(ddim_steps(8))[2:5])]
    assert products == pytest.approx([products[0]] * 3) and np.mean(emphasis[2:5]) == pytest.approx(1)
    assert emphasis[:2] + emphasis[5:] == [0] * 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scoring_a_step_that_was_taken_gives_its_log_prob_to_the_last_bit(dtype):
    steps = ddim_steps(50)
    for i in (0, 25, 48, 49):
        x_t, eps = normal(3, 4, 8, 8, seed=i).to(dtype), normal(3, 4, 8, 8, seed=50 + i).to(dtype)
        x_prev, taken = ddim_step(x_t, eps, steps, i, noise=normal(3, 4, 8, 8, seed=100 + i))
        again, scored = ddim_step(x_t, eps, steps, i, x_prev=x_prev)
        assert x_prev.dtype == dtype and again is x_prev and torch.equal(taken, scored)
        mu = ddim_mean(x_t.double(), eps.double(), steps.alpha_bar[i], steps.alpha_bar_prev[i], steps.sigma[i])
        exact = Normal(mu, steps.sigma[i]).log_prob(x_prev.double()).mean(dim=(1, 2, 3))
        torch.testing.assert_close(taken.double(), exact, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-5)


def test_a_changed_prediction_changes_the_log_ratio_by_the_weight_of_the_step():
    """log ratio = -(w d.z + |w d|^2 / 2) / D for eps + d and noise z, and KL = w^2 |d|^2 / 2."""
    steps = ddim_steps(50)
    x_t, eps, d, z = (normal(2, 4, 3, 3, seed=s) for s in range(4))
    for i, w in enumerate(step_weights(steps)):
        x_prev, before = ddim_step(x_t, eps, steps, i, noise=z)
        _, after = ddim_step(x_t, eps + d, steps, i, x_prev=x_prev)
        wanted = -((w * d * z).flatten(1).mean(1) + (w * d).square().flatten(1).mean(1) / 2)
        torch.testing.assert_close(after - before, wanted, rtol=1e-9, atol=1e-9)
        a, b = (Normal(ddim_mean(x_t, e, steps.alpha_bar[i], steps.alpha_bar_prev[i], steps.sigma[i]), steps.sigma[i])
                for e in (eps, eps + d))
        torch.testing.assert_close(kl_divergence(a, b), w ** 2 * d ** 2 / 2, rtol=1e-9, atol=1e-12)


# The policy

def test_guidance_moves_from_the_unconditional_prediction_past_the_conditional_one():
    u, c = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])
    assert torch.equal(guide(u, c, 5.0), torch.tensor([11.0, 10.5]))
    assert torch.equal(guide(u, c, 0.0), u) and torch.equal(guide(u, c, 1.0), c)


@torch.no_grad()
@pytest.mark.parametrize("guidance, halves", [(5.0, 2), (1.5, 2), (1.0, 1)])
def test_the_policy_guides_as_two_separate_calls_would_and_calls_once(model, guidance, halves):
    x = normal(3, 4, 8, 8, dtype=torch.float32)
    context, empty = model.encode_prompts(PROMPTS[1:4]), model.encode_prompts([""] * 3)
    t = torch.full((3,), 321)
    eps_c, eps_u = model.unet(x, t, context), model.unet(x, t, empty)
    assert (eps_c - eps_u).abs().max() > 0.01
    calls = []
    hook = model.unet.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    got = Policy(model, ddim_steps(4), None).eps(x, 321, context, guidance)
    hook.remove()
    torch.testing.assert_close(got, eps_u + guidance * (eps_c - eps_u), rtol=0, atol=1e-5)
    assert calls == [halves * 3]


@torch.no_grad()
def test_the_network_is_told_the_timestep_and_moves_the_latent_by_its_step(model):
    steps = ddim_steps(4)
    context = model.encode_prompts(PROMPTS[:2])
    x, z = normal(2, 4, 8, 8, dtype=torch.float32), normal(2, 4, 8, 8, seed=1, dtype=torch.float32)
    for i, t in enumerate((751, 501, 251, 1)):
        got, log_p = Policy(model, steps, 1.0).act(x, i, context, z)
        wanted, wanted_log_p = ddim_step(x, model.unet(x, torch.full((2,), t), context), steps, i, noise=z)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(log_p, wanted_log_p, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_predictions_of_a_16_bit_network_are_compared_in_32_bits(guidance):
    """Else the KL of two predictions would be a difference of 16-bit numbers, nearly all of it rounding."""
    policy = Policy(tiny_model(torch.bfloat16), ddim_steps(4), guidance)
    x, context = normal(2, 4, 8, 8, dtype=torch.float32), policy.model.encode_prompts(PROMPTS[:2])
    with torch.no_grad():
        eps = policy.eps(x, 500, context, guidance)
        plain = policy.model.unet(x.bfloat16(), torch.full((2,), 500), context).float()
    assert eps.dtype == torch.float32 and torch.equal(eps, plain) == (guidance == 1)


def test_noise_is_each_samples_own_and_standard_normal():
    noise = sample_noise(SEEDS, 6, (4, 8, 8))
    for i, seed in enumerate(SEEDS):
        assert torch.equal(sample_noise([seed], 6, (4, 8, 8))[0], noise[i])
    assert len({x.sum().item() for x in noise.flatten(0, 1)}) == 5 * 7
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sample_does_not_depend_on_the_batch_size_or_on_its_place(model, guidance):
    policy = Policy(model, ddim_steps(4), guidance)
    whole = sample_trajectories(policy, PROMPTS, SEEDS, cut(5, 5), keep="path")
    images_of_all = sample_trajectories(policy, PROMPTS, SEEDS, cut(5, 5), keep="images").images
    assert whole.latents.shape == (5, 4 + 1, 4, 8, 8) and whole.log_p_old.shape == (5, 4)
    assert torch.equal(whole.latents[:, 0], sample_noise(SEEDS, 4, (4, 8, 8))[:, 0])
    assert np.array_equal(images_of_all, decode_images(model.vae, whole.latents[:, -1])) and len(whole.images) == 0
    for batch, minibatch, order in ((1, None, [0, 1, 2, 3, 4]), (2, 3, [0, 1, 2, 3, 4]), (2, None, [4, 2, 0, 3, 1]),
                                (5, None, [3, 4, 1, 0, 2])):
        prompts, seeds, images, asked = [PROMPTS[i] for i in order], [SEEDS[i] for i in order], [], []
        part = sample_trajectories(policy, prompts, seeds, cut(5, batch, minibatch),
                                   on_images=lambda drawn, theirs, first: (images.extend(drawn), asked.extend(theirs)))
        assert asked == prompts and len(part.images) == 0
        assert torch.equal(part.latents[:, 0], whole.latents[order, 0])
        torch.testing.assert_close(part.latents, whole.latents[order], rtol=0, atol=5e-5)
        torch.testing.assert_close(part.log_p_old, whole.log_p_old[order], rtol=0, atol=5e-5)
        assert np.abs(np.stack(images).astype(int) - images_of_all[order]).max() <= 1
    other = sample_trajectories(policy, PROMPTS[1:] + PROMPTS[:1], SEEDS, cut(5, 5))
    changed = (other.latents[:, -1] - whole.latents[:, -1]).flatten(1).abs().amax(dim=1)
    assert (changed > 1e-3).all()              # every picture got another prompt


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_step_uses_noise_of_its_own(model, guidance):
    policy, noise = Policy(model, ddim_steps(4), guidance), sample_noise(SEEDS, 4, (4, 8, 8))
    path = sample_trajectories(policy, PROMPTS, SEEDS, cut(5, 5))
    for i in range(4):
        with torch.no_grad():
            x, log_p = policy.act(path.latents[:, i], i, path.context(slice(0, 5)), noise[:, i + 1])
        assert torch.equal(x, path.latents[:, i + 1]) and torch.equal(log_p, path.log_p_old[:, i])


@pytest.mark.parametrize("batch", [1, 2, 3, 6])
def test_samples_in_a_row_share_x_T_and_nothing_else(model, batch):
    """Three of six, also where a micro-batch begins within them: x_T is the first one's, the steps' noise their own."""
    seeds, policy = [11, 5, 3, 2 ** 31 + 7, 0, 8], Policy(model, ddim_steps(4), 1.0)
    path = sample_trajectories(policy, ["a cat"] * 6, seeds, cut(6, batch), samples_per_start=3)
    noise = sample_noise(seeds, 4, (4, 8, 8))
    for n in range(6):
        assert torch.equal(path.latents[n, 0], noise[n - n % 3, 0])
        for i in range(4):
            with torch.no_grad():
                x, _ = policy.act(path.latents[n:n + 1, i], i, path.context(slice(n, n + 1)), noise[n:n + 1, i + 1])
            torch.testing.assert_close(x[0], path.latents[n, i + 1], rtol=0, atol=5e-5)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_steps_without_noise_leave_the_ratio_of_the_others_at_one(guidance):
    """Also if training has another guidance than sampling."""
    policy = Policy(tiny_model(lora=True), ddim.with_noise_in(ddim_steps(5), range(2)), guidance, training_guidance=1.0)
    path = sample_trajectories(policy, PROMPTS, SEEDS, cut(5, 2, 3))
    assert path.log_p_old[:, 2:].isnan().all()
    for samples in cut(5, 2, 3):
        for i in range(2):
            x_t, x_prev, log_p_old, context = path.at(samples, i)
            with torch.no_grad():
                assert torch.equal(policy.log_prob(x_prev, x_t, i, context)[0], log_p_old)


def test_a_sample_keeps_its_own_context(model):
    policy = Policy(model, ddim_steps(2), 3.0)
    path = sample_trajectories(policy, PROMPTS, SEEDS, cut(5, 2))
    wanted = model.encode_prompts([PROMPTS[3], PROMPTS[0], PROMPTS[1], ""])
    torch.testing.assert_close(path.context(torch.tensor([3, 0, 1])), wanted[:3], rtol=0, atol=1e-5)
    torch.testing.assert_close(path.at(slice(1, 4), 0)[3][2], wanted[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(policy.empty, wanted[3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("dtype, lora", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_scoring_a_stored_trajectory_gives_a_ratio_of_exactly_one(dtype, lora, guidance):
    policy = Policy(tiny_model(dtype, lora), ddim_steps(5), guidance)
    path = sample_trajectories(policy, PROMPTS, SEEDS, cut(5, 2, 3))
    for samples in cut(5, 2, 3):
        for i in range(5):
            x_t, x_prev, log_p_old, context = path.at(samples, i)
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    log_p, _ = policy.log_prob(x_prev, x_t, i, context)
                assert torch.equal(log_p, log_p_old) and torch.equal(log_p_old, path.log_p_old[samples, i])
                assert torch.exp(log_p - log_p_old).eq(1).all()
                assert log_p.requires_grad == (grad and lora)


def test_steps_are_plain_numbers():
    steps = ddim_steps(7)
    assert isinstance(steps, Steps) and all(type(x) is float for x in steps.sigma + steps.alpha_bar)
