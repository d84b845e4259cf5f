"""Networks: any one's representation and layers by name (encoder); backbones and heads that are trained here."""

from collapse.models.backbones import make_backbone
from collapse.models.heads import HEADS, make_head

__all__ = ["HEADS", "make_backbone", "make_head"]
