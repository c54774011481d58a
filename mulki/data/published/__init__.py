"""Published data sets: facts, readers of their files on disk, downloads, and sequences of them.

Facts lie in `sets/`, a file each: class names, prompt templates, numbers of images, licence, home.
A *protocol* says which images are split how and which templates are used. `zscl` is that of the
MTIL benchmark (Zheng et al., ICCV 2023), on the files of torchvision; `coop` has the splits and
templates of CoOp (Zhou et al., IJCV 2022), which DIKI and its followers report on; `cil` is that of
class-incremental work. Figures of two protocols do not compare.
"""

from mulki.data.published.entries import PROTOCOLS, Entry, Protocol, entry, entry_names
from mulki.data.published.source import Source
from mulki.data.published.tasks import published_task

__all__ = [
    "PROTOCOLS",
    "Entry",
    "Protocol",
    "Source",
    "entry",
    "entry_names",
    "published_task",
]
