// Attention for the CPU, float32: softmax(scale q k^T + bias) v for every image and head, and its gradients.
//
// The probabilities are never stored: the forward pass keeps each row's greatest logit and the inverse of its sum,
// from which the backward pass forms them again (as Dao et al., "FlashAttention", 2022, algorithm 4), in blocks of rows
// that stay in cache.
// Queries, keys and values are read where they stand (any stride of image, position and head), hence nothing is
// split, transposed or copied around this operator.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "softmax.h"
#include "vectors.h"

struct Strides {
  int64_t image, position, head;
};

// Mirrored by a ctypes structure. `mixed` are the strides of the output and of its gradient.
struct AttentionShape {
  int64_t batch, heads, queries, keys, width;
  Strides query, key, value, mixed;
};

namespace {

constexpr int64_t BLOCK_FLOATS = 48 * 1024;   // of a block of probabilities
constexpr int64_t SMALL_PRODUCT = 24 * 1024;  // multiply-adds below which oneDNN's own preparation costs more
constexpr int64_t MAX_SLICES = 8;             // of the batch, where the gradient of a bias is summed
constexpr int64_t SERIAL_WORK = 1 << 17;      // multiply-adds below which threads cost more than they give

const float* at(const float* base, const Strides& s, int64_t image, int64_t head) {
  return base + image * s.image + head * s.head;
}
float* at(float* base, const Strides& s, int64_t image, int64_t head) {
  return base + image * s.image + head * s.head;
}

// The products of one thread: oneDNN's, or plain loops for those of a few rows.
struct Products {
  Product product;

  // c[m, n] = alpha a[m, k] b[n, k]^T
  void rows_by_rows(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda, const float* b,
                    int64_t ldb, float* c) const {
    if (m * n * k > SMALL_PRODUCT) {
      product('N', 'T', m, n, k, alpha, a, lda, b, ldb, 0.f, c, n);
      return;
    }
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        Vec sum = {};
        for_vectors(k, [&](int64_t p, auto get, auto) { sum += get(a + i * lda + p) * get(b + j * ldb + p); });
        c[i * n + j] = alpha * total(sum);
      }
  }

  // c[m, n] = a[m, k] b[k, n], or with a[k, m] turned; added to c where `add`
  void rows_by_columns(bool turned, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                       int64_t ldb, bool add, float* c, int64_t ldc) const {
    if (m * n * k > SMALL_PRODUCT) {
      product(turned ? 'T' : 'N', 'N', m, n, k, 1.f, a, lda, b, ldb, add ? 1.f : 0.f, c, ldc);
      return;
    }
    for (int64_t i = 0; i < m; ++i)
      for_vectors(n, [&](int64_t j, auto get, auto put) {
        Vec sum = add ? get(c + i * ldc + j) : Vec{};
        for (int64_t p = 0; p < k; ++p) sum += a[turned ? p * lda + i : i * lda + p] * get(b + p * ldb + j);
        put(c + i * ldc + j, sum);
      });
  }
};

// Runs body(task) for every task, on all threads where the work is worth it; 1 where memory ran out, else 0.
template <class Body>
int for_tasks(const AttentionShape& s, int64_t tasks, Body body) {
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{0};
#pragma omp parallel if (s.batch * s.heads * s.queries * s.keys * s.width > SERIAL_WORK)
  for (int64_t task; (task = next++) < tasks;) {
    try {
      body(task);
    } catch (...) {
      failed = 1;
    }
  }
  return failed;
}

int64_t block_rows(const AttentionShape& s) {
  return std::clamp<int64_t>(BLOCK_FLOATS / s.keys, std::min<int64_t>(s.queries, 16), s.queries);
}

}  // namespace

