// What losses over matching pairs have in common: their products, and the places of the matches.
#pragma once

#include "logits.h"

#include <vector>

namespace mulki {

// Ones around a zero; read from Vec::size() - 1 - i on, only lane i of a vector is zero.
struct AllBut {
  AllBut() {
    std::fill(std::begin(values), std::end(values), 1.0f);
    values[Vec::size() - 1] = 0.0f;
  }
  float values[2 * Vec::size() - 1];
};
inline const AllBut kAllButOne;
inline const float* const kAllBut = kAllButOne.values;

// The products of the first rows, [tiles][rows][width], from one pass over the pairs for the next.
class Kept {
 public:
  // As many rows as fit beside the matrices of a super-block, which are multiples of one or all there are.
  explicit Kept(const Tiling& t)
      : count_(rows_of(t)),
        rows_((count_ + t.block - 1) / t.block * t.block), // engines write whole blocks
        width_(t.width),
        values_(t.tiles * rows_ * width_ * int64_t(sizeof(float))) {}

  bool has(int64_t first, int64_t count) const {
    return first + count <= count_;
  }
  float* at(int64_t tile, int64_t row) const {
    return values_.data<float>() + (tile * rows_ + row) * width_;
  }

 private:
  // Keeping more would be faster still, and take memory that grows with the square of the batch.
  static constexpr int64_t kBytes = int64_t(24) << 20;

  static int64_t rows_of(const Tiling& t) {
    const int64_t row = t.tiles * t.width * int64_t(sizeof(float));
    const int64_t fitting = std::max<int64_t>(kBytes - t.bytes, 0) / row;
    return fitting >= t.n ? t.n : fitting / t.rows * t.rows;
  }

  int64_t count_, rows_, width_;
  Scratch values_;
};

// The logits of one super-block after the other, in tiles, and the gradients from what replaces them.
template <typename Engine>
struct Pairs {
  Pairs(const Tensor& x, const Tensor& w, bool wanted_x, bool wanted_w)
      : tiling(tiling_for<Engine>(x.size(0), w.size(0), 1, wanted_x || wanted_w)),
        rows(x),
        prototypes(w),
        logits(tiling, {{&rows, &prototypes}}, tiling.tiles),
        gradients(tiling, rows, prototypes, wanted_x, wanted_w) {}

  // Runs tile(first, t, begin, end, y) with the products y [end - begin, width] of rows [begin, end)
  // of a super-block with tile t, then after(first, count). The products of rows that `kept` has a place for
  // are there; `again` says that they are there already.
  template <typename Tile, typename After>
  void sweep(const Tile& tile, const After& after, const Kept* kept = nullptr, bool again = false) {
    for (int64_t first = 0; first < tiling.n; first += tiling.rows) {
      const int64_t count = std::min(tiling.rows, tiling.n - first);
      const bool keep = kept != nullptr && kept->has(first, count);
      if (keep && again) {
        const int64_t blocks = (count + tiling.block - 1) / tiling.block;
        parallel_each(tiling.tiles * blocks, [&](int64_t task) {
          const int64_t t = task / blocks, begin = task % blocks * tiling.block;
          const int64_t end = begin + tiling.block_rows(task % blocks, count);
          tile(first, t, begin, end, kept->at(t, first + begin));
        });
      } else {
        const auto all = [](int64_t) { return true; };
        logits.run(first, count, all, [&](int64_t t, int64_t begin, int64_t end) {
          Scratch local;
          if (!keep && !gradients.any()) {
            local = Scratch(tiling.block * tiling.width * int64_t(sizeof(float)));
          }
          float* y = keep       ? kept->at(t, first + begin)
              : gradients.any() ? gradients.values(0, t, begin)
                                : local.data<float>();
          logits.multiply(0, t, begin, end, y);
          tile(first, t, begin, end, y);
        });
      }
      after(first, count);
    }
  }

  const Tiling tiling;
  typename Engine::Operand rows, prototypes;
  Logits<Engine> logits;
  Gradients<Engine> gradients;
};

// Row sums of [tiles][rows of the super-block] partial results, in double and in order.
template <typename F>
inline void add_rows(
    const std::vector<double>& partial, const Tiling& t, int64_t count, const F& add) {
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t tile = 0; tile < t.tiles; ++tile) {
      sum += partial[tile * t.rows + i];
    }
    add(i, sum);
  }
}

} // namespace mulki
