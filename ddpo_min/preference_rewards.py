"""Rewards learned from people's choices between pictures: HPS v2.1 and PickScore.

Both are OpenCLIP's ViT-H-14, trained further. Each has its own preprocessing and scale, those of its authors' code.
"""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from .files import InputError, shown
from .hub import fetch
from .text import tokenize

ARCHITECTURE = "ViT-H-14"       # open_clip's name
FILES = dict(hps="xswu/HPSv2:HPS_v2.1_compressed.pt", pickscore="yuvalkirstain/PickScore_v1:model.safetensors")

# transformers' names -> OpenCLIP's, in this order
NAMES = (("vision_model.", "visual."), ("text_model.", ""), ("embeddings.patch_embedding", "conv1"),
         ("embeddings.position_embedding.weight", "positional_embedding"), ("embeddings.", ""),
         ("encoder.layers", "transformer.resblocks"), ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"),
         ("final_layer_norm", "ln_final"), ("layer_norm", "ln_"), ("self_attn", "attn"), ("mlp.fc1", "mlp.c_fc"),
         ("mlp.fc2", "mlp.c_proj"), ("visual_projection.weight", "visual.proj"),
         ("text_projection.weight", "text_projection"))


def as_open_clip(state):
    """{name: tensor} of a CLIP under OpenCLIP's names; given under these, or under transformers'."""
    if "visual_projection.weight" not in state:
        return state
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = tensor.T if name in ("visual.proj", "text_projection") else tensor
    for name in [name for name in renamed if ".q_proj." in name]:       # OpenCLIP stacks the rows of q, k and v
        renamed[name.replace("q_proj.", "in_proj_")] = torch.cat(
            [renamed.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")])
    return {name: tensor for name, tensor in renamed.items() if not name.endswith("position_ids")}


def make_clip(device):
    """An untrained CLIP of that architecture."""
    from open_clip import get_model_config
    from open_clip.model import CLIP
    with torch.device(device):
        return CLIP(**get_model_config(ARCHITECTURE))


def read(name, file):
    """{name: tensor} of a reward's file, under OpenCLIP's or transformers' names; the tensors are not yet loaded.

    file: a path, a name on the Hub, or "" for its authors' on the Hub. Raises InputError if it is not that CLIP.
    """
    try:
        path = fetch(file or FILES[name])
    except InputError as error:
        raise InputError(f"reward {name}: {error}; --{name}-weights takes {FILES[name].partition(':')[2]} as a file")
    if not path.is_file():
        raise InputError(f"--{name}-weights {path}: no such file; expected {FILES[name]} of the Hugging Face Hub")
    try:
        state = (load_file(path) if path.suffix == ".safetensors" else
                 torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        state = state.get("state_dict", state)
        found = as_open_clip({key: tensor.to("meta") for key, tensor in state.items()})
    except Exception as error:
        raise InputError(f"--{name}-weights {path}: not a file of tensors by name ({type(error).__name__}); expected "
                         f"{FILES[name]} of the Hugging Face Hub")
    expected = make_clip("meta").state_dict()
    for key in sorted(found.keys() | expected.keys()):
        shapes = [str(tuple(some[key].shape)) if key in some else "missing" for some in (found, expected)]
        if shapes[0] != shapes[1]:
            raise InputError(f"--{name}-weights {path}: not OpenCLIP's {ARCHITECTURE} ({shown(key)} is {shapes[0]}, "
                             f"expected {shapes[1]}); expected {FILES[name]} of the Hugging Face Hub")
    return state


def check(names, files):
    """Refuse files that the rewards of these names cannot be made from; files: {name: file}. Raises InputError."""
    for name in FILES.keys() & set(names):
        read(name, files[name])


def fit_all(images, size):
    """HPS: the longer side becomes `size`, the shorter gets black borders: uint8 (B, H, W, 3) -> (B, 3, size, size)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    scale = size / max(x.shape[2:])
    height, width = (round(side * scale) for side in x.shape[2:])
    x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
    right, below = size - width, size - height
    return F.pad(x, (right // 2, right - right // 2, below // 2, below - below // 2))


def cut_centre(images, size):
    """PickScore: the shorter side becomes `size`, the middle is kept: uint8 (B, H, W, 3) -> (B, 3, size, size)."""
    sides = [int(size * side / min(images.shape[1:3])) for side in images.shape[2:0:-1]]       # width, height
    left, top = ((side - size) // 2 for side in sides)
    cut = [Image.fromarray(image).resize(sides, Image.BICUBIC).crop((left, top, left + size, top + size))
           for image in images]
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2) / 255


class PreferenceReward:
    """How well people are predicted to like a picture for its prompt.

    HPS v2.1: cos(z_picture, z_prompt), about 0.2 to 0.3; PickScore: exp(logit_scale) times that, about 18 to 24.
    """

    def __init__(self, name, file, device):
        """name: "hps" or "pickscore"; file: see read(). On a GPU it computes in float16, as HPS's own code does."""
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
        self.model, self.device = make_clip(device), device
        self.model.load_state_dict(as_open_clip(read(name, file)))
        self.model.eval().requires_grad_(False)
        self.scale = self.model.logit_scale.exp().item() if name == "pickscore" else 1.0
        self.dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        self.model.to(self.dtype)
        self.prepare = dict(hps=fit_all, pickscore=cut_centre)[name]
        self.mean, self.std = (torch.tensor(c).view(3, 1, 1) for c in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))

    @torch.no_grad()
    def __call__(self, images, prompts):
        """uint8 (B, H, W, 3), list of B str -> numpy (B,)."""
        x = (self.prepare(images, self.model.visual.image_size[0]) - self.mean) / self.std
        tokens = tokenize(prompts, self.model.context_length, padding=0)
        z, w = (F.normalize(encoded.float(), dim=-1) for encoded in (
            self.model.encode_image(x.to(self.device, self.dtype)), self.model.encode_text(tokens.to(self.device))))
        return (self.scale * (z * w).sum(1)).cpu().numpy()


def preference(name, device, file=""):
    """The reward "hps" or "pickscore"; says what it is made of. Raises InputError."""
    reward = PreferenceReward(name, file, device)
    print(f"  reward {name}: {file or FILES[name]}, OpenCLIP's {ARCHITECTURE}")
    return reward
