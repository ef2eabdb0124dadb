// What the sources share, and what Python asks of the library as a whole.

#include <omp.h>

#include "matmul.h"
#include "operator.h"
#include "paddle/phi/api/include/api.h"
#include "vectors.h"

Tensor empty(const Shape& shape, paddle::DataType dtype) {
  return paddle::experimental::empty(shape, dtype, paddle::CPUPlace());
}

extern "C" int openmp_threads() { return omp_get_max_threads(); }

// One line each, "name number": lanes of a vector, whether there are these matrix products, arguments of each operator.
extern "C" const char* describe() {
  static std::string lines;
  lines = "lanes " + std::to_string(LANES) + "\nonednn " + std::to_string(has_product(false)) + "\nbfloat16 " +
          std::to_string(has_product(true)) + "\n";
  for (const auto& [name, count] : argument_counts()) lines += "operator." + name + " " + std::to_string(count) + "\n";
  return lines.c_str();
}
