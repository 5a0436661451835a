"""People are adults, always dressed, and in the picture."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from chameleon_jax import runway
from chameleon_jax.runway import asset, body, clip, geometry, motion, parts, raster, renderer
from chameleon_jax.runway.drape import Styling
from chameleon_jax.runway.figure import Figure

SIZE = (128, 80)


def torso_triangles(figure: Figure) -> np.ndarray:
    """bool [triangles of the body]: those on the torso and the hips, from the chest down."""
    data = asset.load()
    joint = figure.person.joint
    y = figure.person.region("body")[:, 1]
    spine = ("spine05", "spine04", "spine03", "spine02")
    trunk = data.body_share("root", *spine, "upperleg01.*") > 0.8
    inside = trunk & (y > joint("upperleg01.L")[1] - 0.08) & (y < joint("spine01")[1] + 0.02)
    return inside[data.triangles["body"]].all(1)


@pytest.mark.parametrize("seed", range(8))
def test_no_skin_on_the_torso_whatever_is_worn(seed):
    spec = runway.sample_spec(seed, frames=81, size=SIZE)
    scene = clip.ClipRenderer(spec)
    torso = torso_triangles(scene.figure)
    assert torso.sum() > 500
    setting = renderer.Setting(scene.light, scene.backdrop, shadows=False)
    for outfit in (spec.outfit, {}):
        drawing = renderer.Renderer(scene.figure.dress(outfit, spec.styling), SIZE, samples=2)
        for t in (0, 40, 80):
            joints = drawing.pose(scene.motion.pose(t), scene.swing[t])
            drawing.draw(scene.cameras[t], setting, joints)
            part, triangle = drawing.samples_drawn
            of_body = (triangle >= 0) & (triangle < len(torso))
            on_torso = of_body & torso[np.where(of_body, triangle, 0)]
            assert not (on_torso & (part == parts.SKIN)).any()
        if not outfit:  # the torso was visible, so the check above means something
            assert (on_torso & (part == parts.UNDERLAYER)).sum() > 200


@pytest.mark.parametrize("seed", range(36))
def test_the_head_stays_in_the_picture(seed):
    scene = clip.ClipRenderer(runway.sample_spec(seed, frames=81, size=SIZE))
    model = scene.figure.dress({}, Styling())
    drawing = renderer.Renderer(model, SIZE, samples=1)
    hair = np.unique(model.triangles[model.part == parts.HAIR])
    hair = hair[(model.keep[hair] >= 0) & (model.skin_weight[hair, 0] > 0.9)]
    head = np.flatnonzero(asset.load().body_share("head") > 0.9)
    vertices = np.concatenate([head, hair])
    screen = np.empty((len(vertices), 3), np.float32)
    for t in range(0, 81, 8):
        drawing.pose(scene.motion.pose(t), scene.swing[t])
        geometry.project(drawing.points[vertices], scene.cameras[t].matrix, 1.0, screen)
        assert screen[:, 0].min() > 0 and screen[:, 0].max() < SIZE[1]
        assert screen[:, 1].min() > 0 and screen[:, 1].max() < SIZE[0]


def test_bodies_are_adult_and_of_allowed_height():
    data = asset.load()
    for seed in range(20):
        person = runway.sample_spec(seed).person
        # 0 is a young adult, 1 is old; the data has no children.
        assert 0 <= person.phenotype["age"] <= 1
        first, second = data.people[person.first], data.people[person.second]
        blend = person.mix * first + (1 - person.mix) * second
        assert body.SHORTEST - 1e-6 <= body.Person(blend).height <= body.TALLEST + 1e-6


@pytest.mark.parametrize("locomotion", list(motion.LOCOMOTION))
def test_feet_reach_the_ground_and_nothing_jumps(locomotion):
    person = body.Person(asset.load().people[0])
    base = runway.sample_spec(1).motion
    moves = motion.animate(dataclasses.replace(base, locomotion=locomotion), person, 81, 16)
    joints = np.stack([body.skeleton(person, moves.pose(t))[1] for t in range(81)])
    bone = asset.load().bone
    lift = joints[:, [bone["toe2-1.L"], bone["toe2-1.R"]], 1] - person.joint("toe2-1.L")[1]
    assert (lift.min(1) < 0.02).all()  # one foot is always down
    assert lift.max() < 0.25 and lift.min() > -0.02
    speed = np.linalg.norm(np.diff(joints, axis=0), axis=-1) * 16
    assert speed.max() < 6
    upper_arm = joints[:, bone["lowerarm01.L"]] - joints[:, bone["upperarm01.L"]]
    lengths = np.linalg.norm(upper_arm, axis=-1)
    np.testing.assert_allclose(lengths, lengths[0], rtol=0.01)


def test_rotation_turns_z_to_x_about_y():
    np.testing.assert_allclose(body.turned(yaw=np.pi / 2) @ [0, 0, 1], [1, 0, 0], atol=1e-12)


def test_rasteriser_draws_the_nearer_triangle_and_cuts_exactly():
    corners = [(0, 0), (8, 0), (0, 8)]
    points = np.array([(x, y, nearness) for nearness in (1, 2) for x, y in corners], np.float32)
    triangles = np.array([[0, 1, 2], [3, 4, 5]], np.int32)
    keep = np.array([1, 1, 1, 3, -5, 3], np.float32)  # the nearer one is kept where x < 3
    drawn = raster.Fragments(8, 8)
    raster.rasterise(points, triangles, 0, 2, keep, *drawn.arrays)
    expected = np.full((8, 8), -1)
    for y in range(8):
        for x in range(8):
            if x + y + 1 <= 8:
                expected[y, x] = 1 if x + 0.5 < 3 else 0
    assert (drawn.triangle == expected).all()


def test_normals_of_a_cut_edge_do_not_depend_on_the_cut():
    spec = runway.sample_spec(3, frames=1, size=SIZE)
    mesh = Figure(spec.person).dress(spec.outfit, spec.styling)
    whole = geometry.normals(mesh.rest, mesh.normal_triangles)
    part, first, last = mesh.layers[-1]
    assert part in parts.SLOTS.values()
    seen = np.unique(mesh.triangles[first:last])
    dropped = geometry.normals(mesh.rest, mesh.triangles)
    edge = seen[mesh.keep[seen] < 0]
    assert len(edge) > 10
    # Without the triangles that are cut away, the normals at the edge would be others.
    assert np.abs(whole[edge] - dropped[edge]).max() > 0.05
    np.testing.assert_allclose(np.linalg.norm(whole[seen], axis=1), 1, atol=1e-4)
