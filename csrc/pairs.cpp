// Losses over matching pairs, u_ij = scale x_i . w_j (+ bias).
//
//   contrastive  loss_i = 1/2 (log sum_j exp u_ij + log sum_j exp u_ji) - u_ii, N pairs
//   siglip       loss_i = sum_j softplus(-y_ij u_ij), y = +1 where j = i + offset, else -1, N x P
//
// Siglip forms its gradient in the same pass as its value. Contrastive needs every row and every
// column sum first: one pass of products for those, and one more for the gradient.
#include "checks.h"
#include "logits.h"
#include "results.h"

#include <torch/library.h>

#include <limits>
#include <vector>

namespace mulki {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Ones around a zero; read from Vec::size() - 1 - i on, only lane i of a vector is zero.
struct AllBut {
  AllBut() {
    std::fill(std::begin(values), std::end(values), 1.0f);
    values[Vec::size() - 1] = 0.0f;
  }
  float values[2 * Vec::size() - 1];
};
const AllBut kAllButOne;
const float* const kAllBut = kAllButOne.values;

// Log of a sum of exponentials that is taken piece by piece, for `n` rows or columns at once.
struct RunningSum {
  explicit RunningSum(int64_t n) : most(n, -kInfinity), sum(n, 0.0) {}

  void add(int64_t i, float piece_most, float piece_sum) {
    if (piece_most > most[i] || piece_most != piece_most) {
      sum[i] = sum[i] * std::exp(double(most[i]) - piece_most) + piece_sum;
      most[i] = piece_most;
    } else {
      sum[i] += piece_sum * std::exp(double(piece_most) - most[i]);
    }
  }
  double log(int64_t i) const {
    return most[i] + std::log(sum[i]);
  }

  std::vector<float> most;
  std::vector<double> sum;
};

// The logits of one super-block after the other, in tiles, with G in their place afterwards.
template <typename Engine>
struct Pairs {
  Pairs(const Tensor& x, const Tensor& w, bool wanted_x, bool wanted_w)
      : tiling(tiling_for<Engine>(x.size(0), w.size(0), 1, wanted_x || wanted_w)),
        rows(x),
        prototypes(w),
        logits(tiling, {{&rows, &prototypes}}),
        gradients(tiling, rows, prototypes, wanted_x, wanted_w) {}

  // Runs tile(first, t, begin, end, y) with the products y [end - begin, width] of rows [begin, end)
  // of a super-block with tile t, then after(first, count).
  template <typename Tile, typename After>
  void sweep(const Tile& tile, const After& after) {
    for (int64_t first = 0; first < tiling.n; first += tiling.rows) {
      const int64_t count = std::min(tiling.rows, tiling.n - first);
      logits.run(
          first, count, [](int64_t) { return true; },
          [&](int64_t t, int64_t begin, int64_t end) {
            Scratch local;
            if (!gradients.any()) {
              local = Scratch(tiling.block * tiling.width * int64_t(sizeof(float)));
            }
            float* y = gradients.any() ? gradients.values(0, t, begin) : local.data<float>();
            logits.multiply(0, t, begin, end, y);
            tile(first, t, begin, end, y);
          });
      after(first, count);
    }
  }

  const Tiling tiling;
  Rows<typename Engine::Element> rows, prototypes;
  Logits<Engine> logits;
  Gradients<Engine> gradients;
};

// Row sums of [tiles][rows of the super-block] partial results, in double and in order.
template <typename F>
void add_rows(const std::vector<double>& partial, const Tiling& t, int64_t count, const F& add) {
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t tile = 0; tile < t.tiles; ++tile) {
      sum += partial[tile * t.rows + i];
    }
    add(i, sum);
  }
}

// The sums are in double: in float, 100 + log(1 + 1e-6) has no loss left.
struct Sums {
  Tensor loss, row_lse, column_lse;
};

