// The inverted bottleneck with squeeze-and-excitation as two operators, with products of operands rounded to bfloat16.
//
// mbconv_expand: maps = depthwise(gelu(norm(w1 x))), and the means of gelu(norm(maps)) for the squeeze. mbconv_project:
// y = w2 (gate gelu(norm(maps))) + b2. x and y are channels-first and float32. All that is as wide as the hidden layer
// is kept in bfloat16 before its batch norm; norms and activations are computed again wherever it is read. Statistics
// are those of the rounded numbers. Sums are float32, and added in an order that depends on the shapes alone, so that
// the number of threads changes no bit.

#include <cstdint>
#include <vector>

#include "activations.h"
#include "map.h"
#include "operator.h"
#include "panels.h"

#ifdef HYBRID_BFLOAT16

using namespace bfloat16;

namespace {

// The first half: x [batch, channels, height, width], weight [hidden, channels, 1, 1], depthwise [hidden, 1, 3, 3].
struct Expand : Blocks {
  Map map, to;
  int64_t channels, hidden, pitch;
  const float *weight, *depthwise;

  Expand(const Map& map, const Tensor& Weight, const Tensor& Depthwise) : Blocks(map.rows()), map(map) {
    const Shape shape = sizes("weight", Weight, 4);
    hidden = shape[0], channels = shape[1], pitch = panels_of(channels) * COLUMNS;
    require(hidden % COLUMNS == 0 && (map.stride == 1 || map.stride == 2), "a hidden layer of ", hidden,
            " channels with a stride of ", map.stride, " is not taken");
    to = map.result();
    weight = floats("weight", Weight, {hidden, channels, 1, 1});
    depthwise = floats("depthwise weight", Depthwise, {hidden, 1, 3, 3});
  }

  // `input` are x's rows.
  void product(const float* x, const Rows& input, const Panels& first, Statistics<>& statistics) const {
    const PackedWeight packed(weight, channels, hidden, true);
    const Right right = packed.pack<Expand>();
    for_tasks(blocks(), true, [&](int64_t block) {
      const int64_t from = block * block_rows;
      to_rows(x, channels, map.pixels(), from, rows_of(block), input.from(from), nullptr);
      multiply(rows_of(block), hidden, channels, input.from(from).left(), right, 0, panels_of(hidden),
               [&](int64_t row, int64_t rows, int64_t column, int64_t, const float* sums) {
                 for (int64_t r = from + row; r < from + row + rows; ++r, sums += COLUMNS)
                   store_rounded(first.at(r, column), rounded(load_two(sums, COLUMNS)), COLUMNS);
                 for (int64_t c = column; c < column + COLUMNS; c += LANES)
                   statistics.add(from + row, from + row + rows, c);
               });
    });
  }

  void convolve(const Panels& first, const float* norm, const Panels& maps, Statistics<>& statistics) const {
    map.convolve(
        hidden, depthwise,
        [&](int64_t row, int64_t c, int64_t) { return RoundedGelu::value(Norm(norm, hidden, c)(first.get(row, c))); },
        [&](int64_t row, int64_t c, int64_t, int64_t rows, const float* sums) {
          for (int64_t r = row; r < row + rows; ++r, sums += LANES) maps.put(r, c, load(sums));
          statistics.add(row, row + rows, c);
        });
  }

  // The means of gelu(norm(maps)) over the pixels, and the sums of its slopes and of these times the distance from the
  // mean, [2, batch, hidden].
  void pool(const Panels& maps, const float* norm, float* pooled, float* slopes) const {
    for_tasks(to.batch * panels_of(hidden), true, [&](int64_t task) {
      const int64_t image = task % to.batch, column = task / to.batch * COLUMNS;
      for (int64_t c = column; c < column + COLUMNS; c += LANES) {
        const Norm n(norm, hidden, c);
        Vec sum{}, flat{}, along{};
        for (int64_t r = image * to.pixels(); r < (image + 1) * to.pixels(); ++r) {
          const Vec v = maps.get(r, c);
          Vec value, slope;
          RoundedGelu::both(n(v), value, slope);
          sum += value, flat += slope, along += slope * (v - n.mean);
        }
        store(pooled + image * hidden + c, sum / float(to.pixels()));
        store(slopes + image * hidden + c, flat), store(slopes + (to.batch + image) * hidden + c, along);
      }
    });
  }

