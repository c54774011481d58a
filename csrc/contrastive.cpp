// contrastive: the loss of CLIP over N pairs of an image and a text.
//
//   loss_i = 1/2 (row_i + column_i) - u_ii,   u_ij = scale x_i . w_j
//   row_i = log sum_j exp u_ij,   column_j = log sum_i exp u_ij
//   dloss/du_ij = g_i/2 exp(u_ij - row_i) + g_j/2 exp(u_ij - column_j) - g_i [i = j]
//
// x_i are rows of the image features X [N, D], w_j rows of the text features W [N, D], scale is
// logit_scale and g_i the upstream gradient of loss_i. The gradient needs all row_i and column_j
// first. So a first pass over the products takes the sums and a second one forms the gradient,
// which replaces the products. The first pass keeps the products of as many rows as fit into a
// ProductCache; the second pass computes the others again (pairwise.h).
//
// A block of products needs an exponential for the row and one for the column of each element. If
// the logits of a block are close to each other, which is the common case, one is enough:
//
//   exp(u_ij - column_j) = exp(u_ij - row_i) exp(row_i - m) exp(m - column_j)
//
// with one number m for the block: a factor for each row times a factor for each column.
#include "checks.h"
#include "pairwise.h"
#include "results.h"

#include <torch/library.h>

#include <limits>
#include <tuple>
#include <utility>
#include <vector>

namespace mulki {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// The largest difference between the maxima, or the sums, of a block for which one exponential is
// enough: where exp(u - row) underflows, near 1e-38, its product with exp(40) is still negligible.
constexpr float kMaxSpread = 40.0f;

// log sum exp of `n` rows or columns, to which partial sums are added one after the other.
struct RunningSum {
  explicit RunningSum(int64_t n) : max(n, -kInfinity), sum(n, 0.0) {}

  void add(int64_t i, float piece_max, float piece_sum) {
    if (piece_max > max[i] || piece_max != piece_max) {
      sum[i] = sum[i] * std::exp(double(max[i]) - piece_max) + piece_sum;
      max[i] = piece_max;
    } else {
      sum[i] += piece_sum * std::exp(double(piece_max) - max[i]);
    }
  }
  double log(int64_t i) const {
    return max[i] + std::log(sum[i]);
  }

