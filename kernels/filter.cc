// Filters in the frequency domain of channels-last maps, float32: forward and gradients.
//
// y = irfft2(rfft2(x) * filter), where the filter of an image and channel is a mix of a few complex planes by the
// softmax of its scores, or a plane of its own. Paddle transforms one channel after the other by a stride of C, and
// writes spectra, filters and products of all images to memory. Here a vector holds LANES channels: an image of so
// many channels is transformed, filtered and transformed back within the cache.
//
// The adjoint of irfft2 is rfft2 times 2 (1 for the first column, and the last of even widths), hence the gradient of
// x is the same filtering with the conjugate filter. Sums over images are formed in slices that depend on the shapes
// alone.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "operator.h"
#include "slices.h"
#include "spectra.h"
#include "vectors.h"

namespace {

constexpr int64_t MOST_SLICES = 32;
constexpr int64_t SLICE_ITEMS = 4;

// The filter of LANES channels of an image. PLANES is the number of planes to mix (0: any), -1 for a plane a channel.
template <int PLANES>
struct Filter {
  static constexpr bool MIXED = PLANES >= 0;
  const float *real, *imag;  // [bins of the half spectrum, planes]
  int64_t planes;
  int lanes;
  float factor;
  std::vector<float> weights;  // [planes][LANES], softmax of the scores

  Filter(const Maps& m, const float* real, const float* imag)
      : real(real),
        imag(imag),
        planes(PLANES > 0 ? PLANES : m.planes),
        factor(0.5f / (m.height * m.width)),
        weights(MIXED ? m.planes * LANES : 0) {}

  void choose(const Maps& m, const float* scores, int64_t image, int64_t block) {
    lanes = m.lanes(block);
    if constexpr (MIXED) {
      const float* from = scores + image * planes * m.channels + block * LANES;
      Vec most = load_some(from, lanes), sum = {};
      for (int64_t k = 1; k < planes; ++k) {
        const Vec score = load_some(from + k * m.channels, lanes);
        most = score > most ? score : most;
      }
      for (int64_t k = 0; k < planes; ++k) {
        const Vec part = exp_negative(load_some(from + k * m.channels, lanes) - most);
        store(&weights[k * LANES], part);
        sum += part;
      }
      for (int64_t k = 0; k < planes; ++k) store(&weights[k * LANES], load(&weights[k * LANES]) / sum);
    } else {
      offset = block * LANES;
    }
  }

  inline void at(int64_t bin, Vec& re, Vec& im) const {
    if constexpr (MIXED) {
      const int64_t count = PLANES > 0 ? PLANES : planes;
      re = im = Vec{};
#pragma GCC unroll 4
      for (int64_t k = 0; k < count; ++k) {
        re += real[bin * count + k] * load(&weights[k * LANES]);
        im += imag[bin * count + k] * load(&weights[k * LANES]);
      }
    } else {
      re = load_some(real + bin * planes + offset, lanes);
      im = load_some(imag + bin * planes + offset, lanes);
    }
    re *= factor;
    im *= factor;
  }

