"""What can be converted: every network, the layouts it is published in, and how to read its sizes
off a checkpoint.

A layout is a table of rules and the names that its files have in a folder. Sizes come from the
shapes of the tensors; what shapes cannot say (heads, statistics of the latents) comes from the
checkpoint's config.json, or is the published value.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from chameleon_jax.models.dit import DiTConfig
from chameleon_jax.models.reward import ClipVisionConfig
from chameleon_jax.models.taehv import TaehvConfig
from chameleon_jax.models.text import TextConfig
from chameleon_jax.models.vae import WAN22_LATENT_MEAN, WAN22_LATENT_STD, VaeConfig
from converters import dit, reward, taehv, text, vae
from converters.rules import Rule, shapes_in

Shapes = Mapping[str, tuple[int, ...]]
HEAD_DIM = 128  # of every published Wan transformer


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way in which a network is published.

    Attributes:
      rules: the table, for a config; for None a table that names everything right but may not be
        inverted.
      file: where the weights lie in a folder of this layout; .safetensors or .pth.
      about: the config.json beside them, from a config; None if there is none.
      ignore: names that carry nothing and may be there or not.
      drop: beginnings of names of other networks that share the file.
      prepare: changes the tensors before the table, for what a table cannot say.
    """

    rules: Callable[[Any], list[Rule]]
    file: str
    about: Callable[[Any], dict[str, Any]] | None = None
    ignore: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    prepare: Callable[[Mapping[str, Any], Any], Mapping[str, Any]] = lambda tensors, config: tensors


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that checkpoints hold.

    Attributes:
      name: our name: that of its file and of its group in config.json.
      title: for people.
      layouts: by name, "official" and "diffusers"; the latter stands for Hugging Face's layout of
        any network.
      sizes: config from names and shapes in our layout (those that are there) and a config.json.
      config: the dataclass of its sizes.
      expected: shape of every parameter, from a config.
      sentence: the sizes in a few words.
      stranger: what it is, if it is a well-known model that is not for this project; else None.
    """

    name: str
    title: str
    layouts: Mapping[str, Layout]
    config: type
    sizes: Callable[[Shapes, Mapping[str, Any]], Any]
    expected: Callable[[Any], dict[str, tuple[int, ...]]]
    sentence: Callable[[Any], str]
    stranger: Callable[[Any], str | None] = lambda config: None


def _count(shapes: Shapes, pattern: str) -> int:
    """1 + the largest number that stands where the pattern has its group; 0 if nothing matches."""
    return 1 + max(
        (int(m.group(1)) for name in shapes if (m := re.match(pattern, name))), default=-1
    )


def _axis(shapes: Shapes, name: str, axis: int, default: int) -> int:
    """Size of one axis of a tensor. Where it is missing the published size stands in, and the table
    will report it.
    """
    shape = shapes.get(name, ())
    return shape[axis] if -len(shape) <= axis < len(shape) else default


def _heads(width: int, head_dim: int, key: str) -> int:
    """Heads of the published head size; shapes do not tell.

    Raises:
      ValueError: the width is not made of such heads.
    """
    if width % head_dim:
        raise ValueError(
            f"width {width} is not made of heads of {head_dim} channels, and shapes do not tell the"
            " number of heads; put a"
            f" config.json with {key} beside the file"
        )
    return width // head_dim


# The transformer


def _dit_sizes(shapes: Shapes, about: Mapping[str, Any]) -> DiTConfig:
    full = DiTConfig.wan22_ti2v_5b()
    width = _axis(shapes, "patch_embedding.bias", 0, full.width)
    kernel = shapes.get("patch_embedding.kernel", ())
    heads = about.get("num_heads", about.get("num_attention_heads")) or _heads(
        width, HEAD_DIM, "num_heads"
    )
    return DiTConfig(
        in_channels=_axis(shapes, "patch_embedding.kernel", 3, full.in_channels),
        width=width,
        ffn=_axis(shapes, "blocks.0.ffn.fc1.kernel", 1, full.ffn),
        heads=heads,
        layers=_count(shapes, r"blocks\.(\d+)\.") or full.layers,
        text_width=_axis(shapes, "text_embedding.fc1.kernel", 0, full.text_width),
        text_length=about.get("text_len", full.text_length),
        patch=tuple(kernel[:3]) if len(kernel) == 5 else full.patch,
        freq_width=_axis(shapes, "time_embedding.fc1.kernel", 0, full.freq_width),
        eps=about.get("eps", full.eps),
    )


def _dit_stranger(config: DiTConfig) -> str | None:
    if config.in_channels not in (16, 36) or config.width not in (1536, 5120):
        return None
    size = {1536: "1.3B", 5120: "14B"}[config.width]
    kind = "image-to-video" if config.in_channels == 36 else "text-to-video"
    return (
        f"the {size} {kind} transformer of Wan 2.1 or 2.2 (width {config.width}, {config.layers}"
        " layers, latents of 16"
        " channels of the VAE 2.1). This project runs Wan2.2-TI2V-5B: width 3072, 30 layers, 48"
        " channels of the VAE 2.2"
    )


def _dit_official(config: DiTConfig) -> dict[str, Any]:
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "model_type": "ti2v",
        "patch_size": list(config.patch),
        "text_len": config.text_length,
        "in_dim": config.in_channels,
        "dim": config.width,
        "ffn_dim": config.ffn,
        "freq_dim": config.freq_width,
        "text_dim": config.text_width,
        "out_dim": config.in_channels,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "window_size": [-1, -1],
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": config.eps,
    }


def _dit_diffusers(config: DiTConfig) -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(config.patch),
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "text_dim": config.text_width,
        "freq_dim": config.freq_width,
        "ffn_dim": config.ffn,
        "num_layers": config.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


DIT = Network(
    "dit",
    "Wan transformer",
    {
        "official": Layout(
            lambda config: dit.OFFICIAL_RULES, "diffusion_pytorch_model.safetensors", _dit_official
        ),
        "diffusers": Layout(
            lambda config: dit.DIFFUSERS_RULES,
            "transformer/diffusion_pytorch_model.safetensors",
            _dit_diffusers,
        ),
    },
    DiTConfig,
    _dit_sizes,
    dit.expected_shapes,
    lambda c: (
        f"width {c.width}, {c.layers} layers, {c.heads} heads, {c.in_channels} latent channels"
    ),
    _dit_stranger,
)


# The VAE


def _vae_sizes(shapes: Shapes, about: Mapping[str, Any]) -> VaeConfig:
    full = VaeConfig.wan22()
    stages = _count(shapes, r"encoder\.stages\.(\d+)\.") or len(full.width_mult)
    enc_width = _axis(shapes, "encoder.conv_in.bias", 0, full.enc_width)
    dec_width = _axis(shapes, "decoder.norm_out.scale", 0, full.dec_width)
    z_dim = _axis(shapes, "post_quant.bias", 0, full.z_dim)
    widths = [
        _axis(shapes, f"encoder.stages.{i}.blocks.0.conv1.bias", 0, enc_width)
        for i in range(stages)
    ]
    temporal = (
        any(name.startswith(f"encoder.stages.{i}.down.time_conv.") for name in shapes)
        for i in range(stages - 1)
    )
    published = z_dim == full.z_dim
    return VaeConfig(
        z_dim=z_dim,
        enc_width=enc_width,
        dec_width=dec_width,
        width_mult=tuple(max(1, width // enc_width) for width in widths),
        enc_blocks=_count(shapes, r"encoder\.stages\.0\.blocks\.(\d+)\.") or full.enc_blocks,
        dec_blocks=_count(shapes, r"decoder\.stages\.0\.blocks\.(\d+)\.") or full.dec_blocks,
        temporal_down=tuple(temporal),
        latent_mean=tuple(about.get("latents_mean", WAN22_LATENT_MEAN if published else ())),
        latent_std=tuple(about.get("latents_std", WAN22_LATENT_STD if published else ())),
    )


def _vae_diffusers(config: VaeConfig) -> dict[str, Any]:
    channels = 3 * config.patch**2
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config.enc_width,
        "decoder_base_dim": config.dec_width,
        "z_dim": config.z_dim,
        "dim_mult": list(config.width_mult),
        "num_res_blocks": config.enc_blocks,
        "attn_scales": [],
        "temperal_downsample": list(config.temporal_down),
        "dropout": 0.0,
        "is_residual": True,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": config.patch,
        "scale_factor_temporal": config.temporal_factor,
        "scale_factor_spatial": config.spatial_factor,
        "latents_mean": list(config.latent_mean),
        "latents_std": list(config.latent_std),
        "clip_output": False,
    }


VAE = Network(
    "vae",
    "Wan2.2 VAE",
    {
        "official": Layout(vae.official_rules, "Wan2.2_VAE.pth"),
        "diffusers": Layout(
            vae.diffusers_rules, "vae/diffusion_pytorch_model.safetensors", _vae_diffusers
        ),
    },
    VaeConfig,
    _vae_sizes,
    vae.expected_shapes,
    lambda c: (
        f"{c.z_dim} latent channels, {c.spatial_factor}x in space, {c.temporal_factor}x in time"
    ),
)


# The text encoder


def _text_sizes(shapes: Shapes, about: Mapping[str, Any]) -> TextConfig:
    full = TextConfig.umt5_xxl()
    table = shapes.get("blocks.0.pos_embedding.embedding", (full.buckets, full.heads))
    inner = _axis(shapes, "blocks.0.attn.q.kernel", 1, full.heads * full.head_dim)
    return TextConfig(
        vocab=_axis(shapes, "token_embedding.embedding", 0, full.vocab),
        width=_axis(shapes, "token_embedding.embedding", 1, full.width),
        heads=table[1],
        head_dim=inner // table[1],
        ffn=_axis(shapes, "blocks.0.ffn.gate.kernel", 1, full.ffn),
        layers=_count(shapes, r"blocks\.(\d+)\.") or full.layers,
        buckets=table[0],
        max_distance=about.get("relative_attention_max_distance", full.max_distance),
        eps=about.get("layer_norm_epsilon", full.eps),
    )


def _text_diffusers(config: TextConfig) -> dict[str, Any]:
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": config.vocab,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.ffn,
        "num_layers": config.layers,
        "num_decoder_layers": config.layers,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": config.eps,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


TEXT = Network(
    "text",
    "UMT5 encoder",
    {
        "official": Layout(lambda config: text.OFFICIAL_RULES, "models_t5_umt5-xxl-enc-bf16.pth"),
        "diffusers": Layout(
            lambda config: text.HF_RULES,
            "text_encoder/model.safetensors",
            _text_diffusers,
            drop=text.HF_OTHER,
            prepare=lambda tensors, config: text.untied(tensors),
        ),
    },
    TextConfig,
    _text_sizes,
    text.expected_shapes,
    lambda c: f"width {c.width}, {c.layers} layers, vocabulary of {c.vocab}",
)


# The small decoder


def _taehv(name: str, title: str, full: TaehvConfig, block: str, file: str) -> Network:
    """One of the two published variants: they differ in names too, so each has its table."""

    def sizes(shapes: Shapes, about: Mapping[str, Any]) -> TaehvConfig:
        stages = range(len(full.temporal_up))
        widths = [
            _axis(shapes, f"decoder.stages.{i}.blocks.0.{block}.kernel", -1, full.dec_widths[i])
            for i in stages
        ]
        last = _axis(shapes, "decoder.conv_out.kernel", 2, full.dec_widths[-1])
        return dataclasses.replace(
            full,
            z_dim=_axis(shapes, "encoder.conv_out.bias", 0, full.z_dim),
            enc_width=_axis(shapes, "encoder.conv_in.bias", 0, full.enc_width),
            dec_widths=(*widths, last),
        )

    layout = Layout(lambda config: taehv.rules(config or full), file)
    return Network(
        name,
        title,
        {"official": layout},
        TaehvConfig,
        sizes,
        taehv.expected_shapes,
        lambda c: f"{c.z_dim} latent channels, decoder of {c.dec_widths} channels",
    )


TAEHV = _taehv(
    "taehv", "TAEHV small encoder and decoder", TaehvConfig.taew2_2(), "conv2", "taew2_2.pth"
)
TAEHV_SUPER = _taehv(
    "taehv_super",
    "TAEHV small encoder, larger decoder",
    TaehvConfig.taew2_2_super(),
    "contract",
    "taew2_2_super.pth",
)


# The reward


def _clip_sizes(shapes: Shapes, about: Mapping[str, Any]) -> ClipVisionConfig:
    full, about = ClipVisionConfig.vit_l14(), about.get("vision_config", about)
    width = _axis(shapes, "vision.class_embedding", 0, full.width)
    patch = _axis(shapes, "vision.patch_embedding.kernel", 0, full.patch)
    tokens = _axis(shapes, "vision.positions", 0, full.tokens)
    return ClipVisionConfig(
        width=width,
        ffn=_axis(shapes, "vision.blocks.0.ffn.fc1.kernel", 1, full.ffn),
        heads=about.get("num_attention_heads") or _heads(width, 64, "num_attention_heads"),
        layers=_count(shapes, r"vision\.blocks\.(\d+)\.") or full.layers,
        projection=_axis(shapes, "vision.proj.kernel", 1, full.projection),
        image=patch * round((tokens - 1) ** 0.5),
        patch=patch,
        eps=about.get("layer_norm_eps", full.eps),
    )


def _clip_diffusers(config: ClipVisionConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "image_size": config.image,
        "patch_size": config.patch,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": config.eps,
        "num_channels": 3,
        "projection_dim": config.projection,
    }


CLIP = Network(
    "clip",
    "CLIP vision tower",
    {
        "diffusers": Layout(
            lambda config: reward.HF_RULES,
            "image_encoder/model.safetensors",
            _clip_diffusers,
            ignore=tuple(reward.HF_BUFFERS),
            drop=reward.HF_TEXT_SIDE,
        )
    },
    ClipVisionConfig,
    _clip_sizes,
    lambda config: reward.part_shapes(config, "vision."),
    lambda c: f"width {c.width}, {c.layers} layers, pictures of {c.image}, patches of {c.patch}",
)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Size of the aesthetic head."""

    inputs: int  # channels of the embedding


