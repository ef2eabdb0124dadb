// Products of operands rounded to bfloat16 whose results go on in cache: for operators that do several things at once.
//
// An operand holds pairs of numbers that follow each other along the inner dimension. A left operand is rows of such
// pairs, as a matrix of bfloat16 lies in memory; a right operand has for each pair of rows the columns side by side.

#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "slices.h"
#include "vectors.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HYBRID_BFLOAT16
#include <immintrin.h>

namespace bfloat16 {

#if defined(MAY_USE_AMX) && defined(__AMX_BF16__)
#define HYBRID_AMX
constexpr int64_t ROWS = 32;        // of a tile: with the columns, all eight registers of AMX
constexpr int64_t BLOCK_TILES = 4;  // of the rows of a task
#else
constexpr int64_t ROWS = 14;        // of a tile: 14 × 2 vectors of sums, two of columns, one of a pair
constexpr int64_t BLOCK_TILES = 8;  // of the rows of a task
#endif
constexpr int64_t COLUMNS = 32;  // of a tile

struct Matrix {
  const float* at;
  int64_t pitch;
  bool transposed;  // stored with the inner dimension first (left operand) or last (right operand)
};

// Up to COLUMNS columns and `depth` of the right operand: for each pair, 32 columns side by side.
void pack_right(const Matrix& b, int64_t column, int64_t columns, int64_t inner, int64_t depth, __m512i* to);

// The left operand's rows of pairs, and the right operand's pairs of rows; steps in numbers of 4 bytes.
struct Left {
  const int32_t* at;
  int64_t row_step;
};
struct Right {
  const int32_t* at;
  int64_t pair_step, panel_step;
};

// Computes tiles of products, of up to ROWS rows and COLUMNS columns, into c, or adds them to it.
class Tiles {
 public:
  void multiply(int64_t rows, int64_t columns, int64_t pairs, const Left& a, const int32_t* b, int64_t pair_step,
                bool add, float* c, int64_t pitch);
#ifdef HYBRID_AMX
  ~Tiles();

 private:
  void configure(int64_t rows);
  int64_t configured_ = 0;
#endif
};

inline __mmask16 first(int64_t count) { return __mmask16(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1); }
inline __mmask32 first32(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

inline __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Up to 32 neighbours as two vectors, and back.
struct Two {
  Vec low, high;
};
inline Two load_two(const float* p, int64_t count) {
  return {(Vec)_mm512_maskz_loadu_ps(first(count), p), (Vec)_mm512_maskz_loadu_ps(first(count - 16), p + 16)};
}
inline void store_two(float* p, Two v, int64_t count) {
  _mm512_mask_storeu_ps(p, first(count), (__m512)v.low);
  _mm512_mask_storeu_ps(p + 16, first(count - 16), (__m512)v.high);
}
inline __m512i rounded(Two v) { return rounded((__m512)v.low, (__m512)v.high); }
inline Two widened(__m512i v) {
  const auto wide = [](__m256i half) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16); };
  return {wide(_mm512_castsi512_si256(v)), wide(_mm512_extracti64x4_epi64(v, 1))};
}
inline __m512i load_rounded(const uint16_t* p, int64_t count) { return _mm512_maskz_loadu_epi16(first32(count), p); }
inline void store_rounded(uint16_t* p, __m512i v, int64_t count) { _mm512_mask_storeu_epi16(p, first32(count), v); }

// Numbers of 4 bytes from row to row: an odd number of cache lines, lest rows crowd few cache sets.
inline int64_t pitch_of_rows(int64_t columns) { return ((columns + 31) / 32 | 1) * 16; }
inline int64_t pitch_of_pairs(int64_t columns) { return (columns + 31) / 32 * 32 + 16; }

struct Nothing {
  template <class... Arguments>
  void operator()(Arguments...) const {}
};

// Calls finish(row, rows, column, columns, sums) for each tile of [m, n] in the columns of the panels given, `sums`
// being [ROWS][COLUMNS] in the first cache. Before its product, fetch(row, rows, column) may ask for what finish reads.
template <class Finish, class Fetch = Nothing>
inline void multiply(int64_t m, int64_t n, int64_t k, const Left& a, const Right& b, int64_t from_panel,
                     int64_t to_panel, Finish finish, Fetch fetch = {}) {
  alignas(64) float sums[ROWS * COLUMNS];
  Tiles tiles;
  for (int64_t panel = from_panel; panel < to_panel; ++panel) {
    const int64_t column = panel * COLUMNS, columns = std::min(n - column, COLUMNS);
    for (int64_t row = 0; row < m; row += ROWS) {
      const int64_t rows = std::min(m - row, ROWS);
      fetch(row, rows, column);
      tiles.multiply(rows, COLUMNS, (k + 1) / 2, {a.at + row * a.row_step, a.row_step}, b.at + panel * b.panel_step,
                     b.pair_step, false, sums, COLUMNS);
      finish(row, rows, column, columns, sums);
    }
  }
}

