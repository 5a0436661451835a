"""Videos of several shots: what the chunks hear and made of, one program for all of them, and
what is refused.

That the chunks themselves are right is shown in tests/diffusion/shots_test.py.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from chameleon_jax.attention.policies import make_policy
from chameleon_jax.attention.positions import PositionError
from chameleon_jax.compilation import watched
from chameleon_jax.config import load_config
from chameleon_jax.data.images import ImageError, stretched, to_uint8
from chameleon_jax.diffusion import rollout
from chameleon_jax.inference import Pipeline, PipelineError
from chameleon_jax.inference.shots import MultiShot, MultiShotError, Shot, chunk_prompts
from chameleon_jax.keys import SeedError

ROOT = Path(__file__).parents[2]
CONFIG = f"{ROOT}/configs/longlive2_5b.py"
SHOTS = [
    Shot("she walks", 2),
    Shot("a street at night", 3),
    Shot("it rains", 1, cut=False),
    Shot("the sea", 1),
]
TOLD = [
    ("she walks", False),
    ("she walks", False),
    ("The scene transitions. a street at night", True),
    ("a street at night", False),
    ("a street at night", False),
    ("it rains", False),
    ("The scene transitions. the sea", True),
]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """Random networks: chunks of two latent frames of 32x48 pixels, four of them remembered, two
    steps.
    """
    return Pipeline.random(load_config(f"{CONFIG}:smoke"), seed=3)


@pytest.fixture(scope="module")
def streams(pipeline) -> MultiShot:
    return MultiShot(pipeline)


@pytest.fixture(scope="module")
def by_hand(pipeline):
    """The functions below a stream: a chunk, the VAE of a whole clip."""
    vae, dit, sampler = pipeline.vae, pipeline.dit, rollout.make_sampler("unipc", steps=2)

    def chunk(cache, states, seed, number, cut, held):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), number)
        return rollout.denoise_chunk(
            dit, cache, dit.text_kv(states), key, sampler=sampler, cut=cut, held=held
        )

    return {"chunk": jax.jit(chunk), "encode": jax.jit(vae.encode), "decode": jax.jit(vae.decode)}


def picture(seed=0, size=(50, 40)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def test_a_cut_is_told_in_the_first_chunk_of_a_later_shot():
    assert list(chunk_prompts(SHOTS)) == TOLD
    assert list(chunk_prompts([Shot("a", 1, cut=False), Shot("a", 1)])) == [
        ("a", False),
        ("The scene transitions. a", True),
    ]


@pytest.mark.parametrize("image", [None, picture()], ids=["prompts alone", "first frame"])
def test_a_video_is_made_of_its_chunks(pipeline, streams, by_hand, image):
    """Chunk by chunk with the functions below, then decoded whole: the same but for rounding."""
    cache = rollout.new_cache(pipeline.dit, make_policy(**pipeline.config.cache), 1, (4, 6))
    z, latents = np.zeros((1, 2, 4, 6, 4), np.float32), []
    if image is not None:
        z[:, :1] = by_hand["encode"](
            stretched(image, (32, 48))[None, None].astype(np.float32) / 127.5 - 1
        )
    for number, (prompt, cut) in enumerate(TOLD):
        held = rollout.Held(z, np.array([image is not None and number == 0, False]))
        x0, cache = by_hand["chunk"](cache, pipeline.encode_prompt(prompt), 11, number, cut, held)
        latents.append(x0)
    expected = to_uint8(np.asarray(by_hand["decode"](jnp.concatenate(latents, axis=1))))[0].astype(
        int
    )

    chunks = list(streams.stream(SHOTS, image=image, seed=11))
    assert [len(chunk) for chunk in chunks] == [5, 8, 8, 8, 8, 8, 8]
    assert all(chunk.dtype == np.uint8 and chunk.shape[1:] == (32, 48, 3) for chunk in chunks)
    got = np.concatenate(chunks)
    assert got.std() > 3 and np.abs(np.diff(got.astype(int), axis=0)).mean() > 0.5
    assert np.abs(got - expected).max() <= 1
    if image is not None:
        np.testing.assert_array_equal(latents[0][:, 0], z[:, 0])


def test_what_a_video_depends_on(streams):
    def video(*shots, **kw):
        return np.concatenate(list(streams.stream(shots or SHOTS[:2], **kw))).astype(int)

    same = video(seed=1)
    np.testing.assert_array_equal(same, video(seed=1))
    for other in (
        video(),
        video(image=picture(), seed=1),
        video(SHOTS[0], Shot("a lake", 3), seed=1),
    ):
        assert other.shape == same.shape and np.abs(other - same).max() > 2
    uncut = video(SHOTS[0], Shot(SHOTS[1].prompt, 3, cut=False), seed=1)
    np.testing.assert_array_equal(uncut[:13], same[:13])  # all that comes before the cut
    assert np.abs(uncut[13:] - same[13:]).max() > 2


def test_streams_side_by_side_do_not_mix(streams):
    alone = [list(streams.stream(SHOTS[:2], seed=seed)) for seed in (1, 2)]
    together = list(zip(*(streams.stream(SHOTS[:2], seed=seed) for seed in (1, 2)), strict=True))
    for one, video in enumerate(alone):
        for chunk, expected in zip(together, video, strict=True):
            np.testing.assert_array_equal(chunk[one], expected)


def test_a_prompt_is_encoded_once_and_few_are_kept(pipeline, monkeypatch):
    streams, encoded = MultiShot(pipeline), []
    encode = pipeline.media.text_kv
    monkeypatch.setattr(
        pipeline.media, "text_kv", lambda states: encoded.append(states) or encode(states)
    )
    for _ in range(2):
        list(streams.stream([Shot("a", 3), Shot("b", 3)]))
    assert len(encoded) == 3  # a, b behind the words that mark the cut, b
    list(streams.stream([Shot(prompt, 1, cut=False) for prompt in "cdefg"]))
    assert len(encoded) == 8
    list(streams.stream([Shot("a", 1)]))
    assert len(encoded) == 9


def test_nothing_is_compiled_later_and_memory_does_not_grow(pipeline, streams):
    list(streams.stream([Shot("a", 2)], image=picture()))
    seen = []
    with watched() as compiled:
        for image in (None, picture()):
            for _ in streams.stream([Shot("a", 5), Shot("b", 6), Shot("a", 5)], image=image):
                seen.append(sum(x.nbytes for x in jax.live_arrays()))
    assert compiled.seconds == []
    assert max(seen[7:16]) == min(seen[7:16]) == max(seen[23:]) == min(seen[23:])
    assert not {"refresh", "chunk"} & pipeline.arguments().keys()


def test_programs_compiled_ahead_make_the_same_video(pipeline):
    other = Pipeline.random(load_config(f"{CONFIG}:smoke"), seed=3)
    assert other.compile().keys() == pipeline.arguments().keys()
    first, second = (
        list(MultiShot(p).stream(SHOTS[:2], image=picture())) for p in (pipeline, other)
    )
    for chunk, expected in zip(first, second, strict=True):
        np.testing.assert_array_equal(chunk, expected)


def test_the_first_frame_is_the_whole_picture_stretched():
    image = picture(1, (90, 70))
    x = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    expected = (
        torch.nn.functional.interpolate(x, (32, 48), mode="bilinear", antialias=True)[0]
        .permute(1, 2, 0)
        .numpy()
    )
    np.testing.assert_allclose(stretched(image, (32, 48)), expected, atol=1.01)
    np.testing.assert_array_equal(stretched(image, (90, 70)), image)


@pytest.mark.parametrize(
    ("shots", "kw", "error", "message"),
    [
        ([], {}, MultiShotError, "no shots; expected at least one"),
        ([Shot("a", 0)], {}, MultiShotError, "shot 0: 0 chunks; expected at least 1"),
        (
            [Shot("a", 1), Shot(np.zeros(3), 1)],
            {},
            MultiShotError,
            "shot 1: the prompt is ndarray; expected a string",
        ),
        (
            [Shot("The scene transitions. a", 1)],
            {},
            MultiShotError,
            "put in front of a cut for you; leave it out",
        ),
        ([Shot("a", 1)], {"seed": -1}, SeedError, "seed -1: expected 0 to 4294967295"),
        (
            [Shot("a", 513)],
            {},
            PositionError,
            "chunk 512 of the video, in shot 0, is beyond the 512 ",
        ),
        (
            [Shot("a", 500), *[Shot("b", 1)] * 7],
            {},
            PositionError,
            "chunk 506 of the video, in shot 7, is beyond the 505 ",
        ),
        ([Shot("a", 1)], {"image": "nowhere.png"}, ImageError, "no such file"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_made(streams, shots, kw, error, message):
    with pytest.raises(error, match=message):
        streams.stream(shots, **kw)


def test_longest_videos_are_accepted(streams):
    streams.stream([Shot("a", 512)])
    streams.stream(
        [Shot("a", 500), Shot("b", 1), Shot("c", 10, cut=False)]
    )  # one cut moves on by one chunk


def test_pipelines_are_for_one_kind_of_stream(pipeline):
    with pytest.raises(
        MultiShotError, match="cache.context is 2: that stream starts from condition frames"
    ):
        MultiShot(Pipeline.random(load_config(f"{ROOT}/configs/runway_tiny.py:smoke"), text=False))
    with pytest.raises(
        PipelineError, match=r"no person and no garment to start from; use shots\.MultiShot"
    ):
        pipeline.session()
    with pytest.raises(
        ValueError,
        match="no program 'refresh'; it has new_cache, shot_chunk",
    ):
        pipeline.stream.refresh(None, None, None, None)


def test_the_published_setting():
    config = load_config(CONFIG)
    cache = make_policy(**config.cache)
    assert (cache.chunks, cache.sink_chunks, cache.context, cache.pin, cache.shot_offset) == (
        4,
        1,
        0,
        True,
        8,
    )
    video, factor = config.video, 4
    assert (video.height, video.width, video.fps) == (704, 1280, 24)
    assert (video.frames - 1) // factor + 1 == 128 == 16 * cache.block
    assert config.model == load_config(f"{ROOT}/configs/wan22_5b.py").model


@pytest.mark.slow
def test_full_size_is_described_without_weights():
    """704x1280, 5B: 32 frames of 880 tokens, K and V of 30 layers in bfloat16 are 10.4 GB."""
    pipeline = Pipeline.abstract(load_config(CONFIG))
    arguments = pipeline.arguments()
    cache, _, _, _, cut, image, held = arguments["shot_chunk"]
    assert (
        sum(leaf.size * leaf.dtype.itemsize for leaf in (*cache.k, *cache.v))
        == 2 * 30 * 32 * 880 * 3072 * 2
    )
    assert (cut.shape, image.shape, held.shape) == ((), (1, 1, 44, 80, 48), ())
    assert arguments["decode_first"][0].shape == (1, 8, 44, 80, 48)
    assert (
        "while" in pipeline.lower("shot_chunk").as_text()
    )  # the steps and the clean pass are one loop
