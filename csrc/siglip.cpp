// siglip: the sigmoid loss of N images against P texts.
//
//   loss_i = sum_j softplus(-s_ij u_ij),   u_ij = scale x_i . w_j + bias
//   dloss_i/du_ij = sigmoid(u_ij) - [j = i + offset]
//
// x_i are rows of the image features X [N, D], w_j rows of the text features W [P, D], scale and
// bias are logit_scale and logit_bias. s_ij is 1 for a match, j = i + offset, and else -1. One pass
// over the products gives the loss and the gradient, which replaces the products (pairwise.h).
#include "common/checks.h"
#include "common/results.h"
#include "core/pairwise.h"

#include <torch/library.h>

#include <vector>

namespace mulki {
namespace {

struct Siglip {
  const Tensor &x, &w;
  const float scale, bias;
  const int64_t offset;
  Tensor loss;
  double dscale = 0, dbias = 0;
};

// The match of each row is left out of the vectors and computed in double.
template <typename Engine>
void compute(Siglip& a, const Upstream& upstream, std::array<bool, 4> wanted, Grads& grads) {
  const float scale = a.scale, bias = a.bias;
  PairwisePass<Engine> pass({{a.x, a.w}}, wanted[0], wanted[1]);
  const Tiling& t = pass.tiling;
  const int64_t cells = t.tiles * t.rows;
  std::vector<double> losses(cells), scales(cells), biases(cells);
  std::vector<float> valid(t.tiles * t.width, 0.0f);
  std::fill(valid.begin(), valid.begin() + t.p, 1.0f);
  const bool stored = pass.gradients.any();

  pass.run(
      [&](int64_t first, int64_t tile, int64_t begin, int64_t end, float* const* products) {
        const Vec s(scale), b(bias), zero(0.0f), one(1.0f);
        for (int64_t i = begin; i < end; ++i) {
          float* y = products[0] + (i - begin) * t.width;
          const double g = upstream[first + i];
          const Vec grad_of_row{float(g)};
          Vec loss_sum(0.0f), sigmoid_y_sum(0.0f), sigmoid_sum(0.0f);
          const int64_t match = first + i + a.offset - tile * t.width;
          const bool matched = match >= 0 && match < t.valid(tile);
          const double y_match = matched ? y[match] : 0.0;
          for (int64_t j = 0; j < t.width; j += Vec::size()) {
            const Vec v = Vec::loadu(y + j);
            const Vec u = at::vec::fmadd(v, s, b);
            // exp(-|u|) is in (0, 1], so softplus and sigmoid cannot overflow.
            const Vec exp_neg = exp_of(zero - u.abs());
            const Vec sigmoid_of_abs = one / (one + exp_neg);
            Vec mask = Vec::loadu(&valid[tile * t.width + j]);
            if (matched && match >= j && match < j + Vec::size()) {
              mask = mask * Vec::arange(float(j), 1.0f).ne(Vec(float(match)));
            }
            // Chosen, not multiplied by the mask: where u is infinite or NaN, 0 times it is NaN.
            const Vec sigmoid = Vec::blendv(
                zero, Vec::blendv(exp_neg * sigmoid_of_abs, sigmoid_of_abs, u >= zero),
                mask > zero);
            const Vec softplus =
                Vec::blendv(zero, at::vec::maximum(u, zero) + log1p_of(exp_neg), mask > zero);
            loss_sum = loss_sum + softplus;
            sigmoid_y_sum = at::vec::fmadd(sigmoid, v, sigmoid_y_sum);
            sigmoid_sum = sigmoid_sum + sigmoid;
            if (stored) {
              (sigmoid * grad_of_row).store(y + j);
            }
          }
          double row_loss = sum_of(loss_sum), row_sigmoid_y = sum_of(sigmoid_y_sum),
                 row_sigmoid = sum_of(sigmoid_sum);
          if (matched) {
            const double u = y_match * scale + bias;
            row_loss += std::max(-u, 0.0) + std::log1p(std::exp(-std::abs(u)));
            const double at_match = -1 / (1 + std::exp(u));
            row_sigmoid_y += at_match * y_match;
            row_sigmoid += at_match;
            if (stored) {
              y[match] = float(at_match * g);
            }
          }
          losses[tile * t.rows + i] = row_loss;
          scales[tile * t.rows + i] = row_sigmoid_y * g;
          biases[tile * t.rows + i] = row_sigmoid * g;
        }
      },
      [&](int64_t first, int64_t count) {
        float* out = a.loss.mutable_data_ptr<float>() + first;
        add_row_sums(losses, t, count, [&](int64_t i, double sum) { out[i] = float(sum); });
        add_row_sums(scales, t, count, [&](int64_t, double sum) { a.dscale += sum; });
        add_row_sums(biases, t, count, [&](int64_t, double sum) { a.dbias += sum; });
        pass.gradients.accumulate(first, count, scale, grads.x, grads.w);
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip(
    const Tensor& image_features,
    const Tensor& text_features,
    const Tensor& logit_scale,
    const Tensor& logit_bias,
    int64_t offset,
    const std::optional<Tensor>& grad,
    c10::string_view reduction,
    std::array<bool, 4> wanted) {
  check_matrices("image_features", image_features, "text_features", text_features);
  check_shape("logit_scale", logit_scale, {});
  check_shape("logit_bias", logit_bias, {});
  const Request request(grad, reduction);
  const int64_t n = image_features.size(0), p = text_features.size(0);
  const Upstream upstream = request.upstream(n, n);
  Grads grads(image_features, text_features, request.dtype(image_features), wanted[0], wanted[1]);
  Siglip of{
      image_features, text_features, float(value_of(logit_scale)), float(value_of(logit_bias)),
      // At these limits no row has a match. Larger offsets would overflow.
      std::clamp(offset, -n, p), at::zeros({n}, at::kFloat)};
  if (n > 0 && p > 0) {
    with_engine(image_features.scalar_type(), [&](auto engine) {
      compute<decltype(engine)>(of, upstream, wanted, grads);
    });
  }
  return {
      request.loss(of.loss, n), grads.x, grads.w, scalar_if(wanted[2], of.dscale),
      scalar_if(wanted[3], of.dbias)};
}

} // namespace

TORCH_LIBRARY_IMPL(mulki_cpp, CPU, m) {
  m.impl("siglip", &siglip);
}

} // namespace mulki
