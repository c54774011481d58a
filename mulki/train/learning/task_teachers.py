"""The teachers of a task: prepared before its first step, asked at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mulki.clip.features import Features
from mulki.clip.models import VisionLanguageModel
from mulki.clip.prototypes import class_means
from mulki.clip.teachers import Teacher
from mulki.clip.texts import text_features, text_inputs
from mulki.methods import ZERO_SHOT, Needs
from mulki.train.config.tasks import needs_of
from mulki.train.learning.anchor_texts import AnchorBatch
from mulki.train.learning.batches import Batch, PairBatch, kept_samples
from mulki.train.learning.inputs import TaskInputs, Training
from mulki.train.learning.stored_features import StoredFeatures, stored_sets
from mulki.train.learning.training_set import training_features


@dataclass(frozen=True)
class TaskTeachers:
    """The teachers of one task, one `Teacher` for each distinct model.

    At the first task the previous model is the start model. Without ``--original`` that is the
    original one too, which is then encoded once.

    Args:
        teachers: each with its model, in the order in which the losses get them.
        prototypes: [C, D] class means of the original model if the method needs them.
        training: how the encoders compute, and the processes that divide the images.
        needs: what of the method's losses they are to encode.
    """

    teachers: Sequence[tuple[Teacher, VisionLanguageModel]]
    prototypes: Tensor | None
    training: Training
    needs: Needs

    @classmethod
    @torch.no_grad()
    def prepare(
        cls,
        training: Training,
        inputs: TaskInputs,
        steps: int,
        encoded: Callable[[int], None] = lambda images: None,
    ) -> TaskTeachers:
        """Encode what is constant in a task: class texts and, for prototypes, all images.

        With a cache, that of the original model is read or made: images, reference set and anchors
        too. Otherwise these are encoded when they are first asked for.

        Args:
            steps: of the task.
            encoded: as `Listeners.encoded`.
        """
        task, frozen, world = inputs.task, inputs.frozen, training.world
        needs, prompts = needs_of(training.method, task), inputs.prompts
        kept = kept_samples(training, task, inputs.reference, steps)
        num_anchors = len(inputs.anchors) if inputs.anchors is not None else 0
        with_prototypes: list[str] = []
        if needs.prototypes:
            with_prototypes = [*(needs.teachers if needs.teacher_images else ()), ZERO_SHOT]
        distinct, encoding = (
            {id(frozen[name]): frozen[name] for name in names}
            for names in ([*needs.teachers, *with_prototypes], with_prototypes)
        )
        stored, sets = None, stored_sets(training, task, inputs.reference, steps)
        original = id(frozen.get(ZERO_SHOT))
        features: dict[int, Tensor] = {}
        if training.teacher_cache is not None and original in distinct:
            stored = StoredFeatures(training.teacher_cache, distinct[original], training)
            if encoding.pop(original, None) is not None or sets.images is not None:
                # The others are told of below, where they are encoded too.
                told = (lambda images: None) if encoding else encoded
                features[original] = stored.images(task.train, None, told)
        if encoding:
            parts = training_features([*encoding.values()], task.train, training, encoded)
            features |= zip(encoding, map(torch.cat, zip(*parts, strict=True)), strict=True)
        by_model: dict[int, Teacher] = {}
        for of, model in distinct.items():
            texts = torch.empty(0, 0, device=model.device)
            if prompts and stored is not None and of == original:
                texts = stored.texts(prompts).to(model.device)
            elif prompts:
                class_texts = text_inputs(model, prompts, world)
                with training.precision.autocast():
                    texts = text_features(model, class_texts, world)
            prototypes = None
            if of in features and needs.prototypes:
                target = torch.as_tensor(list(task.train.targets), device=model.device)
                images = features[of].to(model.device)
                prototypes = class_means(images, target, len(task.classes))
            teacher = Teacher(texts, model.logit_scale, prototypes, *kept, num_anchors)
            # A training transform that is another one gives other features, random or not.
            same = training.transform is training.model.preprocess
            if needs.teacher_images and of in features and same:
                teacher.remember(images=features[of])
            by_model[of] = teacher
        if stored is not None and ZERO_SHOT in needs.teachers:
            if sets.pairs is not None:
                by_model[original].remember(reference=stored.images(*sets.pairs, encoded))
            if inputs.anchors is not None and num_anchors:
                by_model[original].remember(anchors=stored.texts(inputs.anchors.prompts))
        teachers = [(by_model[id(frozen[name])], frozen[name]) for name in needs.teachers]
        constant = by_model[original].prototypes if needs.prototypes else None
        return cls(teachers, constant, training, needs)

    def state(self) -> list[dict[str, dict[str, Tensor]]]:
        """What the teachers keep beside what `prepare` makes."""
        return [teacher.state() for teacher in dict(self.teachers)]

    def restore(self, state: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> None:
        """Set what `state` returned."""
        for teacher, of_teacher in zip(dict(self.teachers), state, strict=True):
            teacher.restore(of_teacher)

    @torch.no_grad()
    def features(
        self, batch: Batch, micro_batch: int, anchors: AnchorBatch | None = None
    ) -> tuple[Features, ...]:
        """The features of each teacher for a batch, in the order of the teachers.

        Args:
            micro_batch: images encoded at a time.
            anchors: encoded as well, if the method needs any.
        """
        by_teacher = {}
        for teacher, model in dict(self.teachers).items():
            features = teacher.without_images()
            if self.needs.teacher_images:
                features = self._of_images(teacher, model, batch, micro_batch)
            if batch.reference is not None:
                pairs = self._of_reference(teacher, model, batch.reference, micro_batch)
                features = replace(features, reference=pairs)
            if anchors is not None:
                anchored = self._of_anchors(teacher, model, anchors)
                features = replace(features, anchored=anchored, num_seen=anchors.seen)
            by_teacher[teacher] = features
        return tuple(by_teacher[teacher] for teacher, _ in self.teachers)

    @torch.no_grad()
    def with_inputs(
        self, features: Sequence[Features], batch: Batch, micro_batch: int
    ) -> tuple[Features, ...]:
        """`features` of each teacher, with those of `batch.inputs`, which are never kept.

        Arguments as of `features`.
        """
        assert batch.inputs is not None
        parts, world, found = batch.inputs.split(micro_batch), self.training.world, {}
        for teacher, model in dict(self.teachers).items():
            here = torch.cat([self._images(model, part) for part in parts])
            found[teacher] = world.gather(here, len(batch.places))
        return tuple(
            replace(of, inputs=found[teacher])
            for of, (teacher, _) in zip(features, self.teachers, strict=True)
        )

    @torch.no_grad()
    def of_pairs(self, batch: PairBatch, micro_batch: int) -> tuple[Features, ...]:
        """The features of each teacher for a batch of a task of captions, whose texts are they.

        Arguments as of `features`.
        """
        found = {
            teacher: self._of_reference(teacher, model, batch, micro_batch)
            for teacher, model in dict(self.teachers).items()
        }
        return tuple(found[teacher] for teacher, _ in self.teachers)

    def _images(self, model: VisionLanguageModel, images: Tensor) -> Tensor:
        with self.training.precision.autocast():
            return model.encode_images(images)

    def _of_images(
        self, teacher: Teacher, model: VisionLanguageModel, batch: Batch, micro_batch: int
    ) -> Features:
        def encode(rows: Tensor) -> Tensor:
            return self._images(model, batch.images[rows.to(batch.images.device)])

        count = len(batch.places)
        return teacher.features(
            batch.places, lambda new: self._encode(encode, new, count, micro_batch)
        )

    def _of_reference(
        self,
        teacher: Teacher,
        model: VisionLanguageModel,
        batch: PairBatch,
        micro_batch: int,
    ) -> Features:
        def encode(rows: Tensor) -> Tensor:
            images = self._images(model, batch.images[rows.to(batch.images.device)])
            if not self.needs.captions:
                return images
            texts = model.text_inputs([batch.captions[row] for row in rows.tolist()])
            with self.training.precision.autocast():
                return torch.cat([images, model.encode_texts(texts)], dim=1)

        count = len(batch.places)
        return teacher.reference_features(
            batch.places,
            lambda new: self._encode(encode, new, count, micro_batch),
            captions=self.needs.captions,
        )

    def _of_anchors(
        self, teacher: Teacher, model: VisionLanguageModel, batch: AnchorBatch
    ) -> Tensor:
        def encode(rows: Tensor) -> Tensor:
            with self.training.precision.autocast():
                return text_features(
                    model, batch.inputs[rows.to(batch.inputs.device)], self.training.world
                )

        return teacher.anchored(batch.places, encode)

    def _encode(
        self, encode: Callable[[Tensor], Tensor], new: Tensor, count: int, micro_batch: int
    ) -> Tensor:
        # Features of the places `new` in a batch of `count`, each encoded by the process that has
        # it in its part. Every process encodes equally many, since all have to take part in the
        # collectives of a sharded encoder; all know from `new` how many that is.
        world = self.training.world
        length = -(-count // world.size)
        of_process = torch.bincount(new // length, minlength=world.size).tolist()
        here = new[new // length == world.rank] - length * world.rank
        most = max(of_process)
        padded = torch.cat([here, here.new_zeros(most - len(here))])
        features = torch.cat([encode(part) for part in padded.split(micro_batch)])
        gathered = world.gather(features, most * world.size)
        wanted = [place * most + i for place, n in enumerate(of_process) for i in range(n)]
        return gathered if len(wanted) == len(gathered) else gathered[wanted]
