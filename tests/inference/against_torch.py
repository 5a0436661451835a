"""The streaming pass and the decoder against PyTorch, on the same cores with the same weights.

    python -m tests.inference.against_torch --rounds 15 --out out/against_torch.json

What is compared, of the embedded model:

    pass    the transformer over the three frames of a chunk against a full cache of eight
    chunk   four denoising steps and the clean pass of such a chunk, as a stream makes it
    decode  three latent frames of a stream to twelve frames of pixels

In JAX the programs of a session. In PyTorch the modules of diffusers, with a plain loop around
them that keeps keys and values of every layer in buffers, and those of the text, as a stream does:
eagerly, and through `torch.compile`. The decoder of diffusers is given one latent frame at a time,
as its own `decode` does, and three at once. All of them run in turn, in rounds, each of which
begins with another one, and must give the same numbers before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanDecoder3d
from einops import rearrange
from flax import nnx
from safetensors.torch import load_file

from chameleon_jax import files, machine
from chameleon_jax.diffusion import rollout
from chameleon_jax.inference.pipeline import DEFAULT_FOLDER, Pipeline
from chameleon_jax.models.vae import VaeConfig
from launch.bench_figures import Figure, milliseconds, table
from launch.bench_stream import in_turn, timed
from tests.commands import run_converter

CALLS = {"pass": 5, "chunk": 1, "decode": 3}  # of a case in a round
TOLERANCE = 2e-3  # of the largest difference; values are of unit scale


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels, [b, l, n, d] by [l, d / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class TorchStream(torch.nn.Module):
    """The transformer of diffusers over a chunk, against keys and values in buffers.

    Positions are relative and keys are cached unrotated, as in the embedded model. The buffers are
    full, so the chunk takes the slots of the oldest frames.
    """

    def __init__(self, model: WanTransformer3DModel, grid: tuple[int, int], context: int):
        super().__init__()
        self.model, self.grid, self.context = model, grid, context

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for the tokens of frames at these positions, [l, d / 2]."""
        rope, (h, w) = self.model.rope, self.grid
        parts = []
        for table_ in (rope.freqs_cos, rope.freqs_sin):
            of_t, of_h, of_w = table_.split([rope.t_dim, rope.h_dim, rope.w_dim], dim=1)
            f = len(positions)
            whole = torch.cat(
                [
                    of_t[positions][:, None, None].expand(f, h, w, -1),
                    of_h[:h][None, :, None].expand(f, h, w, -1),
                    of_w[:w][None, None].expand(f, h, w, -1),
                ],
                dim=-1,
            )
            parts.append(whole.reshape(f * h * w, -1)[:, 0::2].float())
        return parts[0], parts[1]

    def text_kv(self, states: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the text for every layer, [b, n, s, d]."""
        states = self.model.condition_embedder.text_embedder(states)
        found = []
        for block in self.model.blocks:
            attn = block.attn2
            k, v = attn.norm_k(attn.to_k(states)), attn.to_v(states)
            found.append(
                tuple(
                    rearrange(x, "b s (n d) -> b n s d", n=attn.heads).contiguous() for x in (k, v)
                )
            )
        return found

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        text_kv: list[tuple[torch.Tensor, torch.Tensor]],
        cache: list[tuple[torch.Tensor, torch.Tensor]],
        slots: slice,
        query_turn: tuple[torch.Tensor, torch.Tensor],
        key_turn: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Velocity of the chunk x [b, f, h, w, c]; writes its keys and values to the buffers.

        Args:
          t: timestep of each frame, [b, f].
          text_kv: from `text_kv`.
          cache: keys and values [b, s, n, d] of each layer.
          slots: tokens of the buffers that the chunk takes.
          query_turn, key_turn: from `angles`.
        """
        model, (b, f) = self.model, t.shape
        embedder = model.condition_embedder
        y = model.patch_embedding(rearrange(x, "b f h w c -> b c f h w"))
        y = rearrange(y, "b m f h w -> b (f h w) m").contiguous()
        temb = embedder.time_embedder(embedder.timesteps_proj(t.flatten())).unflatten(0, (b, f))
        rows = embedder.time_proj(embedder.act_fn(temb)).unflatten(-1, (6, -1))

        def by_token(row: torch.Tensor) -> torch.Tensor:
            """One row for all tokens of a frame: a view."""
            return row[:, :, None]

        def by_frame(z: torch.Tensor) -> torch.Tensor:
            return z.unflatten(1, (f, -1))

        for block, (k_text, v_text), (keys, values) in zip(
            model.blocks, text_kv, cache, strict=True
        ):
            shift1, scale1, gate1, shift2, scale2, gate2 = (
                by_token(row) for row in (block.scale_shift_table[:, None] + rows).unbind(2)
            )
            z = (by_frame(block.norm1(y)) * (1 + scale1) + shift1).flatten(1, 2)
            attn = block.attn1
            q, k, v = attn.norm_q(attn.to_q(z)), attn.norm_k(attn.to_k(z)), attn.to_v(z)
            q, k, v = (w.unflatten(-1, (attn.heads, -1)) for w in (q, k, v))
            keys[:, slots], values[:, slots] = k, v
            z = torch.nn.functional.scaled_dot_product_attention(
                *(w.transpose(1, 2) for w in (turn(q, *query_turn), turn(keys, *key_turn), values))
            )
            z = attn.to_out[0](z.transpose(1, 2).flatten(2))
            y = (by_frame(y) + by_frame(z) * gate1).flatten(1, 2)
            attn = block.attn2
            q = attn.norm_q(attn.to_q(block.norm2(y))).unflatten(-1, (attn.heads, -1))
            z = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k_text, v_text)
            y = y + attn.to_out[0](z.transpose(1, 2).flatten(2))
            z = block.ffn((by_frame(block.norm3(y)) * (1 + scale2) + shift2).flatten(1, 2))
            y = (by_frame(y) + by_frame(z) * gate2).flatten(1, 2)
        shift, scale = (
            by_token(row) for row in (model.scale_shift_table[:, None] + temb[:, :, None]).unbind(2)
        )
        y = (by_frame(model.norm_out(y)) * (1 + scale) + shift).flatten(1, 2)
        h, w = self.grid
        return rearrange(model.proj_out(y), "b (f h w) c -> b f h w c", f=f, h=h, w=w)


