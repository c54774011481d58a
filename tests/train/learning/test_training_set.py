from __future__ import annotations

import pytest
import torch

from mulki.data import folder_task
from mulki.methods.finetune import Finetune
from mulki.train.config.precision import Precision
from mulki.train.config.run_config import RunConfig
from mulki.train.learning.inputs import Training
from mulki.train.learning.training_set import class_moments, training_features
from tests import train_helpers

tiny_models = train_helpers.tiny_models
load_tiny = train_helpers.load_tiny
task_folders = train_helpers.task_folders


@pytest.mark.parametrize("size", [4, 256])
def test_all_images_in_their_order(load_tiny, task_folders, size):  # type: ignore[no-untyped-def]
    task, models = folder_task(task_folders[0]), [load_tiny(), load_tiny(seed=1)]
    training = Training(
        config=RunConfig(batch_size_eval=size),
        method=Finetune(Finetune.Options()),
        model=models[0],
        transform=models[0].preprocess,
        precision=Precision("fp32", torch.device("cpu")),
    )
    counts: list[int] = []
    parts = list(training_features(models, task.train, training, counts.append))
    assert sum(counts) == len(task.train) == 18 and max(counts) <= size
    pixels = [models[0].preprocess(task.train.load(i)) for i in range(18)]
    target = torch.tensor(list(task.train.targets))
    with torch.no_grad():
        for number, model in enumerate(models):
            model.eval()
            expected = model.encode_images(torch.stack(pixels))
            got = torch.cat([part[number] for part in parts])
            assert not got.requires_grad
            torch.testing.assert_close(got, expected)
    models[0].train()
    means, scatter = class_moments(task, training, counts.append)
    features = torch.cat([part[0] for part in parts]).double()
    centred = []
    for place in range(3):
        of_class = features[target == place]
        torch.testing.assert_close(
            means.means[place].double(), of_class.mean(dim=0), rtol=1e-4, atol=1e-6
        )
        centred.append(of_class - of_class.mean(dim=0))
        assert int(means.counts[place]) == len(of_class)
    whole = torch.cat(centred)
    torch.testing.assert_close(scatter.double(), whole.T @ whole, rtol=1e-3, atol=1e-6)
    assert (means.task, means.classes) == (task.name, task.classes)
    assert [list(p) for p in means.prompts] == task.prompts()
