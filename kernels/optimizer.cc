// One step over all tensors of a list: Adam, momentum, the moving average, and sums of squares, float32.
//
// Paddle's run tensor by tensor, at many times the cost of the arithmetic where tensors are small. The order of
// operations and what is rounded where are those of Paddle's operators (paddle/phi/kernels/cpu/adam_kernel.cc,
// adamw_kernel.cc, funcs/jit/gen/adam.cc, adamw.cc), whose AVX-512 code multiplies and adds in one.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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
void for_pieces(const std::vector<int64_t>& first, const int64_t* sizes, Body body) {
  const int64_t pieces = first.back();
  std::atomic<int64_t> next{0};
#pragma omp parallel if (pieces * PIECE_FLOATS > SERIAL_FLOATS)
  for (int64_t piece; (piece = next++) < pieces;) {
    const int64_t tensor = std::upper_bound(first.begin(), first.end(), piece) - first.begin() - 1;
    const int64_t from = (piece - first[tensor]) * PIECE_FLOATS;
    body(piece, tensor, from, std::min(from + PIECE_FLOATS, sizes[tensor]));
  }
}

// The number of each tensor's first piece, and the number of all pieces.
std::vector<int64_t> first_pieces(int64_t count, const int64_t* sizes) {
  std::vector<int64_t> first(count + 1, 0);
  for (int64_t t = 0; t < count; ++t) first[t + 1] = first[t] + (sizes[t] + PIECE_FLOATS - 1) / PIECE_FLOATS;
  return first;
}

}  // namespace

// addresses: parameters, gradients, first and second moments, powers of beta1 and beta2, [6, count]; factors: learning
// rates, decay as L2 in the gradient, decay of the parameter itself, [3, count].
extern "C" int adam_step(int64_t count, const int64_t* sizes, float* const* addresses, const float* factors,
                         float beta1, float beta2, float epsilon, float clip) {
  return guarded([=] {
    std::vector<float> rates(count), epsilons(count);
    for (int64_t t = 0; t < count; ++t) {
      float &power1 = *addresses[4 * count + t], &power2 = *addresses[5 * count + t];
      rates[t] = factors[t] * (std::sqrt(1 - power2) / (1 - power1));
      epsilons[t] = epsilon * std::sqrt(1 - power2);
      power1 *= beta1;
      power2 *= beta2;
    }
    for_pieces(first_pieces(count, sizes), sizes, [&](int64_t, int64_t t, int64_t from, int64_t to) {
      float* __restrict param = addresses[t];
      const float* __restrict grad = addresses[count + t];
      float *__restrict moment1 = addresses[2 * count + t], *__restrict moment2 = addresses[3 * count + t];
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
  });
}

// addresses: parameters, gradients, velocities, [3, count]; factors: learning rates, decay as L2 in the gradient.
extern "C" int momentum_step(int64_t count, const int64_t* sizes, float* const* addresses, const float* factors,
                             float momentum, float clip) {
  return guarded([=] {
    for_pieces(first_pieces(count, sizes), sizes, [=](int64_t, int64_t t, int64_t from, int64_t to) {
      float *__restrict param = addresses[t], *__restrict velocity = addresses[2 * count + t];
      const float* __restrict grad = addresses[count + t];
      const float rate = factors[t], decay = factors[count + t];
#pragma omp simd
      for (int64_t i = from; i < to; ++i) {
        const float p = param[i];
        float g = grad[i] * clip;
        g = decay ? g + p * decay : g;
        velocity[i] = velocity[i] * momentum + g;
        param[i] = p - velocity[i] * rate;
      }
    });
  });
}

// addresses: averages, tensors, [2, count]; factors: of the averages and of the tensors; 0 and 1 copy.
extern "C" int average_step(int64_t count, const int64_t* sizes, float* const* addresses, const float* factors) {
  return guarded([=] {
    for_pieces(first_pieces(count, sizes), sizes, [=](int64_t, int64_t t, int64_t from, int64_t to) {
      float* __restrict average = addresses[t];
      const float* __restrict tensor = addresses[count + t];
      const float kept = factors[t], taken = factors[count + t];
      if (kept == 0.f && taken == 1.f) {
        std::memcpy(average + from, tensor + from, (to - from) * sizeof(float));
        return;
      }
#pragma omp simd
      for (int64_t i = from; i < to; ++i) average[i] = average[i] * kept + tensor[i] * taken;
    });
  });
}

// The sum of the squares of all numbers, in float64.
extern "C" int sum_squares(int64_t count, const int64_t* sizes, const float* const* addresses, double* total) {
  return guarded([=] {
    const std::vector<int64_t> first = first_pieces(count, sizes);
    std::vector<double> partial(first.back());
    for_pieces(first, sizes, [&](int64_t piece, int64_t t, int64_t from, int64_t to) {
      const float* numbers = addresses[t];
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = from; i < to; ++i) sum += double(numbers[i]) * double(numbers[i]);
      partial[piece] = sum;
    });
    *total = 0;
    for (const double part : partial) *total += part;
  });
}
