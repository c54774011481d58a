"""Models: any open_clip model as the student, behind the methods that training calls.

open_clip is imported when a model is loaded, not before.
"""

from mulki.clip.models.bundled import BUNDLED, quiet_transformers
from mulki.clip.models.loading import load
from mulki.clip.models.open_clip_models import PREPROCESS, RANDOM, TRUNK
from mulki.clip.models.vision_language import TEXT_BATCH, VisionLanguageModel

__all__ = [
    "BUNDLED",
    "PREPROCESS",
    "RANDOM",
    "TEXT_BATCH",
    "TRUNK",
    "VisionLanguageModel",
    "load",
    "quiet_transformers",
]
