// prototype_cross_entropy: loss_i = -(1 - e) log q_iy - e mean_j log q_ij, q = softmax(scale x_i W^T).
//
// dloss_i/du_ij = q_ij - (1 - e) [j = y] - e / kept, over the classes that take part.
#include "checks.h"
#include "results.h"
#include "row_softmax.h"

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
      int64_t kept,
      RowCoefficients& out) const {
    if (targets[row] == ignored) {
      loss[row] = 0;
      return;
    }
    const double hard = 1 - smoothing;
    const double picked = scale * student->at_target - student->log_sum;
    const double spread = smoothing == 0 ? 0 : scale * student->uniform - student->log_sum;
    loss[row] = float(-hard * picked - smoothing * spread);
    const double g = upstream[row];
    out.student = g;
    out.at_target = g * hard;
    out.uniform = g * smoothing / double(kept);
    out.scale = g *
        (student->mean - hard * student->at_target -
         (smoothing == 0 ? 0 : smoothing * student->uniform));
  }

  const int64_t* targets;
  int64_t ignored;
  double smoothing, scale;
  const Upstream& upstream;
  float* loss;
};

struct Labels {
  Tensor target;
  std::optional<Tensor> class_mask;
};

Labels checked(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scale,
    const Tensor& target,
    const std::optional<Tensor>& class_mask,
    int64_t ignored) {
  check_operands(x, w, scale);
  const auto mask = checked_classes(class_mask, w.size(0));
  return {checked_target(target, x.size(0), w.size(0), ignored, mask), mask};
}

struct Result {
  Tensor loss, dx, dw;
  double dscale;
};

Result run(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scale,
    const Labels& labels,
    double smoothing,
    int64_t ignored,
    const Upstream& upstream,
    at::ScalarType dtype,
    std::array<bool, 3> wanted) {
  const double s = value_of(scale);
  Tensor loss = empty_float({x.size(0)});
  Grads grads(x, w, dtype, wanted[0], wanted[1]);
  double dscale = 0;
  with_engine(x.scalar_type(), x.size(1), [&](auto engine) {
    using Engine = decltype(engine);
    const Tiling tiling = tiling_for<Engine>(x.size(0), w.size(0), 1, wanted[0] || wanted[1]);
    std::vector<Model<typename Engine::Operand>> models;
    models.emplace_back(x, w, s);
    const Columns columns(
        tiling,
        labels.class_mask.has_value() ? labels.class_mask->const_data_ptr<bool>() : nullptr);
    CrossEntropy rule{labels.target.const_data_ptr<int64_t>(), ignored, smoothing, s, upstream,
                      loss.mutable_data_ptr<float>()};
    RowSoftmax<Engine, CrossEntropy> driver(tiling, models, columns, rule, wanted[0], wanted[1]);
    dscale = driver.run(float(s), grads.x, grads.w);
  });
  return {loss, grads.x, grads.w, dscale};
}

Tensor prototype_cross_entropy(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scale,
    const Tensor& target,
    const std::optional<Tensor>& class_mask,
    double label_smoothing,
    int64_t ignore_index) {
  const Labels labels = checked(x, w, scale, target, class_mask, ignore_index);
  return run(x, w, scale, labels, label_smoothing, ignore_index, Upstream(1.0), at::kFloat,
             {false, false, false})
      .loss;
}

std::tuple<Tensor, Tensor, Tensor> prototype_cross_entropy_backward(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& w,
    const Tensor& scale,
    const Tensor& target,
    const std::optional<Tensor>& class_mask,
    double label_smoothing,
    int64_t ignore_index,
    std::array<bool, 3> wanted) {
  const Labels labels = checked(x, w, scale, target, class_mask, ignore_index);
  check_rows("grad", grad, x.size(0));
  Result r = run(
      x, w, scale, labels, label_smoothing, ignore_index, Upstream(grad), x.scalar_type(), wanted);
  return {r.dx, r.dw, scalar_if(wanted[2], r.dscale)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prototype_cross_entropy_reduced(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scale,
    const Tensor& target,
    const std::optional<Tensor>& class_mask,
    double label_smoothing,
    int64_t ignore_index,
    bool mean,
    std::array<bool, 3> wanted) {
  const Labels labels = checked(x, w, scale, target, class_mask, ignore_index);
  const int64_t* y = labels.target.const_data_ptr<int64_t>();
  const int64_t ignored = std::count(y, y + x.size(0), ignore_index);
  const int64_t counted = x.size(0) - ignored;
  Result r =
      run(x, w, scale, labels, label_smoothing, ignore_index, Upstream(share_of(mean, counted)),
          at::kFloat, wanted);
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
