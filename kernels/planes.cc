// Operators over the planes of maps, float32: dynamic ReLU, [planes, plane], its gradient, and the channel shuffle.
//
// Paddle has no dynamic ReLU: two products with broadcast slopes and a maximum read and write the map many times. Its
// shuffle runs on one thread.
// Here a plane belongs to one thread, so that the number of threads changes no bit.

#include <cstdint>
#include <cstring>

#include "operator.h"
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

// y = max(first x, second x): x [batch, channels, ...], first and second [batch, channels].
static Tensors dynamic_relu(const Tensor& X, const Tensor& First, const Tensor& Second) {
  const Shape shape = sizes("x", X, 2);
  const int64_t planes = shape[0] * shape[1], plane = X.numel() / planes;
  const float *x = floats("x", X), *first = floats("first", First, {shape[0], shape[1]});
  const float* second = floats("second", Second, {shape[0], shape[1]});
  Tensor Y = empty_like(X);
  float* y = Y.data<float>();
#pragma omp parallel for schedule(static) if (planes * plane > SERIAL_FLOATS)
  for (int64_t i = 0; i < planes; ++i)
    map_plane(plane, y + i * plane, [p = x + i * plane, a = first[i], b = second[i]](auto get) {
      const auto u = get(p) * a, v = get(p) * b;
      return u > v ? u : v;
    });
  return {Y};
}

static Tensors dynamic_relu_gradient(const Tensor& X, const Tensor& First, const Tensor& Second, const Tensor& GradY) {
  const Shape shape = sizes("x", X, 2);
  const int64_t planes = shape[0] * shape[1], plane = X.numel() / planes;
  const float *x = floats("x", X), *first = floats("first", First, {shape[0], shape[1]});
  const float *second = floats("second", Second, {shape[0], shape[1]}), *grad = floats("grad", GradY, shape);
  Tensor GradX = empty_like(X), GradFirst = empty_like(First), GradSecond = empty_like(Second);
  float *grad_x = GradX.data<float>(), *grad_first = GradFirst.data<float>(), *grad_second = GradSecond.data<float>();
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
  return {GradX, GradFirst, GradSecond};
}

OPERATOR(dynamic_relu, dynamic_relu, .Inputs({"X", "First", "Second"}).Outputs({"Y"}));
GRADIENT(dynamic_relu, dynamic_relu_gradient,
         .Inputs({"X", "First", "Second", Grad("Y")})
         .Outputs({Grad("X"), Grad("First"), Grad("Second")}));

// Channel c of group g of `groups` becomes channel g of group c, of x [batch, channels, ...]; with channels / groups
// groups, the way back.
static Tensors shuffled(const Tensor& X, int64_t groups, bool back) {
  const Shape shape = sizes("x", X, 2);
  const int64_t images = shape[0], channels = shape[1], plane = X.numel() / (images * channels);
  require(groups > 0 && channels % groups == 0,
          channels, " channels cannot be shuffled in ", groups, " groups");
  if (back) groups = channels / groups;
  const float* x = floats("x", X);
  Tensor Y = empty_like(X);
  float* y = Y.data<float>();
  const int64_t planes = images * channels;
#pragma omp parallel for schedule(static) if (planes * plane > SERIAL_FLOATS)
  for (int64_t i = 0; i < planes; ++i) {
    const int64_t image = i / channels, channel = i % channels;
    const int64_t source = channel % groups * (channels / groups) + channel / groups;
    std::memcpy(y + i * plane, x + (image * channels + source) * plane, plane * sizeof(float));
  }
  return {Y};
}

static Tensors channel_shuffle(const Tensor& X, int64_t groups) { return shuffled(X, groups, false); }
static Tensors channel_shuffle_gradient(const Tensor& GradY, int64_t groups) { return shuffled(GradY, groups, true); }

OPERATOR(channel_shuffle, channel_shuffle, .Inputs({"X"}).Outputs({"Y"}).Attrs({"groups: int64_t"}));
GRADIENT(channel_shuffle, channel_shuffle_gradient,
         .Inputs({Grad("Y")})
         .Outputs({Grad("X")})
         .Attrs({"groups: int64_t"}));
