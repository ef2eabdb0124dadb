// Operators over rows of channels, float32 [rows, columns]: GELU, means, layer normalisation, fully connected layers,
// and their gradients.
//
// Paddle's run on one thread, and its sums over the rows (the gradients of a bias or of a scale) take ten times
// as long as reading the rows. Here the rows are shared out in slices that depend on the shape alone; each slice
// has its own sums, which are added in order, so that the number of threads changes no bit.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>

#include "activations.h"
#include "matmul.h"
#include "moments.h"
#include "operator.h"
#include "slices.h"
#include "vectors.h"

constexpr int64_t MEAN_ROWS = 64;  // of a piece

// y = gelu(x), by the normal distribution function (not the tanh approximation).
static Tensors gelu(const Tensor& X) {
  const float* x = floats("x", X);
  Tensor Y = empty_like(X);
  float* y = Y.data<float>();
  for_all(X.numel(), [=](int64_t i, auto get, auto put) { put(y + i, Gelu::value(get(x + i))); });
  return {Y};
}

static Tensors gelu_gradient(const Tensor& X, const Tensor& GradY) {
  const float *x = floats("x", X), *grad = floats("grad", GradY, X.shape());
  Tensor GradX = empty_like(X);
  float* grad_x = GradX.data<float>();
  for_all(X.numel(), [=](int64_t i, auto get, auto put) { put(grad_x + i, get(grad + i) * Gelu::slope(get(x + i))); });
  return {GradX};
}

OPERATOR(gelu, gelu, .Inputs({"X"}).Outputs({"Y"}));
GRADIENT(gelu, gelu_gradient, .Inputs({"X", Grad("Y")}).Outputs({Grad("X")}));

// How many rows of numbers a shape has before an axis.
static int64_t before(const Shape& shape, int64_t axis) {
  require(axis > 0 && axis <= int64_t(shape.size()), "a mean takes another axis than ", axis, " of ", shape);
  return std::accumulate(shape.begin(), shape.begin() + axis, int64_t(1), std::multiplies<>());
}

// The mean over an axis of `count` numbers; sums are those of pieces of rows, added in order.
static Tensors mean(const Tensor& X, int64_t axis, int64_t count) {
  Shape shape = sizes("x", X, 2);
  const int64_t outer = before(shape, axis);
  require(axis < int64_t(shape.size()) && shape[axis] == count, "axis ", axis, " of ", shape, " has not ", count,
          " numbers");
  shape.erase(shape.begin() + axis);
  const int64_t inner = X.numel() / (outer * count);
  const float* x = floats("x", X);
  Tensor Y = empty(shape);
  float* y = Y.data<float>();
  const float part = 1.f / count;
  for_slices(outer, count * inner, [=](int64_t, int64_t from, int64_t to) {
    for (int64_t o = from; o < to; ++o)
      if (inner == 1) {
        Vec sum = {};
        for_vectors(count, [&](int64_t i, auto get, auto) { sum += get(x + o * count + i); });
        y[o] = total(sum) * part;
      } else {
        float *all = y + o * inner, *piece = scratch(inner);
        std::fill_n(all, inner, 0.f);
        for (int64_t row = 0; row < count; row += MEAN_ROWS) {
          std::fill_n(piece, inner, 0.f);
          for (int64_t r = row; r < std::min(row + MEAN_ROWS, count); ++r)
            for_vectors(inner, [=](int64_t c, auto get, auto put) {
              put(piece + c, get(piece + c) + get(x + (o * count + r) * inner + c));
            });
          for_vectors(inner,
                      [=](int64_t c, auto get, auto put) { put(all + c, get(all + c) + get(piece + c) * part); });
        }
      }
  });
  return {Y};
}

