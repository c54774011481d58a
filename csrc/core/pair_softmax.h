// Losses over N pairs of an image and a text that are functions of softmax distributions over the
// columns of each row and over the rows of each column.
//
//   u_ij = c y_ij,   Y = X W^T,   q_ij = exp(u_ij - row_i),   q'_ij = exp(u_ij - column_j)
//   row_i = log sum_j exp u_ij,   column_j = log sum_i exp u_ij
//
// A distribution is that of the student, model 0, or of a teacher, with a factor c. The gradient
// needs all row_i and column_j first. So a first pass over the products takes the sums: those of
// the exponentials and, of a teacher, those of the exponentials times u and times the student's u.
// From them an operator computes its loss and the coefficients a and b of each distribution in
//
//   G_ij = dloss/dz_ij = sum over distributions of a_i q_ij + b_j q'_ij,  less 2 l_i if i = j
//
// where l are factors of labels (contrastive.cpp). A second pass forms G, which replaces the
// student's products. The first pass keeps the products of as many rows as fit into a ProductCache;
// the second pass computes the others again (pairwise.h).
//
// A block of products needs an exponential for the row and one for the column of each element. If
// the logits of a block are close to each other, which is the common case, one is enough: both sums
// then subtract the block's maximum, and in the second pass
//
//   exp(u_ij - column_j) = exp(u_ij - row_i) exp(row_i - m) exp(m - column_j)
//
// with one number m for the block: a factor for each row times a factor for each column.
#pragma once

#include "core/pairwise.h"
#include "common/results.h"

#include <array>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

namespace mulki {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// The largest difference between the maxima, or the sums, of a block for which one exponential is
// enough: where exp(u - row) underflows, near 1e-38, its product with exp(40) is still negligible.
constexpr float kMaxSpread = 40.0f;
constexpr int64_t kMaxBlockRows = 64, kMaxTileWidth = 128;

struct PairDistribution {
  int64_t model;
  float c;
};

// Of the rows, or of the columns, for one distribution; [N] each. In double: in float,
// 100 + log(1 + 1e-6) is 100, and a loss would be 0.
struct PairSums {
  std::vector<double> lse; // row_i or column_j
  std::vector<double> own, student; // of a teacher: expectations of its u, and of the student's u
};

struct SumsOfPairs {
  std::vector<PairSums> rows, columns; // of each distribution
  std::vector<std::vector<float>> match; // of each model, y_ii

  // 1/2 (row_i + column_i) - u_ii of a distribution of the student: the loss of CLIP.
  double loss_of_labels(const PairDistribution& d, int64_t place, int64_t i) const {
    const float u = match[d.model][i] * d.c;
    return (rows[place].lse[i] + columns[place].lse[i]) / 2 - u;
  }
};

// The sums of n rows or columns, to which those of parts are added one after the other.
class RunningSums {
 public:
  explicit RunningSums(int64_t n) : max_(n, -kInfinity), sum_(n), own_(n), student_(n) {}

  // `sum` is that of e = exp(u - max) of a part, `own` that of e (u - max), and `student` that of e
  // times the student's u less `student_max`.
  void add(int64_t i, float max, float sum, float own, float student, float student_max) {
    double factor = 1;
    if (max > max_[i] || max != max) {
      const double old = std::exp(max_[i] - double(max));
      sum_[i] *= old;
      own_[i] *= old;
      student_[i] *= old;
      max_[i] = max;
    } else {
      factor = std::exp(double(max) - max_[i]);
    }
    sum_[i] += factor * sum;
    own_[i] += factor * (own + double(sum) * max);
    student_[i] += factor * (student + double(sum) * student_max);
  }
  // Writes element i of `out`.
  void finish(int64_t i, int64_t at, PairSums& out) const {
    out.lse[at] = max_[i] + std::log(sum_[i]);
    out.own[at] = own_[i] / sum_[i];
    out.student[at] = student_[i] / sum_[i];
  }

 private:
  std::vector<double> max_, sum_, own_, student_;
};

// What the first pass keeps of parts of rows or of columns: of each the maximum that was
// subtracted, and the sums that RunningSums adds up. Those of u are of teachers alone.
struct PartialSums {
  float *max, *sum, *own, *student;

