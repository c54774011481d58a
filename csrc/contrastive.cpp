// loss_i = 1/2 (log sum_j exp u_ij + log sum_j exp u_ji) - u_ii of N pairs, u_ij = scale x_i . w_j.
//
// The gradient needs every row and every column sum first: one pass of products for those, and one more for
// the gradient, but for the rows whose products the first one has kept.
//
// Where the logits of a block are near one another, as they mostly are, one exponential of each serves its
// row and its column: exp(u - column) = exp(u - row) exp(row - column), where the last is a factor of the row
// times one of the column.
#include "checks.h"
#include "pairs.h"
#include "results.h"

#include <torch/library.h>

#include <limits>
#include <tuple>
#include <utility>
#include <vector>

namespace mulki {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// So much can be between the logits, or sums, of a block: exp(u - row) underflows at 1e-38, which times
// exp(40) is still nothing.
constexpr float kNear = 40.0f;

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

// The sums are in double: in float, 100 + log(1 + 1e-6) has no loss left.
struct Sums {
  Tensor loss, row_lse, column_lse;
};

// Sums of exponentials of one block of contrastive, in pieces of RunningSum: those of its rows and columns.
struct Pieces {
  float *row_most, *row_sum, *column_most, *column_sum;
};

// y [rows, width], of which the first `valid` columns are pairs; beyond them `add` is -infinity, else 0. A match is
// what a solved pair's sum consists of, and to all digits only if it is taken from itself: `matches` says
// that the block has some.
void sums_of_block(
    const float* y,
    int64_t rows,
    int64_t width,
    int64_t valid,
    float scale,
    const float* add,
    bool matches,
    const Pieces& out) {
  const Vec s(scale);
  std::fill(out.column_most, out.column_most + width, -kInfinity);
  std::fill(out.column_sum, out.column_sum + width, 0.0f);
  const auto logits = [&](int64_t i, int64_t j) {
    return at::vec::fmadd(Vec::loadu(y + i * width + j), s, Vec::loadu(add + j));
  };
  Vec highest(-kInfinity);
  for (int64_t i = 0; i < rows; ++i) {
    Vec top(-kInfinity);
    for (int64_t j = 0; j < width; j += Vec::size()) {
      const Vec u = logits(i, j);
      top = at::vec::maximum(top, u);
      at::vec::maximum(Vec::loadu(out.column_most + j), u).store(out.column_most + j);
    }
    out.row_most[i] = max_of(top);
    highest = at::vec::maximum(highest, top);
  }
  const float most = max_of(highest);
  const float least = *std::min_element(out.column_most, out.column_most + valid);
  const float least_of_rows = *std::min_element(out.row_most, out.row_most + rows);
  // Not with an infinity or a NaN.
  const bool near =
      !matches && least >= most - kNear && most < kInfinity && least_of_rows > -kInfinity;
  alignas(64) float of_most[64];
  for (int64_t i = 0; i < rows && near; i += Vec::size()) {
    const int64_t n = std::min<int64_t>(Vec::size(), rows - i);
    exp_of_difference(Vec::loadu(out.row_most + i, n), Vec(most)).store(of_most + i, n);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const Vec top(out.row_most[i]);
    Vec in_row(0.0f);
    if (near) {
      const Vec factor(of_most[i]);
      for (int64_t j = 0; j < width; j += Vec::size()) {
        const Vec e = exp_of(logits(i, j) - top);
        in_row = in_row + e;
        at::vec::fmadd(e, factor, Vec::loadu(out.column_sum + j)).store(out.column_sum + j);
      }
    } else {
      for (int64_t j = 0; j < width; j += Vec::size()) {
        const Vec u = logits(i, j);
        in_row = in_row + exp_of(u - top);
        // Beyond the last pair both are -infinity, and nobody reads the NaN that comes out.
        (Vec::loadu(out.column_sum + j) + exp_of(u - Vec::loadu(out.column_most + j)))
            .store(out.column_sum + j);
      }
    }
    out.row_sum[i] = sum_of(in_row);
  }
  if (near) {
    std::fill(out.column_most, out.column_most + width, most);
  }
}

template <typename Engine>
Sums contrastive_sums(Pairs<Engine>& pairs, float scale, const Kept* kept = nullptr) {
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
      [&](int64_t first, int64_t tile, int64_t begin, int64_t end, float* y) {
        const int64_t in_row = tile * t.rows + begin;
        const int64_t in_column = (begin / t.block * t.tiles + tile) * t.width;
        bool matches = false;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t match = first + i - tile * t.width;
          if (match >= 0 && match < t.width) {
            diagonal[first + i] = y[(i - begin) * t.width + match] * scale;
            matches = true;
          }
        }
        sums_of_block(
            y, end - begin, t.width, t.valid(tile), scale,
            tile == t.tiles - 1 ? beyond.data() : within.data(), matches,
            {&row_most[in_row], &row_sum[in_row], &column_most[in_column], &column_sum[in_column]});
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
      },
      kept);

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

