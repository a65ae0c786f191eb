"""The simulated rater and the aesthetic head that learns from its ratings.

    python weights/rater.py     trains weights/aesthetic.safetensors (a minute) and prints how well it knows the rule

No human rated anything here. A rule computed from pixels plays the person; the head sees only its noisy, rounded
ratings of rendered pictures, as LAION's predictor saw people's. So a learned score can be compared with what it stands
for: python train.py --reward aesthetic --watch weights/rater.py:rule
"""
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import world  # noqa: E402
from ddpo_min.clip_rewards import SMALL, ClipScorer  # noqa: E402
from ddpo_min.files import atomic, run_script  # noqa: E402

WIDTHS = (64, 128, 32, 16, 1)       # LAION's are 768, 1024, 128, 64, 16, 1
RATER_SEED = 77_000_000             # of renders that nothing else draws


def rule(images, prompts=None):
    """What the rater likes: warm colours, strong colours, and a quiet border. uint8 (B, H, W, 3) -> (B,), 1 to 10.

    rating = 4.5 + 6 warmth + 4 saturation - 10 unrest, cut to 1..10:  warmth = mean(R - B), saturation = mean of
    max - min of a pixel's channels, unrest = mean difference of neighbouring pixels in the outer 8, all over 255.
    """
    return np.clip(uncut(images), 1, 10)


def uncut(images, prompts=None):
    """The same sum as rule(), not cut to 1..10: past these it goes on. uint8 (B, H, W, 3) -> (B,)."""
    x = np.asarray(images, dtype=np.float64) / 255
    warmth = (x[..., 0] - x[..., 2]).mean((1, 2))
    saturation = (x.max(-1) - x.min(-1)).mean((1, 2))
    grey = x.mean(-1)
    border = np.ones(grey.shape[1:], dtype=bool)
    border[8:-8, 8:-8] = False
    unrest = (np.abs(np.diff(grey, axis=2, append=grey[:, :, -1:]))
              + np.abs(np.diff(grey, axis=1, append=grey[:, -1:])))[:, border].mean(1)
    return 4.5 + 6 * warmth + 4 * saturation - 10 * unrest


def ratings(images, rng):
    """What the rater says: the rule with a mood of +-0.7, rounded to a whole number from 1 to 10."""
    return np.clip(np.round(rule(images) + rng.normal(0, 0.7, len(images))), 1, 10)


def main(folder=HERE, count=20_000, steps=3000, **origin):
    """Train the head on the CLIP in `folder` and write it there, with its origin (command, seed, commit) as metadata.

    Returns its correlation with the rule.
    """
    torch.manual_seed(0)
    clip = ClipScorer(SMALL, str(folder / "clip.safetensors"), "cpu")
    embeddings, said, true = [], [], []
    for part in tqdm(range(-(-count // 500)), desc="renders"):
        images = world.render_many([RATER_SEED, part], 500).image
        embeddings.append(clip.images(images))
        said.append(ratings(images, np.random.default_rng([RATER_SEED, part, 1])))
        true.append(rule(images))
    z, said, true = torch.cat(embeddings), torch.tensor(np.concatenate(said)).float(), np.concatenate(true)
    train = len(z) * 9 // 10
    head = nn.Sequential(*[nn.Linear(a, b) for a, b in zip(WIDTHS, WIDTHS[1:])])
    nn.init.constant_(head[-1].bias, said[:train].mean())
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=1e-3)
    bar = tqdm(range(steps), desc="head")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        index = torch.randint(train, (256,))
        loss = F.mse_loss(head(z[index])[:, 0], said[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix_str(f"{loss.item():.3f}", refresh=False)
    with torch.no_grad():
        learned = head(z[train:])[:, 0].numpy()
    correlation = np.corrcoef(learned, true[train:])[0, 1]
    print(f"{len(learned)} held-out renders: correlation with the rule {correlation:.3f}, "
          f"mean error {np.abs(learned - true[train:]).mean():.2f} (the rule's own spread {true[train:].std():.2f}, "
          f"ratings {said.mean():.2f} +- {said.std():.2f})")
    state = {f"layers.{i}.{kind}": getattr(layer, kind).detach().contiguous()
             for i, layer in enumerate(head) for kind in ("weight", "bias")}
    with atomic(folder / "aesthetic.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt", "ddpo_min": json.dumps(origin)})
    return float(correlation)


if __name__ == "__main__":
    run_script(partial(main, command="python weights/rater.py"), __doc__)