 private:
  int64_t offset = 0;
};

template <int PLANES>
void forward(const Maps& m, const float* x, const float* real, const float* imag, const float* scores, float* y) {
  std::atomic<int64_t> next{0};
#pragma omp parallel
  {
    float* spectrum = scratch(m.spectrum() + m.work() + 2 * m.height * LANES);
    float *column = spectrum + m.spectrum(), *work = column + 2 * m.height * LANES;
    const Line line{column, column + LANES, 2 * LANES};
    Filter<PLANES> filter(m, real, imag);
    for (int64_t item; (item = next++) < m.batch * m.blocks;) {
      const int64_t image = item / m.blocks, block = item % m.blocks;
      filter.choose(m, scores, image, block);
      transform_rows(m, x + m.at(image, block), filter.lanes, spectrum, work);
      for (int64_t w = 0; w < m.bins; ++w) {
        m.columns.run(m.column(spectrum, w), line, work);
        for (int64_t h = 0; h < m.height; ++h) {
          float* p = column + 2 * h * LANES;
          Vec re, im;
          filter.at(h * m.bins + w, re, im);
          const Vec a = load(p), b = load(p + LANES);
          store(p, a * re - b * im);
          store(p + LANES, a * im + b * re);
        }
        m.columns.run(line.swapped(), m.column(spectrum, w).swapped(), work);
      }
      restore_rows(m, spectrum, filter.lanes, y + m.at(image, block), work);
    }
  }
}

// Items are images by blocks of channels where planes are mixed. Where each channel has its plane a slice is a block,
// with all images one after the other.
template <int PLANES>
void backward(const Maps& m, const float* x, const float* real, const float* imag, const float* scores,
              const float* grad, float* grad_x, float* grad_real, float* grad_imag, float* grad_scores) {
  constexpr bool MIXED = PLANES >= 0;
  const int64_t planes = PLANES > 0 ? PLANES : m.planes, size = m.height * m.bins;
  const int64_t items = m.batch * m.blocks;
  const int64_t slices = MIXED ? std::clamp<int64_t>(items / SLICE_ITEMS, 1, MOST_SLICES) : m.blocks;
  const int64_t sums = size * (MIXED ? planes : 1) * 2 * LANES;
  std::vector<float> partial(MIXED ? slices * size * planes * 2 : 0);  // of the planes
  std::atomic<int64_t> next{0};
#pragma omp parallel
  {
    std::vector<float> along(planes * LANES);  // of the weights of the mix
    float* spectrum = scratch(2 * m.spectrum() + m.work() + 4 * m.height * LANES + sums);
    float *slope = spectrum + m.spectrum(), *column = slope + m.spectrum(), *work = column + 4 * m.height * LANES;
    float* total_of = work + m.work();
    const Line line{column, column + LANES, 2 * LANES};
    float* other = column + 2 * m.height * LANES;
    const Line slope_line{other, other + LANES, 2 * LANES};
    Filter<PLANES> filter(m, real, imag);
    for (int64_t slice; (slice = next++) < slices;) {
      std::memset(total_of, 0, sums * sizeof(float));
      const int64_t first = MIXED ? items * slice / slices : 0, end = MIXED ? items * (slice + 1) / slices : m.batch;
      for (int64_t item = first; item < end; ++item) {
        const int64_t image = MIXED ? item / m.blocks : item, block = MIXED ? item % m.blocks : slice;
        filter.choose(m, scores, image, block);
        transform_rows(m, x + m.at(image, block), filter.lanes, spectrum, work);
        transform_rows(m, grad + m.at(image, block), filter.lanes, slope, work);
        std::fill(along.begin(), along.end(), 0.f);
        for (int64_t w = 0; w < m.bins; ++w) {
          m.columns.run(m.column(spectrum, w), line, work);
          m.columns.run(m.column(slope, w), slope_line, work);
          const float weight = (w == 0 || 2 * w == m.width ? 0.25f : 0.5f) / (m.height * m.width);
          for (int64_t h = 0; h < m.height; ++h) {
            const int64_t bin = h * m.bins + w;
            const float* p = column + 2 * h * LANES;
            float* q = other + 2 * h * LANES;
            const Vec a = load(p), b = load(p + LANES), c = load(q), d = load(q + LANES);
            const Vec g_re = (a * c + b * d) * weight, g_im = (a * d - b * c) * weight;
            Vec re, im;
            filter.at(bin, re, im);
            store(q, c * re + d * im);
            store(q + LANES, d * re - c * im);
            if constexpr (MIXED) {
              float* to = total_of + bin * planes * 2 * LANES;
#pragma GCC unroll 4
              for (int64_t k = 0; k < planes; ++k, to += 2 * LANES) {
                const Vec mix = load(&filter.weights[k * LANES]);
                store(&along[k * LANES],
                      load(&along[k * LANES]) + real[bin * planes + k] * g_re + imag[bin * planes + k] * g_im);
                store(to, load(to) + mix * g_re);
                store(to + LANES, load(to + LANES) + mix * g_im);
              }
            } else {
              float* to = total_of + bin * 2 * LANES;
              store(to, load(to) + g_re);
              store(to + LANES, load(to + LANES) + g_im);
            }
          }
          m.columns.run(slope_line.swapped(), m.column(slope, w).swapped(), work);
        }
        restore_rows(m, slope, filter.lanes, grad_x + m.at(image, block), work);
        if constexpr (MIXED) {  // through the softmax
          Vec mean = {};
          for (int64_t k = 0; k < planes; ++k) mean += load(&along[k * LANES]) * load(&filter.weights[k * LANES]);
          for (int64_t k = 0; k < planes; ++k)
            store_some(grad_scores + (image * planes + k) * m.channels + block * LANES,
                       (load(&along[k * LANES]) - mean) * load(&filter.weights[k * LANES]), filter.lanes);
        }
      }
      if constexpr (MIXED) {
        for (int64_t i = 0; i < size * planes * 2; ++i)
          partial[slice * size * planes * 2 + i] = total(load(total_of + i * LANES));
      } else {
        for (int64_t bin = 0; bin < size; ++bin) {
          const float* from = total_of + bin * 2 * LANES;
          store_some(grad_real + bin * planes + slice * LANES, load(from), m.lanes(slice));
          store_some(grad_imag + bin * planes + slice * LANES, load(from + LANES), m.lanes(slice));
        }
      }
    }
  }
  for (int64_t i = 0; MIXED && i < size * planes; ++i) {
    double re = 0, im = 0;
    for (int64_t s = 0; s < slices; ++s) {
      re += partial[(s * size * planes + i) * 2];
      im += partial[(s * size * planes + i) * 2 + 1];
    }
    grad_real[i] = float(re);
    grad_imag[i] = float(im);
  }
}

// The sizes of x [batch, height, width, channels] and of real and imag [height * (width / 2 + 1), planes]; scores are
// [batch, planes, channels], or none where planes are channels.
Maps maps_of(const Tensor& X, const Tensor& Real, const MaybeTensor& Scores) {
  const Shape shape = sizes("x", X, 4);
  const int64_t planes = sizes("real", Real, 2)[1];
  require(shape.size() == 4 && (Scores || planes == shape[3]), "without scores each channel has a plane of its own");
  return Maps(shape[0], shape[1], shape[2], shape[3], planes);
}

}  // namespace

