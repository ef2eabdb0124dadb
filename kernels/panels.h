// Maps of many channels in panels of 32, rounded to bfloat16, their batch norms, and the way from and to float32 maps.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "activations.h"
#include "bfloat16.h"
#include "lanes.h"
#include "map.h"
#include "operator.h"

#ifdef HYBRID_BFLOAT16
namespace bfloat16 {

constexpr int64_t BLOCK_ROWS = BLOCK_TILES * ROWS;  // at most, see block_of

// Maps of the hidden layer in panels of 32 channels, [panels][rows][32].
struct Panels {
  uint16_t* numbers;
  int64_t rows;
  uint16_t* at(int64_t row, int64_t c) const { return numbers + (c / COLUMNS * rows + row) * COLUMNS + c % COLUMNS; }
  Vec get(int64_t row, int64_t c) const { return load_one(at(row, c), LANES); }
  void put(int64_t row, int64_t c, Vec v) const { store_one(at(row, c), v, LANES); }
};

inline Shape shape_of(const Map& map, int64_t hidden) {
  return {hidden / COLUMNS, map.batch, map.height, map.width, COLUMNS};
}

inline uint16_t* rounded_numbers(const char* name, const Tensor& x, const Shape& shape) {
  require(x.dtype() == paddle::DataType::BFLOAT16 && x.is_cpu() && is_contiguous(x) && x.shape() == shape, name,
          " is not what the forward pass gave");
  return static_cast<uint16_t*>(const_cast<void*>(x.data()));
}

inline Map map_of(const char* name, const Tensor& x, int64_t stride) {
  const Shape shape = sizes(name, x, 5);
  return {shape[1], shape[2], shape[3], stride};
}

// A batch norm, [4, hidden]: mean, scale, bias, 1 / deviation; of 16 channels.
struct Norm {
  Vec mean, scale, bias;
  Norm(const float* norm, int64_t hidden, int64_t c)
      : mean(load(norm + c)), scale(load(norm + hidden + c)), bias(load(norm + 2 * hidden + c)) {}
  Vec operator()(Vec v) const { return (v - mean) * scale + bias; }
};

// Calls body(row, channel) for each vector of rows, one after the other.
template <class Body>
inline void over_rows(int64_t from, int64_t end, int64_t channels, Body body) {
  for (int64_t row = from; row < end; ++row)
    for (int64_t c = 0; c < channels; c += LANES) body(row, c);
}

inline void add_to(float* to, Vec v) { store(to, load(to) + v); }

// Calls body(image, row, rows, pixel) for the rows of each image among `count` rows from `from` on. The first of them
// is row `from` + `row`, and `pixel` of its image.
template <class Body>
inline void by_images(int64_t pixels, int64_t from, int64_t count, Body body) {
  for (int64_t row = 0, rows; row < count; row += rows) {
    const int64_t image = (from + row) / pixels, pixel = (from + row) % pixels;
    rows = std::min(count - row, pixels - pixel);
    body(image, row, rows, pixel);
  }
}

// Calls body(row, rows, c, channels left, lanes) for 16 channels of maps [batch, channels, pixels] at a time, up to
// `padded` of them: `lanes` [rows][16] are the rows of an image among `count` rows from `from` on.
template <class Body>
inline void from_maps(const float* maps, int64_t channels, int64_t padded, int64_t pixels, int64_t from, int64_t count,
                      Body body) {
  static const auto places = depthwise::positions(1, BLOCK_ROWS, BLOCK_ROWS, 1);
  float* lanes = scratch<Rows>(BLOCK_ROWS * LANES);
  by_images(pixels, from, count, [&](int64_t image, int64_t row, int64_t rows, int64_t pixel) {
    for (int64_t c = 0; c < padded; c += LANES) {
      const int64_t left = std::clamp<int64_t>(channels - c, 0, LANES);
      if (left)
        planes_to_lanes(maps + (image * channels + c) * pixels + pixel, pixels, int(left), 1, rows, places.data(),
                        lanes);
      body(row, rows, c, left, lanes);
    }
  });
}

// Rows of such maps, zeros up to the pitch; their sums are added to `sums` if there are any.
inline void to_rows(const float* maps, int64_t channels, int64_t pixels, int64_t from, int64_t count, const Rows& to,
                    float* sums) {
  from_maps(maps, channels, to.pitch, pixels, from, count,
            [&](int64_t row, int64_t rows, int64_t c, int64_t left, const float* lanes) {
              Vec sum{};
              for (int64_t r = 0; r < rows; ++r) {
                const Vec v = (Vec)_mm512_maskz_loadu_ps(first(left), lanes + r * LANES);
                sum += v;
                store_one(to.at + (row + r) * to.pitch + c, v, LANES);
              }
              if (sums) add_to(sums + c, sum);
            });
}

// The way back, of `count` rows in groups of 16 channels, [groups][BLOCK_ROWS][16].
inline void to_maps(const float* lanes, int64_t channels, int64_t pixels, int64_t from, int64_t count, float* maps) {
  by_images(pixels, from, count, [&](int64_t image, int64_t row, int64_t rows, int64_t pixel) {
    for (int64_t c = 0; c < channels; c += LANES)
      lanes_to_planes(lanes + c * BLOCK_ROWS + row * LANES, pixels, int(std::min<int64_t>(channels - c, LANES)), rows,
                      maps + (image * channels + c) * pixels + pixel);
  });
}

inline int64_t floats_of_lanes(int64_t channels) { return panels_of(channels) * COLUMNS * BLOCK_ROWS; }

// A tile of a product in such groups; with a bias.
inline void put_lanes(float* lanes, const float* bias, int64_t row, int64_t rows, int64_t column, int64_t count,
                      const float* sums) {
  const Two b = bias ? load_two(bias + column, count) : Two{};
  for (int64_t r = row; r < row + rows; ++r, sums += COLUMNS) {
    store(lanes + column * BLOCK_ROWS + r * LANES, load(sums) + b.low);
    store(lanes + (column + LANES) * BLOCK_ROWS + r * LANES, load(sums + LANES) + b.high);
  }
}

// Mean and (biased) variance of the activated channels of maps, from sums over parts of the rows of distances from a
// part's first row, and of their squares: no more digits cancel out than a part has rows. Nothing where not `wanted`.
template <class Activation = Identity>
struct Statistics {
  Panels maps;
  int64_t hidden, size, parts;
  bool wanted;
  std::vector<float> sums;
  Statistics(const Panels& maps, int64_t hidden, int64_t size, bool wanted)
      : maps(maps),
        hidden(hidden),
        size(size),
        parts((maps.rows + size - 1) / size),
        wanted(wanted),
        sums(wanted ? 2 * parts * hidden : 0, 0.f) {}

