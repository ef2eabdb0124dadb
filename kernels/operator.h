// What the operators share with Paddle: tensors as arguments and results, and errors instead of damaged memory.
//
// A function of an operator takes tensors, named with a capital, and attributes. It gets the numbers of a tensor from
// `floats`, which refuses all but float32, dense, contiguous tensors of the CPU of the shape that it expects, hence a
// wrong argument raises. Paddle makes strided inputs contiguous before. OPERATOR and GRADIENT register the functions.

#pragma once

#include <map>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/api/include/tensor.h"

using paddle::Grad;
using paddle::Optional;
using paddle::Tensor;
using MaybeTensor = paddle::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Shape = std::vector<int64_t>;

inline std::string text(const Shape& shape) {
  std::string all;
  for (const int64_t size : shape) all += (all.empty() ? "" : ", ") + std::to_string(size);
  return "[" + all + "]";
}

inline void require(bool fulfilled, const std::string& message) {
  if (!fulfilled) throw std::invalid_argument(message);
}

// The shape of a tensor of at least `least` axes, none of them 0.
inline Shape sizes(const char* name, const Tensor& x, size_t least) {
  require(x.initialized() && x.is_dense_tensor(), std::string(name) + " is not a tensor");
  const Shape shape = x.shape();
  require(shape.size() >= least && x.numel() > 0, std::string(name) + " has the shape " + text(shape));
  return shape;
}

// The numbers of a tensor, of any shape.
inline const float* floats(const char* name, const Tensor& x) {
  if (!x.initialized() || !x.is_dense_tensor() || !x.is_cpu() || x.dtype() != paddle::DataType::FLOAT32 ||
      !x.is_contiguous())
    throw std::invalid_argument(std::string(name) + " is not a contiguous float32 tensor on the CPU");
  return x.data<float>();
}

inline const float* floats(const char* name, const Tensor& x, const Shape& shape) {
  const float* numbers = floats(name, x);
  if (x.shape() != shape)
    throw std::invalid_argument(std::string(name) + " has the shape " + text(x.shape()) + ", expected " + text(shape));
  return numbers;
}

// The same of an optional tensor; null where there is none.
inline const float* floats(const char* name, const MaybeTensor& x, const Shape& shape) {
  return x ? floats(name, *x, shape) : nullptr;
}

// `count` numbers in any shape; null where there are none.
inline const float* some_floats(const char* name, const MaybeTensor& x, int64_t count) {
  if (!x) return nullptr;
  const float* numbers = floats(name, *x);
  require(x->numel() == count, std::string(name) + " has " + std::to_string(x->numel()) + " numbers, expected " +
                                   std::to_string(count));
  return numbers;
}

// A new tensor on the CPU, to be filled.
Tensor empty(const Shape& shape, paddle::DataType dtype = paddle::DataType::FLOAT32);
inline Tensor empty_like(const Tensor& x) { return empty(x.shape()); }

// An operator's function for Paddle, which ends the process at exceptions other than its own.
template <auto function>
void run(paddle::CustomOpKernelContext* context) {
  try {
    paddle::KernelFuncImpl<decltype(function), function>::Compute(context);
  } catch (const std::bad_alloc&) {
    PD_THROW("a compiled operator found no memory");
  } catch (const std::logic_error& error) {
    PD_THROW(error.what());
  }
}

// How many arguments each operator has, which Paddle does not check.
inline std::map<std::string, size_t>& argument_counts() {
  static std::map<std::string, size_t> counts;
  return counts;
}

template <class... Arguments>
bool count_arguments(const char* name, Tensors (*)(Arguments...)) {
  argument_counts()[name] = sizeof...(Arguments);
  return true;
}

#define OPERATOR(name, function)                                             \
  static const bool counted_##name = count_arguments(#name, function);       \
  PD_BUILD_OP(hybrid_##name).SetKernelFn(run<function>)
#define GRADIENT(name, function) PD_BUILD_GRAD_OP(hybrid_##name).SetKernelFn(run<function>)