template <typename Engine>
Sums contrastive_sums(const Tensor& x, const Tensor& w, float scale) {
  Pairs<Engine> pairs(x, w, false, false);
  const Tiling& t = pairs.tiling;
  const int64_t n = t.n;
  std::vector<float> row_most(t.tiles * t.rows), row_sum(t.tiles * t.rows);
  std::vector<float> column_most(t.blocks * t.tiles * t.width),
      column_sum(t.blocks * t.tiles * t.width), diagonal(n);
  RunningSum columns(t.tiles * t.width);
  Tensor row_lse = at::empty({n}, at::kDouble), column_lse = at::empty({n}, at::kDouble);
  Tensor loss = empty_float({n});
  double* row_out = row_lse.mutable_data_ptr<double>();
  std::vector<float> beyond(t.width, -kInfinity); // added to columns beyond the last pair
  std::fill(beyond.begin(), beyond.begin() + t.valid(t.tiles - 1), 0.0f);
  const std::vector<float> within(t.width, 0.0f);

  pairs.sweep(
      [&](int64_t first, int64_t tile, int64_t begin, int64_t end, float* block) {
        const float* add = tile == t.tiles - 1 ? beyond.data() : within.data();
        const Vec s(scale);
        const int64_t at = (begin / t.block * t.tiles + tile) * t.width;
        float* most = &column_most[at];
        float* sum = &column_sum[at];
        std::fill(most, most + t.width, -kInfinity);
        std::fill(sum, sum + t.width, 0.0f);
        for (int64_t i = begin; i < end; ++i) {
          float* u = block + (i - begin) * t.width;
          Vec top(-kInfinity);
          for (int64_t j = 0; j < t.width; j += Vec::size()) {
            const Vec v = at::vec::fmadd(Vec::loadu(u + j), s, Vec::loadu(add + j));
            v.store(u + j);
            top = at::vec::maximum(top, v);
            at::vec::maximum(Vec::loadu(most + j), v).store(most + j);
          }
          row_most[tile * t.rows + i] = max_of(top);
          const int64_t match = first + i - tile * t.width;
          if (match >= 0 && match < t.width) {
            diagonal[first + i] = u[match];
          }
        }
        for (int64_t i = begin; i < end; ++i) {
          const float* u = block + (i - begin) * t.width;
          const Vec top(row_most[tile * t.rows + i]);
          Vec in_row(0.0f);
          for (int64_t j = 0; j < t.width; j += Vec::size()) {
            const Vec v = Vec::loadu(u + j);
            in_row = in_row + exp_of(v - top);
            // Beyond the last pair both are -infinity, and nobody reads the NaN that comes out.
            (Vec::loadu(sum + j) + exp_of(v - Vec::loadu(most + j))).store(sum + j);
          }
          row_sum[tile * t.rows + i] = sum_of(in_row);
        }
      },
      [&](int64_t first, int64_t count) {
        RunningSum merged(count);
        for (int64_t tile = 0; tile < t.tiles; ++tile) {
          for (int64_t i = 0; i < count; ++i) {
            merged.add(i, row_most[tile * t.rows + i], row_sum[tile * t.rows + i]);
          }
        }
        for (int64_t i = 0; i < count; ++i) {
          row_out[first + i] = merged.log(i);
        }
        const int64_t blocks = (count + t.block - 1) / t.block;
        at::parallel_for(0, n, 512, [&](int64_t from, int64_t to) {
          for (int64_t b = 0; b < blocks; ++b) {
            for (int64_t j = from; j < to; ++j) {
              const int64_t at = b * t.tiles * t.width + j;
              columns.add(j, column_most[at], column_sum[at]);
            }
          }
        });
      });

  for (int64_t i = 0; i < n; ++i) {
    const double column = columns.log(i);
    column_lse.mutable_data_ptr<double>()[i] = column;
    loss.mutable_data_ptr<float>()[i] = float((row_out[i] + column) / 2 - diagonal[i]);
  }
  return {loss, row_lse, column_lse};
}

// A double as the sum of two floats.
struct Split {
  explicit Split(double value = 0) : high(float(value)), low(float(value - high)) {}
  float high, low;
};

// dloss/du_ij = g_i/2 exp(u_ij - row_i) + g_j/2 exp(u_ij - column_j) - g_i [i = j]. Returns its
// product with Y summed, which is dloss/dscale. Of a match this is the small difference of numbers
// near 1, so matches are left out of the vectors and taken in double.
template <typename Engine>
double contrastive_gradients(
    const Tensor& x,
    const Tensor& w,
    float scale,
    const Tensor& row_lse, // double
    const Tensor& column_lse, // double
    const Upstream& upstream,
    std::array<bool, 3> wanted,
    Grads& grads) {
  Pairs<Engine> pairs(x, w, wanted[0], wanted[1]);
  const Tiling& t = pairs.tiling;
  const int64_t n = t.n;
  const double* row = row_lse.const_data_ptr<double>();
  const double* column = column_lse.const_data_ptr<double>();
  const int64_t padded = t.tiles * t.width;
  // Beyond the last pair the exponentials are multiplied by zero.
  std::vector<float> high(padded, 0.0f), low(padded, 0.0f), half(padded, 0.0f), keep(padded, 0.0f);
  for (int64_t j = 0; j < n; ++j) {
    const Split lse(column[j]);
    high[j] = lse.high;
    low[j] = lse.low;
    half[j] = float(upstream[j] / 2);
    keep[j] = 1.0f;
  }
  std::vector<double> partial(t.tiles * t.rows);
  double dscale = 0;

  pairs.sweep(
      [&](int64_t first, int64_t tile, int64_t begin, int64_t end, float* block) {
        const Vec s(scale);
        const int64_t at = tile * t.width;
        for (int64_t i = begin; i < end; ++i) {
          float* y = block + (i - begin) * t.width;
          const Split lse(row[first + i]);
          const Vec row_high(lse.high), row_low(lse.low), mine(half[first + i]);
          Vec sum(0.0f);
          const int64_t match = first + i - at;
          const bool matched = match >= 0 && match < t.width;
          const double y_match = matched ? y[match] : 0.0;
          for (int64_t j = 0; j < t.width; j += Vec::size()) {
            const Vec v = Vec::loadu(y + j);
            const Vec u = v * s;
            const Vec of_row = mine * exp_of(u - row_high - row_low);
            const Vec of_column = Vec::loadu(&half[at + j]) *
                exp_of(u - Vec::loadu(&high[at + j]) - Vec::loadu(&low[at + j]));
            Vec g = (of_row + of_column) * Vec::loadu(&keep[at + j]);
            if (matched && match >= j && match < j + Vec::size()) {
              g = g * Vec::loadu(kAllBut + Vec::size() - 1 - (match - j));
            }
            sum = at::vec::fmadd(g, v, sum);
            g.store(y + j);
          }
          double total = sum_of(sum);
          if (matched) {
            const float u = float(y_match) * scale; // rounded as in the sums
            const double g = half[first + i] *
                (std::expm1(double(u) - row[first + i]) + std::expm1(double(u) - column[first + i]));
            y[match] = float(g);
            total += g * y_match;
          }
          partial[tile * t.rows + i] = total;
        }
        pairs.gradients.commit(first, tile, begin, end - begin);
      },
      [&](int64_t first, int64_t count) {
        add_rows(partial, t, count, [&](int64_t, double sum) { dscale += sum; });
        pairs.gradients.accumulate(first, count, scale, grads.x, grads.w);
      });
  pairs.gradients.finish(scale, grads.w);
  return dscale;
}