class TorchVae(torch.nn.Module):
    """The decoding half of the VAE of diffusers, which cannot build the embedded encoder.

    Its last stage widens the channels without a change of the grid, for which diffusers has no
    shortcut.
    """

    def __init__(self, sizes: VaeConfig):
        super().__init__()
        self.post_quant_conv = WanCausalConv3d(sizes.z_dim, sizes.z_dim, 1)
        self.decoder = WanDecoder3d(
            dim=sizes.dec_width,
            z_dim=sizes.z_dim,
            dim_mult=list(sizes.width_mult),
            num_res_blocks=sizes.dec_blocks - 1,
            attn_scales=[],
            temperal_upsample=list(sizes.temporal_down[::-1]),
            out_channels=3 * sizes.patch**2,
            is_residual=True,
        )
        for name in ("latent_mean", "latent_std"):
            self.register_buffer(
                name, torch.tensor(getattr(sizes, name)).view(1, -1, 1, 1, 1), persistent=False
            )


class TorchDecoder:
    """The decoder of diffusers over the latent frames of a stream.

    Args:
      vae: weights.
      decoder: its decoder, perhaps compiled.
      step: latent frames that it is given at once.
    """

    def __init__(self, vae: TorchVae, decoder: Callable, step: int):
        self.vae, self.decoder, self.step = vae, decoder, step
        convolutions = [x for x in vae.decoder.modules() if isinstance(x, WanCausalConv3d)]
        self.past: list[Any] = [None] * len(convolutions)

    def __call__(self, z: torch.Tensor, first: bool = False) -> torch.Tensor:
        """Scaled latents [b, f, h, w, c] to pixels [b, t, h, w, 3]."""
        vae = self.vae
        z = rearrange(z, "b f h w c -> b c f h w") * vae.latent_std + vae.latent_mean
        z = vae.post_quant_conv(z)
        made = []
        # At the start of a stream frames have no past to be computed with others.
        for number, piece in enumerate(z.split(1 if first else self.step, dim=2)):
            more = {"first_chunk": True} if first and not number else {}
            made.append(self.decoder(piece, feat_cache=self.past, feat_idx=[0], **more))
        x = torch.cat(made, dim=2).clamp(-1, 1)
        return rearrange(x, "b (c q p) f h w -> b f (h p) (w q) c", p=2, q=2)


