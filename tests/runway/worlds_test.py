"""Worlds: the open one is what it always was, the mirror shows what it promises."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from chameleon_jax import runway
from chameleon_jax.runway import asset, captions, garments, motion, patterns, scene
from chameleon_jax.runway.clip import ClipRenderer, ClipSpec
from chameleon_jax.runway.worlds import MIRROR, WORLDS, WorldError

SIZE = (128, 80)
# Of what seeds 0 to 199 and 800,000 to 800,099 of the open world were when it was the only one.
OPEN_DIGEST = "201caab6a54b36f3d3c36529a09975eee1dc83be183b33e89fa5a616e8b84e98"


def mirror(seed: int, **settings) -> ClipSpec:
    return runway.sample_spec(seed, world="mirror", size=SIZE, **settings)


def test_the_open_world_is_what_it_was():
    digest = hashlib.sha256()
    for seed in (*range(200), *range(800_000, 800_100)):
        values = runway.sample_spec(seed).to_json()
        assert values.pop("world") == "open" and values["camera"].pop("room") == 0
        digest.update(json.dumps(values, sort_keys=True).encode())
    assert digest.hexdigest() == OPEN_DIGEST


@pytest.mark.parametrize("name", WORLDS)
def test_every_name_of_a_world_exists(name):
    world = WORLDS[name]
    assert set(world.places) <= set(scene.PLACES) and set(world.framings) <= set(scene.FRAMINGS)
    assert set(world.moves) <= set(scene.MOVES) and set(world.heads) <= set(motion.HEADS)
    assert set(world.locomotion) <= set(motion.LOCOMOTION)
    assert set(world.gestures) <= set(motion.GESTURES)
    assert set(world.targets) <= set(garments.SLOTS)
    for slot, types in world.types.items():
        assert {garments.TYPES[name].slot for name in types} == {slot}
    for slot, names in world.patterns.items():
        assert slot in garments.SLOTS and set(names) <= set(patterns.NAMES)


def test_every_motion_camera_and_head_has_words():
    spec = mirror(0)
    for locomotion in motion.LOCOMOTION:
        for gesture in motion.GESTURES:
            for head in motion.HEADS:
                changed = {"locomotion": locomotion, "gesture": gesture, "head": head}
                action = dataclasses.replace(spec.motion, **changed)
                assert captions.dynamic_caption(spec.person, action, spec.camera)
    for move in scene.MOVES:
        camera = dataclasses.replace(spec.camera, move=move)
        assert captions.dynamic_caption(spec.person, spec.motion, camera).endswith(".")


def test_what_the_mirror_world_draws():
    specs = [mirror(seed) for seed in (*range(200), *range(800_000, 800_100))]
    for spec in specs:
        assert set(spec.outfit) == {"top", "bottom"} and spec.slot == "top"
        assert not spec.styling.tucked and not spec.styling.layered
        assert spec.scene.place == "studio" and spec.camera.move == "fixed"
        for garment in (*spec.outfit.values(), spec.reference_garment):
            assert garments.belongs_to(garment, MIRROR)
            assert garment.pattern == "plain" or garment.period >= 0.06
    for names, of in (
        (MIRROR.types["top"], lambda spec: spec.garment.type),
        (MIRROR.patterns["top"], lambda spec: spec.garment.pattern),
        (MIRROR.locomotion, lambda spec: spec.motion.locomotion),
        (MIRROR.gestures, lambda spec: spec.motion.gesture),
        (MIRROR.heads, lambda spec: spec.motion.head),
    ):
        assert {of(spec) for spec in specs} == set(names)
    assert any(spec.garment.print.startswith("letter") for spec in specs)
    held_out = [runway.held_out(spec.garment) for spec in specs]
    assert not any(held_out[:200]) and any(held_out[200:])


def test_the_mirror_world_is_calm():
    """The camera does not move at all, turns are slight, and nothing is fast enough to smear."""
    bone, turned = asset.load().bone, []
    for seed in range(24):
        spec = mirror(seed, frames=49)
        stage = ClipRenderer(spec)
        assert len({camera.matrix.tobytes() for camera in stage.cameras}) == 1
        turned.append(np.abs(stage.motion.path[:, 2]).max())
        clip = runway.render_clip(spec, ground_truth=True, only=[0, 16, 32, 48])
        head = clip.joints_2d[:, bone["head"]]
        assert (head > 8).all() and (head[:, 0] < SIZE[1] - 8).all() and (head[:, 1] < 64).all()
        background = clip.touched == 1 << 0
        steady = background.all(0)
        still = clip.frames[:, steady]
        assert steady.mean() > 0.2 and np.ptp(still.astype(int), axis=0).max() <= 12  # shadows
    assert 0.2 < max(turned) <= np.deg2rad(25)


def test_the_garment_fills_much_of_the_picture_at_the_scale_of_its_own_picture():
    shares, ratios, fitted = [], [], []
    for seed in range(24):
        spec = mirror(seed)
        clip = runway.render_clip(spec, ground_truth=True, only=[0])
        worn = clip.mask("top")[0]
        shares.append(worn.mean())
        alone = (runway.garment_picture(spec.garment, SIZE, world="mirror") < 250).any(-1)
        heights = [np.ptp(np.flatnonzero(mask.any(1))) + 1 for mask in (worn, alone)]
        ratios.append(heights[1] / heights[0])
        filling = (runway.garment_picture(spec.garment, SIZE) < 250).any(-1)
        fitted.append(filling.any(1).sum() / heights[1])
        assert alone[[0, -1]].sum() == alone[:, [0, -1]].sum() == 0  # nothing is cut off
    assert 0.2 < np.mean(shares) < 0.4
    assert 0.85 < np.mean(ratios) < 1.05
    assert max(fitted) > 1.4  # narrow ones are shown larger where they fill the picture


def test_the_new_motions_do_what_they_are_called():
    base = mirror(3, frames=49)

    def joints(seed: int, **changes):
        action = dataclasses.replace(base.motion, seed=seed, side=1, lead=0, start=0.5, **changes)
        spec = dataclasses.replace(base, motion=action)
        return runway.render_clip(spec, ground_truth=True, only=[0, 24]).joints

    bone = asset.load().bone
    still = {"locomotion": "stand", "gesture": "none", "head": "none", "posed": False}
    for seed in range(3):
        standing = joints(seed, **still)
        shifted = joints(seed, **still | {"locomotion": "shift"})
        hips = (shifted - standing)[1, bone["root"]]
        assert 0.03 < hips[0] < 0.09  # to the person's left, which is +x
        collar = joints(seed, **still | {"gesture": "collar"})
        before, after = (
            np.linalg.norm(pose[1, bone["wrist.L"]] - pose[1, bone["neck01"]])
            for pose in (standing, collar)
        )
        assert after < 0.35 < before


def test_a_smile_is_put_on():
    spec = mirror(3, frames=65)
    action = dataclasses.replace(spec.motion, head="smile", start=1.0)
    stage = ClipRenderer(dataclasses.replace(spec, motion=action))
    smile = stage.motion.expression[:, 0]
    assert smile[0] < 0.2 and smile[-1] > 0.9


def test_a_world_that_is_not_there():
    with pytest.raises(WorldError, match="world is 'mirrors'; expected one of open, mirror"):
        runway.sample_spec(0, world="mirrors")
    spec = mirror(5)
    assert ClipSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    old = spec.to_json()
    del old["world"], old["camera"]["room"]
    assert ClipSpec.from_json(old).world == "open"  # of records that are older than worlds


def test_captions_of_the_mirror_say_which_hand():
    texts = {}
    for seed in range(200):
        spec = runway.sample_spec(seed, frames=33, world="mirror")
        one_hand = spec.motion.gesture in ("hip", "collar")
        hand = "right" if spec.motion.lead else "left"
        text = spec.captions()["dynamic"]
        assert (f"{hand} hand " in text) == one_hand
        assert "one hand" not in text and "the hand" not in text
        texts[(spec.motion.gesture, spec.motion.posed)] = text
    assert any("puts her left hand to her collar" in text for text in texts.values()) or any(
        "hand to" in text for text in texts.values()
    )
