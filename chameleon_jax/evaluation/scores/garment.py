"""Is the garment the right one, by a vision-language model: HGC, LGC and NTP of HGC-Bench.

One question a video: the person's picture, the garment's picture, the video; three whole numbers
from 1 to 5 come back as JSON (arXiv 2605.15824, sections F and N). The paper asks Gemini-3.0. The
criteria below are the paper's, the words are ours; `--vlm_prompt FILE` asks with other words, such
as those of its section N. A reply that is no such JSON is asked again; if all are none, the sample
is missing, never 0. What was replied, by which model, and which words asked, is kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from chameleon_jax.evaluation.scores.base import Metric, Needs, spread
from chameleon_jax.evaluation.scores.pictures import film, to_send
from chameleon_jax.vlm import JunkError, Part, ask, prompt_hash

KEYS = {
    "high-level garment consistency": "hgc",
    "low-level garment consistency": "lgc",
    "non-target garment preservation": "ntp",
}
FPS = 24.0  # of the film that is sent; that of the paper's videos
FRAMES = 16  # that are sent, where no film can be

PROMPT = """\
You judge a video that was made by a model for virtual try-on.

You are given:
- [Image 1], a person. The video should show this person, in this place, in the same other clothes.
- [Image 2], a garment. In the video the person should wear it.
- [Video 1], the video to be judged.

Give three marks. Each is a whole number: 5 is perfect, 4 good, 3 fair, 2 poor, 1 wrong.

"high-level garment consistency": does the person wear the garment of [Image 2], seen from afar?
Look at its kind, its cut and fit, where its large areas of colour are, and its style. Other clothes
do not count.

"low-level garment consistency": are the details of the garment of [Image 2] right, seen from close
by? Look at prints and stripes, logos and letters, stitching, the weave and shine of the fabric.
Other clothes do not count. If a pattern is clearly distorted, a logo is blurred, or the fabric is a
different one, this mark is 2 at the most.

"non-target garment preservation": is all the rest that the person wears, other clothes, shoes and
accessories, as in [Image 1]? Look at its style, colour and fabric, and whether anything is missing
or was added.

Reply with one JSON object and nothing else, with exactly these keys:
{"high-level garment consistency": 1 to 5, "low-level garment consistency": 1 to 5, \
"non-target garment preservation": 1 to 5}
"""


class Garment(Metric):
    """The three marks of one question."""

    name = "garment"
    columns = ("hgc", "lgc", "ntp")
    needs = Needs(endpoint="vlm")

    @property
    def prompt(self) -> str:
        return self.setup.prompt or PROMPT

    def about(self) -> dict[str, Any]:
        endpoint = self.setup.vlm
        return super().about() | {
            "model": endpoint.model,
            "prompt": prompt_hash(self.prompt),
            "sees": self._sees(),
        }

    def _sees(self) -> str:
        """What of a video is shown to the model."""
        if self.setup.vlm.api != "gemini":
            return f"{self.setup.frames or FRAMES} frames"
        return "film" if self.setup.frames is None else f"{self.setup.frames} frames of the film"

    def score(
        self, reference: np.ndarray, garment: np.ndarray, video: np.ndarray, prompt: str
    ) -> dict[str, Any]:
        parts: list[Part] = ["[Image 1]", to_send(reference), "[Image 2]", to_send(garment)]
        parts.append("[Video 1]")
        if self.setup.vlm.api == "gemini":
            parts.append(film(video, FPS, self.setup.frames))
        else:
            parts += [to_send(video[i]) for i in spread(len(video), self.setup.frames or FRAMES)]
        parts.append("The JSON object:")
        reply = ask(self.setup.vlm, parts, marks, system=self.prompt, sleep=self.setup.sleep)
        found = reply.value or dict.fromkeys(self.columns)
        kept = {"raw": list(reply.raw), "model": reply.model, "prompt": prompt_hash(self.prompt)}
        if reply.faults:
            kept["faults"] = list(reply.faults)
        if reply.value is None:
            kept["why"] = f"no usable reply in {reply.requests}: {reply.faults[-1]}"
        return found | kept


def marks(found: dict[str, Any]) -> dict[str, int]:
    """The three marks of a reply.

    Raises:
      JunkError: other keys, or a mark that is no whole number from 1 to 5.
    """
    if set(found) != set(KEYS):
        raise JunkError(f"keys {sorted(found)}; expected {', '.join(KEYS)}")
    for key, mark in found.items():
        number = isinstance(mark, int | float) and not isinstance(mark, bool)
        if not number or mark not in (1, 2, 3, 4, 5):
            raise JunkError(f"{key} is {mark!r}; expected a whole number from 1 to 5")
    return {KEYS[key]: int(mark) for key, mark in found.items()}
