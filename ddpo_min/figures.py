"""Pictures of a run: grids of samples with a line of text under each, a moving one, and the learning curve."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from . import __version__
from .files import atomic

WRITER = f"ddpo_min {__version__}"
SOFTWARE = 0x0131     # the number of this field in EXIF
GAP, LINE = 4, 15     # pixels between pictures, and for a line of text


def number(x, digits=3):
    """A number for readers: 1.234, but 1.23e-09 and 1.23e+300 where so many digits would be none or too many."""
    return f"{x:.{digits}f}" if x == 0 or 10 ** -digits <= abs(x) < 1e6 else f"{x:.3g}"


def scale_up(images):
    """Enlarge small pictures (uint8 (N, H, W, 3)) by a whole factor to about 128 pixels, without smoothing."""
    factor = max(1, round(128 / images.shape[1]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def thumbnails(images):
    """Large pictures (uint8 (N, H, W, 3)) made 128 pixels high, as small ones are by grid()."""
    if images.shape[1] <= 128:
        return images
    size = (max(1, round(128 * images.shape[2] / images.shape[1])), 128)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in images])


def cut_to(text, width, font):
    """The text, or as much of it as fits into this many pixels with "..." behind it."""
    length = len(text)
    while length and font.getlength(text[:length] + "..." * (length < len(text))) > width:
        length -= 1
    return text[:length] + "..." * (length < len(text))


def grid(rows, captions=None, labels=None, room=None):
    """Rows of pictures as one PIL image.

    rows: list of uint8 (N, H, W, 3); captions: for each row N str to write under the pictures, cut to their width;
    labels: a str a row, written at its left; room: labels to leave room for, so that several grids are of one size.
    """
    rows = [scale_up(np.asarray(row)) for row in rows]
    height, width = rows[0].shape[1:3]
    font = ImageFont.load_default(11)
    left = 0 if labels is None else 12 + int(max(font.getlength(label) for label in room or labels))
    below = LINE if captions else 0
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (width + GAP) + GAP, len(rows) * (height + below + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        y = GAP + r * (height + below + GAP)
        if labels is not None:
            draw.text((6, y + height // 2 - 6), labels[r], fill="black", font=font)
        for c, image in enumerate(row):
            x = left + GAP + c * (width + GAP)
            sheet.paste(Image.fromarray(image), (x, y))
            if captions:
                draw.text((x + 1, y + height + 1), cut_to(captions[r][c], width, font), fill="black", font=font)
    return sheet


def save_png(path, image, **texts):
    """Write a PIL image, atomically, with the version that made it and other texts."""
    info = PngInfo()
    for name, text in dict(Software=WRITER, **texts).items():
        info.add_text(name, text)
    with atomic(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)


def save_moving(path, frames):
    """Write PIL images of one size as a moving picture (WebP), a second each and the last one longer."""
    exif = Image.Exif()
    exif[SOFTWARE] = WRITER
    with atomic(path) as temporary:
        frames[0].save(temporary, "WEBP", save_all=True, append_images=frames[1:], quality=80, exif=exif, loop=0,
                       duration=[1000] * (len(frames) - 1) + [3000])


def save_curve(path, history, title):
    """Reward over epochs with its spread, and below it how far and how roughly the policy moved."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    epochs = [h["epoch"] for h in history]
    column = lambda name: np.array([h.get(name, np.nan) for h in history])     # noqa: E731
    watched = sorted({name for h in history for name in h if name.startswith("score_")})
    figure, (top, *middle, bottom) = plt.subplots(2 + len(watched), 1, figsize=(7, 6 + 1.5 * len(watched)), sharex=True,
                                                  height_ratios=(2, *[1] * (len(watched) + 1)))
    mean, std = column("reward_mean"), column("reward_std")
    top.fill_between(epochs, mean - std, mean + std, alpha=0.2, label="one standard deviation")
    top.plot(epochs, mean, marker="o", markersize=3, label="mean of the epoch's samples")
    evaluated = [h for h in history if "eval_reward" in h]
    if evaluated:
        top.plot([h["epoch"] for h in evaluated], [h["eval_reward"] for h in evaluated], marker="s", linestyle="--",
                 label="mean on the held-out evaluation")
    top.set(ylabel="reward")
    top.set_title(title, parse_math=False)      # a file's name may have $ in it
    top.legend(fontsize=8)
    for axes, name in zip(middle, watched):
        axes.plot(epochs, column(name), marker="o", markersize=3)
        axes.set_ylabel(name.removeprefix("score_"), parse_math=False)
    if "clip_fraction" in history[0]:
        bottom.plot(epochs, column("clip_fraction"))
        bottom.set(xlabel="epoch", ylabel="clip fraction", ylim=(0, 1))
    else:
        bottom.plot(epochs, column("effective_samples"))
        bottom.set(xlabel="epoch", ylabel="effective samples")
    for axes in (top, *middle, bottom):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": WRITER})
    plt.close(figure)
