"""diffusers' networks in our sizes: reference of the tests and of python -m ddpo_min.bench."""
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig

from ddpo_min.ddim import ddim_steps
from ddpo_min.lora import TARGETS
from ddpo_min.policy import Policy
from ddpo_min.unet import SIZE_FEATURES


def diffusers_unet(c, **more):
    """diffusers' UNet with the sizes of a UNetConfig."""
    if c.pooled:
        more |= dict(addition_embed_type="text_time", addition_time_embed_dim=SIZE_FEATURES,
                     projection_class_embeddings_input_dim=c.pooled + 6 * SIZE_FEATURES)
    return UNet2DConditionModel(
        in_channels=c.in_channels, out_channels=c.out_channels, block_out_channels=c.widths, layers_per_block=c.layers,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in c.attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in c.attention[::-1]],
        transformer_layers_per_block=[max(1, layers) for layers in c.attention], cross_attention_dim=c.context_width,
        norm_num_groups=c.groups, use_linear_projection=c.linear,
        attention_head_dim=[w // c.head_width for w in c.widths] if c.head_width else c.heads, **more)


def diffusers_vae(c):
    """diffusers' autoencoder with the sizes of a VAEConfig."""
    n = len(c.widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=c.widths, layers_per_block=c.layers, latent_channels=c.latent_channels,
        norm_num_groups=c.groups, scaling_factor=c.latent_scale)


def predict(unet, c, x, t, context):
    """What diffusers' UNet says, of the sizes of a UNetConfig; XL's context has the pooled text in its last row."""
    if not c.pooled:
        return unet(x, t, encoder_hidden_states=context).sample
    height, width = (c.pixels * side for side in x.shape[-2:])
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(x), device=x.device)
    added = dict(text_embeds=context[:, -1, :c.pooled], time_ids=sizes)
    return unet(x, t, encoder_hidden_states=context[:, :-1], added_cond_kwargs=added).sample


def diffusers_policy(model, settings):
    """(a Policy whose networks are diffusers', with our weights and PEFT's LoRA, its parameters)."""
    device, dtype = model.unet.conv_in.weight.device, model.unet.conv_in.weight.dtype
    unet, vae = diffusers_unet(model.unet.config), diffusers_vae(model.vae.config)
    base = {name: tensor for name, tensor in model.unet.state_dict().items() if ".lora_" not in name}
    for network, state in ((unet, base), (vae, model.vae.state_dict())):
        network.load_state_dict(state)
        network.requires_grad_(False)
        for p in network.parameters():      # .to() would warn about modules kept in float32; there are none
            p.data = p.data.to(device, dtype if network is unet else model.vae.post_quant_conv.weight.dtype)
    unet.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.rank, init_lora_weights="gaussian",
                                target_modules=list(TARGETS)))
    if settings.checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    scale = model.vae.config.latent_scale
    decoder = SimpleNamespace(config=model.vae.config, post_quant_conv=vae.post_quant_conv, parameters=vae.parameters,
                              decode=lambda latent: vae.decode(latent / scale).sample)
    policy = Policy(replace(model, vae=decoder), ddim_steps(settings.steps), settings.guidance)
    policy.predict = partial(predict, unet, model.unet.config)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    return policy, parameters
