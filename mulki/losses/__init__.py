"""The losses as modules, for training loops that inject their loss.

`ClipLoss`, `SigLipLoss` and `DistillClipLoss` take open_clip's place: same constructors, same
calls, same values, gradients of the whole batch on any number of ranks. `DualTeacherClipLoss` adds
the second teacher. `MulKILoss` is composed in `mulki.stages.objective` and has its public name
here.
"""

from mulki.clip.features import Features
from mulki.losses.clip import ClipLoss
from mulki.losses.distill import DistillClipLoss, DualTeacherClipLoss
from mulki.losses.siglip import SigLipLoss
from mulki.stages.objective import MulKILoss

__all__ = [
    "ClipLoss",
    "DistillClipLoss",
    "DualTeacherClipLoss",
    "Features",
    "MulKILoss",
    "SigLipLoss",
]
