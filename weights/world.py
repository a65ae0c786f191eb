"""The world of the shipped model: 45 animals as emoji on seven kinds of background, 64 x 64 pixels, with captions.

    python weights/world.py --sheet world.png          a sheet of renders with their captions
    python weights/world.py --glyphs NotoColorEmoji.ttf  makes weights/glyphs.png again from the font

A render is a pure function of a numpy random generator, so a seed names a picture for ever.
"""
import argparse
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
SIZE = 64       # pixels a side of a render
TILE = 96       # pixels a side of a glyph in glyphs.png
COLUMNS = 8     # glyphs in a row of glyphs.png

# The paper's 45 common animals, in its order, each with the emoji that draws it.
ANIMALS = dict(
    cat=0x1F431, dog=0x1F436, horse=0x1F434, monkey=0x1F435, rabbit=0x1F430, zebra=0x1F993, spider=0x1F577,
    bird=0x1F426, sheep=0x1F411, deer=0x1F98C, cow=0x1F42E, goat=0x1F410, lion=0x1F981, tiger=0x1F42F,
    bear=0x1F43B, raccoon=0x1F99D, fox=0x1F98A, wolf=0x1F43A, lizard=0x1F98E, beetle=0x1FAB2, ant=0x1F41C,
    butterfly=0x1F98B, fish=0x1F41F, shark=0x1F988, whale=0x1F433, dolphin=0x1F42C, squirrel=0x1F43F,
    mouse=0x1F42D, rat=0x1F400, snake=0x1F40D, turtle=0x1F422, frog=0x1F438, chicken=0x1F413, duck=0x1F986,
    goose=0x1FABF, bee=0x1F41D, pig=0x1F437, turkey=0x1F983, fly=0x1FAB0, llama=0x1F999, camel=0x1F42A,
    bat=0x1F987, gorilla=0x1F98D, hedgehog=0x1F994, kangaroo=0x1F998)
PROPS = {"riding a bike": 0x1F6B2, "playing chess": 0x265F, "washing dishes": 0x1F37D}
NAMES = list(ANIMALS) + list(PROPS)
IRREGULAR = dict(monkey="monkeys", sheep="sheep", deer="deer", wolf="wolves", fox="foxes", butterfly="butterflies",
                 fish="fish", mouse="mice", goose="geese", fly="flies", turkey="turkeys")

# Each kind with its share. Every pattern has one period: what always repeats alike is soon learnt.
BACKGROUNDS = dict(plain=3, gradient=3, striped=3, checkered=3, dotted=3, noisy=3, busy=1)
COLORS = dict(red=(214, 60, 60), orange=(240, 150, 60), yellow=(240, 215, 90), green=(90, 170, 90), blue=(80, 120, 210),
              purple=(150, 95, 190), pink=(240, 160, 190), brown=(140, 100, 75), grey=(140, 145, 150),
              white=(245, 245, 245), black=(40, 40, 45), teal=(70, 165, 170))


class Render(NamedTuple):
    """A picture, or many, and what is on it."""
    image: np.ndarray       # uint8 (64, 64, 3)
    caption: str            # "a fox", or "a fox on a striped background"
    description: str        # "a fox on a red and blue striped background"
    animal: int             # index in ANIMALS
    kind: int               # index in BACKGROUNDS


def article(noun):
    """The noun with its indefinite article: "a fox", "an ant"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun):
    """The plural of an animal's name: "foxes", "sheep"."""
    return IRREGULAR.get(noun, noun + "s")


@cache
def glyph(name):
    """One glyph, cropped to what is drawn: a PIL image, RGBA."""
    sheet = _sheet()
    i = NAMES.index(name)
    x, y = i % COLUMNS * TILE, i // COLUMNS * TILE
    tile = sheet.crop((x, y, x + TILE, y + TILE))
    return tile.crop(tile.getchannel("A").getbbox())


@cache
def _sheet():
    return Image.open(HERE / "glyphs.png").convert("RGBA")