Sums contrastive_sums(const Tensor& x, const Tensor& w, const Tensor& scale) {
  check_pairs(x, w, scale);
  if (x.size(0) == 0) {
    return {empty_float({0}), at::empty({0}, at::kDouble), at::empty({0}, at::kDouble)};
  }
  const float s = float(value_of(scale));
  return with_engine(x.scalar_type(), x.size(1), [&](auto engine) {
    return contrastive_sums<decltype(engine)>(x, w, s);
  });
}

double contrastive_gradients(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scale,
    const Tensor& row_lse,
    const Tensor& column_lse,
    const Upstream& upstream,
    std::array<bool, 3> wanted,
    Grads& grads) {
  if (x.size(0) == 0) {
    return 0;
  }
  const float s = float(value_of(scale));
  return with_engine(x.scalar_type(), x.size(1), [&](auto engine) {
    return contrastive_gradients<decltype(engine)>(
        x, w, s, row_lse, column_lse, upstream, wanted, grads);
  });
}

std::tuple<Tensor, Tensor, Tensor> contrastive(
    const Tensor& x, const Tensor& w, const Tensor& scale) {
  const Sums sums = contrastive_sums(x, w, scale);
  return {sums.loss, sums.row_lse.to(at::kFloat), sums.column_lse.to(at::kFloat)};
}

std::tuple<Tensor, Tensor, Tensor> contrastive_backward(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& w,
    const Tensor& scale,
    const Tensor& row_lse,
    const Tensor& column_lse,
    std::array<bool, 3> wanted) {
  check_pairs(x, w, scale);
  check_rows("grad", grad, x.size(0));
  check_rows("row_lse", row_lse, x.size(0));
  check_rows("column_lse", column_lse, x.size(0));
  Grads grads(x, w, x.scalar_type(), wanted[0], wanted[1]);
  const double dscale = contrastive_gradients(
      x, w, scale, row_lse.to(at::kDouble).contiguous(), column_lse.to(at::kDouble).contiguous(),
      Upstream(grad), wanted, grads);
  return {grads.x, grads.w, scalar_if(wanted[2], dscale)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_reduced(
    const Tensor& x, const Tensor& w, const Tensor& scale, bool mean, std::array<bool, 3> wanted) {
  const Sums sums = contrastive_sums(x, w, scale);
  const int64_t n = x.size(0);
  const double total = sum_of_rows(sums.loss);
  Grads grads(x, w, at::kFloat, wanted[0], wanted[1]);
  const double dscale = contrastive_gradients(
      x, w, scale, sums.row_lse, sums.column_lse, Upstream(share_of(mean, n)), wanted, grads);
  return {scalar(mean ? total / double(n) : total), grads.x, grads.w, scalar_if(wanted[2], dscale)};
}

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
            const Vec softplus = (at::vec::maximum(u, zero) + small.log1p()) * counts;
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
  pairs.gradients.finish(scale, grads.w);
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
  return siglip_run(
             x, w, scale, bias, offset, Upstream(1.0), {false, false, false, false}, none)
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
  return {scalar(mean ? sum / double(n) : sum), grads.x, grads.w, scalar_if(wanted[2], r.dscale),
          scalar_if(wanted[3], r.dbias)};
}

} // namespace

TORCH_LIBRARY_IMPL(mulki_cpp, CPU, m) {
  m.impl("contrastive", &contrastive);
  m.impl("contrastive_backward", &contrastive_backward);
  m.impl("contrastive_reduced", &contrastive_reduced);
  m.impl("siglip", &siglip);
  m.impl("siglip_backward", &siglip_backward);
  m.impl("siglip_reduced", &siglip_reduced);
}

} // namespace mulki