  PartialSums from(int64_t i) const {
    return {max + i, sum + i, own + i, student + i};
  }
};

// Writes the numbers to subtract from the logits of a block: the maximum of each row and of each
// column or, if the block is close, the maximum of all. `mask`, which is added to the logits, is 0
// for the first `valid` columns, and -infinity in the padding. Returns whether the block is close.
inline bool set_maxima(
    const float* y,
    int64_t rows,
    int64_t width,
    int64_t valid,
    float c,
    const float* mask,
    bool may_be_close,
    float* row_max,
    float* column_max) {
  const Vec factor(c);
  std::fill(column_max, column_max + width, -kInfinity);
  Vec block_max(-kInfinity);
  for (int64_t i = 0; i < rows; ++i) {
    Vec top(-kInfinity);
    for (int64_t j = 0; j < width; j += Vec::size()) {
      const Vec u = at::vec::fmadd(Vec::loadu(y + i * width + j), factor, Vec::loadu(mask + j));
      top = at::vec::maximum(top, u);
      at::vec::maximum(Vec::loadu(column_max + j), u).store(column_max + j);
    }
    row_max[i] = max_of(top);
    block_max = at::vec::maximum(block_max, top);
  }
  const float max = max_of(block_max);
  const float least = std::min(
      *std::min_element(row_max, row_max + rows),
      *std::min_element(column_max, column_max + valid));
  // False if there is an infinity or a NaN.
  const bool close = may_be_close && least >= max - kMaxSpread && max < kInfinity;
  if (close) {
    std::fill(row_max, row_max + rows, max);
    std::fill(column_max, column_max + width, max);
  }
  return close;
}

// A block of products with its factor, and the numbers that are subtracted from its logits.
struct BlockOfLogits {
  const float* y;
  float c;
  PartialSums rows, columns;
};

// Takes the sums of a block, with one exponential for each logit if CLOSE. TEACHER says that it is
// a teacher's: then the sums of u are taken too, with the student's block beside it.
template <bool CLOSE, bool TEACHER>
inline void add_up(
    const BlockOfLogits& block,
    const BlockOfLogits& student,
    const float* mask,
    int64_t rows,
    int64_t width) {
  // Above this, e (u - max) is 0 where e is, also in the padding.
  const Vec lowest(-1e30f), c(block.c), student_c(student.c);
  const PartialSums& columns = block.columns;
  for (float* sum : {columns.sum, columns.own, columns.student}) {
    std::fill(sum, sum + (TEACHER || sum == columns.sum ? width : 0), 0.0f);
  }
  const auto add = [](float* sum, const Vec& e, const Vec& v) {
    at::vec::fmadd(e, v, Vec::loadu(sum)).store(sum);
  };
  for (int64_t i = 0; i < rows; ++i) {
    const Vec row_max(block.rows.max[i]), student_row_max(TEACHER ? student.rows.max[i] : 0.0f);
    Vec sum(0.0f), own(0.0f), of_student(0.0f);
    for (int64_t j = 0; j < width; j += Vec::size()) {
      const Vec u = at::vec::fmadd(Vec::loadu(block.y + i * width + j), c, Vec::loadu(mask + j));
      Vec centred = u - row_max, student_centred(0.0f), student_u(0.0f);
      Vec e = exp_of(centred);
      sum = sum + e;
      if constexpr (TEACHER) {
        student_u = Vec::loadu(student.y + i * width + j) * student_c;
        student_centred = student_u - student_row_max;
        centred = larger(centred, lowest);
        own = at::vec::fmadd(e, centred, own);
        of_student = at::vec::fmadd(e, student_centred, of_student);
      }
      if constexpr (!CLOSE) {
        // In the padding both are -infinity. The difference is NaN, and it is not read.
        centred = u - Vec::loadu(columns.max + j);
        e = exp_of(centred);
        if constexpr (TEACHER) {
          centred = larger(centred, lowest);
          student_centred = student_u - Vec::loadu(student.columns.max + j);
        }
      }
      (Vec::loadu(columns.sum + j) + e).store(columns.sum + j);
      if constexpr (TEACHER) {
        add(columns.own + j, e, centred);
        add(columns.student + j, e, student_centred);
      }
    }
    block.rows.sum[i] = sum_of(sum);
    if constexpr (TEACHER) {
      block.rows.own[i] = sum_of(own);
      block.rows.student[i] = sum_of(of_student);
    }
  }
}

// The coefficients of one distribution in G; [N] each.
struct PairCoefficients {
  PairCoefficients(std::vector<double> row_lse, std::vector<double> column_lse)
      : row_lse(std::move(row_lse)),
        column_lse(std::move(column_lse)),
        row(this->row_lse.size(), 0.0f),
        column(row) {}

  // Adds those of `weight` times the loss of CLIP.
  void add_labels(const Upstream& upstream, double weight = 1) {
    labels.resize(row.size());
    for (int64_t i = 0; i < int64_t(row.size()); ++i) {
      labels[i] = float(weight * upstream[i] / 2);
      row[i] += labels[i];
      column[i] += labels[i];
    }
  }

