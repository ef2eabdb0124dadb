// Matrix products for the other operators.

#pragma once

#include <cstdint>
#include <stdexcept>

// Row-major, C = alpha op(A) op(B) + beta C, transposed where 'T', as it is where 'N'; as oneDNN's dnnl_sgemm.
typedef int (*Product)(char, char, int64_t, int64_t, int64_t, float, const float*, int64_t, const float*, int64_t,
                       float, float*, int64_t);

bool has_product(bool bfloat16);

// oneDNN's product, or one with operands rounded to bfloat16; raises where there is none.
Product product_of(bool bfloat16);

inline void check_product(int failed) {
  if (failed) throw std::logic_error("a matrix product was refused");
}
