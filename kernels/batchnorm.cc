// Batch norm over maps, float32 [batch, channels, plane], with the activation before or after it, and the residual
// connection around it; and the gradients of all that.
//
// y = share[image] after(norm(before(x))) + residual. Paddle's is one operator for each of these, on one thread, with
// a new map in memory after each. Here two passes go forward (moments, then y) and two backward (sums, then the
// gradient), activations being recomputed in registers. The map is shared out in tasks that depend on its shape
// alone, whose sums are added in order, so that the number of threads changes no bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "activations.h"
#include "operator.h"
#include "slices.h"
#include "vectors.h"

namespace {

constexpr int64_t TASK_FLOATS = 1 << 15;

// A map as units of vectors: a unit is the plane of a channel, or, where planes are smaller than a vector, LANES
// neighbouring numbers of an image, whatever their channels. A slot is what has coefficients and sums of its own: a
// channel, or a place in an image, of which a channel has `places`.
struct Map {
  int64_t batch, channels, plane, row, length, units, places, slots, slices, parts;
  bool narrow;
  Map(int64_t batch, int64_t channels, int64_t plane)
      : batch(batch), channels(channels), plane(plane), row(channels * plane), narrow(plane < LANES) {
    length = narrow ? LANES : plane;
    units = (row + length - 1) / length;
    places = narrow ? plane : 1;
    slots = narrow ? units * LANES : units;
    const int64_t tasks = std::clamp<int64_t>(batch * row / TASK_FLOATS, 1, MAX_SLICES);
    slices = std::min(batch, tasks);
    parts = std::clamp<int64_t>(tasks / slices, 1, units);
  }
  int64_t first_slot(int64_t unit) const { return narrow ? unit * LANES : unit; }
};

// Numbers for each slot: some kinds of coefficients, each a function of the channel.
struct Coefficients {
  std::vector<float> values;
  template <class... Kinds>
  explicit Coefficients(const Map& map, Kinds... kinds) : values(sizeof...(kinds) * map.slots, 0.f) {
    float* at = values.data();
    [[maybe_unused]] const auto fill = [&](auto kind) {
      for (int64_t c = 0; c < map.channels; ++c) std::fill_n(at + c * map.places, map.places, float(kind(c)));
      at += map.slots;
    };
    (fill(kinds), ...);
  }
};

// Calls body(image, offset, get, put, coefficients, sums) for each vector of the map; COUNT coefficients and SUMS sums
// are vectors. In an incomplete vector all that is missing is 0, and so must be what the body adds. Returns the sums
// of each channel, one kind after the other.
template <int COUNT, int SUMS, class Body>
std::vector<double> sweep(const Map& map, const Coefficients& coefficients, Body body) {
  std::vector<double> partial(map.slices * SUMS * map.slots, 0.0);
  const auto sum = [&](int64_t task) __attribute__((flatten)) {
    const int64_t slice = task / map.parts, part = task % map.parts;
    const int64_t from = map.units * part / map.parts, to = map.units * (part + 1) / map.parts;
    float* lanes = SUMS ? scratch((to - from) * SUMS * LANES) : nullptr;
    std::fill_n(lanes, (to - from) * SUMS * LANES, 0.f);
    for (int64_t image = map.batch * slice / map.slices; image < map.batch * (slice + 1) / map.slices; ++image)
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t start = unit * map.length, size = std::min(map.length, map.row - start);
        Vec c[COUNT + 1], sums[SUMS + 1] = {};
        for (int k = 0; k < COUNT; ++k) {
          const float* p = &coefficients.values[k * map.slots + map.first_slot(unit)];
          c[k] = map.narrow ? load(p) : Vec{} + *p;
        }
        const int64_t at = image * map.row + start, whole = size / LANES * LANES;
        const auto get = [](const float* p) { return load(p); };
        const auto put = [](float* p, Vec v) { store(p, v); };
        for (int64_t i = 0; i < whole; i += LANES) body(image, at + i, get, put, c, sums);
        if (const int rest = int(size - whole)) {
          for (int k = 0; k < COUNT; ++k) c[k] = first_lanes(c[k], rest);
          body(
              image, at + whole, [rest](const float* p) { return load_part(p, rest); },
              [rest](float* p, Vec v) { store_part(p, v, rest); }, c, sums);
        }
        for (int k = 0; k < SUMS; ++k) {
          float* sum = lanes + ((unit - from) * SUMS + k) * LANES;
          store(sum, load(sum) + sums[k]);
        }
      }
    for (int64_t unit = from; unit < to; ++unit)
      for (int k = 0; k < SUMS; ++k) {
        double* to = &partial[(slice * SUMS + k) * map.slots + map.first_slot(unit)];
        const float* lane = lanes + ((unit - from) * SUMS + k) * LANES;
        if (map.narrow)
          for (int l = 0; l < LANES; ++l) to[l] = lane[l];
        else
          *to = tree_total(load(lane));
      }
  };
  for_tasks(map.slices * map.parts, map.slices * map.parts > 1, sum);
  for (int64_t slice = 1; slice < map.slices; ++slice)
    for (int64_t i = 0; i < SUMS * map.slots; ++i) partial[i] += partial[slice * SUMS * map.slots + i];
  std::vector<double> totals(SUMS * map.channels, 0.0);
  for (int k = 0; k < SUMS; ++k)
    for (int64_t i = 0; i < map.channels * map.places; ++i)
      totals[k * map.channels + i / map.places] += partial[k * map.slots + i];
  return totals;
}

