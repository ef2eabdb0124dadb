// What a convolution is.

#pragma once

#include <cstdint>

// All that both directions need.
struct ConvolutionShape {
  int64_t batch, channels, height, width, out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width, stride, pad_top, pad_left, groups;
};
