"""The namespaces of the operators: `torch.ops.mulki`, and `torch.ops.mulki_cpp` of csrc/."""

from __future__ import annotations

import torch
from torch.library import Library

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
PUBLIC = Library("mulki", "DEF")
CPP = Library("mulki_cpp", "DEF")
