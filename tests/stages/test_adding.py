from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mulki.stages import adding
from tests.stages.formulas import RELATIONS, expected_feature, expected_kl, expected_relation


class TestAdding:
    @pytest.mark.parametrize("name", RELATIONS)
    def test_relations_are_their_matrices(self, student, name):
        relation = adding.RELATIONS[name]
        rows, columns, scale = relation(student)
        got = scale * rows @ columns.T
        torch.testing.assert_close(got, expected_relation(student, name))
        assert len(got) == (6 if name in adding.IMAGE_ROWS else 4)

    def test_relations_that_need_prototypes_say_so(self, student):
        bare = replace(student, prototypes=None)
        for name, relation in adding.RELATIONS.items():
            if name in adding.NEED_PROTOTYPES:
                with pytest.raises(ValueError, match="^prototypes: got None"):
                    relation(bare)
            else:
                relation(bare)

    @pytest.mark.parametrize("t2", [True, False])
    @pytest.mark.parametrize("name", RELATIONS)
    def test_relation_loss(self, student, model_features, name, t2):
        models = model_features(width=3), model_features(width=8)
        relation = adding.RELATIONS[name]
        weights = torch.rand(6 if name in adding.IMAGE_ROWS else 4, 2, dtype=torch.float64)
        got = adding.relation_loss(relation, student, models, weights, 3.0, t2)
        expected = expected_kl(student, models, name, weights, 3.0) / (1 if t2 else 9)
        torch.testing.assert_close(got, expected)

    def test_feature_loss_equals_a_loop(self, student, teachers):
        weights = torch.rand(6, 2, dtype=torch.float64)
        got = adding.feature_loss(student, teachers, weights)
        torch.testing.assert_close(got, expected_feature(student, teachers, weights))

    def test_feature_loss_computes_half_precision_in_the_dtype_of_the_weights(
        self, student, teachers
    ):
        half = [replace(m, images=m.images.detach().bfloat16()) for m in (student, *teachers)]
        exact = [replace(m, images=m.images.float()) for m in half]
        weights = torch.rand(6, 2)
        got = adding.feature_loss(half[0], half[1:], weights)
        assert got.dtype == torch.float32
        assert got == adding.feature_loss(exact[0], exact[1:], weights)

    def test_feature_loss_gives_teachers_no_gradient(self, student, model_features):
        teacher = model_features(grad=True)
        adding.feature_loss(student, [teacher], torch.ones(6, 1).double()).backward()
        assert student.images.grad is not None
        assert teacher.images.grad is None

    def test_feature_loss_wants_one_width(self, student, model_features):
        models = [model_features(), model_features(width=3)]
        with pytest.raises(ValueError, match=r"^teachers\[1\]: got image features \[6, 3\], .*5"):
            adding.feature_loss(student, models, torch.ones(6, 2).double())
