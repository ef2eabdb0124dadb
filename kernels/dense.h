// Dense 2-D convolution for the CPU, float32, NCHW: forward and gradients, as matrix products of oneDNN.
//
// Paddle's CPU operator unrolls (im2col) and multiplies image by image: on maps of a few pixels the products are
// slivers. Here a chunk has about as many columns as one product likes: the rows of a part of one image, or
// several images side by side. Products of one image read and write its planes in place; where they need no unrolling
// and there are images enough, each thread takes its own. Groups of channels are products of their own on the same
// rows.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "convolution.h"
#include "matmul.h"
#include "vectors.h"

namespace dense {

constexpr int64_t UNROLLED_FLOATS = 1 << 20;  // of a chunk: 4 MB
constexpr int64_t SLICES = 8;                 // of the images, each with its own sum of the gradient of the weight

struct Plan : ConvolutionShape {
  int64_t inner, out_plane, images, lines;  // of a chunk: images, or lines of one image
  int64_t group_inner, group_out;           // of one group: rows unrolled, and output channels
  bool pointwise;
  explicit Plan(const ConvolutionShape& s) : ConvolutionShape(s) {
    pointwise = kernel_height == 1 && kernel_width == 1 && stride == 1 && out_height == height && out_width == width;
    if (pointwise) {  // all of a plane is one line
      width = out_width = height * width;
      height = out_height = 1;
    }
    inner = channels * kernel_height * kernel_width;
    out_plane = out_height * out_width;
    group_inner = inner / groups;
    group_out = out_channels / groups;
    const int64_t columns = std::clamp<int64_t>(UNROLLED_FLOATS / inner, 512, 4096);
    images = std::clamp<int64_t>(columns / out_plane, 1, batch);
    lines = images > 1 ? out_height : std::clamp<int64_t>(columns / out_width, 1, out_height);
  }
  int64_t columns() const { return images * lines * out_width; }
  bool by_images() const { return pointwise && images == 1 && batch >= SLICES && omp_get_max_threads() > 1; }
};

struct Chunk {
  int64_t image, images, line, lines, columns;
};

template <class Body>
void for_chunks(const Plan& p, Body body) {
  for (int64_t b = 0; b < p.batch; b += p.images)
    for (int64_t o = 0; o < p.out_height; o += p.lines) {
      const int64_t images = std::min(p.images, p.batch - b), lines = std::min(p.lines, p.out_height - o);
      body(Chunk{b, images, o, lines, images * lines * p.out_width});
    }
}

// Calls body(offset in the row of the chunk, input row or null, first and end of the columns inside the map) for
// every output line that a tap sees.
template <class T, class Body>
void for_lines(const Plan& p, const Chunk& chunk, T* x, int64_t row, Body body) {
  const int64_t taps = p.kernel_height * p.kernel_width, channel = row / taps;
  const int64_t i = row % taps / p.kernel_width, j = row % p.kernel_width, shift = p.pad_left - j;
  const int64_t first = std::min(p.out_width, shift > 0 ? (shift + p.stride - 1) / p.stride : 0);
  const int64_t last = p.width - 1 + shift;
  const int64_t end = std::max(first, last < 0 ? 0 : std::min(p.out_width, last / p.stride + 1));
  for (int64_t b = 0; b < chunk.images; ++b)
    for (int64_t o = 0; o < chunk.lines; ++o) {
      const int64_t h = (chunk.line + o) * p.stride - p.pad_top + i;
      T* line = h < 0 || h >= p.height
                    ? nullptr
                    : x + (((chunk.image + b) * p.channels + channel) * p.height + h) * p.width - shift;
      body((b * chunk.lines + o) * p.out_width, line, first, end);
    }
}

// The input as seen by every tap: [inner, columns].
inline void unroll(const Plan& p, const Chunk& chunk, const float* x, float* unrolled) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < p.inner; ++row) {
    float* to = unrolled + row * chunk.columns;
    for_lines(p, chunk, x, row, [&](int64_t at, const float* line, int64_t first, int64_t end) {
      if (!line) first = end = p.out_width;
      std::fill(to + at, to + at + first, 0.f);
      if (p.stride == 1 && end > first)
        std::memcpy(to + at + first, line + first, (end - first) * sizeof(float));
      else
        for (int64_t c = first; c < end; ++c) to[at + c] = line[c * p.stride];
      std::fill(to + at + end, to + at + p.out_width, 0.f);
    });
  }
}

