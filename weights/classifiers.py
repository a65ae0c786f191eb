"""Two networks that name the animal on a picture, to check samples. Nothing else has seen them.

They have nothing in common but their task: other layers, another seed, other renders. The first may be used to choose
among recipes of the model; the second only to say whether the first was fooled.
"""
import torch
import torch.nn.functional as F
from torch import nn

import world


def to_float(images, device):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    images = torch.as_tensor(images, device=device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.contiguous(memory_format=torch.channels_last)


class Classifier(nn.Module):
    """The first: convolutions."""

    def __init__(self, width=24):
        super().__init__()
        layers, channels = [], 3
        for out in (width, 2 * width, 4 * width, 6 * width):
            layers += [nn.Conv2d(channels, out, 3, padding=1, stride=2), nn.GroupNorm(8, out), nn.SiLU(),
                       nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            channels = out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(16 * channels, len(world.ANIMALS))

    def forward(self, images):
        """images: float (B, 3, 64, 64) in [-1, 1]; returns logits (B, 45) in the order of world.ANIMALS."""
        return self.head(self.features(images).flatten(1))


class PatchClassifier(nn.Module):
    """The second: a transformer over patches of 8 x 8 pixels."""

    def __init__(self, width=96, layers=4, heads=4):
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, width // 2, 4, stride=4), nn.GELU(),
                                     nn.Conv2d(width // 2, width, 2, stride=2))
        self.position = nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*[nn.TransformerEncoderLayer(
            width, heads, 3 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(layers)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(world.ANIMALS)))

    def forward(self, images):
        """As Classifier's."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.blocks(x).mean(dim=1))


def spoiled(x, generator):
    """Renders (B, 3, 64, 64) blurred and grained at random, so that a classifier bears the flaws of samples."""
    keep = torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device)
    x = x + keep * (F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1) - x)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return x + 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device) * noise
