"""HPS v2.1 and PickScore against the formulas that their authors publish, on tiny CLIPs of the same architecture."""
import pickle
import re
import sys
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import functional as tv

import train
from conftest import ROOT, randomise
from ddpo_min import hub, preference_rewards
from ddpo_min.cli import make_settings
from ddpo_min.files import InputError
from ddpo_min.preference_rewards import as_open_clip, make_clip
from ddpo_min.rewards import score
from ddpo_min.scorer import find_reward, parse_rewards
from test_train import arguments, metrics

TINY = dict(embed_dim=16, vision_cfg=dict(image_size=28, layers=2, width=32, head_width=16, patch_size=14),
            text_cfg=dict(context_length=77, vocab_size=49408, width=24, heads=2, layers=2))
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a cat", "two Foxes, riding a bike!", "a very long prompt of many words " * 20]


@pytest.fixture
def tiny(monkeypatch):
    """The architecture is a tiny one."""
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: TINY)


def pictures(height, width, n=3):
    return np.random.default_rng(height + width).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def their_clip(text, vision, dimensions, device="cpu"):
    """transformers' CLIP, random; sizes: (width, layers, heads) of the text and the vision transformer."""
    from transformers import CLIPConfig, CLIPModel
    sizes = [dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
                  hidden_act="gelu", projection_dim=dimensions) for width, layers, heads in (text, vision)]
    config = CLIPConfig(text_config=dict(sizes[0], vocab_size=49408, eos_token_id=2),
                        vision_config=dict(sizes[1], image_size=28 if dimensions == 16 else 224, patch_size=14),
                        projection_dim=dimensions)
    with torch.device(device):
        return CLIPModel(config)


def pickscore_file(folder):
    """A tiny PickScore as its authors publish the large one; returns (its path, the model)."""
    model = randomise(their_clip((24, 2, 2), (32, 2, 2), 16)).float()
    model.logit_scale.fill_(3.0)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "pick.safetensors")
    return str(folder / "pick.safetensors"), model


def hps_file(folder):
    """A tiny HPS as its authors publish the large one: in half precision, under "state_dict"; (its path, the model)."""
    model = randomise(make_clip("cpu")).float()
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save(dict(epoch=1, state_dict=state), folder / "hps.pt")
    model.load_state_dict(state)
    return str(folder / "hps.pt"), model


def published_hps(model, images, prompts):
    """tgxs002/HPSv2, hpsv2/img_score.py, with the transform of its own open_clip (light_augmentation)."""
    scores = []
    for image, prompt in zip(images, prompts):
        x = tv.to_tensor(Image.fromarray(image))
        height, width = x.shape[1:]
        new = [round(side * (28 / float(max(height, width)))) for side in (height, width)]
        x = tv.resize(x, new, tv.InterpolationMode.BICUBIC, antialias=True)
        down, right = 28 - new[0], 28 - new[1]
        x = tv.pad(x, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0)
        z, w, _ = model(tv.normalize(x, MEAN, STD)[None], open_clip.tokenize([prompt]))
        scores.append((z @ w.T).item())
    return scores


