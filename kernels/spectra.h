// Spectra of the rows of channels-last maps, LANES channels at a time. Two rows of real numbers are one complex row;
// their spectra are its even and odd parts.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fourier.h"
#include "vectors.h"

struct Maps {
  int64_t batch, height, width, channels, planes;
  int64_t bins, blocks;
  Fourier rows, columns;
  Maps(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t planes)
      : batch(batch),
        height(height),
        width(width),
        channels(channels),
        planes(planes),
        bins(width / 2 + 1),
        blocks((channels + LANES - 1) / LANES),
        rows(width),
        columns(height) {}
  int lanes(int64_t block) const { return int(std::min<int64_t>(LANES, channels - block * LANES)); }
  int64_t at(int64_t image, int64_t block) const { return image * height * width * channels + block * LANES; }
  // Of a half spectrum, [height][bins] of a real and an imaginary vector.
  int64_t spectrum() const { return height * bins * 2 * LANES; }
  Line column(float* spectrum, int64_t w) const {
    float* p = spectrum + w * 2 * LANES;
    return {p, p + LANES, bins * 2 * LANES};
  }
  int64_t work() const { return std::max(rows.room(), columns.room()) + 4 * width * LANES; }
};

inline Vec load_some(const float* p, int lanes) {
  if (lanes == LANES) return load(p);
  Vec v = {};
  std::memcpy(&v, p, lanes * sizeof(float));
  return v;
}

inline void store_some(float* p, Vec v, int lanes) {
  if (lanes == LANES)
    store(p, v);
  else
    std::memcpy(p, &v, lanes * sizeof(float));
}

// Spectra of the rows of an image, twice too large; columns are not transformed yet.
inline void transform_rows(const Maps& m, const float* x, int lanes, float* spectrum, float* work) {
  float *pair = work, *room = work + 4 * m.width * LANES;
  float* other = pair + 2 * m.width * LANES;
  const Line both{other, other + LANES, 2 * LANES};
  for (int64_t h = 0; h < m.height; h += 2) {
    const float* row = x + h * m.width * m.channels;
    const bool alone = h + 1 == m.height;
    fetch(row + 2 * m.width * m.channels, 2 * m.width, m.channels);
    Line from{const_cast<float*>(row), const_cast<float*>(row) + m.width * m.channels, m.channels};
    if (alone || lanes < LANES) {
      for (int64_t w = 0; w < m.width; ++w) {
        store(pair + 2 * w * LANES, load_some(from.re + w * m.channels, lanes));
        store(pair + (2 * w + 1) * LANES, alone ? Vec{} : load_some(from.im + w * m.channels, lanes));
      }
      from = {pair, pair + LANES, 2 * LANES};
    }
    m.rows.run(from, both, room);
    float *a = spectrum + h * m.bins * 2 * LANES, *b = alone ? pair : a + m.bins * 2 * LANES;
    for (int64_t w = 0; w < m.bins; ++w) {
      const float *p = other + 2 * w * LANES, *q = other + 2 * (w ? m.width - w : 0) * LANES;
      const Vec p_re = load(p), p_im = load(p + LANES), q_re = load(q), q_im = load(q + LANES);
      store(a + 2 * w * LANES, p_re + q_re);
      store(a + (2 * w + 1) * LANES, p_im - q_im);
      store(b + 2 * w * LANES, p_im + q_im);
      store(b + (2 * w + 1) * LANES, q_re - p_re);
    }
  }
}

// The way back, from spectra of rows; imaginary parts of the first column (and the last of even widths) do not count.
inline void restore_rows(const Maps& m, const float* spectrum, int lanes, float* y, float* work) {
  float *pair = work, *room = work + 4 * m.width * LANES;
  float* other = pair + 2 * m.width * LANES;
  const Line both{pair, pair + LANES, 2 * LANES};
  for (int64_t h = 0; h < m.height; h += 2) {
    const bool alone = h + 1 == m.height;
    const float *a = spectrum + h * m.bins * 2 * LANES, *b = a + m.bins * 2 * LANES;
    for (int64_t w = 0; w < m.bins; ++w) {
      const bool real = w == 0 || 2 * w == m.width;
      const Vec a_re = load(a + 2 * w * LANES), a_im = real ? Vec{} : load(a + (2 * w + 1) * LANES);
      const Vec b_re = alone ? Vec{} : load(b + 2 * w * LANES);
      const Vec b_im = alone || real ? Vec{} : load(b + (2 * w + 1) * LANES);
      float *p = pair + 2 * w * LANES, *q = pair + 2 * (w ? m.width - w : 0) * LANES;
      store(q, a_re + b_im);
      store(q + LANES, b_re - a_im);
      store(p, a_re - b_im);
      store(p + LANES, a_im + b_re);
    }
    float* row = y + h * m.width * m.channels;
    fetch(row + 2 * m.width * m.channels, 2 * m.width, m.channels);
    Line to{row, row + m.width * m.channels, m.channels};
    const bool through = alone || lanes < LANES;
    if (through) to = {other, other + LANES, 2 * LANES};
    m.rows.run(both.swapped(), to.swapped(), room);
    for (int64_t w = 0; through && w < m.width; ++w) {
      store_some(row + w * m.channels, load(to.re + w * to.stride), lanes);
      if (!alone) store_some(row + (m.width + w) * m.channels, load(to.im + w * to.stride), lanes);
    }
  }
}
