"""Damage tiny model files in many ways:  python tests/fuzz_model_files.py [--count 5000] [--seed 0]

Each damaged model must load and compute what its tensors say, or be refused by one InputError of at most 400 printable
characters, within the memory and time of a file of its size. tests/test_model_files.py runs the first hundred.
"""
import argparse
import collections
import json
import random
import resource
import shutil
import struct
import tempfile
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from conftest import noise_through, tiny_networks
from ddpo_min import layout
from ddpo_min.files import InputError
from ddpo_min.weights import load_stable_diffusion, save_single_file

SECONDS, MEGABYTES = 20, 300        # at most, for a model of 4 MB
VALUES = [None, True, False, 0, 1, -1, 2, 3, 7, 0.5, 1e300, 10 ** 400, -0.0, float("nan"), float("inf"), "", "x", "4",
          "\n\x1b[31m\u202e", "é" * 500, [], [4], [8, 8], [8, 9], [[1]], [None, 2], {}, {"a": 1}, 64, 4096, 2 ** 31]
NAMES = ["", ".", "..", "a", "x" * 5000, "\n\x1b[2J", "model.diffusion_model.", "cond_stage_model.transformer.",
         "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight", "first_stage_model.encoder.down.",
         "model.diffusion_model.input_blocks.999.0.op.weight", "lora_unet_x", "first_stage_model.encoder.down.10 ** 6"]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4",
          "C64", "", "f32", None, 7]


def split(data):
    """(header, tensors' bytes) of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + length]), data[8 + length:]


def join(header, body):
    """A safetensors file of a header, an object or its text, and the tensors' bytes."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def some(rng, header):
    """The name of a tensor."""
    return rng.choice([name for name in header if name != "__metadata__"])


# ---- damage to one .safetensors file: (rng, its bytes) -> bytes

def cut(rng, data):
    return data[:rng.choice([0, 1, 7, 8, 9, rng.randrange(len(data)), len(data) - 1])]


def longer(rng, data):
    return data + rng.randbytes(rng.choice([1, 4, 1000]))


def flipped_bits(rng, data):
    data, end = bytearray(data), rng.choice([8, 200, len(data)])
    for _ in range(rng.choice([1, 3, 30])):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(data)


def other_length(rng, data):
    length = rng.choice([0, 1, 2 ** 20, 2 ** 31, 2 ** 62, 2 ** 64 - 1, rng.randrange(10 ** 6)])
    return struct.pack("<Q", length) + data[8:]


def other_format(rng, data):
    start = rng.choice([b"PK\3\4", b"\x80\2", b"GGUF\3\0\0\0",
                        b"version https://git-lfs.github.com/spec/v1\noid sha256:", b"<html>", b"{}", b"\0" * 50,
                        b"\x89PNG\r\n"])
    return start + rng.choice([b"", data[len(start):]])


def header_text(rng, data):
    header, body = split(data)
    text, at = json.dumps(header), rng.randrange(2000)
    return join(rng.choice(["", "[]", "null", "{}", "[" * 5000, '{"a":' * 500, "{" + text, text[:at], text[at:],
                            " " + text, text.replace('"', "'", 4), text[:at] + "\ud800" + text[at:],
                            text + text]), body)


def offsets(rng, data):
    header, body = split(data)
    entry = header[some(rng, header)]
    entry["data_offsets"] = rng.choice([
        [0, 0], entry["data_offsets"][::-1], [n + 4 for n in entry["data_offsets"]], [-4, 4], [0, 2 ** 63],
        [2 ** 64, 1], header[some(rng, header)]["data_offsets"], [0], None, "x", [0.5, 4], []])
    return join(header, body)


def dtypes(rng, data):
    header, body = split(data)
    for _ in range(rng.choice([1, 5])):
        header[some(rng, header)]["dtype"] = rng.choice(DTYPES)
    return join(header, body)


