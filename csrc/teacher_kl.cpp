// teacher_kl: loss_i = sum_k w_ik KL_ik, KL_ik = t sum_j p_ijk (log p_ijk - log q_ij), where p of
// teacher k and q of the student are softmax(scale X W^T / T) and t is T^2 or 1.
//
// With u = Y scale / T and expectations over p_k: KL_ik = t (E[u_k] - lse_k - E[u] + lse). The weights
// w_ik are given, or come from a gate: the softmax over k of (-a entropy_ik + b log p_ik[target_i]) /
// gate_temperature, where a is gate_entropy and b is gate_label. dloss_i/du_ij = t (sum_k w_ik q_ij -
// sum_k w_ik p_ijk).
#include "checks.h"
#include "results.h"
#include "row_softmax.h"

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
      const double own = c[i + 1] * teachers[i].mean - teachers[i].log_sum;
      kl[row * k + i] = float(t2 * (own - (c[0] * teachers[i].cross - student->log_sum)));
      entropy[row * k + i] = float(-own);
    }
    gate_weights(row, teachers, w);
    const double g = upstream[row];
    double total = 0, loss_of_row = 0;
    for (int64_t i = 0; i < k; ++i) {
      total += w[i];
      loss_of_row += double(w[i]) * kl[row * k + i];
      out.teachers[i] = g * w[i];
      out.scale -= g * w[i] * teachers[i].cross;
    }
    loss[row] = float(loss_of_row);
    out.student = g * total;
    out.scale += g * total * student->mean;
  }

  void gate_weights(int64_t row, const ModelRow* teachers, float* w) const {
    if (given) {
      return;
    }
    double most = -std::numeric_limits<double>::infinity();
    std::array<double, 8> few;
    std::vector<double> many;
    double* score = few.data();
    if (k > int64_t(few.size())) {
      many.resize(k);
      score = many.data();
    }
    for (int64_t i = 0; i < k; ++i) {
      score[i] = -gate_entropy * double(entropy[row * k + i]);
      if (targets != nullptr) {
        score[i] += gate_label * (c[i + 1] * teachers[i].at_target - teachers[i].log_sum);
      }
      score[i] /= gate_temperature;
      most = std::max(most, score[i]);
    }
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      score[i] = std::exp(score[i] - most);
      sum += score[i];
    }
    for (int64_t i = 0; i < k; ++i) {
      w[i] = float(score[i] / sum);
    }
  }

  int64_t k;
  std::vector<double> c; // of the student, then of the teachers
  double t2;
  bool given; // the weights
  double gate_entropy, gate_label, gate_temperature;
  const int64_t* targets; // nullptr where gate_label is 0
  const Upstream& upstream;
  float *loss, *kl, *weights, *entropy;
};

struct Arguments {
  const Tensor &x, &w, &scale;
  at::TensorList teacher_x, teacher_w;
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
  check_operands(a.x, a.w, a.scale);
  const int64_t n = a.x.size(0), p = a.w.size(0), k = int64_t(a.teacher_x.size());
  TORCH_CHECK_VALUE(k > 0, "teacher_x: got none, wanted at least one teacher");
  TORCH_CHECK_VALUE(
      int64_t(a.teacher_w.size()) == k && a.teacher_scales.dim() == 1 &&
          a.teacher_scales.size(0) == k,
      "teacher_x: got ", k, " teachers, but ", a.teacher_w.size(), " teacher_w and ",
      a.teacher_scales.numel(), " teacher_scales; wanted as many of each");
  for (int64_t i = 0; i < k; ++i) {
    check_operands(a.teacher_x[i], a.teacher_w[i], a.scale);
    TORCH_CHECK_VALUE(
        a.teacher_x[i].size(0) == n && a.teacher_w[i].size(0) == p, "teacher ", i, ": got ",
        a.teacher_x[i].size(0), " x ", a.teacher_w[i].size(0), " rows, wanted ", n, " x ", p,
        " as the student");
  }
  TORCH_CHECK_VALUE(
      a.temperature > 0 && a.gate_temperature > 0, "temperature, gate_temperature: got ",
      a.temperature, ", ", a.gate_temperature, ", wanted positive numbers");
  if (a.weights.has_value()) {
    TORCH_CHECK_VALUE(
        a.weights->dim() == 2 && a.weights->size(0) == n && a.weights->size(1) == k,
        "weights: got shape ", a.weights->sizes(), ", wanted [", n, ", ", k, "]");
  }
}

