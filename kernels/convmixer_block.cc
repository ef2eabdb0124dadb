// A ConvMixer block as one operator, with products of operands rounded to bfloat16.
//
// y = norm2(gelu(w h + b2)) where h = x + share[image] norm1(gelu(depthwise(x) + b1)), of channels-last float32 maps
// (Trockman and Kolter, "Patches Are All You Need?", 2022, equations 2 and 3). Between its steps maps are rounded to
// bfloat16. Activations and norms are computed again wherever they are read. Statistics are those of the rounded
// numbers. Sums are float32, and added in an order that depends on the shapes alone, so that the number of threads
// changes no bit.

#include <cstdint>
#include <vector>

#include "activations.h"
#include "map.h"
#include "operator.h"
#include "panels.h"

#ifdef HYBRID_BFLOAT16

using namespace bfloat16;

namespace {

// x [batch, height, width, channels], depthwise [channels, 1, side, side], weight [channels, channels, 1, 1].
struct Block : Blocks {
  Map map;
  int64_t channels;
  const float *depthwise, *bias1, *weight, *bias2, *share;

  Block(const Shape& x, const Tensor& Depthwise, const MaybeTensor& Bias1, const Tensor& Weight,
        const MaybeTensor& Bias2, const MaybeTensor& Share)
      : Blocks(x[0] * x[1] * x[2]) {
    const int64_t side = sizes("depthwise weight", Depthwise, 4)[2];
    require(x.size() == 4 && x[3] % COLUMNS == 0 && side % 2, "a map ", x, " and windows of ", side, " are not taken");
    channels = x[3];
    map = {x[0], x[1], x[2], 1, side / 2};
    depthwise = floats("depthwise weight", Depthwise, {channels, 1, side, side});
    weight = floats("weight", Weight, {channels, channels, 1, 1}), share = some_floats("share", Share, map.batch);
    bias1 = floats("depthwise bias", Bias1, {channels}), bias2 = floats("bias", Bias2, {channels});
  }

  float of_image(int64_t image) const { return share ? share[image] : 1.f; }
  Shape kept_shape() const { return shape_of(map, channels); }

  // Calls body(row, channel) for each vector of a block of rows, or of every block.
  template <class Body>
  void each(int64_t block, Body body) const {
    over_rows(block * block_rows, block * block_rows + rows_of(block), channels, body);
  }
  template <class Body>
  void each(Body body) const {
    for_tasks(blocks(), true, [&](int64_t block) { each(block, body); });
  }

  void convolve(const float* x, const Panels& input, const Panels& before, Statistics<RoundedGelu>& statistics) const {
    each([&](int64_t row, int64_t c) { input.put(row, c, load(x + row * channels + c)); });
    map.convolve(
        channels, depthwise, [&](int64_t row, int64_t c, int64_t) { return input.get(row, c); },
        [&](int64_t row, int64_t c, int64_t, int64_t rows, const float* sums) {
          const Vec bias = bias1 ? load(bias1 + c) : Vec{};
          for (int64_t r = row; r < row + rows; ++r, sums += LANES) before.put(r, c, load(sums) + bias);
          statistics.add(row, row + rows, c);
        });
  }

  // `hidden` is h.
  void product(const Panels& input, const Panels& before, const float* norm1, const Rows& hidden, const Panels& after,
               Statistics<RoundedGelu>& statistics) const {
    const PackedWeight packed(weight, channels, channels, true);
    const Right right = packed.pack<Block>();
    for_tasks(blocks(), true, [&](int64_t block) {
      const int64_t from = block * block_rows;
      each(block, [&](int64_t row, int64_t c) {
        const Vec branch = Norm(norm1, channels, c)(RoundedGelu::value(before.get(row, c)));
        store_one(hidden.at + row * hidden.pitch + c, input.get(row, c) + of_image(row / map.pixels()) * branch, LANES);
      });
      multiply(rows_of(block), channels, channels, hidden.from(from).left(), right, 0, panels_of(channels),
               [&](int64_t row, int64_t rows, int64_t column, int64_t, const float* sums) {
                 const Two b = bias2 ? load_two(bias2 + column, COLUMNS) : Two{};
                 for (int64_t r = from + row; r < from + row + rows; ++r, sums += COLUMNS)
                   store_rounded(after.at(r, column), rounded({load(sums) + b.low, load(sums + LANES) + b.high}),
                                 COLUMNS);
                 for (int64_t c = column; c < column + COLUMNS; c += LANES)
                   statistics.add(from + row, from + row + rows, c);
               });
    });
  }

