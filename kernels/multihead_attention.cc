// Attention for the CPU, float32: softmax(scale q k^T + bias) v for every image and head, and its gradients.
//
// The probabilities are never stored: the forward pass keeps each row's greatest logit and the inverse of its sum,
// from which the backward pass forms them again (as Dao et al., "FlashAttention", 2022, algorithm 4), in blocks of rows
// that stay in cache.
// Queries, keys and values are read where they stand (any stride of image, position and head), hence nothing is
// split, transposed or copied around this operator.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "matmul.h"
#include "operator.h"
#include "slices.h"
#include "softmax.h"
#include "vectors.h"

namespace {

constexpr int64_t BLOCK_FLOATS = 48 * 1024;   // of a block of probabilities
constexpr int64_t SMALL_PRODUCT = 24 * 1024;  // multiply-adds below which oneDNN's own preparation costs more
constexpr int64_t BATCH_SLICES = 8;           // of the batch, where the gradient of a bias is summed
const float* at(const float* base, const Strides& s, int64_t image, int64_t head) {
  return base + image * s.image + head * s.head;
}
float* at(float* base, const Strides& s, int64_t image, int64_t head) { return base + image * s.image + head * s.head; }

// The products of one thread: oneDNN's, or plain loops for those of a few rows.
struct Products {
  bool bfloat16;
  Product product = product_of(bfloat16);

