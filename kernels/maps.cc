// Operators over channels-last maps, float32 [batch, positions, channels]: residual connections, group norm of one
// group, StarReLU, and their gradients.
//
// Paddle's run on one thread, broadcast factors of a channel slowly, and take several passes through memory where one
// does.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "operator.h"
#include "slices.h"
#include "vectors.h"

namespace {

// The product with a factor for each channel or none.
template <class Get>
inline Vec times(Vec v, const float* factor, int64_t c, Get get) {
  return factor ? v * get(factor + c) : v;
}

// y = x kept + share[image] branch scale of rows of columns; `positions` rows are an image, null factors are 1. A
// branch of `branch_rows` < rows is the same for all images.
struct Residual {
  int64_t rows, columns, positions, branch_rows;
  const float *x, *branch, *kept, *scale, *share;

  void forward(float* y) const {
    for_slices(rows, columns, [=, r = *this](int64_t, int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        const int64_t at = row * r.columns, branch_at = row % r.branch_rows * r.columns;
        const float part = r.share ? r.share[row / r.positions] : 1.f;
        for_vectors(r.columns, [=](int64_t c, auto get, auto put) {
          put(y + at + c,
              times(get(r.x + at + c), r.kept, c, get) + part * times(get(r.branch + branch_at + c), r.scale, c, get));
        });
      }
    });
  }

  void backward(const float* grad, float* grad_x, float* grad_branch, float* grad_kept, float* grad_scale) const {
    Sums sums(rows, columns, 2);
    for_slices(rows, columns, [&, r = *this](int64_t slice, int64_t from, int64_t to) {
      float *kept_sum = sums.at(slice, 0), *scale_sum = sums.at(slice, 1);
      for (int64_t row = from; row < to; ++row) {
        const int64_t at = row * r.columns;
        const float part = r.share ? r.share[row / r.positions] : 1.f;
        for_vectors(r.columns, [=](int64_t c, auto get, auto put) {
          const Vec g = get(grad + at + c), shared = g * part;
          put(grad_x + at + c, times(g, r.kept, c, get));
          put(grad_branch + at + c, times(shared, r.scale, c, get));
          if (r.kept) put(kept_sum + c, get(kept_sum + c) + g * get(r.x + at + c));
          if (r.scale) put(scale_sum + c, get(scale_sum + c) + shared * get(r.branch + at + c));
        });
      }
    });
    if (kept) sums.write(0, grad_kept);
    if (scale) sums.write(1, grad_scale);
  }
};

Residual residual_of(const Tensor& X, const Tensor& Branch, const MaybeTensor& Kept, const MaybeTensor& Scale,
                     const MaybeTensor& Share, bool table = false) {
  const Shape shape = sizes("x", X, 2);
  const int64_t columns = shape.back(), rows = X.numel() / columns, positions = rows / shape[0];
  Shape branch_shape = shape;
  if (table) branch_shape[0] = 1;
  return {rows,
          columns,
          positions,
          table ? positions : rows,
          floats("x", X),
          floats("branch", Branch, branch_shape),
          floats("kept", Kept, {columns}),
          floats("scale", Scale, {columns}),
          some_floats("share", Share, shape[0])};
}

}  // namespace

// x + share branch: x and branch [batch, ..., columns], share [batch, 1, ...], which has no gradient. A `table` is a
// branch [1, ..., columns] for all images, without a share. The gradient needs neither x nor branch, hence they are not
// kept.
static Tensors residual(const Tensor& X, const Tensor& Branch, const MaybeTensor& Share, bool table) {
  require(!table || !Share, "a table has no share");
  Tensor Y = empty_like(X);
  residual_of(X, Branch, {}, {}, Share, table).forward(Y.data<float>());
  return {Y};
}

static Tensors residual_gradient(const MaybeTensor& Share, const Tensor& GradY, bool table) {
  Tensor GradX = empty_like(GradY);
  Shape shape = GradY.shape();
  if (table) shape[0] = 1;
  Tensor GradBranch = empty(shape);
  const float* grad = floats("grad", GradY);
  float *grad_x = GradX.data<float>(), *sum = GradBranch.data<float>();
  if (table)
    for_all(GradBranch.numel(), [=, size = GradBranch.numel(), end = GradY.numel()](int64_t i, auto get, auto put) {
      put(grad_x + i, get(grad + i));
      Vec total = get(grad + i);
      for (int64_t at = i + size; at < end; at += size) put(grad_x + at, get(grad + at)), total += get(grad + at);
      put(sum + i, total);
    });
  else
    residual_of(GradY, GradY, {}, {}, Share).backward(grad, grad_x, sum, nullptr, nullptr);
  return {GradX, GradBranch};
}

