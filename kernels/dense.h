// Dense 2-D convolution for the CPU, NCHW: forward and gradients, by oneDNN.
//
// Paddle's CPU operator unrolls (im2col) and multiplies image by image. oneDNN's convolutions need no unrolling, but
// other layouts: each slice of the images is brought into these and back by one thread, in its cache. Slices depend on
// shapes alone, so that the number of threads changes no bit.
//
// The gradient of the weight and pointwise convolutions are matrix products (oneDNN's sums over large maps are less
// exact). A chunk has about as many columns as one product likes: the rows of a part of one image, or several images
// side by side. Products of one image read and write its planes in place, and where there are images enough, each
// thread takes its own: pointwise ones of planes that are not small, as copies would cost more than they give. Groups
// of channels are products of their own on the same rows.

#pragma once

#ifdef HYBRID_ONEDNN

#include <omp.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "convolution.h"
#include "matmul.h"
#include "onednn.h"
#include "slices.h"
#include "vectors.h"

namespace dense {

constexpr int64_t UNROLLED_FLOATS = 1 << 20;  // of a chunk: 4 MB
constexpr int64_t WIDE_PLANE = 64;            // pixels: a product of its own
constexpr int64_t SLICES = 8;                 // of the images
constexpr size_t MOST_KEPT = 1024;            // of oneDNN's primitives

// oneDNN's convolution of some images, or the gradient of these.
class Primitive {
 public:
  onednn::Operand x, weight, y;

  // Results are float32, operands are rounded if `bfloat16`. `threads` share the work of one call. The weight has the
  // layout that it has for `like`.
  Primitive(const ConvolutionShape& s, bool gradient, bool bfloat16, bool with_bias, int threads, const Primitive* like)
      : gradient_(gradient) {
    using namespace onednn;
    const int type = bfloat16 ? BFLOAT16 : FLOAT32;
    const Sizes images{s.batch, s.channels, s.height, s.width};
    const Sizes maps{s.batch, s.out_channels, s.out_height, s.out_width};
    const Sizes taps{s.groups, s.out_channels / s.groups, s.channels / s.groups, s.kernel_height, s.kernel_width};
    const Handle in = any(images, gradient ? FLOAT32 : type), kernel = like ? like->weight_layout_ : any(taps, type);
    const Handle out = any(maps, gradient ? type : FLOAT32);
    if (with_bias) bias_layout_ = plain({s.out_channels});
    const int64_t steps[] = {s.stride, s.stride}, dilations[] = {0, 0}, before[] = {s.pad_top, s.pad_left};
    const int64_t bottom = (s.out_height - 1) * s.stride + s.kernel_height - s.height - s.pad_top;
    const int64_t right = (s.out_width - 1) * s.stride + s.kernel_width - s.width - s.pad_left;
    const int64_t after[] = {std::max<int64_t>(bottom, 0), std::max<int64_t>(right, 0)};

    const int team = omp_get_max_threads();
    omp_set_num_threads(threads);  // what a primitive is made for
    const Handle recipe =
        gradient
            ? made(dnnl_primitive_desc_destroy, dnnl_convolution_backward_data_primitive_desc_create, engine(), DIRECT,
                   in.get(), kernel.get(), out.get(), steps, dilations, before, after, nullptr, own_scratch())
            : made(dnnl_primitive_desc_destroy, dnnl_convolution_forward_primitive_desc_create, engine(),
                   FORWARD_TRAINING, DIRECT, in.get(), kernel.get(), bias_layout_.get(), out.get(), steps, dilations,
                   before, after, own_scratch());
    primitive_ = made(dnnl_primitive_destroy, dnnl_primitive_create, recipe.get());
    omp_set_num_threads(team);

    x_layout_ = layout(recipe, gradient ? DIFF_X : X);
    weight_layout_ = layout(recipe, WEIGHT);
    y_layout_ = layout(recipe, gradient ? DIFF_Y : Y);
    scratch_layout_ = layout(recipe, SCRATCH);
    x = {plain(images), x_layout_, gradient};
    weight = {plain(taps), weight_layout_, false};
    y = {plain(maps), y_layout_, !gradient};
  }

