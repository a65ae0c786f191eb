"""The last stage of pretraining: predictions that look ahead, so that few steps draw crisply.

A network trained to denoise predicts the mean of all pictures that could lie behind the noise. Many small steps make
one picture of such means; eight large ones leave a haze. So the finished network, the teacher, walks many small steps
without noise (eta 0) from noised pictures. The student starts as its copy and learns, at each point of a walk, the
noise with which ONE step would have led as far as the teacher's ten:

    eps = (x_s / sqrt(a_s) - x_t / sqrt(a_t)) / (sqrt((1 - a_s) / a_s) - sqrt((1 - a_t) / a_t)),  a = alpha_bar

which is DDIM's step from t to s [DDIM Eq. 13] solved for eps, as in progressive distillation [Salimans & Ho 2022]. The
teacher walks with guidance, but not where all is noise or all is drawn [Kynkäänniemi et al. 2024], and the student
learns that, too, without guidance of its own [Meng et al. 2023].
"""
import torch

from ddpo_min.ddim import ddim_mean, guide

STEP = 25               # timesteps between the points of a walk
AHEAD = 10              # points that the student looks ahead: 250 timesteps, two of train.py's steps
GUIDANCE = 2.0          # of the teacher, at timesteps ...
GUIDED = (100, 900)
WALKS = 256             # in a block; their points, in random order, are minibatches
MINIBATCH = 64
LARGEST_WEIGHT = 5.0


def predict(unet, x_t, t, context):
    """eps of a UNet of any dtype: float32 (B, 4, 16, 16)."""
    dtype = unet.conv_in.weight.dtype
    return unet(x_t.to(dtype, memory_format=torch.channels_last), t, context.to(dtype)).float()


def jump_eps(x_t, x_s, alpha_bar_t, alpha_bar_s):
    """The eps with which one DDIM step without noise leads from x_t to x_s; alpha_bar_s is larger, up to 1."""
    noise = lambda a: ((1 - a) / a) ** 0.5         # noqa: E731
    return (x_s / alpha_bar_s ** 0.5 - x_t / alpha_bar_t ** 0.5) / (noise(alpha_bar_s) - noise(alpha_bar_t))


class Walks:
    """Minibatches of the teacher's walks, a function of the seed and the step."""

    def __init__(self, pictures, teacher, seed):
        """pictures: see pretrain.Pictures; teacher: a UNet."""
        self.pictures, self.teacher, self.seed = pictures, teacher.eval().requires_grad_(False), seed
        self.timesteps = range(1, 1000, STEP)
        self.block, self.points = None, None
        # Walks begin at every point equally often, so that noised pictures are seen at all timesteps
        self.starts = [len(self.timesteps) - 1 - i * len(self.timesteps) // WALKS for i in range(WALKS)]
        self.minibatches = sum(start + 1 for start in self.starts) // MINIBATCH

    def minibatch(self, step, generator):
        """x_t, t, eps, context and weight of a minibatch: float (B, 4, 16, 16), int (B,), float, float, float (B,).

        One sample in ten is an ordinary one without a caption, so that guidance still works.
        """
        block, i = divmod(step, self.minibatches)
        if block != self.block:
            own = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
            self.block, self.points = block, self.walk(own)
            self.order = torch.randperm(len(self.points[0]), generator=own)
        x_t, t, eps, context = (part[self.order[i * MINIBATCH:(i + 1) * MINIBATCH]] for part in self.points)
        x_0, noise, _ = self.pictures.draw(len(t), generator)
        plain = torch.rand(len(t), generator=generator).to(t.device) < 0.1
        at = plain[:, None, None, None]
        x_t = torch.where(at, self.pictures.noised(x_0, noise, t), x_t)
        context = torch.where(plain[:, None, None], self.pictures.contexts[-1], context)
        weight = torch.where(plain, 1.0, (1 / self.pictures.alpha_bar[t]).clamp(max=LARGEST_WEIGHT))
        return x_t, t, torch.where(at, noise, eps), context, weight

    @torch.no_grad()
    def walk(self, generator):
        """A block of walks, most noise first: all their points' x_t, t, eps and context."""
        x_0, noise, context = self.pictures.draw(WALKS, generator, captions=1.0)
        alpha_bar, path, x = self.pictures.alpha_bar.tolist(), [], x_0[:0]
        for k in reversed(range(len(self.timesteps))):
            t = self.timesteps[k]
            count = sum(start >= k for start in self.starts)
            new = slice(len(x), count)
            x = torch.cat([x, self.pictures.noised(x_0[new], noise[new], torch.tensor([t]))])
            path.append((t, x))
            x = ddim_mean(x, self.guided_eps(x, t, context[:count]), alpha_bar[t],
                          alpha_bar[self.timesteps[k - 1]] if k else 1.0, 0.0)
        path.append((None, x))
        parts = []
        for i, (t, x_t) in enumerate(path[:-1]):
            s, x_s = path[min(i + AHEAD, len(path) - 1)]
            eps = jump_eps(x_t, x_s[:len(x_t)], alpha_bar[t], 1.0 if s is None else alpha_bar[s])
            parts.append((x_t, torch.full((len(x_t),), t, device=x_t.device), eps, context[:len(x_t)]))
        return [torch.cat(part) for part in zip(*parts)]

    def guided_eps(self, x, t, context):
        """The teacher's prediction."""
        if not GUIDED[0] <= t <= GUIDED[1]:
            return predict(self.teacher, x, torch.full((len(x),), t, device=x.device), context)
        without = self.pictures.contexts[-1:].expand(len(x), -1, -1)
        both = predict(self.teacher, torch.cat([x, x]), torch.full((2 * len(x),), t, device=x.device),
                       torch.cat([context, without]))
        return guide(both[len(x):], both[:len(x)], GUIDANCE)