OPERATOR(residual, residual, .Inputs({"X", "Branch", Optional("Share")}).Outputs({"Y"}).Attrs({"table: bool"}));
GRADIENT(residual, residual_gradient,
         .Inputs({Optional("Share"), Grad("Y")}).Outputs({Grad("X"), Grad("Branch")}).Attrs({"table: bool"}));

// The same with factors of channels, kept and scale [columns].
static Tensors scaled_residual(const Tensor& X, const Tensor& Branch, const MaybeTensor& Kept, const MaybeTensor& Scale,
                               const MaybeTensor& Share) {
  Tensor Y = empty_like(X);
  residual_of(X, Branch, Kept, Scale, Share).forward(Y.data<float>());
  return {Y};
}

static Tensors scaled_residual_gradient(const Tensor& X, const Tensor& Branch, const MaybeTensor& Kept,
                                        const MaybeTensor& Scale, const MaybeTensor& Share, const Tensor& GradY) {
  const Residual r = residual_of(X, Branch, Kept, Scale, Share);
  Tensor GradX = empty_like(X), GradBranch = empty_like(X), GradKept, GradScale;
  float *grad_kept = nullptr, *grad_scale = nullptr;
  if (Kept) grad_kept = (GradKept = empty_like(*Kept)).data<float>();
  if (Scale) grad_scale = (GradScale = empty_like(*Scale)).data<float>();
  r.backward(floats("grad", GradY, X.shape()), GradX.data<float>(), GradBranch.data<float>(), grad_kept, grad_scale);
  return {GradX, GradBranch, GradKept, GradScale};
}

OPERATOR(scaled_residual, scaled_residual,
         .Inputs({"X", "Branch", Optional("Kept"), Optional("Scale"), Optional("Share")}).Outputs({"Y"}));
GRADIENT(scaled_residual, scaled_residual_gradient,
         .Inputs({"X", "Branch", Optional("Kept"), Optional("Scale"), Optional("Share"), Grad("Y")})
             .Outputs({Grad("X"), Grad("Branch"), Grad(Optional("Kept")), Grad(Optional("Scale"))}));

// y = scale * relu(x)^2 + bias: scale and bias [1].
static Tensors star_relu(const Tensor& X, const Tensor& Scale, const Tensor& Bias) {
  const float *x = floats("x", X), s = *floats("scale", Scale, {1}), b = *floats("bias", Bias, {1});
  Tensor Y = empty_like(X);
  float* y = Y.data<float>();
  for_all(X.numel(), [=](int64_t i, auto get, auto put) {
    const Vec v = get(x + i), positive = v > 0.f ? v : Vec{};
    put(y + i, positive * positive * s + b);
  });
  return {Y};
}

static Tensors star_relu_gradient(const Tensor& X, const Tensor& Scale, const Tensor& GradY) {
  const float *x = floats("x", X), *grad = floats("grad", GradY, X.shape());
  Tensor GradX = empty_like(X);
  float* grad_x = GradX.data<float>();
  const int64_t size = X.numel();
  const int64_t rows = (size + SLICE_FLOATS - 1) / SLICE_FLOATS;
  Sums sums(rows, SLICE_FLOATS, 0);
  std::vector<double> partial(2 * sums.slices, 0.0);
  const float s = 2.f * *floats("scale", Scale, {1});
  for_slices(rows, SLICE_FLOATS, [&](int64_t slice, int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      const int64_t at = r * SLICE_FLOATS;
      Vec squares = {}, flat = {};
      for_vectors(std::min(SLICE_FLOATS, size - at), [&](int64_t i, auto get, auto put) {
        const Vec v = get(x + at + i), g = get(grad + at + i), positive = v > 0.f ? v : Vec{};
        put(grad_x + at + i, g * positive * s);
        squares += g * positive * positive;
        flat += g;
      });
      partial[2 * slice] += total(squares);
      partial[2 * slice + 1] += total(flat);
    }
  });
  double squares = 0, flat = 0;
  for (int64_t i = 0; i < sums.slices; ++i) squares += partial[2 * i], flat += partial[2 * i + 1];
  Tensor GradScale = empty({1}), GradBias = empty({1});
  *GradScale.data<float>() = float(squares);
  *GradBias.data<float>() = float(flat);
  return {GradX, GradScale, GradBias};
}

OPERATOR(star_relu, star_relu, .Inputs({"X", "Scale", "Bias"}).Outputs({"Y"}));
GRADIENT(star_relu, star_relu_gradient,
         .Inputs({"X", "Scale", Grad("Y")}).Outputs({Grad("X"), Grad("Scale"), Grad("Bias")}));

