"""Rewards by a CLIP: the aesthetic score, and the similarity of picture and prompt.

Beside real Stable Diffusion they use the real networks; beside the shipped model small ones of their kind, in weights/.
"""
import functools
import hashlib
import http.client
import json
import urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from .files import InputError, atomic, first_line, make_folder
from .text import tokenize
from .weights import SHIPPED

# The LAION aesthetic predictor on OpenAI's CLIP ViT-L/14, whose weights need the "quickgelu" variant
LAION_HEAD = "sac+logos+ava1-l14-linearMSE.pth"
LAION_URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
LAION_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
OPENAI_CLIP = "ViT-L-14-quickgelu"
SMALL = "small"         # the CLIP of weights/


def which_clip(model, small):
    """The CLIP in use: the one that is named, else the small one beside a small model, else OpenAI's."""
    return model or (SMALL if small else OPENAI_CLIP)


def head_path(name, head):
    """The file of the aesthetic head for the CLIP `name`. Raises InputError if LAION's cannot be fetched."""
    return Path(head or (SHIPPED.parent / "aesthetic.safetensors" if name == SMALL else laion_head_path()))


def check(names, *, small, model="", weights="", head=""):
    """Refuse what the rewards of these names could not work with, before anything slow starts. Raises InputError.

    small: whether pictures come from a model of the shipped one's kind; model, weights: of the CLIP; head: a file.
    """
    clip = which_clip(model, small)
    if {"aesthetic", "clip"} & set(names) and clip != SMALL:
        import open_clip
        if clip not in open_clip.list_models():
            raise InputError(f"--clip-model {clip}: unknown to open_clip; open_clip.list_models() shows all")
    if "aesthetic" in names:
        path = head_path(clip, head)
        inputs = load_head(path).layers[0].in_features
        width = (json.loads((SHIPPED.parent / "clip_config.json").read_text()) if clip == SMALL
                 else open_clip.get_model_config(clip))["embed_dim"]
        if inputs != width:
            raise InputError(f"--aesthetic-head {path}: made for embeddings of {inputs} numbers, but the CLIP {clip} "
                             f"gives {width}")


class ClipScorer:
    """A CLIP that embeds pictures and texts, normalised; frozen."""

    def __init__(self, name, weights, device):
        """name: SMALL, or an open_clip model; weights: a file, or a tag for open_clip to fetch. Raises InputError."""
        self.name, self.device = name, device
        if name == SMALL:
            from open_clip import image_transform
            from open_clip.model import CLIP
            folder = SHIPPED.parent
            self.model = CLIP(**json.loads((folder / "clip_config.json").read_text()))
            side = self.model.visual.image_size
            fit = image_transform(side, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3)    # of other --size
            try:
                state = load_file(weights or folder / "clip.safetensors")
                self.model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
            except Exception as error:
                raise InputError(f"--clip-weights {weights}: not the weights of the small CLIP ({first_line(error)}); "
                                 "for others name their --clip-model, too")
            self.prepare = lambda image: (torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1
                                          if image.shape[:2] == (side, side) else fit(Image.fromarray(image)))
            self.tokenize = tokenize
        else:
            import open_clip
            try:
                # OpenAI's weights were trained with quickgelu, whatever the name of the model says
                self.model, _, prepare = open_clip.create_model_and_transforms(
                    name, pretrained=weights or "openai", force_quick_gelu=(weights or "openai") == "openai")
            except Exception as error:
                raise InputError(f"--clip-model {name}: open_clip could not make it with weights {weights or 'openai'} "
                                 f"({first_line(error)}); give another file or tag with --clip-weights")
            self.prepare = lambda image: prepare(Image.fromarray(image))
            self.tokenize = open_clip.get_tokenizer(name)
        self.model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def images(self, images):
        """uint8 (B, H, W, 3) -> (B, width), of length 1."""
        x = torch.stack([self.prepare(image) for image in images]).to(self.device)
        return F.normalize(self.model.encode_image(x).float(), dim=-1)

    @torch.no_grad()
    def texts(self, texts):
        """List of B str -> (B, width), of length 1."""
        return F.normalize(self.model.encode_text(self.tokenize(texts).to(self.device)).float(), dim=-1)

    def similarity(self, images, prompts):
        """The cosine similarity of each picture and its prompt: numpy (B,), -1 to 1."""
        return (self.images(images) * self.texts(prompts)).sum(1).cpu().numpy()