  std::vector<double> row_lse, column_lse; // row_i and column_j
  std::vector<float> row, column; // a and b, the labels' factors included
  std::vector<float> labels; // l, empty where the distribution is not that of the labels
};

// A double as the sum of two floats.
struct Split {
  explicit Split(double value = 0) : high(float(value)), low(float(value - high)) {}
  float high, low;
};

// What one distribution adds to G, block by block. On the diagonal the labels' part is the small
// difference of numbers near 1, so the diagonal is left to `at_match`, which computes in double.
class GradientOfDistribution {
 public:
  GradientOfDistribution(const Tiling& t, const PairDistribution& d, const PairCoefficients& a)
      : t_(t), c_(d.c), a_(a), column_(t.tiles * t.width, 0.0f), high_(column_), low_(column_) {
    for (int64_t j = 0; j < t.n; ++j) {
      const Split lse(a.column_lse[j]);
      high_[j] = lse.high;
      low_[j] = lse.low;
      column_[j] = a.column[j];
    }
  }

  // Prepares `rows` rows from row `start` on, in one tile.
  struct Block {
    alignas(64) float high[kMaxBlockRows], low[kMaxBlockRows], row_factors[kMaxBlockRows],
        column_factors[kMaxTileWidth];
    bool close;
  };
  void prepare(int64_t tile, int64_t start, int64_t rows, Block& out) const {
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(rows <= kMaxBlockRows && t_.width <= kMaxTileWidth);
    for (int64_t i = 0; i < rows; ++i) {
      const Split lse(a_.row_lse[start + i]);
      out.high[i] = lse.high;
      out.low[i] = lse.low;
    }
    out.close = set_factors(tile, rows, out);
  }

  // Adds to g [width], or writes it if FIRST, the part of row i of the block, from its products y.
  // In the padding it is arbitrary.
  template <bool FIRST>
  void add(
      const Block& block, int64_t tile, int64_t start, int64_t i, const float* y, float* g) const {
    block.close ? add<FIRST, true>(block, tile, start, i, y, g)
                : add<FIRST, false>(block, tile, start, i, y, g);
  }

  // What it adds to G_ii, where the product is y.
  double at_match(int64_t i, float y) const {
    const double u = y * c_; // rounded as in the first pass
    const double row = u - a_.row_lse[i], column = u - a_.column_lse[i];
    const double l = a_.labels.empty() ? 0.0 : a_.labels[i];
    return (a_.row[i] - l) * std::exp(row) + (a_.column[i] - l) * std::exp(column) +
        l * (std::expm1(row) + std::expm1(column));
  }

 private:
  template <bool FIRST, bool CLOSE>
  void add(
      const Block& block, int64_t tile, int64_t start, int64_t i, const float* y, float* g) const {
    const int64_t at = tile * t_.width;
    const Vec c(c_), high(block.high[i]), low(block.low[i]), a(a_.row[start + i]),
        factor(block.row_factors[i]);
    for (int64_t j = 0; j < t_.width; j += Vec::size()) {
      const Vec u = Vec::loadu(y + j) * c;
      const Vec e = exp_of(u - high - low);
      Vec part;
      if constexpr (CLOSE) {
        part = e * at::vec::fmadd(factor, Vec::loadu(block.column_factors + j), a);
      } else {
        const Vec of_column = exp_of(u - Vec::loadu(&high_[at + j]) - Vec::loadu(&low_[at + j]));
        part = at::vec::fmadd(of_column, Vec::loadu(&column_[at + j]), a * e);
      }
      // Not fused: a teacher that equals its student leaves nothing.
      (FIRST ? part : Vec::loadu(g + j) + part).store(g + j);
    }
  }

  // Writes exp(row_i - m) of the rows and b_j exp(m - column_j) of the columns of a block, or
  // returns false if a column_j is too far below a row_i.
  bool set_factors(int64_t tile, int64_t rows, Block& out) const {
    const int64_t at = tile * t_.width;
    const auto [min_row, max_row] = std::minmax_element(out.high, out.high + rows);
    const float max = *max_row;
    const float min_column = *std::min_element(&high_[at], &high_[at] + t_.valid(tile));
    // False if there is an infinity or a NaN.
    if (!(min_column >= max - kMaxSpread && max < kInfinity && *min_row > -kInfinity)) {
      return false;
    }
    const Vec reference(max);
    for (int64_t i = 0; i < rows; i += Vec::size()) {
      const int64_t n = std::min<int64_t>(Vec::size(), rows - i);
      const Vec e = exp_of_difference(Vec::loadu(out.high + i, n), reference);
      at::vec::fmadd(e, Vec::loadu(out.low + i, n), e).store(out.row_factors + i, n);
    }
    for (int64_t j = 0; j < t_.width; j += Vec::size()) {
      const Vec e = exp_of_difference(reference, Vec::loadu(&high_[at + j]));
      ((e - e * Vec::loadu(&low_[at + j])) * Vec::loadu(&column_[at + j]))
          .store(out.column_factors + j);
    }
    return true;
  }

