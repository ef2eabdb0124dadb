// Operators over the planes of maps, float32: dynamic ReLU, [planes, plane], its gradient, and the channel shuffle.
//
// Paddle has no dynamic ReLU: two products with broadcast slopes and a maximum read and write the map many times. Its
// shuffle runs on one thread.
// Here a plane belongs to one thread, so that the number of threads changes no bit.

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int64_t SERIAL_FLOATS = 1 << 16;  // below this threads cost more than they give

// out[i] = body(reader of element i) over a plane.
template <class Body>
inline void map_plane(int64_t plane, float* out, Body body) {
  int64_t i = 0;
  for (; i + LANES <= plane; i += LANES) store(out + i, body([i](const float* p) { return load(p + i); }));
  for (; i < plane; ++i) out[i] = body([i](const float* p) { return p[i]; });
}

}  // namespace

// y = max(first x, second x), with two slopes for each plane.
extern "C" int dynamic_relu_forward(int64_t planes, int64_t plane, const float* x, const float* first,
                                    const float* second, float* y) {
#pragma omp parallel for schedule(static) if (planes * plane > SERIAL_FLOATS)
  for (int64_t i = 0; i < planes; ++i)
    map_plane(plane, y + i * plane, [p = x + i * plane, a = first[i], b = second[i]](auto get) {
      const auto u = get(p) * a, v = get(p) * b;
      return u > v ? u : v;
    });
  return 0;
}

extern "C" int dynamic_relu_backward(int64_t planes, int64_t plane, const float* x, const float* first,
                                     const float* second, const float* grad, float* grad_x, float* grad_first,
                                     float* grad_second) {
#pragma omp parallel for schedule(static) if (planes * plane > SERIAL_FLOATS)
  for (int64_t i = 0; i < planes; ++i) {
    const float *p = x + i * plane, *g = grad + i * plane, a = first[i], b = second[i];
    Vec first_sum = {}, second_sum = {};
    float first_rest = 0, second_rest = 0;
    int64_t k = 0;
    for (; k + LANES <= plane; k += LANES) {
      const Vec value = load(p + k), slope = load(g + k), product = value * slope, none = {};
      const auto chosen = value * a > value * b;
      first_sum += chosen ? product : none;
      second_sum += chosen ? none : product;
      store(grad_x + i * plane + k, slope * (chosen ? none + a : none + b));
    }
    for (; k < plane; ++k) {
      const bool chosen = p[k] * a > p[k] * b;
      (chosen ? first_rest : second_rest) += p[k] * g[k];
      grad_x[i * plane + k] = g[k] * (chosen ? a : b);
    }
    grad_first[i] = total(first_sum) + first_rest;
    grad_second[i] = total(second_sum) + second_rest;
  }
  return 0;
}

// Channel c of group g of `groups` becomes channel g of group c; with channels / groups groups, the way back.
extern "C" int channel_shuffle(int64_t images, int64_t channels, int64_t groups, int64_t plane, const float* x,
                               float* y) {
  const int64_t planes = images * channels;
#pragma omp parallel for schedule(static) if (planes * plane > SERIAL_FLOATS)
  for (int64_t i = 0; i < planes; ++i) {
    const int64_t image = i / channels, channel = i % channels;
    const int64_t source = channel % groups * (channels / groups) + channel / groups;
    std::memcpy(y + i * plane, x + (image * channels + source) * plane, plane * sizeof(float));
  }
  return 0;
}
