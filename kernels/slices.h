// Rows of channels, [rows, columns], shared out in slices that depend on the shape alone. Each slice has its own sums,
// which are added in order, so that the number of threads changes no bit.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <vector>

#include "vectors.h"

constexpr int64_t MAX_SLICES = 64;
constexpr int64_t SLICE_FLOATS = 4096;      // the least that is worth a slice
constexpr int64_t SERIAL_FLOATS = 1 << 16;  // below this threads cost more than they give

inline int64_t slices_of(int64_t rows, int64_t columns) {
  return std::clamp<int64_t>(rows * columns / SLICE_FLOATS, 1, std::min(rows, MAX_SLICES));
}

// Runs body(slice, first row, end) for every slice of the rows.
template <class Body>
inline void for_slices(int64_t rows, int64_t columns, Body body) {
  const int64_t slices = slices_of(rows, columns);
  std::atomic<int64_t> next{0};
#pragma omp parallel if (rows * columns > SERIAL_FLOATS)
  for (int64_t s; (s = next++) < slices;) body(s, rows * s / slices, rows * (s + 1) / slices);
}

// `count` sums over the rows, [columns] each, by slices.
struct Sums {
  int64_t columns, slices, count;
  std::vector<float> partial;
  Sums(int64_t rows, int64_t columns, int64_t count)
      : columns(columns), slices(slices_of(rows, columns)), count(count), partial(slices * count * columns, 0.f) {}
  float* at(int64_t slice, int64_t which) { return &partial[(slice * count + which) * columns]; }
  void write(int64_t which, float* out) {
    for (int64_t c = 0; c < columns; ++c) {
      double total = 0;
      for (int64_t s = 0; s < slices; ++s) total += at(s, which)[c];
      out[c] = float(total);
    }
  }
};

// A flat array as rows of SLICE_FLOATS, the last one shorter: body(offset, get, put) for each vector.
template <class Body>
inline void for_all(int64_t size, Body body) {
  for_slices((size + SLICE_FLOATS - 1) / SLICE_FLOATS, SLICE_FLOATS, [&](int64_t, int64_t from, int64_t to) {
    const int64_t start = from * SLICE_FLOATS;
    for_vectors(std::min(to * SLICE_FLOATS, size) - start,
                [&](int64_t i, auto get, auto put) { body(start + i, get, put); });
  });
}

// Runs body(task) for every task on all threads where the work is `worth` it. An exception must not leave a thread:
// that memory ran out is raised at the end.
template <class Body>
inline void for_tasks(int64_t tasks, bool worth, Body body) {
  const int64_t share = tasks / (16 * omp_get_max_threads()) + 1;  // each time: an atomic waits for all stores
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
#pragma omp parallel if (worth)
  for (int64_t start; (start = next.fetch_add(share)) < tasks;)
    for (int64_t task = start; task < std::min(start + share, tasks); ++task) {
      try {
        body(task);
      } catch (...) {
        failed = true;
      }
    }
  if (failed) throw std::bad_alloc();
}
