"""One stream on several devices: what one device makes, split as it was said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from chameleon_jax import sharding
from chameleon_jax.config import load_config
from chameleon_jax.errors import UserError
from chameleon_jax.inference import Pipeline
from chameleon_jax.inference.clip import GenerateError, Generator
from launch import bench, cli, jobs, sample, serve
from tests.devices import run_on, start

ROOT = Path(__file__).parents[2]
SMOKE = f"{ROOT}/configs/runway_tiny.py:smoke"
# Eight heads, kernels large enough to be split, and 100 hidden channels, which eight do not divide.
SIZES = ["model.dit.width=64", "model.dit.heads=8", "model.dit.ffn=100"]
VIDEO = ["video.height=32", "video.width=32", "sampler.steps=2"]

COMMON = f"""
import sys
import jax, jax.numpy as jnp, numpy as np
from chameleon_jax import sharding
from chameleon_jax.attention.cache import withdraw
from chameleon_jax.config import load_config
from chameleon_jax.inference import Pipeline, Snapshot
from chameleon_jax.weights.params import flat_params

jax.config.update("jax_default_matmul_precision", "highest")
config = load_config({SMOKE!r}, {[*SIZES, *VIDEO, "cache.frames=11", "cache.sink=3"]!r})

def mesh_of(**sizes):
    return sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
"""

# A stream of latents against the cache, without the VAE.
LATENTS = (
    COMMON
    + """
config.unlock().model.dit.scan_layers = "scan_layers" in sys.argv
normal = lambda seed, shape: np.asarray(jax.random.normal(jax.random.key(seed), shape))
person, *garments = (normal(seed, (1, 1, 4, 4, 4)) for seed in range(3))
prompt = normal(3, (1, 16, 16))

def placed(tree, parts):
    "Every key and value has its part of the heads on each device, and nothing else is split."
    for leaf in jax.tree.leaves(tree):
        shape = list(leaf.shape)
        if leaf.ndim >= 4:
            shape[-2] //= parts
        assert leaf.sharding.shard_shape(leaf.shape) == tuple(shape), (leaf.shape, leaf.sharding)

def stream(pipeline):
    programs = pipeline.stream
    parts = 1 if pipeline.mesh is None else pipeline.mesh.size
    tensor = 1 if pipeline.mesh is None else pipeline.mesh.shape["tensor"]
    text_kv = pipeline.stream_text(pipeline.encode_prompt(prompt))
    placed(text_kv, tensor)
    cache = programs.new_cache()
    placed(cache, parts)
    cache = programs.refresh(cache, person, garments[0], text_kv)
    placed(cache, parts)
    made = []
    for number in range(4):  # the ring is full after three
        latents, cache = programs.chunk(cache, text_kv, 5, number)
        made.append(latents)
    counters = jax.tree.map(jnp.copy, cache.state)
    kept = programs.keep(cache)
    placed(kept, parts)
    latents, cache = programs.chunk(cache, text_kv, 5, 4)
    made.append(latents)
    cache = programs.put_back(cache, kept).replace(state=counters)
    placed(cache, parts)
    again, cache = programs.chunk(cache, text_kv, 5, 4)
    np.testing.assert_array_equal(again, latents)
    cache = programs.refresh(withdraw(cache), person, garments[1], text_kv)
    for number in range(5, 7):
        latents, cache = programs.chunk(cache, text_kv, 5, number)
        placed(latents, 1)
        made.append(latents)
    placed(cache, parts)
    return np.concatenate(made, axis=1), [np.asarray(leaf) for leaf in jax.tree.leaves(cache)]

one = Pipeline.random(config, 1, text=False)
expected, cache = stream(one)
assert 0.3 < expected.std() < 3
for sizes in eval(sys.argv[1]):
    pipeline = Pipeline.random(config, 1, text=False, mesh=mesh_of(**sizes))
    made, left = stream(pipeline)
    for (name, a), b in zip(flat_params(one.dit).items(), flat_params(pipeline.dit).values()):
        np.testing.assert_array_equal(a, b, err_msg=name)
    fc1 = flat_params(pipeline.dit)["blocks.0.ffn.fc1.kernel"]
    split = sizes.get("tensor", 1) if sizes.get("tensor", 1) != 8 else 1
    assert fc1.sharding.shard_shape(fc1.shape) == (64, 100 // split), sizes
    np.testing.assert_allclose(made, expected, atol=1e-4, err_msg=str(sizes))
    for a, b in zip(left, cache, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=str(sizes))
    again, _ = stream(pipeline)
    np.testing.assert_array_equal(again, made)
    if "seq" in sizes:  # compiled anew, too
        again, _ = stream(Pipeline.random(config, 1, text=False, mesh=mesh_of(**sizes)))
        np.testing.assert_array_equal(again, made)
print("equal")
"""
)


def test_a_stream_on_four_devices_is_that_of_one():
    run_on(4, LATENTS, [{"tensor": 4}])


@pytest.mark.slow
def test_a_stream_on_any_mesh_is_that_of_one():
    meshes = [{"tensor": 2}, {"seq": 2}, {"seq": 4}, {"seq": 2, "tensor": 2}, {"tensor": 8}]
    run_on(8, LATENTS, [{}, *meshes, {"seq": 2, "tensor": 4}])


@pytest.mark.slow
def test_a_cache_of_stacked_layers_is_split_on_heads_too():
    run_on(4, LATENTS, [{"seq": 2, "tensor": 2}], "scan_layers")


SESSION = (
    COMMON
    + """
config.unlock().sampler.guidance = 1.5  # two streams against caches of two rows
pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), np.uint8)

