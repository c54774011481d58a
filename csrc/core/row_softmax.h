// Losses sum_i loss_i, where loss_i is a function of softmax distributions over P classes: q of the
// student and p_k of any number of teachers.
//
// Each model has features X, prototypes W and a factor c = scale / temperature. Y = X W^T are the
// products and u = c Y the logits. Rows are processed in super-blocks, and the columns in tiles
// (tiling.h). A super-block takes four steps, each of them parallel:
//
//   1. Per tile and model: Y; for each row of the tile the maximum of u, and the sums of
//      e = exp(u - max u), of e Y, and for teachers of e times the student's Y. e replaces Y.
//   2. Per row: the sums of the tiles are merged. From them a rule, which belongs to the operator,
//      computes the loss and the coefficients of G = dloss/du:
//        G_j = a q_j - sum_k b_k p_kj - uniform - [j = target] at_target
//   3. Per tile: G replaces e of the student.
//   4. The products of G with W and X (gradients.h).
//
// Only the matrices of one super-block exist at a time, and none of them without a gradient.
//
// In all sums, Y is centred: Y at the maximum of u is subtracted. So nothing overflows, and no
// digits cancel. The rule reads its numbers in double.
#pragma once

#include "core/gradients.h"
#include "core/logits.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace mulki {

// What the rule reads about one row of one model.
struct ModelRow {
  double log_sum; // log sum_j exp(u_j - u_max)
  double mean; // expectation of centred Y under the model's own distribution
  double cross; // teachers: expectation of the student's centred Y under the teacher's
  double at_target; // centred Y of the target class
  double uniform; // student: mean of centred Y over the active classes
};

// What the rule writes: the coefficients of G in one row.
struct RowCoefficients {
  bool ignored = false; // no gradient, whatever the row holds
  double student = 0; // a
  double uniform = 0; // the rule has divided it by the number of active classes
  double at_target = 0;
  double* teachers = nullptr; // b_k, initially zero
  double scale = 0; // dloss/dscale of the row; the caller multiplies it by a constant
};

template <typename Operand>
struct Model {
  Model(const Tensor& features, const Tensor& prototypes, double c)
      : x(features), w(prototypes), c(c), sign(c < 0 ? -1.0f : 1.0f) {}

  Operand x, w;
  double c;
  float sign; // of c: u has its maximum where sign * Y has it
};

// The active columns, which are the classes that the mask includes. Padding is not active.
struct ActiveColumns {
  ActiveColumns(const Tiling& t, const std::optional<Tensor>& class_mask)
      : active(0), mask(t.tiles * t.width), partial(t.tiles), counts(t.tiles) {
    const bool* included = class_mask.has_value() ? class_mask->const_data_ptr<bool>() : nullptr;
    for (int64_t j = 0; j < t.tiles * t.width; ++j) {
      const bool is_active = j < t.p && (included == nullptr || included[j]);
      mask[j] = is_active ? 1.0f : 0.0f;
      counts[j / t.width] += is_active;
      active += is_active;
    }
    for (int64_t tile = 0; tile < t.tiles; ++tile) {
      partial[tile] = counts[tile] < t.width;
    }
  }
  bool is_empty(int64_t tile) const {
    return counts[tile] == 0;
  }
  int64_t tiles_with_active() const {
    return std::count_if(counts.begin(), counts.end(), [](int64_t c) { return c > 0; });
  }

  int64_t active; // how many
  std::vector<float> mask; // 1 for an active column, else 0
  std::vector<char> partial; // per tile: whether some column is not active
  std::vector<int64_t> counts; // per tile: how many are
};

// Each lane's maximum of sign * y over a row of a tile. It may lose a NaN, which the row's sums
// keep.
template <bool PARTIAL>
inline Vec max_of_row(const float* y, const float* mask, int64_t width, float sign) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  Vec tile_max(kLowest);
  const Vec s(sign);
  for (int64_t j = 0; j < width; j += Vec::size()) {
    Vec v = Vec::loadu(y + j) * s;
    if constexpr (PARTIAL) {
      v = where_active(mask + j, kLowest, v);
    }
    tile_max = larger(v, tile_max);
  }
  return tile_max;
}

