// What a layer norm needs of a row.

#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.h"

// Mean and 1 / sqrt(variance + epsilon) of a row.
inline void moments(const float* row, int64_t columns, float epsilon, float& mean, float& scale) {
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
