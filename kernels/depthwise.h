// Depthwise 2-D convolution for the CPU, float32, NCHW: forward and both gradients.
//
// Paddle's CPU operator runs im2col and one matrix product a channel; with one filter a channel there is
// nothing for a matrix product to do. Here LANES channels are worked on together: their planes are
// transposed into a zero-padded scratch plane [rows][columns][LANES], where every tap is one vector
// multiply-add without boundary cases, whatever the kernel, stride and padding; the result is transposed
// back. Small maps (4x4 .. 14x14) waste no lanes, and large maps are cut into bands of rows that stay in
// the second-level cache.
//
// The gradient of the input is the same correlation over the gradient of the output (spread by the stride)
// with the kernel turned by 180 degrees. The gradient of the weight is summed in an order that depends on
// the shapes alone: each task owns a slice of the batch and a group of channels, and the slices are added
// in order afterwards. The number of threads never changes a bit of the results.
//
// Where every channel gives several (a multiplier), its plane is in as many neighbouring lanes; a block then
// has the largest multiple of the multiplier that LANES holds, so that a channel's outputs stand in one block.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "convolution.h"
#include "lanes.h"
#include "slices.h"

namespace depthwise {

// COLS neighbouring outputs of a row: correlation with a kh x kw kernel; `pitch` in pixels.
template <int COLS>
static inline void correlate_columns(const float* in, int64_t pitch, int kh, int kw, int stride, const float* weight,
                                     Vec bias, float* out) {
  Vec sum[COLS];
#pragma GCC unroll 8
  for (int c = 0; c < COLS; ++c) sum[c] = bias;
  for (int i = 0; i < kh; ++i, in += pitch * LANES)
    for (int j = 0; j < kw; ++j, weight += LANES) {
      const Vec w = load(weight);
#pragma GCC unroll 8
      for (int c = 0; c < COLS; ++c) sum[c] += w * load(in + (int64_t(c) * stride + j) * LANES);
    }
#pragma GCC unroll 8
  for (int c = 0; c < COLS; ++c) store(out + c * LANES, sum[c]);
}

static void correlate(const float* in, int64_t pitch, int kh, int kw, int stride, const float* weight, Vec bias,
                      int64_t rows, int64_t cols, float* out) {
  for (int64_t r = 0; r < rows; ++r, in += stride * pitch * LANES) {
    const float* at = in;
    int64_t left = cols;
    auto run = [&](auto width) {
      constexpr int n = decltype(width)::value;
      for (; left >= n; left -= n, at += n * stride * LANES, out += n * LANES)
        correlate_columns<n>(at, pitch, kh, kw, stride, weight, bias, out);
    };
    run(std::integral_constant<int, 8>());
    run(std::integral_constant<int, 4>());
    run(std::integral_constant<int, 2>());
    run(std::integral_constant<int, 1>());
  }
}

// Adds to sum[0 .. TAPS) the products of the gradient with the input, for neighbouring taps of a kernel row.
template <int TAPS>
static void weight_taps(const float* in, int64_t in_pitch, const float* grad, int64_t grad_pitch, int stride,
                        int64_t rows, int64_t cols, float* sum) {
  constexpr int UNROLL = LANES == 16 ? 4 : 2;
  Vec acc[UNROLL][TAPS] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = in + r * stride * in_pitch * LANES;
    const float* g = grad + r * stride * grad_pitch * LANES;
    int64_t c = 0;
    for (; c + UNROLL <= cols; c += UNROLL) {
#pragma GCC unroll 4
      for (int u = 0; u < UNROLL; ++u) {
        const Vec gv = load(g + (c + u) * stride * LANES);
#pragma GCC unroll 4
        for (int t = 0; t < TAPS; ++t) acc[u][t] += gv * load(x + ((c + u) * stride + t) * LANES);
      }
    }
    for (; c < cols; ++c) {
      const Vec gv = load(g + c * stride * LANES);
#pragma GCC unroll 4
      for (int t = 0; t < TAPS; ++t) acc[0][t] += gv * load(x + (c * stride + t) * LANES);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < TAPS; ++t) {
    Vec total = load(sum + t * LANES);
#pragma GCC unroll 4
    for (int u = 0; u < UNROLL; ++u) total += acc[u][t];
    store(sum + t * LANES, total);
  }
}

static void weight_gradient(const float* in, int64_t in_pitch, const float* grad, int64_t grad_pitch, int kh, int kw,
                            int stride, int64_t rows, int64_t cols, float* sum) {
  const int chunks = (kw + 3) / 4;
  for (int i = 0; i < kh; ++i, in += in_pitch * LANES)
    for (int k = 0; k < chunks; ++k) {
      const int from = kw * k / chunks, taps = kw * (k + 1) / chunks - from;
      const auto run = taps == 4   ? weight_taps<4>
                       : taps == 3 ? weight_taps<3>
                       : taps == 2 ? weight_taps<2>
                                   : weight_taps<1>;
      run(in + from * LANES, in_pitch, grad, grad_pitch, stride, rows, cols, sum + (i * kw + from) * LANES);
    }
}

// Adds to sum[0] the sum of a (spread) plane.
static void plane_sum(const float* grad, int64_t pitch, int stride, int64_t rows, int64_t cols, float* sum) {
  Vec total = {};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) total += load(grad + (r * pitch + c) * stride * LANES);
  store(sum, load(sum) + total);
}

