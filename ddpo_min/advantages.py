"""From rewards to advantages: how much better than usual was each picture?"""
from collections import Counter

import numpy as np


def standard_score(rewards, seen):
    """How many standard deviations a reward is above the mean: A = (r - mean) / std, 0 where all rewards are equal.

    rewards: a number or array; seen: the rewards to compare with. The scale does not matter: a deviation counts as 0
    only if it is no more than float64's rounding.
    """
    largest = np.abs(seen).max() or 1.0     # divided by first: squares of 1e200 or 1e-200 are no float64
    mean, std = np.mean(seen / largest), np.std(seen / largest)
    return (rewards / largest - mean) / std if std > 1e-12 else 0.0 * rewards


def epoch_advantages(rewards):
    """Every reward against all the others of its epoch.

    A = (r - mean) / std.   rewards: (N,); returns float64 (N,).
    """
    return group_advantages(rewards, len(rewards))


def group_advantages(rewards, group_size):
    """Every reward against its group: the samples of one prompt, drawn side by side in one epoch.

    A = (r - mean_g) / std_g    [GRPO Sec. 4.1.2]
    rewards: (N,), each `group_size` neighbours a group; returns float64 (N,). No group looks at another, or back.
    """
    groups = np.asarray(rewards, dtype=np.float64).reshape(-1, group_size)
    return np.concatenate([standard_score(group, group) for group in groups])


class PromptStatistics:
    """A running mean and standard deviation of the reward for each prompt.

    A = (r - mean_c) / std_c    [paper App. D.3]
    buffer: how many of a prompt's latest rewards count, more only if an epoch has more of them; minimum: with fewer
    than that, the mean and deviation of the whole epoch are used instead. Prompts are kept as they are written. Raises
    ValueError if minimum > buffer, which would switch the per-prompt statistics off for ever.
    """

    def __init__(self, buffer=32, minimum=16):
        if not 1 <= minimum <= buffer:
            raise ValueError(f"minimum count {minimum} must be between 1 and the buffer size {buffer}")
        self.buffer, self.minimum = buffer, minimum
        self.rewards = {}

    def advantages(self, prompts, rewards):
        """Add an epoch's rewards and normalise them: prompts, list of N str; rewards (N,); returns float64 (N,)."""
        rewards, own = np.asarray(rewards, dtype=np.float64), Counter(prompts)
        for prompt, r in zip(prompts, rewards):
            self.rewards.setdefault(prompt, []).append(float(r))
        for prompt, count in own.items():       # all of this epoch's, and older ones to fill the buffer
            self.rewards[prompt] = self.rewards[prompt][-max(self.buffer, count):]
        seen = {prompt: np.array(self.rewards[prompt]) if len(self.rewards[prompt]) >= self.minimum else rewards
                for prompt in own}
        return np.array([standard_score(r, seen[prompt]) for prompt, r in zip(prompts, rewards)])

    def state_dict(self):
        """What a checkpoint keeps: {prompt: its latest rewards}."""
        return {prompt: list(seen) for prompt, seen in self.rewards.items()}

    def load_state_dict(self, state):
        """Go on from state_dict()."""
        self.rewards = {prompt: list(seen) for prompt, seen in state.items()}


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
