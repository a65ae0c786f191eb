"""From rewards to what is trained on: advantages for the policy gradient, sample weights for weighted regression."""
from collections import deque

import numpy as np


def round_advantages(rewards):
    """Every reward against all the others of its round.

    A = (r - mean) / (std + 1e-6).   rewards: (N,); returns float64 (N,).
    """
    return group_advantages(rewards, len(rewards))


def group_advantages(rewards, group_size):
    """Every reward against its group: the samples of one prompt, drawn side by side in one round.

    A = (r - mean_g) / (std_g + 1e-6)    [GRPO Sec. 4.1.2]
    rewards: (N,), each `group_size` neighbours a group; returns float64 (N,). No group looks at another, or back.
    """
    groups = np.asarray(rewards, dtype=np.float64).reshape(-1, group_size)
    return ((groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-6)).reshape(-1)


class PromptStatistics:
    """A running mean and standard deviation of the reward for each prompt.

    A = (r - mean_c) / (std_c + 1e-6)    [paper App. D.3]
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


def rwr_weights(keys, rewards, beta):
    """Reward-weighted regression: a sample counts as exp(beta r), normalised among the samples of the same key.

    w_i = n_c exp(beta r_i) / sum_{j in c} exp(beta r_j)    [paper Eq. 3; per prompt, App. D.3]
    keys: list of N, the prompts, or one and the same for a softmax over the round; beta: inverse temperature, per unit
    of reward. Returns float64 (N,), of mean 1 in every key (n_c is the number of its samples).
    """
    rewards, keys = np.asarray(rewards, dtype=np.float64), np.asarray(keys)
    weights = np.empty_like(rewards)
    for key in np.unique(keys):
        own = keys == key
        odds = np.exp(beta * (rewards[own] - rewards[own].max()))       # the largest is 1: nothing overflows
        weights[own] = own.sum() * odds / odds.sum()
    return weights


def rwr_sparse_weights(keys, rewards, percentile):
    """Sparse reward-weighted regression: a sample counts fully or not at all.

    w_i = 1[r_i >= C], C the given percentile of the rewards of the same key    [paper Eq. 4; per prompt, App. D.3]
    keys: list of N, the prompts, or one and the same for the whole round; percentile: in (0, 1). Returns float64 (N,).
    """
    rewards, keys = np.asarray(rewards, dtype=np.float64), np.asarray(keys)
    weights = np.empty_like(rewards)
    for key in np.unique(keys):
        own = keys == key
        weights[own] = rewards[own] >= np.quantile(rewards[own], percentile)
    return weights


def effective_samples(weights):
    """How many equally weighted samples the weights are worth: (sum w)^2 / sum w^2, from 1 to N."""
    return float(np.sum(weights) ** 2 / np.sum(np.square(weights)))