// Adds up, for `count` pixels in place, the `copies` neighbouring lanes of every channel.
static void add_copies(float* pixels, int64_t count, int copies, int lanes) {
  for (int64_t i = 0; i < count; ++i, pixels += LANES)
    for (int from = 0, to = 0; from < lanes; from += copies, ++to) {
      float sum = pixels[from];
      for (int k = 1; k < copies; ++k) sum += pixels[from + k];
      pixels[to] = sum;
    }
}

constexpr int64_t BAND_FLOATS = 48 * 1024;  // a scratch plane: half of it and its result share the L2 cache
constexpr int64_t GROUP = 4;                // blocks of LANES channels in one task
constexpr int64_t BATCH_SLICES = 16;        // slices of the batch
constexpr int64_t SERIAL_WORK = 1 << 16;    // multiply-adds below which threads cost more than they give

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan : ConvolutionShape {
  int64_t multiplier, used, blocks, shares, slices, taps;  // used: output channels of a block
  explicit Plan(const ConvolutionShape& s) : ConvolutionShape(s) {
    multiplier = out_channels / channels;
    used = LANES / multiplier * multiplier;
    blocks = divide_up(out_channels, used);
    shares = divide_up(blocks, GROUP);
    slices = std::min(batch, BATCH_SLICES);
    taps = kernel_height * kernel_width;
  }
  bool parallel() const { return batch * out_channels * out_height * out_width * taps > SERIAL_WORK; }
  int lanes(int64_t block) const { return int(std::min(used, out_channels - block * used)); }
};

// [C'][taps] -> [blocks][taps][LANES], missing channels as zero; turned by 180 degrees where asked.
inline std::vector<float> pack_weight(const Plan& p, const float* weight, bool turned) {
  std::vector<float> packed(p.blocks * p.taps * LANES, 0.f);
  for (int64_t c = 0; c < p.out_channels; ++c)
    for (int64_t t = 0; t < p.taps; ++t)
      packed[((c / p.used) * p.taps + (turned ? p.taps - 1 - t : t)) * LANES + c % p.used] = weight[c * p.taps + t];
  return packed;
}

// Where pixel i of a plane of `width` columns goes in a scratch plane of `pitch` columns.
inline std::vector<int32_t> positions(int64_t rows, int64_t width, int64_t pitch, int64_t stride) {
  std::vector<int32_t> table(rows * width);
  for (int64_t i = 0; i < rows * width; ++i) table[i] = int32_t((i / width) * stride * pitch + (i % width) * stride);
  return table;
}

