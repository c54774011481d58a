"""Each term of the objective by its formula, on stored matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F

RELATIONS = ("image_text", "image_image", "text_image", "text_text")


def expected_relation(model, name):
    """The stored matrix of a relation, by its formula."""
    left, right = {
        "image_text": (model.images, model.texts),
        "image_image": (model.images, model.prototypes),
        "text_image": (model.texts, model.prototypes),
        "text_text": (model.texts, model.texts),
        "image_anchor": (model.images, model.anchored),
        "text_anchor": (model.texts, None if model.anchored is None else model.anchored[4:]),
    }[name]
    return model.scale * left @ right.T


def expected_kl(student, teachers, name, weights, temperature=2.0):
    log_q = F.log_softmax(expected_relation(student, name) / temperature, dim=1)
    total = 0.0
    for k, t in enumerate(teachers):
        p = F.softmax(expected_relation(t, name) / temperature, dim=1)
        total = total + weights[:, k] * F.kl_div(log_q, p, reduction="none").sum(dim=1)
    return temperature**2 * total.mean()


def expected_label_weights(teachers, target, temperature=2.0):
    log_p = [F.log_softmax(expected_relation(t, "image_text") / temperature, 1) for t in teachers]
    return torch.stack([v[torch.arange(len(target)), target] for v in log_p], dim=1).softmax(dim=1)


def expected_class_weights(weights, target, num_classes):
    rows = []
    for c in range(num_classes):
        of_class = weights[target == c]
        rows.append(of_class.mean(0) if len(of_class) else torch.full_like(weights[0], 0.5))
    return torch.stack(rows)


def expected_feature(student, teachers, weights):
    total = 0.0
    for b in range(len(weights)):
        for k, t in enumerate(teachers):
            total = total + weights[b, k] * ((student.images[b] - t.images[b]) ** 2).sum()
    return total / len(weights)
