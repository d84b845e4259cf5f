"""Where and why a network collapses: what every block keeps of the images, what it loses, and to what.

measuring  one pass over augmented views;  result  what was found;  wording  it in words;  page  it as a page
"""

from collapse.diagnosis.measuring import before_crop, describe, diagnose, last_map, paper_augmentations
from collapse.diagnosis.result import Block, Diagnosis
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