inline int64_t band_rows(int64_t fitting, int64_t rows) { return std::min(std::max<int64_t>(fitting, 1), rows); }

struct Task {
  int64_t slice, image, image_end, block, block_end;
};

// Runs body(task) for every slice of the batch and group of blocks.
template <class Body>
void for_slices_and_blocks(const Plan& p, Body body) {
  for_tasks(p.slices * p.shares, p.parallel(), [&](int64_t i) {
    const int64_t slice = i / p.shares, block = i % p.shares * GROUP;
    body(Task{slice, p.batch * slice / p.slices, p.batch * (slice + 1) / p.slices, block,
              std::min(p.blocks, block + GROUP)});
  });
}

inline void forward(const ConvolutionShape& shape, const float* x, const float* weight, const float* bias, float* y) {
  const Plan p(shape);
  const int kh = int(p.kernel_height), kw = int(p.kernel_width), stride = int(p.stride);
  const int64_t plane = p.height * p.width, out_plane = p.out_height * p.out_width;
  const int64_t pitch = std::max((p.out_width - 1) * stride + kw, p.pad_left + p.width);
  const int64_t band = band_rows((BAND_FLOATS / (pitch * LANES) - kh) / stride + 1, p.out_height);
  const int64_t in_floats = ((band - 1) * stride + kh) * pitch * LANES;
  const auto packed = pack_weight(p, weight, false);
  const auto position = positions(p.height, p.width, pitch, 1);

  for_slices_and_blocks(p, [&](const Task& task) {
    float* in = scratch(in_floats + band * p.out_width * LANES);
    float* out = in + in_floats;
    std::memset(in, 0, in_floats * sizeof(float));
    for (int64_t b = task.image; b < task.image_end; ++b)
      for (int64_t block = task.block; block < task.block_end; ++block) {
        const int lanes = p.lanes(block);
        const int64_t out_channel = b * p.out_channels + block * p.used;
        const int64_t channel = b * p.channels + block * p.used / p.multiplier;
        Vec start = {};
        for (int l = 0; bias && l < lanes; ++l) start[l] = bias[block * p.used + l];
        for (int64_t o = 0; o < p.out_height; o += band) {
          const int64_t rows = std::min(band, p.out_height - o), top = o * stride - p.pad_top;
          const int64_t from = std::max<int64_t>(top, 0);
          const int64_t to = std::min(p.height, top + (rows - 1) * stride + kh);
          if (band < p.out_height) std::memset(in, 0, in_floats * sizeof(float));
          planes_to_lanes(x + channel * plane + from * p.width, plane, lanes, int(p.multiplier), (to - from) * p.width,
                          position.data(), in + ((from - top) * pitch + p.pad_left) * LANES);
          correlate(in, pitch, kh, kw, stride, &packed[block * p.taps * LANES], start, rows, p.out_width, out);
          lanes_to_planes(out, out_plane, lanes, rows * p.out_width, y + out_channel * out_plane + o * p.out_width);
        }
      }
  });
}

