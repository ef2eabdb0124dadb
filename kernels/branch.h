// What the branches of a Transformer block share: y = x kept + share[image] scale f(norm(x)), of rows of channels, with
// a branch f whose products have operands rounded to bfloat16 and whose last one has the sums `sums` and a bias. The
// norm is that of rows or of images.

#pragma once

#include <optional>

#include "bfloat16.h"
#include "moments.h"
#include "operator.h"

#ifdef HYBRID_BFLOAT16
namespace bfloat16 {

struct Branch : Blocks {
  int64_t columns, positions;  // of an image
  const float *x, *norm_weight, *norm_bias, *kept, *scale, *share;
  float epsilon;
  std::optional<ImageNorm> images;  // where the norm is theirs

  Branch(const Tensor& X, const Tensor& NormWeight, const Tensor& NormBias, const MaybeTensor& Kept,
         const MaybeTensor& Scale, const MaybeTensor& Share, float epsilon, bool of_images = false)
      : Blocks(X.numel() / sizes("x", X, 2).back()), epsilon(epsilon) {
    const Shape shape = X.shape();
    columns = shape.back(), positions = rows / shape[0];
    x = floats("x", X), share = some_floats("share", Share, shape[0]);
    norm_weight = floats("norm weight", NormWeight, {columns}), norm_bias = floats("norm bias", NormBias, {columns});
    kept = floats("kept", Kept, {columns}), scale = floats("scale", Scale, {columns});
    if (of_images) images.emplace(x, shape[0], positions, columns, epsilon);
  }

  void moments_of(int64_t row, float& mean, float& inverse) const {
    if (images)
      mean = images->moments[row / positions].mean, inverse = images->moments[row / positions].scale;
    else
      moments(x + row * columns, columns, epsilon, mean, inverse);
  }

  // norm(x) of a block of rows; zeros up to the pitch.
  void normalise(int64_t block, const Rows& to) const {
    for (int64_t r = 0; r < rows_of(block); ++r) {
      const float* row = x + (block * block_rows + r) * columns;
      float mean, inverse;
      moments_of(block * block_rows + r, mean, inverse);
      for (int64_t c = 0; c < columns; c += 32) {
        const int64_t left = columns - c;
        const Two v = load_two(row + c, left), w = load_two(norm_weight + c, left), b = load_two(norm_bias + c, left);
        to.store(r, c, {(v.low - mean) * inverse * w.low + b.low, (v.high - mean) * inverse * w.high + b.high},
                 to.pitch - c);
      }
    }
  }

  // y from a tile of the last product.
  void finish(float* y, const float* bias, int64_t row, int64_t rows, int64_t column, int64_t count,
              const float* sums) const {
    const Two one{Vec{} + 1.f, Vec{} + 1.f}, b = bias ? load_two(bias + column, count) : Two{};
    const Two s = scale ? load_two(scale + column, count) : one, k = kept ? load_two(kept + column, count) : one;
    for (int64_t r = row; r < row + rows; ++r, sums += COLUMNS) {
      const float part = share ? share[r / positions] : 1.f;
      const Two v = load_two(x + r * columns + column, count);
      store_two(y + r * columns + column,
                {v.low * k.low + part * s.low * (load(sums) + b.low),
                 v.high * k.high + part * s.high * (load(sums + 16) + b.high)},
                count);
    }
  }

  // The sums of a block of rows: gradients of norm weight, norm bias, f before the scale, and kept.
  enum { NORM_WEIGHT, NORM_BIAS, BRANCH, KEPT, SUMS };

  // The gradient of f before the scale, and after it, for a block of rows.
  void open(int64_t block, const float* grad, float* sums, const Rows& before, const Rows& after) const {
    for (int64_t r = 0; r < rows_of(block); ++r) {
      const int64_t row = block * block_rows + r, at = row * columns;
      const float part = share ? share[row / positions] : 1.f;
      for (int64_t c = 0; c < columns; c += 32) {
        const int64_t left = columns - c;
        const Two g = load_two(grad + at + c, left), s = scale ? load_two(scale + c, left) : Two{};
        const Two b{g.low * part, g.high * part};
        add(sums + BRANCH * columns + c, b, left);
        if (kept) {
          const Two v = load_two(x + at + c, left);
          add(sums + KEPT * columns + c, {g.low * v.low, g.high * v.high}, left);
        }
        before.store(r, c, b, before.pitch - c);
        if (scale) after.store(r, c, {b.low * s.low, b.high * s.high}, after.pitch - c);
      }
    }
  }

