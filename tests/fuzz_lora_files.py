"""Thousands of damaged LoRA files: each is read right, or refused in one line with nothing written.

    python tests/fuzz_lora_files.py [COUNT] [FIRST]     files number FIRST, FIRST + 1, ... (5000 from 0)

A number gives the same file every time. tests/test_lora_files.py runs the first hundred.
"""
import collections
import json
import math
import os
import random
import struct
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from conftest import tiny_networks
from ddpo_min.files import InputError
from ddpo_min.interchange import FORMS, export_lora, kohya_name, write_lora
from ddpo_min.lora import load_loras

FILE = "lora.safetensors"
LAYERS = {"conv_in": ((2, 4, 3, 3), (16, 2, 1, 1)), "mid_block.attentions.0.proj_in": ((3, 32, 1, 1), (32, 3, 1, 1)),
          "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": ((2, 32), (32, 2)),
          "text_model.encoder.layers.0.mlp.fc1": ((1, 16), (32, 1))}
NUMBERS = (-1, 0, 1, 3, 7, 255, 2 ** 31, 2 ** 40, 2 ** 63, 2 ** 64, 1.5, -0.0, 1e400, float("nan"), 10 ** 400)
VALUES = (*NUMBERS, None, True, "", "a", "\x1b[31m", "é" * 3000, [], {}, [[]], {"a": 1}, [2, 32], ["F32"])
NAMES = ("", ".", "lora_unet_", "lora_unet_conv_in", "lora_unet_conv_in.", "unet.conv_in.lora_A.weight", "alpha",
         "lora_unet_conv_in.lora_down.weight", "\n", "\x00\x1b[2J", "a\r\nb", "é" * 5000, "x" * 100_000,
         "🦊.lora_A.weight", "text_encoder.", "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
         "unet." * 2000 + "alpha", "lora_unet_conv_in.dora_scale", "conv_in.hada_w1_a",
         "lora_unet_input_blocks_0_0.lora_up.weight")
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "I64", "I32", "I16", "I8",
          "U64", "U32", "U16", "U8", "BOOL", "C64", "f32", "", "F128", 3, None)


def original(rng):
    """(header, data) of a good file in one of the two forms."""
    torch.manual_seed(0)
    layers = {name: (torch.randn(a), torch.randn(b), 1.5) for name, (a, b) in LAYERS.items()}
    write_lora(FILE, rng.choice(FORMS), layers, {"ss_output_name": "fox"})
    raw = Path(FILE).read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), bytearray(raw[end:])


def packed(header, data):
    """A file's bytes; header: a dict, or its text."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(rng, header):
    """A random tensor's name and its entry in the header, which can be changed."""
    name = rng.choice([name for name in header if name != "__metadata__"])
    return name, header[name]


# ---- the damages: (rng, header, data) -> the file's bytes

def good(rng, header, data):
    return packed(header, data)


