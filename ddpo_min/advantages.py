"""From rewards to advantages: how much better than usual was each picture?"""
from collections import deque

import numpy as np


def epoch_advantages(rewards):
    """Every reward against all the others of its epoch.

    A = (r - mean) / (std + 1e-6).   rewards: (N,); returns float64 (N,).
    """
    return group_advantages(rewards, len(rewards))


def group_advantages(rewards, group_size):
    """Every reward against its group: the samples of one prompt, drawn side by side in one epoch.

    A = (r - mean_g) / (std_g + 1e-6)    [GRPO Sec. 4.1.2]
    rewards: (N,), each `group_size` neighbours a group; returns float64 (N,). No group looks at another, or back.
    """
    groups = np.asarray(rewards, dtype=np.float64).reshape(-1, group_size)
    return ((groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-6)).reshape(-1)


class PromptStatistics:
    """A running mean and standard deviation of the reward for each prompt.

    A = (r - mean_c) / (std_c + 1e-6)    [paper App. D.3]
    buffer: how many of a prompt's latest rewards count; minimum: with fewer than that, the mean and deviation of the
    whole epoch are used instead. Prompts are kept as they are written. Raises ValueError if minimum > buffer, which
    would switch the per-prompt statistics off for ever.
    """

    def __init__(self, buffer=32, minimum=16):
        if not 1 <= minimum <= buffer:
            raise ValueError(f"minimum count {minimum} must be between 1 and the buffer size {buffer}")
        self.buffer, self.minimum = buffer, minimum
        self.rewards = {}

    def advantages(self, prompts, rewards):
        """Add an epoch's rewards and normalise them: prompts, list of N str; rewards (N,); returns float64 (N,)."""
        rewards = np.asarray(rewards, dtype=np.float64)
        for prompt, r in zip(prompts, rewards):
            self.rewards.setdefault(prompt, deque(maxlen=self.buffer)).append(float(r))
        advantages = np.empty_like(rewards)
        for i, (prompt, r) in enumerate(zip(prompts, rewards)):
            seen = self.rewards[prompt] if len(self.rewards[prompt]) >= self.minimum else rewards
            advantages[i] = (r - np.mean(seen)) / (np.std(seen) + 1e-6)
        return advantages

    def state_dict(self):
        """What a checkpoint keeps: {prompt: its latest rewards}."""
        return {prompt: list(seen) for prompt, seen in self.rewards.items()}

    def load_state_dict(self, state):
        """Go on from state_dict()."""
        self.rewards = {prompt: deque(seen, maxlen=self.buffer) for prompt, seen in state.items()}


def clipped_advantages(prompts, rewards, *, normalise, clip, group_size=1, statistics=None):
    """The advantages of an epoch, cut at +-clip: float64 (N,).

    normalise: "prompt" (against the prompt's latest rewards, kept in `statistics`), "group" (against its group) or
    "epoch" (against all).
    """
    if normalise == "prompt":
        advantages = statistics.advantages(prompts, rewards)
    elif normalise == "group":
        advantages = group_advantages(rewards, group_size)
    else:
        advantages = epoch_advantages(rewards)
    return advantages.clip(-clip, clip)