  // The gradient of x for a block of rows, from that of norm(x), which `inner(row, column, count)` gives. A norm of
  // images leaves two sums of each row in `of_rows` to close_images.
  template <class Inner>
  void close(int64_t block, const float* grad, float* sums, float* grad_x, Inner inner,
             float* of_rows = nullptr) const {
    for (int64_t r = 0; r < rows_of(block); ++r) {
      const int64_t at = (block * block_rows + r) * columns;
      float mean, inverse;
      moments_of(block * block_rows + r, mean, inverse);
      Vec flat = {}, along = {};
      const auto over = [&](auto body) {
        for (int64_t c = 0; c < columns; c += 32) {
          const int64_t left = columns - c;
          const Two v = load_two(x + at + c, left), w = load_two(norm_weight + c, left), g = inner(r, c, left);
          body(c, left, Two{(v.low - mean) * inverse, (v.high - mean) * inverse}, g,
               Two{g.low * w.low, g.high * w.high});
        }
      };
      over([&](int64_t c, int64_t left, Two normed, Two g, Two weighted) {
        add(sums + NORM_WEIGHT * columns + c, {g.low * normed.low, g.high * normed.high}, left);
        add(sums + NORM_BIAS * columns + c, g, left);
        flat += weighted.low + weighted.high;
        along += weighted.low * normed.low + weighted.high * normed.high;
      });
      float flat_mean = total(flat) / columns, along_mean = total(along) / columns;
      if (images) {
        of_rows[2 * (block * block_rows + r)] = flat_mean, of_rows[2 * (block * block_rows + r) + 1] = along_mean;
        flat_mean = along_mean = 0.f;
      }
      over([&](int64_t c, int64_t left, Two normed, Two, Two weighted) {
        Two g = load_two(grad + at + c, left);
        if (kept) {
          const Two k = load_two(kept + c, left);
          g = {g.low * k.low, g.high * k.high};
        }
        store_two(grad_x + at + c,
                  {g.low + (weighted.low - flat_mean - normed.low * along_mean) * inverse,
                   g.high + (weighted.high - flat_mean - normed.high * along_mean) * inverse},
                  left);
      });
    }
  }

  void close_images(const std::vector<float>& of_rows, float* grad_x) const {
    if (!images) return;
    std::vector<double> flat(rows / positions, 0.0), along(rows / positions, 0.0);
    for (int64_t row = 0; row < rows; ++row)
      flat[row / positions] += of_rows[2 * row], along[row / positions] += of_rows[2 * row + 1];
    images->close(x, flat, along, grad_x);
  }

  static void add(float* to, Two v, int64_t count) {
    const Two before = load_two(to, count);
    store_two(to, {before.low + v.low, before.high + v.high}, count);
  }

  // The sums over the blocks of `size` numbers each.
  static std::vector<double> totals(const std::vector<float>& partial, int64_t size) {
    std::vector<double> sums(size, 0.0);
    for (size_t start = 0; start < partial.size(); start += size)
      for (int64_t i = 0; i < size; ++i) sums[i] += partial[start + i];
    return sums;
  }

  // Writes the gradients of norm, kept, scale, and of the last product's weight, [inner, columns] or transposed, and
  // bias, from the totals. The one of the weight comes without the scale, so that the one of the scale needs no values
  // of f.
  void write(const std::vector<double>& sums, const float* weight, const float* bias, int64_t inner, bool transposed,
             float* grad_norm_weight, float* grad_norm_bias, float* grad_kept, float* grad_scale, float* grad_weight,
             float* grad_bias) const {
    std::vector<float> scales(columns, 0.f);
    if (scale)
      for_tasks(panels_of(columns), inner * columns > SERIAL_FLOATS, [&](int64_t panel) {
        const int64_t start = panel * COLUMNS, end = std::min(columns, start + COLUMNS);
        for (int64_t c = start; transposed && c < end; ++c) {
          float* g = grad_weight + c * inner;
          Vec sum = {};
          for_vectors(inner, [&](int64_t i, auto get, auto put) {
            sum += get(g + i) * get(weight + c * inner + i);
            put(g + i, get(g + i) * scale[c]);
          });
          scales[c] = total(sum);
        }
        for (int64_t i = 0; !transposed && i < inner; ++i) {
          float* g = grad_weight + i * columns + start;
          const Two v = load_two(g, end - start), w = load_two(weight + i * columns + start, end - start);
          const Two s = load_two(scale + start, end - start);
          add(&scales[start], {v.low * w.low, v.high * w.high}, end - start);
          store_two(g, {v.low * s.low, v.high * s.high}, end - start);
        }
      });
    for (int64_t c = 0; c < columns; ++c) {
      grad_norm_weight[c] = float(sums[NORM_WEIGHT * columns + c]),
      grad_norm_bias[c] = float(sums[NORM_BIAS * columns + c]);
      const double branch = sums[BRANCH * columns + c];
      if (bias) grad_bias[c] = float(scale ? branch * scale[c] : branch);
      if (kept) grad_kept[c] = float(sums[KEPT * columns + c]);
      if (scale) grad_scale[c] = float(scales[c] + (bias ? branch * bias[c] : 0.0));
    }
  }
};

}  // namespace bfloat16
#endif