// `bias` [heads, queries, keys] may be null; `kept` [batch, heads, queries, 2] is for the backward pass.
extern "C" int attention_forward(const AttentionShape* shape, Product product, float scale, const float* query,
                                 const float* key, const float* value, const float* bias, float* mixed,
                                 float* kept) {
  const AttentionShape s = *shape;
  const Products products{product};
  const int64_t block = block_rows(s), blocks = (s.queries + block - 1) / block;
  return for_tasks(s, s.batch * s.heads * blocks, [&](int64_t task) {
    const int64_t image = task / blocks / s.heads, head = task / blocks % s.heads, from = task % blocks * block;
    const int64_t rows = std::min(block, s.queries - from);
    float* weights = scratch(block * s.keys);
    products.rows_by_rows(rows, s.keys, s.width, scale, at(query, s.query, image, head) + from * s.query.position,
                          s.query.position, at(key, s.key, image, head), s.key.position, weights);
    for (int64_t r = 0; r < rows; ++r) {
      const float* row_bias = bias ? bias + (head * s.queries + from + r) * s.keys : nullptr;
      softmax(weights + r * s.keys, row_bias, s.keys, kept + ((image * s.heads + head) * s.queries + from + r) * 2);
    }
    products.rows_by_columns(false, rows, s.width, s.keys, weights, s.keys, at(value, s.value, image, head),
                             s.value.position, false, at(mixed, s.mixed, image, head) + from * s.mixed.position,
                             s.mixed.position);
  });
}

// The gradients of query, key and value lie as these do; `grad_bias` may be null.
extern "C" int attention_backward(const AttentionShape* shape, Product product, float scale, const float* query,
                                  const float* key, const float* value, const float* bias, const float* kept,
                                  const float* grad, float* grad_query, float* grad_key,
                                  float* grad_value, float* grad_bias) try {
  const AttentionShape s = *shape;
  const Products products{product};
  const int64_t block = block_rows(s), map = s.queries * s.keys;
  const int64_t slices = grad_bias ? std::min(s.batch, MAX_SLICES) : s.batch;
  std::vector<float> partial(grad_bias ? slices * s.heads * map : 0, 0.f);
  const int failed = for_tasks(s, slices * s.heads, [&](int64_t task) {
    const int64_t slice = task / s.heads, head = task % s.heads;
    float* weights = scratch(2 * block * s.keys);
    float* changes = weights + block * s.keys;
    for (int64_t image = s.batch * slice / slices; image < s.batch * (slice + 1) / slices; ++image)
      for (int64_t from = 0; from < s.queries; from += block) {
        const int64_t rows = std::min(block, s.queries - from);
        const float* q = at(query, s.query, image, head) + from * s.query.position;
        const float *k = at(key, s.key, image, head), *v = at(value, s.value, image, head);
        const float* g = at(grad, s.mixed, image, head) + from * s.mixed.position;
        products.rows_by_rows(rows, s.keys, s.width, scale, q, s.query.position, k, s.key.position, weights);
        products.rows_by_rows(rows, s.keys, s.width, 1.f, g, s.mixed.position, v, s.value.position, changes);
        for (int64_t r = 0; r < rows; ++r) {
          const float* row_kept = kept + ((image * s.heads + head) * s.queries + from + r) * 2;
          const float maximum = row_kept[0], share = row_kept[1];
          float *weight = weights + r * s.keys, *change = changes + r * s.keys;
          const float* row_bias = bias ? bias + (head * s.queries + from + r) * s.keys : nullptr;
          float* row_sum = grad_bias ? &partial[(task * s.queries + from + r) * s.keys] : nullptr;
          Vec means = {};
          for_vectors(s.keys, [&](int64_t c, auto get, auto put) {
            const Vec logit = row_bias ? get(weight + c) + get(row_bias + c) : get(weight + c);
            const Vec p = exp_negative(logit - maximum) * share;
            put(weight + c, p);
            means += p * get(change + c);
          });
          const float mean = total(means);
          for_vectors(s.keys, [&](int64_t c, auto get, auto put) {
            const Vec d = get(weight + c) * (get(change + c) - mean);
            put(change + c, d * scale);
            if (row_sum) put(row_sum + c, get(row_sum + c) + d);
          });
        }
        products.rows_by_columns(false, rows, s.width, s.keys, changes, s.keys, k, s.key.position, false,
                                 at(grad_query, s.query, image, head) + from * s.query.position, s.query.position);
        products.rows_by_columns(true, s.keys, s.width, rows, changes, s.keys, q, s.query.position, from > 0,
                                 at(grad_key, s.key, image, head), s.key.position);
        products.rows_by_columns(true, s.keys, s.width, rows, weights, s.keys, g, s.mixed.position, from > 0,
                                 at(grad_value, s.value, image, head), s.value.position);
      }
  });
  for (int64_t i = 0; grad_bias && i < s.heads * map; ++i) {
    double sum = 0;
    for (int64_t slice = 0; slice < slices; ++slice) sum += partial[slice * s.heads * map + i];
    grad_bias[i] = float(sum);
  }
  return failed;
} catch (...) {
  return 1;
}
