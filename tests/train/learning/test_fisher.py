from __future__ import annotations

from dataclasses import replace

import torch

from mulki.data import Task
from mulki.train.config.precision import Precision
from mulki.train.learning.fisher import fisher_diagonal
from mulki.train.learning.inputs import TaskInputs, Training
from tests.train.learn_helpers import CONFIG, Load, method_named


def test_it_is_the_mean_of_squared_gradients(load_tiny: Load, task: Task) -> None:
    """Against the model in float64, image by image, over the same images and classes."""
    model = load_tiny()
    training = Training(
        config=replace(CONFIG, seed=5, batch_size_eval=2),
        method=method_named("ewc"),
        model=model,
        transform=model.preprocess,
        precision=Precision("fp32", torch.device("cpu")),
    )
    inputs = TaskInputs(2, task, {})
    found = fisher_diagonal(training, inputs, 7)
    again = fisher_diagonal(training, inputs, 7)
    assert all(torch.equal(value, again[name]) for name, value in found.items())

    generator = torch.Generator().manual_seed(7)
    places = torch.randperm(len(task.train), generator=generator)[:7].sort().values
    generator.manual_seed(7)
    draws = torch.rand(7, generator=generator, dtype=torch.float64)
    clip = model.clip.double()
    weights = model.trainable()
    sums = {name: torch.zeros_like(value) for name, value in weights.items()}
    classes = set()
    for place, draw in zip(places.tolist(), draws, strict=True):
        image = model.preprocess(task.train.load(place)).double()
        x = torch.nn.functional.normalize(clip.encode_image(image[None]), dim=1)
        w = torch.nn.functional.normalize(clip.encode_text(model.tokenizer(inputs.prompts)), dim=1)
        answers = (clip.logit_scale.exp() * x @ w.T).log_softmax(1)[0]
        drawn = int(torch.searchsorted(answers.detach().exp().cumsum(0), draw))
        classes.add(drawn)
        gradients = torch.autograd.grad(answers[drawn], list(weights.values()), allow_unused=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.square()
    assert found.keys() == sums.keys() and len(classes) > 1
    for name, total in sums.items():
        torch.testing.assert_close(found[name].double(), total / 7, rtol=1e-3, atol=1e-7)
    assert sum(float(value.sum()) for value in found.values()) > 0


def test_a_task_of_fewer_images_counts_each_once(load_tiny: Load, task: Task) -> None:
    model = load_tiny()
    training = Training(
        config=CONFIG,
        method=method_named("ewc"),
        model=model,
        transform=model.preprocess,
        precision=Precision("fp32", torch.device("cpu")),
    )
    whole, more = (
        fisher_diagonal(training, TaskInputs(0, task, {}), count)
        for count in (len(task.train), 1000)
    )
    assert all(torch.equal(value, more[name]) for name, value in whole.items())
