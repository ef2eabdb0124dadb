// Activation functions of vectors: what each gives, and its slope.

#pragma once

#include "vectors.h"

// The normal distribution function, and exp(-x^2 / 2). Its tail is that exponential times a polynomial in
// 1 / (1 + 0.29 |x|) fitted to erfc for |x| <= 14: at most 1.3e-9 off, 2e-6 relative to the tail.
inline void normal(Vec x, Vec& distribution, Vec& density) {
  const Vec size = x < 0.f ? -x : x;
  density = exp_negative(size * size * -0.5f);
  const Vec t = 1.f / (1.f + size * 0.29f);
  Vec p = t * 0.037257274f - 0.182033013f;
  p = p * t + 0.282281618f;
  p = p * t - 0.122246242f;
  p = p * t + 0.164664214f;
  p = p * t + 0.086104355f;
  p = p * t + 0.118436094f;
  p = p * t + 0.115535701f;
  const Vec tail = density * t * p;
  distribution = x < 0.f ? tail : 1.f - tail;
}

#if defined(__AVX512F__)
// The same to 2e-4, for results that are rounded to bfloat16, whose steps are 20 times as large: polynomials fitted to
// 2^r for |r| <= 1/2, and to the tail for |x| <= 5.5.
inline void rounded_normal(Vec x, Vec& distribution, Vec& density) {
  const Vec size = (Vec)_mm512_min_ps(_mm512_abs_ps((__m512)x), _mm512_set1_ps(13.f));
  const Vec power = size * size * -0.72134752f, whole = (Vec)_mm512_roundscale_ps((__m512)power, 0), r = power - whole;
  const Vec p = ((r * 0.05517003f + 0.2426095f) * r + 0.69326108f) * r + 0.99992819f;
  density = (Vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
  const Vec t = (Vec)_mm512_rcp14_ps((__m512)(size * 0.46f + 1.f));
  const Vec q = ((t * -0.11858664f + 0.29278596f) * t + 0.13717332f) * t + 0.18867537f;
  const Vec tail = density * t * q;
  distribution = x < 0.f ? tail : 1.f - tail;
}
#endif

// All of them are 0 at 0.
struct Identity {
  static Vec value(Vec x) { return x; }
  static Vec slope(Vec) { return Vec{} + 1.f; }
  static void both(Vec x, Vec& value, Vec& slope) { value = x, slope = Vec{} + 1.f; }
};

// GELU by a function that gives the normal distribution and exp(-x^2 / 2).
template <void normal(Vec, Vec&, Vec&)>
struct GeluOf {
  static Vec value(Vec x) {
    Vec distribution, density;
    normal(x, distribution, density);
    return x * distribution;
  }
  static Vec slope(Vec x) {
    Vec y, slope;
    both(x, y, slope);
    return slope;
  }
  static void both(Vec x, Vec& value, Vec& slope) {
    Vec distribution, density;
    normal(x, distribution, density);
    value = x * distribution;
    slope = distribution + x * density * 0.398942280f;
  }
};
using Gelu = GeluOf<normal>;
#if defined(__AVX512F__)
using RoundedGelu = GeluOf<rounded_normal>;
#endif

// min(max(x, 0), LIMIT); no limit where that is 0.
template <int LIMIT>
struct ClippedRelu {
  static Vec value(Vec x) {
    const Vec limit = Vec{} + float(LIMIT), positive = x > 0.f ? x : Vec{};
    return LIMIT ? positive < limit ? positive : limit : positive;
  }
  static Vec slope(Vec x) {
    const Vec zero = {}, one = zero + 1.f, rising = x > 0.f ? one : zero;
    return LIMIT ? x < float(LIMIT) ? rising : zero : rising;
  }
  static void both(Vec x, Vec& y, Vec& rise) { y = value(x), rise = slope(x); }
};

// x min(max(x + 3, 0), 6) / 6.
struct Hardswish {
  static Vec value(Vec x) { return x * ClippedRelu<6>::value(x + 3.f) * (1.f / 6); }
  static Vec slope(Vec x) {
    const Vec zero = {}, inner = (2.f * x + 3.f) * (1.f / 6);
    return x > -3.f ? x < 3.f ? inner : zero + 1.f : zero;
  }
  static void both(Vec x, Vec& y, Vec& rise) { y = value(x), rise = slope(x); }
};
