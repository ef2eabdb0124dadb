// What the operators share with Paddle: tensors as arguments and results, and errors instead of damaged memory.
//
// A function of an operator takes tensors, named with a capital, and attributes. It gets the numbers of a tensor from
// `floats`, which refuses all but float32, dense, contiguous tensors of the CPU of the shape that it expects, hence a
// wrong argument raises. Paddle makes strided inputs contiguous before. OPERATOR and GRADIENT register the functions.

#pragma once

#include <new>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "paddle/common/ddim.h"
#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/api/include/tensor.h"

using paddle::Grad;
using paddle::Optional;
using paddle::Tensor;
using MaybeTensor = paddle::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Shape = std::vector<int64_t>;

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "[") << shape[i];
  return out << (shape.empty() ? "[]" : "]");
}

// Raises an error with the parts of its message, put together only then.
template <class... Parts>
inline void require(bool fulfilled, const Parts&... parts) {
  if (fulfilled) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// The shape of a tensor of at least `least` axes, none of them 0.
inline Shape sizes(const char* name, const Tensor& x, size_t least) {
  require(x.initialized() && x.is_dense_tensor(), name, " is not a tensor");
  const Shape shape = x.shape();
  require(shape.size() >= least && x.numel() > 0, name, " has the shape ", shape);
  return shape;
}

// Whether the numbers of a tensor lie one after the other: Tensor::is_contiguous, which Paddle 2.6 lacks.
inline bool is_contiguous(const Tensor& x) {
  const auto &shape = x.dims(), &strides = x.strides();
  int64_t step = 1;
  for (int axis = shape.size() - 1; axis >= 0; step *= shape[axis--]) {
    if (shape[axis] != 1 && strides[axis] != step) return false;
  }
  return true;
}

// The numbers of a tensor, of any shape.
inline const float* floats(const char* name, const Tensor& x) {
  require(x.initialized() && x.is_dense_tensor() && x.is_cpu() && x.dtype() == paddle::DataType::FLOAT32 &&
              is_contiguous(x),
          name, " is not a contiguous float32 tensor on the CPU");
  return x.data<float>();
}

inline const float* floats(const char* name, const Tensor& x, const Shape& shape) {
  const float* numbers = floats(name, x);
  const Shape found = x.shape();
  require(found == shape, name, " has the shape ", found, ", expected ", shape);
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
  require(x->numel() == count, name, " has ", x->numel(), " numbers, expected ", count);
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

template <class... Arguments>
int count(Tensors (*)(Arguments...)) {
  return sizeof...(Arguments);
}

// Functions that register an operator and its gradient with Paddle, and return its number of arguments, which Paddle
// does not check. Python calls them at the operator's first use. PD_BUILD_OP would register all at once, but each call
// of a custom operator takes longer the more of them Paddle knows.
#define OPERATOR(name, function, ...)                                                     \
  extern "C" int register_##name() {                                                      \
    paddle::OpMetaInfoBuilder("hybrid_" #name, 0).SetKernelFn(run<function>) __VA_ARGS__; \
    return count(function);                                                               \
  }
#define GRADIENT(name, function, ...)                                                     \
  extern "C" void register_##name##_gradient() {                                          \
    paddle::OpMetaInfoBuilder("hybrid_" #name, 1).SetKernelFn(run<function>) __VA_ARGS__; \
  }
