"""The same training by TRL's DDPOTrainer and by train.py: the shipped model, one set of settings, several seeds.

    pip install trl==0.23.1 transformers==4.56.2 diffusers==0.35.2 peft==0.17.1 "accelerate<1.12"
    python tests/beside_trl.py --epochs 8 --seeds 3

In an environment of its own, with this project's packages, too: later versions of TRL have no DDPOTrainer. Prints a
line for each epoch with the mean reward of its samples (minus the JPEG size in kB): both sides' mean and deviation over
the seeds, and how many deviations they are apart.
"""
import argparse
import contextlib
import gzip
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ddpo_min.cli import make_settings
from ddpo_min.prompts import find_prompts
from ddpo_min.rewards import jpeg
from ddpo_min.weights import SHIPPED, load_stable_diffusion
from train import train

# What TRL does and what its settings are by default; guidance 1 is none
SETTINGS = dict(samples=256, updates=4, steps=8, guidance=1.0, lr=3e-3, clip_range=0.01, step_weights="paper",
                timestep_fraction=1.0, beta2=0.999, prompt_buffer=32, prompt_minimum=16, eval_samples=45)


def tokenizer(folder):
    """transformers' tokenizer with the vocabulary that open_clip brings along."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe
    from transformers import CLIPTokenizer
    merges = gzip.open(default_bpe()).read().decode().split("\n")[1:49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges),
             "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77,
                         pad_token="<|endoftext|>")


def write_folder(folder):
    """The shipped model as the diffusers folder that TRL's pipeline reads."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffusers_side import diffusers_unet, diffusers_vae
    model = load_stable_diffusion(SHIPPED)
    c = model.text_encoder.config
    unet, vae = diffusers_unet(model.unet.config, sample_size=16), diffusers_vae(model.vae.config)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=c.width, intermediate_size=c.inner, num_hidden_layers=c.layers,
                                        num_attention_heads=c.heads, projection_dim=c.width, hidden_act="quick_gelu"))
    for network, own in ((unet, model.unet), (vae, model.vae), (text, model.text_encoder)):
        state = own.state_dict()
        if "embeddings.token_embedding.weight" in network.state_dict():      # transformers 5 has no text_model
            state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
        network.load_state_dict(state)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer(folder), unet=unet, scheduler=scheduler,
                            safety_checker=None, feature_extractor=None, requires_safety_checker=False
                            ).save_pretrained(folder)


def theirs(folder, seed, epochs):
    """The mean reward of each epoch's samples, by TRL."""
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    s, batch = SETTINGS, 64
    rng, prompts, means = np.random.default_rng(seed), find_prompts("animals"), []

    def reward(images, prompts, metadata):
        pictures = (images * 255).round().clamp(0, 255).byte().cpu().permute(0, 2, 3, 1).numpy()
        means.append(jpeg(pictures, prompts))
        return means[-1].astype(np.float32), {}

    trainer = DDPOTrainer(DDPOConfig(
        seed=seed, num_epochs=epochs, mixed_precision="no", sample_num_steps=s["steps"],
        sample_guidance_scale=s["guidance"], train_cfg=False, sample_batch_size=batch,
        sample_num_batches_per_epoch=s["samples"] // batch, train_batch_size=batch,
        train_gradient_accumulation_steps=s["samples"] // s["updates"] // batch, train_learning_rate=s["lr"],
        train_clip_range=s["clip_range"], per_prompt_stat_tracking=True, save_freq=10 ** 6, logdir=tempfile.mkdtemp(),
        per_prompt_stat_tracking_buffer_size=s["prompt_buffer"],
        per_prompt_stat_tracking_min_count=s["prompt_minimum"]),
        reward, lambda: (prompts[rng.integers(len(prompts))], {}), DefaultDDPOStableDiffusionPipeline(str(folder)))
    trainer.train()
    return np.concatenate(means).reshape(epochs, -1).mean(1)


def ours(folder, seed, epochs):
    """The same, by train.py."""
    run = train(make_settings(**SETTINGS, seed=seed, epochs=epochs, out=str(folder / f"ours_{seed}")))
    return np.array([line["reward_mean"] for line in run.history])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            both = [np.array([side(folder, seed, a.epochs) for seed in range(a.seeds)]) for side in (theirs, ours)]
    (mean, std), (other, spread) = ((x.mean(0), x.std(0, ddof=1)) for x in both)
    for i in range(a.epochs):
        apart = abs(mean[i] - other[i]) / np.hypot(std[i], spread[i])
        print(f"epoch {i + 1}: TRL {mean[i]:.3f} +- {std[i]:.3f}, train.py {other[i]:.3f} +- {spread[i]:.3f}, "
              f"{apart:.1f} deviations apart")


if __name__ == "__main__":
    main()
