"""The denoiser as a policy: at each denoising step it draws x_prev from a Gaussian whose mean the network predicts."""
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .ddim import Steps, ddim_step, guide
from .lora import switched_off
from .weights import StableDiffusion


@dataclass
class Policy:
    """p(x_prev | x_t, c). Sampling and training use the same function on the same micro-batch, so the ratio is 1."""
    model: StableDiffusion
    steps: Steps
    guidance: float
    training_guidance: float = None     # of log_prob, if it is another than in sampling
    lora: dict = field(default_factory=dict)    # {name: LoRA layer}, if that is what is trained
    negative: str = ""                  # the prompt that guidance leads away from; training has the empty one
    compiled: object = None             # torch.compile(model.unet), if wanted

    def __post_init__(self):
        if self.training_guidance is None:
            self.training_guidance = self.guidance

    @cached_property
    def empty(self):
        """The embedding of the empty (or negative) prompt, (1, 77, width)."""
        return self.model.encode_prompts([self.negative])

    def predict(self, x, t, context):
        """What the network says. Compiled, sampling runs training's graph, too: another one rounds differently."""
        if self.compiled is None:
            return self.model.unet(x, t, context)
        with torch.enable_grad():       # contiguous: another order of memory would be compiled again
            out = self.compiled(x.contiguous(), t.contiguous(), context.contiguous())
        return out if torch.is_grad_enabled() else out.detach()

    def eps(self, x_t, t, context, guidance):
        """Predicted noise, guided: both halves in one batch; one half if guidance is 1.

        x_t: (B, 4, h, w); t: an int for all, or (B,); context: (B, 77, width). Returns x_t's shape and dtype.
        """
        dtype = self.model.unet.conv_in.weight.dtype
        if isinstance(t, int):
            t = torch.full((len(x_t),), t, device=x_t.device)       # made there: a copy would wait for the GPU
        if guidance == 1:
            out = self.predict(x_t.to(dtype), t, context.to(dtype)).to(x_t.dtype)
        else:
            both = torch.cat([self.empty.expand_as(context), context])
            out = self.predict(torch.cat([x_t, x_t]).to(dtype), torch.cat([t, t]), both.to(dtype))
            out = guide(*out.to(x_t.dtype).chunk(2), guidance)
        return self.model.noise(out, x_t, t)

    def act(self, x_t, i, context, noise, to_train=True):
        """Take denoising step i: returns (x_prev, its log_prob (B,), nan if the step has no noise).

        to_train: whether that has to be training's log_prob, which takes another network pass if guidance differs.
        """
        x_prev, log_p = ddim_step(x_t, self.eps(x_t, self.steps.t[i], context, self.guidance), self.steps, i, noise)
        if to_train and self.steps.sigma[i] and self.training_guidance != self.guidance:
            log_p, _ = self.log_prob(x_prev, x_t, i, context)
        return x_prev, log_p

    def log_prob(self, x_prev, x_t, i, context):
        """log p(x_prev | x_t, c) of step i, and the predicted noise: returns ((B,), (B, 4, h, w))."""
        eps = self.eps(x_t, self.steps.t[i], context, self.training_guidance)
        return ddim_step(x_t, eps, self.steps, i, x_prev=x_prev)[1], eps

    @torch.no_grad()
    def base_eps(self, x_t, t, context):
        """What the base model predicts: eps of training with the LoRA switched off, and so without --init-lora."""
        with switched_off(self.lora):
            return self.eps(x_t, t, context, self.training_guidance)
