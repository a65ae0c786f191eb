"""REINFORCE without a second look at the samples: their gradients are gathered while they are drawn.

    python experiments/one_pass.py      three minutes on 2 CPU cores; prints both ways' seconds, side by side

DDPO_SF's update is on-policy, so d log p of a step can be had when the step is taken. What its sample's advantage will
be is not known then. So each sample keeps its own gradient, and the advantages come in at the end:

    g_n = sum_i emphasis_i d log p(x_prev | x_t, c) / T,    gradient of the loss = -mean_n A_n g_n

It saves the training's forward passes, one of three. It needs a LoRA's memory for each sample, one optimizer step an
epoch, and sampling with the guidance that training has.
"""
import sys
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from gradient_noise import learner_of
from results import ROOT
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from ddpo_min.ddim import ddim_step, ddim_steps
from ddpo_min.ddpo import ddpo_update, even_emphasis
from ddpo_min.files import run_script
from ddpo_min.plan import Plan
from ddpo_min.policy import Policy
from ddpo_min.prompts import draw_prompts, find_prompts
from ddpo_min.rollout import sample_noise, sample_trajectories
from ddpo_min.settings import Settings
from ddpo_min.vae import decode_images

SAMPLES, MICRO_BATCH, REPEATS = 256, 64, 3


@contextmanager
def own_copies(layers, count):
    """LoRA layers {name: layer} use a copy of their weights for each of `count` samples: yields the copies, A, B, ...

    y_n = W x_n + b + scale B_n A_n x_n; A_n (rank, in) and B_n (out, rank) are equal for all n, their gradients are not
    """
    copies = []
    try:
        for layer in layers.values():
            A, B = (w.weight.detach().expand(count, -1, -1).clone().requires_grad_() for w in (layer.lora_A,
                                                                                               layer.lora_B))
            layer.low_rank = partial(apply, own=(A, B), scale=layer.scale)
            copies += [A, B]
        yield copies
    finally:
        for layer in layers.values():
            layer.__dict__.pop("low_rank", None)        # the class's again


def apply(x, A, B, own, scale):
    """scale B_n A_n x_n, with each sample's own copies in place of A and B; x: (n, tokens, in), guided (2 n, ...)."""
    A, B = (w.to(x.dtype).repeat(len(x) // len(w), 1, 1) for w in own)
    return (scale * (x @ A.mT)) @ B.mT


def sample_with_gradients(policy, prompts, seeds, micro_batches, emphasis):
    """Draw a picture for each prompt, and have its own gradient.

    Returns (finished latents (N, 4, h, w), pictures uint8 (N, H, W, 3), [(N, *shape) of each parameter]).
    """
    model, T, latents, images, gradients = policy.model, len(policy.steps), [], [], []
    contexts = model.encode_prompts(prompts)
    for samples in micro_batches:
        noise = sample_noise(seeds[samples], T, (4, *model.shape)).to(contexts.dtype)
        x_t = noise[:, 0]
        with own_copies(policy.lora, len(x_t)) as copies:
            for i in range(T):
                eps = policy.eps(x_t, policy.steps.t[i], contexts[samples], policy.guidance)
                x_prev, _ = ddim_step(x_t, eps.detach(), policy.steps, i, noise[:, i + 1])
                _, log_p = ddim_step(x_t, eps, policy.steps, i, x_prev=x_prev)
                (emphasis[i] / T * log_p.sum()).backward()
                x_t = x_prev
        latents.append(x_t)
        images.append(decode_images(model.vae, x_t))
        gradients.append([copy.grad for copy in copies])
    return torch.cat(latents), np.concatenate(images), [torch.cat(parts) for parts in zip(*gradients)]


def one_pass_update(optimizer, gradients, advantages):
    """The optimizer step of ddpo_update() with one minibatch: the gradient is -mean_n A_n g_n."""
    A = torch.as_tensor(advantages).to(gradients[0])
    for parameter, own in zip(optimizer.parameters, gradients):
        parameter.grad = -torch.einsum("n,n...->...", A, own) / len(A)
    optimizer.step()


def main():
    seconds = dict(two=[], one=[])
    steps = ddim_steps(Settings.steps)
    emphasis, plan = even_emphasis(steps), Plan(SAMPLES, 1, MICRO_BATCH, range(len(steps)))
    for epoch in tqdm(range(REPEATS)):
        prompts, seeds = draw_prompts(find_prompts("animals"), SAMPLES, seed=0, epoch=epoch)
        advantages, rng = np.random.default_rng(epoch).normal(size=SAMPLES), np.random.default_rng(0)
        for way in seconds:
            learner = learner_of(0)
            policy = Policy(learner.model, steps, 1.0, lora=learner.lora)
            began = time.perf_counter()
            if way == "two":
                trajectories = sample_trajectories(policy, prompts, seeds, plan.rollout())
                ddpo_update(policy, learner.optimizer, trajectories, advantages, rng, plan=plan, clip_range=None,
                            emphasis=emphasis)
            else:
                _, _, gradients = sample_with_gradients(policy, prompts, seeds, plan.rollout(), emphasis)
                one_pass_update(learner.optimizer, gradients, advantages)
            seconds[way].append(time.perf_counter() - began)
    two, one = (np.array(seconds[way]) for way in ("two", "one"))
    memory = sum(g.numel() * g.element_size() for g in gradients) / 1e6
    print(f"{SAMPLES} samples: two passes {two.mean():.2f} s, one pass {one.mean():.2f} s, ratio "
          f"{np.mean(one / two):.2f} ({', '.join(f'{r:.2f}' for r in one / two)}); {memory:.0f} MB of gradients")


if __name__ == "__main__":
    run_script(main, __doc__)
