"""Curate videos: `python -m launch.curate --videos DIR --out DIR`.

The paper names no thresholds ("predefined"); these are ours, for ordinary footage of people in
clothes, and not checked on a real collection. `--keep 0.4` chooses the graded ones (flow,
sharpness, blocks, aesthetic) from a sample of your own.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("paper", "demo")


def get_config(variant: str = "paper") -> ConfigDict:
    """One of `VARIANTS`."""
    return common.choose(variant, paper, demo)


def paper() -> ConfigDict:
    """Clips of 3 to 5 s, records of 81 frames at 1280 x 704, as in appendix A and B."""
    return ConfigDict(
        {
            "name": "curation",
            "pairs": 8,  # places of a clip that the filters look at, two frames each
            "shots": {
                "seconds": (3.0, 5.0),
                "adaptive": 3.0,  # of PySceneDetect's adaptive detector: ratio to the neighbours
                "content": 7.0,  # least difference of a cut, 0 to 255
            },
            # Limits are (least, most); None is none.
            "person": {
                "weights": "weights/yolox_s.onnx",
                "score": 0.4,  # of a person, below which it is none
                "limits": {
                    "present": (0.99, None),  # share of the frames with anyone
                    "people": (1.0, 1.0),  # prominent ones
                    "area": (0.08, 0.9),  # of the person's box, share of the picture
                    "cut": (None, 0.5),  # share of the frames that cut off head or arms
                },
            },
            # Which way the person faces, by the joints of an ONNX file.
            "pose": {
                "weights": "weights/rtmpose_m.onnx",  # none: left out
                "score": 0.3,  # of a joint, below which it is not seen
                "angle": 60.0,  # degrees from the camera up to which a person faces it
                # That have to be in the picture: head, shoulders, elbows, wrists, hips, knees,
                # ankles.
                "parts": ("head", "shoulders", "hips"),
                "limits": {
                    "front": (0.3, None),  # share of the frames in which the person faces it
                    "first_turned": (None, 100.0),  # degrees in the first frame; 90 is a profile
                    "whole": (0.9, None),  # share of the frames with all parts in the picture
                },
            },
            "motion": {"limits": {"flow": (0.02, 2.0)}},  # heights of the picture a second
            "blur": {"limits": {"sharpness": (0.4, None)}},  # 0 to 1
            "technical": {
                "limits": {
                    "blocks": (None, 0.1),  # share of jumps at borders of blocks, beyond the usual
                    "brightness": (0.08, 0.95),  # mean, 0 to 1
                    "clipped": (None, 0.5),  # share of pixels that are black or white
                }
            },
            "aesthetics": {
                "weights": "weights/aesthetic",  # none: left out
                "limits": {"aesthetic": (4.5, None)},  # of the LAION head, about 1 to 10
            },
            # Captions and checks: an OpenAI-compatible endpoint; an empty url ends the run behind
            # the filters. `key` names the environment variable that holds the key.
            "vision": {
                "url": "",
                "model": "",
                "key": "",
                "timeout": 120.0,  # seconds for an answer
                "tries": 4,  # of a busy or silent server
                "answers": 3,  # that are asked for before a clip is refused
            },
            # Try-off and try-on: `images/edits` of an endpoint, or package.module:function.
            "editor": {
                "url": "",
                "local": "",
                "model": "",
                "key": "",
                "timeout": 300.0,
                "tries": 4,
                "pictures": 3,  # that are made before a clip is refused
                "most_alike": 0.9,  # cosine from which on two garments count as the same
            },
            "out": {
                "size": (1280, 704),
                "frames": 81,
                "fps": 24.0,
                "crf": 12,
                "shard_size": 40,  # records a file
                "table": True,  # write the clips as files with a table, too
            },
        }
    )


def demo() -> ConfigDict:
    """Small renders, for `--demo`."""
    config = paper()
    config.name = "demo"
    config.motion.limits.flow = (0.015, 3.0)
    config.blur.limits.sharpness = (0.55, None)
    config.vision.model = config.editor.model = "scripted"
    config.out.update(size=(128, 80), frames=25, fps=8.0, shard_size=4)
    return config
