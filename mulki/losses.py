"""The losses as modules, for training loops that inject their loss.

`MulKILoss` is composed in `mulki.stages.objective` and has its public name here.
"""

from mulki.features import Features
from mulki.stages.objective import MulKILoss

__all__ = ["Features", "MulKILoss"]
