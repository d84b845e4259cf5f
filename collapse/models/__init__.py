"""Networks that are trained here: backbones, images -> representation, and heads, representation -> embedding."""

from collapse.models.backbones import make_backbone
from collapse.models.heads import HEADS, make_head

__all__ = ["HEADS", "make_backbone", "make_head"]
