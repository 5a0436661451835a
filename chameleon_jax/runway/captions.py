"""What a clip is described with: plain English sentences about what stays (person, place, clothes)
and what happens.
"""

from __future__ import annotations

from collections.abc import Mapping

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
_NEARS = ("walk", "walk_turn", "approach")  # comes closer, so that a framing holds for the end
_CAMERA = {
    "static": "The camera stands still.",
    "dolly": "The camera moves slowly {dolly}.",
    "pan": "The camera drifts to the {side}.",
    "orbit": "The camera circles slowly to the {side}.",
    "handheld": "The camera is held by hand and sways a little.",
}
_GESTURE = {  # infinitive and participle with {their} for the possessive
    "hip": ("puts one hand on {their} hip", "takes the hand off {their} hip"),
    "hips": ("puts both hands on {their} hips", "takes both hands off {their} hips"),
    "wave": ("raises one hand and waves", "stops waving and lowers the hand"),
    "up": ("raises both arms above {their} head", "lowers both arms from above {their} head"),
    "side": ("stretches both arms out to the sides", "lowers both arms from the sides"),
    "open": ("opens both arms", "lowers {their} open arms"),
    "chest": ("brings one hand to {their} chest", "takes one hand from {their} chest"),
    "hair": ("touches {their} hair", "takes one hand from {their} hair"),
    "pockets": ("puts both hands to {their} pockets", "takes both hands from {their} pockets"),
    "front": ("reaches forward with one arm", "lowers the arm that reached forward"),
}
_HEAD = {
    "tilt": "tilts {their} head",
    "nod": "nods",
    "look": "looks to {their} {side}",
    "glance_down": "glances down",
}


def _words(person: PersonSpec) -> dict[str, str]:
    if person.feminine:
        return {"noun": "woman", "they": "she", "their": "her"}
    return {"noun": "man", "they": "he", "their": "his"}


def _locomotion(action: MotionSpec) -> str:
    # the person's left is on the right of the picture; captions speak from the person's side
    side = "left" if action.side > 0 else "right"
    return {
        "stand": "stands in place",
        "sway": "sways gently from side to side",
        "walk": "walks slowly towards the camera",
        "walk_turn": f"walks towards the camera and turns to {{their}} {side}",
        "turn": f"turns to {{their}} {side}",
        "spin": "turns around in place",
        "sidestep": f"steps to {{their}} {side}",
        "squat": "bends {their} knees and squats",
        "approach": "walks up to the camera and stops",
    }[action.locomotion]


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
    if scene.place == "studio":
        return f"in front of {indefinite(scene.wall)} backdrop"
    if scene.place == "room":
        room = f"in a room with {indefinite(scene.wall)} wall"
        return f"{room} and {_WOOD[scene.floor]}" if long else room
    if scene.place == "street":
        return (
            f"on a paved street in front of {indefinite(scene.wall)} facade"
            if long
            else "on a street"
        )
    return f"in a park with {scene.wall} foliage" if long else "in a park"


def _clothes(outfit: Mapping[str, GarmentSpec], person: PersonSpec, long: bool) -> str:
    items = [
        describe(outfit[slot]) for slot in ("outer", "dress", "top", "bottom") if slot in outfit
    ]
    if "outer" in outfit and len(items) > 1:
        items[:2] = [f"{items[0]} over {items[1]}"]
    if long:
        items.append(f"{person.shoes.colour} {'boots' if person.shoes.shaft > 0.1 else 'shoes'}")
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def static_caption(
    person: PersonSpec,
    scene: SceneSpec,
    outfit: Mapping[str, GarmentSpec],
    action: MotionSpec,
    camera: CameraSpec,
    long: bool = True,
) -> str:
    """Person, place and clothes."""
    text = f"{_person(person, long)} is {_place(scene, long)}, wearing {_clothes(outfit, person, long)}."
    text = text[0].upper() + text[1:]
    if not long:
        return text
    framing = _FRAMING[camera.framing]
    if action.locomotion in _NEARS and camera.framing != "full":
        framing = f"In the end {framing[0].lower()}{framing[1:]}"
    return f"{text} {framing}"


def dynamic_caption(
    person: PersonSpec, action: MotionSpec, camera: CameraSpec, long: bool = True
) -> str:
    """What the person and the camera do."""
    words = _words(person) | {"side": "left" if action.side > 0 else "right"}
    clauses = [_locomotion(action)]
    if action.gesture != "none":
        clauses.append(_GESTURE[action.gesture][1 if action.posed else 0])
    if long and action.head != "none":
        clauses.append(_HEAD[action.head])
    joined = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"
    if len(clauses) == 2 and " and " in clauses[0] + clauses[1]:
        joined = f"{clauses[0]}, then {clauses[1]}"
    text = f"The {words['noun']} {joined}.".format(**words)
    if not long:
        return text
    amount = camera.amounts[2]
    # an orbit or a drift to +x goes to the right of the picture
    moves = {"side": "right" if amount > 0 else "left", "dolly": "closer" if amount > 0 else "back"}
    return f"{text} {_CAMERA[camera.move].format(**moves)}"


def captions(
    person: PersonSpec,
    scene: SceneSpec,
    outfit: Mapping[str, GarmentSpec],
    action: MotionSpec,
    camera: CameraSpec,
) -> dict[str, str | tuple[str, str]]:
    """All captions of a clip.

    Returns:
      `static` and `dynamic` (the long forms), and the pairs `en_long` and `en_short`, each (what
      happens, what it looks like).
    """
    static = static_caption(person, scene, outfit, action, camera)
    dynamic = dynamic_caption(person, action, camera)
    short_static = static_caption(person, scene, outfit, action, camera, long=False)
    short_dynamic = dynamic_caption(person, action, camera, long=False)
    short = (short_dynamic, short_static)
    return {"static": static, "dynamic": dynamic, "en_long": (dynamic, static), "en_short": short}