def published_pickscore(model, images, prompts):
    """The README of yuvalkirstain/PickScore, whose processor was the one with PIL."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:
        from transformers import CLIPImageProcessor as Processor
    processor = Processor(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28))
    scores = []
    for image, prompt in zip(images, prompts):
        x = processor(images=[Image.fromarray(image)], return_tensors="pt").pixel_values
        ids = open_clip.tokenize([prompt])
        z = model.visual_projection(model.vision_model(pixel_values=x).pooler_output)
        w = model.text_projection(model.text_model(input_ids=ids).pooler_output)
        z, w = z / torch.norm(z, dim=-1, keepdim=True), w / torch.norm(w, dim=-1, keepdim=True)
        scores.append((model.logit_scale.exp() * (w @ z.T)[0]).item())
    return scores


@pytest.mark.parametrize("height, width", [(64, 64), (20, 20), (28, 28), (61, 40), (40, 65)])
def test_a_preference_reward_is_the_published_formula(tiny, tmp_path, height, width):
    """Square pictures and others, larger and smaller than what the network sees; a prompt that must be cut."""
    images = pictures(height, width)
    for name, make, published in (("hps", hps_file, published_hps), ("pickscore", pickscore_file, published_pickscore)):
        path, model = make(tmp_path)
        scores = find_reward(name, files={name: path})(images, PROMPTS)
        expected = np.array(published(model, images, PROMPTS))
        assert np.abs(scores - expected).max() < 2e-5 * max(1, np.abs(expected).max())
        assert expected.std() > 0.02 * np.abs(expected).max()       # pictures and prompts matter
        assert scores.dtype == np.float32 and scores.shape == (3,)


def test_half_precision_as_on_a_gpu_is_near(tiny, tmp_path):
    for name, make in (("hps", hps_file), ("pickscore", pickscore_file)):
        reward = find_reward(name, files={name: make(tmp_path)[0]})
        exact = reward(pictures(40, 40), PROMPTS)
        reward.dtype = torch.float16
        reward.model.to(reward.dtype)
        assert 0 < np.abs(reward(pictures(40, 40), PROMPTS) - exact).max() < 0.01 * np.abs(exact).max()


def test_each_reward_reads_both_sets_of_names(tiny, tmp_path):
    """PickScore under OpenCLIP's names, pickled; HPS under transformers', in safetensors."""
    path, _ = pickscore_file(tmp_path)
    images = pictures(28, 28)
    state = as_open_clip(preference_rewards.read("pickscore", path))
    torch.save(state, tmp_path / "pick.pt")
    one, other = (find_reward("pickscore", files={"pickscore": str(p)})(images, PROMPTS)
                  for p in (path, tmp_path / "pick.pt"))
    assert np.array_equal(one, other)
    hps = find_reward("hps", files={"hps": path})(images, PROMPTS)
    assert np.allclose(hps * np.exp(3.0), one, rtol=1e-5)       # squares of that size look the same to both


def test_every_tensor_of_the_real_architecture_has_its_place():
    theirs = as_open_clip(their_clip((1024, 24, 16), (1280, 32, 16), 1024, "meta").state_dict())
    ours = make_clip("meta").state_dict()
    assert {name: t.shape for name, t in theirs.items()} == {name: t.shape for name, t in ours.items()}
    assert len(ours) == 12 * (32 + 24) + 14         # twelve a layer


def test_a_file_that_runs_code_is_refused_and_runs_none(tiny, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(dict(state_dict=Evil())))
    torch.save(dict(state_dict=Evil()), tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(InputError, match="not a file of tensors by name"):
            train.main(["--reward", "hps", "--hps-weights", str(tmp_path / name)])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage, named", [
    ("gone", "no such file"), ("text", "not a file of tensors"), ("list", "not a file of tensors"),
    ("missing", r"ln_final.weight is missing, expected \(24,\)"),
    ("more", r"extra is \(2,\), expected missing"), ("shape", r"logit_scale is \(3,\), expected \(\)")])
def test_a_wrong_file_is_one_line_before_anything_starts(tiny, tmp_path, monkeypatch, damage, named):
    monkeypatch.chdir(tmp_path)
    path, model = hps_file(tmp_path)
    state = torch.load(path, weights_only=True)["state_dict"]
    if damage == "gone":
        path = "nowhere.pt"
    elif damage == "text":
        (tmp_path / "hps.pt").write_text("no tensors")
    elif damage == "list":
        torch.save([torch.zeros(2)], path)
    else:
        {"missing": lambda: state.pop("ln_final.weight"), "more": lambda: state.update(extra=torch.zeros(2)),
         "shape": lambda: state.update(logit_scale=torch.zeros(3))}[damage]()
        torch.save(dict(state_dict=state), path)
    with pytest.raises(InputError, match=named) as caught:
        train.main(["--reward", "jpeg=1,hps=1", "--hps-weights", path])
    message = str(caught.value)
    assert message.startswith(f"--hps-weights {path}: ") and message.isprintable() and not (tmp_path / "runs").exists()
    assert "xswu/HPSv2:HPS_v2.1_compressed.pt" in message


def test_without_a_file_it_is_fetched_from_its_authors_and_without_a_network_said_how(tiny, tmp_path, monkeypatch):
    path, _ = pickscore_file(tmp_path)
    monkeypatch.setattr(hub, "_download", lambda repo, name: asked.append((repo, name)) or hub.Path(path))
    asked = []
    find_reward("pickscore")
    find_reward("hps")
    assert asked == [("yuvalkirstain/PickScore_v1", "model.safetensors"), ("xswu/HPSv2", "HPS_v2.1_compressed.pt")]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="^reward hps: xswu/HPSv2: .*cannot be reached.*--hps-weights takes "
                                         "HPS_v2.1_compressed.pt as a file"):
        train.main(["--watch", "hps"])


def test_a_run_is_trained_on_one_and_watches_the_other(tiny, tiny_file, tmp_path, capsys):
    paths = hps_file(tmp_path)[0], pickscore_file(tmp_path)[0]
    train.main(arguments(tiny_file, tmp_path / "run", "--reward", "hps", "--watch", "pickscore", "--hps-weights",
                         paths[0], "--pickscore-weights", paths[1], epochs=1))
    line = metrics(tmp_path / "run")[0]
    assert -1 <= line["reward_mean"] <= 1 and abs(line["score_pickscore"]) > 0 and line["reward_std"] > 0
    assert f"reward hps: {paths[0]}, OpenCLIP's ViT-H-14" in capsys.readouterr().out


def test_imagereward_says_why_not_and_what_to_do():
    with pytest.raises(InputError, match="--reward imagereward: its network is a BLIP.*docs/rewards.md"):
        parse_rewards("jpeg=1,imagereward=1")
    assert make_settings(reward="imagereward").reward == "imagereward"      # from Python it can be a function's name


def test_the_pages_way_to_imagereward_calls_it_as_it_is_called(monkeypatch):
    """The package's own score(prompt, PIL image), which needs packages that are not here."""
    class Blip:
        def score(self, prompt, image):
            return len(prompt) + image.size[0] + np.asarray(image).mean().item()

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=lambda name: asked.append(name) or Blip()))
    asked, names = [], {}
    page = (ROOT / "docs/rewards.md").read_text()
    exec(next(block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "ImageReward" in block), names)
    images = np.stack([np.full((4, 6, 3), value, np.uint8) for value in (1, 2)])
    assert score(names["imagereward"], images, ["a", "ab"]).tolist() == [1 + 6 + 1, 2 + 6 + 2]
    assert asked == ["ImageReward-v1.0"]