// dloss/du_ij = g_i/2 exp(u_ij - row_i) + g_j/2 exp(u_ij - column_j) - g_i [i = j], block by block. Of a
// match this is the small difference of numbers near 1, so matches are left out of the vectors and
// taken in double.
class GradientOfLogits {
 public:
  // `row` and `column` are the logarithms of the sums, of n rows and columns each.
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
        half_(t.tiles * t.width, 0.0f),
        within_(half_),
        high_(half_),
        low_(half_) {
    for (int64_t j = 0; j < t.n; ++j) {
      const Split lse(column[j]);
      high_[j] = lse.high;
      low_[j] = lse.low;
      half_[j] = float(upstream[j] / 2);
      within_[j] = 1.0f;
    }
  }

  // g [end - begin, width] from y, which may be g, for rows [begin, end) of the super-block that begins
  // at `first`; of each row the sum of g y, which is its part of dloss/dscale.
  void block(
      int64_t first,
      int64_t tile,
      int64_t begin,
      int64_t end,
      const float* y,
      float* g,
      double* sums) const {
    const int64_t start = first + begin, rows = end - begin;
    alignas(64) float high[kMostBlock], low[kMostBlock], of_row[kMostBlock], of_column[kMostWidth];
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(rows <= kMostBlock && t_.width <= kMostWidth);
    for (int64_t i = 0; i < rows; ++i) {
      const Split lse(row_[start + i]);
      high[i] = lse.high;
      low[i] = lse.low;
    }
    const bool near = factors(tile, rows, high, low, of_row, of_column);
    for (int64_t i = 0; i < rows; ++i) {
      const Row row{start + i, tile, y + i * t_.width, g + i * t_.width, high[i], low[i]};
      sums[i] =
          near ? gradient<true>(row, of_row[i], of_column) : gradient<false>(row, 0.0f, nullptr);
    }
  }

 private:
  static constexpr int64_t kMostBlock = 64, kMostWidth = 128;
  struct Row {
    int64_t index, tile;
    const float* y;
    float* g;
    float high, low; // of the logarithm of its sum
  };

  // exp(row - reference) of the rows and half exp(reference - column) of the columns of a block, or false if
  // a column is too far below a row.
  bool factors(
      int64_t tile,
      int64_t rows,
      const float* high,
      const float* low,
      float* of_row,
      float* of_column) const {
    const int64_t at = tile * t_.width;
    const auto [lowest, highest] = std::minmax_element(high, high + rows);
    const float most = *highest;
    const float least = *std::min_element(&high_[at], &high_[at] + t_.valid(tile));
    // Not with an infinity or a NaN.
    if (!(least >= most - kNear && most < kInfinity && *lowest > -kInfinity)) {
      return false;
    }
    const Vec reference(most);
    for (int64_t i = 0; i < rows; i += Vec::size()) {
      const int64_t n = std::min<int64_t>(Vec::size(), rows - i);
      const Vec e = exp_of_difference(Vec::loadu(high + i, n), reference);
      at::vec::fmadd(e, Vec::loadu(low + i, n), e).store(of_row + i, n);
    }
    for (int64_t j = 0; j < t_.width; j += Vec::size()) {
      const Vec e = exp_of_difference(reference, Vec::loadu(&high_[at + j]));
      const Vec factor = (e - e * Vec::loadu(&low_[at + j])) * Vec::loadu(&half_[at + j]);
      where_kept(&within_[at + j], 0.0f, factor).store(of_column + j);
    }
    return true;
  }

  template <bool NEAR>
  double gradient(const Row& row, float of_row, const float* of_column) const {
    const int64_t at = row.tile * t_.width, match = row.index - at;
    const bool matched = match >= 0 && match < t_.width;
    const double y_match = matched ? row.y[match] : 0.0;
    const Vec s(scale_), high(row.high), low(row.low), half(half_[row.index]), factor(of_row);
    Vec sum(0.0f);
    for (int64_t j = 0; j < t_.width; j += Vec::size()) {
      const Vec y = Vec::loadu(row.y + j);
      const Vec u = y * s;
      const Vec e = exp_of(u - high - low);
      Vec g;
      if constexpr (NEAR) {
        g = e * at::vec::fmadd(factor, Vec::loadu(of_column + j), half);
      } else {
        const Vec other = exp_of(u - Vec::loadu(&high_[at + j]) - Vec::loadu(&low_[at + j]));
        g = at::vec::fmadd(other, Vec::loadu(&half_[at + j]), half * e);
      }
      // Beyond the last pair the exponentials may be infinite.
      g = where_kept(&within_[at + j], 0.0f, g);
      if (matched && match >= j && match < j + Vec::size()) {
        g = g * Vec::loadu(kAllBut + Vec::size() - 1 - (match - j));
      }
      sum = at::vec::fmadd(g, y, sum);
      g.store(row.g + j);
    }
    double total = sum_of(sum);
    if (matched) {
      const float u = float(y_match) * scale_; // rounded as in the sums
      const double g = half_[row.index] *
          (std::expm1(double(u) - row_[row.index]) + std::expm1(double(u) - column_[row.index]));
      row.g[match] = float(g);
      total += g * y_match;
    }
    return total;
  }