def flipped(rng, header, data):
    raw = bytearray(packed(header, data))
    end = rng.choice([8, 60, len(raw) - len(data), len(raw)])
    for _ in range(rng.choice([1, 1, 2, 20])):
        raw[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(raw)


def length(rng, header, data):
    raw = packed(header, data)
    return struct.pack("<Q", rng.choice([0, 1, 2, len(raw), len(raw) - 8, 10 ** 8, 2 ** 63, 2 ** 64 - 1])) + raw[8:]


def truncated(rng, header, data):
    raw = packed(header, data)
    return raw[:rng.choice([0, 1, 7, 8, 9, rng.randrange(len(raw)), len(raw) - 1])]


def longer(rng, header, data):
    return packed(header, data + bytes(rng.choice([1, 4, 4096])))


def offsets(rng, header, data):
    name, tensor = entry(rng, header)
    tensor["data_offsets"] = rng.choice([
        tensor["data_offsets"][::-1], entry(rng, header)[1]["data_offsets"], [0, len(data)], [rng.choice(VALUES)] * 2,
        [o + rng.choice([-4, 4, 1]) for o in tensor["data_offsets"]], rng.choice(VALUES)])
    return packed(header, data)


def dtypes(rng, header, data):
    for _ in range(rng.choice([1, 9])):
        entry(rng, header)[1]["dtype"] = rng.choice(DTYPES)
    return packed(header, data)


def retyped(rng, header, data):
    """Another dtype with the right size, so that only we can notice."""
    sizes = {8: ("F64", "I64", "U64", "C64"), 4: ("I32", "U32", "F32"), 2: ("F16", "BF16", "I16"), 1: DTYPES[4:6]}
    for name in [name for name in header if name != "__metadata__"]:
        tensor, size = header[name], rng.choice([8, 4, 4, 2, 1])
        begin, end = tensor["data_offsets"]
        if rng.random() < 0.5 and tensor["shape"] and tensor["shape"][0] * 4 % size == 0:
            tensor.update(dtype=rng.choice(sizes[size]), shape=[tensor["shape"][0] * 4 // size, *tensor["shape"][1:]])
    return packed(header, data)


def shapes(rng, header, data):
    name, tensor = entry(rng, header)
    shape = tensor["shape"]
    tensor["shape"] = rng.choice([shape[::-1], [math.prod(shape)], [*shape, 1], [1, *shape], [], [0, *shape], shape[:1],
                                  [2 ** 32, 2 ** 32], [rng.choice(VALUES)] * 2, rng.choice(VALUES)])
    return packed(header, data)


def renamed(rng, header, data):
    for _ in range(rng.choice([1, 1, 5])):
        name, tensor = entry(rng, header)
        at = rng.randrange(len(name) + 1)
        other = name[:at] + rng.choice(["", ".", "_", "\n", "é", "0"]) + name[at + 1:]
        del header[name]
        header[rng.choice([other, other, name + ".weight", "unet." + name, *rng.sample(NAMES, 2)])] = tensor
    return packed(header, data)


def duplicated(rng, header, data):
    name, tensor = entry(rng, header)
    text = json.dumps(header)
    other = rng.choice([name, entry(rng, header)[0], kohya_name("conv_in") + ".alpha", "__metadata__"])
    return packed(f"{text[:-1]}, {json.dumps(other)}: {json.dumps(tensor)}}}", data)


def second_name(rng, header, data):
    """A tensor once more under another name of the same layer, in data of its own."""
    name, tensor = entry(rng, header)
    begin, end = tensor["data_offsets"]
    other = rng.choice(["unet.conv_in.lora_A.weight", "lora_unet_conv_in.lora_down.weight", "conv_in.lora.up.weight",
                        "lora_unet_input_blocks_0_0.lora_down.weight", "base_model.model.conv_in.lora_B.weight",
                        "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight"])
    if other not in header:
        header[other] = {**tensor, "data_offsets": [len(data), len(data) + end - begin]}
        data = data + data[begin:end]
    return packed(header, data)


def empty(rng, header, data):
    name, tensor = entry(rng, header)
    begin, end = tensor["data_offsets"]
    for other in [value for key, value in header.items() if key != "__metadata__"]:
        if other["data_offsets"][0] >= end:
            other["data_offsets"] = [offset - (end - begin) for offset in other["data_offsets"]]
    tensor.update(shape=rng.choice([[0], [0, 4], [2, 0], [0, 0, 3, 3]]), data_offsets=[begin, begin])
    return packed(header, data[:begin] + data[end:])


def missing(rng, header, data):
    """A tensor is gone, its data too."""
    name, tensor = entry(rng, header)
    begin, end = tensor["data_offsets"]
    del header[name]
    for other in [value for key, value in header.items() if key != "__metadata__"]:
        if other["data_offsets"][0] >= end:
            other["data_offsets"] = [offset - (end - begin) for offset in other["data_offsets"]]
    return packed(header, data[:begin] + data[end:])


def not_finite(rng, header, data):
    name, tensor = entry(rng, header)
    begin, end = tensor["data_offsets"]
    at = rng.randrange(begin, end, 4)
    data[at:at + 4] = struct.pack("<f", rng.choice([math.nan, math.inf, -math.inf, 3e38]))
    return packed(header, data)


def metadata(rng, header, data):
    config = json.loads(header["__metadata__"].get("lora_adapter_metadata", '{"unet.alpha_pattern": {}}'))
    key = rng.choice([*config, "unet.lora_alpha", "unet.use_rslora", "lora_alpha", "text_encoder.lora_alpha"])
    patterns = {rng.choice(["(", "*", "to_q", "", "[", "é", "conv_in", "(.*)*x", ".*" * 20 + "x"]): rng.choice(VALUES)}
    value = rng.choice([rng.choice(VALUES), patterns])
    text = rng.choice([json.dumps({**config, key: value}), json.dumps(value), "{", "", "[" * 5000, "\x00", "NaN",
                       '{"unet.lora_alpha": 1' + "0" * 5000 + "}"])
    header["__metadata__"][rng.choice(["lora_adapter_metadata", "ddpo_min", "ss_network_alpha"])] = text
    return packed(header, data)


def metadata_types(rng, header, data):
    header["__metadata__"] = rng.choice([rng.choice(VALUES), {"ddpo_min": rng.choice(VALUES)}, {"": ""}])
    return packed(header, data)


def header_types(rng, header, data):
    name, tensor = entry(rng, header)
    return packed(rng.choice([{**header, name: rng.choice(VALUES)}, {**header, name: {**tensor, "more": 1}}, [], "",
                              {**header, name: {}}, {}, "{" * 1000, "null", "\ud800"]), data)


DAMAGES = [good, flipped, length, truncated, longer, offsets, dtypes, retyped, shapes, renamed, duplicated, second_name,
           empty, missing, not_finite, metadata, metadata_types, header_types]


# ---- what must hold

@cache
def networks():
    """The tiny UNet and text encoder, kept until there is a LoRA on them."""
    unet, _, text = tiny_networks()
    return unet, text


def check_read(layers):
    """Each layer has the numbers of two tensors in the file, and its alpha if the file has one for each layer."""
    state = load_file(FILE)
    values = [tensor.float().flatten() for tensor in state.values() if tensor.is_floating_point()]
    alphas = {float(tensor) for name, tensor in state.items() if name.endswith("alpha") and tensor.numel() == 1}
    for layer in layers.values():
        for part in (layer.lora_A.weight.detach().flatten(), layer.lora_B.weight.detach().flatten()):
            assert part.isfinite().all() and any(torch.equal(part, value) for value in values)
        assert math.isfinite(layer.scale)
        if len(alphas) == 1 and len(alphas) == len(layers):
            assert layer.alpha in alphas


def check_refusal(error):
    """One printable line of at most 400 letters that names the file and is no Python error's."""
    text = str(error)
    assert text.isprintable() and len(text) <= 400 and text.startswith((FILE, "lora-")), ascii(text)


def outcome(number):
    """Make file `number` in the current folder, read and export it: (kind of damage, "read" or "refused").

    Raises whatever does not hold.
    """
    rng = random.Random(number)
    damage = DAMAGES[number % len(DAMAGES)]
    content = damage(rng, *original(rng))
    Path(FILE).write_bytes(content)
    try:
        layers, result = load_loras([(FILE, 1.0)], *networks()), "read"
        networks.cache_clear()
        check_read(layers)
    except InputError as error:
        check_refusal(error)
        assert not any("lora" in name for network in networks() for name, _ in network.named_parameters())
        result = "refused"
    try:
        export_lora(FILE, FORMS[number % 2])
    except InputError as error:
        check_refusal(error)
    assert Path(FILE).read_bytes() == content and not [name for name in os.listdir() if name.startswith(".")]
    return damage.__name__, result


def main(count=5000, first=0):
    counts, wrong = collections.Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.stdout, stdout = open(os.devnull, "w"), sys.stdout      # the lines about what is left out
        for number in range(first, first + count):
            try:
                counts[outcome(number)] += 1
            except Exception as error:
                wrong += 1
                networks.cache_clear()
                print(f"{number} ({DAMAGES[number % len(DAMAGES)].__name__}): {type(error).__name__}: "
                      f"{str(error)[:300]}", file=stdout, flush=True)
    for name in [damage.__name__ for damage in DAMAGES]:
        print(f"{name:16} read {counts[name, 'read']:5} refused {counts[name, 'refused']:5}", file=stdout)
    print(f"{count} files, {wrong} wrong", file=stdout)
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main(*map(int, sys.argv[1:])) else 0)
