"""The teachers of a task: made before its first step, asked at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mulki.data.loader import batch_sizes, batches
from mulki.data.task import Task
from mulki.engine.config import RunConfig
from mulki.engine.distributed import World, text_features, text_inputs
from mulki.engine.precision import Precision
from mulki.features import Features
from mulki.methods import ZERO_SHOT, Method
from mulki.models import VisionLanguageModel
from mulki.prototypes import class_means
from mulki.teachers import Teacher


class Faculty:
    """The teachers of one task, one `Teacher` per distinct model.

    At the first task several names mean the original model, which is then asked once.

    Args:
        teachers: each with its model, in the order the losses get them.
        prototypes: [C, D] class means of the original model if the method wants them.
        precision: how their encoders compute.
        world: among whose processes the images are divided.
    """

    def __init__(
        self,
        teachers: Sequence[tuple[Teacher, VisionLanguageModel]],
        prototypes: Tensor | None,
        precision: Precision,
        world: World,
    ):
        self._teachers = list(teachers)
        self.prototypes = prototypes
        self._precision = precision
        self._world = world

    @classmethod
    @torch.no_grad()
    def assemble(
        cls,
        method: Method,
        task: Task,
        prompts: Sequence[str],
        frozen: Mapping[str, VisionLanguageModel],
        config: RunConfig,
        precision: Precision,
        world: World,
        *,
        deterministic: bool,
    ) -> Faculty:
        """Encode what is constant in a task: class texts, prototypes and, with them, all images.

        Args:
            frozen: the models behind `method.needs`, by the names in `mulki.methods`.
            prompts: one per class.
            deterministic: whether the training transform is, so that image features may be kept.
        """
        needs = method.needs
        names = [*needs.teachers, *([ZERO_SHOT] if needs.prototypes else [])]
        asked = list({id(frozen[name]): frozen[name] for name in names}.values())
        whole: list[Tensor] = []
        if needs.prototypes:
            whole, target = _encode_training_set(asked, task, config, precision, world)
        made: dict[int, Teacher] = {}
        for place, model in enumerate(asked):
            inputs = text_inputs(model, prompts, world)
            with precision.autocast():
                texts = text_features(model, inputs, world)
            prototypes = class_means(whole[place], target, len(task.classes)) if whole else None
            kept = len(task.train) if deterministic else None
            teacher = Teacher(texts, model.logit_scale, prototypes, kept)
            if whole:
                teacher.remember(whole[place])
            made[id(model)] = teacher
        teachers = [(made[id(frozen[name])], frozen[name]) for name in needs.teachers]
        original = made[id(frozen[ZERO_SHOT])].prototypes if needs.prototypes else None
        return cls(teachers, original, precision, world)

    @torch.no_grad()
    def answers(
        self, images: Tensor, places: Tensor, count: int, micro_batch: int
    ) -> tuple[Features, ...]:
        """What the teachers say of a batch, in their order.

        Args:
            images: this process's share of it.
            places: [count], of the whole batch in the training set, on the CPU.
            count: images in the whole batch.
            micro_batch: images encoded at a time.
        """

        def ask(teacher: Teacher, model: VisionLanguageModel) -> Features:
            def encode(new: Tensor) -> Tensor:
                return self._encode(model, images, new, count, micro_batch)

            return teacher.features(places, encode)

        said = {teacher: ask(teacher, model) for teacher, model in dict(self._teachers).items()}
        return tuple(said[teacher] for teacher, _ in self._teachers)

    def _encode(
        self,
        model: VisionLanguageModel,
        images: Tensor,
        new: Tensor,
        count: int,
        micro_batch: int,
    ) -> Tensor:
        # Every process encodes equally many, since they have to meet in the collectives; how many
        # the others have to encode follows from what all of them know.
        share = -(-count // self._world.size)
        of_process = torch.bincount(new // share, minlength=self._world.size).tolist()
        own = new[new // share == self._world.rank] - share * self._world.rank
        most = max(of_process)
        padded = torch.cat([own, own.new_zeros(most - len(own))]).to(images.device)
        features = []
        for part in padded.split(micro_batch):
            with self._precision.autocast():
                features.append(model.encode_images(images[part]))
        gathered = self._world.gather(torch.cat(features), most * self._world.size)
        wanted = [place * most + i for place, n in enumerate(of_process) for i in range(n)]
        return gathered if len(wanted) == len(gathered) else gathered[wanted]


def _encode_training_set(
    models: Sequence[VisionLanguageModel],
    task: Task,
    config: RunConfig,
    precision: Precision,
    world: World,
) -> tuple[list[Tensor], Tensor]:
    # Features [n, D] of each model, and targets [n]: one pass, since decoding costs as much as a
    # small encoder. With the evaluation transform, which equals the training transform when that
    # is deterministic.
    loader = batches(
        task.train,
        models[0].preprocess,
        config.batch_size_eval * world.size,
        shuffle=False,
        seed=config.seed,
        workers=config.workers,
        pin_memory=precision.device.type == "cuda",
        share=world.rows,
    )
    features: list[list[Tensor]] = [[] for _ in models]
    for (images, *_), count in zip(loader, batch_sizes(loader), strict=True):
        for model, of_model in zip(models, features, strict=True):
            with precision.autocast():
                of_model.append(world.gather(model.encode_images(images), count))
    target = torch.as_tensor(list(task.train.targets), device=models[0].device)
    return [torch.cat(parts) for parts in features], target
