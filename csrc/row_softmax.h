// Losses of the form sum_i loss_i, where loss_i looks at softmax distributions over the P columns of
// a row: of the student, and of any number of teachers.
//
// Y = X W^T are plain products and u = c Y the logits, c = scale / temperature. A super-block of rows
// goes through four steps, each parallel over its own tasks:
//
//   1. per tile: the products of every model; per row of the tile its largest u, and sums of
//      e = exp(u - u_max) alone, times Y, and (teachers) times the student's Y. e replaces Y.
//   2. per row: the sums of its tiles are merged, and a rule turns them into the loss and into the
//      coefficients of G = dloss/du,
//        G_j = a q_j - sum_k b_k p_kj - uniform - [j = target] at_target.
//   3. per tile: G replaces the student's e.
//   4. the products with G (gradients.h).
//
// Sums are over Y less its value where u is largest, so nothing cancels or overflows on the way; what
// a rule sees of a row is in double.
#pragma once

#include "logits.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace mulki {

// What is known of one row when its tiles are merged. "Centred" is less the Y at the largest u.
struct ModelRow {
  double log_sum; // log sum_j exp(u_j - u_max)
  double mean; // expectation of centred Y under the model's own distribution
  double cross; // teachers: expectation of the student's centred Y under the teacher's
  double at_target; // centred Y of the target class
  double uniform; // student: mean of centred Y over the classes that take part
};

struct RowCoefficients {
  double student = 0; // a
  double uniform = 0; // already divided by the number of classes that take part
  double at_target = 0;
  double* teachers = nullptr; // b_k, zero at first
  double scale = 0; // dloss/dscale of the row, before the caller's factor
};

template <typename Operand>
struct Model {
  Model(const Tensor& x, const Tensor& w, double c)
      : rows(x), prototypes(w), c(c), sign(c < 0 ? -1.0f : 1.0f) {}

  Operand rows, prototypes;
  double c;
  float sign; // of c: u is largest where sign * Y is
};

// Which columns take part, as 1 or 0.
struct Columns {
  Columns(const Tiling& t, const bool* mask)
      : kept(0), keep(t.tiles * t.width), partial(t.tiles), counts(t.tiles) {
    for (int64_t j = 0; j < t.tiles * t.width; ++j) {
      const bool takes_part = j < t.p && (mask == nullptr || mask[j]);
      keep[j] = takes_part ? 1.0f : 0.0f;
      counts[j / t.width] += takes_part;
      kept += takes_part;
    }
    for (int64_t tile = 0; tile < t.tiles; ++tile) {
      partial[tile] = counts[tile] < t.width;
    }
  }
  bool empty(int64_t tile) const {
    return counts[tile] == 0;
  }
  // How many tiles are not.
  int64_t wanted() const {
    return std::count_if(counts.begin(), counts.end(), [](int64_t c) { return c > 0; });
  }

  int64_t kept;
  std::vector<float> keep;
  std::vector<char> partial;
  std::vector<int64_t> counts; // per tile
};

// The largest sign * y of a row of a tile, lane by lane. A NaN may be lost: it is in the sums of the row.
template <bool PARTIAL>
inline Vec largest(const float* y, const float* keep, int64_t width, float sign) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  Vec most(kNone);
  const Vec s(sign);
  for (int64_t j = 0; j < width; j += Vec::size()) {
    Vec v = Vec::loadu(y + j) * s;
    if constexpr (PARTIAL) {
      v = where_kept(keep + j, kNone, v);
    }
    most = larger(v, most);
  }
  return most;
}

// Sums over a row of a tile, lane by lane, of as many rows as a vector has lanes.
struct LaneSums {
  Lanes sum, own, other;
};

// Sums of e, e * centred y, and e * centred `student` (when CROSS) or centred y alone (when not: the
// uniform sum) over one row of a tile. e replaces y when `stored`.
template <bool PARTIAL, bool CROSS>
inline void exponentials(
    float* y,
    const float* student,
    const float* keep,
    int64_t width,
    const ExpOfProduct& exp_of_centred,
    float most,
    float student_most,
    bool stored,
    int64_t row,
    LaneSums& out) {
  Vec sum(0.0f), own(0.0f), other(0.0f);
  const Vec top(most), student_top(student_most);
  for (int64_t j = 0; j < width; j += Vec::size()) {
    Vec centred = Vec::loadu(y + j) - top;
    if constexpr (PARTIAL) {
      centred = where_kept(keep + j, 0.0f, centred);
    }
    Vec e = exp_of_centred(centred);
    if constexpr (PARTIAL) {
      e = e * Vec::loadu(keep + j);
    }
    sum = sum + e;
    own = at::vec::fmadd(e, centred, own);
    if constexpr (CROSS) {
      Vec of_student = Vec::loadu(student + j) - student_top;
      if constexpr (PARTIAL) {
        of_student = where_kept(keep + j, 0.0f, of_student);
      }
      other = at::vec::fmadd(e, of_student, other);
    } else {
      other = other + centred;
    }
    if (stored) {
      e.store(y + j);
    }
  }
  out.sum.set(row, sum);
  out.own.set(row, own);
  out.other.set(row, other);
}

