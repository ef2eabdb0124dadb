// Operators over the planes of maps, float32 [batch, channels, plane]: batch normalisation and dynamic ReLU.
//
// Paddle's run on one thread and read and write a map several times. Here every channel (batch norm) or plane
// (dynamic ReLU) belongs to one thread, and its sums are formed in double precision plane by plane, in order, so
// that the number of threads changes no bit.

#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace {

constexpr int64_t SERIAL_FLOATS = 1 << 16;  // below this threads cost more than they give

// Sums body(index, reader) over a plane; body works on vectors and on single numbers alike.
template <class Body>
inline double sum_plane(int64_t plane, Body body) {
  Vec sum = {};
  float rest = 0;
  int64_t i = 0;
  for (; i + LANES <= plane; i += LANES) sum += body([i](const float* p) { return load(p + i); });
  for (; i < plane; ++i) rest += body([i](const float* p) { return p[i]; });
  return double(total(sum)) + rest;
}

// out[i] = body(reader of element i) over a plane.
template <class Body>
inline void map_plane(int64_t plane, float* out, Body body) {
  int64_t i = 0;
  for (; i + LANES <= plane; i += LANES) store(out + i, body([i](const float* p) { return load(p + i); }));
  for (; i < plane; ++i) out[i] = body([i](const float* p) { return p[i]; });
}

}  // namespace

// y = (x - mean) / sqrt(variance + epsilon) * weight + bias, for each channel with the moments of the batch, which go
// to `moments` [2, channels] (mean, 1 / deviation) and into the running ones.
extern "C" int batch_norm_forward(int64_t batch, int64_t channels, int64_t plane, float epsilon, float momentum,
                                  const float* x, const float* weight, const float* bias, float* running_mean,
                                  float* running_variance, float* moments, float* y) {
  const double count = double(batch) * plane;
#pragma omp parallel for schedule(static) if (batch * channels * plane > SERIAL_FLOATS)
  for (int64_t c = 0; c < channels; ++c) {
    const auto at = [=](int64_t b) { return (b * channels + c) * plane; };
    double sum = 0, squares = 0;
    for (int64_t b = 0; b < batch; ++b)
      sum += sum_plane(plane, [p = x + at(b)](auto get) { return get(p); });
    const float mean = float(sum / count);
    for (int64_t b = 0; b < batch; ++b)
      squares += sum_plane(plane, [p = x + at(b), mean](auto get) {
        const auto distance = get(p) - mean;
        return distance * distance;
      });
    const float variance = float(squares / count), inverse = 1.f / std::sqrt(variance + epsilon);
    running_mean[c] = running_mean[c] * momentum + mean * (1.f - momentum);
    running_variance[c] = running_variance[c] * momentum + variance * (1.f - momentum);
    moments[c] = mean;
    moments[channels + c] = inverse;
    const float scale = inverse * weight[c], shift = bias[c];
    for (int64_t b = 0; b < batch; ++b)
      map_plane(plane, y + at(b), [=, p = x + at(b)](auto get) { return (get(p) - mean) * scale + shift; });
  }
  return 0;
}

extern "C" int batch_norm_backward(int64_t batch, int64_t channels, int64_t plane, const float* x,
                                   const float* weight, const float* moments, const float* grad, float* grad_x,
                                   float* grad_weight, float* grad_bias) {
  const double count = double(batch) * plane;
#pragma omp parallel for schedule(static) if (batch * channels * plane > SERIAL_FLOATS)
  for (int64_t c = 0; c < channels; ++c) {
    const auto at = [=](int64_t b) { return (b * channels + c) * plane; };
    const float mean = moments[c], inverse = moments[channels + c];
    double flat = 0, along = 0;
    for (int64_t b = 0; b < batch; ++b) {
      flat += sum_plane(plane, [g = grad + at(b)](auto get) { return get(g); });
      along += sum_plane(plane, [=, p = x + at(b), g = grad + at(b)](auto get) { return get(g) * (get(p) - mean); });
    }
    grad_weight[c] = float(along * inverse);
    grad_bias[c] = float(flat);
    const float scale = weight[c] * inverse, flat_mean = float(flat / count);
    const float slope = float(along / count * inverse * inverse);
    for (int64_t b = 0; b < batch; ++b)
      map_plane(plane, grad_x + at(b), [=, p = x + at(b), g = grad + at(b)](auto get) {
        return (get(g) - flat_mean - (get(p) - mean) * slope) * scale;
      });
  }
  return 0;
}

// The same with given moments: no gradients.
extern "C" int batch_norm_apply(int64_t batch, int64_t channels, int64_t plane, float epsilon, const float* x,
                                const float* weight, const float* bias, const float* mean, const float* variance,
                                float* y) {
#pragma omp parallel for schedule(static) if (batch * channels * plane > SERIAL_FLOATS)
  for (int64_t i = 0; i < batch * channels; ++i) {
    const int64_t c = i % channels;
    const float scale = weight[c] / std::sqrt(variance[c] + epsilon), shift = bias[c], middle = mean[c];
    map_plane(plane, y + i * plane, [=, p = x + i * plane](auto get) { return (get(p) - middle) * scale + shift; });
  }
  return 0;
}

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
    const auto of_first = [=](auto get) {
      const auto product = get(g) * get(p);
      return get(p) * a > get(p) * b ? product : product * 0.f;
    };
    const auto of_second = [=](auto get) {
      const auto product = get(g) * get(p);
      return get(p) * a > get(p) * b ? product * 0.f : product;
    };
    grad_first[i] = float(sum_plane(plane, of_first));
    grad_second[i] = float(sum_plane(plane, of_second));
    map_plane(plane, grad_x + i * plane, [=](auto get) {
      return get(p) * a > get(p) * b ? get(g) * a : get(g) * b;
    });
  }
  return 0;
}
