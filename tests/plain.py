"""The whole of training once more, as plainly as it can be written: one picture at a time, in float64.

No micro-batches, no plan, no scaler, nothing that is fast; and nothing of the code that it is compared with. From
ddpo_min it is handed the networks alone, as functions. Read from top to bottom it is the paper's algorithm:
    schedule -> a denoising step and its log-probability -> a trajectory -> rewards -> advantages or weights
    -> the loss of a minibatch -> AdamW.
Paper: Black et al., Training Diffusion Models with Reinforcement Learning, arXiv 2305.13301.
Throughout, s is the Settings of the run, and x, eps and noise are latents of one picture, (1, 4, h, w).
"""
import copy
import math
import statistics
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch


@dataclass
class Networks:
    """What the loop knows of the model: four functions."""
    unet: object        # (x, t (1,), context) -> the predicted noise, of the weights that are trained
    base_unet: object   # the same, of the weights before training and without LoRA
    encode: object      # a prompt -> its context (1, tokens, width)
    decode: object      # a clean latent -> a picture (1, 3, H, W), about [-1, 1]
    side: int           # h = w of a latent


# The noise schedule: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps    [DDPM Eq. 4]

def noise_schedule():
    """a_0, ..., a_999 of Stable Diffusion: the betas are the squares of evenly spaced roots."""
    a, product = [], 1.0
    for t in range(1000):
        root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * t / 999
        product *= 1 - root ** 2
        a.append(product)
    return a


SCHEDULE = noise_schedule()


@dataclass
class Step:
    """One step of the sampler: from x_t to the less noisy x_prev."""
    t: int
    a: float            # of x_t
    a_prev: float       # of x_prev
    sigma: float        # standard deviation of x_prev


def sampler_steps(s):
    """The T steps, noisiest first. The last is taken at t = 1 and goes to a_0, so that its sigma is above 0.

    After noise_steps of them sigma is 0 all the same.
    """
    steps, gap = [], 1000 // s.steps
    for t in range((s.steps - 1) * gap + 1, 0, -gap):
        a, a_prev = SCHEDULE[t], SCHEDULE[max(t - gap, 0)]
        eta = 0.0 if s.noise_steps and len(steps) >= s.noise_steps else s.eta
        steps.append(Step(t, a, a_prev, eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))))      # DDIM Eq. 16
    return steps


# The policy: p(x_prev | x_t, c) = N(mean, sigma^2 I)

def predict(unet, x, t, nets, context, guidance):
    """The predicted noise, guided: from what the empty prompt gives past what the prompt gives    [CFG Eq. 6]."""
    t = torch.tensor([t])
    if guidance == 1:
        return unet(x, t, context)
    without = unet(x, t, nets.encode(""))
    return without + guidance * (unet(x, t, context) - without)


def mean_of(x, eps, step):
    """The mean of x_prev    [DDIM Eq. 12]: towards the clean latent, with the part of the noise that is kept."""
    clean = (x - math.sqrt(1 - step.a) * eps) / math.sqrt(step.a)
    return math.sqrt(step.a_prev) * clean + math.sqrt(1 - step.a_prev - step.sigma ** 2) * eps


def log_probability(x_prev, mean, step):
    """The Gaussian's log-density, averaged over the latent's dimensions."""
    return torch.distributions.Normal(mean, step.sigma).log_prob(x_prev).mean()


def guidance_in_training(s):
    """The guidance of everything that is trained on."""
    return s.guidance if s.guidance_in_training else 1.0


