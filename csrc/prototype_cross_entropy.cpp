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
      out.ignored = true;
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

std::tuple<Tensor, Tensor, Tensor, Tensor> prototype_cross_entropy(
    const Tensor& features,
    const Tensor& prototypes,
    const Tensor& scale,
    const Tensor& target,
    const std::optional<Tensor>& class_mask,
    double label_smoothing,
    int64_t ignore_index,
    const std::optional<Tensor>& grad,
    c10::string_view reduction,
    std::array<bool, 3> wanted) {
  check_prototypes(features, prototypes, scale);
  const int64_t n = features.size(0), p = prototypes.size(0);
  const double c = value_of(scale);
  const std::optional<Tensor> mask = checked_class_mask(class_mask, p);
  const Tensor targets = checked_target(target, n, p, ignore_index, mask);
  const int64_t* y = targets.const_data_ptr<int64_t>();
  const int64_t counted = n - std::count(y, y + n, ignore_index);
  const Request request(grad, reduction);
  const Upstream upstream = request.upstream(n, counted);
  Tensor loss = empty_float({n});
  Grads grads(features, prototypes, request.dtype(features), wanted[0], wanted[1]);
  double dscale = 0;
  with_engine(features.scalar_type(), [&](auto engine) {
    using Engine = decltype(engine);
    const Tiling tiling(n, p, 1, wanted[0] || wanted[1]);
    std::vector<Model<typename Engine::Operand>> models;
    models.emplace_back(features, prototypes, c);
    const ActiveColumns columns(tiling, mask);
    CrossEntropy rule{y, ignore_index, label_smoothing,
                      c, upstream,     loss.mutable_data_ptr<float>()};
    RowSoftmax<Engine, CrossEntropy> driver(tiling, models, columns, rule, wanted[0], wanted[1]);
    dscale = driver.run(float(c), grads.x, grads.w);
  });
  return {request.loss(loss, counted), grads.x, grads.w, scalar_if(wanted[2], dscale)};
}

} // namespace

TORCH_LIBRARY_IMPL(mulki_cpp, CPU, m) {
  m.impl("prototype_cross_entropy", &prototype_cross_entropy);
}

} // namespace mulki