// Normalises all positions and channels of an image together: x [batch, ..., channels], weight and bias [channels].
// Moments, [batch, 2], are mean and 1 / deviation.
static Tensors group_norm(const Tensor& X, const Tensor& Weight, const Tensor& Bias, float epsilon) {
  const Shape shape = sizes("x", X, 2);
  const int64_t batch = shape[0], channels = shape.back(), positions = X.numel() / (batch * channels);
  const float *x = floats("x", X), *weight = floats("weight", Weight, {channels});
  const float* bias = floats("bias", Bias, {channels});
  Tensor Y = empty_like(X), Moments = empty({batch, 2});
  float *y = Y.data<float>(), *moments = Moments.data<float>();
  const int64_t size = positions * channels;
#pragma omp parallel for schedule(static) if (batch * size > SERIAL_FLOATS)
  for (int64_t b = 0; b < batch; ++b) {
    const float* image = x + b * size;
    double sum = 0, squares = 0;
    for (int64_t p = 0; p < positions; ++p) {
      Vec part = {};
      for_vectors(channels, [&](int64_t c, auto get, auto) { part += get(image + p * channels + c); });
      sum += total(part);
    }
    const float mean = float(sum / size);
    for (int64_t p = 0; p < positions; ++p) {
      const float* row = image + p * channels;
      Vec part = {};
      int64_t c = 0;
      for (; c + LANES <= channels; c += LANES) part += (load(row + c) - mean) * (load(row + c) - mean);
      float rest = total(part);
      for (; c < channels; ++c) rest += (row[c] - mean) * (row[c] - mean);
      squares += rest;
    }
    const float scale = float(1 / std::sqrt(squares / size + epsilon));
    moments[2 * b] = mean;
    moments[2 * b + 1] = scale;
    for (int64_t p = 0; p < positions; ++p)
      for_vectors(channels, [=](int64_t c, auto get, auto put) {
        const int64_t at = p * channels + c;
        put(y + b * size + at, (get(image + at) - mean) * scale * get(weight + c) + get(bias + c));
      });
  }
  return {Y, Moments};
}

static Tensors group_norm_gradient(const Tensor& X, const Tensor& Weight, const Tensor& Moments, const Tensor& GradY,
                                   float) {
  const Shape shape = sizes("x", X, 2);
  const int64_t batch = shape[0], channels = shape.back(), positions = X.numel() / (batch * channels);
  const float *x = floats("x", X), *weight = floats("weight", Weight, {channels});
  const float *moments = floats("moments", Moments, {batch, 2}), *grad = floats("grad", GradY, shape);
  Tensor GradX = empty_like(X), GradWeight = empty({channels}), GradBias = empty({channels});
  float *grad_x = GradX.data<float>(), *grad_weight = GradWeight.data<float>(), *grad_bias = GradBias.data<float>();
  const int64_t size = positions * channels;
  std::vector<float> sums(2 * batch * channels, 0.f);  // of an image: gradient times normalised, gradient
#pragma omp parallel for schedule(static) if (batch * size > SERIAL_FLOATS)
  for (int64_t b = 0; b < batch; ++b) {
    const float *image = x + b * size, *g = grad + b * size, mean = moments[2 * b], scale = moments[2 * b + 1];
    float *along = &sums[2 * b * channels], *flat = along + channels;
    for (int64_t p = 0; p < positions; ++p)
      for_vectors(channels, [=](int64_t c, auto get, auto put) {
        const int64_t at = p * channels + c;
        put(along + c, get(along + c) + get(g + at) * ((get(image + at) - mean) * scale));
        put(flat + c, get(flat + c) + get(g + at));
      });
    double along_sum = 0, flat_sum = 0;
    for (int64_t c = 0; c < channels; ++c) along_sum += along[c] * weight[c], flat_sum += flat[c] * weight[c];
    const float along_mean = float(along_sum / size), flat_mean = float(flat_sum / size);
    for (int64_t p = 0; p < positions; ++p)
      for_vectors(channels, [=](int64_t c, auto get, auto put) {
        const int64_t at = p * channels + c;
        const Vec normed = (get(image + at) - mean) * scale;
        put(grad_x + b * size + at, (get(g + at) * get(weight + c) - flat_mean - normed * along_mean) * scale);
      });
  }
  for (int64_t c = 0; c < channels; ++c) {
    double along = 0, flat = 0;
    for (int64_t b = 0; b < batch; ++b) along += sums[2 * b * channels + c], flat += sums[(2 * b + 1) * channels + c];
    grad_weight[c] = float(along);
    grad_bias[c] = float(flat);
  }
  return {GradX, GradWeight, GradBias};
}

OPERATOR(group_norm, group_norm, .Inputs({"X", "Weight", "Bias"}).Outputs({"Y", "Moments"}).Attrs({"epsilon: float"}));
GRADIENT(group_norm, group_norm_gradient,
         .Inputs({"X", "Weight", "Moments", Grad("Y")})
             .Outputs({Grad("X"), Grad("Weight"), Grad("Bias")})
             .Attrs({"epsilon: float"}));
