"""The numbers that an update gathers, and the bar's rates, by hand."""
import pytest
import torch

from ddpo_min import progress
from ddpo_min.metrics import Metrics


def gathered():
    """Two optimizer steps, the second one skipped; micro-batches of 3, 1 and 2 samples."""
    metrics = Metrics()
    metrics.add(3, 0, loss=torch.tensor(1.0), error=torch.tensor(0.1))
    metrics.add(1, 2, loss=torch.tensor(5.0, requires_grad=True), error=torch.tensor(0.3))
    metrics.step(4.0)
    metrics.add(2, 2, loss=torch.tensor(-1.0), error=torch.tensor(0.9))
    metrics.step(None)
    return metrics


def test_means_are_weighted_by_the_samples_of_each_micro_batch():
    assert gathered().mean("loss") == pytest.approx((3 * 1 + 5 - 2) / 6)
    assert gathered().mean("error") == pytest.approx((0.3 + 0.3 + 1.8) / 6)


def test_each_denoising_step_has_a_mean_of_its_own_or_none():
    assert gathered().by_step("loss", 4) == [1.0, None, pytest.approx((5 - 2) / 3), None]


def test_the_largest_at_first_looks_at_the_first_optimizer_step_alone():
    assert gathered().largest_at_first("error") == pytest.approx(0.3)


def test_skipped_steps_are_counted_and_have_no_norm():
    assert gathered().gradient() == dict(grad_norm=4.0, skipped_updates=1)
    metrics = Metrics()
    for norm in (1.0, 4.0):
        metrics.add(1, loss=torch.tensor(0.0))
        metrics.step(norm)
    assert metrics.gradient() == dict(grad_norm=2.5)
    metrics = Metrics()
    metrics.add(1, loss=torch.tensor(0.0))
    metrics.step(None)
    assert metrics.gradient() == dict(grad_norm=0.0, skipped_updates=1)


def test_rates_are_samples_by_the_seconds_of_their_phase(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    bar = progress.Progress(epochs=3, samples=8, inner_epochs=2)
    bar.open(first=1)
    assert (bar.bar.n, bar.bar.total) == (24, 72)
    epochs = bar.epochs_from(1)
    assert next(epochs) == 1
    for seconds, kind, samples in ((0, "sampling", 0), (2, "sampling", 8), (2, "training", 0), (5, "training", 16)):
        now[0] += seconds
        bar(kind, samples)
    now[0] += 3
    assert bar.rates() == dict(sampling_images_per_s=8 / 4, training_images_per_s=16 / 8)
    assert bar.bar.n == 48 and bar.bar.desc == "epoch 2/3 training: "
    assert next(epochs) == 2 and list(epochs) == []
    bar.close()
