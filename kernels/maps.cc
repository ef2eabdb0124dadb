// Operators over channels-last maps, float32 [batch, positions, channels]: residual connections, group norm of one
// group, pooling, StarReLU, and their gradients.
//
// Paddle's run on one thread, broadcast factors of a channel slowly, and take several passes through memory where one
// does.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "slices.h"
#include "vectors.h"

namespace {

// The product with a factor for each channel or none.
template <class Get>
inline Vec times(Vec v, const float* factor, int64_t c, Get get) {
  return factor ? v * get(factor + c) : v;
}

// Rows and columns that a window sees from a position.
struct Span {
  int64_t from, to;
  Span(int64_t at, int64_t reach, int64_t side)
      : from(std::max<int64_t>(at - reach, 0)), to(std::min(at + reach + 1, side)) {}
  int64_t count() const { return to - from; }
};

}  // namespace

// y = x * kept + share[image] * branch * scale: kept and scale are factors of channels, share of images; each may be
// null.
extern "C" int residual_forward(int64_t rows, int64_t columns, int64_t positions, const float* x, const float* branch,
                                const float* kept, const float* scale, const float* share, float* y) {
  for_slices(rows, columns, [=](int64_t, int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      const int64_t at = r * columns;
      const float part = share ? share[r / positions] : 1.f;
      for_vectors(columns, [=](int64_t c, auto get, auto put) {
        put(y + at + c, times(get(x + at + c), kept, c, get) + part * times(get(branch + at + c), scale, c, get));
      });
    }
  });
  return 0;
}

extern "C" int residual_backward(int64_t rows, int64_t columns, int64_t positions, const float* x, const float* branch,
                                 const float* kept, const float* scale, const float* share, const float* grad,
                                 float* grad_x, float* grad_branch, float* grad_kept, float* grad_scale) {
  return guarded([=] {
    Sums sums(rows, columns, 2);
    for_slices(rows, columns, [&](int64_t slice, int64_t from, int64_t to) {
      float *kept_sum = sums.at(slice, 0), *scale_sum = sums.at(slice, 1);
      for (int64_t r = from; r < to; ++r) {
        const int64_t at = r * columns;
        const float part = share ? share[r / positions] : 1.f;
        for_vectors(columns, [=](int64_t c, auto get, auto put) {
          const Vec g = get(grad + at + c), shared = g * part;
          put(grad_x + at + c, times(g, kept, c, get));
          put(grad_branch + at + c, times(shared, scale, c, get));
          if (kept) put(kept_sum + c, get(kept_sum + c) + g * get(x + at + c));
          if (scale) put(scale_sum + c, get(scale_sum + c) + shared * get(branch + at + c));
        });
      }
    });
    if (kept) sums.write(0, grad_kept);
    if (scale) sums.write(1, grad_scale);
  });
}

// y = scale * relu(x)^2 + bias, a number each.
extern "C" int star_relu_forward(int64_t size, const float* x, const float* scale, const float* bias, float* y) {
  const float s = *scale, b = *bias;
  for_all(size, [=](int64_t i, auto get, auto put) {
    const Vec v = get(x + i), positive = v > 0.f ? v : Vec{};
    put(y + i, positive * positive * s + b);
  });
  return 0;
}

extern "C" int star_relu_backward(int64_t size, const float* x, const float* scale, const float* grad, float* grad_x,
                                  float* grad_scale, float* grad_bias) {
  return guarded([=] {
    const int64_t rows = (size + SLICE_FLOATS - 1) / SLICE_FLOATS;
    Sums sums(rows, SLICE_FLOATS, 0);
    std::vector<double> partial(2 * sums.slices, 0.0);
    const float s = 2.f * *scale;
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
    *grad_scale = float(squares);
    *grad_bias = float(flat);
  });
}

// Normalises all positions and channels of an image together; moments is [batch, 2]: mean and 1 / deviation.
extern "C" int group_norm_forward(int64_t batch, int64_t positions, int64_t channels, float epsilon, const float* x,
                                  const float* weight, const float* bias, float* y, float* moments) {
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
  return 0;
}

extern "C" int group_norm_backward(int64_t batch, int64_t positions, int64_t channels, const float* x,
                                   const float* weight, const float* moments, const float* grad, float* grad_x,
                                   float* grad_weight, float* grad_bias) {
  return guarded([=] {
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
  });
}

// The mean of the positions at most `reach` away, as far as they are inside the map, minus the position itself. With
// `adjoint` its gradient: every position is divided by its own count before the sum.
extern "C" int pooling(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t reach, int64_t adjoint,
                       const float* x, float* y) {
#pragma omp parallel for schedule(static) if (batch * height * width * channels > SERIAL_FLOATS)
  for (int64_t line = 0; line < batch * height; ++line) {
    const int64_t i = line % height;
    const float* image = x + (line - i) * width * channels;
    const Span rows(i, reach, height);
    for (int64_t j = 0; j < width; ++j) {
      const Span across(j, reach, width);
      const float all = 1.f / (rows.count() * across.count());
      for_vectors(channels, [=](int64_t c, auto get, auto put) {
        Vec sum = {};
        for (int64_t h = rows.from; h < rows.to; ++h) {
          const float* row = image + h * width * channels + c;
          Vec part = {};
          for (int64_t w = across.from; w < across.to; ++w)
            part += adjoint ? get(row + w * channels) / float(Span(w, reach, width).count()) : get(row + w * channels);
          sum += adjoint ? part / float(Span(h, reach, height).count()) : part;
        }
        const int64_t at = (i * width + j) * channels + c;
        put(y + (line - i) * width * channels + at, (adjoint ? sum : sum * all) - get(image + at));
      });
    }
  }
  return 0;
}