def shapes(rng, data):
    """Of the same number of elements, or of any."""
    header, body = split(data)
    entry = header[some(rng, header)]
    shape = entry["shape"]
    count = 1
    for n in shape:
        count *= n
    entry["shape"] = rng.choice([shape[::-1], [count], [count, 1], [1, count], [*shape, 1], [1, *shape], shape[:1], [],
                                 None, [0], [-1], [2 ** 40, 2 ** 40], [0, 2 ** 62], [1.5], "4", [1] * 100 + [count],
                                 [count // 2, 2], [2, count // 2]])
    return join(header, body)


def renamed(rng, data):
    header, body = split(data)
    old = some(rng, header)
    header[rng.choice([*NAMES, old + "x", old[:-1], old[1:], old.replace("0", "1"), old.replace(".", ""), old.upper(),
                       old.replace("weight", "bias"), some(rng, header)])] = header.pop(old)
    return join(header, body)


def named_twice(rng, data):
    """One entry of the header twice, with the same tensor or another of its size."""
    header, body = split(data)
    old = some(rng, header)
    again = dict(header[old], dtype=rng.choice(["F32", "I32"]))
    return join(json.dumps(header)[:-1] + ", " + json.dumps({old: again})[1:], body)


def tensors(change):
    """Damage to a file's tensors: change(rng, {name: tensor}, a name)."""
    def damage(rng, data):
        header, _ = split(data)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.safetensors"
            path.write_bytes(data)
            state = load_file(path)
            change(rng, state, rng.choice(list(state)))
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, header.get("__metadata__"))
            return path.read_bytes()
    damage.__name__ = change.__name__
    return damage


@tensors
def not_finite(rng, state, name):
    flat = state[name].flatten()
    flat[rng.randrange(len(flat))] = rng.choice([float("nan"), float("inf"), -float("inf")])
    state[name] = flat.view_as(state[name])


@tensors
def enormous(rng, state, name):
    state[name] = state[name] * rng.choice([1e30, 1e38, -1e38, 0.0, 1e-40])


@tensors
def missing(rng, state, name):
    for gone in rng.choice([[name], [n for n in state if n[:40] == name[:40]], list(state)]):
        state.pop(gone)


@tensors
def empty(rng, state, name):
    state[name] = state[name][:0] if rng.random() < 0.5 else torch.zeros(0, 2 ** 40)


@tensors
def resized(rng, state, name):
    tensor = state[name]
    change = rng.choice([lambda: tensor[:-1], lambda: torch.cat([tensor, tensor]), lambda: tensor[None],
                         lambda: tensor.flatten(), lambda: tensor.reshape(-1)[0], lambda: tensor[..., :1]])
    state[name] = change().clone()


@tensors
def other_dtype(rng, state, name):
    for each in rng.choice([[name], list(state)]):
        state[each] = state[each].to(rng.choice([torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
                                                 torch.int32, torch.bool, torch.complex64]))


@tensors
def two_names(rng, state, name):
    """The same weights under a second name that this project or diffusers gives them."""
    prefix = next((p for p in (layout.UNET, layout.VAE, layout.TEXT) if name.startswith(p)), "")
    vae = {**layout.vae_prefixes(2, 1), "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pairs = {layout.UNET: layout.unet_prefixes((False, True), 1), layout.VAE: vae}.get(prefix, {})
    rest = name[len(prefix):]
    other = layout.rename(rest, pairs) if prefix in (layout.UNET, layout.VAE) else rest.removeprefix("text_model.")
    if other == rest:
        for a, b in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            other = other.replace(a, b)
    if other != rest:       # some names are the same in both
        state[prefix + other] = state[name] + 1


@tensors
def surplus(rng, state, name):
    state[rng.choice([*NAMES[3:], name + ".scale", "betas", "ztsnr", "v_pred"])] = torch.zeros(rng.choice([1, 1000]))


@tensors
def unlike_noise(rng, state, name):
    """The sign of the output turned, a file that says nothing then is refused."""
    for each in state:
        if each.endswith(("diffusion_model.out.2.weight", "diffusion_model.out.2.bias", "conv_out.weight")):
            state[each] = -state[each]


def metadata(rng, data):
    header, body = split(data)
    given = header.get("__metadata__", {})
    keys = ["unet_heads", "unet_groups", "vae_groups", "latent_scale", "text_heads", "text_used", "unet_head_width",
            "image_size", "modelspec.prediction_type", "text_openclip", "x"]
    for _ in range(rng.choice([1, 1, 3])):
        value = rng.choice(VALUES)
        given[rng.choice(keys)] = value if rng.random() < 0.1 else str(value)
    header["__metadata__"] = rng.choice([given] * 9 + [rng.choice(VALUES)])
    return join(header, body)


DAMAGE = [cut, longer, flipped_bits, other_length, other_format, header_text, offsets, dtypes, shapes, renamed,
          named_twice, not_finite, enormous, missing, empty, resized, other_dtype, two_names, surplus, unlike_noise,
          metadata]


# ---- damage to a folder: (rng, its path)

def one_file(rng, folder):
    """One of the networks' files, damaged as a single file."""
    path = rng.choice(sorted(folder.rglob("*.safetensors")))
    path.write_bytes(rng.choice(DAMAGE)(rng, path.read_bytes()))


def config(rng, folder):
    path = rng.choice(sorted(folder.rglob("*.json")))
    found = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 3])):
        found[rng.choice(list(found))] = rng.choice(VALUES)
    path.write_text(json.dumps(found))