def stream(pipeline, path=None):
    session = pipeline.session(keep=2)
    session.start(*pictures[:2], "she walks", seed=1)
    made = [session.next_chunk() for _ in range(2)]
    session.switch_garment(pictures[2])
    ahead = session.next_chunk()
    session.rewind(session.frames - len(ahead))
    if path is not None:
        session.snapshot().save(path)
    made.append(session.next_chunk())
    np.testing.assert_array_equal(made[-1], ahead)
    assert session.next_chunk(lambda: True) is None  # as if it had never begun
    made += [session.next_chunk(), session.next_chunk(lambda: False)]  # whole, and in parts
    return made, session

def near(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1

one, four = Pipeline.random(config, 1), Pipeline.random(config, 1, mesh=mesh_of(seq=2, tensor=2))
assert repr(four).endswith("on 4 devices)")
compiled = four.compile()
assert compiled.keys() == four.arguments().keys()
expected, _ = stream(one)
made, session = stream(four, sys.argv[1])
near(made, expected)
assert min(chunk.std() for chunk in made) > 1
for programs in (four.media, four.stream):  # what was compiled ahead is what ran
    for name in compiled.keys() & set(programs.names):
        assert not programs._jitted[name][1]._cache_size(), name
restored = four.session(keep=1)
restored.restore(Snapshot.load(sys.argv[1]))
for name in ("cache", "text_kv", "decoder", "z_reference", "z_garment"):
    pair = (getattr(each._state, name) for each in (session, restored))
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, b.ndim), (name, a.sharding, b.sharding)
for chunk, way in zip(made[2:], ((), (), (lambda: False,)), strict=True):  # the last in parts
    np.testing.assert_array_equal(restored.next_chunk(*way), chunk)
elsewhere = one.session()
elsewhere.restore(Snapshot.load(sys.argv[1]))
near([elsewhere.next_chunk() for _ in made[2:]], expected[2:])
print("equal")
"""
)


@pytest.mark.slow
def test_a_session_on_four_devices_switches_goes_back_and_is_restored(tmp_path):
    run_on(8, SESSION, tmp_path / "snapshot.safetensors")


DECODING = (
    COMMON
    + """
config.unlock().model.vae.conv = CONV
z = jax.random.normal(jax.random.key(0), (2, 1, 3, 4, 4, 4))
picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)

def results(pipeline, parts):
    latent = pipeline.media.encode_image(picture)
    first, state = pipeline.media.decode(z[0], None)
    second, state = pipeline.media.decode(z[1], state)
    for leaf in jax.tree.leaves(state):
        b, t, h, w, c = leaf.shape
        assert leaf.sharding.shard_shape(leaf.shape) == (b, t, h // parts, w, c)
    return [np.asarray(x, np.float32) for x in (latent, first, second)]

def check(*cases):
    expected = results(Pipeline.random(config, 1, text=False), 1)
    for sizes, parts in cases:
        made = results(Pipeline.random(config, 1, text=False, mesh=mesh_of(**sizes)), parts)
        for a, b, most in zip(made, expected, (1e-4, 1, 1), strict=True):
            assert b.std() > 0.1 and np.abs(a - b).max() <= most, sizes

# Four rows of latents do not divide among eight devices; the rows of the pixels do.
check(({"seq": 2, "tensor": 2}, 4), ({"tensor": 8}, 1))
config.unlock().model.decoder = dict(
    network="taehv", z_dim=4, enc_width=4, dec_widths=(8, 4, 4), temporal_down=(True, True),
    temporal_up=(True, True),
)
check(({"tensor": 4}, 4))
print("equal")
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("conv", ["stacked", "columns"])
def test_rows_of_frames_are_split_in_the_vae_and_its_state(conv):
    run_on(8, DECODING.replace("CONV", repr(conv)))


SHOTS = """
import jax, numpy as np
from chameleon_jax import sharding
from chameleon_jax.config import load_config
from chameleon_jax.inference import Pipeline
from chameleon_jax.inference.shots import MultiShot, Shot

jax.config.update("jax_default_matmul_precision", "highest")
config = load_config("configs/longlive2_5b.py:smoke")
shots = [Shot("a cat", 2), Shot("a dog", 2)]
image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
videos = []
for mesh in (None, sharding.make_mesh({"tensor": 2})):
    streams = MultiShot(Pipeline.random(config, 1, mesh=mesh))
    videos.append(np.concatenate(list(streams.stream(shots, image=image))))
assert np.abs(videos[0].astype(int) - videos[1]).max() <= 1
print("equal")
"""


@pytest.mark.slow
def test_several_shots_on_two_devices():
    run_on(2, SHOTS)


def mesh(**sizes):
    """As much of a mesh as is looked at before it is used."""
    return SimpleNamespace(shape=dict.fromkeys(sharding.AXES, 1) | sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 2}, r"mesh\.data = 2: .* choose data 1, and mesh\.tensor or mesh\.seq for more"),
        ({"fsdp": 4}, r"mesh\.fsdp = 4: .* cannot be split; choose fsdp 1"),
        ({"tensor": 3}, "2 attention heads do not divide among seq x tensor = 3 .* divides 2"),
        ({"seq": 2}, r"1 tokens of a latent frame do not divide among mesh\.seq = 2"),
    ],
)
def test_what_does_not_divide_is_refused_before_weights_are_read(sizes, message, tmp_path):
    config = load_config(SMOKE, ["video.height=16", "video.width=16"])
    ways = [
        lambda **kw: Pipeline.random(config, **kw),
        lambda **kw: Pipeline.abstract(config, **kw),
    ]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    ways.append(lambda **kw: Pipeline.from_pretrained(tmp_path, **kw))  # there are no weights
    for way in ways:
        with pytest.raises(sharding.MeshError, match=message):
            way(mesh=mesh(**sizes))