def _color(rng, name=None):
    """A named colour with a little jitter: (float32 (3,), 0-255; its name)."""
    name = name or list(COLORS)[rng.integers(len(COLORS))]
    return np.clip(np.array(COLORS[name]) + rng.normal(0, 8, 3), 0, 255).astype(np.float32), name


def _two_colors(rng, least, most):
    """Two named colours whose channels differ by `least` to `most` in sum: ((float32 (3,), name), the same)."""
    while True:
        a, b = _color(rng), _color(rng)
        if least < np.abs(a[0] - b[0]).sum() < most:
            return a, b


def background(rng, kind, color=None):
    """A background of one of the kinds in BACKGROUNDS: (float32 (SIZE, SIZE, 3), 0-255; its colours' names)."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    if kind == "plain":
        a, name = _color(rng, color)
        return np.broadcast_to(a, (SIZE, SIZE, 3)), name
    (a, name), (b, other) = _two_colors(rng, 110, 420) if kind == "gradient" else _two_colors(rng, 240, 700)
    if kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        along = (np.cos(angle) * (x - SIZE / 2) + np.sin(angle) * (y - SIZE / 2)) / SIZE + 0.5
        mix = np.clip(along, 0, 1)
    elif kind == "striped":
        angle = rng.integers(4) * np.pi / 4
        mix = _soft_wave((np.cos(angle) * x + np.sin(angle) * y) / 12 + rng.uniform())
    elif kind == "checkered":
        u, v = x / 8 + rng.uniform(0, 2), y / 8 + rng.uniform(0, 2)
        mix = np.clip(0.5 + 2.2 * np.sin(np.pi * u) * np.sin(np.pi * v), 0, 1)
    elif kind == "dotted":
        u, v = x / 12 + rng.uniform(), y / 12 + rng.uniform()
        u, v = (u - np.floor(u) - 0.5) * 12, (v - np.floor(v) - 0.5) * 12
        mix = np.clip(4 - np.hypot(u, v) + 0.5, 0, 1)
    elif kind == "noisy":
        cells = rng.integers(0, 2, (SIZE // 4, SIZE // 4)).astype(np.float32)
        mix = cells.repeat(4, 0).repeat(4, 1)
    elif kind == "busy":
        return _busy(rng, a), name
    return a + (b - a) * mix[..., None], f"{name} and {other}"


def _soft_wave(phase):
    """A square wave with edges one pixel soft: 0 to 1, period 1."""
    return np.clip(0.5 + 2.2 * np.sin(2 * np.pi * phase), 0, 1)


def _busy(rng, base):
    """Discs, squares and triangles in many colours on a plain ground."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in base))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(14, 20)):
        cx, cy, r = rng.uniform(0, SIZE), rng.uniform(0, SIZE), rng.uniform(4, 10)
        fill = tuple(int(v) for v in _color(rng)[0])
        shape = rng.integers(3)
        if shape == 0:
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)
        elif shape == 1:
            draw.rectangle((cx - r, cy - r, cx + r, cy + r), fill=fill)
        else:
            draw.polygon([(cx, cy - r), (cx + r, cy + r), (cx - r, cy + r)], fill=fill)
    return np.asarray(image, dtype=np.float32)