inline int64_t panels_of(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; }

// Scratch memory of 4-byte numbers, cut into pieces of whole cache lines.
struct Pieces {
  std::vector<int64_t> starts;
  int64_t size = 0;
  explicit Pieces(std::initializer_list<int64_t> sizes) {
    for (const int64_t each : sizes) starts.push_back(size), size += (each + 15) / 16 * 16;
  }
  template <class T = int32_t>
  T* at(float* memory, int64_t i) const {
    return reinterpret_cast<T*>(memory + starts[i]);
  }
};

// A weight [inner, outer], stored so or transposed, as the right operand of products.
struct PackedWeight {
  Matrix matrix;
  int64_t inner, outer, panel;
  PackedWeight(const float* weight, int64_t inner, int64_t outer, bool transposed)
      : matrix{weight, transposed ? inner : outer, transposed},
        inner(inner),
        outer(outer),
        panel((inner + 1) / 2 * COLUMNS) {}
  int64_t size() const { return panels_of(outer) * panel; }
  Right pack(int32_t* to) const {
    for_tasks(panels_of(outer), size() > SERIAL_FLOATS, [=, this_ = *this](int64_t i) {
      pack_right(this_.matrix, i * COLUMNS, std::min(COLUMNS, this_.outer - i * COLUMNS), 0, this_.inner,
                 reinterpret_cast<__m512i*>(to + i * this_.panel));
    });
    return right(to);
  }
  // In scratch memory of `Owner`.
  template <class Owner>
  Right pack() const {
    return pack(reinterpret_cast<int32_t*>(scratch<Owner>(size())));
  }
  Right right(const int32_t* packed) const { return {packed, COLUMNS, panel}; }
};

// Rows rounded to bfloat16; the pitch in numbers of 2 bytes, even.
struct Rows {
  uint16_t* at;
  int64_t pitch;
  Left left() const { return {reinterpret_cast<const int32_t*>(at), pitch / 2}; }
  Rows from(int64_t row, int64_t column = 0) const { return {at + row * pitch + column, pitch}; }
  Two load(int64_t row, int64_t column, int64_t count) const {
    return widened(load_rounded(at + row * pitch + column, count));
  }
  void fetch(int64_t row, int64_t rows, int64_t column) const {
    ::fetch<const uint16_t>(at + row * pitch + column, rows, pitch);
  }
  void store(int64_t row, int64_t column, Two v, int64_t count) const {
    store_rounded(at + row * pitch + column, rounded(v), count);
  }
};

// 16 numbers of a row.
inline Vec load_one(const uint16_t* p, int64_t count) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), p)), 16);
}
inline void store_one(uint16_t* p, Vec v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first(count), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}

// Rows of a task: up to BLOCK_TILES tiles, in an even number of tasks of about the same size.
inline int64_t block_of(int64_t rows) {
  const int64_t tiles = (rows + ROWS - 1) / ROWS, tasks = (tiles + 2 * BLOCK_TILES - 1) / (2 * BLOCK_TILES) * 2;
  return (tiles + tasks - 1) / tasks * ROWS;
}

// Rows in blocks, one for each task.
struct Blocks {
  int64_t rows, block_rows;
  explicit Blocks(int64_t rows) : rows(rows), block_rows(block_of(rows)) {}
  int64_t blocks() const { return (rows + block_rows - 1) / block_rows; }
  int64_t rows_of(int64_t block) const { return std::min(block_rows, rows - block * block_rows); }
};

constexpr int64_t GROUP = 896;  // rows whose products over the rows are formed together

// Calls finish(row, rows, column, columns, sums) for each tile of the product of rows and a weight.
template <class Finish>
inline void product_of_rows(int64_t rows, const Rows& x, const PackedWeight& weight, const int32_t* packed,
                            Finish finish) {
  const Blocks blocks(rows);
  for_tasks(blocks.blocks(), rows * weight.inner * weight.outer > SERIAL_FLOATS, [&](int64_t task) {
    const int64_t from = task * blocks.block_rows;
    multiply(blocks.rows_of(task), weight.outer, weight.inner, x.from(from).left(), weight.right(packed), 0,
             panels_of(weight.outer),
             [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums) {
               finish(from + row, rows, column, columns, sums);
             });
  });
}

// to [m, n] = sum over the rows of x [rows, m] and y [rows, n], in steps of GROUP rows; added to `to` where `add`.
void product_over_rows(int64_t m, int64_t n, int64_t rows, const Rows& x, const Rows& y, bool add, float* to);

}  // namespace bfloat16
#endif