@functools.lru_cache(maxsize=1)
def clip_scorer(name, weights, device):
    """A ClipScorer, the same one for every reward that asks for it."""
    return ClipScorer(name, weights, device)


class AestheticHead(nn.Module):
    """Linear layers one after another, no activation between them: the LAION predictor with its dropout left out.

    score = W_n (... (W_1 z + b_1) ...) + b_n,  z the normalised CLIP embedding of the picture
    """

    def __init__(self, layers):
        """layers: list of (weight (out, in), bias (out,))."""
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(weight.shape[1], weight.shape[0]) for weight, _ in layers)
        for layer, (weight, bias) in zip(self.layers, layers):
            layer.weight.data, layer.bias.data = weight.float(), bias.float()

    def forward(self, z):
        """z: (B, width), of length 1; returns (B,)."""
        for layer in self.layers:
            z = layer(z)
        return z[:, 0]


class AestheticReward:
    """A head's score of pictures, which a CLIP embeds for it."""

    def __init__(self, scorer, head):
        self.scorer, self.head = scorer, head

    @torch.no_grad()
    def __call__(self, images, prompts):
        """uint8 (B, H, W, 3) -> numpy (B,)."""
        return self.head(self.scorer.images(images)).cpu().numpy()


def load_head(path):
    """An AestheticHead from a file: the LAION .pth (read with weights_only) or a .safetensors of the same names.

    Raises InputError if it is neither, or if its shapes do not follow on each other down to one number.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--aesthetic-head {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        numbers = sorted({int(name.split(".")[1]) for name in state})
        layers = [(state[f"layers.{n}.weight"], state[f"layers.{n}.bias"]) for n in numbers]
        widths = [tuple(weight.shape) for weight, _ in layers]
        flat = all(len(w.shape) == 2 and b.shape == w.shape[:1] for w, b in layers) and len(state) == 2 * len(layers)
        finite = all(tensor.is_floating_point() and tensor.float().isfinite().all() for tensor in state.values())
    except Exception as error:
        raise InputError(f"--aesthetic-head {path}: not a head with tensors layers.N.weight and layers.N.bias "
                         f"({type(error).__name__}); expected {LAION_HEAD} or one of its kind")
    if not layers or not flat or widths[-1][0] != 1 or any(a[0] != b[1] for a, b in zip(widths, widths[1:])):
        raise InputError(f"--aesthetic-head {path}: its layers {widths} do not lead to one number")
    if not finite:
        raise InputError(f"--aesthetic-head {path}: it has numbers that are not finite, or no fractions; the file is "
                         "damaged, download it again")
    return AestheticHead(layers)


def laion_head_path():
    """Where the LAION head is kept; fetched once, its checksum verified. Raises InputError without a network."""
    path = Path.home() / ".cache" / "ddpo_min" / LAION_HEAD
    if not path.is_file():
        try:
            with urllib.request.urlopen(LAION_URL, timeout=60) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"the aesthetic head could not be fetched ({error}); download {LAION_URL} and give it "
                             "with --aesthetic-head")
        found = hashlib.sha256(content).hexdigest()
        if found != LAION_SHA256:
            raise InputError(f"{LAION_URL}: its sha256 is {found}, expected {LAION_SHA256}; nothing was kept")
        try:
            make_folder(path.parent)
            with atomic(path) as temporary:
                temporary.write_bytes(content)
        except InputError as error:
            raise InputError(f"{error}, or download {LAION_URL} and give it with --aesthetic-head")
    return path


def aesthetic(device, *, small, model="", weights="", head=""):
    """The reward "aesthetic": the head's score of the picture's embedding, about 1 to 10; the prompt plays no part."""
    scorer = clip_scorer(which_clip(model, small), weights, device)
    path = head_path(scorer.name, head)
    print(f"  reward aesthetic: {path.name} on the CLIP {scorer.name}")
    return AestheticReward(scorer, load_head(path).to(device).eval())


def clip(device, *, small, model="", weights="", head=""):
    """The reward "clip": cosine similarity of picture and prompt, -1 to 1."""
    scorer = clip_scorer(which_clip(model, small), weights, device)
    print(f"  reward clip: cosine similarity by the CLIP {scorer.name}")
    return scorer.similarity
