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

struct Arguments {
  const Tensor &features, &prototypes, &scale;
  at::TensorList teacher_features, teacher_prototypes;
  const Tensor& teacher_scales;
  const std::optional<Tensor>&weights, &target, &class_mask;
  double temperature, gate_temperature, gate_entropy, gate_label;
  bool scale_by_t2;
};

struct Result {
  Tensor loss, kl, weights, entropy, dx, dw;
  double dscale;
};

void check(const Arguments& a) {
  check_prototypes(a.features, a.prototypes, a.scale);
  check_positive("temperature", a.temperature);
  check_positive("gate_temperature", a.gate_temperature);
  check_teachers(
      "teacher_features", a.teacher_features, "teacher_prototypes", a.teacher_prototypes,
      a.teacher_scales, a.features, a.prototypes);
  if (a.weights.has_value()) {
    check_shape("weights", *a.weights, {a.features.size(0), int64_t(a.teacher_features.size())});
  }
}

Result run(
    const Arguments& a,
    const Upstream& upstream,
    at::ScalarType dtype,
    std::array<bool, 3> wanted) {
  const int64_t n = a.features.size(0), k = int64_t(a.teacher_features.size());
  const bool given = a.weights.has_value();
  const auto mask = checked_class_mask(a.class_mask, a.prototypes.size(0));
  Tensor targets;
  if (!given && a.gate_label != 0) {
    TORCH_CHECK_VALUE(
        a.target.has_value(), "target: got None, wanted class indices, which gate_label uses");
    targets = checked_target(*a.target, n, a.prototypes.size(0), std::nullopt, mask);
  }
  Tensor loss = empty_float({n}), kl = empty_float({n, k}), entropy = empty_float({n, k});
  Tensor weights = empty_float({n, k});
  if (given) {
    weights.copy_(*a.weights);
  }
  const Tensor scales = a.teacher_scales.to(at::kDouble).contiguous();
  std::vector<double> c{value_of(a.scale) / a.temperature};
  for (int64_t i = 0; i < k; ++i) {
    c.push_back(scales.const_data_ptr<double>()[i] / a.temperature);
  }
  const double t2 = a.scale_by_t2 ? a.temperature * a.temperature : 1.0;
  Grads grads(a.features, a.prototypes, dtype, wanted[0], wanted[1]);
  double dscale = 0;
  const int64_t depth = smallest_width(a.features, a.teacher_features);
  with_engine(a.features.scalar_type(), depth, [&](auto engine) {
    using Engine = decltype(engine);
    const Tiling tiling =
        tiling_for<Engine>(n, a.prototypes.size(0), k + 1, wanted[0] || wanted[1]);
    std::vector<Model<typename Engine::Operand>> models;
    models.reserve(k + 1);
    models.emplace_back(a.features, a.prototypes, c[0]);
    for (int64_t i = 0; i < k; ++i) {
      models.emplace_back(a.teacher_features[i], a.teacher_prototypes[i], c[i + 1]);
    }
    const ActiveColumns columns(tiling, mask);
    TeacherKl rule{
        k,
        c,
        t2,
        given,
        {a.gate_entropy, a.gate_label, a.gate_temperature},
        targets.defined() ? targets.const_data_ptr<int64_t>() : nullptr,
        upstream,
        loss.mutable_data_ptr<float>(),
        kl.mutable_data_ptr<float>(),
        weights.mutable_data_ptr<float>(),
        entropy.mutable_data_ptr<float>()};
    RowSoftmax<Engine, TeacherKl> driver(tiling, models, columns, rule, wanted[0], wanted[1]);
    dscale = t2 / a.temperature * driver.run(float(t2 * c[0]), grads.x, grads.w);
  });
  return {loss, kl, weights, entropy, grads.x, grads.w, dscale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> teacher_kl(
    const Tensor& features,
    const Tensor& prototypes,
    const Tensor& scale,
    at::TensorList teacher_features,
    at::TensorList teacher_prototypes,
    const Tensor& teacher_scales,
    const std::optional<Tensor>& weights,
    const std::optional<Tensor>& target,
    const std::optional<Tensor>& class_mask,
    double temperature,
    double gate_temperature,
    double gate_entropy,
    double gate_label,
    bool scale_by_t2) {
  const Arguments a{
      features,         prototypes,   scale,      teacher_features, teacher_prototypes,
      teacher_scales,   weights,      target,     class_mask,       temperature,
      gate_temperature, gate_entropy, gate_label, scale_by_t2};
  check(a);
  Result r = run(a, Upstream(1.0), at::kFloat, {false, false, false});
  return {r.loss, r.kl, r.weights, r.entropy};
}

std::tuple<Tensor, Tensor, Tensor> teacher_kl_backward(
    const Tensor& grad,
    const Tensor& features,
    const Tensor& prototypes,
    const Tensor& scale,
    at::TensorList teacher_features,
    at::TensorList teacher_prototypes,
    const Tensor& teacher_scales,
    const Tensor& weights,
    const std::optional<Tensor>& class_mask,
    double temperature,
    bool scale_by_t2,
    std::array<bool, 3> wanted) {
  const std::optional<Tensor> given = weights;
  const Arguments a{
      features,
      prototypes,
      scale,
      teacher_features,
      teacher_prototypes,
      teacher_scales,
      given,
      std::nullopt,
      class_mask,
      temperature,
      1.0,
      0.0,
      0.0,
      scale_by_t2};
  check(a);
  check_shape("grad", grad, {features.size(0)});
  Result r = run(a, Upstream(grad), features.scalar_type(), wanted);
  return {r.dx, r.dw, scalar_if(wanted[2], r.dscale)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> teacher_kl_reduced(
    const Tensor& features,
    const Tensor& prototypes,
    const Tensor& scale,
    at::TensorList teacher_features,
    at::TensorList teacher_prototypes,
    const Tensor& teacher_scales,
    const std::optional<Tensor>& weights,
    const std::optional<Tensor>& target,
    const std::optional<Tensor>& class_mask,
    double temperature,
    double gate_temperature,
    double gate_entropy,
    double gate_label,
    bool scale_by_t2,
    bool mean,
    std::array<bool, 3> wanted) {
  const Arguments a{
      features,         prototypes,   scale,      teacher_features, teacher_prototypes,
      teacher_scales,   weights,      target,     class_mask,       temperature,
      gate_temperature, gate_entropy, gate_label, scale_by_t2};
  check(a);
  const int64_t n = features.size(0);
  Result r = run(a, Upstream(row_weight(mean, n)), at::kFloat, wanted);
  const double sum = sum_of_rows(r.loss);
  return {scalar(mean ? sum / double(n) : sum), r.kl, r.weights, r.entropy, r.dx, r.dw,
          scalar_if(wanted[2], r.dscale)};
}

} // namespace

TORCH_LIBRARY_IMPL(mulki_cpp, CPU, m) {
  m.impl("teacher_kl", &teacher_kl);
  m.impl("teacher_kl_backward", &teacher_kl_backward);
  m.impl("teacher_kl_reduced", &teacher_kl_reduced);
}

} // namespace mulki