  const Tiling t_;
  const float c_;
  const PairCoefficients& a_;
  // Of each column, padded to whole tiles: b_j, and column_j as two floats.
  std::vector<float> column_, high_, low_;
};

// Both passes.
template <typename Engine>
class PairSoftmax {
 public:
  // Distribution 0 is the student's with which teachers are compared.
  PairSoftmax(
      const std::vector<PairFeatures>& models,
      std::vector<PairDistribution> distributions,
      bool wanted_x,
      bool wanted_w)
      : pass_(models, wanted_x, wanted_w),
        t_(pass_.tiling),
        models_(int64_t(models.size())),
        distributions_(std::move(distributions)) {}

  // A cache for both passes, if there will be two.
  std::optional<ProductCache> cache_if(bool both) const {
    return both ? std::optional<ProductCache>(std::in_place, t_, models_) : std::nullopt;
  }

  // The first pass.
  SumsOfPairs sums(const std::optional<ProductCache>& cache = std::nullopt) {
    const int64_t n = t_.n, count_d = int64_t(distributions_.size());
    const PairSums empty{std::vector<double>(n), std::vector<double>(n), std::vector<double>(n)};
    SumsOfPairs out{
        std::vector<PairSums>(count_d, empty), std::vector<PairSums>(count_d, empty),
        std::vector<std::vector<float>>(models_, std::vector<float>(n))};
    const Parts row_parts(count_d, t_.tiles * t_.rows);
    const Parts column_parts(count_d, t_.blocks * t_.tiles * t_.width);
    std::vector<RunningSums> columns(count_d, RunningSums(t_.tiles * t_.width));
    std::vector<float> last_mask(t_.width, -kInfinity); // of the last tile
    std::fill(last_mask.begin(), last_mask.begin() + t_.valid(t_.tiles - 1), 0.0f);
    const std::vector<float> full_mask(t_.width, 0.0f);

    const auto block = [&](int64_t first, int64_t tile, int64_t begin, int64_t end,
                           float* const* y) {
      const int64_t rows = end - begin;
      const float* mask = tile == t_.tiles - 1 ? last_mask.data() : full_mask.data();
      bool has_match = false;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t match = first + i - tile * t_.width;
        if (match >= 0 && match < t_.width) {
          for (int64_t m = 0; m < models_; ++m) {
            out.match[m][first + i] = y[m][(i - begin) * t_.width + match];
          }
          has_match = true;
        }
      }
      BlockOfLogits student{};
      bool student_close = false;
      for (int64_t d = 0; d < count_d; ++d) {
        const auto [model, c] = distributions_[d];
        const BlockOfLogits own{
            y[model], c, row_parts.of(d).from(tile * t_.rows + begin),
            column_parts.of(d).from((begin / t_.block * t_.tiles + tile) * t_.width)};
        // After training, an element of the diagonal is nearly all of its sum. It is exact only if
        // the maximum that is subtracted is the element itself.
        const bool close = set_maxima(
            own.y, rows, t_.width, t_.valid(tile), c, mask, !has_match, own.rows.max,
            own.columns.max);
        if (d == 0) {
          student = own;
          student_close = close;
        }
        const auto run = model == 0  ? (close ? add_up<true, false> : add_up<false, false>)
            : close && student_close ? add_up<true, true>
                                     : add_up<false, true>;
        run(own, student, mask, rows, t_.width);
      }
    };
    const auto after = [&](int64_t first, int64_t count) {
      const int64_t blocks = (count + t_.block - 1) / t_.block;
      for (int64_t d = 0; d < count_d; ++d) {
        const PartialSums r = row_parts.of(d), c = column_parts.of(d);
        const PartialSums student_r = row_parts.of(0), student_c = column_parts.of(0);
        at::parallel_for(0, count, 64, [&](int64_t from, int64_t to) {
          RunningSums merged(to - from);
          for (int64_t i = from; i < to; ++i) {
            for (int64_t tile = 0; tile < t_.tiles; ++tile) {
              add_part(merged, i - from, r, student_r, tile * t_.rows + i);
            }
            merged.finish(i - from, first + i, out.rows[d]);
          }
        });
        at::parallel_for(0, t_.n, 512, [&](int64_t from, int64_t to) {
          for (int64_t b = 0; b < blocks; ++b) {
            for (int64_t j = from; j < to; ++j) {
              add_part(columns[d], j, c, student_c, b * t_.tiles * t_.width + j);
            }
          }
        });
      }
    };
    pass_.run(block, after, cache ? &*cache : nullptr);
    for (int64_t d = 0; d < count_d; ++d) {
      for (int64_t j = 0; j < t_.n; ++j) {
        columns[d].finish(j, j, out.columns[d]);
      }
    }
    return out;
  }

