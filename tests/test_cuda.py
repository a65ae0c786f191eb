"""On a GPU: what it draws is the CPU's, the first ratio is 1, and a run comes back. Skipped without one."""
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample
import train
from conftest import cut
from ddpo_min.ddim import ddim_steps
from ddpo_min.device import pick_device
from ddpo_min.policy import Policy
from ddpo_min.rollout import sample_trajectories
from ddpo_min.weights import SHIPPED, load_stable_diffusion
from test_train import arguments, metrics

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
              pytest.mark.usefixtures("plain_curve")]
GPU = "cuda"


@pytest.fixture(scope="module", autouse=True)
def as_a_run_sets_it():
    """What pick_device changes for the whole process, put back at the end."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    pick_device(GPU)
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def draw(device, dtype=torch.float32, guidance=1.0):
    """Trajectories of the shipped model, of the same prompts and seeds wherever they are drawn."""
    policy = Policy(load_stable_diffusion(SHIPPED, device, dtype), ddim_steps(8), guidance)
    return sample_trajectories(policy, ["a fox", "a cat"] * 4, range(8), cut(8, 4), keep="images")


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 0.02), (torch.bfloat16, 0.15), (torch.float16, 0.05)])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_gpu_draws_the_pictures_of_the_cpu(dtype, bound, guidance):
    ours, theirs = draw(GPU, dtype, guidance), draw("cpu", guidance=guidance)
    x_0, expected = ours.latents[:, -1].float(), theirs.latents[:, -1]
    assert (x_0 - expected).norm() < bound * expected.norm()
    assert np.abs(ours.images.astype(float) - theirs.images).mean() < 60 * bound


@pytest.mark.parametrize("more", [
    "", "--guidance 3", "--dtype bfloat16 --guidance 3", "--dtype float16", "--checkpointing", "--compile",
    "--batch auto", "--trainable full --lr 1e-5", "--guidance 2 --no-guidance-in-training"])
def test_the_first_ratio_is_1(more, tmp_path):
    """Sampling and training compute the same log-probability, to the last bit, or clipping at 1e-4 would bite."""
    train.main(arguments(SHIPPED, tmp_path / "run", "--device", GPU, *more.split(), epochs=2))
    for line in metrics(tmp_path / "run"):
        assert line["max_ratio_error"] == 0
        assert line["grad_norm"] > 0


@pytest.mark.parametrize("algorithm", ["ddpo_is", "ddpo_sf", "rwr", "rwr_sparse", "awm", "nft", "ram"])
def test_every_algorithm_learns_there_what_it_learns_on_the_cpu(algorithm, tmp_path):
    """The first epoch's rewards, and the direction and length of its gradient, are the CPU's but for rounding.

    One optimizer step without momentum or weight decay, so large an eps that AdamW's step is the gradient's direction.
    """
    lines, changes = {}, {}
    for name, device in dict(there=GPU, here="cpu").items():
        train.main(arguments(SHIPPED, tmp_path / name, "--algorithm", algorithm, "--device", device, "--reward",
                             "clip", "--updates", "1", "--normalise", "epoch", "--adam-eps", "1e3", "--lr", "1",
                             "--weight-decay", "0", "--inner-epochs", "1", epochs=1))
        lines[name], = metrics(tmp_path / name)
        lora = load_file(tmp_path / name / "lora.safetensors")
        changes[name] = torch.cat([lora[part].double().flatten() for part in sorted(lora) if "lora_B" in part])
    assert lines["there"]["reward_mean"] == pytest.approx(lines["here"]["reward_mean"], abs=2e-3)
    assert lines["there"]["grad_norm"] == pytest.approx(lines["here"]["grad_norm"], rel=0.1)
    assert changes["here"].norm() > 0
    assert torch.cosine_similarity(changes["there"], changes["here"], dim=0) > 0.95


def test_a_resumed_run_goes_on_with_the_same_samples(tmp_path):
    """What is drawn is the same; backward passes on a GPU add up in no fixed order, so the weights agree but for that.
    """
    train.main(arguments(SHIPPED, tmp_path / "whole", "--device", GPU, epochs=3))
    train.main(arguments(SHIPPED, tmp_path / "halves", "--device", GPU, epochs=1))
    train.main(["--resume", str(tmp_path / "halves"), "--epochs", "3"])
    whole, halves = (load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "halves"))
    away = sum((whole[name].float() - halves[name].float()).square().sum() for name in whole).sqrt()
    assert away < 1e-3 * sum(tensor.float().square().sum() for tensor in whole.values()).sqrt()
    first, second = metrics(tmp_path / "whole"), metrics(tmp_path / "halves")
    assert [line["reward_mean"] for line in first] == pytest.approx([line["reward_mean"] for line in second], rel=1e-3)


def test_a_lora_of_the_gpu_draws_the_same_on_the_cpu(tmp_path):
    train.main(arguments(SHIPPED, tmp_path / "run", "--device", GPU, "--lr", "0.03", epochs=1))
    lora, drawn = str(tmp_path / "run" / "lora.safetensors"), {}
    for name, device, scale in (("there", GPU, "1"), ("here", "cpu", "1"), ("without", "cpu", "0")):
        sample.main(["--lora", lora, "--scale", scale, "--prompt", "a fox", "--num", "2", "--device", device, "--out",
                     str(tmp_path / name)])
        drawn[name] = np.stack([Image.open(tmp_path / name / f"000{i}.png") for i in range(2)]).astype(float)
    assert np.abs(drawn["there"] - drawn["here"]).mean() < 1
    assert np.abs(drawn["without"] - drawn["here"]).mean() > 3