static Tensors filter_spectrum(const Tensor& X, const Tensor& Real, const Tensor& Imag, const MaybeTensor& Scores) {
  const Maps m = maps_of(X, Real, Scores);
  const Shape filter{m.height * m.bins, m.planes};
  const float *x = floats("x", X), *real = floats("real", Real, filter), *imag = floats("imag", Imag, filter);
  const float* scores = floats("scores", Scores, {m.batch, m.planes, m.channels});
  Tensor Y = empty_like(X);
  (scores ? m.planes == 4 ? forward<4> : forward<0> : forward<-1>)(m, x, real, imag, scores, Y.data<float>());
  return {Y};
}

static Tensors filter_spectrum_gradient(const Tensor& X, const Tensor& Real, const Tensor& Imag,
                                        const MaybeTensor& Scores, const Tensor& GradY) {
  const Maps m = maps_of(X, Real, Scores);
  const Shape filter{m.height * m.bins, m.planes};
  const float *x = floats("x", X), *real = floats("real", Real, filter), *imag = floats("imag", Imag, filter);
  const float* scores = floats("scores", Scores, {m.batch, m.planes, m.channels});
  const float* grad = floats("grad", GradY, X.shape());
  Tensor GradX = empty_like(X), GradReal = empty_like(Real), GradImag = empty_like(Imag), GradScores;
  if (Scores) GradScores = empty_like(*Scores);
  (scores ? m.planes == 4 ? backward<4> : backward<0>
          : backward<-1>)(m, x, real, imag, scores, grad, GradX.data<float>(), GradReal.data<float>(),
                          GradImag.data<float>(), scores ? GradScores.data<float>() : nullptr);
  return {GradX, GradReal, GradImag, GradScores};
}

OPERATOR(filter_spectrum, filter_spectrum, .Inputs({"X", "Real", "Imag", Optional("Scores")}).Outputs({"Y"}));
GRADIENT(filter_spectrum, filter_spectrum_gradient,
         .Inputs({"X", "Real", "Imag", Optional("Scores"), Grad("Y")})
             .Outputs({Grad("X"), Grad("Real"), Grad("Imag"), Grad(Optional("Scores"))}));