// Rule: `int64_t target(int64_t row)` (negative: none) and
// `void operator()(int64_t row, const ModelRow* student, const ModelRow* teachers, int64_t kept,
//                  RowCoefficients&)`, called once per row from any thread.
template <typename Engine, typename Rule>
class RowSoftmax {
  using Operand = typename Engine::Operand;

 public:
  RowSoftmax(
      const Tiling& tiling,
      std::vector<Model<Operand>>& models, // the student, then the teachers
      const Columns& columns,
      Rule& rule,
      bool wanted_x,
      bool wanted_w)
      : t_(tiling),
        models_(models),
        columns_(columns),
        rule_(rule),
        count_(int64_t(models.size())),
        logits_(tiling, operands(models), columns.wanted()),
        gradients_(tiling, models[0].rows, models[0].prototypes, wanted_x, wanted_w, count_) {
    stat_ = take(count_ * 4 * t_.tiles * t_.rows);
    at_target_ = take(count_ * t_.rows);
    top_ = take(count_ * t_.rows);
    weight_ = take(count_ * t_.rows);
    uniform_ = take(t_.rows);
    hard_ = take(t_.rows);
    row_scale_.resize(t_.rows);
  }

  // Returns sum of dloss/dscale over the rows, before the caller's factor.
  double run(float factor, Tensor& dx, Tensor& dw) {
    double scale = 0;
    for (int64_t first = 0; first < t_.n; first += t_.rows) {
      const int64_t count = std::min(t_.rows, t_.n - first);
      const int64_t blocks = (count + t_.block - 1) / t_.block;
      products_and_sums(first, count);
      parallel_each(blocks, [&](int64_t b) { row_step(first, count, b); });
      for (int64_t i = 0; i < count; ++i) {
        scale += row_scale_[i];
      }
      if (gradients_.any()) {
        parallel_each(t_.tiles * blocks, [&](int64_t task) {
          gradient_step(first, count, task / blocks, task % blocks);
        });
        gradients_.accumulate(first, count, factor, dx, dw);
      }
    }
    return scale;
  }

 private:
  float* take(int64_t count) {
    scratch_.emplace_back(count * int64_t(sizeof(float)));
    return scratch_.back().data<float>();
  }

  static std::vector<typename Logits<Engine>::Model> operands(std::vector<Model<Operand>>& models) {
    std::vector<typename Logits<Engine>::Model> out;
    for (const Model<Operand>& m : models) {
      out.push_back({&m.rows, &m.prototypes});
    }
    return out;
  }

  enum Stat { kMost, kSum, kOwn, kOther };

  float* stat(int64_t model, Stat which, int64_t tile) {
    return stat_ + ((model * 4 + which) * t_.tiles + tile) * t_.rows;
  }
  float* values(int64_t model, int64_t tile, int64_t row) {
    return gradients_.values(model, tile, row);
  }

  void products_and_sums(int64_t first, int64_t count) {
    const auto wanted = [&](int64_t tile) { return !columns_.empty(tile); };
    if (gradients_.any()) {
      const auto where = [&](int64_t m, int64_t tile, int64_t begin) {
        return values(m, tile, begin);
      };
      logits_.run_stored(
          first, count, wanted, where, [&](int64_t m, int64_t tile, int64_t begin, int64_t end) {
            sums_of_model(
                first, m, tile, begin, end, values(m, tile, begin), values(0, tile, begin));
          });
      return;
    }
    logits_.run(first, count, wanted, [&](int64_t tile, int64_t begin, int64_t end) {
      const int64_t size = t_.block * t_.width;
      const Scratch local(count_ * size * int64_t(sizeof(float)));
      float* y = local.data<float>();
      for (int64_t m = 0; m < count_; ++m) {
        logits_.multiply(m, tile, begin, end, y + m * size);
        sums_of_model(first, m, tile, begin, end, y + m * size, y);
      }
    });
  }

  // What a block's products of model m allow, once those of the models before it are there. The student's own
  // sums come last: the teachers' sums read its products, which its exponentials replace.
  void sums_of_model(
      int64_t first,
      int64_t m,
      int64_t tile,
      int64_t begin,
      int64_t end,
      float* y,
      float* student) {
    if (columns_.partial[tile]) {
      sums_of_model<true>(first, m, tile, begin, end, y, student);
    } else {
      sums_of_model<false>(first, m, tile, begin, end, y, student);
    }
  }