def _head_shapes(config: HeadConfig) -> dict[str, tuple[int, ...]]:
    vision = ClipVisionConfig(
        width=1, ffn=1, heads=1, layers=1, projection=config.inputs
    )  # of no matter here
    return reward.part_shapes(vision, "head.")


AESTHETIC = Network(
    "aesthetic",
    "aesthetic head",
    {"official": Layout(lambda config: reward.AESTHETIC_RULES, "sac+logos+ava1-l14-linearMSE.pth")},
    HeadConfig,
    lambda shapes, about: HeadConfig(_axis(shapes, "head.layers.0.kernel", 0, 768)),
    _head_shapes,
    lambda c: f"embeddings of {c.inputs} channels",
)

NETWORKS = {
    network.name: network for network in (DIT, VAE, TEXT, TAEHV, TAEHV_SUPER, CLIP, AESTHETIC)
}

# Checkpoints that people may take for ours, by names that only they have.
STRANGERS = (
    (
        r"(encoder\.downsamples\.0\.residual\.0\.gamma|encoder\.down_blocks\.0\.norm1\.gamma)$",
        "the VAE of Wan 2.1 (16 latent channels, 8x in space). Wan2.2-TI2V-5B needs Wan2.2_VAE.pth:"
        " 48 channels, 16x",
    ),
    (
        r"(^|.*\.)img_emb\.proj\.0\.weight$",
        "an image-to-video transformer with a CLIP branch (Wan 2.1 I2V, 14B)",
    ),
    (r"(^|.*\.)face_adapter\..*", "Wan-Animate, 14B"),
    (
        r"(^|.*\.)(quantized_weight|weight_scale|scale_weight)(_|$).*",
        "packed in 8 or 4 bits; ask for the bfloat16 file",
    ),
    (
        r".*\.(weight_scale|scale_weight|quantized_weight\w*)$",
        "packed in 8 or 4 bits; ask for the bfloat16 file",
    ),
    (
        r"(^|.*\.)down_blocks\.\d+\.resnets\.\d+\.time_emb_proj\.weight$",
        "a U-Net of Stable Diffusion",
    ),
    (r"(^|.*\.)double_blocks\.\d+\.img_mod\..*", "a transformer of FLUX or HunyuanVideo"),
)


def our_shapes(layout: Layout, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Names and shapes in our layout of what a layout's table knows, without knowing the sizes."""
    return shapes_in(layout.rules(None), shapes)
