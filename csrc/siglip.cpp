// loss_i = sum_j softplus(-y_ij u_ij), u_ij = scale x_i . w_j + bias, y = +1 where j = i + offset, else -1.
// The gradient is formed in the same pass as the value.
#include "checks.h"
#include "pairs.h"
#include "results.h"

#include <torch/library.h>

#include <vector>

namespace mulki {
namespace {

struct SiglipResult {
  Tensor loss;
  double dscale, dbias;
};

// dloss/du_ij = g_i (sigmoid(u_ij) - [j = i + offset]).
template <typename Engine>
SiglipResult siglip_run(
    const Tensor& x,
    const Tensor& w,
    float scale,
    float bias,
    int64_t offset,
    const Upstream& upstream,
    std::array<bool, 4> wanted,
    Grads& grads) {
  Pairs<Engine> pairs(x, w, wanted[0], wanted[1]);
  const Tiling& t = pairs.tiling;
  const int64_t cells = t.tiles * t.rows;
  std::vector<double> losses(cells), scales(cells), biases(cells);
  std::vector<float> keep(t.tiles * t.width, 0.0f);
  std::fill(keep.begin(), keep.begin() + t.p, 1.0f);
  const bool stored = pairs.gradients.any();
  Tensor loss = empty_float({t.n});
  double dscale = 0, dbias = 0;

  pairs.sweep(
      [&](int64_t first, int64_t tile, int64_t begin, int64_t end, float* block) {
        const Vec s(scale), b(bias), zero(0.0f), one(1.0f);
        for (int64_t i = begin; i < end; ++i) {
          float* y = block + (i - begin) * t.width;
          const double g = upstream[first + i];
          const Vec mine{float(g)};
          Vec value(0.0f), with_y(0.0f), total(0.0f);
          const int64_t match = first + i + offset - tile * t.width;
          const bool matched = match >= 0 && match < t.valid(tile);
          const double y_match = matched ? y[match] : 0.0;
          for (int64_t j = 0; j < t.width; j += Vec::size()) {
            const Vec v = Vec::loadu(y + j);
            const Vec u = at::vec::fmadd(v, s, b);
            // exp(-|u|) is in (0, 1], from which both softplus and sigmoid follow without overflow.
            const Vec small = exp_of(zero - u.abs());
            const Vec whole = one / (one + small);
            Vec counts = Vec::loadu(&keep[tile * t.width + j]);
            if (matched && match >= j && match < j + Vec::size()) {
              counts = counts * Vec::loadu(kAllBut + Vec::size() - 1 - (match - j));
            }
            const Vec sigmoid = Vec::blendv(small * whole, whole, u >= zero) * counts;
            const Vec softplus = Vec::blendv( // of a match it may be infinite
                zero, at::vec::maximum(u, zero) + log1p_of(small), counts > zero);
            value = value + softplus;
            with_y = at::vec::fmadd(sigmoid, v, with_y);
            total = total + sigmoid;
            if (stored) {
              (sigmoid * mine).store(y + j);
            }
          }
          double loss_here = sum_of(value), y_here = sum_of(with_y), all_here = sum_of(total);
          if (matched) {
            const double u = y_match * scale + bias;
            loss_here += std::max(-u, 0.0) + std::log1p(std::exp(-std::abs(u)));
            const double at_match = -1 / (1 + std::exp(u));
            y_here += at_match * y_match;
            all_here += at_match;
            if (stored) {
              y[match] = float(at_match * g);
            }
          }
          losses[tile * t.rows + i] = loss_here;
          scales[tile * t.rows + i] = y_here * g;
          biases[tile * t.rows + i] = all_here * g;
        }
        pairs.gradients.commit(first, tile, begin, end - begin);
      },
      [&](int64_t first, int64_t count) {
        float* out = loss.mutable_data_ptr<float>() + first;
        add_rows(losses, t, count, [&](int64_t i, double sum) { out[i] = float(sum); });
        add_rows(scales, t, count, [&](int64_t, double sum) { dscale += sum; });
        add_rows(biases, t, count, [&](int64_t, double sum) { dbias += sum; });
        pairs.gradients.accumulate(first, count, scale, grads.x, grads.w);
      });
  return {loss, dscale, dbias};
}

SiglipResult siglip_run(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scale,
    const Tensor& bias,
    int64_t offset,
    const Upstream& upstream,
    std::array<bool, 4> wanted,
    Grads& grads) {
  check_biased(x, w, scale, bias);
  const int64_t n = x.size(0), p = w.size(0);
  if (n == 0 || p == 0) {
    return {at::zeros({n}, at::kFloat), 0, 0};
  }
  const float s = float(value_of(scale)), b = float(value_of(bias));
  // Beyond these no row has a match, and indices would overflow.
  const int64_t shift = std::clamp(offset, -n, p);
  return with_engine(x.scalar_type(), x.size(1), [&](auto engine) {
    return siglip_run<decltype(engine)>(x, w, s, b, shift, upstream, wanted, grads);
  });
}

Tensor siglip(
    const Tensor& x, const Tensor& w, const Tensor& scale, const Tensor& bias, int64_t offset) {
  Grads none(x, w, at::kFloat, false, false);
  return siglip_run(x, w, scale, bias, offset, Upstream(1.0), {false, false, false, false}, none)
      .loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> siglip_backward(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& w,
    const Tensor& scale,
    const Tensor& bias,
    int64_t offset,
    std::array<bool, 4> wanted) {
  check_biased(x, w, scale, bias);
  check_rows("grad", grad, x.size(0));
  Grads grads(x, w, x.scalar_type(), wanted[0], wanted[1]);
  const SiglipResult r = siglip_run(x, w, scale, bias, offset, Upstream(grad), wanted, grads);
  return {grads.x, grads.w, scalar_if(wanted[2], r.dscale), scalar_if(wanted[3], r.dbias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_reduced(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scale,
    const Tensor& bias,
    int64_t offset,
    bool mean,
    std::array<bool, 4> wanted) {
  check_biased(x, w, scale, bias);
  const int64_t n = x.size(0);
  Grads grads(x, w, at::kFloat, wanted[0], wanted[1]);
  const SiglipResult r =
      siglip_run(x, w, scale, bias, offset, Upstream(share_of(mean, n)), wanted, grads);
  const double sum = sum_of_rows(r.loss);
  return {
      scalar(mean ? sum / double(n) : sum), grads.x, grads.w, scalar_if(wanted[2], r.dscale),
      scalar_if(wanted[3], r.dbias)};
}

} // namespace

TORCH_LIBRARY_IMPL(mulki_cpp, CPU, m) {
  m.impl("siglip", &siglip);
  m.impl("siglip_backward", &siglip_backward);
  m.impl("siglip_reduced", &siglip_reduced);
}

} // namespace mulki
