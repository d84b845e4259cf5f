"""A checkpoint of anybody -> an encoder with every weight accounted for.

Rules instead of a registry of projects: read the tensors (containers.py, folders.py), join nested keys with dots and
drop wrapper names (keys.py), find each encoder by the pair of keys that only its family has (families.py), choose the
branch its authors evaluate, read the architecture from the shapes (resnet.py, selective.py, vit.py, pyramids.py,
library.py), load strictly (plan.py), find the projector (projector.py), and report what every other tensor was.  What
cannot be known from the file takes a documented default with a warning, or a flag.  A partly loaded network is never
returned.
"""

from collapse.checkpoints.loading import inspect, load, loaded
from collapse.checkpoints.plan import Overrides
from collapse.checkpoints.report import Checkpoint
from collapse.models.encoder import Encoder, Layer, LayerHooks, Module
from collapse.moved import renamed

__all__ = ["Checkpoint", "Encoder", "Layer", "LayerHooks", "Module", "Overrides", "inspect", "load", "loaded"]

__getattr__ = renamed(__name__)