def normal(seed, *shape):
    """Standard normal numbers of a seed, drawn in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@torch.no_grad()
def sample(s, nets, steps, prompt, seed, start):
    """A trajectory: (T + 1 latents from noise to x_0, T log-probabilities of the policy that training begins with).

    The seed's numbers are x_T's, then each step's noise; but x_T is that of the seed `start`.
    """
    noise = normal(seed, len(steps) + 1, 1, 4, nets.side, nets.side)
    context, x, log_p = nets.encode(prompt), [normal(start, len(steps) + 1, 1, 4, nets.side, nets.side)[0]], []
    for step, z in zip(steps, noise[1:]):
        mean = mean_of(x[-1], predict(nets.unet, x[-1], step.t, nets, context, s.guidance), step)
        x.append(mean + step.sigma * z)
        eps = predict(nets.unet, x[-2], step.t, nets, context, guidance_in_training(s))
        log_p.append(log_probability(x[-1], mean_of(x[-2], eps, step), step) if step.sigma > 0 else math.nan)
    return x, log_p


@torch.no_grad()
def picture(nets, x_0):
    """uint8 (H, W, 3); rounded from float32, as a picture is for every reward."""
    pixels = (nets.decode(x_0)[0].float() / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 0).numpy()


# From rewards to advantages or weights (RWR)

def advantages(s, prompts, rewards, latest):
    """How much better than usual each reward is, in standard deviations, cut at +-advantage_clip    [paper App. D.3].

    latest: {prompt: its rewards so far}, changed; the last prompt_buffer of them count, or all of this epoch's if these
    are more, if there are prompt_minimum.
    """
    for prompt, r in zip(prompts, rewards):
        latest[prompt] = (latest.get(prompt, []) + [r])[-max(s.prompt_buffer, prompts.count(prompt)):]
    result = []
    for n, (prompt, r) in enumerate(zip(prompts, rewards)):
        usual = rewards
        if s.normalise == "group":          # [GRPO Sec. 4.1.2]
            first = n - n % s.group_size
            usual = rewards[first:first + s.group_size]
        if s.normalise == "prompt" and len(latest[prompt]) >= s.prompt_minimum:
            usual = latest[prompt]
        advantage = (r - statistics.fmean(usual)) / statistics.pstdev(usual)
        result.append(max(-s.advantage_clip, min(s.advantage_clip, advantage)))
    return result


def weights(s, prompts, rewards):
    """RWR: exp(beta r), of mean 1 [paper Eq. 3]; sparse: 1 from the percentile on, else 0 [paper Eq. 4].

    Both among the samples of the same prompt, or among all.
    """
    result = []
    for prompt, r in zip(prompts, rewards):
        peers = sorted(other for p, other in zip(prompts, rewards) if p == prompt or s.normalise == "epoch")
        if s.algorithm == "rwr":
            odds = [math.exp(s.inverse_temperature * other) for other in peers]
            result.append(math.exp(s.inverse_temperature * r) / (sum(odds) / len(odds)))
        else:
            place = s.percentile * (len(peers) - 1)     # between two of the sorted rewards
            low, high = peers[math.floor(place)], peers[math.ceil(place)]
            result.append(1.0 if r >= low + (place - math.floor(place)) * (high - low) else 0.0)
    return result


# AdamW

class AdamW:
    """Adam with decoupled weight decay [AdamW Alg. 2], after the gradient's norm is cut at grad_clip.

    m and v are running means of the gradient g and of g^2; they start at 0, which 1 - beta^n corrects.
    """

    def __init__(self, parameters, s):
        self.parameters, self.s, self.n = parameters, s, 0
        self.m, self.v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    @torch.no_grad()
    def step(self, gradients):
        """Returns the norm of the gradient, all parameters in one vector, before it is cut."""
        s, self.n = self.s, self.n + 1
        norm = math.sqrt(sum((g ** 2).sum().item() for g in gradients))
        for p, g, m, v in zip(self.parameters, gradients, self.m, self.v):
            g = g * min(1.0, s.grad_clip / (norm + 1e-6))
            m[...] = s.beta1 * m + (1 - s.beta1) * g
            v[...] = s.beta2 * v + (1 - s.beta2) * g ** 2
            p -= s.lr * s.weight_decay * p
            p -= s.lr * (m / (1 - s.beta1 ** self.n)) / (torch.sqrt(v / (1 - s.beta2 ** self.n)) + s.adam_eps)
        return norm


# One epoch's update. rng, a numpy Generator, is the only source of chance.

@dataclass
class Record:
    """Everything that an epoch's update did and saw."""
    parameters: list = field(default_factory=list)      # copies, after each optimizer step
    norms: list = field(default_factory=list)           # of its gradient
    seen: list = field(default_factory=list)            # a SimpleNamespace for each loss of a sample, in order

    def step(self, adam, loss):
        """An optimizer step on the loss of a minibatch."""
        self.norms.append(adam.step(torch.autograd.grad(loss, adam.parameters)))
        self.parameters.append([p.detach().clone() for p in adam.parameters])

    def mean(self, name):
        """The mean of a number over all that was trained on."""
        return statistics.fmean(getattr(one, name) for one in self.seen)


