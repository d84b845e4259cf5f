"""Where and why a network collapses: what every block keeps of the images, what it loses, and to what.

views      what is compared;  layers  each layer's covariances and blocks;  measuring  one pass over the views
result     what was found;  wording  it in words;  page  it as a page;  onepage  the whole report
"""

from collapse.diagnosis.layers import last_map
from collapse.diagnosis.measuring import diagnose
from collapse.diagnosis.result import Block, Diagnosis
from collapse.diagnosis.views import before_crop, describe, paper_augmentations
from collapse.encoders.networks import as_encoder

__all__ = [
    "Block",
    "Diagnosis",
    "as_encoder",
    "before_crop",
    "describe",
    "diagnose",
    "last_map",
    "paper_augmentations",
]
