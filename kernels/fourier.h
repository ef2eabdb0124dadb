// Fourier transforms of LANES sequences at a time: every element is a vector, real and imaginary parts apart.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

// Where a sequence of vectors stands; `stride` in floats.
struct Line {
  float *re, *im;
  int64_t stride;
  Line swapped() const { return {im, re, stride}; }
};

// Transforms of n elements, unnormalised: X_k = sum x_j exp(-2 pi i jk / n), in passes of small radices (Stockham).
// The inverse is the same with real and imaginary parts swapped on both sides.
class Fourier {
 public:
  explicit Fourier(int64_t n) : n(n) {
    int64_t rest = n;
    for (int64_t radix : {8, 4, 2, 3, 5, 7})
      for (; rest % radix == 0; rest /= radix) radices.push_back(radix);
    for (int64_t radix = 11; rest > 1; radix += 2)
      for (; rest % radix == 0; rest /= radix) radices.push_back(radix);
    for (int64_t radix : radices) widest = std::max(widest, radix);
    roots.resize(2 * n);
    for (int64_t j = 0; j < n; ++j) {
      roots[2 * j] = float(std::cos(2 * M_PI * j / n));
      roots[2 * j + 1] = float(std::sin(2 * M_PI * j / n));
    }
  }

  // Floats that run() needs.
  int64_t room() const { return (4 * n + 4 * widest) * LANES; }

  void run(Line from, const Line& to, float* work) const {
    if (n == 1) {
      store(to.re, load(from.re));
      store(to.im, load(from.im));
      return;
    }
    float* second = work + 2 * n * LANES;
    const Line halves[2] = {{work, work + LANES, 2 * LANES}, {second, second + LANES, 2 * LANES}};
    float* extra = work + 4 * n * LANES;
    int64_t length = n, step = 1;
    for (size_t i = 0; i < radices.size(); ++i) {
      const Line next = i + 1 == radices.size() ? to : halves[i % 2];
      switch (radices[i]) {
        case 2: pass<2>(from, next, length, step, 2, extra); break;
        case 3: pass<3>(from, next, length, step, 3, extra); break;
        case 4: pass<4>(from, next, length, step, 4, extra); break;
        case 5: pass<5>(from, next, length, step, 5, extra); break;
        case 7: pass<7>(from, next, length, step, 7, extra); break;
        case 8: pass<8>(from, next, length, step, 8, extra); break;
        default: pass<0>(from, next, length, step, radices[i], extra);
      }
      from = next;
      length /= radices[i];
      step *= radices[i];
    }
  }

 private:
  int64_t n, widest = 1;
  std::vector<int64_t> radices;
  std::vector<float> roots;  // cosine and sine of 2 pi j / n

  template <int RADIX>
  void pass(const Line& from, const Line& to, int64_t length, int64_t step, int64_t radix, float* extra) const {
    if constexpr (RADIX) radix = RADIX;
    const int64_t parts = length / radix;
    Vec fixed[4 * (RADIX ? RADIX : 1)];
    Vec* re = RADIX ? fixed : reinterpret_cast<Vec*>(extra);
    Vec *im = re + radix, *out_re = im + radix, *out_im = out_re + radix;
    for (int64_t p = 0; p < parts; ++p)
      for (int64_t q = 0; q < step; ++q) {
#pragma GCC unroll 8
        for (int64_t j = 0; j < radix; ++j) {
          const int64_t at = (q + step * (p + parts * j)) * from.stride;
          re[j] = load(from.re + at);
          im[j] = load(from.im + at);
        }
        if constexpr (RADIX == 2 || RADIX == 4 || RADIX == 8)
          even<RADIX>(re, im, out_re, out_im);
        else
          odd<RADIX>(radix, re, im, out_re, out_im);
#pragma GCC unroll 8
        for (int64_t k = 0; k < radix; ++k) {
          const int64_t at = (q + step * (radix * p + k)) * to.stride;
          if (p && k) {  // by exp(-2 pi i pk / length)
            const float c = roots[2 * step * p * k], s = roots[2 * step * p * k + 1];
            store(to.re + at, out_re[k] * c + out_im[k] * s);
            store(to.im + at, out_im[k] * c - out_re[k] * s);
          } else {
            store(to.re + at, out_re[k]);
            store(to.im + at, out_im[k]);
          }
        }
      }
  }

  template <int RADIX>
  static inline void even(const Vec* re, const Vec* im, Vec* out_re, Vec* out_im) {
    if constexpr (RADIX == 2) {
      out_re[0] = re[0] + re[1], out_im[0] = im[0] + im[1];
      out_re[1] = re[0] - re[1], out_im[1] = im[0] - im[1];
    } else if constexpr (RADIX == 4) {
      const Vec a = re[0] + re[2], b = re[0] - re[2], c = re[1] + re[3], d = re[1] - re[3];
      const Vec e = im[0] + im[2], f = im[0] - im[2], g = im[1] + im[3], h = im[1] - im[3];
      out_re[0] = a + c, out_im[0] = e + g;
      out_re[1] = b + h, out_im[1] = f - d;
      out_re[2] = a - c, out_im[2] = e - g;
      out_re[3] = b - h, out_im[3] = f + d;
    } else {
      const Vec first_re[4] = {re[0], re[2], re[4], re[6]}, first_im[4] = {im[0], im[2], im[4], im[6]};
      const Vec second_re[4] = {re[1], re[3], re[5], re[7]}, second_im[4] = {im[1], im[3], im[5], im[7]};
      Vec a[4], b[4], c[4], d[4];
      even<4>(first_re, first_im, a, b);
      even<4>(second_re, second_im, c, d);
      constexpr float half = 0.70710678118654752f;
      const Vec turned_re[4] = {c[0], (c[1] + d[1]) * half, d[2], (d[3] - c[3]) * half};
      const Vec turned_im[4] = {d[0], (d[1] - c[1]) * half, -c[2], (c[3] + d[3]) * -half};
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        out_re[k] = a[k] + turned_re[k], out_im[k] = b[k] + turned_im[k];
        out_re[k + 4] = a[k] - turned_re[k], out_im[k + 4] = b[k] - turned_im[k];
      }
    }
  }

  // Sums and differences of x_j and x_(radix - j) go with cosines and sines alone. Overwrites its input.
  template <int RADIX>
  inline void odd(int64_t radix, Vec* re, Vec* im, Vec* out_re, Vec* out_im) const {
    if constexpr (RADIX) radix = RADIX;
    const int64_t half = radix / 2, turn = n / radix;
    Vec sum_re = re[0], sum_im = im[0];
#pragma GCC unroll 3
    for (int64_t j = 1; j <= half; ++j) {
      const Vec a = re[j] + re[radix - j], b = im[j] + im[radix - j];
      re[radix - j] = re[j] - re[radix - j], im[radix - j] = im[j] - im[radix - j];
      re[j] = a, im[j] = b;
      sum_re += a, sum_im += b;
    }
    out_re[0] = sum_re, out_im[0] = sum_im;
#pragma GCC unroll 3
    for (int64_t k = 1; k <= half; ++k) {
      Vec a = re[0], b = im[0], c = {}, d = {};
#pragma GCC unroll 3
      for (int64_t j = 1; j <= half; ++j) {
        const float cosine = roots[2 * turn * (j * k % radix)], sine = roots[2 * turn * (j * k % radix) + 1];
        a += re[j] * cosine, b += im[j] * cosine;
        c += re[radix - j] * sine, d += im[radix - j] * sine;
      }
      out_re[k] = a + d, out_im[k] = b - c;
      out_re[radix - k] = a - d, out_im[radix - k] = b + c;
    }
  }
};
