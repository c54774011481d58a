// Losses over pairs of rows, such as contrastive and siglip: Y = X W^T of all pairs, of a student
// and maybe of teachers, in super-blocks of rows and tiles of columns (tiling.h).
//
// PairwisePass computes the products tile by tile. The loss reads each block of products and writes
// the gradient G in place of the student's; from G come dX and dW (gradients.h). A loss that needs
// two passes over the products keeps those of the first rows in a ProductCache of bounded size.
#pragma once

#include "core/gradients.h"
#include "core/logits.h"

#include <vector>

namespace mulki {

// The products of the first rows, [models][tiles][rows][width]: one pass writes them, the next reads
// them.
class ProductCache {
 public:
  // Holds all rows if they fit beside the matrices of a super-block, else whole super-blocks.
  explicit ProductCache(const Tiling& t, int64_t models = 1)
      : count_(rows_of(t, models)),
        rows_((count_ + t.block - 1) / t.block * t.block), // engines write whole blocks
        width_(t.width),
        tiles_(t.tiles),
        values_(models * t.tiles * rows_ * width_ * int64_t(sizeof(float))) {}

  bool has(int64_t first, int64_t count) const {
    return first + count <= count_;
  }
  float* at(int64_t model, int64_t tile, int64_t row) const {
    return values_.data<float>() + ((model * tiles_ + tile) * rows_ + row) * width_;
  }

 private:
  // More would be faster, but memory would grow with the square of the batch size.
  static constexpr int64_t kMaxBytes = int64_t(24) << 20;

  static int64_t rows_of(const Tiling& t, int64_t models) {
    const int64_t row = models * t.tiles * t.width * int64_t(sizeof(float));
    const int64_t fitting = std::max<int64_t>(kMaxBytes - t.bytes, 0) / row;
    return fitting >= t.n ? t.n : fitting / t.rows * t.rows;
  }

  int64_t count_, rows_, width_, tiles_;
  Scratch values_;
};

// The features of one model.
struct PairFeatures {
  Tensor images, texts;
};

// One pass over all products of all models, with the gradients of the first model, the student, if
// they are wanted.
template <typename Engine>
struct PairwisePass {
  PairwisePass(const std::vector<PairFeatures>& features, bool wanted_x, bool wanted_w)
      : tiling(features[0].images.size(0), features[0].texts.size(0), 1, wanted_x || wanted_w),
        models(features.begin(), features.end()),
        logits(tiling, pointers(models), tiling.tiles),
        gradients(tiling, models[0].x, models[0].w, wanted_x, wanted_w) {}

  // For each super-block, which has `count` rows from row `first` of x on: calls
  // tile(first, t, begin, end, y) for each block of rows and each tile t, then after(first, count).
  // y[m] [end - begin, width] are the products of model m, of rows [begin, end) of the super-block
  // with tile t. Products for which `cache` has room are stored there; with `reuse` they are read
  // from there.
  template <typename Tile, typename After>
  void run(
      const Tile& tile,
      const After& after,
      const ProductCache* cache = nullptr,
      bool reuse = false) {
    const int64_t number = int64_t(models.size());
    for (int64_t first = 0; first < tiling.n; first += tiling.rows) {
      const int64_t count = std::min(tiling.rows, tiling.n - first);
      const bool cached = cache != nullptr && cache->has(first, count);
      if (cached && reuse) {
        const int64_t blocks = (count + tiling.block - 1) / tiling.block;
        parallel_tasks(tiling.tiles * blocks, [&](int64_t task) {
          const int64_t t = task / blocks, begin = task % blocks * tiling.block;
          const int64_t end = begin + tiling.block_rows(task % blocks, count);
          std::vector<float*> y(number);
          for (int64_t m = 0; m < number; ++m) {
            y[m] = cache->at(m, t, first + begin);
          }
          tile(first, t, begin, end, y.data());
        });
      } else {
        const auto all = [](int64_t) { return true; };
        // Models whose products are neither cached nor kept as G.
        const int64_t passing = cached ? 0 : number - (gradients.any() ? 1 : 0);
        logits.run(first, count, all, [&](int64_t t, int64_t begin, int64_t end) {
          const int64_t cells = tiling.block * tiling.width;
          const Scratch local =
              passing > 0 ? Scratch(passing * cells * int64_t(sizeof(float))) : Scratch();
          std::vector<float*> y(number);
          for (int64_t m = 0; m < number; ++m) {
            y[m] = cached              ? cache->at(m, t, first + begin)
                : m + passing < number ? gradients.values(0, t, begin)
                                       : local.data<float>() + (m + passing - number) * cells;
            logits.multiply(m, t, begin, end, y[m]);
          }
          tile(first, t, begin, end, y.data());
        });
      }
      after(first, count);
    }
  }

  using Operand = typename Engine::Operand;
  struct Model {
    explicit Model(const PairFeatures& features) : x(features.images), w(features.texts) {}
    Operand x, w;
  };
  static std::vector<typename Logits<Engine>::Model> pointers(const std::vector<Model>& of) {
    std::vector<typename Logits<Engine>::Model> models;
    for (const Model& m : of) {
      models.push_back({&m.x, &m.w});
    }
    return models;
  }

  const Tiling tiling;
  const std::vector<Model> models;
  Logits<Engine> logits;
  Gradients<Engine> gradients;
};

// Calls add(i, sum) for each row i, where sum adds the partial results [tiles][rows of the
// super-block] of the row in the order of the tiles.
template <typename F>
inline void add_row_sums(
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
