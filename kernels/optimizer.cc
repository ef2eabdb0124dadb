// One step over all tensors of a list: Adam, momentum, the moving average, and sums of squares, float32.
//
// Paddle's run tensor by tensor, at many times the cost of the arithmetic where tensors are small. The order of
// operations and what is rounded where are those of Paddle's operators (paddle/phi/kernels/cpu/adam_kernel.cc,
// adamw_kernel.cc, funcs/jit/gen/adam.cc, adamw.cc), whose AVX-512 code multiplies and adds in one.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "operator.h"
#include "slices.h"

namespace {

constexpr int64_t PIECE_FLOATS = 8192;

inline float multiply_add(float a, float b, float c) {
#ifdef __AVX512F__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Runs body(piece, tensor, first number, end) for all pieces of tensors, none of which reaches into a second tensor.
template <class Body>
void for_pieces(const Tensors& tensors, const std::vector<int64_t>& first, Body body) {
  const int64_t pieces = first.back();
  for_tasks(pieces, pieces * PIECE_FLOATS > SERIAL_FLOATS, [&](int64_t piece) {
    const int64_t tensor = std::upper_bound(first.begin(), first.end(), piece) - first.begin() - 1;
    const int64_t from = (piece - first[tensor]) * PIECE_FLOATS;
    body(piece, tensor, from, std::min(from + PIECE_FLOATS, tensors[tensor].numel()));
  });
}

// The number of each tensor's first piece, and the number of all pieces.
std::vector<int64_t> first_pieces(const Tensors& tensors) {
  std::vector<int64_t> first{0};
  for (const Tensor& x : tensors) first.push_back(first.back() + (x.numel() + PIECE_FLOATS - 1) / PIECE_FLOATS);
  return first;
}

// Where the numbers of tensors are, to be changed in place. There are as many tensors as in `like` and of the sizes of
// those; of one number each where `single`.
std::vector<float*> places(const char* name, const Tensors& tensors, const Tensors& like, bool single = false) {
  require(tensors.size() == like.size(), "there are ", tensors.size(), " ", name, ", expected ", like.size());
  std::vector<float*> places;
  for (size_t i = 0; i < tensors.size(); ++i)
    places.push_back(const_cast<float*>(some_floats(name, tensors[i], single ? 1 : like[i].numel())));
  return places;
}

// The sum of the squares of all numbers, in float64.
double squares(const Tensors& tensors) {
  const std::vector<float*> numbers = places("gradients", tensors, tensors);
  const std::vector<int64_t> first = first_pieces(tensors);
  std::vector<double> partial(first.back());
  for_pieces(tensors, first, [&](int64_t piece, int64_t t, int64_t from, int64_t to) {
    const float* at = numbers[t];
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = from; i < to; ++i) sum += double(at[i]) * double(at[i]);
    partial[piece] = sum;
  });
  double total = 0;
  for (const double part : partial) total += part;
  return total;
}

// What multiplies gradients to bound the norm of them all; 1 where `norm` is 0, no bound.
float clip_factor(const Tensors& gradients, float norm) {
  return norm > 0 ? norm / std::max(float(std::sqrt(squares(gradients))), norm) : 1.f;
}

const float* factors_of(const std::vector<float>& factors, size_t rows, const Tensors& tensors) {
  require(factors.size() == rows * tensors.size(), "there are ", factors.size(), " factors, expected ",
          rows * tensors.size());
  return factors.data();
}

Tensors done() { return {empty({1})}; }  // an operator has a result

}  // namespace