  std::vector<float> max;
  std::vector<double> sum;
};

// row_lse and column_lse are double: in float, 100 + log(1 + 1e-6) is 100, and the loss would be 0.
struct Sums {
  Tensor loss, row_lse, column_lse;
};

// Of each row and of each column of a block: a maximum m of u, and the sum of exp(u - m).
struct PartialSums {
  float *row_max, *row_sum, *column_max, *column_sum;
};

// Takes the sums of the products y [rows, width]. Only the first `valid` columns are texts: `mask`,
// which is added to the logits, is 0 there and -infinity in the padding.
//
// `has_match` says that the block has elements of the diagonal. After training, such an element is
// nearly all of its sum. It is exact only if the maximum that is subtracted is the element itself,
// so these blocks take two exponentials.
void sums_of_block(
    const float* y,
    int64_t rows,
    int64_t width,
    int64_t valid,
    float scale,
    const float* mask,
    bool has_match,
    const PartialSums& out) {
  const Vec s(scale);
  std::fill(out.column_max, out.column_max + width, -kInfinity);
  std::fill(out.column_sum, out.column_sum + width, 0.0f);
  const auto logits = [&](int64_t i, int64_t j) {
    return at::vec::fmadd(Vec::loadu(y + i * width + j), s, Vec::loadu(mask + j));
  };
  Vec block_max(-kInfinity);
  for (int64_t i = 0; i < rows; ++i) {
    Vec top(-kInfinity);
    for (int64_t j = 0; j < width; j += Vec::size()) {
      const Vec u = logits(i, j);
      top = at::vec::maximum(top, u);
      at::vec::maximum(Vec::loadu(out.column_max + j), u).store(out.column_max + j);
    }
    out.row_max[i] = max_of(top);
    block_max = at::vec::maximum(block_max, top);
  }
  const float max = max_of(block_max);
  const float min_column_max = *std::min_element(out.column_max, out.column_max + valid);
  const float min_row_max = *std::min_element(out.row_max, out.row_max + rows);
  // False if there is an infinity or a NaN.
  const bool small_spread = !has_match && min_column_max >= max - kMaxSpread && max < kInfinity &&
      min_row_max > -kInfinity;
  alignas(64) float exp_row_max[64];
  for (int64_t i = 0; i < rows && small_spread; i += Vec::size()) {
    const int64_t n = std::min<int64_t>(Vec::size(), rows - i);
    exp_of_difference(Vec::loadu(out.row_max + i, n), Vec(max)).store(exp_row_max + i, n);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const Vec top(out.row_max[i]);
    Vec row_total(0.0f);
    if (small_spread) {
      const Vec factor(exp_row_max[i]);
      for (int64_t j = 0; j < width; j += Vec::size()) {
        const Vec e = exp_of(logits(i, j) - top);
        row_total = row_total + e;
        at::vec::fmadd(e, factor, Vec::loadu(out.column_sum + j)).store(out.column_sum + j);
      }
    } else {
      for (int64_t j = 0; j < width; j += Vec::size()) {
        const Vec u = logits(i, j);
        row_total = row_total + exp_of(u - top);
        // In the padding both are -infinity. The difference is NaN, and it is not read.
        (Vec::loadu(out.column_sum + j) + exp_of(u - Vec::loadu(out.column_max + j)))
            .store(out.column_sum + j);
      }
    }
    out.row_sum[i] = sum_of(row_total);
  }
  if (small_spread) {
    std::fill(out.column_max, out.column_max + width, max);
  }
}

template <typename Engine>
Sums contrastive_sums(
    PairwisePass<Engine>& pass, float scale, const ProductCache* cache = nullptr) {
  const Tiling& t = pass.tiling;
  const int64_t n = t.n;
  std::vector<float> row_max(t.tiles * t.rows), row_sum(t.tiles * t.rows);
  std::vector<float> column_max(t.blocks * t.tiles * t.width),
      column_sum(t.blocks * t.tiles * t.width), diagonal(n);
  RunningSum columns(t.tiles * t.width);
  Tensor row_lse = at::empty({n}, at::kDouble), column_lse = at::empty({n}, at::kDouble);
  Tensor loss = empty_float({n});
  double* row_out = row_lse.mutable_data_ptr<double>();
  std::vector<float> last_mask(t.width, -kInfinity); // of the last tile
  std::fill(last_mask.begin(), last_mask.begin() + t.valid(t.tiles - 1), 0.0f);
  const std::vector<float> full_mask(t.width, 0.0f);

  pass.run(
      [&](int64_t first, int64_t tile, int64_t begin, int64_t end, float* y) {
        const int64_t row_at = tile * t.rows + begin;
        const int64_t column_at = (begin / t.block * t.tiles + tile) * t.width;
        bool has_match = false;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t match = first + i - tile * t.width;
          if (match >= 0 && match < t.width) {
            diagonal[first + i] = y[(i - begin) * t.width + match] * scale;
            has_match = true;
          }
        }
        sums_of_block(
            y, end - begin, t.width, t.valid(tile), scale,
            tile == t.tiles - 1 ? last_mask.data() : full_mask.data(), has_match,
            {&row_max[row_at], &row_sum[row_at], &column_max[column_at], &column_sum[column_at]});
      },
      [&](int64_t first, int64_t count) {
        RunningSum merged(count);
        for (int64_t tile = 0; tile < t.tiles; ++tile) {
          for (int64_t i = 0; i < count; ++i) {
            merged.add(i, row_max[tile * t.rows + i], row_sum[tile * t.rows + i]);
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
              columns.add(j, column_max[at], column_sum[at]);
            }
          }
        });
      },
      cache);

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

// dloss/du, block by block. On the diagonal it is the small difference of numbers near 1, so the
// diagonal is left out of the vectors and computed in double.
class GradientOfLogits {
 public:
  // `row` and `column` are row_i and column_j, [N] each.
  GradientOfLogits(
      const Tiling& t,
      float scale,
      const double* row,
      const double* column,
      const Upstream& upstream)
      : t_(t),
        scale_(scale),
        row_(row),
        column_(column),
        half_grad_(t.tiles * t.width, 0.0f),
        valid_(half_grad_),
        high_(half_grad_),
        low_(half_grad_) {
    for (int64_t j = 0; j < t.n; ++j) {
      const Split lse(column[j]);
      high_[j] = lse.high;
      low_[j] = lse.low;
      half_grad_[j] = float(upstream[j] / 2);
      valid_[j] = 1.0f;
    }
  }

