// prototype_cross_entropy: the cross-entropy of features against class prototypes.
//
//   loss_i = -(1 - e) log q_iy - e mean_j log q_ij,   q_i = softmax(scale x_i W^T)
//   dloss_i/du_ij = q_ij - (1 - e) [j = y] - e / active,   u = scale X W^T
//
// x_i are rows of the features X [N, D], W are the prototypes [P, D], y the target, e the label
// smoothing. j and the mean go over the active classes, of which there are `active`. Tiling, memory
// and gradients are those of row_softmax.h.
#include "common/checks.h"
#include "common/results.h"
#include "core/row_softmax.h"

#include <torch/library.h>

namespace mulki {
namespace {

struct CrossEntropy {
  int64_t target(int64_t row) const {
    return targets[row] == ignored ? -1 : targets[row];
  }

  void operator()(
      int64_t row,
      const ModelRow* student,
      const ModelRow*,
      int64_t active,
      RowCoefficients& out) const {
    if (targets[row] == ignored) {
      loss[row] = 0;
      return;
    }
    const double target_weight = 1 - smoothing;
    const double log_q_target = scale * student->at_target - student->log_sum;
    const double mean_log_q = smoothing == 0 ? 0 : scale * student->uniform - student->log_sum;
    loss[row] = float(-target_weight * log_q_target - smoothing * mean_log_q);
    const double g = upstream[row];
    out.student = g;
    out.at_target = g * target_weight;
    out.uniform = g * smoothing / double(active);
    out.scale = g *
        (student->mean - target_weight * student->at_target -
         (smoothing == 0 ? 0 : smoothing * student->uniform));
  }

  const int64_t* targets;
  int64_t ignored;
  double smoothing, scale;
  const Upstream& upstream;
  float* loss;
};

struct Arguments {
  Arguments(
      const Tensor& features,
      const Tensor& prototypes,
      const Tensor& scale,
      const Tensor& target,
      const std::optional<Tensor>& class_mask,
      double smoothing,
      int64_t ignored)
      : x(features), w(prototypes), smoothing(smoothing), ignored(ignored) {
    check_prototypes(features, prototypes, scale);
    const int64_t n = x.size(0), p = w.size(0);
    this->scale = value_of(scale);
    this->class_mask = checked_class_mask(class_mask, p);
    this->target = checked_target(target, n, p, ignored, this->class_mask);
  }

  const Tensor &x, &w;
  double scale, smoothing;
  int64_t ignored;
  std::optional<Tensor> class_mask;
  Tensor target;
};

struct Result {
  Tensor loss, dx, dw;
  double dscale;
};

Result run(
    const Arguments& a,
    const Upstream& upstream,
    at::ScalarType dtype,
    std::array<bool, 3> wanted) {
  const Tensor &x = a.x, &w = a.w;
  Tensor loss = empty_float({x.size(0)});
  Grads grads(x, w, dtype, wanted[0], wanted[1]);
  double dscale = 0;
  with_engine(x.scalar_type(), x.size(1), [&](auto engine) {
    using Engine = decltype(engine);
    const Tiling tiling = tiling_for<Engine>(x.size(0), w.size(0), 1, wanted[0] || wanted[1]);
    std::vector<Model<typename Engine::Operand>> models;
    models.emplace_back(x, w, a.scale);
    const ActiveColumns columns(tiling, a.class_mask);
    CrossEntropy rule{a.target.const_data_ptr<int64_t>(), a.ignored, a.smoothing, a.scale, upstream,
                      loss.mutable_data_ptr<float>()};
    RowSoftmax<Engine, CrossEntropy> driver(tiling, models, columns, rule, wanted[0], wanted[1]);
    dscale = driver.run(float(a.scale), grads.x, grads.w);
  });
  return {loss, grads.x, grads.w, dscale};
}

Tensor prototype_cross_entropy(
    const Tensor& features,
    const Tensor& prototypes,
    const Tensor& scale,
    const Tensor& target,
    const std::optional<Tensor>& class_mask,
    double label_smoothing,
    int64_t ignore_index) {
  const Arguments a(features, prototypes, scale, target, class_mask, label_smoothing, ignore_index);
  return run(a, Upstream(1.0), at::kFloat, {false, false, false}).loss;
}

std::tuple<Tensor, Tensor, Tensor> prototype_cross_entropy_backward(
    const Tensor& grad,
    const Tensor& features,
    const Tensor& prototypes,
    const Tensor& scale,
    const Tensor& target,
    const std::optional<Tensor>& class_mask,
    double label_smoothing,
    int64_t ignore_index,
    std::array<bool, 3> wanted) {
  const Arguments a(features, prototypes, scale, target, class_mask, label_smoothing, ignore_index);
  check_shape("grad", grad, {features.size(0)});
  Result r = run(a, Upstream(grad), features.scalar_type(), wanted);
  return {r.dx, r.dw, scalar_if(wanted[2], r.dscale)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prototype_cross_entropy_reduced(
    const Tensor& features,
    const Tensor& prototypes,
    const Tensor& scale,
    const Tensor& target,
    const std::optional<Tensor>& class_mask,
    double label_smoothing,
    int64_t ignore_index,
    bool mean,
    std::array<bool, 3> wanted) {
  const Arguments a(features, prototypes, scale, target, class_mask, label_smoothing, ignore_index);
  const int64_t n = features.size(0);
  const int64_t* y = a.target.const_data_ptr<int64_t>();
  const int64_t counted = n - std::count(y, y + n, ignore_index);
  Result r = run(a, Upstream(row_weight(mean, counted)), at::kFloat, wanted);
  const double sum = sum_of_rows(r.loss);
  return {scalar(mean ? sum / double(counted) : sum), r.dx, r.dw, scalar_if(wanted[2], r.dscale)};
}

} // namespace

TORCH_LIBRARY_IMPL(mulki_cpp, CPU, m) {
  m.impl("prototype_cross_entropy", &prototype_cross_entropy);
  m.impl("prototype_cross_entropy_backward", &prototype_cross_entropy_backward);
  m.impl("prototype_cross_entropy_reduced", &prototype_cross_entropy_reduced);
}

} // namespace mulki
