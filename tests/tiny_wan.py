"""A tiny Wan2.2 of diffusers with random weights: the reference for converters and pipelines."""

from __future__ import annotations

from typing import TypeVar

import tokenizers
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from chameleon_jax.data.tokenizer import byte_tokenizer
from chameleon_jax.models.text import TextConfig
from chameleon_jax.models.vae import VaeConfig
from tests import tiny_dit

DIT = tiny_dit.CONFIG
VAE = VaeConfig(
    z_dim=4,
    enc_width=8,
    dec_width=8,
    width_mult=(1, 2, 2),
    enc_blocks=1,
    dec_blocks=2,
    temporal_down=(True, True),
    latent_mean=(0.3, -0.2, 0.1, 0.0),
    latent_std=(0.5, 1.5, 0.8, 1.1),
)
TEXT = TextConfig(
    vocab=258,
    width=16,
    heads=2,
    head_dim=8,
    ffn=32,
    layers=1,
    length=DIT.text_length,  # as many rows as the transformer reads
)
Kind = TypeVar("Kind", bound=DiffusionPipeline)


def transformer() -> WanTransformer3DModel:
    """The network of diffusers in the shape of `tiny_dit.CONFIG`."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=20,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


def components(seed: int = 0) -> dict[str, object]:
    """Networks, tokenizer and scheduler by the names that the pipelines of diffusers give them."""
    torch.manual_seed(seed)
    networks = {
        "transformer": transformer(),
        "vae": AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            is_residual=True,
            patch_size=2,
            in_channels=12,
            out_channels=12,
            latents_mean=list(VAE.latent_mean),
            latents_std=list(VAE.latent_std),
            scale_factor_spatial=8,
        ),
        "text_encoder": UMT5EncoderModel(
            UMT5Config(
                vocab_size=258,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        ),
    }
    for network in networks.values():
        _randomise(network.eval())
    pieces = byte_tokenizer(TEXT.length).pieces
    pieces.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    networks["tokenizer"] = PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>"
    )
    networks["scheduler"] = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    return networks


@torch.no_grad()
def _randomise(network: torch.nn.Module) -> None:
    """Random weights, none 0 or 1, with outputs of about unit scale."""
    for name, x in network.named_parameters():
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            x.copy_(1 + 0.2 * torch.randn_like(x))
        elif x.ndim > 1 and "table" not in name and "shared" not in name:
            x.copy_(torch.randn_like(x) * x[0].numel() ** -0.5)
        else:
            x.copy_(0.3 * torch.randn_like(x))


def pipeline(kind: type[Kind] = WanPipeline, seed: int = 0) -> Kind:
    """A pipeline of diffusers in its Wan2.2-5B form."""
    made = kind(**components(seed), expand_timesteps=True)
    made.set_progress_bar_config(disable=True)
    return made