  template <bool PARTIAL>
  void sums_of_model(
      int64_t first,
      int64_t m,
      int64_t tile,
      int64_t begin,
      int64_t end,
      float* y,
      float* student) {
    const float* keep = columns_.keep.data() + tile * t_.width;
    const float sign = models_[m].sign;
    for (int64_t i = begin; i < end; i += Vec::size()) {
      const int64_t rows = std::min<int64_t>(Vec::size(), end - i), from = (i - begin) * t_.width;
      Lanes most;
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = y + from + r * t_.width;
        const int64_t target = rule_.target(first + i + r) - tile * t_.width;
        if (target >= 0 && target < t_.width) {
          at_target_[m * t_.rows + i + r] = row[target];
        }
        most.set(r, largest<PARTIAL>(row, keep, t_.width, sign));
      }
      (most.largest() * Vec(sign)).store(stat(m, kMost, tile) + i, rows);
      if (m > 0) {
        sums_of_rows<PARTIAL, true>(m, tile, i, rows, y + from, student + from);
      }
      if (m == count_ - 1) {
        sums_of_rows<PARTIAL, false>(0, tile, i, rows, student + from, nullptr);
      }
    }
  }

  // Of at most as many rows as a vector has lanes, from row i of the super-block on.
  template <bool PARTIAL, bool CROSS>
  void sums_of_rows(
      int64_t m, int64_t tile, int64_t i, int64_t rows, float* y, const float* student) {
    const float *most = stat(m, kMost, tile) + i, *student_most = stat(0, kMost, tile) + i;
    const float* keep = columns_.keep.data() + tile * t_.width;
    const ExpOfProduct exp_of_centred(models_[m].c);
    const bool stored = gradients_.any();
    LaneSums sums;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = r * t_.width;
      exponentials<PARTIAL, CROSS>(
          y + row, CROSS ? student + row : nullptr, keep, t_.width, exp_of_centred, most[r],
          student_most[r], stored, r, sums);
    }
    sums.sum.sums().store(stat(m, kSum, tile) + i, rows);
    sums.own.sums().store(stat(m, kOwn, tile) + i, rows);
    sums.other.sums().store(stat(m, kOther, tile) + i, rows);
  }

  // Merges the tiles of a block's rows and asks the rule for losses and coefficients.
  void row_step(int64_t first, int64_t count, int64_t block) {
    const int64_t begin = block * t_.block, rows = t_.block_rows(block, count);
    std::vector<Merged> merged(count_);
    for (int64_t m = 0; m < count_; ++m) {
      merge(m, begin, rows, merged[m]);
    }
    std::vector<ModelRow> seen(count_);
    std::vector<double> teachers(count_);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = begin + r;
      const bool has_target = rule_.target(first + i) >= 0;
      for (int64_t m = 0; m < count_; ++m) {
        const Merged& of = merged[m];
        seen[m].log_sum = std::log(of.sum[r]);
        seen[m].mean = of.own[r] / of.sum[r];
        seen[m].cross = of.other[r] / of.sum[r];
        seen[m].uniform = of.other[r] / double(columns_.kept);
        seen[m].at_target =
            has_target ? double(at_target_[m * t_.rows + i]) - top_[m * t_.rows + i] : 0.0;
      }
      std::fill(teachers.begin(), teachers.end(), 0.0);
      RowCoefficients coefficients;
      coefficients.teachers = teachers.data();
      rule_(first + i, seen.data(), seen.data() + 1, columns_.kept, coefficients);
      row_scale_[i] = coefficients.scale;
      weight_[i] = float(coefficients.student / merged[0].sum[r]);
      for (int64_t m = 1; m < count_; ++m) {
        weight_[m * t_.rows + i] = float(teachers[m - 1] / merged[m].sum[r]);
      }
      uniform_[i] = float(coefficients.uniform);
      hard_[i] = float(coefficients.at_target);
    }
  }

  // Writes G of a block's rows in one tile.
  void gradient_step(int64_t first, int64_t count, int64_t tile, int64_t block) {
    const int64_t begin = block * t_.block, rows = t_.block_rows(block, count);
    if (columns_.empty(tile)) {
      std::fill(values(0, tile, begin), values(0, tile, begin) + rows * t_.width, 0.0f);
      gradients_.commit(first, tile, begin, rows);
      return;
    }
    std::vector<float> factor(count_ * kMostBlock);
    for (int64_t m = 0; m < count_; ++m) {
      float* of_model = &factor[m * kMostBlock];
      shifts(m, tile, begin, rows, of_model);
      for (int64_t r = 0; r < rows; ++r) {
        of_model[r] *= weight_[m * t_.rows + begin + r];
      }
    }
    const float* keep = columns_.keep.data() + tile * t_.width;
    std::vector<const float*> teachers(count_);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = begin + r;
      float* g = values(0, tile, i);
      bool counts = hard_[i] != 0.0f || uniform_[i] != 0.0f;
      for (int64_t m = 0; m < count_; ++m) {
        // A NaN counts.
        counts = counts || weight_[m * t_.rows + i] != 0.0f;
        teachers[m] = values(m, tile, i);
      }
      if (!counts) {
        // An ignored row has no gradient, whatever its logits are.
        std::fill(g, g + t_.width, 0.0f);
        continue;
      }
      const Vec of_student(factor[r]), uniform(uniform_[i]);
      for (int64_t j = 0; j < t_.width; j += Vec::size()) {
        // Not a fused multiply-subtract: a student that equals its teacher has a gradient of zero.
        Vec v = Vec::loadu(g + j) * of_student;
        for (int64_t m = 1; m < count_; ++m) {
          v = v - Vec::loadu(teachers[m] + j) * Vec(factor[m * kMostBlock + r]);
        }
        if (uniform_[i] != 0.0f) {
          v = v - Vec::loadu(keep + j) * uniform;
        }
        v.store(g + j);
      }
      const int64_t target = rule_.target(first + i) - tile * t_.width;
      if (target >= 0 && target < t_.width) {
        g[target] -= hard_[i];
      }
    }
    gradients_.commit(first, tile, begin, rows);
  }

  // exp(c (largest of the tile - largest of the row)) for a block's rows.
  void shifts(int64_t m, int64_t tile, int64_t begin, int64_t rows, float* out) {
    const ExpOfProduct exp_of_shift(models_[m].c);
    const float* most = stat(m, kMost, tile) + begin;
    const float* top = top_ + m * t_.rows + begin;
    for (int64_t r = 0; r < rows; r += Vec::size()) {
      const int64_t n = std::min<int64_t>(Vec::size(), rows - r);
      exp_of_shift(Vec::loadu(most + r, n) - Vec::loadu(top + r, n)).store(out + r, n);
    }
  }

  static constexpr int64_t kMostBlock = 64;
  struct Merged {
    double sum[kMostBlock], own[kMostBlock], other[kMostBlock];
  };

  void merge(int64_t m, int64_t begin, int64_t rows, Merged& out) {
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(rows <= kMostBlock);
    const float sign = models_[m].sign;
    float* top = top_ + m * t_.rows + begin;
    const float* student_top = top_ + begin;
    std::fill(top, top + rows, -sign * std::numeric_limits<float>::infinity());
    for (int64_t t = 0; t < t_.tiles; ++t) {
      if (columns_.empty(t)) {
        continue;
      }
      const float* most = stat(m, kMost, t) + begin;
      for (int64_t r = 0; r < rows; ++r) {
        // Not std::max, which would lose a NaN. Where `largest` has lost it, the sums have it.
        top[r] = sign * most[r] > sign * top[r] || most[r] != most[r] ? most[r] : top[r];
      }
    }
    for (double* sums : {out.sum, out.own, out.other}) {
      std::fill(sums, sums + rows, 0.0);
    }
    float shift[kMostBlock];
    for (int64_t t = 0; t < t_.tiles; ++t) {
      if (columns_.empty(t)) {
        continue;
      }
      shifts(m, t, begin, rows, shift);
      const float* most = stat(m, kMost, t) + begin;
      const float* tile_sum = stat(m, kSum, t) + begin;
      const float* tile_own = stat(m, kOwn, t) + begin;
      const float* tile_other = stat(m, kOther, t) + begin;
      const float* student_most = stat(0, kMost, t) + begin;
      const double part = double(columns_.counts[t]);
      for (int64_t r = 0; r < rows; ++r) {
        const double by = shift[r], sum = tile_sum[r];
        const double up = double(most[r]) - top[r];
        out.sum[r] += by * sum;
        out.own[r] += by * (tile_own[r] + sum * up);
        out.other[r] += m == 0
            ? tile_other[r] + part * up
            : by * (tile_other[r] + sum * (double(student_most[r]) - student_top[r]));
      }
    }
  }

  const Tiling t_;
  std::vector<Model<Operand>>& models_;
  const Columns& columns_;
  Rule& rule_;
  const int64_t count_; // of models
  std::vector<Scratch> scratch_;
  Logits<Engine> logits_;
  Gradients<Engine> gradients_;
  float* stat_; // [models][4][tiles][rows]
  float* at_target_; // [models][rows], Y at the target
  float* top_; // [models][rows], Y at the largest u of the row
  float* weight_; // [models][rows], coefficients over sums of exponentials
  float *uniform_, *hard_; // [rows], coefficients
  std::vector<double> row_scale_;
};

} // namespace mulki
