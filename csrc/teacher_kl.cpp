// teacher_kl: the weighted KL divergence of K teachers to a student, over class prototypes.
//
//   loss_i = sum_k w_ik KL_ik,   KL_ik = t sum_j p_ijk (log p_ijk - log q_ij)
//   dloss_i/du_ij = t (sum_k w_ik q_ij - sum_k w_ik p_ijk),   u = scale x W^T / T
//
// q of the student and p_k of teacher k are softmax(scale X W^T / T) of their own features X,
// prototypes W and scale. T is the temperature, and t is T^2 or 1. The weights w_ik are given, or
// come from a gate (gate.h), whose label is the target.
//
// Here KL_ik = t (E[u_k] - lse_k - E[u] + lse) with expectations E over p_k and lse = log sum exp.
// Tiling, memory and gradients are those of row_softmax.h.
#include "common/checks.h"
#include "core/gate.h"
#include "common/results.h"
#include "core/row_softmax.h"

#include <torch/library.h>

namespace mulki {
namespace {

struct TeacherKl {
  int64_t target(int64_t row) const {
    return targets == nullptr ? -1 : targets[row];
  }

  void operator()(
      int64_t row,
      const ModelRow* student,
      const ModelRow* teachers,
      int64_t,
      RowCoefficients& out) const {
    float* w = weights + row * k;
    for (int64_t i = 0; i < k; ++i) {
      const double negative_entropy = c[i + 1] * teachers[i].mean - teachers[i].log_sum;
      kl[row * k + i] =
          float(t2 * (negative_entropy - (c[0] * teachers[i].cross - student->log_sum)));
      entropy[row * k + i] = float(-negative_entropy);
    }
    if (!given) {
      const auto log_p = [&](int64_t i) {
        return c[i + 1] * teachers[i].at_target - teachers[i].log_sum;
      };
      gate.weights(k, entropy + row * k, log_p, w);
    }
    const double g = upstream[row];
    double weight_sum = 0, loss_of_row = 0;
    for (int64_t i = 0; i < k; ++i) {
      weight_sum += w[i];
      loss_of_row += double(w[i]) * kl[row * k + i];
      out.teachers[i] = g * w[i];
      out.scale -= g * w[i] * teachers[i].cross;
    }
    loss[row] = float(loss_of_row);
    out.student = g * weight_sum;
    out.scale += g * weight_sum * student->mean;
  }

  int64_t k;
  std::vector<double> c; // scale / T of the student, then of the teachers
  double t2;
  bool given; // whether the weights are given
  Gate gate;
  const int64_t* targets; // nullptr where the gate's label is 0
  const Upstream& upstream;
  float *loss, *kl, *weights, *entropy;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> teacher_kl(
    const Tensor& features,
    const Tensor& prototypes,
    const Tensor& scale,
    at::TensorList teacher_features,
    at::TensorList teacher_prototypes,
    at::TensorList teacher_scales,
    const std::optional<Tensor>& given_weights,
    const std::optional<Tensor>& target,
    const std::optional<Tensor>& class_mask,
    double temperature,
    double gate_temperature,
    double gate_entropy,
    double gate_label,
    bool scale_by_t2,
    const std::optional<Tensor>& grad,
    c10::string_view reduction,
    std::array<bool, 3> wanted) {
  check_prototypes(features, prototypes, scale);
  check_positive("temperature", temperature);
  check_positive("gate_temperature", gate_temperature);
  check_teachers(
      "teacher_features", teacher_features, "teacher_prototypes", teacher_prototypes,
      teacher_scales, features, prototypes);
  const int64_t n = features.size(0), p = prototypes.size(0), k = int64_t(teacher_features.size());
  const std::optional<Tensor> mask = checked_class_mask(class_mask, p);
  Tensor loss = empty_float({n}), kl = empty_float({n, k}), entropy = empty_float({n, k});
  Tensor weights = empty_float({n, k});
  const bool given = given_weights.has_value();
  Tensor targets;
  if (given) {
    check_shape("weights", *given_weights, {n, k});
    weights.copy_(*given_weights);
  } else if (gate_label != 0) {
    TORCH_CHECK_VALUE(
        target.has_value(), "target: got None, wanted class indices, which gate_label uses");
    targets = checked_target(*target, n, p, std::nullopt, mask);
  }
  std::vector<double> c{value_of(scale) / temperature};
  for (const Tensor& teacher_scale : teacher_scales) {
    c.push_back(value_of(teacher_scale) / temperature);
  }
  const double t2 = scale_by_t2 ? temperature * temperature : 1.0;
  const Request request(grad, reduction);
  const Upstream upstream = request.upstream(n, n);
  Grads grads(features, prototypes, request.dtype(features), wanted[0], wanted[1]);
  double dscale = 0;
  with_engine(features.scalar_type(), [&](auto engine) {
    using Engine = decltype(engine);
    const Tiling tiling(n, p, k + 1, wanted[0] || wanted[1]);
    std::vector<Model<typename Engine::Operand>> models;
    models.reserve(k + 1);
    models.emplace_back(features, prototypes, c[0]);
    for (int64_t i = 0; i < k; ++i) {
      models.emplace_back(teacher_features[i], teacher_prototypes[i], c[i + 1]);
    }
    const ActiveColumns columns(tiling, mask);
    TeacherKl rule{
        k,
        c,
        t2,
        given,
        {gate_entropy, gate_label, gate_temperature},
        targets.defined() ? targets.const_data_ptr<int64_t>() : nullptr,
        upstream,
        loss.mutable_data_ptr<float>(),
        kl.mutable_data_ptr<float>(),
        weights.mutable_data_ptr<float>(),
        entropy.mutable_data_ptr<float>()};
    RowSoftmax<Engine, TeacherKl> driver(tiling, models, columns, rule, wanted[0], wanted[1]);
    dscale = t2 / temperature * driver.run(float(t2 * c[0]), grads.x, grads.w);
  });
  return {
      request.loss(loss, n),
      request.detail(kl),
      request.detail(weights),
      request.detail(entropy),
      grads.x,
      grads.w,
      scalar_if(wanted[2], dscale)};
}

} // namespace

TORCH_LIBRARY_IMPL(mulki_cpp, CPU, m) {
  m.impl("teacher_kl", &teacher_kl);
}

} // namespace mulki
