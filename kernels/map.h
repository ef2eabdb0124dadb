// Depthwise convolutions of channels-last maps with a border of zeros, and their gradients: 16 channels at a time, in
// bands of lines that stay in cache. Sums are added in an order that depends on the shapes alone.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "depthwise.h"
#include "slices.h"

constexpr int64_t BAND =
    8 * 1024;                   // floats of a plane of LANES channels: it and what is around it stay in the first cache
constexpr int64_t SLICES = 16;  // of the batch, each with its own sums of the gradient of a depthwise weight

struct Map {
  int64_t batch, height, width, stride = 1, reach = 1;  // a window has 2 reach + 1 pixels a side
  int64_t pixels() const { return height * width; }
  int64_t rows() const { return batch * pixels(); }
  Map result() const { return {batch, (height - 1) / stride + 1, (width - 1) / stride + 1}; }
  int64_t side() const { return 2 * reach + 1; }
  int64_t taps() const { return side() * side(); }
  int64_t pitch() const { return width + 2 * reach; }
  // Lines of the result; four times as many as are read beside them, even where these stay in the second cache only.
  int64_t band() const {
    const int64_t fitting = std::max(BAND / (pitch() * LANES) - 2 * reach, 8 * reach);
    return (std::min(fitting, height) + stride - 1) / stride;
  }
  int64_t plane_floats() const { return (band() * stride + 2 * reach) * pitch() * LANES; }

  std::vector<float> packed(const float* weight, int64_t channels, bool turned) const {
    std::vector<float> packed((channels + LANES - 1) / LANES * taps() * LANES, 0.f);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < taps(); ++t)
        packed[(c / LANES * taps() + t) * LANES + c % LANES] = weight[c * taps() + (turned ? taps() - 1 - t : t)];
    return packed;
  }

  // The lines from `line` on of a plane, a border around them, with a vector get(pixel, place) at every `step`-th pixel
  // of both axes; `place` counts the pixels of these lines, less than 0 above the first.
  template <class Get>
  void fill(int64_t line, int64_t lines, int64_t step, float* plane, Get get) const {
    const auto clear = [&](int64_t y, int64_t x, int64_t count) {
      std::memset(plane + ((y - line + reach) * pitch() + x + reach) * LANES, 0, count * LANES * sizeof(float));
    };
    for (int64_t y = line - reach; y < line + lines + reach; ++y) {
      if (y < 0 || y >= height || step > 1)
        clear(y, -reach, pitch());
      else
        clear(y, -reach, reach), clear(y, width, reach);
    }
    const int64_t columns = (width - 1) / step + 1;
    const int64_t above = (std::max<int64_t>(line - reach, 0) + step - 1) / step;
    const int64_t below = std::min(line + lines + reach, height);
    for (int64_t y = above; y * step < below; ++y)
      for (int64_t x = 0; x < columns; ++x)
        ::store(plane + ((y * step - line + reach) * pitch() + x * step + reach) * LANES,
                get(y * columns + x, (y * step - line) * width + x * step));
  }

  // Calls put(row, channel, channels left, count, vectors) for `count` neighbours of the result; get(row, channel,
  // channels left) is a vector of the map.
  template <class Get, class Put>
  void convolve(int64_t channels, const float* weight, Get get, Put put) const {
    const auto filters = packed(weight, channels, false);
    const int side = int(this->side());
    const Map to = result();
    for_tasks(batch, true, [&](int64_t image) {
      float *in = scratch<Map>(plane_floats() + band() * to.width * LANES), *out = in + plane_floats();
      for (int64_t line = 0; line < to.height; line += band())
        for (int64_t c = 0; c < channels; c += LANES) {
          const int64_t lines = std::min(band(), to.height - line), left = channels - c;
          fill(line * stride, (lines - 1) * stride + 1, 1, in,
               [&](int64_t pixel, int64_t) { return get(image * pixels() + pixel, c, left); });
          depthwise::correlate(in, pitch(), side, side, int(stride), &filters[c * taps()], Vec{}, lines, to.width, out);
          put(image * to.pixels() + line * to.width, c, left, lines * to.width, out);
        }
    });
  }

  // The gradients: put(..., beside) takes that of the map, grad_weight [channels, taps] that of the weight. get(...,
  // beside) may leave a vector there, which put finds at the same pixel.
  template <class Get, class Grad, class Put>
  void convolve_back(int64_t channels, const float* weight, Get get, Grad grad, Put put, float* grad_weight) const {
    const auto filters = packed(weight, channels, true);
    const int side = int(this->side());
    const Map to = result();
    const int64_t slices = std::min(batch, SLICES), pixels_of_band = band() * stride * width * LANES;
    const int64_t border = reach * width * LANES;
    std::vector<float> partial(slices * filters.size(), 0.f);
    for_tasks(slices, true, [&](int64_t slice) {
      float* in = scratch<Map>(2 * plane_floats() + 2 * pixels_of_band + 2 * border);
      float *back = in + plane_floats(), *out = back + plane_floats();
      float* beside = out + pixels_of_band + border;  // and the lines on either side
      for (int64_t image = batch * slice / slices; image < batch * (slice + 1) / slices; ++image)
        for (int64_t line = 0; line < to.height; line += band())
          for (int64_t c = 0; c < channels; c += LANES) {
            const int64_t first = line * stride, lines = std::min(band() * stride, height - first), left = channels - c;
            fill(first, lines, 1, in, [&](int64_t pixel, int64_t place) {
              return get(image * pixels() + pixel, c, left, beside + place * LANES);
            });
            fill(first, lines, stride, back,
                 [&](int64_t pixel, int64_t) { return grad(image * to.pixels() + pixel, c, left); });
            depthwise::correlate(back, pitch(), side, side, 1, &filters[c * taps()], Vec{}, lines, width, out);
            depthwise::weight_gradient(in, pitch(), back + reach * (pitch() + 1) * LANES, pitch(), side, side,
                                       int(stride), std::min(band(), to.height - line), to.width,
                                       &partial[slice * filters.size() + c * taps()]);
            put(image * pixels() + first * width, c, left, lines * width, out, beside);
          }
    });
    for (int64_t i = 0; i < channels * taps(); ++i) {
      const int64_t c = i / taps(), at = (c / LANES * taps() + i % taps()) * LANES + c % LANES;
      double sum = 0;
      for (int64_t slice = 0; slice < slices; ++slice) sum += partial[slice * filters.size() + at];
      grad_weight[i] = float(sum);
    }
  }

  // For each pixel a state, moved on by body(state, row of a neighbour, its tap) for the 3×3 neighbours inside the map,
  // then end(state, row).
  template <class State, class Body, class End>
  void around(State start, Body body, End end) const {
    for_tasks(batch * height, true, [&](int64_t line) {
      const int64_t y = line % height;
      for (int64_t x = 0; x < width; ++x) {
        State state = start;
        for (int64_t i = std::max<int64_t>(y - 1, 0); i < std::min(y + 2, height); ++i)
          for (int64_t j = std::max<int64_t>(x - 1, 0); j < std::min(x + 2, width); ++j)
            body(state, (line - y + i) * width + j, int32_t((i - y + 1) * 3 + j - x + 1));
        end(state, line * width + x);
      }
    });
  }
};
