"""Numbers of the parts that a sub-sample can belong to, and of the attributes of a vertex."""

from __future__ import annotations

BACKGROUND, SKIN, EYES, HAIR, UNDERLAYER, SHOES, BOTTOM, TOP, DRESS, OUTER = range(10)
COUNT = 10
NAMES = (
    "background",
    "skin",
    "eyes",
    "hair",
    "underlayer",
    "shoes",
    "bottom",
    "top",
    "dress",
    "outer",
)
SLOTS = {"top": TOP, "bottom": BOTTOM, "dress": DRESS, "outer": OUTER}

# Vertex attributes, read by `shading`. Cloth: pattern coordinates of torso and sleeve (m); metres
# inside the neckline, the hem, and the cuff or waistband; ambient light; metres inside the sleeve;
# polar angle.
U, V, SLEEVE_U, SLEEVE_V, NECK, HEM, CUFF, OCCLUSION, SLEEVE, ANGLE = range(10)
# Skin: rest position relative to the eyes, lips, ears, eyelids, metres inside the underlayer,
# ambient light.
FACE_X, FACE_Y, FACE_Z, LIPS, EARS, EYELIDS, UNDER = range(7)
ATTRIBUTES = 10
FAR = 0.3  # distance of a vertex that is not near any edge, metres