def emphasis_of(s, steps):
    """How much each step's loss counts: "even" divides by w_t = |d mean / d eps| / sigma; of mean 1 where sigma > 0."""
    if s.step_weights == "paper":
        return [1.0] * len(steps)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    inverse = [step.sigma / abs((mean_of(zero, one, step) - mean_of(zero, zero, step)).item()) for step in steps]
    return [x / statistics.fmean([y for y in inverse if y > 0]) for x in inverse]


def policy_gradient_loss(s, ratio, log_p, A):
    """DDPO's loss of a sample at a denoising step, and whether clipping took its gradient away [paper Sec. 4.3].

    A clipped ratio is a constant: it has left the trust region in the direction that A asks for. (0 * ratio: a gradient
    of 0 instead of none.)
    """
    if s.algorithm == "ddpo_sf":
        return -A * log_p, False
    # DDPO_IS; AWM, too, with the log-probabilities of matching_log_probability()
    if A > 0 and ratio > 1 + s.clip_range:
        return -A * (1 + s.clip_range) + 0 * ratio, True
    if A < 0 and ratio < 1 - s.clip_range:
        return -A * (1 - s.clip_range) + 0 * ratio, True
    return -A * ratio, False


def ddpo_epoch(s, nets, adam, steps, trajectories, prompts, advantages, rng):
    """DDPO: in each pass over the samples, a permutation of the minibatches; for each minibatch, one of the steps.

    A minibatch is trained on the first timestep_fraction of its permuted steps.
    """
    record, emphasis, size = Record(), emphasis_of(s, steps), s.samples // s.updates
    window = list(range(s.first_step - 1, s.last_step or s.noise_steps or s.steps))
    count = max(1, round(s.timestep_fraction * len(window)))
    for _ in range(s.inner_epochs):
        for minibatch in rng.permutation(s.updates):
            chosen = rng.permutation(window)[:count]
            total = 0
            for n in range(minibatch * size, (minibatch + 1) * size):
                x, log_p_old = trajectories[n]
                context = nets.encode(prompts[n])
                for i in chosen:
                    step = steps[i]
                    eps = predict(nets.unet, x[i], step.t, nets, context, guidance_in_training(s))
                    mean = mean_of(x[i], eps, step)
                    log_p = log_probability(x[i + 1], mean, step)
                    ratio = torch.exp(log_p - log_p_old[i])
                    loss, clipped = policy_gradient_loss(s, ratio, log_p, advantages[n])
                    kl = torch.zeros(())
                    if s.kl_weight:         # of two Gaussians of the same sigma, averaged over dimensions
                        with torch.no_grad():
                            base = predict(nets.base_unet, x[i], step.t, nets, context, guidance_in_training(s))
                        kl = ((mean - mean_of(x[i], base, step)) ** 2 / (2 * step.sigma ** 2)).mean()
                    total = total + emphasis[i] * loss + s.kl_weight * kl
                    record.seen.append(SimpleNamespace(
                        n=n, i=i, update=len(record.norms), A=advantages[n], ratio=ratio.item(), clipped=clipped,
                        loss=loss.item(), kl=kl.item(), approx_kl=(log_p - log_p_old[i]).item() ** 2 / 2,
                        outside=float(s.algorithm == "ddpo_is" and abs(ratio.item() - 1) > s.clip_range)))
            record.step(adam, total / (size * len(chosen)))
    metrics = dict(loss=record.mean("loss"), approx_kl=record.mean("approx_kl"), clip_fraction=record.mean("outside"),
                   grad_norm=statistics.fmean(record.norms))
    metrics["max_ratio_error"] = max(abs(one.ratio - 1) for one in record.seen if one.update == 0)
    by_step = [[one.outside for one in record.seen if one.i == i] for i in range(s.steps)]
    metrics["clip_fraction_by_step"] = [statistics.fmean(values) if values else None for values in by_step]
    if s.kl_weight:
        metrics["kl_to_base"] = record.mean("kl")
    return record, metrics


def noised(x_0, t, seed, nets):
    """The finished latent noised anew: (x_t, eps)    [DDPM Eq. 4]."""
    eps = normal(seed, 1, 4, nets.side, nets.side)
    return math.sqrt(SCHEDULE[t]) * x_0 + math.sqrt(1 - SCHEDULE[t]) * eps, eps


def rwr_draws(chosen, rng):
    """The chance in a minibatch of RWR: (sample, timestep, seed of the noise) of each; timesteps first, then seeds."""
    timesteps = rng.integers(0, 1000, len(chosen)).tolist()
    return zip(chosen, timesteps, rng.integers(2 ** 32, size=len(chosen)).tolist())


