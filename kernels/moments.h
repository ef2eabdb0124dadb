// What a norm needs of rows, and of images as a whole.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "slices.h"
#include "vectors.h"

inline void mean_and_variance(const float* row, int64_t columns, float& mean, float& variance) {
  Vec sum = {};
  for_vectors(columns, [&](int64_t c, auto get, auto) { sum += get(row + c); });
  mean = total(sum) / columns;
  Vec squares = {};
  int64_t c = 0;
  for (; c + LANES <= columns; c += LANES) {
    const Vec distance = load(row + c) - mean;
    squares += distance * distance;
  }
  variance = total(squares);
  for (; c < columns; ++c) variance += (row[c] - mean) * (row[c] - mean);
  variance /= columns;
}

// Mean and 1 / sqrt(variance + epsilon) of a row.
inline void moments(const float* row, int64_t columns, float epsilon, float& mean, float& scale) {
  float variance;
  mean_and_variance(row, columns, mean, variance);
  scale = 1.f / std::sqrt(variance + epsilon);
}

// The norm of images as a whole, of rows of columns.
struct ImageNorm {
  int64_t images, positions, columns;
  struct Moments {
    float mean, scale;
  };
  std::vector<Moments> moments;

  static constexpr int64_t PARTS = 8;  // of an image

  // Calls body(part, first row, end) for each part of each image.
  template <class Body>
  void for_parts(Body body) const {
    for_tasks(images * PARTS, images * positions * columns > SERIAL_FLOATS, [&](int64_t part) {
      const int64_t start = part / PARTS * positions, of = part % PARTS;
      body(part, start + positions * of / PARTS, start + positions * (of + 1) / PARTS);
    });
  }

  // One pass over pieces that stay in the first cache: the variance is that within them and that between them.
  ImageNorm(const float* x, int64_t images, int64_t positions, int64_t columns, float epsilon)
      : images(images), positions(positions), columns(columns), moments(images) {
    constexpr int64_t PIECE = 2048;
    std::vector<double> sums(images * PARTS), squares(images * PARTS);
    for_parts([&](int64_t part, int64_t from, int64_t to) {
      for (int64_t at = from * columns; at < to * columns; at += PIECE) {
        const int64_t count = std::min(PIECE, to * columns - at);
        float mean, variance;
        mean_and_variance(x + at, count, mean, variance);
        sums[part] += count * double(mean), squares[part] += count * (variance + double(mean) * mean);
      }
    });
    for (int64_t image = 0; image < images; ++image) {
      double mean = 0, square = 0;
      for (int64_t part = image * PARTS; part < (image + 1) * PARTS; ++part)
        mean += sums[part], square += squares[part];
      const double count = double(positions) * columns;
      mean /= count;
      moments[image] = {float(mean), float(1 / std::sqrt(std::max(square / count - mean * mean, 0.0) + epsilon))};
    }
  }

  // Adds to the gradient of x what comes through the moments: `flat` and `along` are sums over an image's rows of the
  // means of the gradient of (x - mean) scale, and of its products with that.
  void close(const float* x, const std::vector<double>& flat, const std::vector<double>& along, float* grad_x) const {
    for_parts([&](int64_t part, int64_t from, int64_t to) {
      const int64_t image = part / PARTS;
      const float mean = moments[image].mean, scale = moments[image].scale;
      const float slope = float(along[image] / positions) * scale * scale,
                  rest = float(flat[image] / positions) * scale;
      for_vectors((to - from) * columns, [=, start = from * columns](int64_t i, auto get, auto put) {
        const int64_t at = start + i;
        put(grad_x + at, get(grad_x + at) - ((get(x + at) - mean) * slope + rest));
      });
    });
  }
};