// The sums of some rows of a tile, one row to a lane: of e; of e y; and for teachers of e times the
// student's y, for the student of y. All y are centred.
struct RowSums {
  RowVectors sum_exp, sum_exp_y, cross_or_uniform;
};

// A rule has
//
//   int64_t target(int64_t row)    the target class of the row, or a negative number
//   void operator()(int64_t row, const ModelRow* student, const ModelRow* teachers, int64_t active,
//                   RowCoefficients&)
//                                  stores the loss; called once for each row, from any thread;
//                                  `active` is the number of active classes
template <typename Engine, typename Rule>
class RowSoftmax {
  using Operand = typename Engine::Operand;

 public:
  RowSoftmax(
      const Tiling& tiling,
      std::vector<Model<Operand>>& models, // the student, then the teachers
      const ActiveColumns& columns,
      Rule& rule,
      bool wanted_x,
      bool wanted_w)
      : t_(tiling),
        models_(models),
        columns_(columns),
        rule_(rule),
        model_count_(int64_t(models.size())),
        logits_(tiling, pointers(models), columns.tiles_with_active()),
        gradients_(tiling, models[0].x, models[0].w, wanted_x, wanted_w, model_count_) {
    stat_ = allocate(model_count_ * 4 * t_.tiles * t_.rows);
    at_target_ = allocate(model_count_ * t_.rows);
    row_max_ = allocate(model_count_ * t_.rows);
    coefficient_ = allocate(model_count_ * t_.rows);
    uniform_coefficient_ = allocate(t_.rows);
    target_coefficient_ = allocate(t_.rows);
    row_scale_.resize(t_.rows);
  }

  // Writes `factor` times the gradients to dx and dw, and returns the sum of
  // RowCoefficients::scale.
  double run(float factor, Tensor& dx, Tensor& dw) {
    double scale = 0;
    for (int64_t first = 0; first < t_.n; first += t_.rows) {
      const int64_t count = std::min(t_.rows, t_.n - first);
      const int64_t blocks = (count + t_.block - 1) / t_.block;
      products_and_sums(first, count);
      parallel_tasks(blocks, [&](int64_t b) { row_step(first, count, b); });
      for (int64_t i = 0; i < count; ++i) {
        scale += row_scale_[i];
      }
      if (gradients_.any()) {
        parallel_tasks(t_.tiles * blocks, [&](int64_t task) {
          gradient_step(first, count, task / blocks, task % blocks);
        });
        gradients_.accumulate(first, count, factor, dx, dw);
      }
    }
    return scale;
  }

 private:
  float* allocate(int64_t count) {
    scratch_.emplace_back(count * int64_t(sizeof(float)));
    return scratch_.back().data<float>();
  }

  static std::vector<typename Logits<Engine>::Model> pointers(std::vector<Model<Operand>>& models) {
    std::vector<typename Logits<Engine>::Model> out;
    for (const Model<Operand>& m : models) {
      out.push_back({&m.x, &m.w});
    }
    return out;
  }

  // Of a row in one tile: Y at the maximum of u, and the sums of RowSums.
  enum Stat { kMaxY, kSumExp, kSumExpY, kCrossOrUniform };

  float* stat(int64_t model, Stat which, int64_t tile) {
    return stat_ + ((model * 4 + which) * t_.tiles + tile) * t_.rows;
  }
  float* values(int64_t model, int64_t tile, int64_t row) {
    return gradients_.values(model, tile, row);
  }

  void products_and_sums(int64_t first, int64_t count) {
    const auto wanted = [&](int64_t tile) { return !columns_.is_empty(tile); };
    if (gradients_.any()) {
      const auto where = [&](int64_t m, int64_t tile, int64_t begin) {
        return values(m, tile, begin);
      };
      logits_.run_stored(
          first, count, wanted, where, [&](int64_t m, int64_t tile, int64_t begin, int64_t end) {
            sums_of_model(
                {first, tile, begin, end}, m, values(m, tile, begin), values(0, tile, begin));
          });
      return;
    }
    logits_.run(first, count, wanted, [&](int64_t tile, int64_t begin, int64_t end) {
      const int64_t size = t_.block * t_.width;
      const Scratch local(model_count_ * size * int64_t(sizeof(float)));
      float* y = local.data<float>();
      for (int64_t m = 0; m < model_count_; ++m) {
        logits_.multiply(m, tile, begin, end, y + m * size);
        sums_of_model({first, tile, begin, end}, m, y + m * size, y);
      }
    });
  }