def load_torch(sizes: VaeConfig) -> tuple[WanTransformer3DModel, TorchVae]:
    """The embedded weights in the modules of diffusers."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "theirs"
        run_converter(DEFAULT_FOLDER, "--to", "diffusers", "--out", out)
        transformer = WanTransformer3DModel.from_pretrained(out / "transformer")
        tensors = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    vae = TorchVae(sizes)
    vae.load_state_dict({name: tensors[name] for name in vae.state_dict()})
    return transformer.eval().requires_grad_(False), vae.eval().requires_grad_(False)


def to_torch(x: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(x))


def say(text: str) -> None:
    """What is done now; compiling takes minutes."""
    print(text, file=sys.stderr, flush=True)


def assert_close(name: str, got: Any, expected: Any) -> float:
    """The largest difference.

    Raises:
      SystemExit: it is too large.
    """
    worst = float(np.abs(np.asarray(got) - np.asarray(expected)).max())
    if not worst < TOLERANCE:
        sys.exit(f"{name}: differs by {worst:.2e} from JAX; expected less than {TOLERANCE}")
    return worst


def transformer_cases(
    pipeline: Pipeline, transformer: WanTransformer3DModel
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """A pass and a chunk in all ways, and how far they are from JAX."""
    stream, config = pipeline.stream, pipeline.config
    policy, block = stream.policy, stream.policy.block
    rng = np.random.default_rng(0)
    states = pipeline.encode_prompt("a person walks in a red coat")
    text_kv = pipeline.stream_text(states)
    pictures = rng.integers(0, 256, (2, *pipeline.size, 3), np.uint8)
    context = [pipeline.media.encode_image(picture) for picture in pictures]
    cache = stream.refresh(stream.new_cache(), *context, text_kv)
    for number in range(-(-policy.frames // block)):
        _, cache = stream.chunk(cache, text_kv, 0, number)
    grid, tokens = cache.grid, cache.tokens
    x = rng.standard_normal((1, block, *grid, config.model.dit.in_channels), np.float32)
    t = np.full((1, block), 625.0, np.float32)

    graph = stream.graphs["dit"]
    one = jax.jit(
        lambda weights, cache, x, t, kv: rollout.forward(
            nnx.merge(graph, weights), cache, x, t, kv
        ),
        donate_argnums=1,
    )
    weights = stream.weights["dit"]
    held = {"cache": jax.tree.map(jnp.copy, cache)}
    velocity, held["cache"] = one(weights, held["cache"], x, t, text_kv)

    theirs = TorchStream(transformer, grid, policy.context)
    slots = np.asarray(policy.slots(cache.state))
    if not (np.diff(slots) == 1).all():
        sys.exit(f"slots of a chunk are {slots}; expected neighbours")
    args = (
        [tuple(to_torch(part).transpose(1, 2).contiguous() for part in kv) for kv in text_kv],
        [tuple(to_torch(part) for part in layer) for layer in cache.layers],
        slice(int(slots[0]) * tokens, (int(slots[-1]) + 1) * tokens),
        theirs.angles(to_torch(policy.query_positions(cache.state)).long()),
        theirs.angles(to_torch(policy.key_positions(cache.state)).long()),
    )
    compiled = torch.compile(theirs, dynamic=False)
    x_torch, t_torch = torch.tensor(x), torch.tensor(t)
    differences = {}
    for name, way in (("eager", theirs), ("compiled", compiled)):
        say(f"pass, {name}")
        got = way(x_torch, t_torch, *args)
        differences[f"pass, {name}"] = assert_close(f"pass, {name}", got, velocity)

    sampler = rollout.make_sampler(**config.sampler)
    sigmas = (*sampler.sigmas, 0.0)

    def their_chunk(way: Callable, noise: torch.Tensor) -> torch.Tensor:
        """Euler's steps, and the clean pass, whose velocity nobody needs."""
        y = noise
        for sigma, after in itertools.pairwise(sigmas):
            v = way(y, torch.full_like(t_torch, 1000 * sigma), *args)
            y = y + (after - sigma) * v
        return y

    noise = rng.standard_normal((1, *x.shape), np.float32)
    given = jax.jit(
        lambda weights, cache, kv, noise: rollout.denoise_chunk(
            nnx.merge(graph, weights), cache, kv, sampler=sampler, noise=noise
        )[0]
    )
    expected = given(weights, cache, text_kv, noise)
    for name, way in (("eager", theirs), ("compiled", compiled)):
        differences[f"chunk, {name}"] = assert_close(
            f"chunk, {name}", their_chunk(way, torch.tensor(noise[0])), expected
        )

    def our_pass() -> None:
        v, held["cache"] = one(weights, held["cache"], x, t, text_kv)
        jax.block_until_ready((v, held["cache"]))

    running = {"cache": jax.tree.map(jnp.copy, cache)}

    def our_chunk() -> None:
        latents, running["cache"] = stream.chunk(running["cache"], text_kv, 0, 7)
        jax.block_until_ready((latents, running["cache"]))

    return {
        "pass, JAX": our_pass,
        "pass, eager": lambda: theirs(x_torch, t_torch, *args),
        "pass, compiled": lambda: compiled(x_torch, t_torch, *args),
        "chunk, JAX": our_chunk,
        "chunk, eager": lambda: their_chunk(theirs, torch.tensor(noise[0])),
        "chunk, compiled": lambda: their_chunk(compiled, torch.tensor(noise[0])),
    }, differences


