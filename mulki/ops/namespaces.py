"""The namespaces of the operators: `torch.ops.mulki`, and `torch.ops.mulki_cpp` of csrc/."""

from __future__ import annotations

import torch
from torch.library import Library

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
PUBLIC = Library("mulki", "DEF")
CPP = Library("mulki_cpp", "DEF")
#: grad * stored in the dtype of `like`: the backward of an operator that stored its gradients, here
#: and in csrc/. `tie` is zero, and depends on all leaves of the operator.
SCALED = "scaled(Tensor grad, Tensor stored, Tensor like, Tensor tie) -> Tensor"
