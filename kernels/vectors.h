// Vectors of LANES floats, and what the operators share.

#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float VecU __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }

typedef int32_t IVec __attribute__((vector_size(LANES * 4)));

// The first `count` < LANES numbers; the others are 0, and not touched in memory.
static inline Vec load_part(const float* p, int count) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
#else
  Vec v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
#endif
}
static inline void store_part(float* p, Vec v, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
#else
  std::memcpy(p, &v, count * sizeof(float));
#endif
}
static inline Vec first_lanes(Vec v, int count) {
  float kept[LANES];
  store(kept, v);
  return load_part(kept, count);
}

// Calls body(column, get, put) for each vector of a row; the last is filled up with zeros where it is incomplete.
template <class Body>
inline void for_vectors(int64_t columns, Body body) {
  int64_t c = 0;
  for (; c + LANES <= columns; c += LANES)
    body(c, [](const float* p) { return load(p); }, [](float* p, Vec v) { store(p, v); });
  if (const int rest = int(columns - c))
    body(c, [rest](const float* p) { return load_part(p, rest); }, [rest](float* p, Vec v) { store_part(p, v, rest); });
}

inline float total(Vec v) {
  float sum = 0;
  for (int l = 0; l < LANES; ++l) sum += v[l];
  return sum;
}

// The same, of halves.
inline float tree_total(Vec v) {
  float sums[LANES];
  store(sums, v);
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  return sums[0];
}

// exp(v) for v <= 0; 0 below -87, where float32 comes to its end.
inline Vec exp_negative(Vec v) {
  const Vec bounded = v < -87.f ? Vec{} - 87.f : v;
  const Vec shifted = bounded * 1.44269504f + 12582912.f;  // + 1.5 * 2^23: the last bits are the rounded number
  const Vec n = shifted - 12582912.f;
  const Vec r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // minus n ln 2, in two parts
  Vec p = r * (1.f / 5040) + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  p *= (Vec)(((IVec)shifted + 127) << 23);
  return v < -87.f ? Vec{} : p;
}

// `count` places on their way to the first cache, to be written unless they are const: no prefetcher follows wide steps.
template <class Number>
inline void fetch(Number* p, int64_t count, int64_t step) {
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(p + i * step, !std::is_const<Number>());
}

// Scratch memory that a thread keeps between calls, aligned to cache lines; an operator that others call has its own.
template <class Owner = void>
inline float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  static thread_local std::unique_ptr<float[], Free> memory;
  static thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t(64))));
    size = floats;
  }
  return memory.get();
}