  // `grads` in the order of the operator's gradients.
  void backward(const Rows& input, const Panels& first, const float* norm1, const Panels& maps, const float* norm2,
                const float* slopes, const Panels& grad_maps, const float* grad_norm, const float* grad_pooled,
                bool training, float* const* grads) const {
    std::vector<double> sums(2 * hidden);
    for (int64_t c = 0; c < hidden; ++c) {
      sums[c] = grad_norm[2 * hidden + c], sums[hidden + c] = grad_norm[hidden + c];
      for (int64_t at = c; at < to.batch * hidden; at += hidden) {
        const double each = grad_pooled[at] / to.pixels();
        sums[c] += each * slopes[at], sums[hidden + c] += each * slopes[to.batch * hidden + at];
      }
    }
    const NormGradient second(sums, norm2, to.rows(), training, grads[5], grads[6]);
    Tensor Changes = empty(shape_of(map, hidden), paddle::DataType::BFLOAT16);
    const Panels changes{static_cast<uint16_t*>(Changes.data()), rows};
    std::vector<float> partial(2 * map.batch * hidden, 0.f);
    const float each = 1.f / to.pixels();
    map.convolve_back(
        hidden, depthwise,
        [&](int64_t row, int64_t c, int64_t, float* beside) {
          Vec value, slope;
          RoundedGelu::both(Norm(norm1, hidden, c)(first.get(row, c)), value, slope);
          store(beside, slope);
          return value;
        },
        [&](int64_t row, int64_t c, int64_t) {
          const Norm norm(norm2, hidden, c);
          const Vec v = maps.get(row, c), flat = load(grad_pooled + row / to.pixels() * hidden + c) * each;
          return grad_maps.get(row, c) + second(norm, c, flat * RoundedGelu::slope(norm(v)), v);
        },
        [&](int64_t row, int64_t c, int64_t, int64_t rows, const float* grad, const float* slope) {
          const Vec mean = load(norm1 + c);
          Vec flat{}, along{};
          for (int64_t r = row; r < row + rows; ++r, grad += LANES, slope += LANES) {
            const Vec g = load(grad) * load(slope);
            flat += g, along += g * (first.get(r, c) - mean);
            changes.put(r, c, g);
          }
          float* sums = &partial[2 * (row / map.pixels()) * hidden + c];
          add_to(sums, flat), add_to(sums + hidden, along);
        },
        grads[4]);
    std::fill(sums.begin(), sums.end(), 0.0);
    for (size_t i = 0; i < partial.size(); ++i) sums[i % sums.size()] += partial[i];
    product_back(input, first, norm1, changes, NormGradient(sums, norm1, rows, training, grads[2], grads[3]), grads[0],
                 grads[1]);
  }

  void product_back(const Rows& input, const Panels& first, const float* norm1, const Panels& changes,
                    const NormGradient& gradient, float* grad_x, float* grad_weight) const {
    const PackedWeight packed(weight, hidden, channels, false);
    const int64_t wide = pitch_of_rows(hidden), group = 8 * block_rows;
    const Pieces shared({packed.size(), group * wide});
    float* memory = scratch<Expand>(shared.size);
    const Right right = packed.pack(shared.at(memory, 0));
    const Rows inside{shared.at<uint16_t>(memory, 1), 2 * wide};
    for (int64_t start = 0; start < rows; start += group) {
      const int64_t here = std::min(group, rows - start);
      for_tasks((here + block_rows - 1) / block_rows, true, [&](int64_t task) {
        float* lanes = scratch(floats_of_lanes(channels));
        const int64_t from = task * block_rows, count = std::min(block_rows, here - from);
        over_rows(from, from + count, hidden, [&](int64_t r, int64_t c) {
          const Vec g = gradient(Norm(norm1, hidden, c), c, changes.get(start + r, c), first.get(start + r, c));
          store_one(inside.at + r * inside.pitch + c, g, LANES);
        });
        multiply(count, channels, hidden, inside.from(from).left(), right, 0, panels_of(channels),
                 [&](int64_t row, int64_t rows, int64_t column, int64_t count, const float* sums) {
                   put_lanes(lanes, nullptr, row, rows, column, count, sums);
                 });
        to_maps(lanes, channels, map.pixels(), start + from, count, grad_x);
      });
      product_over_rows(hidden, channels, here, inside, input.from(start), start > 0, grad_weight);
    }
  }
};

// The second half: gate [batch, hidden], weight [channels, hidden, 1, 1], bias [channels], y [batch, channels, ...].
struct Project : Blocks {
  Map map;
  int64_t channels, hidden;
  Panels maps;
  const float *norm, *gate, *weight, *bias;