def config_text(rng, folder):
    path = rng.choice(sorted(folder.rglob("*.json")))
    text = path.read_bytes()
    path.write_bytes(rng.choice([b"", b"[]", b"null", b"1" * 9000, b"[" * 100_000, b'{"a": NaN}', text[:len(text) // 2],
                                 b"\xff" + text, b"\0" * 9, text + text, b'[["a", 1]]', b"version https://git-lfs"]))


def gone(rng, folder):
    path = rng.choice(sorted(folder.rglob("*")))
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def other_kind(rng, folder):
    """A folder in a file's place."""
    path = rng.choice([p for p in sorted(folder.rglob("*")) if p.is_file()])
    path.unlink()
    path.mkdir()


def swapped(rng, folder):
    a, b = rng.sample([p for p in sorted(folder.rglob("*")) if p.is_file()], 2)
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


# What changes values, or what files say of them: a model then can load and compute something else, as it should
MAY_DIFFER = [flipped_bits, enormous, other_dtype, metadata, one_file, config, config_text, gone, swapped]

FOLDER_DAMAGE = [one_file, config, config_text, gone, other_kind, swapped]


def make_models(folder):
    """A single file and a diffusers folder, one of whose networks is in two shards; both predict noise, as tested."""
    unet, vae, text = tiny_networks()
    through_noise(unet)
    text.text_model.embeddings.token_embedding.weight.data.mul_(0.1)
    save_single_file(folder / "model.safetensors", unet, vae, text, torch.float32, 16)
    header, body = split((folder / "model.safetensors").read_bytes())
    header["__metadata__"].pop("modelspec.prediction_type")
    (folder / "model.safetensors").write_bytes(join(header, body))
    out = folder / "folder"
    for network, name, stem in ((unet, "unet", "diffusion_pytorch_model"), (vae, "vae", "diffusion_pytorch_model"),
                                (text, "text_encoder", "model")):
        (out / name).mkdir(parents=True)
        state = dict(network.state_dict())
        names = sorted(state)
        parts = [names] if name != "unet" else [names[::2], names[1::2]]
        files = [f"{stem}.safetensors"] if len(parts) == 1 else [f"{stem}-{i}.safetensors" for i in range(2)]
        for part, file in zip(parts, files, strict=True):
            save_file({n: state[n].contiguous() for n in part}, out / name / file)
        if len(parts) > 1:
            found = {n: file for part, file in zip(parts, files, strict=True) for n in part}
            (out / name / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": found}))
    (out / "scheduler").mkdir()
    for name, content in (
            ("unet", dict(attention_head_dim=2, norm_num_groups=8, sample_size=8, act_fn="silu", norm_eps=1e-5)),
            ("vae", dict(norm_num_groups=4, scaling_factor=0.18215, act_fn="silu")),
            ("text_encoder", dict(num_attention_heads=2, num_hidden_layers=1, hidden_act="quick_gelu")),
            ("scheduler", dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, trained_betas=None))):
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (out / name / file).write_text(json.dumps(content))


def through_noise(unet):
    """Make the tiny UNet's output its input plus a little of all else: a model that predicts noise."""
    with torch.no_grad():
        noise_through(unet)
        unet.up_blocks[1].resnets[1].conv2.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(0))