// Its transpose: adds what every tap gives to the pixels it has seen.
inline void roll(const Plan& p, const Chunk& chunk, const float* unrolled, float* x) {
  const int64_t taps = p.kernel_height * p.kernel_width;
#pragma omp parallel for schedule(static)
  for (int64_t channel = 0; channel < p.channels; ++channel)
    for (int64_t row = channel * taps; row < (channel + 1) * taps; ++row) {
      const float* from = unrolled + row * chunk.columns;
      for_lines(p, chunk, x, row, [&](int64_t at, float* line, int64_t first, int64_t end) {
        if (!line) return;
        if (p.stride == 1)
          for (int64_t c = first; c < end; ++c) line[c] += from[at + c];
        else
          for (int64_t c = first; c < end; ++c) line[c * p.stride] += from[at + c];
      });
    }
}

// Planes [image][channel][plane] of a chunk of whole images to or from [channel][image][plane].
inline void gather(const Chunk& chunk, int64_t channels, int64_t plane, const float* planes, float* side_by_side) {
#pragma omp parallel for schedule(static)
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t b = 0; b < chunk.images; ++b)
      std::copy_n(planes + ((chunk.image + b) * channels + c) * plane, plane,
                  side_by_side + (c * chunk.images + b) * plane);
}

inline void scatter(const Chunk& chunk, int64_t channels, int64_t plane, const float* side_by_side, float* planes) {
#pragma omp parallel for schedule(static)
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t b = 0; b < chunk.images; ++b)
      std::copy_n(side_by_side + (c * chunk.images + b) * plane, plane,
                  planes + ((chunk.image + b) * channels + c) * plane);
}

inline void add_bias(const Plan& p, const float* bias, float* y) {
#pragma omp parallel for schedule(static)
  for (int64_t plane = 0; plane < p.batch * p.out_channels; ++plane) {
    float* at = y + plane * p.out_plane;
    const float value = bias[plane % p.out_channels];
    for (int64_t i = 0; i < p.out_plane; ++i) at[i] += value;
  }
}

inline void sum_bias(const Plan& p, const float* grad, float* grad_bias) {
#pragma omp parallel for schedule(static)
  for (int64_t channel = 0; channel < p.out_channels; ++channel) {
    double total = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const float* at = grad + (b * p.out_channels + channel) * p.out_plane;
      Vec sum = {};
      int64_t i = 0;
      for (; i + LANES <= p.out_plane; i += LANES) sum += load(at + i);
      for (; i < p.out_plane; ++i) total += at[i];
      for (int l = 0; l < LANES; ++l) total += sum[l];
    }
    grad_bias[channel] = float(total);
  }
}

// Pointwise, an image for each thread at a time.
inline int forward_by_images(const Plan& p, Product product, const float* x, const float* weight, float* y) {
  int failed = 0;
#pragma omp parallel for schedule(static) reduction(| : failed)
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t g = 0; g < p.groups; ++g)
      failed |= product('N', 'N', p.group_out, p.out_plane, p.group_inner, 1.f,
                        weight + g * p.group_out * p.group_inner, p.group_inner,
                        x + (b * p.groups + g) * p.group_inner * p.out_plane, p.out_plane, 0.f,
                        y + (b * p.groups + g) * p.group_out * p.out_plane, p.out_plane);
  return failed;
}

inline int backward_by_images(const Plan& p, Product product, const float* x, const float* weight, const float* grad_y,
                       float* grad_x, float* grad_weight) {
  const int64_t group = p.group_out * p.group_inner, size = p.groups * group;
  std::unique_ptr<float[]> sums(grad_weight ? new float[SLICES * size] : nullptr);
  int failed = 0;
#pragma omp parallel for schedule(static) reduction(| : failed)
  for (int64_t s = 0; s < SLICES; ++s) {
    const int64_t start = p.batch * s / SLICES;
    for (int64_t b = start; b < p.batch * (s + 1) / SLICES; ++b)
      for (int64_t g = 0; g < p.groups; ++g) {
        const float* grad = grad_y + (b * p.groups + g) * p.group_out * p.out_plane;
        const int64_t in = (b * p.groups + g) * p.group_inner * p.out_plane;
        if (grad_weight)
          failed |= product('N', 'T', p.group_out, p.group_inner, p.out_plane, 1.f, grad, p.out_plane, x + in,
                            p.out_plane, b > start, &sums[s * size + g * group], p.group_inner);
        if (grad_x)
          failed |= product('T', 'N', p.group_inner, p.out_plane, p.group_out, 1.f, weight + g * group, p.group_inner,
                            grad, p.out_plane, 0.f, grad_x + in, p.out_plane);
      }
  }
  if (grad_weight)
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < size; ++i) {
      float total = 0;
      for (int64_t s = 0; s < SLICES; ++s) total += sums[s * size + i];
      grad_weight[i] = total;
    }
  return failed;
}