  // c[m, n] = alpha a[m, k] b[n, k]^T
  void rows_by_rows(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda, const float* b,
                    int64_t ldb, float* c) const {
    if (m * n * k > SMALL_PRODUCT) {
      product('N', 'T', m, n, k, alpha, a, lda, b, ldb, 0.f, c, n);
      for (int64_t i = 0; bfloat16 && i < m * n; ++i) c[i] *= alpha;  // which this product leaves out
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

int64_t block_rows(const AttentionShape& s) {
  return std::clamp<int64_t>(BLOCK_FLOATS / s.keys, std::min<int64_t>(s.queries, 16), s.queries);
}

}  // namespace

void attend(const AttentionShape& s, float scale, const float* query, const float* key, const float* value,
            const float* bias, bool bfloat16, float* mixed, float* kept) {
  const Products products{bfloat16};
  const int64_t block = block_rows(s), blocks = (s.queries + block - 1) / block;
  for_tasks(s.batch * s.heads * blocks, s.worth_threads(), [&](int64_t task) {
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

void attend_back(const AttentionShape& s, float scale, const float* query, const float* key, const float* value,
                 const float* bias, bool bfloat16, const float* kept, const float* grad, float* grad_query,
                 float* grad_key, float* grad_value, float* grad_bias) {
  const Products products{bfloat16};
  const int64_t block = block_rows(s), map = s.queries * s.keys;
  const int64_t slices = grad_bias ? std::min(s.batch, BATCH_SLICES) : s.batch;
  std::vector<float> partial(grad_bias ? slices * s.heads * map : 0, 0.f);
  for_tasks(slices * s.heads, s.worth_threads(), [&](int64_t task) {
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
          const float maximum = row_kept[0], inverse = row_kept[1];
          float *weight = weights + r * s.keys, *change = changes + r * s.keys;
          const float* row_bias = bias ? bias + (head * s.queries + from + r) * s.keys : nullptr;
          float* row_sum = grad_bias ? &partial[(task * s.queries + from + r) * s.keys] : nullptr;
          Vec means = {};
          for_vectors(s.keys, [&](int64_t c, auto get, auto put) {
            const Vec logit = row_bias ? get(weight + c) + get(row_bias + c) : get(weight + c);
            const Vec below = logit - maximum;  // above 0 in lanes past the last key alone, where it might overflow
            const Vec p = exp_negative(below > 0.f ? Vec{} : below) * inverse;
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
}

namespace {

// query [batch, queries, heads, width], key [batch, keys, heads, width]
AttentionShape shape_of(const Tensor& Query, const Tensor& Key) {
  const Shape query = sizes("query", Query, 4), key = sizes("key", Key, 4);
  require(query.size() == 4 && key.size() == 4, "queries and keys are [batch, positions, heads, width]");
  const int64_t heads = query[2], width = query[3];
  const Strides own{query[1] * heads * width, heads * width, width},
      other{key[1] * heads * width, heads * width, width};
  return {query[0], heads, query[1], key[1], width, own, other, other, own};
}

// Queries, keys and values along an axis of qkv: [batch, positions, 3, heads, width] or [batch, positions, heads, 3,
// width]; `part` numbers lie between them.
AttentionShape packed_shape_of(const Tensor& Qkv, int64_t axis, int64_t& part) {
  const Shape qkv = sizes("qkv", Qkv, 5);
  require(qkv.size() == 5 && (axis == 2 || axis == 3) && qkv[axis] == 3, "qkv has the shape ", qkv,
          ", expected 3 along axis ", axis);
  AttentionShape s = packed_attention(qkv[0], qkv[1], qkv[5 - axis], qkv[4]);
  part = axis == 2 ? s.heads * s.width : s.width;
  if (axis == 3) s.query.head = s.key.head = s.value.head = 3 * s.width;
  return s;
}

}  // namespace

static Tensors attention(const Tensor& Query, const Tensor& Key, const Tensor& Value, const MaybeTensor& Bias,
                         float scale, bool bfloat16, bool) {
  const AttentionShape s = shape_of(Query, Key);
  const Shape others{s.batch, s.keys, s.heads, s.width};
  const float *query = floats("query", Query), *key = floats("key", Key, others),
              *value = floats("value", Value, others);
  const float* bias = floats("bias", Bias, {s.heads, s.queries, s.keys});
  Tensor Mixed = empty_like(Query), Kept = empty({s.batch, s.heads, s.queries, 2});
  attend(s, scale, query, key, value, bias, bfloat16, Mixed.data<float>(), Kept.data<float>());
  return {Mixed, Kept};
}

static Tensors attention_gradient(const Tensor& Query, const Tensor& Key, const Tensor& Value, const MaybeTensor& Bias,
                                  const Tensor& Kept, const Tensor& GradMixed, float scale, bool bfloat16,
                                  bool bias_needs_grad) {
  const AttentionShape s = shape_of(Query, Key);
  const Shape others{s.batch, s.keys, s.heads, s.width};
  const float *query = floats("query", Query), *key = floats("key", Key, others),
              *value = floats("value", Value, others);
  const float* bias = floats("bias", Bias, {s.heads, s.queries, s.keys});
  const float* kept = floats("kept", Kept, {s.batch, s.heads, s.queries, 2});
  const float* grad = floats("grad", GradMixed, Query.shape());
  Tensor GradQuery = empty_like(Query), GradKey = empty_like(Key), GradValue = empty_like(Value), GradBias;
  if (Bias && bias_needs_grad) GradBias = empty_like(*Bias);
  attend_back(s, scale, query, key, value, bias, bfloat16, kept, grad, GradQuery.data<float>(), GradKey.data<float>(),
              GradValue.data<float>(), GradBias.initialized() ? GradBias.data<float>() : nullptr);
  return {GradQuery, GradKey, GradValue, GradBias};
}

OPERATOR(attention, attention,
         .Inputs({"Query", "Key", "Value", Optional("Bias")})
             .Outputs({"Mixed", "Kept"})
             .Attrs({"scale: float", "bfloat16: bool", "bias_needs_grad: bool"}));
GRADIENT(attention, attention_gradient,
         .Inputs({"Query", "Key", "Value", Optional("Bias"), "Kept", Grad("Mixed")})
             .Outputs({Grad("Query"), Grad("Key"), Grad("Value"), Grad(Optional("Bias"))})
             .Attrs({"scale: float", "bfloat16: bool", "bias_needs_grad: bool"}));

static Tensors self_attention(const Tensor& Qkv, const MaybeTensor& Bias, int64_t axis, float scale, bool bfloat16,
                              bool) {
  int64_t part;
  const AttentionShape s = packed_shape_of(Qkv, axis, part);
  const float *qkv = floats("qkv", Qkv), *bias = floats("bias", Bias, {s.heads, s.queries, s.keys});
  Tensor Mixed = empty({s.batch, s.queries, s.heads, s.width}), Kept = empty({s.batch, s.heads, s.queries, 2});
  attend(s, scale, qkv, qkv + part, qkv + 2 * part, bias, bfloat16, Mixed.data<float>(), Kept.data<float>());
  return {Mixed, Kept};
}

static Tensors self_attention_gradient(const Tensor& Qkv, const MaybeTensor& Bias, const Tensor& Kept,
                                       const Tensor& GradMixed, int64_t axis, float scale, bool bfloat16,
                                       bool bias_needs_grad) {
  int64_t part;
  const AttentionShape s = packed_shape_of(Qkv, axis, part);
  const float *qkv = floats("qkv", Qkv), *bias = floats("bias", Bias, {s.heads, s.queries, s.keys});
  const float* kept = floats("kept", Kept, {s.batch, s.heads, s.queries, 2});
  const float* grad = floats("grad", GradMixed, {s.batch, s.queries, s.heads, s.width});
  Tensor GradQkv = empty_like(Qkv), GradBias;
  if (Bias && bias_needs_grad) GradBias = empty_like(*Bias);
  float* grad_qkv = GradQkv.data<float>();
  attend_back(s, scale, qkv, qkv + part, qkv + 2 * part, bias, bfloat16, kept, grad, grad_qkv, grad_qkv + part,
              grad_qkv + 2 * part, GradBias.initialized() ? GradBias.data<float>() : nullptr);
  return {GradQkv, GradBias};
}

OPERATOR(self_attention, self_attention,
         .Inputs({"Qkv", Optional("Bias")})
             .Outputs({"Mixed", "Kept"})
             .Attrs({"axis: int64_t", "scale: float", "bfloat16: bool", "bias_needs_grad: bool"}));
GRADIENT(self_attention, self_attention_gradient,
         .Inputs({"Qkv", Optional("Bias"), "Kept", Grad("Mixed")})
             .Outputs({Grad("Qkv"), Grad(Optional("Bias"))})
             .Attrs({"axis: int64_t", "scale: float", "bfloat16: bool", "bias_needs_grad: bool"}));
