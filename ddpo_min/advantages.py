"""From rewards to advantages: how much better than usual was this picture, for its prompt?"""
from collections import deque

import numpy as np


class PromptStatistics:
    """A running mean and standard deviation of the reward for each prompt.

    advantage = (r - mean_c) / (std_c + 1e-6)    [paper App. D.3]
    buffer: how many of a prompt's latest rewards count; minimum: with fewer than that, the mean and deviation of the
    whole batch are used instead. Prompts are kept as they are written. Raises ValueError if minimum > buffer, which
    would switch the per-prompt statistics off for ever.
    """

    def __init__(self, buffer=32, minimum=16):
        if not 1 <= minimum <= buffer:
            raise ValueError(f"minimum count {minimum} must be between 1 and the buffer size {buffer}")
        self.buffer, self.minimum = buffer, minimum
        self.rewards = {}

    def advantages(self, prompts, rewards):
        """Add a batch and normalise it: prompts, list of N str; rewards (N,); returns float64 (N,)."""
        rewards = np.asarray(rewards, dtype=np.float64)
        for prompt, r in zip(prompts, rewards):
            self.rewards.setdefault(prompt, deque(maxlen=self.buffer)).append(float(r))
        advantages = np.empty_like(rewards)
        for i, (prompt, r) in enumerate(zip(prompts, rewards)):
            seen = self.rewards[prompt] if len(self.rewards[prompt]) >= self.minimum else rewards
            advantages[i] = (r - np.mean(seen)) / (np.std(seen) + 1e-6)
        return advantages

    def state(self):
        """What a checkpoint keeps: {prompt: its latest rewards}."""
        return {prompt: list(seen) for prompt, seen in self.rewards.items()}

    def load_state(self, state):
        """Go on from state()."""
        self.rewards = {prompt: deque(seen, maxlen=self.buffer) for prompt, seen in state.items()}