// Factors: learning rates, decay as L2 in the gradient, decay of the parameter itself, [3, count].
static Tensors adam(const Tensors& Parameters, const Tensors& Gradients, const Tensors& Moments1,
                    const Tensors& Moments2, const Tensors& Powers1, const Tensors& Powers2,
                    const std::vector<float>& Factors, float beta1, float beta2, float epsilon, float clip_norm) {
  const int64_t count = Parameters.size();
  const float* factors = factors_of(Factors, 3, Parameters);
  const auto parameters = places("parameters", Parameters, Parameters),
             gradients = places("gradients", Gradients, Parameters);
  const auto moments1 = places("moments", Moments1, Parameters), moments2 = places("moments", Moments2, Parameters);
  const auto powers1 = places("powers", Powers1, Parameters, true),
             powers2 = places("powers", Powers2, Parameters, true);
  const float clip = clip_factor(Gradients, clip_norm);
  std::vector<float> rates(count), epsilons(count);
  for (int64_t t = 0; t < count; ++t) {
    rates[t] = factors[t] * (std::sqrt(1 - *powers2[t]) / (1 - *powers1[t]));
    epsilons[t] = epsilon * std::sqrt(1 - *powers2[t]);
    *powers1[t] *= beta1;
    *powers2[t] *= beta2;
  }
  for_pieces(Parameters, first_pieces(Parameters), [&](int64_t, int64_t t, int64_t from, int64_t to) {
    float* __restrict param = parameters[t];
    const float* __restrict grad = gradients[t];
    float* __restrict moment1 = moments1[t], * __restrict moment2 = moments2[t];
    const float coupled = factors[count + t], decoupled = factors[t] * factors[2 * count + t];
    const float rate = -rates[t], small = epsilons[t];
#pragma omp simd
    for (int64_t i = from; i < to; ++i) {
      const float p = param[i];
      float g = grad[i] * clip;
      g = coupled ? g + p * coupled : g;
      const float m = multiply_add(beta1, moment1[i], (1 - beta1) * g);
      const float v = multiply_add(beta2, moment2[i], (1 - beta2) * (g * g));
      moment1[i] = m;
      moment2[i] = v;
      param[i] = multiply_add(m / (std::sqrt(v) + small), rate, multiply_add(-decoupled, p, p));
    }
  });
  return done();
}

OPERATOR(adam, adam,
         .Inputs({paddle::Vec("Parameters"), paddle::Vec("Gradients"), paddle::Vec("Moments1"), paddle::Vec("Moments2"),
                  paddle::Vec("Powers1"), paddle::Vec("Powers2")})
             .Outputs({"Done"})
             .Attrs({"factors: std::vector<float>", "beta1: float", "beta2: float", "epsilon: float",
                     "clip_norm: float"}));

// Factors: learning rates, and decay as L2 in the gradient, [2, count].
static Tensors momentum(const Tensors& Parameters, const Tensors& Gradients, const Tensors& Velocities,
                        const std::vector<float>& Factors, float kept, float clip_norm) {
  const int64_t count = Parameters.size();
  const float* factors = factors_of(Factors, 2, Parameters);
  const auto parameters = places("parameters", Parameters, Parameters),
             gradients = places("gradients", Gradients, Parameters);
  const auto velocities = places("velocities", Velocities, Parameters);
  const float clip = clip_factor(Gradients, clip_norm);
  for_pieces(Parameters, first_pieces(Parameters), [&](int64_t, int64_t t, int64_t from, int64_t to) {
    float* __restrict param = parameters[t], * __restrict velocity = velocities[t];
    const float* __restrict grad = gradients[t];
    const float rate = factors[t], decay = factors[count + t];
#pragma omp simd
    for (int64_t i = from; i < to; ++i) {
      const float p = param[i];
      float g = grad[i] * clip;
      g = decay ? g + p * decay : g;
      velocity[i] = velocity[i] * kept + g;
      param[i] = p - velocity[i] * rate;
    }
  });
  return done();
}

OPERATOR(momentum, momentum,
         .Inputs({paddle::Vec("Parameters"), paddle::Vec("Gradients"), paddle::Vec("Velocities")})
             .Outputs({"Done"})
             .Attrs({"factors: std::vector<float>", "momentum: float", "clip_norm: float"}));

// Factors of the averages and of the tensors, [2, count]; 0 and 1 copy.
static Tensors average(const Tensors& Averages, const Tensors& Others, const std::vector<float>& Factors) {
  const int64_t count = Averages.size();
  const float* factors = factors_of(Factors, 2, Averages);
  const auto averages = places("averages", Averages, Averages), others = places("tensors", Others, Averages);
  for_pieces(Averages, first_pieces(Averages), [&](int64_t, int64_t t, int64_t from, int64_t to) {
    float* __restrict average = averages[t];
    const float* __restrict tensor = others[t];
    const float kept = factors[t], taken = factors[count + t];
    if (kept == 0.f && taken == 1.f) {
      std::memcpy(average + from, tensor + from, (to - from) * sizeof(float));
      return;
    }
#pragma omp simd
    for (int64_t i = from; i < to; ++i) average[i] = average[i] * kept + tensor[i] * taken;
  });
  return done();
}

OPERATOR(average, average,
         .Inputs({paddle::Vec("Averages"), paddle::Vec("Tensors")})
             .Outputs({"Done"})
             .Attrs({"factors: std::vector<float>"}));

static Tensors sum_squares(const Tensors& Numbers) {
  Tensor Sum = empty({}, paddle::DataType::FLOAT64);
  *Sum.data<double>() = squares(Numbers);
  return {Sum};
}

OPERATOR(sum_squares, sum_squares, .Inputs({paddle::Vec("Tensors")}).Outputs({"Sum"}));
