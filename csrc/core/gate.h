// Row-wise gates: the weights of K teachers in one row, the softmax over k of
//
//   (-a entropy_k + b log p_k[label]) / temperature
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace mulki {

struct Gate {
  double entropy, label; // a and b
  double temperature;

  // Writes w [k]. log_p(i), of the label, is called where b is not 0.
  template <typename F>
  void weights(int64_t k, const float* entropies, const F& log_p, float* w) const {
    std::array<double, 8> on_stack;
    std::vector<double> on_heap;
    double* score = on_stack.data();
    if (k > int64_t(on_stack.size())) {
      on_heap.resize(k);
      score = on_heap.data();
    }
    double max_score = -std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < k; ++i) {
      score[i] = entropy == 0 ? 0.0 : -entropy * double(entropies[i]);
      score[i] += label == 0 ? 0.0 : label * log_p(i);
      score[i] /= temperature;
      max_score = std::max(max_score, score[i]);
    }
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      score[i] = std::exp(score[i] - max_score);
      sum += score[i];
    }
    for (int64_t i = 0; i < k; ++i) {
      w[i] = float(score[i] / sum);
    }
  }
};

} // namespace mulki