  void write(const Panels& after, const float* norm2, float* y) const {
    each([&](int64_t row, int64_t c) {
      store(y + row * channels + c, Norm(norm2, channels, c)(RoundedGelu::value(after.get(row, c))));
    });
  }

  // Sums over blocks of rows, [count, channels] each.
  std::vector<double> totals(const std::vector<float>& partial, int64_t count) const {
    std::vector<double> sums(count * channels, 0.0);
    for (size_t i = 0; i < partial.size(); ++i) sums[i % sums.size()] += partial[i];
    return sums;
  }

  // The gradients of x, depthwise, bias1, norm1's weight and bias, weight, bias2, norm2's weight and bias.
  void backward(const Panels& input, const Panels& before, const float* norm1, const Rows& hidden, const Panels& after,
                const float* norm2, const float* grad, bool training, float* const* grads) const {
    Tensor Changes = empty(kept_shape(), paddle::DataType::BFLOAT16);  // the gradient of y, then that of h
    const Panels changes{static_cast<uint16_t*>(Changes.data()), rows};
    std::vector<float> partial(blocks() * 2 * channels, 0.f);
    each([&](int64_t row, int64_t c) {
      const Vec g = load(grad + row * channels + c);
      float* sums = &partial[row / block_rows * 2 * channels + c];
      add_to(sums, g), add_to(sums + channels, g * (RoundedGelu::value(after.get(row, c)) - load(norm2 + c)));
      changes.put(row, c, g);
    });
    const NormGradient second(totals(partial, 2), norm2, rows, training, grads[7], grads[8]);
    const std::vector<double> sums =
        product_back(before, norm1, hidden, after, norm2, changes, second, grads[5], grads[6]);
    const NormGradient first({sums.begin(), sums.begin() + 2 * channels}, norm1, rows, training, grads[3], grads[4]);
    for (int64_t c = 0; bias1 && c < channels; ++c)
      grads[2][c] = float(norm1[channels + c] * (sums[2 * channels + c] - first.flat[c] * sums[3 * channels + c] -
                                                 first.along[c] * sums[4 * channels + c]));
    map.convolve_back(
        channels, depthwise,
        [&](int64_t row, int64_t c, int64_t, float*) {
          fetch(grads[0] + row * channels + c, 1, 1);
          return input.get(row, c);
        },
        [&](int64_t row, int64_t c, int64_t) {
          Vec value, slope;
          RoundedGelu::both(before.get(row, c), value, slope);
          const Vec g = changes.get(row, c) * of_image(row / map.pixels());
          return first(Norm(norm1, channels, c), c, g, value) * slope;
        },
        [&](int64_t row, int64_t c, int64_t, int64_t rows, const float* sums, const float*) {
          for (int64_t r = row; r < row + rows; ++r, sums += LANES)
            store(grads[0] + r * channels + c, load(sums) + changes.get(r, c));
        },
        grads[1]);
  }

