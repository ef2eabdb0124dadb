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

// All of them are 0 at 0.
struct Identity {
  static Vec value(Vec x) { return x; }
  static Vec slope(Vec) { return Vec{} + 1.f; }
  static void both(Vec x, Vec& value, Vec& slope) { value = x, slope = Vec{} + 1.f; }
};

struct Gelu {
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

// GELU for results that are rounded to bfloat16, half as many instructions: 2e-5 |x| off, its slope 7e-5. The normal
// distribution function and the slope are 1/2 + x p(x^2) within 4.5, with polynomials fitted to be 0 and 1 beyond.
struct RoundedGelu {
  static Vec value(Vec x) { return x * (0.5f + bounded(x) * distribution(position(x))); }
  static Vec slope(Vec x) {
    const Vec u = position(x);
    Vec p = u * -0.0273559086f + 0.0581190207f;
    p = p * u - 0.0409986747f;
    p = p * u + 0.0442979856f;
    p = p * u - 0.0901808351f;
    p = p * u + 0.106698324f;
    p = p * u - 0.0949167467f;
    p = p * u + 0.0859400168f;
    p = p * u - 0.0899431954f;
    p = p * u + 0.159451124f;
    return 0.5f + bounded(x) * p;
  }
  static void both(Vec x, Vec& y, Vec& rise) { y = value(x), rise = slope(x); }

 private:
  static Vec bounded(Vec x) {
    const Vec most = Vec{} + 4.5f, positive = x > most ? most : x;
    return positive < -most ? -most : positive;
  }
  static Vec position(Vec x) { return bounded(x) * bounded(x) * (2.f / 20.25f) - 1.f; }  // from -1 to 1
  static Vec distribution(Vec u) {
    Vec p = u * 0.00412152111f - 0.0100396247f;
    p = p * u + 0.0111252635f;
    p = p * u - 0.0157871201f;
    p = p * u + 0.0280692391f;
    p = p * u - 0.040908412f;
    p = p * u + 0.0547688183f;
    p = p * u - 0.0771413389f;
    return p * u + 0.156902765f;
  }
};

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