def test_a_mesh_with_other_axes_is_refused():
    other = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    with pytest.raises(
        sharding.MeshError, match=r"the axes x; expected data, .* sharding\.make_mesh"
    ):
        Pipeline.abstract(load_config(SMOKE), mesh=other)


def test_a_mesh_of_one_device_is_said_of_abstract_pipelines():
    config = load_config(SMOKE, VIDEO)
    one = sharding.make_mesh({}, jax.devices()[:1])
    pipeline = Pipeline.abstract(config, mesh=one)
    assert pipeline.config.model.dit.attention in ("xla", "splash", "cudnn")  # was left open
    cache, text_kv, *_ = pipeline.arguments()["chunk"]
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves((cache, text_kv))} == {one}
    assert "while" in pipeline.lower("chunk").as_text()


@pytest.mark.parametrize("command", [sample, bench, serve])
def test_the_flag_is_read_in_all_commands(command):
    values = cli.read(command.define_flags, ["--mesh", "tensor=2, seq=1"])
    assert values.mesh == {"tensor": 2, "seq": 1}
    assert cli.read(command.define_flags, []).mesh is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "expected NAME=N,"),
        ("tensor=", "N from 1 up"),
        ("tensor=x", "N from 1 up"),
        ("tensor=0", "N from 1 up"),
        ("seq=2,,tensor=2", "such as tensor=2,seq=2"),
        ("seq=2,seq=2", "seq is there twice"),
        ("rows=2", "no axis 'rows'; expected tensor or seq"),
        ("tensor=64,seq=64", r"tensor=64,seq=64: 4096 devices asked for, \d+ found; choose fewer"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        jobs.stream_mesh(cli.read(bench.define_flags, [f"--mesh={text}"]).mesh)
    assert "\n" not in str(caught.value)


def test_clips_are_not_split():
    values = cli.read(sample.define_flags, ["--task=t2v", "--mesh=tensor=2"])
    with pytest.raises(cli.UsageError, match="--mesh is for --task stream or shots"):
        sample.check_flags(values)
    with pytest.raises(GenerateError, match="clips are made on one device; load it without one"):
        Generator(SimpleNamespace(mesh=mesh(tensor=2)))


def test_no_mesh_is_one_device_and_a_mesh_takes_the_first_that_there_are():
    assert jobs.stream_mesh(None) is None and jobs.split_axes(None) == {}
    one = jobs.stream_mesh({"tensor": 1})
    assert one.devices.flatten().tolist() == jax.devices()[:1]
    assert jobs.split_axes(mesh(tensor=2)) == {"tensor": 2}


@pytest.mark.slow
def test_the_commands_run_on_two_of_four_devices(tmp_path):
    flags = [f"--config={SMOKE}", *(f"--config.{change}" for change in VIDEO), "--mesh=tensor=2"]
    out = tmp_path / "out.mp4"
    done = start(4, "-m", "launch.sample", *flags, "--frames=9", f"--out={out}")
    assert done.returncode == 0, done.stderr
    report = json.loads(out.with_suffix(".json").read_text())
    assert (report["frames"], report["mesh"]) == (9, {"tensor": 2})

    out = tmp_path / "bench.json"
    few = ["--frames=9", "--repeats=1", "--switches=1"]
    done = start(4, "-m", "launch.bench", *flags, *few, f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "2 steps, on 2 x cpu" in done.stdout
    report = json.loads(out.read_text())
    assert (report["hardware"]["devices_used"], report["mesh"]) == (2, {"tensor": 2})

    done = start(4, "-m", "launch.sample", *flags, "--mesh=seq=2,fsdp=2", f"--out={out}.mp4")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: mesh.fsdp = 2: one stream is a batch")