inline void backward(const ConvolutionShape& shape, const float* x, const float* weight, const float* grad_y,
                     float* grad_x, float* grad_weight, float* grad_bias) {
  const Plan p(shape);
  const int kh = int(p.kernel_height), kw = int(p.kernel_width), stride = int(p.stride);
  const int64_t plane = p.height * p.width, out_plane = p.out_height * p.out_width;
  // The input as the forward pass sees it, and the gradient as the turned kernel does: row `oh` at
  // oh * stride + spread_top, so that the row r of the input gathers the rows r .. r + kh - 1.
  const int64_t pitch = std::max((p.out_width - 1) * stride + kw, p.pad_left + p.width);
  const int64_t grad_pitch = p.width + kw - 1;
  const int64_t spread_top = kh - 1 - p.pad_top, spread_left = kw - 1 - p.pad_left;
  const int64_t band = band_rows(BAND_FLOATS / (grad_pitch * LANES) - kh, p.height);
  const int64_t grad_floats = (band + kh - 1) * grad_pitch * LANES;
  const int64_t in_floats = std::min((p.out_height - 1) * stride + kh, band + 2 * kh) * pitch * LANES;
  const auto packed = pack_weight(p, weight, true);
  const auto position = positions(p.height, p.width, pitch, 1);
  const auto grad_position = positions(p.out_height, p.out_width, grad_pitch, stride);
  const int64_t sums = p.taps + 1;  // of a block: its taps, then its bias
  std::vector<float> partial(p.slices * p.blocks * sums * LANES, 0.f);

  for_slices_and_blocks(p, [&](const Task& task) {
    float* in = scratch(in_floats + grad_floats + band * p.width * LANES);
    float* grad = in + in_floats;
    float* out = grad + grad_floats;
    std::memset(in, 0, (in_floats + grad_floats) * sizeof(float));
    for (int64_t b = task.image; b < task.image_end; ++b)
      for (int64_t block = task.block; block < task.block_end; ++block) {
        const int lanes = p.lanes(block);
        const int64_t out_channel = b * p.out_channels + block * p.used;
        const int64_t channel = b * p.channels + block * p.used / p.multiplier;
        float* sum = &partial[(task.slice * p.blocks + block) * sums * LANES];
        for (int64_t r = 0; r < p.height; r += band) {
          const int64_t rows = std::min(band, p.height - r);
          if (band < p.height) std::memset(in, 0, (in_floats + grad_floats) * sizeof(float));
          const int64_t from = divide_up(std::max<int64_t>(r - spread_top, 0), stride);
          const int64_t to = std::min(p.out_height, (r + rows + kh - 2 - spread_top) / stride + 1);
          if (from < to)
            planes_to_lanes(grad_y + out_channel * out_plane + from * p.out_width, out_plane, lanes, 1,
                            (to - from) * p.out_width, grad_position.data(),
                            grad + ((from * stride + spread_top - r) * grad_pitch + spread_left) * LANES);
          // The rows of grad_y that this band adds to the sums: each belongs to one band.
          const int64_t own = std::min(p.out_height, divide_up(r, stride));
          const int64_t end = r + rows == p.height ? p.out_height : std::min(p.out_height, divide_up(r + rows, stride));
          const float* own_grad = grad + ((own * stride + spread_top - r) * grad_pitch + spread_left) * LANES;
          if (grad_weight && own < end) {
            const int64_t top = own * stride - p.pad_top, above = std::max<int64_t>(top, 0);
            const int64_t below = std::min(p.height, top + (end - own - 1) * stride + kh);
            planes_to_lanes(x + channel * plane + above * p.width, plane, lanes, int(p.multiplier),
                            (below - above) * p.width, position.data(),
                            in + ((above - top) * pitch + p.pad_left) * LANES);
            weight_gradient(in, pitch, own_grad, grad_pitch, kh, kw, stride, end - own, p.out_width, sum);
          }
          if (grad_bias && own < end)
            plane_sum(own_grad, grad_pitch, stride, end - own, p.out_width, sum + p.taps * LANES);
          if (grad_x) {
            correlate(grad, grad_pitch, kh, kw, 1, &packed[block * p.taps * LANES], Vec{}, rows, p.width, out);
            if (p.multiplier > 1) add_copies(out, rows * p.width, int(p.multiplier), lanes);
            lanes_to_planes(out, plane, int(lanes / p.multiplier), rows * p.width,
                            grad_x + channel * plane + r * p.width);
          }
        }
      }
  });
  for (int64_t c = 0; c < p.out_channels && (grad_weight || grad_bias); ++c)
    for (int64_t t = 0; t < sums; ++t) {
      double total = 0;
      for (int64_t s = 0; s < p.slices; ++s)
        total += partial[((s * p.blocks + c / p.used) * sums + t) * LANES + c % p.used];
      if (t < p.taps && grad_weight) grad_weight[c * p.taps + t] = float(total);
      if (t == p.taps && grad_bias) grad_bias[c] = float(total);
    }
}

}  // namespace depthwise
