"""Operations of a stream: against figures computed by hand, against the programs themselves, and
against what XLA counts.
"""

from __future__ import annotations

import pytest

from chameleon_jax.inference.flops import StreamFlops, dit_forward, taehv_decode, vae_decode
from chameleon_jax.inference.pipeline import Pipeline
from chameleon_jax.models.taehv import TaehvConfig
from chameleon_jax.training import flops as traced
from configs import longlive2_5b, runway_tiny, wan22_5b

SMALL_DECODER = {
    "network": "taehv",
    "z_dim": 4,
    "enc_width": 4,
    "dec_widths": (8, 4, 8),
    "temporal_down": (True, True),
    "temporal_up": (True, True),
}


@pytest.fixture(scope="module")
def paper() -> StreamFlops:
    """1280x704: 880 tokens in a latent frame."""
    return StreamFlops.of(wan22_5b.get_config())


def test_a_forward_of_the_5b_network_by_hand(paper):
    """30 layers of width 3072: six square products and two of 14336 for each of 2,640 tokens."""
    steady = paper.forward()
    assert paper.tokens == 880 and paper.held(None) == 23
    assert steady.linear == 30 * 2640 * 2 * (6 * 3072**2 + 2 * 3072 * 14336)
    assert steady.self_attention == 30 * 4 * 2640 * 20240 * 3072
    assert steady.cross_attention == 30 * 4 * 2640 * 512 * 3072
    assert steady.ends < 2e-4 * steady.total
    assert round(steady.total / 1e12, 2) == 43.12
    growing = [paper.forward(number).total / 1e12 for number in range(8)]
    by_hand = [27.71, 30.28, 32.85, 35.42, 37.98, 40.55, 43.12, 43.12]
    assert growing == pytest.approx(by_hand, abs=0.0075)


def test_a_chunk_and_a_clip_of_the_5b_network(paper):
    assert round(paper.chunk() / 1e12, 1) == 215.6
    assert round(paper.refresh() / 1e12, 2) == 16.76
    assert round(paper.video(81) / 1e12, 1) == 1256.3
    assert paper.video(81) == paper.refresh() + sum(paper.chunk(number) for number in range(7))


def test_the_5b_networks_around_the_transformer(paper):
    """The decoders as counted with PyTorch's counter on the public code.

    The growth of the small one is computed on a quarter of the pixels here, see models/taehv.py.
    """
    assert round(vae_decode(paper.vae, 1, paper.grid) / 1e12, 2) == 66.35
    assert round(vae_decode(paper.vae, 1, paper.grid, first=True) / 1e12, 1) == 20.6
    assert paper.decode() == 3 * vae_decode(paper.vae, 1, paper.grid)
    assert round(paper.encode_text() / 1e12, 2) == 4.84
    base, big = TaehvConfig.taew2_2(), TaehvConfig.taew2_2_super()
    grown = 3 * 2 * 80 * 44 * (256**2 + 4 * 2 * 128**2 + 2 * 16 * 2 * 64**2)
    assert round((taehv_decode(base, 3, paper.grid) + 3 * grown) / 1e12, 2) == 0.95
    assert round(taehv_decode(big, 3, paper.grid) / 1e12, 2) == 1.31


@pytest.mark.parametrize(
    "change", ["none", "guidance", "decoder", "super", "one stage without time"]
)
def test_programs_do_what_is_counted(change, monkeypatch):
    """All of them, traced. Products with the zeros around a picture count in one and not in the
    other, unless it is told to.
    """
    config = runway_tiny.get_config("smoke")
    config.video.height, config.video.width = 32, 48
    if change == "guidance":
        config.sampler.guidance = 2.0
    if change == "one stage without time":
        config.model.vae.temporal_down = (False, True)
        config.model.vae.dec_blocks = 2
    if change in ("decoder", "super"):
        variant = "base" if change == "decoder" else "super"
        config.model.decoder = SMALL_DECODER | {"variant": variant}
    monkeypatch.setattr(traced, "_taps", lambda inputs, kernel, outputs, *_: outputs * kernel)
    pipeline = Pipeline.random(config)
    expected = StreamFlops.of(config).programs()
    expected["new_cache"] = 0.0
    height, width = config.video.height, config.video.width
    expected["fade"] = 2.0 * height * width * (height + width)  # a blur of rows and columns
    assert expected.keys() == pipeline.arguments().keys()
    for name, args in pipeline.arguments().items():
        programs = pipeline.stream if name in pipeline.stream.names else pipeline.media
        network, function = programs._jitted[name]
        counted = traced.count_jaxpr(function.trace(programs.weights[network], *args).jaxpr)
        assert not counted.unknown and counted.model == expected[name], name


def test_xla_counts_the_same():
    """XLA counts elementwise work, too, a loop as one turn of it, and no zeros around pictures."""
    config = runway_tiny.get_config()
    pipeline, work = Pipeline.abstract(config), StreamFlops.of(config)

    def by_xla(name: str) -> float:
        return pipeline.lower(name).cost_analysis()["flops"]

    assert 1 < by_xla("text_kv") / work.text_kv() < 1.01
    assert 1 < by_xla("chunk") / work.forward().total < 1.02
    assert 0.94 < by_xla("decode_next") / work.decode() < 1.02


def test_more_steps_in_the_first_chunk():
    config = wan22_5b.get_config()
    config.sampler.first = (1000, 900, 800, 600, 400, 200)
    work = StreamFlops.of(config)
    assert (work.passes(0), work.passes(1), work.passes(None)) == (7, 5, 5)
    assert work.chunk(0) == 7 * work.forward(0).total


def test_a_stream_without_condition_frames():
    work = StreamFlops.of(longlive2_5b.get_config())
    assert "refresh" not in work.programs() and "shot_chunk" in work.programs()
    assert [work.held(number) for number in (0, 1, 3, 4, None)] == [8, 16, 32, 32, 32]
    assert work.video(29) == work.chunk(0)


def test_attention_grows_with_what_is_seen():
    sizes = StreamFlops.of(runway_tiny.get_config()).dit
    few, many = (dit_forward(sizes, 3, 160, keys) for keys in (5, 10))
    assert many.self_attention == 2 * few.self_attention and many.linear == few.linear
