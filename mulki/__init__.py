"""mulki: teach a CLIP-like model new tasks without forgetting.

MulKI (arXiv 2411.06764), reimplemented from its published description. Losses are functions in
`mulki.functional` and modules in `mulki.losses`; both work on `Similarity`.
"""

from mulki import functional, losses
from mulki.similarity import Similarity

__version__ = "0.1.0"

__all__ = ["Similarity", "functional", "losses"]
