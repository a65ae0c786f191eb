"""The progress bar of a run, and how long the phases of its epochs took."""
import time

from tqdm import tqdm

from .figures import number
from .processes import rank


class Progress:
    """A bar over all epochs: every sample counts once when it is drawn and once each time it is trained on."""

    def __init__(self, epochs, samples, inner_epochs):
        self.epochs, self.samples, self.inner_epochs = epochs, samples, inner_epochs
        self.bar, self.began, self.phase = None, {}, ""

    def open(self, first):
        """Show the bar, with `first` epochs finished."""
        an_epoch = self.samples * (1 + self.inner_epochs)
        self.bar = tqdm(initial=first * an_epoch, total=self.epochs * an_epoch, unit="sample", smoothing=0.05,
                        disable=rank() > 0)

    def close(self):
        """Leave the bar as it is."""
        self.bar.close()

    def epochs_from(self, first):
        """The epochs that are left, each announced on the bar."""
        for epoch in range(first, self.epochs):
            self.began, self.phase = {}, f"epoch {epoch + 1}/{self.epochs}"
            yield epoch

    def __call__(self, kind, samples):
        """So many more samples are done; kind: "sampling" or "training"."""
        if kind not in self.began:
            self.began[kind] = time.perf_counter()
            self.bar.set_description(f"{self.phase} {kind}")
        self.bar.update(samples)

    def rates(self):
        """Pictures a second in each phase of the epoch that ends now; sampling includes decoding and the reward."""
        sampling, training, now = self.began["sampling"], self.began["training"], time.perf_counter()
        return dict(sampling_images_per_s=self.samples / (training - sampling),
                    training_images_per_s=self.samples * self.inner_epochs / (now - training))

    def write(self, line, reward=None):
        """Print a line above the bar; reward: the latest mean, to stand in it."""
        self.bar.write(line)
        if reward is not None:
            self.bar.set_postfix_str(f"reward {number(reward)}")
