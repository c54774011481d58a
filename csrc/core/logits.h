// The products Y = X W^T of one or more models, for one super-block of rows at a time, tile by
// tile.
//
// The columns of W^T in one tile, packed in the order in which an engine reads them, are a panel.
// If all panels fit into kScratch bytes, together with the matrices and the packed rows of a
// super-block, they are packed once. Otherwise each super-block packs them again, one group of
// tiles after the other. Every second super-block takes the groups in reverse order: its first
// group is the last one of the super-block before, which is still packed.
//
// With a single super-block each panel is used only once. Then one task computes all rows of a tile
// and packs the panels of the tile just before, if two conditions hold: all threads get equal work,
// and the panels of a tile fit into half of a core's L2 cache, where those of the next tile replace
// them.
#pragma once

#include "common/parallel.h"
#include "common/scratch.h"
#include "core/tiling.h"
#include "matmul/brgemm.h"

#include <vector>

namespace mulki {

template <typename Engine>
class Logits {
 public:
  using Operand = typename Engine::Operand;
  struct Model {
    const Operand* x;
    const Operand* w;
  };

  // `wanted` is the number of tiles that `run` or `run_stored` will compute.
  Logits(const Tiling& tiling, std::vector<Model> models, int64_t wanted)
      : t_(tiling), models_(std::move(models)) {
    int64_t tile_bytes = 0, row_bytes = 0;
    for (const Model& m : models_) {
      tile_bytes += Engine::right_bytes(t_.width, m.x->padded);
      row_bytes += Engine::left_bytes(*m.x, t_.rows);
    }
    const int64_t available = kScratch - t_.bytes - row_bytes;
    group_tiles_ = std::clamp<int64_t>(available / std::max<int64_t>(tile_bytes, 1), 1, t_.tiles);
    one_task_per_tile_ =
        t_.n <= t_.rows && tile_bytes <= kHalfL2 && is_balanced(wanted, threads_here());
    panels_.resize(models_.size() * t_.tiles);
    for (int64_t m = 0; m < int64_t(models_.size()); ++m) {
      const int64_t bytes = Engine::right_bytes(t_.width, models_[m].x->padded);
      left_.emplace_back(Engine::left_bytes(*models_[m].x, t_.rows));
      right_.emplace_back(one_task_per_tile_ ? 0 : group_tiles_ * bytes);
      for (int64_t slot = 0; slot < group_tiles_ && !one_task_per_tile_; ++slot) {
        panels_[m * t_.tiles + slot] = right_[m].template data<char>() + slot * bytes;
      }
    }
  }

  // Calls step(tile, begin, end) for each block of rows in each tile for which wanted(tile) is
  // true. The super-block has `count` rows from row `first` on. The step calls `multiply` for its
  // products.
  template <typename Wanted, typename Step>
  void run(int64_t first, int64_t count, const Wanted& wanted, const Step& step) {
    run_groups(first, count, [&](int64_t tiles) {
      each_block(0, int64_t(models_.size()), count, tiles, wanted, step);
    });
  }

  // Stores the products at where(model, tile, begin), and calls step(model, tile, begin, end) for
  // each block of each model. For a block the models come in order. If the operands of all models
  // do not fit into half of a core's L2 cache, one model is completed after the other.
  template <typename Wanted, typename Where, typename Step>
  void run_stored(
      int64_t first, int64_t count, const Wanted& wanted, const Where& where, const Step& step) {
    const int64_t models = int64_t(models_.size());
    const bool one_by_one = models > 1 && operand_bytes() > kHalfL2;
    const int64_t models_at_once = one_by_one ? 1 : models;
    run_groups(first, count, [&](int64_t tiles) {
      for (int64_t from = 0; from < models; from += models_at_once) {
        const auto block = [&](int64_t tile, int64_t begin, int64_t end) {
          for (int64_t m = from; m < from + models_at_once; ++m) {
            multiply(m, tile, begin, end, where(m, tile, begin));
            step(m, tile, begin, end);
          }
        };
        each_block(from, from + models_at_once, count, tiles, wanted, block);
      }
    });
  }

  // Writes out [end - begin, width].
  void multiply(int64_t model, int64_t tile, int64_t begin, int64_t end, float* out) const {
    const Model& m = models_[model];
    Engine::multiply(
        *m.x,
        {first_row_ + begin, begin, end - begin, left_[model].template data<char>(),
         panel(model, tile - first_tile_), t_.valid(tile), t_.width, out});
  }