  // The second pass: writes `factor` times the gradients, and returns the sum of G y over all
  // pairs. `cache` holds products of the first pass, if any; G may replace them.
  double gradients(
      const std::vector<PairCoefficients>& coefficients,
      float factor,
      Grads& grads,
      const std::optional<ProductCache>& cache = std::nullopt) {
    std::vector<GradientOfDistribution> parts;
    for (size_t d = 0; d < distributions_.size(); ++d) {
      parts.emplace_back(t_, distributions_[d], coefficients[d]);
    }
    std::vector<float> valid(t_.tiles * t_.width, 0.0f);
    std::fill(valid.begin(), valid.begin() + t_.n, 1.0f);
    std::vector<double> partial(t_.tiles * t_.rows);
    double total = 0;
    const auto block = [&](int64_t first, int64_t tile, int64_t begin, int64_t end,
                           float* const* y) {
      const int64_t start = first + begin, rows = end - begin;
      float* g = pass_.gradients.any() ? pass_.gradients.values(0, tile, begin) : y[0];
      std::vector<GradientOfDistribution::Block> prepared(parts.size());
      for (size_t d = 0; d < parts.size(); ++d) {
        parts[d].prepare(tile, start, rows, prepared[d]);
      }
      for (int64_t i = 0; i < rows; ++i) {
        // G may replace the student's products, which all distributions of the student read.
        alignas(64) float row[kMaxTileWidth];
        for (size_t d = 0; d < parts.size(); ++d) {
          const float* products = y[distributions_[d].model] + i * t_.width;
          d == 0 ? parts[d].template add<true>(prepared[d], tile, start, i, products, row)
                 : parts[d].template add<false>(prepared[d], tile, start, i, products, row);
        }
        const int64_t match = start + i - tile * t_.width;
        const bool matched = match >= 0 && match < t_.width;
        if (matched) {
          double at_match = 0;
          for (size_t d = 0; d < parts.size(); ++d) {
            const float* products = y[distributions_[d].model] + i * t_.width;
            at_match += parts[d].at_match(start + i, products[match]);
          }
          row[match] = float(at_match);
        }
        const float* products = y[0] + i * t_.width;
        Vec sum(0.0f);
        for (int64_t j = 0; j < t_.width; j += Vec::size()) {
          const Vec v = where_active(&valid[tile * t_.width + j], 0.0f, Vec::loadu(row + j));
          sum = at::vec::fmadd(v, Vec::loadu(products + j), sum);
          v.store(g + i * t_.width + j);
        }
        partial[tile * t_.rows + begin + i] = sum_of(sum);
      }
    };
    const auto after = [&](int64_t first, int64_t count) {
      add_row_sums(partial, t_, count, [&](int64_t, double sum) { total += sum; });
      pass_.gradients.accumulate(first, count, factor, grads.x, grads.w);
    };
    pass_.run(block, after, cache ? &*cache : nullptr, true);
    return total;
  }

 private:
  // PartialSums of all distributions.
  class Parts {
   public:
    Parts(int64_t distributions, int64_t parts)
        : parts_(parts), values_(distributions * 4 * parts * int64_t(sizeof(float))) {}
    PartialSums of(int64_t d) const {
      float* at = values_.data<float>() + d * 4 * parts_;
      return {at, at + parts_, at + 2 * parts_, at + 3 * parts_};
    }

   private:
    int64_t parts_;
    Scratch values_;
  };

  static void add_part(
      RunningSums& to, int64_t i, const PartialSums& of, const PartialSums& student, int64_t at) {
    to.add(i, of.max[at], of.sum[at], of.own[at], of.student[at], student.max[at]);
  }

  PairwisePass<Engine> pass_;
  const Tiling t_;
  const int64_t models_;
  const std::vector<PairDistribution> distributions_;
};

} // namespace mulki