  // Writes g [end - begin, width] from y, which may be the same memory, for rows [begin, end) of
  // the super-block that begins at row `first`. `sums` gets sum_j g y of each row, whose total is
  // dloss/dscale.
  void block(
      int64_t first,
      int64_t tile,
      int64_t begin,
      int64_t end,
      const float* y,
      float* g,
      double* sums) const {
    const int64_t start = first + begin, rows = end - begin;
    alignas(64) float high[kMaxBlock], low[kMaxBlock], row_factors[kMaxBlock],
        column_factors[kMaxWidth];
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(rows <= kMaxBlock && t_.width <= kMaxWidth);
    for (int64_t i = 0; i < rows; ++i) {
      const Split lse(row_[start + i]);
      high[i] = lse.high;
      low[i] = lse.low;
    }
    const bool small_spread = factors(tile, rows, high, low, row_factors, column_factors);
    for (int64_t i = 0; i < rows; ++i) {
      const Row row{start + i, tile, y + i * t_.width, g + i * t_.width, high[i], low[i]};
      sums[i] = small_spread ? gradient<true>(row, row_factors[i], column_factors)
                             : gradient<false>(row, 0.0f, nullptr);
    }
  }

 private:
  static constexpr int64_t kMaxBlock = 64, kMaxWidth = 128;
  struct Row {
    int64_t index, tile;
    const float* y;
    float* g;
    float high, low; // row_i as the sum of two floats
  };

  // Writes exp(row_i - m) of the rows and g_j/2 exp(m - column_j) of the columns of a block, or
  // returns false if a column_j is too far below a row_i.
  bool factors(
      int64_t tile,
      int64_t rows,
      const float* high,
      const float* low,
      float* row_factors,
      float* column_factors) const {
    const int64_t at = tile * t_.width;
    const auto [min_row, max_row] = std::minmax_element(high, high + rows);
    const float max = *max_row;
    const float min_column = *std::min_element(&high_[at], &high_[at] + t_.valid(tile));
    // False if there is an infinity or a NaN.
    if (!(min_column >= max - kMaxSpread && max < kInfinity && *min_row > -kInfinity)) {
      return false;
    }
    const Vec reference(max);
    for (int64_t i = 0; i < rows; i += Vec::size()) {
      const int64_t n = std::min<int64_t>(Vec::size(), rows - i);
      const Vec e = exp_of_difference(Vec::loadu(high + i, n), reference);
      at::vec::fmadd(e, Vec::loadu(low + i, n), e).store(row_factors + i, n);
    }
    for (int64_t j = 0; j < t_.width; j += Vec::size()) {
      const Vec e = exp_of_difference(reference, Vec::loadu(&high_[at + j]));
      const Vec factor = (e - e * Vec::loadu(&low_[at + j])) * Vec::loadu(&half_grad_[at + j]);
      where_active(&valid_[at + j], 0.0f, factor).store(column_factors + j);
    }
    return true;
  }

  template <bool SMALL_SPREAD>
  double gradient(const Row& row, float row_factor, const float* column_factors) const {
    const int64_t at = row.tile * t_.width, match = row.index - at;
    const bool matched = match >= 0 && match < t_.width;
    const double y_match = matched ? row.y[match] : 0.0;
    const Vec s(scale_), high(row.high), low(row.low), half(half_grad_[row.index]),
        factor(row_factor);
    Vec sum(0.0f);
    for (int64_t j = 0; j < t_.width; j += Vec::size()) {
      const Vec y = Vec::loadu(row.y + j);
      const Vec u = y * s;
      const Vec e = exp_of(u - high - low);
      Vec g;
      if constexpr (SMALL_SPREAD) {
        g = e * at::vec::fmadd(factor, Vec::loadu(column_factors + j), half);
      } else {
        const Vec e_column = exp_of(u - Vec::loadu(&high_[at + j]) - Vec::loadu(&low_[at + j]));
        g = at::vec::fmadd(e_column, Vec::loadu(&half_grad_[at + j]), half * e);
      }
      // In the padding the exponentials may be infinite.
      g = where_active(&valid_[at + j], 0.0f, g);
      if (matched && match >= j && match < j + Vec::size()) {
        g = g * zero_in_lane(match - j);
      }
      sum = at::vec::fmadd(g, y, sum);
      g.store(row.g + j);
    }
    double total = sum_of(sum);
    if (matched) {
      const float u = float(y_match) * scale_; // rounded as in contrastive_sums
      const double g = half_grad_[row.index] *
          (std::expm1(double(u) - row_[row.index]) + std::expm1(double(u) - column_[row.index]));
      row.g[match] = float(g);
      total += g * y_match;
    }
    return total;
  }