  // Turns the gradient of y into that of h. Returns sums over rows, [5, channels]: of the gradient g of norm1's result,
  // of g times the distance from the mean; and with GELU's slopes s of s g, of s, of s times the distance.
  std::vector<double> product_back(const Panels& before, const float* norm1, const Rows& hidden, const Panels& after,
                                   const float* norm2, const Panels& changes, const NormGradient& gradient,
                                   float* grad_weight, float* grad_bias) const {
    const PackedWeight packed(weight, channels, channels, false);
    const int64_t pitch = pitch_of_rows(channels), group = 8 * block_rows;
    const Pieces shared({packed.size(), group * pitch});
    float* memory = scratch<Block>(shared.size);
    const Right right = packed.pack(shared.at(memory, 0));
    const Rows grads{shared.at<uint16_t>(memory, 1), 2 * pitch};
    std::vector<float> partial(blocks() * 5 * channels, 0.f), biases(blocks() * channels, 0.f);
    for (int64_t start = 0; start < rows; start += group) {
      const int64_t here = std::min(group, rows - start);
      for_tasks((here + block_rows - 1) / block_rows, true, [&](int64_t task) {
        const int64_t inside = task * block_rows, from = start + inside, block = from / block_rows;
        each(block, [&](int64_t row, int64_t c) {
          Vec value, slope;
          RoundedGelu::both(after.get(row, c), value, slope);
          const Vec g = gradient(Norm(norm2, channels, c), c, changes.get(row, c), value) * slope;
          add_to(&biases[block * channels + c], g);
          store_one(grads.at + (row - start) * grads.pitch + c, g, LANES);
        });
        multiply(rows_of(block), channels, channels, grads.from(inside).left(), right, 0, panels_of(channels),
                 [&](int64_t first, int64_t count, int64_t column, int64_t, const float* sums) {
                   for (int64_t c = column; c < column + COLUMNS; c += LANES, sums += LANES) {
                     const Vec mean = load(norm1 + c);
                     Vec flat{}, along{}, bent{}, slopes{}, leaning{};
                     by_images(map.pixels(), from + first, count,
                               [&](int64_t image, int64_t row, int64_t rows, int64_t) {
                                 const float part = of_image(image);
                                 for (int64_t r = row; r < row + rows; ++r) {
                                   const Vec change = load(sums + r * COLUMNS), g = change * part;
                                   Vec value, slope;
                                   RoundedGelu::both(before.get(from + first + r, c), value, slope);
                                   flat += g, along += g * (value - mean);
                                   bent += slope * g, slopes += slope, leaning += slope * (value - mean);
                                   changes.put(from + first + r, c, change);
                                 }
                               });
                     float* to = &partial[block * 5 * channels + c];
                     for (const Vec& sum : {flat, along, bent, slopes, leaning}) add_to(to, sum), to += channels;
                   }
                 });
      });
      product_over_rows(channels, channels, here, grads, hidden.from(start), start > 0, grad_weight);
    }
    const std::vector<double> sums = totals(biases, 1);
    if (bias2) std::copy(sums.begin(), sums.end(), grad_bias);
    return totals(partial, 5);
  }
};

Panels panels_at(Tensor& x, int64_t rows) { return {static_cast<uint16_t*>(x.data()), rows}; }

}  // namespace