static Tensors mean_gradient(const Tensor& GradY, int64_t axis, int64_t count) {
  Shape shape = sizes("grad", GradY, 1);
  const int64_t outer = before(shape, axis);
  shape.insert(shape.begin() + axis, count);
  const int64_t inner = GradY.numel() / outer;
  const float* grad = floats("grad", GradY);
  Tensor GradX = empty(shape);
  float* grad_x = GradX.data<float>();
  const float part = 1.f / count;
  for_slices(outer, count * inner, [=](int64_t, int64_t from, int64_t to) {
    for (int64_t o = from; o < to; ++o)
      if (inner == 1)
        std::fill_n(grad_x + o * count, count, grad[o] * part);
      else
        for (int64_t r = o * count; r < (o + 1) * count; ++r)
          for_vectors(inner, [=](int64_t c, auto get, auto put) {
            put(grad_x + r * inner + c, get(grad + o * inner + c) * part);
          });
  });
  return {GradX};
}

OPERATOR(mean, mean, .Inputs({"X"}).Outputs({"Y"}).Attrs({"axis: int64_t", "count: int64_t"}));
GRADIENT(mean, mean_gradient, .Inputs({Grad("Y")}).Outputs({Grad("X")}).Attrs({"axis: int64_t", "count: int64_t"}));

// Normalises the last axis: x [..., columns], weight and bias [columns].
static Tensors layer_norm(const Tensor& X, const Tensor& Weight, const Tensor& Bias, float epsilon) {
  const int64_t columns = sizes("x", X, 1).back(), rows = X.numel() / columns;
  Tensor Y = empty_like(X);
  const float *x = floats("x", X), *weight = floats("weight", Weight, {columns}),
              *bias = floats("bias", Bias, {columns});
  float* y = Y.data<float>();
  for_slices(rows, columns, [=](int64_t, int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      const float* row = x + r * columns;
      float mean, scale;
      moments(row, columns, epsilon, mean, scale);
      for_vectors(columns, [&](int64_t c, auto get, auto put) {
        put(y + r * columns + c, (get(row + c) - mean) * scale * get(weight + c) + get(bias + c));
      });
    }
  });
  return {Y};
}

static Tensors layer_norm_gradient(const Tensor& X, const Tensor& Weight, const Tensor& GradY, float epsilon) {
  const int64_t columns = sizes("x", X, 1).back(), rows = X.numel() / columns;
  Tensor GradX = empty_like(X), GradWeight = empty({columns}), GradBias = empty({columns});
  const float *x = floats("x", X), *weight = floats("weight", Weight, {columns});
  const float* grad = floats("grad", GradY, X.shape());
  float* grad_x = GradX.data<float>();
  Sums sums(rows, columns, 2);
  for_slices(rows, columns, [&](int64_t slice, int64_t from, int64_t to) {
    float *weight_sum = sums.at(slice, 0), *bias_sum = sums.at(slice, 1);
    for (int64_t r = from; r < to; ++r) {
      const float *row = x + r * columns, *g = grad + r * columns;
      float mean, scale;
      moments(row, columns, epsilon, mean, scale);
      Vec flat = {}, along = {};
      for_vectors(columns, [&](int64_t c, auto get, auto put) {
        const Vec normed = (get(row + c) - mean) * scale, weighted = get(g + c) * get(weight + c);
        put(weight_sum + c, get(weight_sum + c) + get(g + c) * normed);
        put(bias_sum + c, get(bias_sum + c) + get(g + c));
        flat += weighted;
        along += weighted * normed;
      });
      const float flat_mean = total(flat) / columns, along_mean = total(along) / columns;
      for_vectors(columns, [&](int64_t c, auto get, auto put) {
        const Vec normed = (get(row + c) - mean) * scale;
        put(grad_x + r * columns + c, (get(g + c) * get(weight + c) - flat_mean - normed * along_mean) * scale);
      });
    }
  });
  sums.write(0, GradWeight.data<float>());
  sums.write(1, GradBias.data<float>());
  return {GradX, GradWeight, GradBias};
}

OPERATOR(layer_norm, layer_norm, .Inputs({"X", "Weight", "Bias"}).Outputs({"Y"}).Attrs({"epsilon: float"}));
GRADIENT(
    layer_norm, layer_norm_gradient,
    .Inputs({"X", "Weight", Grad("Y")}).Outputs({Grad("X"), Grad("Weight"), Grad("Bias")}).Attrs({"epsilon: float"}));