def rwr_epoch(s, nets, adam, trajectories, prompts, weights, rng):
    """RWR: the usual denoising loss on one's own pictures, each with its weight    [paper Sec. 4.2].

    The samples of weight above 0 queue up in a random order, and again in another one when they run out.
    """
    record, queue, size = Record(), [], s.samples // s.updates
    for _ in range(s.updates * s.inner_epochs):
        while len(queue) < size:
            queue += rng.permutation([n for n in range(s.samples) if weights[n] > 0]).tolist()
        chosen, queue = queue[:size], queue[size:]
        total = 0
        for n, t, seed in rwr_draws(chosen, rng):
            x_t, eps = noised(trajectories[n][0][-1], t, seed, nets)
            predicted = predict(nets.unet, x_t, t, nets, nets.encode(prompts[n]), guidance_in_training(s))
            loss = weights[n] * ((predicted - eps) ** 2).mean()
            record.seen.append(SimpleNamespace(n=n, t=t, loss=loss.item()))
            total = total + loss
        record.step(adam, total / size)
    effective = sum(weights) ** 2 / sum(w ** 2 for w in weights)
    return record, dict(loss=record.mean("loss"), grad_norm=statistics.fmean(record.norms), effective_samples=effective)


# AWM, DiffusionNFT and RAM: denoise one's own pictures noised anew, weighted by the advantage

