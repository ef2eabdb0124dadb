// The softmax of a row.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vectors.h"

// Turns a row of logits into probabilities; `kept` becomes the greatest logit and the inverse of the sum.
inline void softmax(float* row, const float* bias, int64_t count, float* kept) {
  float maximum = -INFINITY;
  int64_t c = 0;
  for (; bias && c < count; ++c) row[c] += bias[c];
  Vec highest = Vec{} - INFINITY;
  for (c = 0; c + LANES <= count; c += LANES) {
    const Vec v = load(row + c);
    highest = v > highest ? v : highest;
  }
  for (; c < count; ++c) maximum = std::max(maximum, row[c]);
  for (int l = 0; l < LANES; ++l) maximum = std::max(maximum, highest[l]);
  Vec sums = {};
  for (c = 0; c + LANES <= count; c += LANES) {
    const Vec e = exp_negative(load(row + c) - maximum);
    store(row + c, e);
    sums += e;
  }
  float sum = total(sums);
  for (; c < count; ++c) sum += row[c] = std::exp(row[c] - maximum);
  kept[0] = maximum;
  kept[1] = 1.f / sum;
  for (c = 0; c < count; ++c) row[c] *= kept[1];
}
