// Planes of channels as vectors: LANES channels side by side, one vector a pixel.

#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IVec{__VA_ARGS__})
#endif
#if LANES == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif

// Transposes a LANES x LANES tile: log2(LANES) perfect shuffles of its rows.
static inline void transpose(Vec (&a)[LANES]) {
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
    Vec t[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES / 2; ++i) {
      t[2 * i] = SHUFFLE(a[i], a[i + LANES / 2], LOW);
      t[2 * i + 1] = SHUFFLE(a[i], a[i + LANES / 2], HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) a[i] = t[i];
  }
}

// `count` pixels of planes (stride `plane`) -> one vector a pixel, at position[i] of the scratch plane; each plane
// goes into `copies` neighbouring lanes, `lanes` in all.
static inline void planes_to_lanes(const float* src, int64_t plane, int lanes, int copies, int64_t count,
                                   const int32_t* position, float* dst) {
  int64_t offset[LANES];
  for (int l = 0; l < LANES; ++l) offset[l] = std::min(l, lanes - 1) / copies * plane;
  if (count < LANES) {
    for (int64_t i = 0; i < count; ++i)
      for (int l = 0; l < LANES; ++l) dst[int64_t(position[i]) * LANES + l] = src[offset[l] + i];
    return;
  }
  for (int64_t i = 0; i < count; i += LANES) {
    i = std::min(i, count - LANES);  // the last tile overlaps the one before
    Vec tile[LANES];
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) tile[l] = load(src + offset[l] + i);
    transpose(tile);
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) store(dst + int64_t(position[i + l]) * LANES, tile[l]);
  }
}

// The way back, from `count` consecutive vectors.
static inline void lanes_to_planes(const float* src, int64_t plane, int lanes, int64_t count, float* dst) {
  if (count < LANES) {
    for (int64_t i = 0; i < count; ++i)
      for (int l = 0; l < lanes; ++l) dst[l * plane + i] = src[i * LANES + l];
    return;
  }
  for (int64_t i = 0; i < count; i += LANES) {
    i = std::min(i, count - LANES);
    Vec tile[LANES];
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) tile[l] = load(src + (i + l) * LANES);
    transpose(tile);
    for (int l = 0; l < lanes; ++l) store(dst + l * plane + i, tile[l]);
  }
}