  Project(const Map& map, const Tensor& Maps, const Tensor& NormTensor, const Tensor& Gate, const Tensor& Weight,
          const MaybeTensor& Bias)
      : Blocks(map.rows()), map(map) {
    const Shape shape = sizes("weight", Weight, 4);
    channels = shape[0], hidden = Maps.shape()[0] * COLUMNS;
    maps = {rounded_numbers("maps", Maps, shape_of(map, hidden)), rows};
    norm = floats("norm", NormTensor, {4, hidden}), gate = floats("gate", Gate, {map.batch, hidden});
    weight = floats("weight", Weight, {channels, hidden, 1, 1}), bias = floats("bias", Bias, {channels});
  }

  void forward(float* y) const {
    const PackedWeight packed(weight, hidden, channels, true);
    const Right right = packed.pack<Project>();
    const int64_t wide = pitch_of_rows(hidden);
    const Pieces own({block_rows * wide, floats_of_lanes(channels)});
    for_tasks(blocks(), true, [&](int64_t block) {
      float* memory = scratch(own.size);
      const Rows inside{own.at<uint16_t>(memory, 0), 2 * wide};
      float* lanes = own.at<float>(memory, 1);
      const int64_t from = block * block_rows, count = rows_of(block);
      over_rows(from, from + count, hidden, [&](int64_t row, int64_t c) {
        const Vec factor = load(gate + row / map.pixels() * hidden + c);
        store_one(inside.at + (row - from) * inside.pitch + c,
                  factor * RoundedGelu::value(Norm(norm, hidden, c)(maps.get(row, c))), LANES);
      });
      multiply(count, channels, hidden, inside.left(), right, 0, panels_of(channels),
               [&](int64_t row, int64_t rows, int64_t column, int64_t count, const float* sums) {
                 put_lanes(lanes, bias, row, rows, column, count, sums);
               });
      to_maps(lanes, channels, map.pixels(), from, count, y);
    });
  }

  void backward(const float* grad, const Panels& grad_maps, float* grad_norm, float* grad_gate, float* grad_weight,
                float* grad_bias) const {
    const PackedWeight packed(weight, channels, hidden, false);
    const int64_t wide = pitch_of_rows(hidden), narrow = pitch_of_rows(channels), group = 8 * block_rows;
    const Pieces shared({packed.size(), group * wide, group * narrow});
    float* memory = scratch<Project>(shared.size);
    const Right right = packed.pack(shared.at(memory, 0));
    const Rows insides{shared.at<uint16_t>(memory, 1), 2 * wide}, grads{shared.at<uint16_t>(memory, 2), 2 * narrow};
    // Sums of a block and an image, which are at block + image: gradients of norm's bias and scale, and of the gate.
    std::vector<float> partial((blocks() + map.batch) * 3 * hidden, 0.f), biases(blocks() * grads.pitch, 0.f);
    for (int64_t start = 0; start < rows; start += group) {
      const int64_t here = std::min(group, rows - start);
      for_tasks((here + block_rows - 1) / block_rows, true, [&](int64_t task) {
        const int64_t inside = task * block_rows, from = start + inside, block = from / block_rows;
        const int64_t count = std::min(block_rows, here - inside);
        to_rows(grad, channels, map.pixels(), from, count, grads.from(inside), &biases[block * grads.pitch]);
        multiply(count, hidden, channels, grads.from(inside).left(), right, 0, panels_of(hidden),
                 [&](int64_t first, int64_t count, int64_t column, int64_t, const float* sums) {
                   for (int64_t c = column; c < column + COLUMNS; c += LANES, sums += LANES) {
                     const Norm n(norm, hidden, c);
                     by_images(
                         map.pixels(), from + first, count, [&](int64_t image, int64_t row, int64_t rows, int64_t) {
                           const Vec factor = load(gate + image * hidden + c);
                           Vec flat{}, along{}, open{};
                           for (int64_t r = row; r < row + rows; ++r) {
                             const Vec v = maps.get(from + first + r, c), g = load(sums + r * COLUMNS);
                             Vec value, slope;
                             RoundedGelu::both(n(v), value, slope);
                             open += g * value;
                             slope *= g * factor;
                             flat += slope, along += slope * (v - n.mean);
                             grad_maps.put(from + first + r, c, slope * n.scale);
                             store_one(insides.at + (inside + first + r) * insides.pitch + c, value * factor, LANES);
                           }
                           float* to = &partial[(block + image) * 3 * hidden + c];
                           add_to(to, flat), add_to(to + hidden, along), add_to(to + 2 * hidden, open);
                         });
                   }
                 });
      });
      product_over_rows(channels, hidden, here, grads, insides, start > 0, grad_weight);
    }
    std::vector<double> sums(2 * hidden, 0.0), gates(hidden), bias_sums(channels, 0.0);
    for (int64_t image = 0; image < map.batch; ++image) {
      std::fill(gates.begin(), gates.end(), 0.0);
      const int64_t last = ((image + 1) * map.pixels() - 1) / block_rows;
      for (int64_t block = image * map.pixels() / block_rows; block <= last; ++block) {
        const float* from = &partial[(block + image) * 3 * hidden];
        for (int64_t c = 0; c < 2 * hidden; ++c) sums[c] += from[c];
        for (int64_t c = 0; c < hidden; ++c) gates[c] += from[2 * hidden + c];
      }
      std::copy(gates.begin(), gates.end(), grad_gate + image * hidden);
    }
    for (int64_t c = 0; c < hidden; ++c) {
      grad_norm[c] = float(-sums[c] * norm[hidden + c]), grad_norm[3 * hidden + c] = 0.f;
      grad_norm[hidden + c] = float(sums[hidden + c]), grad_norm[2 * hidden + c] = float(sums[c]);
    }
    for (int64_t block = 0; block < blocks(); ++block)
      for (int64_t c = 0; c < channels; ++c) bias_sums[c] += biases[block * grads.pitch + c];
    if (bias) std::copy(bias_sums.begin(), bias_sums.end(), grad_bias);
  }
};

}  // namespace