  // Rows [begin, end) of the super-block that starts at row `first` of X, in one tile.
  struct Block {
    int64_t first, tile, begin, end;
  };

  // Takes the sums of a block whose products y of model m are new. Those of the models before m are
  // there already. The student, model 0, is summed with the last model: until then the teachers'
  // sums need its products, which its exponentials replace.
  void sums_of_model(const Block& block, int64_t m, float* y, float* student) {
    if (columns_.partial[block.tile]) {
      sums_of_model<true>(block, m, y, student);
    } else {
      sums_of_model<false>(block, m, y, student);
    }
  }

  template <bool PARTIAL>
  void sums_of_model(const Block& block, int64_t m, float* y, float* student) {
    const int64_t tile = block.tile;
    const float* mask = columns_.mask.data() + tile * t_.width;
    const float sign = models_[m].sign;
    for (int64_t i = block.begin; i < block.end; i += Vec::size()) {
      const int64_t rows = std::min<int64_t>(Vec::size(), block.end - i);
      const int64_t from = (i - block.begin) * t_.width;
      RowVectors tile_max;
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = y + from + r * t_.width;
        const int64_t target = rule_.target(block.first + i + r) - tile * t_.width;
        if (target >= 0 && target < t_.width) {
          at_target_[m * t_.rows + i + r] = row[target];
        }
        tile_max.set(r, max_of_row<PARTIAL>(row, mask, t_.width, sign));
      }
      (tile_max.maxima() * Vec(sign)).store(stat(m, kMaxY, tile) + i, rows);
      if (m > 0) {
        sums_of_rows<PARTIAL, true>(m, tile, i, rows, y + from, student + from);
      }
      if (m == model_count_ - 1) {
        sums_of_rows<PARTIAL, false>(0, tile, i, rows, student + from, nullptr);
      }
    }
  }

  // Takes the sums of `rows` rows, at most the number of lanes, from row i of the super-block on.
  // CROSS says that they are a teacher's; `student` is then the student's y. With a gradient, e
  // replaces y.
  template <bool PARTIAL, bool CROSS>
  void sums_of_rows(
      int64_t m, int64_t tile, int64_t i, int64_t rows, float* y, const float* student) {
    const float *tile_max = stat(m, kMaxY, tile) + i, *student_tile_max = stat(0, kMaxY, tile) + i;
    const float* mask = columns_.mask.data() + tile * t_.width;
    const ExpOfProduct exp_of_centred(models_[m].c);
    const bool store = gradients_.any();
    const int64_t width = t_.width;
    RowSums sums;
    for (int64_t r = 0; r < rows; ++r, y += width) {
      Vec sum_exp(0.0f), sum_exp_y(0.0f), cross_or_uniform(0.0f);
      const Vec max(tile_max[r]), student_max(student_tile_max[r]);
      for (int64_t j = 0; j < width; j += Vec::size()) {
        Vec centred = Vec::loadu(y + j) - max;
        if constexpr (PARTIAL) {
          centred = where_active(mask + j, 0.0f, centred);
        }
        Vec e = exp_of_centred(centred);
        if constexpr (PARTIAL) {
          e = e * Vec::loadu(mask + j);
        }
        sum_exp = sum_exp + e;
        sum_exp_y = at::vec::fmadd(e, centred, sum_exp_y);
        if constexpr (CROSS) {
          Vec student_y = Vec::loadu(student + r * width + j) - student_max;
          if constexpr (PARTIAL) {
            student_y = where_active(mask + j, 0.0f, student_y);
          }
          cross_or_uniform = at::vec::fmadd(e, student_y, cross_or_uniform);
        } else {
          cross_or_uniform = cross_or_uniform + centred;
        }
        if (store) {
          e.store(y + j);
        }
      }
      sums.sum_exp.set(r, sum_exp);
      sums.sum_exp_y.set(r, sum_exp_y);
      sums.cross_or_uniform.set(r, cross_or_uniform);
    }
    sums.sum_exp.sums().store(stat(m, kSumExp, tile) + i, rows);
    sums.sum_exp_y.sums().store(stat(m, kSumExpY, tile) + i, rows);
    sums.cross_or_uniform.sums().store(stat(m, kCrossOrUniform, tile) + i, rows);
  }

  // Merges the sums of all tiles for a block of rows, and calls the rule for each row.
  void row_step(int64_t first, int64_t count, int64_t block) {
    const int64_t begin = block * t_.block, rows = t_.block_rows(block, count);
    std::vector<MergedSums> merged(model_count_);
    for (int64_t m = 0; m < model_count_; ++m) {
      merge(m, begin, rows, merged[m]);
    }
    std::vector<ModelRow> rows_of_models(model_count_);
    std::vector<double> teachers(model_count_);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = begin + r;
      const bool has_target = rule_.target(first + i) >= 0;
      for (int64_t m = 0; m < model_count_; ++m) {
        const MergedSums& sums = merged[m];
        rows_of_models[m].log_sum = std::log(sums.sum_exp[r]);
        rows_of_models[m].mean = sums.sum_exp_y[r] / sums.sum_exp[r];
        rows_of_models[m].cross = sums.cross_or_uniform[r] / sums.sum_exp[r];
        rows_of_models[m].uniform = sums.cross_or_uniform[r] / double(columns_.active);
        rows_of_models[m].at_target =
            has_target ? double(at_target_[m * t_.rows + i]) - row_max_[m * t_.rows + i] : 0.0;
      }
      std::fill(teachers.begin(), teachers.end(), 0.0);
      RowCoefficients coefficients;
      coefficients.teachers = teachers.data();
      rule_(
          first + i, rows_of_models.data(), rows_of_models.data() + 1, columns_.active,
          coefficients);
      row_scale_[i] = coefficients.scale;
      // Zero divided by a NaN would not be zero.
      coefficient_[i] =
          coefficients.ignored ? 0.0f : float(coefficients.student / merged[0].sum_exp[r]);
      for (int64_t m = 1; m < model_count_; ++m) {
        coefficient_[m * t_.rows + i] = float(teachers[m - 1] / merged[m].sum_exp[r]);
      }
      uniform_coefficient_[i] = float(coefficients.uniform);
      target_coefficient_[i] = float(coefficients.at_target);
    }
  }

  // Writes G for a block of rows in one tile.
  void gradient_step(int64_t first, int64_t count, int64_t tile, int64_t block) {
    const int64_t begin = block * t_.block, rows = t_.block_rows(block, count);
    if (columns_.is_empty(tile)) {
      std::fill(values(0, tile, begin), values(0, tile, begin) + rows * t_.width, 0.0f);
      return;
    }
    std::vector<float> factors(model_count_ * kMaxBlock);
    for (int64_t m = 0; m < model_count_; ++m) {
      float* model_factors = &factors[m * kMaxBlock];
      shifts(m, tile, begin, rows, model_factors);
      for (int64_t r = 0; r < rows; ++r) {
        model_factors[r] *= coefficient_[m * t_.rows + begin + r];
      }
    }
    const float* mask = columns_.mask.data() + tile * t_.width;
    std::vector<const float*> teachers(model_count_);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = begin + r;
      float* g = values(0, tile, i);
      bool has_gradient = target_coefficient_[i] != 0.0f || uniform_coefficient_[i] != 0.0f;
      for (int64_t m = 0; m < model_count_; ++m) {
        // This is true for NaN.
        has_gradient = has_gradient || coefficient_[m * t_.rows + i] != 0.0f;
        teachers[m] = values(m, tile, i);
      }
      if (!has_gradient) {
        // An ignored row has no gradient even if its logits are infinite or NaN.
        std::fill(g, g + t_.width, 0.0f);
        continue;
      }
      const Vec student_factor(factors[r]), uniform(uniform_coefficient_[i]);
      for (int64_t j = 0; j < t_.width; j += Vec::size()) {
        // No fused multiply-subtract: the gradient of a student equal to its teacher is exactly 0.
        Vec v = Vec::loadu(g + j) * student_factor;
        for (int64_t m = 1; m < model_count_; ++m) {
          v = v - Vec::loadu(teachers[m] + j) * Vec(factors[m * kMaxBlock + r]);
        }
        if (uniform_coefficient_[i] != 0.0f) {
          v = v - Vec::loadu(mask + j) * uniform;
        }
        v.store(g + j);
      }
      const int64_t target = rule_.target(first + i) - tile * t_.width;
      if (target >= 0 && target < t_.width) {
        g[target] -= target_coefficient_[i];
      }
    }
  }

  // Writes exp(c (tile_max - row_max)) for a block of rows: the factor from a tile's sums to the
  // row's.
  void shifts(int64_t m, int64_t tile, int64_t begin, int64_t rows, float* out) {
    const ExpOfProduct exp_of_shift(models_[m].c);
    const float* tile_max = stat(m, kMaxY, tile) + begin;
    const float* row_max = row_max_ + m * t_.rows + begin;
    for (int64_t r = 0; r < rows; r += Vec::size()) {
      const int64_t n = std::min<int64_t>(Vec::size(), rows - r);
      exp_of_shift(Vec::loadu(tile_max + r, n) - Vec::loadu(row_max + r, n)).store(out + r, n);
    }
  }

  static constexpr int64_t kMaxBlock = 64;
  struct MergedSums {
    double sum_exp[kMaxBlock], sum_exp_y[kMaxBlock], cross_or_uniform[kMaxBlock];
  };

  void merge(int64_t m, int64_t begin, int64_t rows, MergedSums& out) {
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(rows <= kMaxBlock);
    const float sign = models_[m].sign;
    float* row_max = row_max_ + m * t_.rows + begin;
    const float* student_row_max = row_max_ + begin;
    std::fill(row_max, row_max + rows, -sign * std::numeric_limits<float>::infinity());
    for (int64_t t = 0; t < t_.tiles; ++t) {
      if (columns_.is_empty(t)) {
        continue;
      }
      const float* tile_max = stat(m, kMaxY, t) + begin;
      for (int64_t r = 0; r < rows; ++r) {
        // Not std::max, which would lose a NaN. If max_of_row has lost it, the sums have it.
        row_max[r] = sign * tile_max[r] > sign * row_max[r] || tile_max[r] != tile_max[r]
            ? tile_max[r]
            : row_max[r];
      }
    }
    for (double* sums : {out.sum_exp, out.sum_exp_y, out.cross_or_uniform}) {
      std::fill(sums, sums + rows, 0.0);
    }
    float shift[kMaxBlock];
    for (int64_t t = 0; t < t_.tiles; ++t) {
      if (columns_.is_empty(t)) {
        continue;
      }
      shifts(m, t, begin, rows, shift);
      const float* tile_max = stat(m, kMaxY, t) + begin;
      const float* tile_sum_exp = stat(m, kSumExp, t) + begin;
      const float* tile_sum_exp_y = stat(m, kSumExpY, t) + begin;
      const float* tile_cross_or_uniform = stat(m, kCrossOrUniform, t) + begin;
      const float* student_tile_max = stat(0, kMaxY, t) + begin;
      const double active = double(columns_.counts[t]);
      for (int64_t r = 0; r < rows; ++r) {
        const double factor = shift[r], sum_exp = tile_sum_exp[r];
        const double shift_of_max = double(tile_max[r]) - row_max[r];
        out.sum_exp[r] += factor * sum_exp;
        out.sum_exp_y[r] += factor * (tile_sum_exp_y[r] + sum_exp * shift_of_max);
        const double contribution = m == 0 ? tile_cross_or_uniform[r] + active * shift_of_max
                                           : factor *
                (tile_cross_or_uniform[r] +
                 sum_exp * (double(student_tile_max[r]) - student_row_max[r]));
        out.cross_or_uniform[r] += contribution;
      }
    }
  }

  const Tiling t_;
  std::vector<Model<Operand>>& models_;
  const ActiveColumns& columns_;
  Rule& rule_;
  const int64_t model_count_;
  std::vector<Scratch> scratch_;
  Logits<Engine> logits_;
  Gradients<Engine> gradients_;
  float* stat_; // [models][4][tiles][rows], see Stat
  float* at_target_; // [models][rows], Y of the target class
  float* row_max_; // [models][rows], Y at the maximum of u
  float* coefficient_; // [models][rows], a or b_k, divided by the sum of exponentials
  float *uniform_coefficient_, *target_coefficient_; // [rows], see RowCoefficients
  std::vector<double> row_scale_;
};

} // namespace mulki
