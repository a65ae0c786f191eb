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


def test_the_curve_shows_what_was_logged(tmp_path, monkeypatch):
    """Reward and deviation, evaluations where there were some, each score, and how far the policy moved."""
    from matplotlib.figure import Figure

    from ddpo_min import figures
    seen, write = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (seen.append(self), write(self, *a, **k))[1])
    history = [dict(epoch=n, reward_mean=n * n, reward_std=0.5 * n, clip_fraction=0.1 * n, score_clip=3 - n)
               for n in (1, 2, 3)]
    history[1].update(eval_reward=7.0)
    history[2].update({"score_a$x$b.py:red": 5.0})
    figures.save_curve(tmp_path / "curve.png", history, "a$\\x$.py:f: reward over training")
    top, red, clip, bottom = seen[0].axes
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    lines = [[line.get_xydata().tolist() for line in axes.lines] for axes in (top, clip, bottom)]
    assert lines == [[[[1, 1], [2, 4], [3, 9]], [[2, 7]]], [[[1, 2], [2, 1], [3, 0]]],
                     [[[1, 0.1], [2, 0.2], [3, pytest.approx(0.3)]]]]
    spread, = top.collections
    assert {(1, 0.5), (1, 1.5), (3, 7.5), (3, 10.5)} <= {tuple(point) for point in spread.get_paths()[0].vertices}
    assert red.get_ylabel() == "a$x$b.py:red" and red.lines[0].get_ydata()[-1] == 5
    assert top.get_title() == "a$\\x$.py:f: reward over training"
    assert (clip.get_ylabel(), bottom.get_ylabel()) == ("clip", "clip fraction")
    figures.save_curve(tmp_path / "curve.png", [dict(epoch=1, reward_mean=1, reward_std=1, effective_samples=9)], "")
    assert seen[1].axes[-1].lines[0].get_ydata().tolist() == [9]
