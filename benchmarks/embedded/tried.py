"""Ideas of the field beside MulKI: KL both ways, a Kronecker anchor, projection, crafted images.

    python -m benchmarks.embedded.tried [--jobs 2]

Orders III and IV, held-out training images, seed 100, as `studies.held`. The ideas are not options
of the package: this script sets them on the class `MulKI` in its own process. Results are printed.

    preset                 for comparison, on the same CPU
    kl both ways           + 0.5 (KL over classes of earlier tasks, for each made image, at
                           temperature 5, + KL over the made images of a batch, for each text of an
                           earlier class, at temperature 0.1 of the cosines), from the previous
                           model (DuLBE)
    kronecker b            in place of lambda |dW|^2 on 1 x 1 convolutions and linear layers of the
                           image tower: b sum tr(B dW A dW^T), A the inputs' second moments (mean
                           over tasks), B those of gradients of a random projection of the feature
                           (sum over tasks), of 256 images of each earlier task (TAK)
    projected e            updates of these layers leave out the directions that hold the share e of
                           the inputs' energy in earlier tasks (KeepLoRA's T, on all weights)
    crafted                made images replaced by images of the task after 10 steps of 1/255 along
                           the sign of the previous model's gradient towards the text and the kept
                           mean of a class of an earlier task, or towards a word; as many of each
    made and crafted       both
    crafted, no teacher    MulKI without distillation: how far the features of crafted images move
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.embedded import compare, studies
from mulki.clip.evaluation import zero_shot_classifier
from mulki.clip.texts import text_inputs
from mulki.data.loader import batches
from mulki.data.made_images import MadeImages
from mulki.data.reference import ReferenceSet
from mulki.data.subset import Subset, permutation
from mulki.data.vocabulary import TEMPLATE, imagenet_vocabulary
from mulki.methods.keeplora import missing_directions
from mulki.methods.mulki import MulKI
from mulki.train import task_learner

_SAMPLE = 256


class Idea:
    """Nothing beside the preset; subclasses change what they need."""

    def start(self, training: Any, inputs: Any) -> Any:
        return inputs

    def losses(self, student: Any, teachers: Any) -> dict[str, Tensor]:
        return {}

    def penalties(self) -> dict[str, Tensor]:
        return {}

    def before_step(self) -> None:
        pass

    def after_step(self) -> None:
        pass

    def end(self, training: Any, inputs: Any) -> None:
        pass


def _texts(model: Any, prompts: list[list[str]]) -> Tensor:
    flat = [text for of_class in prompts for text in of_class]
    return zero_shot_classifier(model, text_inputs(model, flat), [*map(len, prompts)]).detach()


def _images(training: Any, task: Any, count: int) -> Tensor:
    places = sorted(permutation(len(task.train), training.config.seed)[:count])
    loader = batches(Subset(task.train, places), training.model.preprocess, 64)
    return torch.cat([pixels for pixels, *_ in loader])


class BothWays(Idea):
    def __init__(self) -> None:
        self.prompts: list[list[str]] = []
        self.seen: Tensor | None = None

    def start(self, training: Any, inputs: Any) -> Any:
        self.seen = _texts(training.model, self.prompts) if self.prompts else None
        self.scale = float(training.model.logit_scale)
        return inputs

    def losses(self, student: Any, teachers: Any) -> dict[str, Tensor]:
        if self.seen is None:
            return {}
        mine = student.reference.images @ self.seen.mT
        theirs = teachers[-1].reference.images @ self.seen.mT
        total = mine.new_zeros(())
        for temperature, dim in ((5 / self.scale, 1), (0.1, 0)):
            wanted = (theirs / temperature).log_softmax(dim)
            got = (mine / temperature).log_softmax(dim)
            total = total + (wanted.exp() * (wanted - got)).sum(dim).mean()
        return {"both_ways_loss": 0.5 * total}

    def end(self, training: Any, inputs: Any) -> None:
        self.prompts += [list(of) for of in inputs.task.prompts()]


def _layers(model: Any) -> dict[str, Any]:
    found = {}
    for name, module in model.clip.visual.named_modules():
        pointwise = (
            isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        )
        if pointwise or isinstance(module, nn.Linear):
            found[name] = module
    return found


def _rows(x: Tensor) -> Tensor:
    # [B, P, C] of maps or vectors.
    return x.flatten(2).mT if x.dim() == 4 else x[:, None]


def _matrix(module: Any) -> Tensor:
    return module.weight.flatten(1)


class Kronecker(Idea):
    def __init__(self, strength: float):
        self.strength = strength
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.tasks = 0

    def start(self, training: Any, inputs: Any) -> Any:
        self.layers = _layers(training.model)
        self.before = {n: _matrix(of).detach().clone() for n, of in self.layers.items()}
        covered = {id(of.weight) for of in self.layers.values()} if self.tasks else set()
        self.others = [p for p in training.model.trainable().values() if id(p) not in covered]
        self.others_before = [p.detach().clone() for p in self.others]
        return inputs

    def penalties(self) -> dict[str, Tensor]:
        total = 0.1 * sum(
            (p - old).square().sum() for p, old in zip(self.others, self.others_before, strict=True)
        )
        for name, module in self.layers.items() if self.tasks else ():
            moved = _matrix(module) - self.before[name]
            mean = self.inputs[name] / self.tasks
            total = total + self.strength * (self.outputs[name] @ moved @ mean * moved).sum()
        return {"kronecker_loss": torch.as_tensor(total)}

    def end(self, training: Any, inputs: Any) -> None:
        model, kept = training.model, {}
        pixels = _images(training, inputs.task, _SAMPLE)

        def listen(name: str) -> Any:
            def hook(module: Any, given: Any, out: Tensor) -> None:
                kept[name] = (given[0].detach(), out)

            return hook

        handles = [of.register_forward_hook(listen(n)) for n, of in self.layers.items()]
        generator = torch.Generator().manual_seed(0)
        model.eval()
        for part in pixels.split(32):
            features = model.encode_images(part)
            along = torch.randn(features.shape, generator=generator)
            names = list(kept)
            gradients = torch.autograd.grad((features * along).sum(), [kept[n][1] for n in names])
            for name, gradient in zip(names, gradients, strict=True):
                # Positions add up in A and have their mean in B (Grosse and Martens, 2016).
                a, g = _rows(kept[name][0]).float(), _rows(gradient).float()
                of_inputs = torch.einsum("bpi,bpj->ij", a, a) / len(pixels)
                of_outputs = torch.einsum("bpi,bpj->ij", g, g) / g.shape[1] / len(pixels)
                self.inputs[name] = self.inputs.get(name, 0) + of_inputs
                self.outputs[name] = self.outputs.get(name, 0) + of_outputs
            kept.clear()
        for handle in handles:
            handle.remove()
        self.tasks += 1


class Projected(Idea):
    def __init__(self, energy: float):
        self.energy = energy
        self.held: dict[str, Tensor] = {}

    def start(self, training: Any, inputs: Any) -> Any:
        self.layers = _layers(training.model)
        return inputs

    @torch.no_grad()
    def before_step(self) -> None:
        self.before = {n: _matrix(of).clone() for n, of in self.layers.items() if n in self.held}

    @torch.no_grad()
    def after_step(self) -> None:
        for name, held in self.held.items():
            weight = _matrix(self.layers[name])
            moved = weight - self.before[name]
            weight.copy_(self.before[name] + moved - moved @ held @ held.mT)

    @torch.no_grad()
    def end(self, training: Any, inputs: Any) -> None:
        sums: dict[str, Tensor] = {}

        def listen(name: str) -> Any:
            def hook(module: Any, given: Any) -> None:
                rows = _rows(given[0]).flatten(0, 1).float()
                sums[name] = sums.get(name, 0) + rows.mT @ rows

            return hook

        handles = [of.register_forward_pre_hook(listen(n)) for n, of in self.layers.items()]
        training.model.eval()
        for part in _images(training, inputs.task, _SAMPLE).split(64):
            training.model.encode_images(part)
        for handle in handles:
            handle.remove()
        for name, moments in sums.items():
            held = self.held.get(name, moments.new_zeros(len(moments), 0))
            new = missing_directions(moments, held, self.energy)
            self.held[name] = torch.cat([held, new], dim=1)
        free = 1 - sum(h.shape[1] for h in self.held.values()) / sum(map(len, self.held.values()))
        print(f"    {inputs.task.name}: {free:.2f} of the directions are free", flush=True)


@dataclass
class Pictures:
    """An `ImageSet` in memory."""

    pictures: list[Any]
    targets: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pictures)

    def load(self, index: int) -> Any:
        return self.pictures[index]

    def name(self, index: int) -> str:
        return f"crafted {index}"

    def fingerprint(self) -> str:
        return str(len(self))


class Crafted(Idea):
    def __init__(self, *, made: bool = False, used: bool = True):
        self.made, self.used = made, used
        self.prompts: list[list[str]] = []
        self.means: list[Tensor] = []
        self.moved: list[tuple[float, float]] = []

    def start(self, training: Any, inputs: Any) -> Any:
        started = time.perf_counter()
        # The student as it is now: without distillation there is no previous model.
        teacher, task, config = training.model.frozen_copy(), inputs.task, training.config
        generator = torch.Generator().manual_seed(config.seed + inputs.index)
        pixels = _images(training, task, len(task.train))
        count = len(pixels)
        words = imagenet_vocabulary().words
        drawn = [words[i] for i in torch.randint(len(words), (count,), generator=generator)]
        wanted = _texts(teacher, [[TEMPLATE.format(word)] for word in drawn])
        also = wanted.clone()
        rows = torch.arange(count)
        with torch.no_grad():
            features = torch.cat([teacher.encode_images(x) for x in pixels.split(128)])
        if self.prompts:
            texts, means = _texts(teacher, self.prompts), torch.cat(self.means)
            each = max(1, count // 2 // len(texts))
            # For each class of an earlier task the images that the teacher sees nearest to it.
            nearest = (texts @ features.mT).topk(min(each, count), dim=1).indices
            place = torch.randperm(count, generator=generator)[: nearest.numel()]
            of_class = torch.arange(len(texts)).repeat_interleave(nearest.shape[1])[: len(place)]
            rows[place] = nearest.flatten()[: len(place)]
            wanted[place], also[place] = texts[of_class], F.normalize(means[of_class], dim=1)
        start = pixels[rows]
        crafted = []
        for x, text, mean in zip(start.split(64), wanted.split(64), also.split(64), strict=True):
            for _ in range(10):
                x = x.detach().requires_grad_()
                found = teacher.encode_images(x)
                loss = -(found * text).sum() - (found * mean).sum()
                (gradient,) = torch.autograd.grad(loss, x)
                # Pixels lie in [-1, 1], so 1/255 of their range is 2/255.
                x = (x - 2 / 255 * gradient.sign()).clamp(-1, 1)
            crafted.append(x.detach())
        self.crafted, self.own, self.teacher = torch.cat(crafted), pixels, teacher
        with torch.no_grad():
            after = torch.cat([teacher.encode_images(x) for x in self.crafted.split(128)])
        before, now = (float((f * wanted).sum(dim=1).mean()) for f in (features[rows], after))
        print(
            f"    {task.name}: {count} images in {time.perf_counter() - started:.0f} s, cosine to "
            f"their texts {before:.3f} to {now:.3f}",
            flush=True,
        )
        if not self.used:
            return inputs
        bytes_ = ((self.crafted + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        pictures = [Image.fromarray(x.numpy()) for x in bytes_]
        if self.made:
            of = MadeImages(task.train, config.reference_changes, config.seed)
            pictures += [of.load(i) for i in range(len(of))]
        images = Pictures(pictures, [0] * len(pictures))
        reference = ReferenceSet(images, None)  # type: ignore[arg-type]
        return replace(inputs, reference=reference)

    @torch.no_grad()
    def end(self, training: Any, inputs: Any) -> None:
        training.model.eval()
        found = []
        for images in (self.crafted, self.own):
            sample = images[torch.arange(0, len(images), max(1, len(images) // _SAMPLE))]
            a, b = (
                torch.cat([m.encode_images(x) for x in sample.split(64)])
                for m in (self.teacher, training.model)
            )
            found.append(float((1 - (a * b).sum(dim=1)).mean()))
        print(f"    {inputs.task.name}: 1 - cosine crafted {found[0]:.4f}, own {found[1]:.4f}")
        self.prompts += [list(of) for of in inputs.task.prompts()]
        target = torch.as_tensor(list(inputs.task.train.targets))
        loader = batches(inputs.task.train, training.model.preprocess, 128)
        features = torch.cat([training.model.encode_images(x) for x, *_ in loader])
        sums = torch.zeros(len(inputs.task.classes), features.shape[1])
        sums.index_add_(0, target, features)
        self.means.append(sums)


IDEAS: dict[str, tuple[Any, dict[str, Any]]] = {
    "preset": (Idea, {}),
    "kl both ways": (BothWays, {}),
    "kronecker 1": (lambda: Kronecker(1.0), {"l2": 0.0}),
    "kronecker 10": (lambda: Kronecker(10.0), {"l2": 0.0}),
    "projected 0.9": (lambda: Projected(0.9), {}),
    "projected 0.99": (lambda: Projected(0.99), {}),
    "crafted": (Crafted, {}),
    "made and crafted": (lambda: Crafted(made=True), {}),
    "crafted, no teacher": (
        lambda: Crafted(used=False),
        {"feature": 0.0, "feature_original": 0.0, "image_anchor": 0.0},
    ),
}


def carry_out(name: str, order: str) -> dict[str, float]:
    """Run one idea on one order, in this process, and return its metrics."""
    make, options = IDEAS[name]
    idea: Idea = make()
    learn, losses, penalties = task_learner.learn_task, MulKI.losses, MulKI.penalties

    def learned(training: Any, inputs: Any, *others: Any) -> int:
        inputs = idea.start(training, inputs)
        steps = learn(training, inputs, *others)
        idea.end(training, inputs)
        return steps

    task_learner.learn_task = learned
    MulKI.losses = lambda self, s, t, y: losses(self, s, t, y) | idea.losses(s, t)
    MulKI.penalties = lambda self: penalties(self) | idea.penalties()
    MulKI.before_step = lambda self, weights: idea.before_step()
    after = MulKI.after_step

    def stepped(self: Any, step: int) -> None:
        idea.after_step()
        after(self, step)

    MulKI.after_step = stepped
    given = {"order": order, "seed": studies.TUNING_SEEDS[0], "method": "mulki"} | options
    run = compare.Run("held", name, given)
    started = time.perf_counter()
    found = compare.one_run(run, compare.fingerprint(), 1)
    names = ("transfer", "average", "last", "forgetting")
    return {n: found[n] for n in names} | {"seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--ideas", nargs="+", default=list(IDEAS))
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    # A process for each run, since the ideas change a class.
    with ProcessPoolExecutor(given.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        runs = {
            pool.submit(carry_out, name, order): (name, order)
            for name in given.ideas
            for order in studies.FORM_ORDERS
        }
        for future, (name, order) in runs.items():
            shown = " ".join(f"{k} {v:.2f}" for k, v in future.result().items())
            print(f"{name} | {order} | {shown}", flush=True)


if __name__ == "__main__":
    main()