  Vec get(int64_t row, int64_t c) const { return Activation::value(maps.get(row, c)); }

  // Rows of one part, in the order of rows.
  void add(int64_t row, int64_t end, int64_t c) {
    if (!wanted) return;
    const int64_t part = row / size;
    const Vec first = get(part * size, c);
    Vec sum{}, squares{};
    for (; row < end; ++row) {
      const Vec distance = get(row, c) - first;
      sum += distance, squares += distance * distance;
    }
    add_to(&sums[2 * part * hidden + c], sum), add_to(&sums[(2 * part + 1) * hidden + c], squares);
  }

  void write(float* mean, float* variance) const {
    std::vector<double> total(hidden, 0.0), spread(hidden, 0.0);
    const auto over_parts = [&](auto body) {
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t c = 0; c < hidden; c += LANES) {
          const Vec first = get(part * size, c);
          for (int64_t l = 0; l < LANES; ++l)
            body(c + l, double(std::min(size, maps.rows - part * size)), first[l], &sums[2 * part * hidden + c + l]);
        }
    };
    over_parts([&](int64_t c, double rows, double first, const float* sum) { total[c] += rows * first + *sum; });
    over_parts([&](int64_t c, double rows, double first, const float* sum) {
      const double distance = first + *sum / rows - total[c] / maps.rows;
      spread[c] += sum[hidden] - double(*sum) * *sum / rows + rows * distance * distance;
    });
    for (int64_t c = 0; c < hidden; ++c) {
      mean[c] = float(total[c] / maps.rows);
      variance[c] = float(std::max(spread[c] / maps.rows, 0.0));
    }
  }
};

// What a batch norm is made of. Its running statistics move to those of the batch, where these are wanted.
struct NormArguments {
  const float *mean, *variance, *weight, *bias;
  NormArguments(const Tensor& Mean, const Tensor& Variance, const Tensor& Weight, const Tensor& Bias, int64_t hidden)
      : mean(floats("mean", Mean, {hidden})),
        variance(floats("variance", Variance, {hidden})),
        weight(floats("norm weight", Weight, {hidden})),
        bias(floats("norm bias", Bias, {hidden})) {}

  template <class Activation>
  void write(const Statistics<Activation>& batch, float momentum, float epsilon, float* norm) const {
    const int64_t hidden = batch.hidden;
    std::vector<float> spread(variance, variance + hidden);
    std::copy_n(mean, hidden, norm);
    if (batch.wanted) batch.write(norm, spread.data());
    for (int64_t c = 0; c < hidden; ++c) {
      const double inverse = 1.0 / std::sqrt(spread[c] + double(epsilon));
      norm[hidden + c] = float(weight[c] * inverse), norm[2 * hidden + c] = bias[c],
                    norm[3 * hidden + c] = float(inverse);
      const auto move = [=](const float* running, float to) {
        const_cast<float*>(running)[c] = momentum * running[c] + (1 - momentum) * to;
      };
      if (batch.wanted) move(mean, norm[c]), move(variance, spread[c]);
    }
  }
};

// Where norm(v) has the gradient g, v has scale (g - flat - along (v - mean)); the last two are 0 with given
// statistics. They and the gradients of weight and bias follow from the sums of g and of g (v - mean) over all rows.
struct NormGradient {
  std::vector<float> flat, along;
  NormGradient(const std::vector<double>& sums, const float* norm, int64_t rows, bool training, float* grad_weight,
               float* grad_bias)
      : flat(sums.size() / 2, 0.f), along(flat) {
    const int64_t hidden = flat.size();
    for (int64_t c = 0; c < hidden; ++c) {
      const double inverse = norm[3 * hidden + c];
      grad_bias[c] = float(sums[c]), grad_weight[c] = float(sums[hidden + c] * inverse);
      if (training) flat[c] = float(sums[c] / rows), along[c] = float(sums[hidden + c] * inverse * inverse / rows);
    }
  }
  Vec operator()(const Norm& norm, int64_t c, Vec g, Vec v) const {
    return norm.scale * (g - load(&flat[c]) - load(&along[c]) * (v - norm.mean));
  }
};

}  // namespace bfloat16
#endif