def results(path):
    """What a model computes, in numbers; raises InputError if it does not load."""
    dtype = torch.float32
    model = load_stable_diffusion(path, dtype=dtype)
    h, w = model.latent_shape(16, 16)
    with torch.no_grad():
        context = model.encode_prompts(["a fox"])
        x = torch.randn(1, 4, h, w, generator=torch.Generator().manual_seed(1))
        return torch.cat([model.unet(x, torch.tensor([500]), context).flatten(), model.vae.decode(x).flatten()])


def problem(path, right):
    """(None or what is wrong, "refused", "loaded" or "same") with a model at `path`; right: of the undamaged one."""
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong, what = None, "refused"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = results(path)
        same = found.shape == right.shape and torch.allclose(found, right, atol=1e-4)   # alignment changes rounding
        what = "same" if same else "loaded"
    except InputError as error:
        message = str(error).replace(str(path), "FILE")
        if len(message) > 400 or not message.isprintable():
            wrong = f"a message of {len(message)} characters: {message!r}"
        elif any(words in message for words in ("invalid literal", "object is not", "unsupported operand", "KeyError",
                                                "has no attribute", "list index")):
            wrong = f"Python's words: {message}"
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - begin
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if seconds > SECONDS or megabytes > MEGABYTES:
        wrong = wrong or f"{seconds:.0f} s, {megabytes:.0f} MB"
    return wrong, what


def fuzz(folder, count, seed=0):
    """Yield (number, kind of damage, outcome, None or what is wrong) of `count` damaged models, written to `folder`."""
    make_models(folder)
    models = [folder / "model.safetensors", folder / "folder"]
    right = [results(model) for model in models]
    path = folder / "damaged"
    for number in range(count):
        rng = random.Random(1_000_000 * seed + number)
        kind = (DAMAGE + FOLDER_DAMAGE)[number % len(DAMAGE + FOLDER_DAMAGE)]
        if kind in DAMAGE:
            path.write_bytes(kind(rng, models[0].read_bytes()))
        else:
            shutil.copytree(models[1], path)
            kind(rng, path)
        wrong, what = problem(path, right[kind in FOLDER_DAMAGE])
        if what == "loaded" and kind not in MAY_DIFFER:
            wrong = "loaded, and computes something else"
        yield number, kind.__name__, what, wrong
        path.unlink() if path.is_file() else shutil.rmtree(path)


def main():
    """The command; Ctrl-C ends it with what it has counted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="of damaged models (5000)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts, problems = collections.Counter(), 0
    with tempfile.TemporaryDirectory() as place:
        try:
            for number, kind, what, wrong in fuzz(Path(place), args.count, args.seed):
                counts[kind, what] += 1
                if wrong:
                    problems += 1
                    print(number, kind, wrong[:500], flush=True)
        except KeyboardInterrupt:
            pass
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:14}", *(f"{what} {counts[kind, what]:5}" for what in ("refused", "loaded", "same")), sep="  ")
    print(f"{sum(counts.values())} damaged models, {problems} problems")


if __name__ == "__main__":
    main()
