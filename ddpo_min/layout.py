"""Two sets of names for the same tensors: Stable Diffusion's original single file and diffusers' folders.

The networks here have the diffusers names. The original file counts all blocks (input_blocks.0, 1, 2, ...), diffusers
nests them (down_blocks.0.resnets.0, ...); each function below builds {original prefix: diffusers prefix}.
"""

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
OPENCLIP = "cond_stage_model.model."        # the text encoder of Stable Diffusion 2.x
TEXT_XL, OPENCLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."     # XL's two

RESBLOCK = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
            "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}


def unet_prefixes(attention, layers):
    """Original -> diffusers prefixes of a UNet.

    attention: for each level, how many layers its transformers have; layers: residual blocks of a down level.
    """
    pairs = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
             "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
             "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}

    def resblock(original, ours):
        pairs.update({f"{original}.{a}": f"{ours}.{b}" for a, b in RESBLOCK.items()})

    levels, n = len(attention), 1
    for i in range(levels):
        for j in range(layers):
            resblock(f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}")
            pairs[f"input_blocks.{n}.1"] = f"down_blocks.{i}.attentions.{j}"
            n += 1
        if i < levels - 1:
            pairs[f"input_blocks.{n}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
            n += 1
    resblock("middle_block.0", "mid_block.resnets.0")
    pairs["middle_block.1"] = "mid_block.attentions.0"
    resblock("middle_block.2", "mid_block.resnets.1")
    n = 0
    for i, has_attention in enumerate(attention[::-1]):
        for j in range(layers + 1):
            resblock(f"output_blocks.{n}.0", f"up_blocks.{i}.resnets.{j}")
            if has_attention:
                pairs[f"output_blocks.{n}.1"] = f"up_blocks.{i}.attentions.{j}"
            n += 1
        if i < levels - 1:
            pairs[f"output_blocks.{n - 1}.{1 + bool(has_attention)}.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
    return pairs


def vae_prefixes(levels, layers):
    """Original -> diffusers prefixes of an autoencoder; layers: residual blocks of an encoder level."""
    pairs = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        pairs.update({f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out",
                      f"{side}.norm_out": f"{side}.conv_norm_out"})
        mid = f"{side}.mid_block"
        pairs.update({f"{side}.mid.block_1": f"{mid}.resnets.0", f"{side}.mid.block_2": f"{mid}.resnets.1"})
        for a, b in (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            pairs[f"{side}.mid.attn_1.{a}"] = f"{mid}.attentions.0.{b}"
    for i in range(levels):
        for j in range(layers):
            pairs[f"encoder.down.{i}.block.{j}"] = f"encoder.down_blocks.{i}.resnets.{j}"
        pairs[f"encoder.down.{i}.downsample.conv"] = f"encoder.down_blocks.{i}.downsamplers.0.conv"
        up = levels - 1 - i         # the original counts the decoder's levels from the image on
        for j in range(layers + 1):
            pairs[f"decoder.up.{up}.block.{j}"] = f"decoder.up_blocks.{i}.resnets.{j}"
        pairs[f"decoder.up.{up}.upsample.conv"] = f"decoder.up_blocks.{i}.upsamplers.0.conv"
    # residual blocks that have a nin_shortcut
    pairs.update({f"{a}.nin_shortcut": f"{b}.conv_shortcut" for a, b in list(pairs.items()) if ".resnets." in b})
    return pairs


def openclip_prefixes(layers):
    """OpenCLIP -> transformers prefixes of a text encoder; OpenCLIP's in_proj_weight and _bias hold q, k and v."""
    pairs = {"token_embedding": "text_model.embeddings.token_embedding", "ln_final": "text_model.final_layer_norm",
             "text_projection": "text_projection.weight",       # its transpose
             "positional_embedding": "text_model.embeddings.position_embedding.weight"}
    for i in range(layers):
        for a, b in (("ln_1", "layer_norm1"), ("attn", "self_attn"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                     ("mlp.c_proj", "mlp.fc2")):
            pairs[f"transformer.resblocks.{i}.{a}"] = f"text_model.encoder.layers.{i}.{b}"
    return pairs


def rename(name, pairs):
    """Replace the longest prefix of a dotted name, or all of it, that is in `pairs`; without one, the name itself."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        head = ".".join(parts[:n])
        if head in pairs:
            return ".".join([pairs[head], *parts[n:]])
    return name