// Halves are multiplied as such only when every model has the student's dtype.
at::ScalarType common_dtype(const Arguments& a) {
  for (const Tensor& t : a.teacher_x) {
    if (t.scalar_type() != a.x.scalar_type()) {
      return at::kFloat;
    }
  }
  return a.x.scalar_type();
}

Result run(
    const Arguments& a,
    const Upstream& upstream,
    at::ScalarType dtype,
    std::array<bool, 3> wanted) {
  check(a);
  const int64_t n = a.x.size(0), k = int64_t(a.teacher_x.size());
  const bool given = a.weights.has_value();
  const auto mask = checked_classes(a.class_mask, a.w.size(0));
  Tensor targets;
  if (!given && a.gate_label != 0) {
    TORCH_CHECK_VALUE(
        a.target.has_value(), "target: got None, wanted [N] class indices for a gate on the label");
    targets = checked_target(*a.target, n, a.w.size(0), std::nullopt, mask);
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
  Grads grads(a.x, a.w, dtype, wanted[0], wanted[1]);
  double dscale = 0;
  int64_t depth = a.x.size(1);
  for (const Tensor& t : a.teacher_x) {
    depth = std::min(depth, t.size(1));
  }
  with_engine(common_dtype(a), depth, [&](auto engine) {
    using Engine = decltype(engine);
    const Tiling tiling = tiling_for<Engine>(n, a.w.size(0), k + 1, wanted[0] || wanted[1]);
    std::vector<Model<typename Engine::Operand>> models;
    models.reserve(k + 1);
    models.emplace_back(a.x, a.w, c[0]);
    for (int64_t i = 0; i < k; ++i) {
      models.emplace_back(a.teacher_x[i], a.teacher_w[i], c[i + 1]);
    }
    const Columns columns(tiling, mask.has_value() ? mask->const_data_ptr<bool>() : nullptr);
    TeacherKl rule{
        k,
        c,
        t2,
        given,
        a.gate_entropy,
        a.gate_label,
        a.gate_temperature,
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
    const Tensor& x,
    const Tensor& w,
    const Tensor& scale,
    at::TensorList teacher_x,
    at::TensorList teacher_w,
    const Tensor& teacher_scales,
    const std::optional<Tensor>& weights,
    const std::optional<Tensor>& target,
    const std::optional<Tensor>& class_mask,
    double temperature,
    double gate_temperature,
    double gate_entropy,
    double gate_label,
    bool scale_by_t2) {
  Result r =
      run({x, w, scale, teacher_x, teacher_w, teacher_scales, weights, target, class_mask,
           temperature, gate_temperature, gate_entropy, gate_label, scale_by_t2},
          Upstream(1.0), at::kFloat, {false, false, false});
  return {r.loss, r.kl, r.weights, r.entropy};
}

std::tuple<Tensor, Tensor, Tensor> teacher_kl_backward(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& w,
    const Tensor& scale,
    at::TensorList teacher_x,
    at::TensorList teacher_w,
    const Tensor& teacher_scales,
    const Tensor& weights,
    const std::optional<Tensor>& class_mask,
    double temperature,
    bool scale_by_t2,
    std::array<bool, 3> wanted) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x: got shape ", x.sizes(), ", wanted [N, D]");
  check_rows("grad", grad, x.size(0));
  const std::optional<Tensor> given = weights;
  Result r =
      run({x, w, scale, teacher_x, teacher_w, teacher_scales, given, std::nullopt, class_mask,
           temperature, 1.0, 0.0, 0.0, scale_by_t2},
          Upstream(grad), x.scalar_type(), wanted);
  return {r.dx, r.dw, scalar_if(wanted[2], r.dscale)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> teacher_kl_reduced(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scale,
    at::TensorList teacher_x,
    at::TensorList teacher_w,
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
  TORCH_CHECK_VALUE(x.dim() == 2, "x: got shape ", x.sizes(), ", wanted [N, D]");
  const int64_t n = x.size(0);
  Result r =
      run({x, w, scale, teacher_x, teacher_w, teacher_scales, weights, target, class_mask,
           temperature, gate_temperature, gate_entropy, gate_label, scale_by_t2},
          Upstream(share_of(mean, n)), at::kFloat, wanted);
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
