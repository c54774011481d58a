"""Tasks and where they come from. Loading images in batches is in `mulki.data.loader`."""

from mulki.data.caption_files import caption_task
from mulki.data.caption_task import CaptionedImages, CaptionTask
from mulki.data.class_steps import class_steps
from mulki.data.csv_files import csv_task
from mulki.data.datasets import DatasetImages, dataset_task
from mulki.data.decoding import BadImage
from mulki.data.folders import folder_task
from mulki.data.huggingface_tasks import huggingface_task
from mulki.data.published import Source
from mulki.data.sequences import load_sequence, register_sequence, sequence_names
from mulki.data.shard_tasks import shard_task
from mulki.data.task import ImageSet, Task
from mulki.data.transforms import register_transform, transform_names

__all__ = [
    "BadImage",
    "CaptionTask",
    "CaptionedImages",
    "DatasetImages",
    "ImageSet",
    "Source",
    "Task",
    "caption_task",
    "class_steps",
    "csv_task",
    "dataset_task",
    "folder_task",
    "huggingface_task",
    "load_sequence",
    "register_sequence",
    "register_transform",
    "sequence_names",
    "shard_task",
    "transform_names",
]
