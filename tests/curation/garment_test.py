"""Try-off and try-on: made again until the checks pass, given up after some tries."""

from __future__ import annotations

import dataclasses
import sys
import types

import numpy as np
import pytest

from chameleon_jax.curation.footage import Footage
from chameleon_jax.curation.garment import (
    Checks,
    Garment,
    GarmentStage,
    LookEmbedder,
    ReferenceStage,
    at_size_of,
    local_editor,
    own_garments,
    read_picture,
    save_picture,
)
from chameleon_jax.curation.stage import CurationError
from tests.curation.made import SIZE, Draws, Says, clip, refused, scene, write_scene

GOOD_GARMENT = {"semantic": True, "textural": True, "nothing_else": True}
GOOD_REFERENCE = {"worn": True, "unchanged": True, "different": True}
BOX = [0.1, 0.1, 0.9, 0.9]


def cloth(seed: int) -> np.ndarray:
    """A coloured thing on white."""
    picture = np.full((*SIZE, 3), 255, np.uint8)
    rng = np.random.default_rng(seed)
    picture[16:48, 12:36] = rng.integers(0, 200, (8, 6, 3)).repeat(4, 0).repeat(4, 1)
    return picture


def taken_off(tmp_path, answers, pictures, tries=3):
    write_scene(tmp_path / "a.mp4", [1])
    model, editor = Says({"type": "upper"}, *answers), Draws(*pictures)
    stage = GarmentStage(Footage(tmp_path), tmp_path, Checks(editor, model, tries))
    (out,) = stage([clip("a")])
    return out, model, editor


def test_a_garment_that_passes(tmp_path):
    out, model, editor = taken_off(tmp_path, [GOOD_GARMENT], [cloth(1)])
    assert out.rejection is None and out.made["garment"]["type"] == "upper"
    assert (read_picture(tmp_path / out.made["garment"]["file"]) == cloth(1)).all()
    assert out.made["garment"]["editor"] == "draws"
    assert out.made["garment"]["checked_by"] == "says"
    assert "upper body" in editor.asked[0][1] and model.asked[1][2] == 2


@pytest.mark.parametrize("question", list(GOOD_GARMENT))
def test_each_check_alone_makes_it_again(tmp_path, question):
    bad = GOOD_GARMENT | {question: False}
    answers, pictures = [bad, GOOD_GARMENT], [cloth(1), cloth(2)]
    out, _, editor = taken_off(tmp_path, answers, pictures)
    assert out.measured["garment_tries"] == 2
    assert (read_picture(tmp_path / out.made["garment"]["file"]) == cloth(2)).all()
    assert [seed for *_, seed in editor.asked] == [0, 1]


def test_an_answer_that_cannot_be_read_is_no_pass(tmp_path):
    out, _, editor = taken_off(tmp_path, ["I think it is fine."], [cloth(1)], tries=2)
    why = refused(out)
    assert why.reason == "garment picture fails its checks" and (why.value, why.threshold) == (2, 2)
    assert len(editor.asked) == 2 and "garment" not in out.made


def test_a_type_that_nobody_can_say(tmp_path):
    write_scene(tmp_path / "a.mp4", [1])
    stage = GarmentStage(Footage(tmp_path), tmp_path, Checks(Draws(cloth(1)), Says("a hat")))
    (out,) = stage([clip("a")])
    assert refused(out).reason == "no usable answer"


def with_garment(tmp_path, name: str, seed: int, kind: str = "upper", video: str = ""):
    made = {"file": save_picture(tmp_path, f"{name}_cloth.png", cloth(seed)), "type": kind}
    one = dataclasses.replace(clip(name), made={"garment": made, "person": [BOX] * 8})
    return dataclasses.replace(one, video=video or f"{name}.mp4")


def put_on(tmp_path, others, answers, pictures=None, own=()):
    write_scene(tmp_path / "a.mp4", [1])
    model = Says(*answers)
    editor = Draws(*(pictures or [dressed()]))
    checks = Checks(editor, model, 3)
    stage = ReferenceStage(Footage(tmp_path), tmp_path, checks, LookEmbedder(), own)
    me = with_garment(tmp_path, "a", 1)
    stage.begin(stage.index(stage.survey([me, *others])))
    (out,) = stage([me])
    return out, editor, stage


def dressed(background: int = 0) -> np.ndarray:
    """The first frame, changed within the person's box alone, or everywhere."""
    from chameleon_jax.data import video

    del video
    frame = scene(1, 1)[0].astype(int)
    frame[10:50, 10:38] = 255 - frame[10:50, 10:38]
    return np.clip(frame + background, 0, 255).astype(np.uint8)