// y = x weight + bias: x [..., features], weight [features, columns], or [columns, features] where `transposed`. The
// gradients of x and of weight are formed where they are needed.
static Tensors linear(const Tensor& X, const Tensor& Weight, const MaybeTensor& Bias, bool transposed, bool bfloat16,
                      bool, bool) {
  Shape shape = sizes("x", X, 2);
  const int64_t features = shape.back(), columns = sizes("weight", Weight, 2)[transposed ? 0 : 1],
                rows = X.numel() / features;
  shape.back() = columns;
  Tensor Y = empty(shape);
  const float *x = floats("x", X), *bias = floats("bias", Bias, {columns});
  const float* weight = floats("weight", Weight, transposed ? Shape{columns, features} : Shape{features, columns});
  float* y = Y.data<float>();
  check_product(product_of(bfloat16)('N', transposed ? 'T' : 'N', rows, columns, features, 1.f, x, features, weight,
                                     transposed ? features : columns, 0.f, y, columns));
  if (bias)
    for_slices(rows, columns, [=](int64_t, int64_t from, int64_t to) {
      for (int64_t r = from; r < to; ++r) {
        float* row = y + r * columns;
        for_vectors(columns, [=](int64_t c, auto get, auto put) { put(row + c, get(row + c) + get(bias + c)); });
      }
    });
  return {Y};
}

static Tensors linear_gradient(const Tensor& X, const Tensor& Weight, const MaybeTensor& Bias, const Tensor& GradY,
                               bool transposed, bool bfloat16, bool x_needs_grad, bool weight_needs_grad) {
  Shape shape = sizes("x", X, 2);
  const int64_t features = shape.back(), columns = sizes("weight", Weight, 2)[transposed ? 0 : 1],
                rows = X.numel() / features;
  shape.back() = columns;
  const float *x = floats("x", X), *grad = floats("grad", GradY, shape);
  const float* weight = floats("weight", Weight, transposed ? Shape{columns, features} : Shape{features, columns});
  const Product product = product_of(bfloat16);
  Tensors grads{GradY, GradY, Tensor()};  // what nobody needs must be some tensor
  if (x_needs_grad) {
    grads[0] = empty_like(X);
    check_product(product('N', transposed ? 'N' : 'T', rows, features, columns, 1.f, grad, columns, weight,
                          transposed ? features : columns, 0.f, grads[0].data<float>(), features));
  }
  if (weight_needs_grad) {
    grads[1] = empty_like(Weight);
    float* grad_weight = grads[1].data<float>();
    check_product(
        transposed
            ? product('T', 'N', columns, features, rows, 1.f, grad, columns, x, features, 0.f, grad_weight, features)
            : product('T', 'N', features, columns, rows, 1.f, x, features, grad, columns, 0.f, grad_weight, columns));
  }
  if (Bias) {
    grads[2] = empty({columns});
    Sums sums(rows, columns, 1);
    for_slices(rows, columns, [&](int64_t slice, int64_t from, int64_t to) {
      float* sum = sums.at(slice, 0);
      for (int64_t r = from; r < to; ++r) {
        const float* row = grad + r * columns;
        for_vectors(columns, [=](int64_t c, auto get, auto put) { put(sum + c, get(sum + c) + get(row + c)); });
      }
    });
    sums.write(0, grads[2].data<float>());
  }
  return grads;
}

OPERATOR(linear, linear,
         .Inputs({"X", "Weight", Optional("Bias")})
             .Outputs({"Y"})
             .Attrs({"transposed: bool", "bfloat16: bool", "x_needs_grad: bool", "weight_needs_grad: bool"}));
GRADIENT(linear, linear_gradient,
         .Inputs({"X", "Weight", Optional("Bias"), Grad("Y")})
             .Outputs({Grad("X"), Grad("Weight"), Grad(Optional("Bias"))})
             .Attrs({"transposed: bool", "bfloat16: bool", "x_needs_grad: bool", "weight_needs_grad: bool"}));