// The results after y are for the gradient.
static Tensors convmixer_block(const Tensor& X, const Tensor& Depthwise, const MaybeTensor& Bias1, const Tensor& Mean1,
                               const Tensor& Variance1, const Tensor& NormWeight1, const Tensor& NormBias1,
                               const Tensor& Weight, const MaybeTensor& Bias2, const Tensor& Mean2,
                               const Tensor& Variance2, const Tensor& NormWeight2, const Tensor& NormBias2,
                               const MaybeTensor& Share, bool training, float momentum, float epsilon) {
  const Shape shape = sizes("x", X, 4);
  const Block b(shape, Depthwise, Bias1, Weight, Bias2, Share);
  const NormArguments first(Mean1, Variance1, NormWeight1, NormBias1, b.channels);
  const NormArguments second(Mean2, Variance2, NormWeight2, NormBias2, b.channels);
  const auto type = paddle::DataType::BFLOAT16;
  Tensor Y = empty(shape), Norm1 = empty({4, b.channels}), Norm2 = empty({4, b.channels});
  Tensor Input = empty(b.kept_shape(), type), Before = empty(b.kept_shape(), type);
  Tensor Hidden = empty({b.rows, b.channels}, type), After = empty(b.kept_shape(), type);
  const Panels input = panels_at(Input, b.rows), before = panels_at(Before, b.rows), after = panels_at(After, b.rows);
  Statistics<RoundedGelu> inner(before, b.channels, b.map.pixels(), training);
  Statistics<RoundedGelu> outer(after, b.channels, b.block_rows, training);
  b.convolve(floats("x", X), input, before, inner);
  first.write(inner, momentum, epsilon, Norm1.data<float>());
  b.product(input, before, Norm1.data<float>(), {static_cast<uint16_t*>(Hidden.data()), b.channels}, after, outer);
  second.write(outer, momentum, epsilon, Norm2.data<float>());
  b.write(after, Norm2.data<float>(), Y.data<float>());
  return {Y, Norm1, Norm2, Input, Before, Hidden, After};
}

static Tensors convmixer_block_gradient(const Tensor& Depthwise, const MaybeTensor& Bias1, const Tensor& Weight,
                                        const MaybeTensor& Bias2, const MaybeTensor& Share, const Tensor& Norm1,
                                        const Tensor& Norm2, const Tensor& Input, const Tensor& Before,
                                        const Tensor& Hidden, const Tensor& After, const Tensor& GradY, bool training,
                                        float, float) {
  const char* kept = "what was kept";
  const Shape shape = sizes("grad", GradY, 4), norm{4, shape[3]};
  const Block b(shape, Depthwise, Bias1, Weight, Bias2, Share);
  Tensors grads{empty(shape),        empty_like(Depthwise), Tensor(), empty({b.channels}),
                empty({b.channels}), empty_like(Weight),    Tensor(), empty({b.channels}),
                empty({b.channels})};
  if (Bias1) grads[2] = empty_like(*Bias1);
  if (Bias2) grads[6] = empty_like(*Bias2);
  std::vector<float*> at;
  for (Tensor& grad : grads) at.push_back(grad.initialized() ? grad.data<float>() : nullptr);
  b.backward({rounded_numbers(kept, Input, b.kept_shape()), b.rows},
             {rounded_numbers(kept, Before, b.kept_shape()), b.rows}, floats("norm", Norm1, norm),
             {rounded_numbers(kept, Hidden, {b.rows, b.channels}), b.channels},
             {rounded_numbers(kept, After, b.kept_shape()), b.rows}, floats("norm", Norm2, norm), floats("grad", GradY),
             training, at.data());
  return grads;
}

#define ATTRIBUTES {"training: bool", "momentum: float", "epsilon: float"}

OPERATOR(convmixer_block, convmixer_block,
         .Inputs({"X", "Depthwise", Optional("Bias1"), "Mean1", "Variance1", "NormWeight1", "NormBias1", "Weight",
                  Optional("Bias2"), "Mean2", "Variance2", "NormWeight2", "NormBias2", Optional("Share")})
             .Outputs({"Y", "Norm1", "Norm2", "Input", "Before", "Hidden", "After"})
             .Attrs(ATTRIBUTES));
GRADIENT(convmixer_block, convmixer_block_gradient,
         .Inputs({"Depthwise", Optional("Bias1"), "Weight", Optional("Bias2"), Optional("Share"), "Norm1", "Norm2",
                  "Input", "Before", "Hidden", "After", Grad("Y")})
             .Outputs({Grad("X"), Grad("Depthwise"), Grad(Optional("Bias1")), Grad("NormWeight1"), Grad("NormBias1"),
                       Grad("Weight"), Grad(Optional("Bias2")), Grad("NormWeight2"), Grad("NormBias2")})
             .Attrs(ATTRIBUTES));
#endif