// Maps before the second norm, that norm, [4, hidden], and the means of what comes after it, [batch, hidden]. The other
// results are for the gradient.
static Tensors mbconv_expand(const Tensor& X, const Tensor& Weight, const Tensor& Mean1, const Tensor& Variance1,
                             const Tensor& NormWeight1, const Tensor& NormBias1, const Tensor& Depthwise,
                             const Tensor& Mean2, const Tensor& Variance2, const Tensor& NormWeight2,
                             const Tensor& NormBias2, int64_t stride, bool training, float momentum, float epsilon) {
  const Shape shape = sizes("x", X, 4);
  require(shape.size() == 4, "x has the shape ", shape, ", expected 4 axes");
  const Expand e({shape[0], shape[2], shape[3], stride}, Weight, Depthwise);
  const float* x = floats("x", X, {shape[0], e.channels, shape[2], shape[3]});
  const NormArguments first(Mean1, Variance1, NormWeight1, NormBias1, e.hidden);
  const NormArguments second(Mean2, Variance2, NormWeight2, NormBias2, e.hidden);
  const auto type = paddle::DataType::BFLOAT16;
  Tensor Input = empty({e.rows, e.pitch}, type), First = empty(shape_of(e.map, e.hidden), type);
  Tensor Maps = empty(shape_of(e.to, e.hidden), type), Norm1 = empty({4, e.hidden}), Norm2 = empty({4, e.hidden});
  Tensor Pooled = empty({shape[0], e.hidden}), Slopes = empty({2, shape[0], e.hidden});
  const Panels wide{static_cast<uint16_t*>(First.data()), e.rows};
  const Panels maps{static_cast<uint16_t*>(Maps.data()), e.to.rows()};
  Statistics before(wide, e.hidden, e.block_rows, training), after(maps, e.hidden, e.to.pixels(), training);
  e.product(x, {static_cast<uint16_t*>(Input.data()), e.pitch}, wide, before);
  first.write(before, momentum, epsilon, Norm1.data<float>());
  e.convolve(wide, Norm1.data<float>(), maps, after);
  second.write(after, momentum, epsilon, Norm2.data<float>());
  e.pool(maps, Norm2.data<float>(), Pooled.data<float>(), Slopes.data<float>());
  return {Maps, Norm2, Pooled, Input, First, Norm1, Slopes};
}

