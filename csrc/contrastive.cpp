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

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive(
    const Tensor& image_features,
    const Tensor& text_features,
    const Tensor& logit_scale,
    const std::optional<Tensor>& grad,
    c10::string_view reduction,
    std::array<bool, 3> wanted) {
  check_pairs(image_features, text_features, logit_scale);
  const int64_t n = image_features.size(0);
  const float s = float(value_of(logit_scale));
  const Request request(grad, reduction);
  const Upstream upstream = request.upstream(n, n);
  Grads grads(image_features, text_features, request.dtype(image_features), wanted[0], wanted[1]);
  Tensor loss = empty_float({n});
  double dscale = 0;
  const auto run = [&](auto engine) {
    const bool any = wanted[0] || wanted[1] || wanted[2];
    PairSoftmax<decltype(engine)> pairs(
        {{image_features, text_features}}, {{0, s}}, wanted[0], wanted[1]);
    const std::optional<ProductCache> cache = pairs.cache_if(any);
    SumsOfPairs sums = pairs.sums(cache);
    for (int64_t i = 0; i < n; ++i) {
      loss.mutable_data_ptr<float>()[i] = float(sums.loss_of_labels({0, s}, 0, i));
    }
    if (any) {
      PairCoefficients labels(std::move(sums.rows[0].lse), std::move(sums.columns[0].lse));
      labels.add_labels(upstream);
      dscale = pairs.gradients({labels}, s, grads, cache);
    }
  };
  if (n > 0) {
    with_engine(image_features.scalar_type(), run);
  }
  return {request.loss(loss, n), grads.x, grads.w, scalar_if(wanted[2], dscale)};
}

} // namespace

TORCH_LIBRARY_IMPL(mulki_cpp, CPU, m) {
  m.impl("contrastive", &contrastive);
}

} // namespace mulki