  // Computes y from x, or x from y, in Paddle's layout; the weight is in oneDNN's.
  void run(const float* at_x, const float* packed_weight, const float* bias, const float* at_y) const {
    float* memory = scratch<Primitive>(x.floats + y.floats + onednn::floats_of(scratch_layout_));
    const float *packed_x = x.reorder ? memory : at_x, *packed_y = y.reorder ? memory + x.floats : at_y;
    if (!gradient_ && x.reorder) x.change(at_x, packed_x);
    if (gradient_ && y.reorder) y.change(at_y, packed_y);
    onednn::execute(primitive_, {{gradient_ ? onednn::AT_DIFF_X : onednn::AT_X, x_layout_, packed_x},
                                 {onednn::AT_WEIGHT, weight_layout_, packed_weight},
                                 {gradient_ ? onednn::AT_DIFF_Y : onednn::AT_Y, y_layout_, packed_y},
                                 {onednn::AT_BIAS, bias_layout_, bias},
                                 {onednn::AT_SCRATCH, scratch_layout_, memory + x.floats + y.floats}});
    if (gradient_ && x.reorder) x.change(packed_x, at_x);
    if (!gradient_ && y.reorder) y.change(packed_y, at_y);
  }

 private:
  bool gradient_;
  onednn::Handle primitive_, x_layout_, weight_layout_, y_layout_, bias_layout_, scratch_layout_;
};

using Kept = std::shared_ptr<const Primitive>;

// A primitive, made at its first use.
inline Kept primitive(const ConvolutionShape& s, int64_t images, bool gradient, bool bfloat16, bool bias, int threads,
                      const Kept& like = nullptr) {
  using Key = std::array<int64_t, 18>;
  static std::mutex mutex;
  static std::map<Key, Kept> kept;
  const Key key{images,      s.channels,      s.height,       s.width,  s.out_channels, s.out_height,
                s.out_width, s.kernel_height, s.kernel_width, s.stride, s.pad_top,      s.pad_left,
                s.groups,    gradient,        bfloat16,       bias,     threads,        like ? s.batch : 0};
  const std::lock_guard<std::mutex> lock(mutex);
  if (kept.size() >= MOST_KEPT) kept.clear();
  Kept& found = kept[key];
  ConvolutionShape part = s;
  part.batch = images;
  if (!found) found = std::make_shared<const Primitive>(part, gradient, bfloat16, bias, threads, like.get());
  return found;
}

// y of x, or x of y, which are gradients then.
inline void by_slices(const ConvolutionShape& s, bool gradient, bool bfloat16, const float* x, const float* weight,
                      const float* bias, const float* y) {
  const int64_t images = (s.batch + SLICES - 1) / SLICES, slices = (s.batch + images - 1) / images;
  const int64_t rest = s.batch - (slices - 1) * images;
  const int threads = slices > 1 ? 1 : omp_get_max_threads();
  const Kept whole = primitive(s, images, gradient, bfloat16, bias, threads);
  const Kept last = rest == images ? whole : primitive(s, rest, gradient, bfloat16, bias, threads, whole);
  if (whole->weight.reorder) {
    float* packed = scratch<onednn::Operand>(whole->weight.floats);
    whole->weight.change(weight, packed);
    weight = packed;
  }
  const auto run = [&](int64_t slice) {
    const int64_t image = slice * images;
    (slice + 1 < slices ? whole : last)
        ->run(x + image * s.channels * s.height * s.width, weight, bias,
              y + image * s.out_channels * s.out_height * s.out_width);
  };
  if (slices == 1)
    run(0);  // by all threads
  else
    for_tasks(slices, true, run);
}

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
    images = pointwise && out_plane >= WIDE_PLANE ? 1 : std::clamp<int64_t>(columns / out_plane, 1, batch);
    lines = images > 1 ? out_height : std::clamp<int64_t>(columns / out_width, 1, out_height);
  }
  int64_t columns() const { return images * lines * out_width; }
  bool by_images() const { return pointwise && images == 1 && batch >= SLICES; }
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
template <class Body>
void for_lines(const Plan& p, const Chunk& chunk, const float* x, int64_t row, Body body) {
  const int64_t taps = p.kernel_height * p.kernel_width, channel = row / taps;
  const int64_t i = row % taps / p.kernel_width, j = row % p.kernel_width, shift = p.pad_left - j;
  const int64_t first = std::min(p.out_width, shift > 0 ? (shift + p.stride - 1) / p.stride : 0);
  const int64_t last = p.width - 1 + shift;
  const int64_t end = std::max(first, last < 0 ? 0 : std::min(p.out_width, last / p.stride + 1));
  for (int64_t b = 0; b < chunk.images; ++b)
    for (int64_t o = 0; o < chunk.lines; ++o) {
      const int64_t h = (chunk.line + o) * p.stride - p.pad_top + i;
      const float* line = h < 0 || h >= p.height
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
      failed |=
          product('N', 'N', p.group_out, p.out_plane, p.group_inner, 1.f, weight + g * p.group_out * p.group_inner,
                  p.group_inner, x + (b * p.groups + g) * p.group_inner * p.out_plane, p.out_plane, 0.f,
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

inline int pointwise(const Plan& p, Product product, const float* x, const float* weight, float* y) {
  if (p.by_images()) return forward_by_images(p, product, x, weight, y);
  const bool alone = p.images == 1;
  float* beside = scratch((p.channels + p.out_channels) * p.columns());
  int failed = 0;
  for_chunks(p, [&](const Chunk& chunk) {
    const float* in = alone ? x + chunk.image * p.channels * p.out_plane : beside;
    float* out = alone ? y + chunk.image * p.out_channels * p.out_plane : beside + p.channels * p.columns();
    if (!alone) gather(chunk, p.channels, p.out_plane, x, beside);
    for (int64_t g = 0; g < p.groups; ++g)
      failed |= product('N', 'N', p.group_out, chunk.columns, p.group_inner, 1.f,
                        weight + g * p.group_out * p.group_inner, p.group_inner, in + g * p.group_inner * chunk.columns,
                        chunk.columns, 0.f, out + g * p.group_out * chunk.columns, chunk.columns);
    if (!alone) scatter(chunk, p.out_channels, p.out_plane, out, y);
  });
  return failed;
}

// The gradients of the weight, and of x where it is pointwise.
inline int by_products(const Plan& p, Product product, const float* x, const float* weight, const float* grad_y,
                       float* grad_x, float* grad_weight) {
  if (p.by_images()) return backward_by_images(p, product, x, weight, grad_y, grad_x, grad_weight);
  float* unrolled = scratch((p.inner + p.out_channels) * p.columns());
  float* beside = unrolled + p.inner * p.columns();
  int failed = 0;
  float kept = 0.f;  // of the gradient of the weight: nothing in the first chunk
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
        failed |= product('N', 'T', p.group_out, p.group_inner, chunk.columns, 1.f, grad + g * p.group_out * pitch,
                          pitch, in + g * p.group_inner * chunk.columns, chunk.columns, kept,
                          grad_weight + g * p.group_out * p.group_inner, p.group_inner);
      kept = 1.f;
    }
    if (grad_x) {
      float* out = in_place ? grad_x + chunk.image * p.inner * p.out_plane : unrolled;
      for (int64_t g = 0; g < p.groups; ++g)
        failed |= product('T', 'N', p.group_inner, chunk.columns, p.group_out, 1.f,
                          weight + g * p.group_out * p.group_inner, p.group_inner, grad + g * p.group_out * pitch,
                          pitch, 0.f, out + g * p.group_inner * chunk.columns, chunk.columns);
      if (!alone) scatter(chunk, p.channels, p.out_plane, unrolled, grad_x);
    }
  });
  return failed;
}

inline void forward(const ConvolutionShape& s, bool bfloat16, const float* x, const float* weight, const float* bias,
                    float* y) {
  const Plan p(s);
  if (!p.pointwise) return by_slices(s, false, bfloat16, x, weight, bias, y);
  check_product(pointwise(p, product_of(bfloat16), x, weight, y));
  if (bias) add_bias(p, bias, y);
}

inline void backward(const ConvolutionShape& s, bool bfloat16, const float* x, const float* weight, const float* grad_y,
                     float* grad_x, float* grad_weight, float* grad_bias) {
  const Plan p(s);
  if (grad_x && !p.pointwise) {
    by_slices(s, true, bfloat16, grad_x, weight, nullptr, grad_y);
    grad_x = nullptr;
  }
  if (grad_x || grad_weight)
    check_product(by_products(p, product_of(bfloat16), x, weight, grad_y, grad_x, grad_weight));
  if (grad_bias) sum_bias(p, grad_y, grad_bias);
}

}  // namespace dense

#endif
