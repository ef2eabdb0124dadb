// PoolFormer's token mixer on channels-last maps, float32 [batch, height, width, channels], and its gradient.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "moments.h"
#include "operator.h"
#include "slices.h"
#include "vectors.h"

namespace {

// Rows and columns that a window sees from a position.
struct Span {
  int64_t from, to;
  Span(int64_t at, int64_t reach, int64_t side)
      : from(std::max<int64_t>(at - reach, 0)), to(std::min(at + reach + 1, side)) {}
  int64_t count() const { return to - from; }
};

Shape map_shape(const Tensor& X, int64_t reach) {
  const Shape shape = sizes("x", X, 4);
  require(shape.size() == 4 && reach >= 0, "pooling takes [batch, height, width, channels] and a window of 1 or more");
  return shape;
}

// y = x + share[image] scale p(norm(x)), with the group norm of maps.cc. p is the mean of the positions at most `reach`
// away, as far as they are inside the map, minus the position itself. As p of a constant is 0, p(norm(x)) is
// p(x) weight / deviation, and the norm's bias has no effect.
struct PoolMixer {
  static constexpr int64_t BANDS = 8;  // of an image
  int64_t batch, height, width, channels, reach;
  const float *x, *weight, *scale, *share;
  ImageNorm norm;
  std::vector<float> factors;  // of p(x), for each image

  PoolMixer(const Tensor& X, const Tensor& Weight, const Tensor& Bias, const MaybeTensor& Scale,
            const MaybeTensor& Share, int64_t reach, float epsilon, const Shape& shape)
      : batch(shape[0]),
        height(shape[1]),
        width(shape[2]),
        channels(shape[3]),
        reach(reach),
        x(floats("x", X)),
        weight(floats("weight", Weight, {channels})),
        scale(floats("scale", Scale, {channels})),
        share(some_floats("share", Share, batch)),
        norm(x, batch, height * width, channels, epsilon) {
    floats("bias", Bias, {channels});
    for (int64_t image = 0; image < batch; ++image)
      for (int64_t c = 0; c < channels; ++c) factors.push_back(of_image(image) * weight[c] * (scale ? scale[c] : 1.f));
  }

  float of_image(int64_t image) const { return norm.moments[image].scale * (share ? share[image] : 1.f); }

  // Calls body(band, image, channel, offset, get, put, p) for each vector of p(map), or of its gradient, `adjoint`:
  // every position is divided by its own count before the sum.
  template <class Body>
  void pool(const float* map, bool adjoint, Body body) const {
    for_tasks(batch * BANDS, batch * height * width * channels > SERIAL_FLOATS, [&](int64_t band) {
      const int64_t image = band / BANDS, end = height * (band % BANDS + 1) / BANDS, pitch = width * channels;
      float* sums = scratch(pitch);  // over the rows of the windows of a line
      for (int64_t line = height * (band % BANDS) / BANDS; line < end; ++line) {
        const Span rows(line, reach, height);
        for (int64_t j = 0; j < width; ++j) {
          const float count = adjoint ? Span(j, reach, width).count() : 1.f;
          for_vectors(channels, [&](int64_t c, auto get, auto put) {
            Vec sum = {};
            for (int64_t i = rows.from; i < rows.to; ++i)
              sum += get(map + (image * height + i) * pitch + j * channels + c) *
                     (1.f / (count * (adjoint ? Span(i, reach, height) : rows).count()));
            put(sums + j * channels + c, sum);
          });
        }
        for (int64_t j = 0; j < width; ++j) {
          const Span across(j, reach, width);
          const float part = adjoint ? 1.f : 1.f / across.count();
          const int64_t at = ((image * height + line) * width + j) * channels;
          for_vectors(channels, [&](int64_t c, auto get, auto put) {
            Vec sum = {};
            for (int64_t w = across.from; w < across.to; ++w) sum += get(sums + w * channels + c);
            body(band, image, c, at + c, get, put, sum * part - get(map + at + c));
          });
        }
      }
    });
  }
};

}  // namespace

static Tensors pool_mixer(const Tensor& X, const Tensor& Weight, const Tensor& Bias, const MaybeTensor& Scale,
                          const MaybeTensor& Share, int64_t reach, float epsilon) {
  const PoolMixer m(X, Weight, Bias, Scale, Share, reach, epsilon, map_shape(X, reach));
  Tensor Y = empty_like(X);
  float* y = Y.data<float>();
  m.pool(m.x, false, [&](int64_t, int64_t image, int64_t c, int64_t at, auto get, auto put, Vec p) {
    put(y + at, get(m.x + at) + get(&m.factors[image * m.channels + c]) * p);
  });
  return {Y};
}

static Tensors pool_mixer_gradient(const Tensor& X, const Tensor& Weight, const Tensor& Bias, const MaybeTensor& Scale,
                                   const MaybeTensor& Share, const Tensor& GradY, int64_t reach, float epsilon) {
  const PoolMixer m(X, Weight, Bias, Scale, Share, reach, epsilon, map_shape(X, reach));
  const float* grad = floats("grad", GradY, X.shape());
  Tensor GradX = empty_like(X), GradWeight = empty_like(Weight), GradBias = empty_like(Bias), GradScale;
  float *grad_x = GradX.data<float>(), *grad_weight = GradWeight.data<float>(), *grad_scale = nullptr;
  std::fill_n(GradBias.data<float>(), m.channels, 0.f);
  if (Scale) grad_scale = (GradScale = empty_like(*Scale)).data<float>();
  std::vector<float> sums(m.batch * m.BANDS * m.channels, 0.f);  // of p's gradient times the distance from the mean
  m.pool(grad, true, [&](int64_t band, int64_t image, int64_t c, int64_t at, auto get, auto put, Vec p) {
    float* sum = &sums[band * m.channels + c];
    put(sum, get(sum) + p * (get(m.x + at) - m.norm.moments[image].mean));
    put(grad_x + at, get(grad + at) + get(&m.factors[image * m.channels + c]) * p);
  });
  std::vector<double> totals(m.channels, 0.0), along(m.batch, 0.0);
  for (int64_t band = 0; band < m.batch * m.BANDS; ++band)
    for (int64_t c = 0; c < m.channels; ++c) {
      const int64_t image = band / m.BANDS;
      const double sum = sums[band * m.channels + c];
      totals[c] += sum * m.of_image(image);
      along[image] += sum * m.factors[image * m.channels + c] / m.channels;
    }
  for (int64_t c = 0; c < m.channels; ++c) {
    grad_weight[c] = float(totals[c] * (m.scale ? m.scale[c] : 1.f));
    if (m.scale) grad_scale[c] = float(totals[c] * m.weight[c]);
  }
  m.norm.close(m.x, std::vector<double>(m.batch, 0.0), along, grad_x);
  return {GradX, GradWeight, GradBias, GradScale};
}

OPERATOR(pool_mixer, pool_mixer,
         .Inputs({"X", "Weight", "Bias", Optional("Scale"), Optional("Share")})
             .Outputs({"Y"})
             .Attrs({"reach: int64_t", "epsilon: float"}));
GRADIENT(pool_mixer, pool_mixer_gradient,
         .Inputs({"X", "Weight", "Bias", Optional("Scale"), Optional("Share"), Grad("Y")})
             .Outputs({Grad("X"), Grad("Weight"), Grad("Bias"), Grad(Optional("Scale"))})
             .Attrs({"reach: int64_t", "epsilon: float"}));