def test_another_garment_of_the_type_is_put_on(tmp_path):
    others = [with_garment(tmp_path, "b", 2), with_garment(tmp_path, "c", 3, "lower")]
    out, editor, _ = put_on(tmp_path, others, [GOOD_REFERENCE])
    assert out.rejection is None and out.made["reference"]["garment"] == "b"
    assert out.measured["garments_alike"] < 0.9
    assert editor.asked[0][0] == 2
    assert (read_picture(tmp_path / out.made["reference"]["file"]) == dressed()).all()


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (("b", 1, "upper", ""), "the same garment in another video"),
        (("b", 2, "upper", "a.mp4"), "another clip of the same video"),
        (("b", 2, "full", ""), "another type"),
    ],
)
def test_what_is_no_other_garment(tmp_path, other, why):
    out, editor, _ = put_on(tmp_path, [with_garment(tmp_path, *other)], [GOOD_REFERENCE])
    assert refused(out).reason == "no other garment of its type", why
    assert editor.asked == []


def test_ones_own_garments_are_enough(tmp_path):
    save_picture(tmp_path, "mine.png", cloth(5))
    own = [Garment("mine", "", "upper", tmp_path / "pictures/mine.png")]
    out, _, _ = put_on(tmp_path, [], [GOOD_REFERENCE], own=own)
    assert out.made["reference"]["garment"] == "mine"


@pytest.mark.parametrize("question", list(GOOD_REFERENCE))
def test_each_check_of_a_reference_makes_it_again(tmp_path, question):
    answers = [GOOD_REFERENCE | {question: False}, GOOD_REFERENCE]
    out, editor, _ = put_on(tmp_path, [with_garment(tmp_path, "b", 2)], answers)
    assert out.measured["reference_tries"] == 2 and len(editor.asked) == 2


@pytest.mark.parametrize(
    ("picture", "why"),
    [
        (scene(1, 1)[0], "nothing changed"),
        (dressed(background=60), "background changed"),
        (np.zeros((64, 90, 3), np.uint8), "another shape, 90x64"),
    ],
)
def test_faults_that_are_measured_need_no_model(tmp_path, picture, why):
    others = [with_garment(tmp_path, "b", 2)]
    out, _, stage = put_on(tmp_path, others, [GOOD_REFERENCE], [picture])
    assert refused(out).reason == "reference picture fails its checks"
    assert refused(out).detail == why
    assert stage.checks.model.asked == []


def test_pictures_of_another_size_and_the_same_shape_are_resized():
    frame = scene(1, 1)[0]
    assert at_size_of(frame, frame.repeat(2, 0).repeat(2, 1)).shape == frame.shape


def test_alike_garments_have_alike_vectors():
    moved = np.roll(cloth(1), (6, -4), (0, 1))
    vectors = LookEmbedder().embed([cloth(1), moved, cloth(2), 255 - cloth(1)])
    alike = vectors @ vectors[0]
    assert alike[1] > 0.99 > 0.9 > alike[2] and alike[3] < 0.9
    assert np.isfinite(LookEmbedder().embed([np.full((8, 8, 3), 255, np.uint8)])).all()


def test_own_garments_lie_in_folders_by_type(tmp_path):
    with pytest.raises(CurationError, match="no pictures of garments; expected PNG"):
        own_garments(tmp_path)
    (tmp_path / "lower").mkdir()
    save_picture(tmp_path, "x.png", cloth(1))
    (tmp_path / "pictures/x.png").rename(tmp_path / "lower/x.png")
    (tmp_path / "lower/notes.txt").write_text("x")
    assert [(one.id, one.type) for one in own_garments(tmp_path)] == [("lower/x.png", "lower")]


def test_an_editor_of_ones_own(monkeypatch):
    module = types.ModuleType("curation_editor")
    module.make, module.none = lambda: Draws(cloth(1)), lambda: 3
    monkeypatch.setitem(sys.modules, "curation_editor", module)
    assert local_editor("curation_editor:make").model == "draws"
    with pytest.raises(CurationError, match="gives int; expected an object with the method edit"):
        local_editor("curation_editor:none")
    for name in ("nowhere.at.all:make", "curation_editor:other", "curation_editor", ""):
        with pytest.raises(CurationError, match="cannot be imported"):
            local_editor(name)
