"""CLIP-like models: what one computes for a batch, how it is loaded, and how good it is.

open_clip is imported when a model is loaded, not before: losses need `Features` alone.
"""

from mulki.clip.features import Features
from mulki.clip.prototypes import Prototypes, class_means

__all__ = ["Features", "Prototypes", "class_means"]
