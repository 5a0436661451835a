"""The scores that there are, and what their figures are called in tables."""

from __future__ import annotations

from chameleon_jax.evaluation.scores.base import Metric
from chameleon_jax.evaluation.scores.flow import AmpOpenS2V, AmpPaper, SmooFlow
from chameleon_jax.evaluation.scores.garment import Garment
from chameleon_jax.evaluation.scores.identity import Arc, Cur, SFace
from chameleon_jax.evaluation.scores.quality import Amt, Musiq, QAlign, Sharpness
from chameleon_jax.evaluation.scores.text import Clip, Gme

METRICS: dict[str, type[Metric]] = {
    metric.name: metric
    for metric in (
        Cur,
        Arc,
        SFace,
        Gme,
        Clip,
        AmpPaper,
        AmpOpenS2V,
        QAlign,
        Amt,
        SmooFlow,
        Musiq,
        Sharpness,
        Garment,
    )
}

# What tables call the figures. A stand-in is on another scale than the paper's figure.
TITLES = {
    "cur": "identity, CurricularFace, as OpenS2V",
    "cur_plain": "identity, CurricularFace, plain mean",
    "arc": "identity, ArcFace, as OpenS2V",
    "arc_plain": "identity, ArcFace, plain mean",
    "sface": "identity, SFace, as OpenS2V (stand-in)",
    "sface_plain": "identity, SFace, plain mean (stand-in)",
    "gme": "text, GME",
    "clip": "text, CLIP (stand-in)",
    "amp_paper": "motion, as the paper says",
    "amp_opens2v": "motion, as OpenS2V",
    "smoo_opens2v": "smoothness, frames whose Q-Align does not jump, as OpenS2V",
    "smoo_qalign": "smoothness, mean of Q-Align",
    "smoo_amt": "smoothness, AMT, as VBench",
    "smoo_flow": "smoothness, flow (stand-in)",
    "vq_musiq": "quality, MUSIQ on SPAQ",
    "vq_sharpness": "sharpness (stand-in)",
    "hgc": "garment, high level (HGC)",
    "lgc": "garment, low level (LGC)",
    "ntp": "other clothes (NTP)",
    "fps_paper": "frames a second, as the paper: of the whole clip, denoising alone",
    "fps_denoise": "frames a second, last chunk, denoising alone",
    "fps_decoded": "frames a second, last chunk, frames on the host",
}
