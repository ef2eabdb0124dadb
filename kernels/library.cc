// What the sources share, and what Python asks of the library as a whole.

#include <omp.h>

#include "bfloat16.h"
#include "matmul.h"
#include "operator.h"
#include "paddle/phi/api/include/api.h"
#include "vectors.h"

Tensor empty(const Shape& shape, paddle::DataType dtype) {
  return paddle::experimental::empty(shape, dtype, paddle::CPUPlace());
}

extern "C" int openmp_threads() { return omp_get_max_threads(); }

extern "C" int vector_lanes() { return LANES; }
extern "C" int has_onednn() { return has_product(false); }
extern "C" int has_bfloat16() { return has_product(true); }
extern "C" int has_amx() {
#ifdef HYBRID_AMX
  return has_product(true);
#else
  return 0;
#endif
}
