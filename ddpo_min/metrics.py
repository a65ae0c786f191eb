"""What an update measures about itself, averaged over everything that it trained on."""
import numpy as np
import torch

from .processes import gather


def spread(rewards):
    """Their standard deviation, whatever the scale: squares of 1e200 or 1e-200 are no float64."""
    largest = np.abs(rewards).max() or 1.0
    return largest * np.std(rewards / largest)


class Metrics:
    """Weighted means of numbers that come a micro-batch at a time.

    They stay on the device until the optimizer steps: reading a number waits for the GPU.
    """

    def __init__(self):
        self.waiting, self.rows, self.grad_norms = [], [], []

    def add(self, size, i=0, **values):
        """Numbers (scalar tensors) of a micro-batch of `size` samples, at denoising step i."""
        self.waiting.append((i, size, {name: value.detach() for name, value in values.items()}))

    def step(self, grad_norm):
        """The optimizer has stepped: grad_norm as Optimizer.step() returned it, None if it skipped the step."""
        if self.waiting:
            numbers = torch.stack([torch.stack(list(values.values())) for _, _, values in self.waiting]).tolist()
            self.rows += [(i, size, len(self.grad_norms), dict(zip(values, row)))
                          for (i, size, values), row in zip(self.waiting, numbers)]
        self.waiting = []
        self.grad_norms.append(grad_norm)

    def of_all(self):
        """The update is over: add what the other processes have trained on."""
        self.rows = [row for rows in gather(self.rows) for row in rows]

    def mean(self, name):
        """The mean of a number, each micro-batch weighted by its size."""
        sizes = [size for _, size, _, _ in self.rows]
        return np.average([values[name] for _, _, _, values in self.rows], weights=sizes)

    def by_step(self, name, T):
        """The same for each of the T denoising steps; None where a step was not trained on."""
        rows = [[(size, values[name]) for i, size, _, values in self.rows if i == step] for step in range(T)]
        return [float(np.average([value for _, value in row], weights=[size for size, _ in row])) if row else None
                for row in rows]

    def largest_at_first(self, name):
        """The largest value before the first optimizer step, while the policy still is the one that sampled."""
        return max(values[name] for _, _, steps, values in self.rows if steps == 0)

    def gradient(self):
        """The mean norm of the gradients before clipping, and how many optimizer steps were skipped, if any."""
        norms = [norm for norm in self.grad_norms if norm is not None]
        skipped = len(self.grad_norms) - len(norms)
        return dict(grad_norm=np.mean(norms or [0.0]), **({"skipped_updates": skipped} if skipped else {}))