// Of the gradient of the norm the rows of scale and bias count: those of the statistics follow from them.
static Tensors mbconv_expand_gradient(const Tensor& Weight, const Tensor& Depthwise, const Tensor& Maps,
                                      const Tensor& Norm2, const Tensor& Input, const Tensor& First,
                                      const Tensor& Norm1, const Tensor& Slopes, const Tensor& GradMaps,
                                      const Tensor& GradNorm, const Tensor& GradPooled, int64_t stride, bool training,
                                      float, float) {
  const Expand e(map_of("what was kept", First, stride), Weight, Depthwise);
  const int64_t batch = e.map.batch, rows = e.to.rows();
  const Shape norm{4, e.hidden}, after = shape_of(e.to, e.hidden);
  Tensors grads{empty({batch, e.channels, e.map.height, e.map.width}), empty_like(Weight)};
  for (int i = 0; i < 2; ++i) grads.push_back(empty({e.hidden}));
  grads.push_back(empty_like(Depthwise));
  for (int i = 0; i < 2; ++i) grads.push_back(empty({e.hidden}));
  std::vector<float*> at;
  for (Tensor& grad : grads) at.push_back(grad.data<float>());
  e.backward({rounded_numbers("what was kept", Input, {e.rows, e.pitch}), e.pitch},
             {rounded_numbers("what was kept", First, shape_of(e.map, e.hidden)), e.rows}, floats("norm", Norm1, norm),
             {rounded_numbers("maps", Maps, after), rows}, floats("norm", Norm2, norm),
             floats("slopes", Slopes, {2, batch, e.hidden}), {rounded_numbers("gradient", GradMaps, after), rows},
             floats("gradient", GradNorm, norm), floats("gradient", GradPooled, {batch, e.hidden}), training,
             at.data());
  return grads;
}

static Tensors mbconv_project(const Tensor& Maps, const Tensor& Norm, const Tensor& Gate, const Tensor& Weight,
                              const MaybeTensor& Bias) {
  const Project p(map_of("maps", Maps, 1), Maps, Norm, Gate, Weight, Bias);
  Tensor Y = empty({p.map.batch, p.channels, p.map.height, p.map.width});
  p.forward(Y.data<float>());
  return {Y};
}

static Tensors mbconv_project_gradient(const Tensor& Maps, const Tensor& Norm, const Tensor& Gate, const Tensor& Weight,
                                       const MaybeTensor& Bias, const Tensor& GradY) {
  const Project p(map_of("maps", Maps, 1), Maps, Norm, Gate, Weight, Bias);
  Tensors grads{empty(Maps.shape(), paddle::DataType::BFLOAT16), empty_like(Norm), empty_like(Gate), empty_like(Weight),
                Bias ? empty_like(*Bias) : Tensor()};
  p.backward(floats("grad", GradY, {p.map.batch, p.channels, p.map.height, p.map.width}),
             {static_cast<uint16_t*>(grads[0].data()), p.rows}, grads[1].data<float>(), grads[2].data<float>(),
             grads[3].data<float>(), Bias ? grads[4].data<float>() : nullptr);
  return grads;
}

#define ATTRIBUTES {"stride: int64_t", "training: bool", "momentum: float", "epsilon: float"}

OPERATOR(mbconv_expand, mbconv_expand,
         .Inputs({"X", "Weight", "Mean1", "Variance1", "NormWeight1", "NormBias1", "Depthwise", "Mean2", "Variance2",
                  "NormWeight2", "NormBias2"})
             .Outputs({"Maps", "Norm2", "Pooled", "Input", "First", "Norm1", "Slopes"})
             .Attrs(ATTRIBUTES));
GRADIENT(mbconv_expand, mbconv_expand_gradient,
         .Inputs({"Weight", "Depthwise", "Maps", "Norm2", "Input", "First", "Norm1", "Slopes", Grad("Maps"),
                  Grad("Norm2"), Grad("Pooled")})
             .Outputs({Grad("X"), Grad("Weight"), Grad("NormWeight1"), Grad("NormBias1"), Grad("Depthwise"),
                       Grad("NormWeight2"), Grad("NormBias2")})
             .Attrs(ATTRIBUTES));
OPERATOR(mbconv_project, mbconv_project, .Inputs({"Maps", "Norm", "Gate", "Weight", Optional("Bias")}).Outputs({"Y"}));
GRADIENT(mbconv_project, mbconv_project_gradient,
         .Inputs({"Maps", "Norm", "Gate", "Weight", Optional("Bias"), Grad("Y")})
             .Outputs({Grad("Maps"), Grad("Norm"), Grad("Gate"), Grad("Weight"), Grad(Optional("Bias"))}));
#endif