// Calls body(activation) with that of this number, one of those that stand before norms.
template <class Body>
void with_activation(int64_t number, Body body) {
  if (number == 1)
    body(Gelu());
  else if (number == 2)
    body(ClippedRelu<0>());
  else
    body(Identity());
}

// Calls body(before, after) with the activations of these numbers, one of which is 0, none.
template <class Body>
void with_activations(int64_t before, int64_t after, Body body) {
  if (after == 3)
    body(Identity(), ClippedRelu<6>());
  else if (after == 4)
    body(Identity(), Hardswish());
  else if (after)
    with_activation(after, [&](auto activation) { body(Identity(), activation); });
  else
    with_activation(before, [&](auto activation) { body(activation, Identity()); });
}

// weight / deviation of a channel; a null weight counts as 1.
struct Scale {
  const float *variance, *weight;
  double epsilon;
  double deviation(int64_t c) const { return std::sqrt(variance[c] + epsilon); }
  double operator()(int64_t c) const { return (weight ? weight[c] : 1.0) / deviation(c); }
};

// Mean and (biased) variance of before(x), [channels] each; the running ones move to them:
// running = momentum running + (1 - momentum) new.
void moments(int64_t before, int64_t batch, int64_t channels, int64_t plane, float momentum, const float* x,
             float* mean, float* variance, float* running_mean, float* running_variance) {
  with_activation(before, [=](auto activation) {
    // Distances are those from the mean of the first image: as it is one of the batch, its distance from the others
    // is part of the variance, and no more digits cancel out than `batch` has.
    const Map first(1, channels, plane), map(batch, channels, plane);
    const auto sum = sweep<0, 1>(first, Coefficients(first), [=](int64_t, int64_t at, auto get, auto, Vec*, Vec* sums) {
      sums[0] += activation.value(get(x + at));
    });
    const Coefficients centre(map, [&](int64_t c) { return sum[c] / plane; });
    const auto sums = sweep<1, 2>(map, centre, [=](int64_t, int64_t at, auto get, auto, Vec* c, Vec* sums) {
      const Vec distance = activation.value(get(x + at)) - c[0];
      sums[0] += distance;
      sums[1] += distance * distance;
    });
    const double count = double(batch) * plane;
    for (int64_t c = 0; c < channels; ++c) {
      const double moved = sums[c] / count;
      mean[c] = float(float(sum[c] / plane) + moved);
      variance[c] = float(std::max(sums[channels + c] / count - moved * moved, 0.0));
      running_mean[c] = momentum * running_mean[c] + (1 - momentum) * mean[c];
      running_variance[c] = momentum * running_variance[c] + (1 - momentum) * variance[c];
    }
  });
}

// What both directions get: x [batch, channels, ...], weight and bias [channels], share [batch, 1, ...].
struct Arguments {
  int64_t batch, channels, plane;
  const float *x, *weight, *bias, *share;
  Arguments(const Tensor& X, const MaybeTensor& Weight, const MaybeTensor& Bias, const MaybeTensor& Share,
            int64_t before, int64_t after) {
    const Shape shape = sizes("x", X, 2);
    batch = shape[0], channels = shape[1], plane = X.numel() / (batch * channels);
    x = floats("x", X), share = some_floats("share", Share, batch);
    weight = floats("weight", Weight, {channels}), bias = floats("bias", Bias, {channels});
    require(before >= 0 && before <= 2 && after >= 0 && after <= 4 && !(before && after),
            "there are no such activations beside a batch norm");
  }
};

}  // namespace

// y = share[image] after((before(x) - mean) weight / deviation + bias) + residual. In training mean and variance are
// those of the batch, and the running ones are moved in place.
static Tensors batch_norm(const Tensor& X, const Tensor& RunningMean, const Tensor& RunningVariance,
                          const MaybeTensor& Weight, const MaybeTensor& Bias, const MaybeTensor& Residual,
                          const MaybeTensor& Share, bool training, float momentum, float epsilon, int64_t before,
                          int64_t after, bool) {
  const Arguments s(X, Weight, Bias, Share, before, after);
  const float *x = s.x, *weight = s.weight, *bias = s.bias, *share = s.share;
  const float* running_mean = floats("mean", RunningMean, {s.channels});
  const float* running_variance = floats("variance", RunningVariance, {s.channels});
  const float* residual = floats("residual", Residual, X.shape());
  Tensor Y = empty_like(X), Mean = empty({s.channels}), Variance = empty({s.channels});
  float *y = Y.data<float>(), *mean = Mean.data<float>(), *variance = Variance.data<float>();
  if (training) {
    moments(before, s.batch, s.channels, s.plane, momentum, x, mean, variance, const_cast<float*>(running_mean),
            const_cast<float*>(running_variance));
  } else {
    std::copy_n(running_mean, s.channels, mean);
    std::copy_n(running_variance, s.channels, variance);
  }
  const Map map(s.batch, s.channels, s.plane);
  const Coefficients coefficients(
      map, [=](int64_t c) { return mean[c]; }, Scale{variance, weight, epsilon},
      [=](int64_t c) { return bias ? bias[c] : 0.f; });
  with_activations(before, after, [&](auto first, auto second) {
    sweep<3, 0>(map, coefficients, [=](int64_t image, int64_t at, auto get, auto put, Vec* c, Vec*) {
      Vec v = second.value((first.value(get(x + at)) - c[0]) * c[1] + c[2]);
      if (share) v *= share[image];
      put(y + at, residual ? v + get(residual + at) : v);
    });
  });
  return {Y, Mean, Variance};
}