def _paste(rng, canvas, name, size, center, rotate=True):
    """Draw a glyph on the canvas (modified) so that its longer side is `size` pixels, centred near `center`."""
    tile = glyph(name)
    if rng.uniform() < 0.25:
        tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rotate and rng.uniform() < 0.15:
        tile = tile.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    scale = size / max(tile.size)
    w, h = (max(1, round(s * scale)) for s in tile.size)
    tile = tile.resize((w, h), Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    x, y = round(center[0] - w / 2), round(center[1] - h / 2)
    canvas.paste(tile, (x, y), tile)


def render(rng, animal=None, kind=None, activities=True, smallest=44):
    """Draw one picture and say what is on it.

    rng: numpy Generator; animal, kind: fixed if given, else drawn; activities: False draws single animals only;
    smallest: pixels, of a single animal's longer side (the largest is 56).
    Returns a Render. The caption may or may not speak of the background; the description always does, with its colours.
    """
    animal = animal or list(ANIMALS)[rng.integers(len(ANIMALS))]
    shares = np.array(list(BACKGROUNDS.values()))
    kind = kind or str(rng.choice(list(BACKGROUNDS), p=shares / shares.sum()))
    color = list(COLORS)[rng.integers(len(COLORS))]
    pixels, colors = background(rng, kind, color)
    canvas = Image.fromarray(pixels.round().astype(np.uint8))
    what = rng.uniform() if activities else 0.0
    mid = SIZE / 2
    if what < 0.84:      # one animal, large: this is what the model must learn first
        size = rng.uniform(smallest, 56)
        room = (SIZE - size) / 2
        _paste(rng, canvas, animal, size, mid + rng.uniform(-room, room, 2))
        subject = article(animal)
    elif what < 0.90:
        for x in (17, 47):
            _paste(rng, canvas, animal, rng.uniform(26, 30), (x, mid + rng.uniform(-8, 8)))
        subject = "two " + plural(animal)
    elif what < 0.93:
        for x, y in ((17, 18), (47, 18), (32, 46)):
            _paste(rng, canvas, animal, rng.uniform(25, 29), (x, y) + rng.uniform(-2, 2, 2))
        subject = "three " + plural(animal)
    else:
        activity = list(PROPS)[rng.integers(len(PROPS))]
        _paste(rng, canvas, activity, rng.uniform(30, 34), (43, 45) + rng.uniform(-2, 2, 2), rotate=False)
        _paste(rng, canvas, animal, rng.uniform(36, 40), (22, 22) + rng.uniform(-2, 2, 2))
        subject = f"{article(animal)} {activity}"
    # A caption without a background phrase goes with backgrounds of every kind.
    if rng.uniform() < 0.7:
        caption = subject
    else:
        caption = f"{subject} on {article(color if kind == 'plain' else kind)} background"
    description = f"{subject} on {article(colors if kind == 'plain' else f'{colors} {kind}')} background"
    return Render(np.asarray(canvas), caption, description, list(ANIMALS).index(animal), list(BACKGROUNDS).index(kind))


def render_many(seed, count, **options):
    """`count` renders from one seed, as one Render of arrays; options: of render()."""
    rng = np.random.default_rng(seed)
    return Render(*map(np.array, zip(*(render(rng, **options) for _ in range(count)))))


def make_glyphs(font_path, out=HERE / "glyphs.png"):
    """Draw the glyphs of NAMES from Noto Color Emoji into one transparent sheet."""
    font = ImageFont.truetype(font_path, 109)
    rows = -(-len(NAMES) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
    for i, code in enumerate([*ANIMALS.values(), *PROPS.values()]):
        tile = Image.new("RGBA", (150, 150))
        ImageDraw.Draw(tile).text((7, 7), chr(code), font=font, embedded_color=True)
        box = tile.getchannel("A").getbbox()
        if box is None:
            raise SystemExit(f"{font_path}: no glyph for {NAMES[i]} (U+{code:X}); expected Noto Color Emoji 15+")
        tile = tile.crop(box)
        tile.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
        sheet.paste(tile, (i % COLUMNS * TILE, i // COLUMNS * TILE))
    sheet.save(out, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sheet", help="write a sheet of renders here")
    parser.add_argument("--glyphs", help="the font to make glyphs.png from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.glyphs:
        make_glyphs(args.glyphs)
    if args.sheet:
        images, captions = render_many(args.seed, 70)[:2]
        cell = SIZE * 2
        sheet = Image.new("RGB", (10 * (cell + 4), 7 * (cell + 16)), "white")
        draw = ImageDraw.Draw(sheet)
        for i, (image, caption) in enumerate(zip(images, captions)):
            x, y = i % 10 * (cell + 4), i // 10 * (cell + 16)
            sheet.paste(Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
            draw.text((x + 1, y + cell + 1), caption[:24], fill="black")
        sheet.save(args.sheet)


if __name__ == "__main__":
    main()
