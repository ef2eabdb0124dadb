// The convolution of two axes: what Paddle sees of depthwise.h and dense.h.

#include "convolution.h"

#include "dense.h"
#include "depthwise.h"
#include "operator.h"

#ifdef HYBRID_ONEDNN
#define DENSE(call) require(has_product(bfloat16), "this processor has no bfloat16 products"), call
#else
#define DENSE(call) require(false, "this Paddle carries no oneDNN")
#endif

namespace {

// x [batch, channels, height, width] and weight [out_channels, channels / groups, kernel_height, kernel_width]. Zeros
// around the map: `pad_top` and `pad_left` of them, and as many on the other sides as the size of the output needs.
ConvolutionShape shape_of(const Tensor& X, const Tensor& Weight, int64_t out_height, int64_t out_width, int64_t stride,
                          int64_t pad_top, int64_t pad_left, int64_t groups, bool depthwise) {
  const Shape x = sizes("x", X, 4), weight = sizes("weight", Weight, 4);
  require(x.size() == 4 && weight.size() == 4 && groups > 0 && weight[1] * groups == x[1] && weight[0] % groups == 0,
          "a map ", x, " has no convolution of ", groups, " groups by ", weight);
  require(out_height > 0 && out_width > 0 && stride > 0 && pad_top >= 0 && pad_left >= 0,
          "a convolution has no output");
  // What the scratch planes of the depthwise one have room for: no window lies outside of the map.
  require(!depthwise || (groups == x[1] && weight[0] / groups <= LANES && stride <= 2 && pad_top < weight[2] &&
                         pad_left < weight[3] && (out_height - 1) * stride < x[2] + pad_top &&
                         (out_width - 1) * stride < x[3] + pad_left),
          "the depthwise convolution does not take these windows");
  return {x[0],      x[1],      x[2],   x[3],    weight[0], out_height, out_width,
          weight[2], weight[3], stride, pad_top, pad_left,  groups};
}

}  // namespace

static Tensors conv2d(const Tensor& X, const Tensor& Weight, const MaybeTensor& Bias, int64_t out_height,
                      int64_t out_width, int64_t stride, int64_t pad_top, int64_t pad_left, int64_t groups,
                      bool depthwise, bool bfloat16, bool, bool) {
  const ConvolutionShape s = shape_of(X, Weight, out_height, out_width, stride, pad_top, pad_left, groups, depthwise);
  const float *x = floats("x", X), *weight = floats("weight", Weight), *bias = floats("bias", Bias, {s.out_channels});
  Tensor Y = empty({s.batch, s.out_channels, s.out_height, s.out_width});
  if (depthwise)
    depthwise::forward(s, x, weight, bias, Y.data<float>());
  else
    DENSE(dense::forward(s, bfloat16, x, weight, bias, Y.data<float>()));
  return {Y};
}

static Tensors conv2d_gradient(const Tensor& X, const Tensor& Weight, const MaybeTensor& Bias, const Tensor& GradY,
                               int64_t out_height, int64_t out_width, int64_t stride, int64_t pad_top, int64_t pad_left,
                               int64_t groups, bool depthwise, bool bfloat16, bool x_needs_grad,
                               bool weight_needs_grad) {
  const ConvolutionShape s = shape_of(X, Weight, out_height, out_width, stride, pad_top, pad_left, groups, depthwise);
  const float *x = floats("x", X), *weight = floats("weight", Weight);
  const float* grad = floats("grad", GradY, {s.batch, s.out_channels, s.out_height, s.out_width});
  Tensors grads{GradY, GradY, Tensor()};  // what nobody needs must be some tensor
  float *grad_x = nullptr, *grad_weight = nullptr, *grad_bias = nullptr;
  if (x_needs_grad) grad_x = (grads[0] = empty_like(X)).data<float>();
  if (weight_needs_grad) grad_weight = (grads[1] = empty_like(Weight)).data<float>();
  if (Bias) grad_bias = (grads[2] = empty({s.out_channels})).data<float>();
  if (depthwise)
    depthwise::backward(s, x, weight, grad, grad_x, grad_weight, grad_bias);
  else
    DENSE(dense::backward(s, bfloat16, x, weight, grad, grad_x, grad_weight, grad_bias));
  return grads;
}

#define ATTRIBUTES                                                                                            \
  {"out_height: int64_t", "out_width: int64_t", "stride: int64_t", "pad_top: int64_t",   "pad_left: int64_t", \
   "groups: int64_t",     "depthwise: bool",    "bfloat16: bool",  "x_needs_grad: bool", "weight_needs_grad: bool"}

OPERATOR(conv2d, conv2d, .Inputs({"X", "Weight", Optional("Bias")}).Outputs({"Y"}).Attrs(ATTRIBUTES));
GRADIENT(conv2d, conv2d_gradient,
         .Inputs({"X", "Weight", Optional("Bias"), Grad("Y")})
             .Outputs({Grad("X"), Grad("Weight"), Grad(Optional("Bias"))})
             .Attrs(ATTRIBUTES));