  const Tiling t_;
  const float scale_;
  const double *row_, *column_;
  std::vector<float> half_, within_, high_, low_; // of the columns, padded to whole tiles
};

// Returns dloss/dscale. `kept` is what the sums have kept, if anything; G may take its place.
template <typename Engine>
double contrastive_gradients(
    Pairs<Engine>& pairs,
    float scale,
    const Tensor& row_lse, // double
    const Tensor& column_lse, // double
    const Upstream& upstream,
    Grads& grads,
    const Kept* kept = nullptr) {
  const Tiling& t = pairs.tiling;
  const GradientOfLogits gradient(
      t, scale, row_lse.const_data_ptr<double>(), column_lse.const_data_ptr<double>(), upstream);
  std::vector<double> partial(t.tiles * t.rows);
  double dscale = 0;
  const auto block = [&](int64_t first, int64_t tile, int64_t begin, int64_t end, float* y) {
    float* g = pairs.gradients.any() ? pairs.gradients.values(0, tile, begin) : y;
    gradient.block(first, tile, begin, end, y, g, &partial[tile * t.rows + begin]);
    pairs.gradients.commit(first, tile, begin, end - begin);
  };
  const auto after = [&](int64_t first, int64_t count) {
    add_rows(partial, t, count, [&](int64_t, double sum) { dscale += sum; });
    pairs.gradients.accumulate(first, count, scale, grads.x, grads.w);
  };
  pairs.sweep(block, after, kept, true);
  return dscale;
}

std::tuple<Tensor, Tensor, Tensor> contrastive(
    const Tensor& x, const Tensor& w, const Tensor& scale) {
  check_pairs(x, w, scale);
  if (x.size(0) == 0) {
    return {empty_float({0}), empty_float({0}), empty_float({0})};
  }
  const float s = float(value_of(scale));
  const Sums sums = with_engine(x.scalar_type(), x.size(1), [&](auto engine) {
    Pairs<decltype(engine)> pairs(x, w, false, false);
    return contrastive_sums(pairs, s);
  });
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
  double dscale = 0;
  if (x.size(0) > 0) {
    const float s = float(value_of(scale));
    dscale = with_engine(x.scalar_type(), x.size(1), [&](auto engine) {
      Pairs<decltype(engine)> pairs(x, w, wanted[0], wanted[1]);
      return contrastive_gradients(
          pairs, s, row_lse.to(at::kDouble).contiguous(), column_lse.to(at::kDouble).contiguous(),
          Upstream(grad), grads);
    });
  }
  return {grads.x, grads.w, scalar_if(wanted[2], dscale)};
}

// The total and dloss/dscale.
template <typename Engine>
std::pair<double, double> total_and_gradients(
    const Tensor& x,
    const Tensor& w,
    float scale,
    bool mean,
    std::array<bool, 3> wanted,
    Grads& grads) {
  Pairs<Engine> pairs(x, w, wanted[0], wanted[1]);
  if (!wanted[0] && !wanted[1] && !wanted[2]) {
    return {sum_of_rows(contrastive_sums(pairs, scale).loss), 0.0};
  }
  const Kept kept(pairs.tiling);
  const Sums sums = contrastive_sums(pairs, scale, &kept);
  const Upstream upstream(share_of(mean, x.size(0)));
  return {
      sum_of_rows(sums.loss),
      contrastive_gradients(pairs, scale, sums.row_lse, sums.column_lse, upstream, grads, &kept)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_reduced(
    const Tensor& x, const Tensor& w, const Tensor& scale, bool mean, std::array<bool, 3> wanted) {
  check_pairs(x, w, scale);
  const int64_t n = x.size(0);
  Grads grads(x, w, at::kFloat, wanted[0], wanted[1]);
  double total = 0, dscale = 0;
  if (n > 0) {
    const float s = float(value_of(scale));
    std::tie(total, dscale) = with_engine(x.scalar_type(), x.size(1), [&](auto engine) {
      return total_and_gradients<decltype(engine)>(x, w, s, mean, wanted, grads);
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
