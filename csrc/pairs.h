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

// The products of all pairs, [tiles][rows][width], for a second pass over them.
class Kept {
 public:
  // Beyond this a second pass multiplies again: fresh memory would cost more than that.
  static constexpr int64_t kMost = int64_t(16) << 20;

  explicit Kept(const Tiling& t) : rows_(rows_of(t)), width_(t.width), values_(bytes(t)) {}

  static bool fits(const Tiling& t) {
    return bytes(t) <= kMost;
  }
  float* at(int64_t tile, int64_t row) const {
    return values_.data<float>() + (tile * rows_ + row) * width_;
  }

 private:
  static int64_t rows_of(const Tiling& t) {
    return (t.n + t.block - 1) / t.block * t.block; // engines write whole blocks
  }
  static int64_t bytes(const Tiling& t) {
    return t.tiles * rows_of(t) * t.width * int64_t(sizeof(float));
  }

  int64_t rows_, width_;
  Scratch values_;
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
  // of a super-block with tile t, then after(first, count). y is in `kept`, if there is one.
  template <typename Tile, typename After>
  void sweep(const Tile& tile, const After& after, const Kept* kept = nullptr) {
    for (int64_t first = 0; first < tiling.n; first += tiling.rows) {
      const int64_t count = std::min(tiling.rows, tiling.n - first);
      logits.run(
          first, count, [](int64_t) { return true; },
          [&](int64_t t, int64_t begin, int64_t end) {
            Scratch local;
            if (kept == nullptr && !gradients.any()) {
              local = Scratch(tiling.block * tiling.width * int64_t(sizeof(float)));
            }
            float* y = kept != nullptr ? kept->at(t, first + begin)
                : gradients.any()      ? gradients.values(0, t, begin)
                                       : local.data<float>();
            logits.multiply(0, t, begin, end, y);
            tile(first, t, begin, end, y);
          });
      after(first, count);
    }
  }

  // The same, with products that are kept already.
  template <typename Tile, typename After>
  void sweep_again(const Tile& tile, const After& after, const Kept& kept) {
    for (int64_t first = 0; first < tiling.n; first += tiling.rows) {
      const int64_t count = std::min(tiling.rows, tiling.n - first);
      const int64_t blocks = (count + tiling.block - 1) / tiling.block;
      parallel_each(tiling.tiles * blocks, [&](int64_t task) {
        const int64_t t = task / blocks, begin = task % blocks * tiling.block;
        const int64_t end = begin + tiling.block_rows(task % blocks, count);
        tile(first, t, begin, end, kept.at(t, first + begin));
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
inline void add_rows(const std::vector<double>& partial, const Tiling& t, int64_t count, const F& add) {
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t tile = 0; tile < t.tiles; ++tile) {
      sum += partial[tile * t.rows + i];
    }
    add(i, sum);
  }
}

} // namespace mulki
