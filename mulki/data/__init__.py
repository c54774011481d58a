"""Tasks and where they come from. Loading images in batches is in `mulki.data.loader`."""

from mulki.data.decoding import BadImage
from mulki.data.folders import folder_task
from mulki.data.registry import load_sequence, register_sequence, sequence_names
from mulki.data.task import ImageSet, Task

__all__ = [
    "BadImage",
    "ImageSet",
    "Task",
    "folder_task",
    "load_sequence",
    "register_sequence",
    "sequence_names",
]
