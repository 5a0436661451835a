"""Captions of a clip in plain English.

A static caption describes the person, the place and the clothes, a dynamic caption what happens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from chameleon_jax.runway.figure import PersonSpec
from chameleon_jax.runway.garments import GarmentSpec, describe, indefinite
from chameleon_jax.runway.hair import STYLES
from chameleon_jax.runway.motion import MotionSpec
from chameleon_jax.runway.scene import CameraSpec, SceneSpec

_WOOD = {
    "oak": "an oak floor",
    "walnut": "a dark wooden floor",
    "pine": "a light wooden floor",
    "cherry": "a reddish wooden floor",
    "bleached": "a pale wooden floor",
}
_FRAMING = {
    "full": "The whole body is in view.",
    "knee": "The person is seen from the knees up.",
    "thigh": "The person is seen from the thighs up.",
}
# The person comes closer, so that the framing is true for the end of the clip.
_COMES_CLOSER = ("walk", "walk_turn", "approach")
_CAMERA = {
    "static": "The camera stands still.",
    "fixed": "The camera stands still.",
    "dolly": "The camera moves slowly {dolly}.",
    "pan": "The camera drifts to the {side}.",
    "orbit": "The camera circles slowly to the {side}.",
    "handheld": "The camera is held by hand and sways a little.",
}
# What happens when the gesture starts, and when it ends in a clip that begins in it; {their} stands
# for "her" or "his".
_GESTURE = {
    "hip": ("puts one hand on {their} hip", "takes the hand off {their} hip"),
    "hips": ("puts both hands on {their} hips", "takes both hands off {their} hips"),
    "wave": ("raises one hand and waves", "stops waving and lowers the hand"),
    "up": ("raises both arms above {their} head", "lowers both arms from above {their} head"),
    "side": ("stretches both arms out to the sides", "lowers both arms from the sides"),
    "open": ("opens both arms", "lowers {their} open arms"),
    "chest": ("brings one hand to {their} chest", "takes one hand from {their} chest"),
    "hair": ("touches {their} hair", "takes one hand from {their} hair"),
    "pockets": ("puts both hands to {their} pockets", "takes both hands from {their} pockets"),
    "collar": ("puts one hand to {their} collar", "takes one hand from {their} collar"),
    "front": ("reaches forward with one arm", "lowers the arm that reached forward"),
}
_HEAD = {
    "tilt": "tilts {their} head",
    "nod": "nods",
    "look": "looks to {their} {side}",
    "glance_down": "glances down",
    "smile": "smiles",
}


# {side} is the person's own left or right: their left is on the right of the picture.
_LOCOMOTION = {
    "stand": "stands in place",
    "sway": "sways gently from side to side",
    "walk": "walks slowly towards the camera",
    "walk_turn": "walks towards the camera and turns to {their} {side}",
    "turn": "turns to {their} {side}",
    "spin": "turns around in place",
    "sidestep": "steps to {their} {side}",
    "squat": "bends {their} knees and squats",
    "approach": "walks up to the camera and stops",
    "shift": "shifts {their} weight to {their} {side}",
    "slight_turn": "turns a little to {their} {side}",
}


class Captions(TypedDict):
    """All captions of a clip; the pairs are (dynamic, static)."""

    static: str
    dynamic: str
    en_long: tuple[str, str]
    en_short: tuple[str, str]


def _words(person: PersonSpec) -> dict[str, str]:
    if person.feminine:
        return {"noun": "woman", "their": "her"}
    return {"noun": "man", "their": "his"}


def _side(action: MotionSpec) -> str:
    return "left" if action.side > 0 else "right"


def _listed(items: Sequence[str]) -> str:
    """Join with commas, and with "and" before the last one."""
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} and {items[-1]}"


def _person(person: PersonSpec, long: bool) -> str:
    look, words = person.phenotype, _words(person)
    adjectives = []
    if long:
        if look["weight"] < 0.3:
            adjectives.append("slim")
        elif look["weight"] > 0.68:
            adjectives.append("heavy-set")
        elif look["muscle"] > 0.68:
            adjectives.append("athletic")
    if look["age"] > 0.55:
        adjectives.append("elderly")
    elif long and look["age"] < 0.15:
        adjectives.append("young")
    hair = f"{STYLES[person.hair.style].words} {person.hair.colour} hair"
    return f"{indefinite(' '.join([*adjectives, words['noun']]))} with {hair}"


def _place(scene: SceneSpec, long: bool) -> str:
    wall = indefinite(scene.wall)
    if scene.place == "studio":
        return f"in front of {wall} backdrop"
    if scene.place == "room":
        room = f"in a room with {wall} wall"
        return f"{room} and {_WOOD[scene.floor]}" if long else room
    if scene.place == "street":
        return f"on a paved street in front of {wall} facade" if long else "on a street"
    return f"in a park with {scene.wall} foliage" if long else "in a park"


def _clothes(outfit: Mapping[str, GarmentSpec], person: PersonSpec, long: bool) -> str:
    worn = [slot for slot in ("outer", "dress", "top", "bottom") if slot in outfit]
    items = [describe(outfit[slot]) for slot in worn]
    if "outer" in outfit and len(items) > 1:
        outer, inner, *rest = items
        items = [f"{outer} over {inner}", *rest]
    if long:
        kind = "boots" if person.shoes.shaft > 0.1 else "shoes"
        items.append(f"{person.shoes.colour} {kind}")
    return _listed(items)


def static_caption(
    person: PersonSpec,
    scene: SceneSpec,
    outfit: Mapping[str, GarmentSpec],
    action: MotionSpec,
    camera: CameraSpec,
    long: bool = True,
) -> str:
    """Person, place and clothes."""
    clothes = _clothes(outfit, person, long)
    text = f"{_person(person, long)} is {_place(scene, long)}, wearing {clothes}."
    text = text[0].upper() + text[1:]
    if not long:
        return text
    framing = _FRAMING[camera.framing]
    if action.locomotion in _COMES_CLOSER and camera.framing != "full":
        framing = f"In the end {framing[0].lower()}{framing[1:]}"
    return f"{text} {framing}"


def dynamic_caption(
    person: PersonSpec,
    action: MotionSpec,
    camera: CameraSpec,
    long: bool = True,
    hands: bool = False,
) -> str:
    """What the person and the camera do; `hands` says which hand does it."""
    words = _words(person) | {"side": _side(action)}
    clauses = [_LOCOMOTION[action.locomotion]]
    if action.gesture != "none":
        starts, ends = _GESTURE[action.gesture]
        clauses.append(ends if action.posed else starts)
        if hands:
            hand = f"{{their}} {'right' if action.lead else 'left'} hand"
            clauses[-1] = clauses[-1].replace("one hand", hand).replace("the hand", hand)
    if long and action.head != "none":
        clauses.append(_HEAD[action.head])
    if len(clauses) == 2 and " and " in clauses[0] + clauses[1]:
        joined = f"{clauses[0]}, then {clauses[1]}"
    else:
        joined = _listed(clauses)
    text = f"The {words['noun']} {joined}.".format(**words)
    if not long:
        return text
    return f"{text} {_camera(camera)}"


def _camera(camera: CameraSpec) -> str:
    # An orbit or a drift to +x goes to the right of the picture.
    forward = camera.amounts[2] > 0
    side, dolly = ("right", "closer") if forward else ("left", "back")
    return _CAMERA[camera.move].format(side=side, dolly=dolly)


def captions(
    person: PersonSpec,
    scene: SceneSpec,
    outfit: Mapping[str, GarmentSpec],
    action: MotionSpec,
    camera: CameraSpec,
    hands: bool = False,
) -> Captions:
    """All captions of a clip; `static` and `dynamic` are the long forms."""
    static = static_caption(person, scene, outfit, action, camera)
    dynamic = dynamic_caption(person, action, camera, hands=hands)
    short_static = static_caption(person, scene, outfit, action, camera, long=False)
    short_dynamic = dynamic_caption(person, action, camera, long=False, hands=hands)
    return {
        "static": static,
        "dynamic": dynamic,
        "en_long": (dynamic, static),
        "en_short": (short_dynamic, short_static),
    }
