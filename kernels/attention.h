// Attention for other operators.

#pragma once

#include <cstdint>

struct Strides {
  int64_t image, position, head;
};

// `mixed` are the strides of the output and of its gradient.
struct AttentionShape {
  int64_t batch, heads, queries, keys, width;
  Strides query, key, value, mixed;
  bool worth_threads() const { return batch * heads * queries * keys * width > 1 << 17; }
};

// Mixes values: `bias` [heads, queries, keys] may be null; `kept` [batch, heads, queries, 2] is for the gradient.
void attend(const AttentionShape& s, float scale, const float* query, const float* key, const float* value,
            const float* bias, bool bfloat16, float* mixed, float* kept);

// The gradients of query, key and value lie as these do; `grad_bias` may be null.
void attend_back(const AttentionShape& s, float scale, const float* query, const float* key, const float* value,
                 const float* bias, bool bfloat16, const float* kept, const float* grad, float* grad_query,
                 float* grad_key, float* grad_value, float* grad_bias);

// Self-attention of packed queries, keys and values, [batch, positions, 3, heads, width].
inline AttentionShape packed_attention(int64_t batch, int64_t positions, int64_t heads, int64_t width) {
  const Strides packed{3 * positions * heads * width, 3 * heads * width, width};
  const Strides own{positions * heads * width, heads * width, width};
  return {batch, heads, positions, positions, width, packed, packed, packed, own};
}
