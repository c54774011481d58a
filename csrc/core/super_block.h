// The float matrices of a super-block of rows, [matrices][tiles][rows][width], and who owns their
// memory when:
//
//   matrix                 values                                      operands
//   0, of the student      its products; then G, row by row            strips of G: StripOfG alone
//   1 .., of the teachers  their products, until G is complete         afterwards
//   beyond the models      never                                       always
//
// `values` are what the loss reads and writes. `operands` are what Gradients multiplies: packed
// copies of G (gradients.h).
#pragma once

#include "common/scratch.h"
#include "core/tiling.h"

namespace mulki {

class SuperBlock {
 public:
  // The loss owns the values until G is complete; then the operands replace those of the teachers,
  // until the next super-block begins.
  enum class Phase { kValues, kComplete };

  SuperBlock(const Tiling& t, int64_t models, int64_t matrices)
      : t_(t), models_(models), memory_(matrices * matrix() * int64_t(sizeof(float))) {}

  void enter(Phase phase) {
    phase_ = phase;
  }

  // Row `row` of the super-block in a tile.
  float* values(int64_t model, int64_t tile, int64_t row) const {
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(
        model == 0 || (model < models_ && phase_ == Phase::kValues), model);
    return memory_.data<float>() + model * matrix() + (tile * t_.rows + row) * t_.width;
  }

  template <typename T>
  T* operands(int64_t matrix_index) const {
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(
        matrix_index >= models_ || (matrix_index > 0 && phase_ == Phase::kComplete), matrix_index);
    return reinterpret_cast<T*>(memory_.data<float>() + matrix_index * matrix());
  }

 private:
  int64_t matrix() const { // elements
    return t_.tiles * t_.rows * t_.width;
  }

  const Tiling t_;
  const int64_t models_;
  Phase phase_ = Phase::kValues;
  Scratch memory_;
};

} // namespace mulki
