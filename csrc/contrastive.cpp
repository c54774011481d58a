// contrastive: the loss of CLIP over N pairs of an image and a text.
//
//   loss_i = 1/2 (row_i + column_i) - u_ii,   u_ij = scale x_i . w_j
//   dloss/du_ij = g_i/2 exp(u_ij - row_i) + g_j/2 exp(u_ij - column_j) - g_i [i = j]
//
// x_i are rows of the image features X [N, D], w_j rows of the text features W [N, D], scale is
// logit_scale and g_i the upstream gradient of loss_i. Tiling, memory and passes are those of
// pair_softmax.h: there is one distribution, and its coefficients are the labels' factors, g_i/2.
#include "common/checks.h"
#include "core/pair_softmax.h"

#include <torch/library.h>

#include <tuple>
#include <utility>

namespace mulki {
namespace {

template <typename Engine>
PairSoftmax<Engine> softmax_of(
    const Tensor& image_features,
    const Tensor& text_features,
    float scale,
    bool wanted_x,
    bool wanted_w) {
  return {{{image_features, text_features}}, {{0, scale}}, wanted_x, wanted_w};
}

Tensor as_pairs(const std::vector<double>& values) {
  Tensor out = empty_float({int64_t(values.size()), 2});
  store_pairs(values, out.mutable_data_ptr<float>());
  return out;
}

std::vector<double> as_doubles(const Tensor& pairs) {
  const Tensor floats = pairs.to(at::kFloat).contiguous();
  return sums_of_pairs(floats.const_data_ptr<float>(), floats.size(0));
}

std::tuple<Tensor, Tensor, Tensor> contrastive(
    const Tensor& image_features, const Tensor& text_features, const Tensor& logit_scale) {
  check_pairs(image_features, text_features, logit_scale);
  const int64_t n = image_features.size(0), d = image_features.size(1);
  if (n == 0) {
    return {empty_float({0}), empty_float({0, 2}), empty_float({0, 2})};
  }
  const float s = float(value_of(logit_scale));
  const SumsOfPairs sums = with_engine(image_features.scalar_type(), d, [&](auto engine) {
    return softmax_of<decltype(engine)>(image_features, text_features, s, false, false).sums();
  });
  Tensor loss = empty_float({n});
  for (int64_t i = 0; i < n; ++i) {
    loss.mutable_data_ptr<float>()[i] = float(sums.loss_of_labels({0, s}, 0, i));
  }
  return {loss, as_pairs(sums.rows[0].lse), as_pairs(sums.columns[0].lse)};
}

std::tuple<Tensor, Tensor, Tensor> contrastive_backward(
    const Tensor& grad,
    const Tensor& image_features,
    const Tensor& text_features,
    const Tensor& logit_scale,
    const Tensor& row_lse,
    const Tensor& column_lse,
    std::array<bool, 3> wanted) {
  check_pairs(image_features, text_features, logit_scale);
  const int64_t n = image_features.size(0), d = image_features.size(1);
  check_shape("grad", grad, {n});
  check_shape("row_lse", row_lse, {n, 2});
  check_shape("column_lse", column_lse, {n, 2});
  const at::ScalarType dtype = image_features.scalar_type();
  Grads grads(image_features, text_features, dtype, wanted[0], wanted[1]);
  double dscale = 0;
  if (n > 0) {
    const float s = float(value_of(logit_scale));
    PairCoefficients labels(as_doubles(row_lse), as_doubles(column_lse));
    labels.add_labels(Upstream(grad));
    dscale = with_engine(dtype, d, [&](auto engine) {
      return softmax_of<decltype(engine)>(image_features, text_features, s, wanted[0], wanted[1])
          .gradients({labels}, s, grads);
    });
  }
  return {grads.x, grads.w, scalar_if(wanted[2], dscale)};
}

// The total of the losses, and dloss/dscale.
template <typename Engine>
std::pair<double, double> total_and_gradients(
    const Tensor& image_features,
    const Tensor& text_features,
    float scale,
    bool mean,
    std::array<bool, 3> wanted,
    Grads& grads) {
  PairSoftmax<Engine> pairs =
      softmax_of<Engine>(image_features, text_features, scale, wanted[0], wanted[1]);
  const int64_t n = image_features.size(0);
  const bool any = wanted[0] || wanted[1] || wanted[2];
  const std::optional<ProductCache> cache = pairs.cache_if(any);
  SumsOfPairs sums = pairs.sums(cache);
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    total += float(sums.loss_of_labels({0, scale}, 0, i));
  }
  if (!any) {
    return {total, 0.0};
  }
  PairCoefficients labels(std::move(sums.rows[0].lse), std::move(sums.columns[0].lse));
  labels.add_labels(Upstream(row_weight(mean, n)));
  return {total, pairs.gradients({labels}, scale, grads, cache)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_reduced(
    const Tensor& image_features,
    const Tensor& text_features,
    const Tensor& logit_scale,
    bool mean,
    std::array<bool, 3> wanted) {
  check_pairs(image_features, text_features, logit_scale);
  const int64_t n = image_features.size(0), d = image_features.size(1);
  Grads grads(image_features, text_features, at::kFloat, wanted[0], wanted[1]);
  double total = 0, dscale = 0;
  if (n > 0) {
    const float s = float(value_of(logit_scale));
    std::tie(total, dscale) = with_engine(image_features.scalar_type(), d, [&](auto engine) {
      return total_and_gradients<decltype(engine)>(
          image_features, text_features, s, mean, wanted, grads);
    });
  }
  return {scalar(mean ? total / double(n) : total), grads.x, grads.w, scalar_if(wanted[2], dscale)};
}

} // namespace

TORCH_LIBRARY_IMPL(mulki_cpp, CPU, m) {
  m.impl("contrastive", &contrastive);
  m.impl("contrastive_backward", &contrastive_backward);
  m.impl("contrastive_reduced", &contrastive_reduced);
}

} // namespace mulki
