// Y = X W^T of one or more models, a super-block of rows at a time, tile by tile.
//
// W^T is packed once if all of it fits, with the matrices and the packed rows of a super-block, into the engine's
// kScratch bytes, else group by group of tiles for every super-block anew. Groups come in turns forwards and
// backwards: the last one of a super-block is the first one of the next, and is there already.
//
// With only one super-block no panel is used twice. There a task takes all of a tile, and packs its panels first, if
// that keeps all threads busy and the panels stay in a core's own cache, where the next tile's replace them.
#pragma once

#include "gradients.h"

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

  // `wanted` is the number of tiles that are asked for in `run` or `run_stored`.
  Logits(const Tiling& tiling, std::vector<Model> models, int64_t wanted)
      : t_(tiling), models_(std::move(models)) {
    int64_t of_tile = 0, of_rows = 0;
    for (const Model& m : models_) {
      of_tile += Engine::right_bytes(t_.width, m.x->padded);
      of_rows += Engine::left_bytes(*m.x, t_.rows);
    }
    const int64_t left_over = Engine::kScratch - t_.bytes - of_rows;
    group_ = std::clamp<int64_t>(left_over / std::max<int64_t>(of_tile, 1), 1, t_.tiles);
    alone_ = Engine::kPacksAlone && t_.n <= t_.rows && of_tile <= kOwnCache &&
        divide(wanted, threads_here());
    panels_.resize(models_.size() * t_.tiles);
    for (int64_t m = 0; m < int64_t(models_.size()); ++m) {
      const int64_t bytes = Engine::right_bytes(t_.width, models_[m].x->padded);
      left_.emplace_back(Engine::left_bytes(*models_[m].x, t_.rows));
      right_.emplace_back(alone_ ? 0 : group_ * bytes);
      for (int64_t slot = 0; slot < group_ && !alone_; ++slot) {
        panels_[m * t_.tiles + slot] = right_[m].template data<char>() + slot * bytes;
      }
    }
  }

  // Calls step(tile, begin, end) for blocks of rows of the super-block of `count` rows from `first`
  // on, in each tile that `wanted(tile)`; it gets the products by `multiply`.
  template <typename Wanted, typename Step>
  void run(int64_t first, int64_t count, const Wanted& wanted, const Step& step) {
    run_groups(first, count, [&](int64_t tiles) {
      each_block(0, int64_t(models_.size()), count, tiles, wanted, step);
    });
  }

  // Stores the products at where(model, tile, begin), and calls step(model, tile, begin, end) for every block of
  // every model, after those of the models before it. If the operands of all models leave no room in a
  // core's own cache, one model comes after the other.
  template <typename Wanted, typename Where, typename Step>
  void run_stored(
      int64_t first, int64_t count, const Wanted& wanted, const Where& where, const Step& step) {
    const int64_t models = int64_t(models_.size());
    const bool apart = models > 1 && operands() > kOwnCache;
    const int64_t together = apart ? 1 : models;
    run_groups(first, count, [&](int64_t tiles) {
      for (int64_t from = 0; from < models; from += together) {
        const auto block = [&](int64_t tile, int64_t begin, int64_t end) {
          for (int64_t m = from; m < from + together; ++m) {
            multiply(m, tile, begin, end, where(m, tile, begin));
            step(m, tile, begin, end);
          }
        };
        each_block(from, from + together, count, tiles, wanted, block);
      }
    });
  }

  // out [rows, width], with room for a multiple of 32 rows.
  void multiply(int64_t model, int64_t tile, int64_t begin, int64_t end, float* out) const {
    const Model& m = models_[model];
    const int64_t slot = tile - from_;
    Engine::multiply(
        *m.x, first_ + begin, end - begin, left_[model].template data<char>(), begin,
        panel(model, slot), t_.valid(tile), t_.width,
        !alone_ && slot + 1 < group_ ? panel(model, slot + 1) : nullptr, out);
  }

 private:
  static constexpr int64_t kOwnCache = int64_t(1) << 20; // half of it

  // Bytes of a super-block's rows and of one tile's panels.
  int64_t operands() const {
    int64_t bytes = 0;
    for (const Model& m : models_) {
      bytes += Engine::right_bytes(t_.rows + t_.width, m.x->padded);
    }
    return bytes;
  }

  template <typename Run>
  void run_groups(int64_t first, int64_t count, const Run& run) {
    first_ = first;
    pack_left(count);
    if (alone_) {
      from_ = 0;
      run(t_.tiles);
      return;
    }
    const int64_t groups = (t_.tiles + group_ - 1) / group_;
    const bool backwards = first / t_.rows % 2 == 1;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t from = (backwards ? groups - 1 - g : g) * group_;
      const int64_t tiles = std::min(group_, t_.tiles - from);
      if (from != from_) {
        from_ = from;
        pack_right(tiles);
      }
      run(tiles);
    }
  }

  // The panels of models [low, high) are needed.
  template <typename Wanted, typename Step>
  void each_block(
      int64_t low,
      int64_t high,
      int64_t count,
      int64_t tiles,
      const Wanted& wanted,
      const Step& step) {
    if (alone_) {
      parallel_tasks<Engine>(tiles, [&](int64_t tile) {
        if (!wanted(tile)) {
          return;
        }
        std::vector<Scratch> own;
        for (int64_t m = low; m < high; ++m) {
          own.emplace_back(Engine::right_bytes(t_.width, models_[m].x->padded));
          panels_[m * t_.tiles + tile] = own.back().template data<char>();
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
      const int64_t tile = from_ + task / blocks, begin = task % blocks * t_.block;
      if (wanted(tile)) {
        step(tile, begin, begin + std::min(t_.block, count - begin));
      }
    });
  }

  // Whether so many threads get almost the same number of tiles each.
  static bool divide(int64_t tiles, int64_t threads) {
    const int64_t most = (tiles + threads - 1) / threads;
    return most * threads * 16 <= tiles * 17;
  }

  char* panel(int64_t model, int64_t slot) const {
    return panels_[model * t_.tiles + slot];
  }

  void pack_panel(int64_t model, int64_t slot) {
    Engine::pack_right(*models_[model].w, (from_ + slot) * t_.width, t_.width, panel(model, slot));
  }

  void pack_left(int64_t count) {
    std::vector<int64_t> packed; // the models whose rows are
    for (int64_t m = 0; m < int64_t(models_.size()); ++m) {
      if (Engine::left_bytes(*models_[m].x, 32) > 0) {
        packed.push_back(m);
      }
    }
    const int64_t strips = (count + 31) / 32;
    parallel_each(strips * int64_t(packed.size()), [&](int64_t task) {
      const int64_t m = packed[task / strips], begin = task % strips * 32;
      const Operand& x = *models_[m].x;
      Engine::pack_left(
          x, first_ + begin, std::min<int64_t>(32, count - begin),
          left_[m].template data<char>() + Engine::left_bytes(x, begin));
    });
  }

  void pack_right(int64_t tiles) {
    parallel_each(tiles * int64_t(models_.size()), [&](int64_t task) {
      pack_panel(task / tiles, task % tiles);
    });
  }

  const Tiling t_;
  const std::vector<Model> models_;
  int64_t group_; // tiles whose panels are there at a time
  int64_t first_ = 0, from_ = -1; // row of X and tile where the packed ones begin
  bool alone_; // whether a tile's task packs its panels
  std::vector<Scratch> left_, right_;
  std::vector<char*> panels_; // [models][tiles], of which a group takes the first
};

} // namespace mulki