 private:
  static constexpr int64_t kHalfL2 = int64_t(1) << 20; // bytes
  // Enough for the prototypes of two teachers at 4096 x 4096 x 512, with half precision read as
  // float.
  static constexpr int64_t kScratch = int64_t(38656) << 10;

  // Bytes of the rows of a super-block and of the panels of one tile.
  int64_t operand_bytes() const {
    int64_t bytes = 0;
    for (const Model& m : models_) {
      bytes += Engine::right_bytes(t_.rows + t_.width, m.x->padded);
    }
    return bytes;
  }

  template <typename Run>
  void run_groups(int64_t first, int64_t count, const Run& run) {
    first_row_ = first;
    pack_left(count);
    if (one_task_per_tile_) {
      first_tile_ = 0;
      run(t_.tiles);
      return;
    }
    const int64_t groups = (t_.tiles + group_tiles_ - 1) / group_tiles_;
    const bool backwards = first / t_.rows % 2 == 1;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t from = (backwards ? groups - 1 - g : g) * group_tiles_;
      const int64_t tiles = std::min(group_tiles_, t_.tiles - from);
      if (from != first_tile_) {
        first_tile_ = from;
        pack_right(tiles);
      }
      run(tiles);
    }
  }

  // Calls step for each block of each tile, with the panels of models [begin_model, end_model).
  template <typename Wanted, typename Step>
  void each_block(
      int64_t begin_model,
      int64_t end_model,
      int64_t count,
      int64_t tiles,
      const Wanted& wanted,
      const Step& step) {
    if (one_task_per_tile_) {
      parallel_tasks<Engine>(tiles, [&](int64_t tile) {
        if (!wanted(tile)) {
          return;
        }
        std::vector<Scratch> panels;
        for (int64_t m = begin_model; m < end_model; ++m) {
          panels.emplace_back(Engine::right_bytes(t_.width, models_[m].x->padded));
          panels_[m * t_.tiles + tile] = panels.back().template data<char>();
          pack_panel(m, tile);
        }
        for (int64_t begin = 0; begin < count; begin += t_.block) {
          step(tile, begin, begin + std::min(t_.block, count - begin));
        }
      });
      return;
    }
    const int64_t blocks = (count + t_.block - 1) / t_.block;
    parallel_tasks<Engine>(tiles * blocks, [&](int64_t task) {
      const int64_t tile = first_tile_ + task / blocks, begin = task % blocks * t_.block;
      if (wanted(tile)) {
        step(tile, begin, begin + std::min(t_.block, count - begin));
      }
    });
  }

  // Whether the threads get almost the same number of tiles: the largest is at most 1/16 above the
  // mean.
  static bool is_balanced(int64_t tiles, int64_t threads) {
    const int64_t max_tiles = (tiles + threads - 1) / threads;
    return max_tiles * threads * 16 <= tiles * 17;
  }

  char* panel(int64_t model, int64_t slot) const {
    return panels_[model * t_.tiles + slot];
  }

  void pack_panel(int64_t model, int64_t slot) {
    Engine::pack_right(
        *models_[model].w, (first_tile_ + slot) * t_.width, t_.width, panel(model, slot));
  }

  void pack_left(int64_t count) {
    std::vector<int64_t> packed; // the models whose rows have to be packed
    for (int64_t m = 0; m < int64_t(models_.size()); ++m) {
      if (Engine::left_bytes(*models_[m].x, 32) > 0) {
        packed.push_back(m);
      }
    }
    const int64_t strips = (count + 31) / 32;
    parallel_tasks(strips * int64_t(packed.size()), [&](int64_t task) {
      const int64_t m = packed[task / strips], begin = task % strips * 32;
      const Operand& x = *models_[m].x;
      Engine::pack_left(
          x, first_row_ + begin, std::min<int64_t>(32, count - begin),
          left_[m].template data<char>() + Engine::left_bytes(x, begin));
    });
  }

  void pack_right(int64_t tiles) {
    parallel_tasks(tiles * int64_t(models_.size()), [&](int64_t task) {
      pack_panel(task / tiles, task % tiles);
    });
  }

  const Tiling t_;
  const std::vector<Model> models_;
  int64_t group_tiles_; // tiles whose panels are packed at the same time
  int64_t first_row_ = 0, first_tile_ = -1; // row of X and tile where the packed ones begin
  bool one_task_per_tile_; // whether one task computes a tile and packs its panels
  std::vector<Scratch> left_, right_;
  std::vector<char*> panels_; // [models][tiles]; a group uses the first group_tiles_ of a model
};

} // namespace mulki