def decoder_cases(
    pipeline: Pipeline, vae: TorchVae
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Decoding in all ways, and how far they are from JAX."""
    block, (h, w) = pipeline.stream.policy.block, pipeline.stream.grid
    rng = np.random.default_rng(1)
    shape = (1, block, h, w, pipeline.vae.config.z_dim)
    latents = [rng.standard_normal(shape, np.float32) for _ in range(3)]
    graph, weights = pipeline.media.graphs["vae"], pipeline.media.weights["vae"]
    step = {
        first: jax.jit(
            lambda weights, z, state, first=first: nnx.merge(graph, weights).decode_chunk(
                z, state, first
            )
        )
        for first in (True, False)
    }
    expected, state = [], None
    for number, z in enumerate(latents):
        pixels, state = step[not number](weights, z, state)
        expected.append(pixels)
    eager = {
        "eager": TorchDecoder(vae, vae.decoder, 1),
        "eager, three at once": TorchDecoder(vae, vae.decoder, block),
    }
    differences, ways = {}, dict(eager)
    for name, way in eager.items():
        for number, (z, pixels) in enumerate(zip(latents[:2], expected[:2], strict=True)):
            got = way(torch.tensor(z), first=not number)
            differences[f"decode, {name}"] = assert_close(f"decode, {name}", got, pixels)
        # What is compiled goes on from here: the start of a stream would be compiled apart.
        also = TorchDecoder(vae, torch.compile(vae.decoder, dynamic=False), way.step)
        also.past = list(way.past)
        ways[name.replace("eager", "compiled")] = also
    for name, way in ways.items():
        say(f"decode, {name}")
        got = way(torch.tensor(latents[2]))
        differences[f"decode, {name}"] = assert_close(f"decode, {name}", got, expected[2])
    cases = {
        f"decode, {name}": functools.partial(way, torch.tensor(latents[2]))
        for name, way in ways.items()
    }
    media = pipeline.media
    state = media.decode(jnp.asarray(latents[0]), None)[1]
    running = {"state": media.decode(jnp.asarray(latents[1]), state)[1]}

    def ours() -> None:
        shown, running["state"] = media.decode(latents[-1], running["state"])
        jax.block_until_ready((shown, running["state"]))

    return {"decode, JAX": ours} | cases, differences


def ratios(figures: dict[str, Figure]) -> dict[str, dict[str, float]]:
    """How many times faster JAX is than the fastest of the other ways.

    Returns:
      By what is compared, by `median` and by `min`, the quietest call of each.
    """
    found: dict[str, dict[str, float]] = {}
    for kind in CALLS:
        rows = {name: figure.summary() for name, figure in figures.items()}
        ours = rows.pop(f"{kind}, JAX")
        others = [row for name, row in rows.items() if name.startswith(f"{kind}, ")]
        found[kind] = {by: min(row[by] for row in others) / ours[by] for by in ("median", "min")}
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("out/against_torch.json"))
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    before = machine.load()
    pipeline = Pipeline.from_pretrained()
    pipeline.compile()
    transformer, vae = load_torch(pipeline.vae.config)
    cases, differences = transformer_cases(pipeline, transformer)
    of_decoder, more = decoder_cases(pipeline, vae)
    cases, differences = cases | of_decoder, differences | more
    in_rounds = {
        name: functools.partial(timed, case, CALLS[name.split(",")[0]])
        for name, case in cases.items()
    }
    in_turn(in_rounds, 1, lambda: None)
    say("timing")
    seconds = in_turn(in_rounds, options.rounds, lambda: None)
    figures = {name: milliseconds(name, values) for name, values in seconds.items()}
    faster = ratios(figures)
    print(table(figures))
    for kind, ratio in faster.items():
        print(
            f"{kind}: JAX is {ratio['median']:.2f} times as fast as the best of the others by"
            f" medians, {ratio['min']:.2f} by the fastest calls"
        )
    print(f"largest differences from JAX: {max(differences.values()):.1e}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(
        options.out,
        {
            "figures": {name: figure.summary() for name, figure in figures.items()},
            "times_faster_than_best": faster,
            "differences": differences,
            "hardware": machine.hardware(),
            "versions": machine.versions() | {"torch": torch.__version__},
            "commit": machine.commit(),
            "settings": machine.settings(),
            "load": {"before": before, "after": machine.load()},
        },
    )
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