// In training mean and variance have gradients too. The gradient of the residual is that of y, copied: Paddle adds the
// next one into it. The residual is not kept for this.
static Tensors batch_norm_gradient(const Tensor& X, const Tensor& Mean, const Tensor& Variance,
                                   const MaybeTensor& Weight, const MaybeTensor& Bias, const MaybeTensor& Share,
                                   const Tensor& GradY, bool training, float, float epsilon, int64_t before,
                                   int64_t after, bool residual) {
  const Arguments s(X, Weight, Bias, Share, before, after);
  const float *x = s.x, *weight = s.weight, *bias = s.bias, *share = s.share;
  const float *mean = floats("mean", Mean, {s.channels}), *variance = floats("variance", Variance, {s.channels});
  const float* grad = floats("grad", GradY, X.shape());
  Tensor GradX = empty_like(X), GradWeight, GradBias, GradResidual;
  if (Weight) GradWeight = empty({s.channels});
  if (Bias) GradBias = empty({s.channels});
  if (residual) GradResidual = empty_like(X);
  float *grad_x = GradX.data<float>(), *grad_weight = Weight ? GradWeight.data<float>() : nullptr;
  float* grad_bias = Bias ? GradBias.data<float>() : nullptr;
  float* grad_residual = residual ? GradResidual.data<float>() : nullptr;
  const Map map(s.batch, s.channels, s.plane);
  const Scale scale{variance, weight, epsilon};
  const auto centre = [=](int64_t c) { return mean[c]; };
  const auto shift = [=](int64_t c) { return bias ? bias[c] : 0.f; };
  with_activations(before, after, [&](auto first, auto second) {
    // The gradient of what the norm gives, from that of y.
    const auto inner = [=](int64_t image, Vec g, Vec distance, Vec* c) {
      if (share) g *= share[image];
      return g * second.slope(distance * c[1] + c[2]);
    };
    std::vector<double> sums(2 * s.channels, 0.0);
    if (training || grad_weight || grad_bias)
      sums = sweep<3, 2>(map, Coefficients(map, centre, scale, shift),
                         [=](int64_t image, int64_t at, auto get, auto, Vec* c, Vec* sums) {
                           const Vec distance = first.value(get(x + at)) - c[0];
                           const Vec g = inner(image, get(grad + at), distance, c);
                           sums[0] += g;
                           sums[1] += g * distance;
                         });
    for (int64_t c = 0; c < s.channels; ++c) {
      if (grad_weight) grad_weight[c] = float(sums[s.channels + c] / scale.deviation(c));
      if (grad_bias) grad_bias[c] = float(sums[c]);
    }
    const double share_of_one = training ? 1.0 / (double(s.batch) * s.plane) : 0.0;
    const auto flat = [&](int64_t c) { return share_of_one * sums[c]; };
    const auto along = [&](int64_t c) { return share_of_one * sums[s.channels + c] / (variance[c] + double(epsilon)); };
    sweep<5, 0>(map, Coefficients(map, centre, scale, shift, flat, along),
                [=](int64_t image, int64_t at, auto get, auto put, Vec* c, Vec*) {
                  Vec value, slope;
                  first.both(get(x + at), value, slope);
                  const Vec distance = value - c[0], g = get(grad + at);
                  put(grad_x + at, (inner(image, g, distance, c) - c[3] - distance * c[4]) * c[1] * slope);
                  if (grad_residual) put(grad_residual + at, g);
                });
  });
  return {GradX, GradWeight, GradBias, GradResidual};
}

#define ATTRIBUTES \
  {"training: bool", "momentum: float", "epsilon: float", "before: int64_t", "after: int64_t", "residual: bool"}

OPERATOR(batch_norm, batch_norm,
         .Inputs({"X", "RunningMean", "RunningVariance", Optional("Weight"), Optional("Bias"), Optional("Residual"),
                  Optional("Share")})
             .Outputs({"Y", "Mean", "Variance"})
             .Attrs(ATTRIBUTES));
GRADIENT(batch_norm, batch_norm_gradient,
         .Inputs({"X", "Mean", "Variance", Optional("Weight"), Optional("Bias"), Optional("Share"), Grad("Y")})
             .Outputs({Grad("X"), Grad(Optional("Weight")), Grad(Optional("Bias")), Grad(Optional("Residual"))})
             .Attrs(ATTRIBUTES));