  const Tiling t_;
  const float scale_;
  const double *row_, *column_;
  // Of each column, padded to whole tiles: g_j/2; 1, or 0 in the padding; column_j as two floats.
  std::vector<float> half_grad_, valid_, high_, low_;
};

// Returns dloss/dscale. `cache` holds products of the first pass, or is null; G may replace them.
template <typename Engine>
double contrastive_gradients(
    PairwisePass<Engine>& pass,
    float scale,
    const Tensor& row_lse, // double
    const Tensor& column_lse, // double
    const Upstream& upstream,
    Grads& grads,
    const ProductCache* cache = nullptr) {
  const Tiling& t = pass.tiling;
  const GradientOfLogits gradient(
      t, scale, row_lse.const_data_ptr<double>(), column_lse.const_data_ptr<double>(), upstream);
  std::vector<double> partial(t.tiles * t.rows);
  double dscale = 0;
  const auto block = [&](int64_t first, int64_t tile, int64_t begin, int64_t end, float* y) {
    float* g = pass.gradients.any() ? pass.gradients.values(0, tile, begin) : y;
    gradient.block(first, tile, begin, end, y, g, &partial[tile * t.rows + begin]);
    pass.gradients.commit(first, tile, begin, end - begin);
  };
  const auto after = [&](int64_t first, int64_t count) {
    add_row_sums(partial, t, count, [&](int64_t, double sum) { dscale += sum; });
    pass.gradients.accumulate(first, count, scale, grads.x, grads.w);
  };
  pass.run(block, after, cache, true);
  return dscale;
}

void check(const Tensor& image_features, const Tensor& text_features, const Tensor& logit_scale) {
  check_matrices("image_features", image_features, "text_features", text_features);
  check_shape("text_features", text_features, image_features.sizes());
  check_shape("logit_scale", logit_scale, {});
}

std::tuple<Tensor, Tensor, Tensor> contrastive(
    const Tensor& image_features, const Tensor& text_features, const Tensor& logit_scale) {
  check(image_features, text_features, logit_scale);
  const int64_t n = image_features.size(0), d = image_features.size(1);
  if (n == 0) {
    return {empty_float({0}), empty_float({0}), empty_float({0})};
  }
  const float s = float(value_of(logit_scale));
  const Sums sums = with_engine(image_features.scalar_type(), d, [&](auto engine) {
    PairwisePass<decltype(engine)> pass(image_features, text_features, false, false);
    return contrastive_sums(pass, s);
  });
  return {sums.loss, sums.row_lse.to(at::kFloat), sums.column_lse.to(at::kFloat)};
}

std::tuple<Tensor, Tensor, Tensor> contrastive_backward(
    const Tensor& grad,
    const Tensor& image_features,
    const Tensor& text_features,
    const Tensor& logit_scale,
    const Tensor& row_lse,
    const Tensor& column_lse,
    std::array<bool, 3> wanted) {
  check(image_features, text_features, logit_scale);
  const int64_t n = image_features.size(0), d = image_features.size(1);
  check_shape("grad", grad, {n});
  check_shape("row_lse", row_lse, {n});
  check_shape("column_lse", column_lse, {n});
  const at::ScalarType dtype = image_features.scalar_type();
  Grads grads(image_features, text_features, dtype, wanted[0], wanted[1]);
  double dscale = 0;
  if (n > 0) {
    const float s = float(value_of(logit_scale));
    dscale = with_engine(dtype, d, [&](auto engine) {
      PairwisePass<decltype(engine)> pass(image_features, text_features, wanted[0], wanted[1]);
      return contrastive_gradients(
          pass, s, row_lse.to(at::kDouble).contiguous(), column_lse.to(at::kDouble).contiguous(),
          Upstream(grad), grads);
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
  PairwisePass<Engine> pass(image_features, text_features, wanted[0], wanted[1]);
  if (!wanted[0] && !wanted[1] && !wanted[2]) {
    return {sum_of_rows(contrastive_sums(pass, scale).loss), 0.0};
  }
  const ProductCache cache(pass.tiling);
  const Sums sums = contrastive_sums(pass, scale, &cache);
  const Upstream upstream(row_weight(mean, pass.tiling.n));
  return {
      sum_of_rows(sums.loss),
      contrastive_gradients(pass, scale, sums.row_lse, sums.column_lse, upstream, grads, &cache)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_reduced(
    const Tensor& image_features,
    const Tensor& text_features,
    const Tensor& logit_scale,
    bool mean,
    std::array<bool, 3> wanted) {
  check(image_features, text_features, logit_scale);
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
