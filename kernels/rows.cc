// Operators over rows of channels, float32 [rows, columns]: bias, layer normalisation, GELU, and their gradients.
//
// Paddle's run on one thread, and its sums over the rows (the gradients of a bias or of a scale) take ten times
// as long as reading the rows. Here the rows are shared out in slices that depend on the shape alone; each slice
// has its own sums, which are added in order, so that the number of threads changes no bit.

#include <cmath>
#include <cstdint>

#include "activations.h"
#include "slices.h"
#include "vectors.h"

namespace {

// Mean and 1 / sqrt(variance + epsilon) of a row.
void moments(const float* row, int64_t columns, float epsilon, float& mean, float& scale) {
  Vec sum = {};
  for_vectors(columns, [&](int64_t c, auto get, auto) { sum += get(row + c); });
  mean = total(sum) / columns;
  Vec squares = {};
  int64_t c = 0;
  for (; c + LANES <= columns; c += LANES) {
    const Vec distance = load(row + c) - mean;
    squares += distance * distance;
  }
  float variance = total(squares);
  for (; c < columns; ++c) variance += (row[c] - mean) * (row[c] - mean);
  scale = 1.f / std::sqrt(variance / columns + epsilon);
}

}  // namespace

// y = gelu(x), by the normal distribution function (not the tanh approximation).
extern "C" int gelu_forward(int64_t size, const float* x, float* y) {
  for_all(size, [=](int64_t i, auto get, auto put) { put(y + i, Gelu::value(get(x + i))); });
  return 0;
}

extern "C" int gelu_backward(int64_t size, const float* x, const float* grad, float* grad_x) {
  for_all(size, [=](int64_t i, auto get, auto put) { put(grad_x + i, get(grad + i) * Gelu::slope(get(x + i))); });
  return 0;
}

// y += bias, [columns] on every row.
extern "C" int bias_forward(int64_t rows, int64_t columns, const float* bias, float* y) {
  for_slices(rows, columns, [=](int64_t, int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      float* row = y + r * columns;
      for_vectors(columns, [=](int64_t c, auto get, auto put) { put(row + c, get(row + c) + get(bias + c)); });
    }
  });
  return 0;
}

extern "C" int bias_backward(int64_t rows, int64_t columns, const float* grad, float* grad_bias) {
  return guarded([=] {
    Sums sums(rows, columns, 1);
    for_slices(rows, columns, [&](int64_t slice, int64_t from, int64_t to) {
      float* sum = sums.at(slice, 0);
      for (int64_t r = from; r < to; ++r) {
        const float* row = grad + r * columns;
        for_vectors(columns, [=](int64_t c, auto get, auto put) { put(sum + c, get(sum + c) + get(row + c)); });
      }
    });
    sums.write(0, grad_bias);
  });
}

extern "C" int norm_forward(int64_t rows, int64_t columns, float epsilon, const float* x, const float* weight,
                            const float* bias, float* y) {
  for_slices(rows, columns, [=](int64_t, int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      const float* row = x + r * columns;
      float mean, scale;
      moments(row, columns, epsilon, mean, scale);
      for_vectors(columns, [&](int64_t c, auto get, auto put) {
        put(y + r * columns + c, (get(row + c) - mean) * scale * get(weight + c) + get(bias + c));
      });
    }
  });
  return 0;
}

extern "C" int norm_backward(int64_t rows, int64_t columns, float epsilon, const float* x, const float* weight,
                             const float* grad, float* grad_x, float* grad_weight, float* grad_bias) {
  return guarded([=] {
    Sums sums(rows, columns, 2);
    for_slices(rows, columns, [&](int64_t slice, int64_t from, int64_t to) {
      float *weight_sum = sums.at(slice, 0), *bias_sum = sums.at(slice, 1);
      for (int64_t r = from; r < to; ++r) {
        const float *row = x + r * columns, *g = grad + r * columns;
        float mean, scale;
        moments(row, columns, epsilon, mean, scale);
        Vec flat = {}, along = {};
        for_vectors(columns, [&](int64_t c, auto get, auto put) {
          const Vec normed = (get(row + c) - mean) * scale, weighted = get(g + c) * get(weight + c);
          put(weight_sum + c, get(weight_sum + c) + get(g + c) * normed);
          put(bias_sum + c, get(bias_sum + c) + get(g + c));
          flat += weighted;
          along += weighted * normed;
        });
        const float flat_mean = total(flat) / columns, along_mean = total(along) / columns;
        for_vectors(columns, [&](int64_t c, auto get, auto put) {
          const Vec normed = (get(row + c) - mean) * scale;
          put(grad_x + r * columns + c, (get(g + c) * get(weight + c) - flat_mean - normed * along_mean) * scale);
        });
      }
    });
    sums.write(0, grad_weight);
    sums.write(1, grad_bias);
  });
}