inline int forward(const ConvolutionShape& shape, Product product, const float* x, const float* weight,
                   const float* bias, float* y) {
  const Plan p(shape);
  if (p.by_images()) {
    const int failed = forward_by_images(p, product, x, weight, y);
    if (bias) add_bias(p, bias, y);
    return failed;
  }
  float* unrolled = scratch((p.inner + p.out_channels) * p.columns());
  float* beside = unrolled + p.inner * p.columns();
  int failed = 0;
  for_chunks(p, [&](const Chunk& chunk) {
    const bool alone = chunk.images == 1;
    const float* in = unrolled;
    if (p.pointwise && alone)
      in = x + chunk.image * p.inner * p.out_plane;
    else if (p.pointwise)
      gather(chunk, p.channels, p.out_plane, x, unrolled);
    else
      unroll(p, chunk, x, unrolled);
    float* out = alone ? y + chunk.image * p.out_channels * p.out_plane + chunk.line * p.out_width : beside;
    const int64_t pitch = alone ? p.out_plane : chunk.columns;
    for (int64_t g = 0; g < p.groups; ++g)
      failed |= product('N', 'N', p.group_out, chunk.columns, p.group_inner, 1.f,
                        weight + g * p.group_out * p.group_inner, p.group_inner,
                        in + g * p.group_inner * chunk.columns, chunk.columns, 0.f, out + g * p.group_out * pitch, pitch);
    if (!alone) scatter(chunk, p.out_channels, p.out_plane, beside, y);
  });
  if (bias) add_bias(p, bias, y);
  return failed;
}

inline int backward(const ConvolutionShape& shape, Product product, const float* x, const float* weight,
                    const float* grad_y, float* grad_x, float* grad_weight, float* grad_bias) {
  const Plan p(shape);
  if (p.by_images()) {
    const int failed = backward_by_images(p, product, x, weight, grad_y, grad_x, grad_weight);
    if (grad_bias) sum_bias(p, grad_y, grad_bias);
    return failed;
  }
  float* unrolled = scratch((p.inner + p.out_channels) * p.columns());
  float* beside = unrolled + p.inner * p.columns();
  int failed = 0;
  float kept = 0.f;  // of the gradient of the weight: nothing in the first chunk
  if (grad_x && !p.pointwise) std::memset(grad_x, 0, p.batch * p.channels * p.height * p.width * sizeof(float));
  for_chunks(p, [&](const Chunk& chunk) {
    const bool alone = chunk.images == 1, in_place = p.pointwise && alone;
    const float* grad = beside;
    const int64_t pitch = alone ? p.out_plane : chunk.columns;
    if (alone)
      grad = grad_y + chunk.image * p.out_channels * p.out_plane + chunk.line * p.out_width;
    else
      gather(chunk, p.out_channels, p.out_plane, grad_y, beside);
    if (grad_weight) {
      const float* in = unrolled;
      if (in_place)
        in = x + chunk.image * p.inner * p.out_plane;
      else if (p.pointwise)
        gather(chunk, p.channels, p.out_plane, x, unrolled);
      else
        unroll(p, chunk, x, unrolled);
      for (int64_t g = 0; g < p.groups; ++g)
        failed |= product('N', 'T', p.group_out, p.group_inner, chunk.columns, 1.f, grad + g * p.group_out * pitch, pitch,
                          in + g * p.group_inner * chunk.columns, chunk.columns, kept,
                          grad_weight + g * p.group_out * p.group_inner, p.group_inner);
      kept = 1.f;
    }
    if (grad_x) {
      float* out = in_place ? grad_x + chunk.image * p.inner * p.out_plane : unrolled;
      for (int64_t g = 0; g < p.groups; ++g)
        failed |= product('T', 'N', p.group_inner, chunk.columns, p.group_out, 1.f,
                          weight + g * p.group_out * p.group_inner, p.group_inner, grad + g * p.group_out * pitch, pitch,
                          0.f, out + g * p.group_inner * chunk.columns, chunk.columns);
      if (p.pointwise && !alone)
        scatter(chunk, p.channels, p.out_plane, unrolled, grad_x);
      else if (!p.pointwise)
        roll(p, chunk, unrolled, grad_x);
    }
  });
  if (grad_bias) sum_bias(p, grad_y, grad_bias);
  return failed;
}

}  // namespace dense
