"""What to do: from what was found to what can be changed in training, with the evidence (docs/acting.md)."""

from typing import Any

from collapse.diagnosis.result import Diagnosis
from collapse.spectra import Spectrum
from collapse.spectra.scale import NARROW, headline

# One line each, with its evidence.
STEPS = {
    "images": "measure again with at least {advised:,} images, 10 for each dimension.",
    "constant": "look at the loss, its temperature and a stop-gradient first; nothing is left to repair.",
    "augmentation": "weaken crops or colour jitter, or lower the temperature (theorem 1, figure 3; water_level.py).",
    "implicit": "use a nonlinear projector, fewer linear layers, less weight decay (figure 6; optimizers.py).",
    "rounding": "embed in float32 and measure again: below the floor nothing can be told (floor.py).",
    "killed": "measure the layer before {module}, which erases {killed} directions; then weaken the views (theorem 1).",
    "dead": "lower the learning rate, or take out the units that never fire (diagnosis.py).",
    "undiagnosed": "give views of each, views_file= or augmentations=, and causes are told apart.",
    "none": "nothing has to be done for rank; a probe tells whether it is of use.",
}
ADVICE = {
    "images": "Measure again with at least {advised:,} images (10 for each dimension). Nothing else here is sure.",
    "constant": "The network gives nearly one vector for all images. Look at the loss, its temperature and a "
    "stop-gradient or predictor first, then at the learning rate; complete collapse leaves nothing to repair.",
    "augmentation": "Augmentation outweighs signal along the collapsed directions (mechanism one of arXiv 2110.09348). "
    "Weaken the crops or the colour jitter, or train with a lower temperature, which lets weaker directions live. "
    "Caveat: weaker views may cost accuracy; a probe decides.",
    "implicit": "Signal outweighs augmentation along them, and yet they are small (mechanism two: several linear "
    "layers shrink small singular values). Put the loss behind a projector, or use DirectCLR; fewer linear layers in "
    "a row, or less weight decay, help too. Caveat: this cause is found by elimination.",
    "rounding": "They lie below the floor of rounding. Embed in float32, or give method=qr, before you conclude.",
    "killed": "The last linear map erases {killed} directions of its input; along {killed_augmentation} of them "
    "augmentation outweighs signal, which is mechanism one run to its end. Measure the layer before it: what is lost "
    "there is lost for good. Then weaken the views, or put the loss behind a projector.",
    "dead": "They are constant units, as a ReLU that never fires. Lower the learning rate or the weight decay, or "
    "start again from another seed; they can be taken out without loss.",
    "undiagnosed": "Nothing says why: give views of each (views_file= or augmentations=), and causes are told apart.",
    "none": "Nothing has to be done for rank. Rank is necessary, not sufficient: put a probe beside it.",
}


def first_step(s: Spectrum, diagnosis: Diagnosis | None) -> str:
    """What to do first, with the caveat."""
    cause, values = _chosen(s, diagnosis)
    return ADVICE[cause].format(**values)


def _chosen(s: Spectrum, diagnosis: Diagnosis | None) -> tuple[str, dict[str, Any]]:
    """(what the advice depends on, the numbers in it)."""
    colour = headline(s).colour
    if colour == "unknown":
        return "images", {"advised": 10 * s.dim}
    if colour == "green":
        return "none", {}
    if not s.effective_rank >= NARROW:
        return "constant", {}
    return _causes(diagnosis)[0][:2] if diagnosis else ("undiagnosed", {})


def step(s: Spectrum, diagnosis: Diagnosis | None) -> str:
    """What to do first, in one line."""
    cause, values = _chosen(s, diagnosis)
    return f"To do: {STEPS[cause].format(**values)}"


def advised(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """(cause and how many directions, what to do) of each cause in the last layer, the largest first."""
    return [(what, ADVICE[cause].format(**values)) for cause, values, what in _causes(diagnosis)]


def _causes(diagnosis: Diagnosis) -> list[tuple[str, dict[str, Any], str]]:
    """(what the advice depends on, the numbers in it, cause and count), the largest first."""
    block = diagnosis.blocks[-1]
    counts, last_map = block.attribution.counts(), block.last_map or {}
    causes = sorted(("augmentation", "implicit", "rounding", "dead"), key=lambda cause: -counts[cause])
    told = []
    for cause in (cause for cause in causes if counts[cause]):
        erased = cause == "rounding" and last_map.get("killed")
        told.append(("killed" if erased else cause, last_map, f"{cause}, {counts[cause]} directions"))
    return told or [("none", {}, "all alive")]
