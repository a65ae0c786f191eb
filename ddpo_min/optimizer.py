"""The optimizer: AdamW, the gradient clipped, the loss scaled up for float16; an average, and the old policy."""
import math
from contextlib import contextmanager

import torch

from .files import InputError, NotFinite
from .processes import sum_gradients


class Optimizer:
    """AdamW on what is trained, with the gradient clipped.

    For float16 networks the loss is scaled up before the backward pass, or small gradients would round to zero; when
    they overflow, the step is skipped and the scale halved.
    """

    def __init__(self, parameters, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4, grad_clip=1.0,
                 scale_loss=False, ema=0.0, policy_ema=0.0):
        """parameters: list of float32 tensors; scale_loss: for float16; ema: see averaged(); policy_ema: see epoch().

        Raises InputError for float16 on mps.
        """
        device = parameters[0].device.type
        if scale_loss and device == "mps":
            raise InputError("--dtype float16: torch scales no loss on mps; start with --dtype bfloat16 or float32")
        self.parameters, self.grad_clip, self.ema, self.policy_ema = parameters, grad_clip, ema, policy_ema
        self.average, self.steps = [p.detach().clone() for p in parameters] if ema else [], 0
        self.old, self.ahead = [], []       # the old policy's weights in an epoch; with policy_ema what is trained
        fused = parameters[0].is_cuda or None       # the usual one needs a fifth copy of all that is trained
        self.rule = torch.optim.AdamW(parameters, lr, betas, eps, weight_decay, fused=fused)
        self.scaler = torch.amp.GradScaler(device, enabled=scale_loss)
        self.scaler.scale(torch.zeros((), device=device))       # it is made here: a process may have no sample to scale

    def backward(self, loss):
        """The backward pass: add the loss's gradient to what has gathered since the last step."""
        self.scaler.scale(loss).backward()

    def step(self):
        """Clip the gathered gradient and step; returns its norm before clipping, None if the step was skipped.

        Raises NotFinite if the gradient is that and a smaller scale cannot help.
        """
        sum_gradients(self.parameters)
        self.scaler.unscale_(self.rule)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip).item()
        if not math.isfinite(norm) and self.scaler.get_scale() <= 1:      # 1 without float16
            raise NotFinite("the gradients")
        self.scaler.step(self.rule)
        self.scaler.update()
        self.rule.zero_grad(set_to_none=True)
        if math.isfinite(norm):
            self._follow()
        return norm if math.isfinite(norm) else None

    def _follow(self):
        """The average after a step: average <- d average + (1 - d) trained, d = min(ema, n / (n + 9)) in the nth."""
        self.steps += 1
        decay = min(self.ema, self.steps / (self.steps + 9))        # a short run must not end at the untrained weights
        for average, p in zip(self.average, self.parameters):
            average.lerp_(p.detach(), 1 - decay)

    @contextmanager
    def averaged(self):
        """Within the block the network is the average, if there is one: it is evaluated and saved, never trained."""
        self._swap(self.average)
        try:
            yield
        finally:
            self._swap(self.average)

    @contextmanager
    def epoch(self):
        """Around the steps of an epoch whose losses look at the old policy, the one that drew the epoch's pictures.

        With policy_ema the policy is an average of what is trained, which waits for the next epoch: after each,
        policy <- policy_ema policy + (1 - policy_ema) trained. So the average draws, is evaluated and saved.
        """
        self.old = [p.detach().clone() for p in self.parameters]
        for p, trained in zip(self.parameters, self.ahead):
            p.data.copy_(trained)
        yield
        if self.policy_ema:
            self.ahead = [p.detach().clone() for p in self.parameters]
            for p, old in zip(self.parameters, self.old):
                p.data.lerp_(old, self.policy_ema)
        self.old = []

    @contextmanager
    def old_policy(self):
        """Within the block the network is the old policy; nothing is copied."""
        self._swap(self.old)
        try:
            yield
        finally:
            self._swap(self.old)

    def _swap(self, others):
        for p, other in zip(self.parameters, others):
            p.data, other.data = other.data, p.data

    def state_dict(self):
        """AdamW's state, the scale, the average and its steps, and with policy_ema what is trained."""
        return {**self.rule.state_dict(), "scaler": self.scaler.state_dict(), "ahead": [p.cpu() for p in self.ahead],
                "average": [p.cpu() for p in self.average], "steps": self.steps}

    def load_state_dict(self, state):
        """Go on from state_dict(), which may come from another device."""
        self.rule.zero_grad(set_to_none=True)
        self.rule.state.clear()         # before the new moments come: of a whole UNet two sets may not fit
        groups = [{**group, "fused": self.rule.defaults["fused"]} for group in state["param_groups"]]
        self.rule.load_state_dict({"state": state["state"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        self.ahead, self.average = ([kept.to(p.device) for p, kept in zip(self.parameters, state[name])]
                                    for name in ("ahead", "average"))
        self.steps = state["steps"]
