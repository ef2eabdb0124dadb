// Operators over the planes of maps, float32: dynamic ReLU, [planes, plane], its gradient, the channel shuffle, and
// planes to channels-last maps and back.
//
// Paddle has no dynamic ReLU: two products with broadcast slopes and a maximum read and write the map many times. Its
// shuffle and its copies of transposed tensors run on one thread, number by number.
// Here a plane belongs to one thread, so that the number of threads changes no bit.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "operator.h"
#include "slices.h"
#include "vectors.h"

namespace {

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
         .Inputs({"X", "First", "Second", Grad("Y")}).Outputs({Grad("X"), Grad("First"), Grad("Second")}));

// Channel c of group g of `groups` becomes channel g of group c, of x [batch, channels, ...]; with channels / groups
// groups, the way back.
static Tensors shuffled(const Tensor& X, int64_t groups, bool back) {
  const Shape shape = sizes("x", X, 2);
  const int64_t images = shape[0], channels = shape[1], plane = X.numel() / (images * channels);
  require(groups > 0 && channels % groups == 0, channels, " channels cannot be shuffled in ", groups, " groups");
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
         .Inputs({Grad("Y")}).Outputs({Grad("X")}).Attrs({"groups: int64_t"}));

// Means of windows of 2×2 pixels of x [batch, channels, height, width]; where a side is odd, the last windows see their
// pixels twice.
static Tensors average_pool(const Tensor& X) {
  Shape shape = sizes("x", X, 4);
  require(shape.size() == 4, "x has the shape ", shape, ", expected 4 axes");
  const int64_t planes = shape[0] * shape[1], height = shape[2], width = shape[3];
  shape[2] = (height + 1) / 2, shape[3] = (width + 1) / 2;
  const float* x = floats("x", X);
  Tensor Y = empty(shape);
  float* y = Y.data<float>();
#pragma omp parallel for schedule(static) if (X.numel() > SERIAL_FLOATS)
  for (int64_t line = 0; line < planes * shape[2]; ++line) {
    const int64_t row = line % shape[2] * 2;
    const float* above = x + (line / shape[2] * height + row) * width;
    const float* below = row + 1 < height ? above + width : above;
    float* to = y + line * shape[3];
    for (int64_t c = 0; c < width / 2; ++c)
      to[c] = (above[2 * c] + above[2 * c + 1] + below[2 * c] + below[2 * c + 1]) * 0.25f;
    if (width % 2) to[width / 2] = (above[width - 1] + below[width - 1]) * 0.5f;
  }
  return {Y};
}

static Tensors average_pool_gradient(const Tensor& X, const Tensor& GradY) {
  const Shape shape = sizes("x", X, 4), small{shape[0], shape[1], (shape[2] + 1) / 2, (shape[3] + 1) / 2};
  const int64_t height = shape[2], width = shape[3];
  const float* grad = floats("grad", GradY, small);
  Tensor GradX = empty(shape);
  float* grad_x = GradX.data<float>();
#pragma omp parallel for schedule(static) if (X.numel() > SERIAL_FLOATS)
  for (int64_t line = 0; line < shape[0] * shape[1] * height; ++line) {
    const int64_t row = line % height;
    const float* from = grad + (line / height * small[2] + row / 2) * small[3];
    const float share = row % 2 || row + 1 < height ? 0.25f : 0.5f;
    float* to = grad_x + line * width;
    for (int64_t c = 0; c < width / 2; ++c) to[2 * c] = to[2 * c + 1] = from[c] * share;
    if (width % 2) to[width - 1] = from[width / 2] * share * 2;
  }
  return {GradX};
}

OPERATOR(average_pool, average_pool, .Inputs({"X"}).Outputs({"Y"}));
GRADIENT(average_pool, average_pool_gradient, .Inputs({"X", Grad("Y")}).Outputs({Grad("X")}));

// x [batch, channels, ...] as [batch, ..., channels] where `last`, else the way back.
static Tensors move_channels(const Tensor& X, bool last) {
  Shape shape = sizes("x", X, 3);
  const auto second = shape.begin() + 1;
  const int64_t batch = shape[0], rows = last ? shape[1] : X.numel() / batch / shape.back(),
                columns = X.numel() / batch / rows;
  last ? std::rotate(second, second + 1, shape.end()) : std::rotate(second, shape.end() - 1, shape.end());
  const float* x = floats("x", X);
  Tensor Y = empty(shape);
  float* y = Y.data<float>();
  const int64_t strips = (rows + LANES - 1) / LANES;
  for_tasks(batch * strips, X.numel() > SERIAL_FLOATS, [=](int64_t strip) {
    const int64_t row = strip % strips * LANES, high = std::min<int64_t>(LANES, rows - row);
    const float* from = x + (strip / strips * rows + row) * columns;
    float* to = y + strip / strips * rows * columns + row;
    if (high < LANES || columns < LANES) {
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = 0; r < high; ++r) to[c * rows + r] = from[r * columns + c];
      return;
    }
    for (int64_t c = 0; c < columns; c += LANES) {
      c = std::min(c, columns - LANES);  // the last tile overlaps the one before
      Vec tile[LANES];
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) tile[l] = load(from + l * columns + c);
      transpose(tile);
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) store(to + (c + l) * rows, tile[l]);
    }
  });
  return {Y};
}

static Tensors move_channels_gradient(const Tensor& GradY, bool last) { return move_channels(GradY, !last); }

OPERATOR(move_channels, move_channels, .Inputs({"X"}).Outputs({"Y"}).Attrs({"last: bool"}));
GRADIENT(move_channels, move_channels_gradient, .Inputs({Grad("Y")}).Outputs({Grad("X")}).Attrs({"last: bool"}));
