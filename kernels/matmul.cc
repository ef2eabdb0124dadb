// Matrix products with operands rounded to bfloat16 and sums in float32, for processors that multiply such pairs.
//
// One instruction (AVX512_BF16) multiplies 32 pairs and adds each two products to a float32: twice the work of a
// float32 instruction on AMD's processors, from half the cache. Where the processor has AMX, one instruction multiplies
// 16 rows of 16 pairs by 16 columns. The operands are rounded (to nearest, ties to even) while they are packed
// into blocks that stay in cache. Every number of the result is a sum in an order that depends on the shape alone,
// so that the number of threads changes no bit.

#include "matmul.h"

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "bfloat16.h"
#include "operator.h"
#include "vectors.h"

#ifdef HYBRID_BFLOAT16

namespace bfloat16 {

namespace {

constexpr int64_t PAIRS = 256;                    // of a block of the inner dimension
constexpr int64_t ROW_PITCH = PAIRS + 16;         // pairs; not a power of two, which would crowd few cache sets
constexpr int64_t MOST_ROWS = 392 / ROWS * ROWS;  // of a packed block: 430 KB
constexpr int64_t MOST_COLUMNS = 64 * COLUMNS;    // of a packed block

// 16 neighbours of two rows as pairs (row, next row).
__m512i interleaved(const float* row, const float* next, __mmask16 lanes) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512 low = _mm512_maskz_loadu_ps(lanes, row);
  const __m512 high = next ? _mm512_maskz_loadu_ps(lanes, next) : _mm512_setzero_ps();
  return _mm512_permutexvar_epi16(order, rounded(low, high));
}

// 32 neighbours of a row as 16 pairs.
__m512i paired(const float* row, int64_t count) {
  return rounded(_mm512_maskz_loadu_ps(first(count), row), _mm512_maskz_loadu_ps(first(count - 16), row + 16));
}

void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      t[8 * j + i] = _mm512_shuffle_i32x4(r[8 * j + i], r[8 * j + 4 + i], 0x88);
      t[8 * j + 4 + i] = _mm512_shuffle_i32x4(r[8 * j + i], r[8 * j + 4 + i], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

// Up to ROWS rows and `depth` of the left operand.
void pack_left(const Matrix& a, int64_t row, int64_t rows, int64_t inner, int64_t depth, __m512i* to) {
  const auto at = [=](int64_t r, int64_t k) { return to + (r * ROW_PITCH + k / 2) / 16; };
  for (int64_t r = 0; !a.transposed && r < rows; ++r)
    for (int64_t k = 0; k < depth; k += 32) *at(r, k) = paired(a.at + (row + r) * a.pitch + inner + k, depth - k);
  for (int64_t r = 0; a.transposed && r < rows; r += 16)
    for (int64_t k = 0; k < depth; k += 32) {
      __m512i block[16];
      fetch(a.at + (inner + k + 32) * a.pitch + row + r, std::min<int64_t>(depth - k - 32, 32), a.pitch);
      for (int64_t pair = 0; pair < 16; ++pair) {
        const float* line = a.at + (inner + k + 2 * pair) * a.pitch + row + r;
        const int64_t left = depth - k - 2 * pair;
        block[pair] = left > 0 ? interleaved(line, left > 1 ? line + a.pitch : nullptr, first(rows - r)) : __m512i{};
      }
      transpose(block);
      for (int64_t i = 0; i < 16 && r + i < ROWS; ++i) *at(r + i, k) = block[i];
    }
}

}  // namespace

void pack_right(const Matrix& b, int64_t column, int64_t columns, int64_t inner, int64_t depth, __m512i* to) {
  for (int64_t k = 0; !b.transposed && k < depth; k += 2)
    for (int64_t half = 0; half < 2; ++half) {
      const float* line = b.at + (inner + k) * b.pitch + column + 16 * half;
      to[k + half] = interleaved(line, k + 1 < depth ? line + b.pitch : nullptr, first(columns - 16 * half));
    }
  for (int64_t half = 0; b.transposed && half < 2; ++half) {
    const int64_t left = columns - 16 * half;
    for (int64_t k = 0; k < depth; k += 32) {
      __m512i block[16];
      for (int64_t c = 0; c < 16; ++c)
        block[c] = c < left ? paired(b.at + (column + 16 * half + c) * b.pitch + inner + k, depth - k)
                            : _mm512_setzero_si512();
      transpose(block);
      for (int64_t pair = 0; pair < 16 && k + 2 * pair < depth; ++pair) to[k + 2 * pair + half] = block[pair];
    }
  }
}

#ifdef HYBRID_AMX

namespace {

// What the code before it wrote lies in memory: the compiler's tile instructions do not say that they read it.
void written() { asm volatile("" ::: "memory"); }

struct alignas(64) TileSizes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Up to 16 rows of up to 16 numbers, for a register of AMX: where they stand if they fill it, else copied to `room`.
struct Rectangle {
  const int32_t* at;
  int64_t step;
  Rectangle(const int32_t* from, int64_t row_step, int64_t rows, int64_t filled, int64_t count, __m512i* room)
      : at(from), step(4 * row_step) {
    if (filled == rows && count == 16) return;
    for (int64_t r = 0; r < rows; ++r)
      room[r] = r < filled ? _mm512_maskz_loadu_epi32(first(count), from + r * row_step) : __m512i{};
    written();
    at = reinterpret_cast<const int32_t*>(room), step = 64;
  }
};

}  // namespace

// Registers 0 to 3 hold the sums of two times 16 rows and columns, 4 and 5 the rows, 6 and 7 the columns of 16 pairs.
void Tiles::configure(int64_t rows) {
  if (configured_ == rows) return;
  configured_ = rows;
  TileSizes sizes;
  const int64_t upper = std::min<int64_t>(rows, 16), lower = rows - upper;
  const int64_t heights[] = {upper, upper, lower, lower, upper, lower, 16, 16};
  for (int i = 0; i < 8; ++i)
    if (heights[i]) sizes.rows[i] = uint8_t(heights[i]), sizes.bytes[i] = 64;
  written();
  _tile_loadconfig(&sizes);
}

Tiles::~Tiles() {
  if (configured_) _tile_release();
}

void Tiles::multiply(int64_t rows, int64_t columns, int64_t pairs, const Left& a, const int32_t* b, int64_t pair_step,
                     bool add, float* c, int64_t pitch) {
  const int64_t upper = std::min<int64_t>(rows, 16), lower = rows - upper;
  configure(rows);
  written();
  _tile_zero(0);
  _tile_zero(1);
  if (lower) {
    _tile_zero(2);
    _tile_zero(3);
  }
  __m512i room[4][16];
  for (int64_t k = 0; k < pairs; k += 16) {
    const int64_t count = std::min<int64_t>(pairs - k, 16);
    const Rectangle left(b + k * pair_step, pair_step, 16, count, 16, room[0]);
    const Rectangle right(b + k * pair_step + 16, pair_step, 16, count, 16, room[1]);
    const Rectangle above(a.at + k, a.row_step, upper, upper, count, room[2]);
    _tile_loadd(6, left.at, left.step);
    _tile_loadd(7, right.at, right.step);
    _tile_loadd(4, above.at, above.step);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (lower) {
      const Rectangle below(a.at + 16 * a.row_step + k, a.row_step, lower, lower, count, room[3]);
      _tile_loadd(5, below.at, below.step);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[ROWS * COLUMNS];
  const bool direct = !add && columns == COLUMNS;
  float* to = direct ? c : sums;
  const int64_t step = 4 * (direct ? pitch : COLUMNS);
  _tile_stored(0, to, step);
  _tile_stored(1, to + 16, step);
  if (lower) {
    _tile_stored(2, to + 4 * step, step);
    _tile_stored(3, to + 4 * step + 16, step);
  }
  for (int64_t r = 0; !direct && r < rows; ++r) {
    const Two now = load_two(sums + r * COLUMNS, columns), before = add ? load_two(c + r * pitch, columns) : Two{};
    store_two(c + r * pitch, {before.low + now.low, before.high + now.high}, columns);
  }
}

#else

namespace {

template <int rows, int vectors>
void tile(int64_t columns, int64_t pairs, const Left& left, const int32_t* b, int64_t pair_step, bool add, float* c,
          int64_t pitch) {
  __m512 sums[rows][vectors];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) sums[r][v] = _mm512_setzero_ps();
  const int32_t* a = left.at;
  for (int64_t k = 0; k < pairs; ++k, ++a, b += pair_step) {
    __m512i right[vectors];
    for (int v = 0; v < vectors; ++v) right[v] = _mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 14
    for (int r = 0; r < rows; ++r) {
      const __m512i pair = _mm512_set1_epi32(a[r * left.row_step]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)pair, (__m512bh)right[v]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) {
      float* to = c + r * pitch + 16 * v;
      const __mmask16 lanes = first(columns - 16 * v);
      const __m512 before = add ? _mm512_maskz_loadu_ps(lanes, to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, lanes, _mm512_add_ps(before, sums[r][v]));
    }
}

template <int... rows>
auto choose(int64_t wanted, bool narrow, std::integer_sequence<int, rows...>) {
  static constexpr decltype(&tile<1, 1>) one[] = {tile<rows + 1, 1>...}, two[] = {tile<rows + 1, 2>...};
  return (narrow ? one : two)[wanted - 1];
}

}  // namespace

void Tiles::multiply(int64_t rows, int64_t columns, int64_t pairs, const Left& a, const int32_t* b, int64_t pair_step,
                     bool add, float* c, int64_t pitch) {
  choose(rows, columns <= 16, std::make_integer_sequence<int, ROWS>())(columns, pairs, a, b, pair_step, add, c, pitch);
}

#endif

namespace {

// 32 columns of two rows side by side, in two vectors.
void pair_up(__m512i row, __m512i next, __m512i* left, __m512i* right) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  *left = _mm512_permutex2var_epi16(row, low, next);
  *right = _mm512_permutex2var_epi16(row, _mm512_add_epi16(low, _mm512_set1_epi16(16)), next);
}

}  // namespace

void product_over_rows(int64_t m, int64_t n, int64_t rows, const Rows& x, const Rows& y, bool add, float* to) {
  const int64_t most = std::min(GROUP, rows), left = pitch_of_rows(most), right = pitch_of_pairs(n);
  const Pieces pieces({(m + 31) / 32 * 32 * left, (most + 1) / 2 * right});
  float* memory = scratch<Rows>(pieces.size);
  int32_t *a = pieces.at(memory, 0), *b = pieces.at(memory, 1);
  for (int64_t start = 0; start < rows; start += GROUP) {
    const int64_t here = std::min(GROUP, rows - start);
    for_tasks((here + 31) / 32, here * (m + n) > SERIAL_FLOATS, [&](int64_t task) {
      // 32 columns of two rows, zeros where there are none.
      const auto pair_of = [&](const Rows& from, int64_t columns, int64_t row, int64_t c, __m512i* low, __m512i* high) {
        const auto get = [&](int64_t r) {
          return r < here ? load_rounded(from.at + (start + r) * from.pitch + c, columns - c) : __m512i{};
        };
        pair_up(get(row), get(row + 1), low, high);
      };
      const int64_t row = 32 * task;
      for (int64_t c = 0; c < m; c += 32) {
        if (c + 32 < m) x.fetch(start + row, std::min<int64_t>(32, here - row), c + 32);
        __m512i block[2][16];
        for (int64_t i = 0; i < 16; ++i) pair_of(x, m, row + 2 * i, c, &block[0][i], &block[1][i]);
        for (int64_t half = 0; half < 2; ++half) {
          transpose(block[half]);
          for (int64_t i = 0; i < 16; ++i)
            _mm512_storeu_si512(a + (c + 16 * half + i) * left + row / 2, block[half][i]);
        }
      }
      for (int64_t r = row; r < std::min(row + 32, here); r += 2)
        for (int64_t c = 0; c < n; c += 32) {
          __m512i low, high;
          pair_of(y, n, r, c, &low, &high);
          _mm512_storeu_si512(b + r / 2 * right + c, low);
          _mm512_storeu_si512(b + r / 2 * right + c + 16, high);
        }
    });
    const int64_t half = (m / (2 * ROWS) + 1) * ROWS, halves = half < m ? 2 : 1;  // few panels would leave threads idle
    for_tasks(panels_of(n) * halves, m * n * here > SERIAL_FLOATS, [&](int64_t task) {
      const int64_t panel = task / halves, from = task % halves * half;
      multiply(std::min(half, m - from), n, here, {a + from * left, left}, {b, right, COLUMNS}, panel, panel + 1,
               [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums) {
                 for (int64_t r = 0; r < rows; ++r) {
                   float* at = to + (from + row + r) * n + column;
                   const Two v = load_two(sums + r * COLUMNS, columns);
                   const Two before = add || start ? load_two(at, columns) : Two{};
                   store_two(at, {v.low + before.low, v.high + before.high}, columns);
                 }
               });
    });
  }
}

// As oneDNN's, for alpha 1 and beta 0 or 1.
static int product(char ta, char tb, int64_t m, int64_t n, int64_t k, float, const float* a, int64_t lda,
                   const float* b, int64_t ldb, float beta, float* c, int64_t ldc) try {
  const Matrix left{a, lda, ta == 'T'}, right{b, ldb, tb == 'T'};
  const int64_t left_vectors = ROWS * ROW_PITCH / 16, right_vectors = 2 * PAIRS;
  const int64_t row_tiles = (std::min(m, MOST_ROWS) + ROWS - 1) / ROWS;
  const int64_t column_tiles = (std::min(n, MOST_COLUMNS) + COLUMNS - 1) / COLUMNS;
  __m512i* packed_left =
      reinterpret_cast<__m512i*>(scratch<Matrix>(16 * (row_tiles * left_vectors + column_tiles * right_vectors)));
  __m512i* packed_right = packed_left + row_tiles * left_vectors;
  const auto share = [&](int64_t thread, int64_t threads, auto wait) {
    Tiles tiles;
    for (int64_t column = 0; column < n; column += MOST_COLUMNS)
      for (int64_t inner = 0; inner < k; inner += 2 * PAIRS) {
        const int64_t columns = std::min(n - column, MOST_COLUMNS), depth = std::min(k - inner, 2 * PAIRS);
        const int64_t wide = (columns + COLUMNS - 1) / COLUMNS;
        for (int64_t t = thread; t < wide; t += threads)
          pack_right(right, column + t * COLUMNS, std::min(COLUMNS, columns - t * COLUMNS), inner, depth,
                     packed_right + t * right_vectors);
        for (int64_t row = 0; row < m; row += MOST_ROWS) {
          const int64_t rows = std::min(m - row, MOST_ROWS), high = (rows + ROWS - 1) / ROWS;
          for (int64_t t = thread; t < high; t += threads)
            pack_left(left, row + t * ROWS, std::min(ROWS, rows - t * ROWS), inner, depth,
                      packed_left + t * left_vectors);
          wait();
          // Tiles that share columns follow each other: these stay in the first cache, the rows in the second.
          for (int64_t t = high * wide * thread / threads; t < high * wide * (thread + 1) / threads; ++t) {
            const int64_t at = t % high, beside = t / high, tall = std::min(ROWS, rows - at * ROWS);
            const int64_t here = std::min(COLUMNS, columns - beside * COLUMNS);
            tiles.multiply(tall, here, (depth + 1) / 2,
                           {reinterpret_cast<const int32_t*>(packed_left + at * left_vectors), ROW_PITCH},
                           reinterpret_cast<const int32_t*>(packed_right + beside * right_vectors), COLUMNS,
                           inner > 0 || beta != 0.f, c + (row + at * ROWS) * ldc + column + beside * COLUMNS, ldc);
          }
          wait();
        }
      }
  };
  // With one thread, Paddle's OpenMP library never frees what a parallel region inside another one takes.
  if (omp_get_level())
    share(0, 1, [] {});
  else
#pragma omp parallel
    share(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
  return 0;
} catch (...) {
  return 1;
}

}  // namespace bfloat16

#define BFLOAT16 bfloat16::product
#else
#define BFLOAT16 nullptr
#endif

#ifdef HYBRID_ONEDNN
extern "C" int dnnl_sgemm(char, char, int64_t, int64_t, int64_t, float, const float*, int64_t, const float*, int64_t,
                          float, float*, int64_t);
#else
constexpr Product dnnl_sgemm = nullptr;
#endif

static const Product products[] = {dnnl_sgemm, BFLOAT16};

bool has_product(bool bfloat16) { return products[bfloat16] != nullptr; }

Product product_of(bool bfloat16) {
  const Product product = products[bfloat16];
  require(product, bfloat16 ? "this processor has no bfloat16 products" : "this Paddle carries no oneDNN");
  return product;
}

// a [m, k] times b [k, n], or [n, k] where it is transposed.
static Tensors product(const Tensor& A, const Tensor& B, bool transpose_b, bool bfloat16) {
  const Shape left = sizes("a", A, 2), right = sizes("b", B, 2);
  require(left.size() == 2 && right.size() == 2 && left[1] == right[transpose_b ? 1 : 0], "matrices of the shapes ",
          left, " and ", right, " have no product");
  const float *a = floats("a", A), *b = floats("b", B);
  const int64_t columns = right[transpose_b ? 0 : 1];
  Tensor C = empty({left[0], columns});
  check_product(product_of(bfloat16)('N', transpose_b ? 'T' : 'N', left[0], columns, left[1], 1.f, a, left[1], b,
                                     right[1], 0.f, C.data<float>(), columns));
  return {C};
}

OPERATOR(product, product, .Inputs({"A", "B"}).Outputs({"C"}).Attrs({"transpose_b: bool", "bfloat16: bool"}));