def noise_draws(s, times, size, rng):
    """The chance in a minibatch: rows of (timestep, seed of the noise) of each sample, a row for each of s.timesteps.

    The times are cut into as many parts, and each row draws from its own. Places first, then seeds.
    """
    places = rng.integers(0, len(times), (s.timesteps, size)).tolist()
    seeds = rng.integers(2 ** 32, size=(s.timesteps, size)).tolist()
    return [[(times[(k * len(times) + place) // s.timesteps], seed) for place, seed in zip(*row)]
            for k, row in enumerate(zip(places, seeds))]


def tau_of(t):
    """Where the straight path (1 - tau) x_0 + tau eps is as noisy as the schedule at t."""
    signal, noise = math.sqrt(SCHEDULE[t]), math.sqrt(1 - SCHEDULE[t])
    return noise / (signal + noise)


def regressed(s, eps, x_t, t):
    """What is regressed: the noise, or the velocity eps - x_0 of the straight path, x_0 as the noise implies it."""
    if s.step_weights == "even":
        return eps
    return eps - (x_t - math.sqrt(1 - SCHEDULE[t]) * eps) / math.sqrt(SCHEDULE[t])


def matching_log_probability(s, v_hat, v, t):
    """AWM: minus the denoising error, at some power; times tau if it is of velocities."""
    weight = 1.0 if s.step_weights == "even" else tau_of(t)
    return -weight * ((v_hat - v) ** 2).mean() ** s.awm_power / s.awm_power


def nft_sample_loss(s, v_hat, v_old, v, A, t):
    """DiffusionNFT, of one sample: the implicit good and bad policies, each on its share of the picture."""
    optimality = 0.5 + 0.5 * A / s.advantage_clip
    good = (1 - s.nft_beta) * v_old + s.nft_beta * v_hat
    bad = (1 + s.nft_beta) * v_old - s.nft_beta * v_hat
    losses = [((u - v) ** 2).mean() / (u - v).abs().mean().item() for u in (good, bad)]
    weight = 1.0 if s.step_weights == "even" else tau_of(t)
    return weight * (optimality * losses[0] + (1 - optimality) * losses[1]) * s.advantage_clip / s.nft_beta


def ram_sample_loss(s, v_hat, v_old, v_base, v, A, t):
    """RAM, of one sample, divided by its reward multiplier 1 / kl_weight."""
    target = v_base + A / s.kl_weight * (v - v_old)
    weight = 1.0 if s.step_weights == "even" else tau_of(t)
    return s.kl_weight * weight * ((v_hat - target) ** 2).mean()


def forward_process_epoch(s, nets, adam, steps, trajectories, prompts, advantages, rng, trained):
    """The minibatches are DDPO's. trained: where training had got to, if the policy is a moving average of that.

    The old policy is the one that drew. Returns also what is trained now, None if that is the policy itself.
    """
    record, size = Record(), s.samples // s.updates
    old_unet, old = copy.deepcopy(nets.unet), [p.detach().clone() for p in adam.parameters]
    put(adam.parameters, trained or old)
    times = [step.t for step in steps] if s.grid_timesteps else list(range(1000))
    for _ in range(s.inner_epochs):
        for minibatch in rng.permutation(s.updates):
            total = 0
            for row in noise_draws(s, times, size, rng):
                for n, (t, seed) in zip(range(minibatch * size, (minibatch + 1) * size), row):
                    x_t, eps = noised(trajectories[n][0][-1], t, seed, nets)
                    v_hat, v_old, v_base = (
                        regressed(s, predict(unet, x_t, t, nets, nets.encode(prompts[n]), guidance_in_training(s)),
                                  x_t, t) for unet in (nets.unet, old_unet, nets.base_unet))
                    v, v_old, v_base, A = regressed(s, eps, x_t, t), v_old.detach(), v_base.detach(), advantages[n]
                    ratio = torch.exp(matching_log_probability(s, v_hat, v, t)
                                      - matching_log_probability(s, v_old, v, t))
                    clipped = False
                    if s.algorithm == "awm":
                        loss, clipped = policy_gradient_loss(s, ratio, None, A)
                    elif s.algorithm == "nft":
                        loss = nft_sample_loss(s, v_hat, v_old, v, A, t)
                    else:
                        loss = ram_sample_loss(s, v_hat, v_old, v_base, v, A, t)
                    to_old, to_base = (((v_hat - u) ** 2).mean() for u in (v_old, v_base))
                    total = total + loss + s.kl_old * to_old
                    if s.algorithm != "ram":
                        total = total + s.kl_weight * to_base
                    record.seen.append(SimpleNamespace(
                        n=n, t=t, update=len(record.norms), A=A, ratio=ratio.item(), clipped=clipped, loss=loss.item(),
                        to_old=to_old.item(), to_base=to_base.item(),
                        outside=float(abs(ratio.item() - 1) > s.clip_range)))
            record.step(adam, total / (size * s.timesteps))
    metrics = dict(loss=record.mean("loss"), clip_fraction=record.mean("outside"),
                   distance_to_old=record.mean("to_old"), grad_norm=statistics.fmean(record.norms),
                   max_ratio_error=max(abs(one.ratio - 1) for one in record.seen if one.update == 0))
    if s.kl_weight:
        metrics["distance_to_base"] = record.mean("to_base")
    if not s.policy_ema:
        return record, metrics, None
    trained = [p.detach().clone() for p in adam.parameters]
    put(adam.parameters, [s.policy_ema * before + (1 - s.policy_ema) * now for before, now in zip(old, trained)])
    return record, metrics, trained


@torch.no_grad()
def put(parameters, values):
    """Give the parameters these values."""
    for p, value in zip(parameters, values):
        p.copy_(value)


def train(s, nets, parameters, draw, reward):
    """The loop: yields what happened in each epoch, a SimpleNamespace.

    parameters: what is trained, tensors that nets.unet computes with; draw: epoch -> (prompts, seeds);
    reward: (uint8 (N, H, W, 3), prompts) -> N numbers.
    """
    steps, adam, latest, trained = sampler_steps(s), AdamW(parameters, s), {}, None
    for epoch in range(s.epochs):
        prompts, seeds = draw(epoch)
        starts = [seeds[n - n % s.group_size if s.same_start else n] for n in range(len(seeds))]
        trajectories = [sample(s, nets, steps, *one) for one in zip(prompts, seeds, starts)]
        rewards = [float(r) for r in reward(np.stack([picture(nets, x[-1]) for x, _ in trajectories]), prompts)]
        rng = np.random.default_rng([s.seed, epoch, 1])
        if s.algorithm.startswith("rwr"):
            worth = weights(s, prompts, rewards)
            record, metrics = rwr_epoch(s, nets, adam, trajectories, prompts, worth, rng)
        else:
            worth = advantages(s, prompts, rewards, latest)
            if s.algorithm.startswith("ddpo"):
                record, metrics = ddpo_epoch(s, nets, adam, steps, trajectories, prompts, worth, rng)
            else:
                record, metrics, trained = forward_process_epoch(s, nets, adam, steps, trajectories, prompts, worth,
                                                                 rng, trained)
        yield SimpleNamespace(latents=torch.stack([torch.cat(x) for x, _ in trajectories]),
                              log_p_old=torch.tensor([log_p for _, log_p in trajectories], dtype=torch.float64),
                              rewards=rewards, advantages=worth, record=record, metrics=metrics)
