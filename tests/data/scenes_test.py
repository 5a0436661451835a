"""Scenes: what is rendered, the processes that render, and the batches that are drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.data.captions import full
from chameleon_jax.data.images import to_model
from chameleon_jax.data.labels import GARMENT, NAMES
from chameleon_jax.data.scene_store import SceneStore, draw
from chameleon_jax.data.scenes import (
    CLIP,
    LABELS,
    LATER,
    STILL,
    Recipe,
    Renderers,
    Scene,
    SceneError,
    draw_tops,
    ready,
)
from chameleon_jax.data.tokenizer import Tokenizer
from chameleon_jax.models import build
from chameleon_jax.runway import held_out, sample_spec
from chameleon_jax.runway.clip import go_together, look_different
from chameleon_jax.training.export import stored_model
from chameleon_jax.training.networks import Network

ASSETS = Path(__file__).parents[2] / "chameleon_jax/assets/runway_tiny"
RECIPE = Recipe(frames=13, tops=2)
GRID = (16, 10, 16)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(ASSETS / "tokenizer.json", 96)


@pytest.fixture(scope="module")
def clip() -> Scene:
    return RECIPE.render(3)


def test_a_scene_is_one_motion_in_several_tops(clip):
    video = clip.arrays["video"]
    assert video.shape == (2, 13, 128, 80, 3)
    assert clip.arrays["labels"].shape == (2, 4, 16, 10, len(NAMES))
    differ = (video[0].astype(int) != video[1]).any(-1)
    shown = clip.arrays["labels"][..., GARMENT].max(0) > 0  # [f, h, w], in either top
    assert 0.02 < differ.mean() < 0.7  # the tops, their shadows, and nothing else
    # Latent pixels that are all background and far from both tops are equal.
    corner = np.s_[:, :8, :8]
    assert not shown[:, 0, 0].any() and not differ[corner].any()
    assert clip.captions[0]["dynamic"] == clip.captions[1]["dynamic"]
    assert clip.captions[0]["static"] != clip.captions[1]["static"]


def test_a_later_start_is_a_part_of_the_clip(clip):
    video, later = clip.arrays["video"], clip.arrays["later_video"]
    assert later.shape[1] == LATER
    starts = [s for s in range(13 - LATER + 1) if (video[:, s : s + LATER] == later).all()]
    assert starts and min(starts) >= 2
    # Its labels begin anew: its first latent frame is that of one pixel frame.
    assert clip.arrays["later_labels"].shape[1] == 3


def test_a_still_is_a_frame_of_the_clip(clip):
    still = RECIPE.render(3, STILL)
    assert still.arrays["video"].shape[1] == 1 and "later_video" not in still.arrays
    equal = (still.arrays["video"] == clip.arrays["video"]).all((0, 2, 3, 4))
    assert equal.any()
    assert (still.arrays["garment"] == clip.arrays["garment"]).all()


def test_further_tops_look_different_and_are_not_held_out():
    for seed in range(12):
        spec = sample_spec(seed, world="mirror")
        tops = draw_tops(spec, 5)
        assert tops[:2] == [spec.garment, spec.reference_garment]
        for i, top in enumerate(tops):
            assert all(look_different(top, other) for other in tops[:i])
            assert i < 2 or (not held_out(top) and go_together(top, spec.outfit["bottom"]))


def test_recipes_that_make_no_examples_are_refused():
    with pytest.raises(SceneError, match="1 tops make no pair"):
        Recipe(tops=1)
    with pytest.raises(SceneError, match="clips of 9 frames"):
        Recipe(frames=9)
    with pytest.raises(SceneError, match="clips of 32 frames"):
        Recipe(frames=32)


def test_files_of_scenes(tmp_path, clip):
    clip.write(tmp_path / "a.npz")
    again = Scene.read(tmp_path / "a.npz")
    assert json.dumps(again.captions) == json.dumps(clip.captions)
    assert again.arrays.keys() == clip.arrays.keys()
    assert all((again.arrays[name] == value).all() for name, value in clip.arrays.items())
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:1000])
    with pytest.raises(SceneError, match=r"b\.npz: not a scene"):
        Scene.read(tmp_path / "b.npz")


def test_the_first_latent_frame_is_that_of_the_first_frame_alone(clip):
    """So that a reference can be taken from a clip that was encoded as a whole."""
    network = Network(build.builder("vae", stored_model(ASSETS, "vae"), dtype=jnp.float32))
    params = network.load(ASSETS / "vae.safetensors", dtype=jnp.float32)
    encode = jax.jit(lambda params, video: network.bind(params).encode(to_model(video)))
    video = clip.arrays["video"][:1, :5]
    whole, alone = encode(params, video), encode(params, video[:, :1])
    assert whole.shape == (1, 2, *GRID)
    np.testing.assert_allclose(whole[:, :1], alone, rtol=1e-4, atol=1e-4)
    assert np.abs(whole[:, 1:] - alone).max() > 0.01  # the motion is seen


def numbered(store: SceneStore, scenes: int, first: int = 0) -> None:
    """Add scenes whose latents say scene, top and frame: 100 s + 10 n + f; garments 0.5 more."""
    s, n, f = np.ogrid[first : first + scenes, : store.tops, : store.frames]
    z = np.broadcast_to((100 * s + 10 * n + f)[..., None, None, None], (*(s + n + f).shape, *GRID))
    cells = {
        "labels": np.broadcast_to((10 * n + f + 0 * s)[..., None, None, None], (*z.shape[:5], 5)),
        "origin": np.broadcast_to((10 * n + f + 0 * s)[..., None, None, None], (*z.shape[:5], 2)),
    }
    captions = [
        [{"dynamic": f"moves {i}", "static": f"wears {j}"} for j in range(store.tops)]
        for i in range(first, first + scenes)
    ]
    store.add(z, z[:, :, 0] + 0.5, cells, captions)


def read(store: SceneStore, batch: dict[str, np.ndarray]) -> list[tuple[int, ...]]:
    """(scene, top, top of the reference) of each example."""
    assert (batch["z_reference"] == batch["z_reference"][..., :1, :1, :1]).all()
    reference, garment, video = (
        batch[name][:, 0, 0, 0, 0].astype(int) for name in ("z_reference", "z_garment", "z_video")
    )
    assert (garment == video).all() and (batch["z_garment"][:, 0, 0, 0, 0] == video + 0.5).all()
    assert (reference // 100 == video // 100).all() and (reference % 10 == 0).all()
    frames = batch["z_video"].shape[1]
    steps = batch["z_video"][..., 0, 0, 0] - batch["z_video"][:, :1, 0, 0, 0]
    assert (steps == np.arange(frames)).all()
    assert (batch["labels"][..., 0, 0, 0] == video[:, None] % 100 + np.arange(frames)).all()
    return list(zip(video // 100, video // 10 % 10, reference // 10 % 10, strict=True))


def test_every_ordered_pair_of_tops_is_an_example(tokenizer):
    store = SceneStore(4, 3, (3, *GRID), tokenizer)
    numbered(store, 2)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(8):
        seen |= set(read(store, draw([store], rng, 2, 16)))
    pairs = {(s, a, b) for s in range(2) for a in range(3) for b in range(3) if a != b}
    assert seen == pairs


def test_a_matched_reference_wears_what_the_video_shows(tokenizer):
    store = SceneStore(2, 3, (1, *GRID), tokenizer)
    numbered(store, 2)
    batch = draw([store], np.random.default_rng(0), 1, 64, matched=True)
    assert {(a, b) for _, a, b in read(store, batch)} == {(n, n) for n in range(3)}


def test_what_was_worn_before_is_the_same_clip_in_any_other_top(tokenizer):
    store = SceneStore(3, 3, (2, *GRID), tokenizer)
    numbered(store, 3)
    plain = draw([store], np.random.default_rng(0), 2, 256)
    batch = draw([store], np.random.default_rng(0), 2, 256, before=True)
    assert batch.keys() - plain.keys() == {"z_before"}
    seen = set()
    before = batch["z_before"][..., 0, 0, 0].astype(int)
    for frames, (scene, top, reference) in zip(before, read(store, batch), strict=True):
        worn = frames[0] // 10 % 10
        assert frames.tolist() == [100 * scene + 10 * worn, 100 * scene + 10 * worn + 1]
        seen.add((top, reference, worn))
    tops = range(3)
    assert seen == {(a, b, c) for a in tops for b in tops for c in tops if a not in (b, c)}


def test_captions_are_mixed_and_dropped(tokenizer):
    store = SceneStore(1, 2, (1, *GRID), tokenizer)
    numbered(store, 1)
    known = {"": "none", "moves 0": "dynamic"}
    known |= {full(f"wears {n}", "moves 0"): n for n in range(2)}
    ids = {tokenizer([text])[0].tobytes(): name for text, name in known.items()}
    counts: dict[object, int] = {}
    rng = np.random.default_rng(1)
    batch = draw([store], rng, 1, 2000, dropout=0.1)
    for row, mask, (_, top, _) in zip(batch["ids"], batch["mask"], read(store, batch), strict=True):
        name = ids[row.tobytes()]
        assert name in ("none", "dynamic", top)
        assert mask.sum() == (row != tokenizer.pad).sum()
        counts["full" if name == top else name] = counts.get("full" if name == top else name, 0) + 1
    assert abs(counts["none"] / 2000 - 0.1) < 0.03
    assert abs(counts["dynamic"] / 2000 - 0.63) < 0.05
    always = draw([store], rng, 1, 50, dynamic_only=0.0)
    assert {ids[row.tobytes()] for row in always["ids"]} == {0, 1}


def test_stores_are_drawn_from_by_their_numbers_of_scenes(tokenizer):
    small, large = (SceneStore(9, 2, (1, *GRID), tokenizer) for _ in range(2))
    numbered(small, 1)
    numbered(large, 3, first=1)
    rng = np.random.default_rng(0)
    batch = draw([small, SceneStore(1, 2, (1, *GRID), tokenizer), large], rng, 1, 1000)
    scenes = np.array([scene for scene, *_ in read(small, batch)])
    assert np.abs(np.bincount(scenes) / 1000 - 0.25).max() < 0.05


def test_a_full_store_forgets_the_oldest(tokenizer):
    store = SceneStore(3, 2, (1, *GRID), tokenizer)
    numbered(store, 2)
    numbered(store, 2, first=2)
    assert (len(store), store.added) == (3, 4)
    batch = draw([store], np.random.default_rng(0), 1, 200)
    assert {scene for scene, *_ in read(store, batch)} == {1, 2, 3}


def test_a_store_says_what_it_cannot_do(tokenizer):
    store = SceneStore(3, 2, (1, *GRID), tokenizer)
    with pytest.raises(SceneError, match="no scene to draw from"):
        draw([store], np.random.default_rng(0), 1, 4)
    bad = np.full((1, 2, 1, *GRID), 1e5, np.float32)
    with pytest.raises(SceneError, match="not finite in float16"):
        store.add(bad, bad[:, :, 0], {}, [])


def test_scenes_are_kept_in_a_file(tmp_path, tokenizer):
    store, again, other = (SceneStore(3, 2, (f, *GRID), tokenizer) for f in (1, 1, 3))
    numbered(store, 2)
    store.save(tmp_path / "stills.npz")
    again.load(tmp_path / "stills.npz")
    one, two = (draw([x], np.random.default_rng(0), 1, 8) for x in (store, again))
    assert all((one[name] == two[name]).all() for name in one)
    with pytest.raises(SceneError, match="z_video of a scene is"):
        other.load(tmp_path / "stills.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK")
    with pytest.raises(SceneError, match="no latents of scenes can be read"):
        other.load(tmp_path / "broken.npz")


def wait_until(done, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_renderers_make_stills_then_clips_and_end(tmp_path):
    with Renderers(tmp_path, RECIPE, 1, first=3, stills=1) as renderers:
        wait_until(lambda: ready(tmp_path, CLIP))
        renderers.check()
        (process,) = renderers._processes
    assert process.poll() is not None
    (still,) = ready(tmp_path, STILL)
    assert still.name == "00000003.npz" and ready(tmp_path, CLIP)[0].name == "00000004.npz"
    found, expected = Scene.read(still), RECIPE.render(3, STILL)
    assert all((found.arrays[name] == expected.arrays[name]).all() for name in ("video", *LABELS))
    with pytest.raises(SceneError, match="have ended"):
        renderers.check()


def test_renderers_end_with_their_parent(tmp_path):
    """A parent that is killed cannot end them."""
    parent = f"""
import os, signal
from pathlib import Path
from chameleon_jax.data.scenes import Recipe, Renderers
renderers = Renderers(Path({str(tmp_path)!r}), Recipe(frames=13, tops=2), 1, 0)
print(renderers._processes[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", parent],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    number = int(done.stdout)

    def gone() -> bool:
        try:
            return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait_until(gone)
