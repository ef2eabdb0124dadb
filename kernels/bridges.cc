// Attention between a few tokens and the positions of a map, float32, and its gradients.
//
// Queries, keys and values are a map as it is, [batch, heads * width, positions], and tokens, [batch, tokens,
// heads * width]: nothing is transposed. A head of an image belongs to one thread, so that the number of threads
// changes no bit. All products run along the positions.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "operator.h"
#include "slices.h"
#include "softmax.h"
#include "vectors.h"

namespace {

// Of a map [batch, heads * width, ...] and tokens [batch, tokens, heads * width].
struct Sizes {
  int64_t batch, heads, tokens, width, positions;
  float scale;
  Sizes(const Tensor& Map, const Tensor& Tokens, int64_t heads) : heads(heads) {
    const Shape map = sizes("map", Map, 3), token = sizes("tokens", Tokens, 3);
    require(heads > 0 && map[1] % heads == 0, map[1], " channels cannot be shared out to ", heads, " heads");
    batch = map[0], width = map[1] / heads, positions = Map.numel() / (map[0] * map[1]), tokens = token[1];
    scale = float(1 / std::sqrt(double(width)));
  }
  Shape token_shape() const { return {batch, tokens, stride()}; }
  int64_t stride() const { return heads * width; }  // from a token to the next
};

// Calls body(position, get, put) for each vector of a row and for each number of what is left of it.
template <class Body>
inline void for_positions(int64_t count, Body body) {
  int64_t n = 0;
  for (; n + LANES <= count; n += LANES)
    body(n, [](const float* p) { return load(p); }, [](float* p, Vec v) { store(p, v); });
  for (; n < count; ++n) body(n, [](const float* p) { return *p; }, [](float* p, float v) { *p = v; });
}

// Calls body(first token, number of tokens as a type) for groups of up to four tokens.
template <class Body>
inline void for_groups(int64_t tokens, Body body) {
  for (int64_t t = 0; t < tokens; t += 4) switch (std::min<int64_t>(4, tokens - t)) {
      case 1: body(t, std::integral_constant<int, 1>{}); break;
      case 2: body(t, std::integral_constant<int, 2>{}); break;
      case 3: body(t, std::integral_constant<int, 3>{}); break;
      default: body(t, std::integral_constant<int, 4>{});
    }
}

// rows[t, n] = scale * sum over i of token[t, i] map[i, n]
void project(const Sizes& s, float scale, const float* token, const float* map, float* rows) {
  for_groups(s.tokens, [&](int64_t t, auto group) {
    for_positions(s.positions, [&](int64_t n, auto get, auto put) {
      decltype(get(map)) sums[group.value] = {};
      for (int64_t i = 0; i < s.width; ++i) {
        const auto v = get(map + i * s.positions + n);
        for (int g = 0; g < group.value; ++g) sums[g] += v * token[(t + g) * s.stride() + i];
      }
      for (int g = 0; g < group.value; ++g) put(rows + (t + g) * s.positions + n, sums[g] * scale);
    });
  });
}

// token[t, i] = scale * sum over n of rows[t, n] map[i, n]
void gather(const Sizes& s, float scale, const float* rows, const float* map, float* token) {
  for_groups(s.tokens, [&](int64_t t, auto group) {
    for (int64_t i = 0; i < s.width; ++i) {
      const float* line = map + i * s.positions;
      Vec sums[group.value] = {};
      float rest[group.value] = {};
      int64_t n = 0;
      for (; n + LANES <= s.positions; n += LANES)
        for (int g = 0; g < group.value; ++g) sums[g] += load(line + n) * load(rows + (t + g) * s.positions + n);
      for (; n < s.positions; ++n)
        for (int g = 0; g < group.value; ++g) rest[g] += line[n] * rows[(t + g) * s.positions + n];
      for (int g = 0; g < group.value; ++g)
        token[(t + g) * s.stride() + i] = scale * (s.positions < LANES ? rest[g] : total(sums[g]) + rest[g]);
    }
  });
}

// map[i, n] = scale * sum over t of token[t, i] rows[t, n], added to what is there where `add`
void spread(const Sizes& s, float scale, const float* token, const float* rows, bool add, float* map) {
  for_positions(s.positions, [&](int64_t n, auto get, auto put) {
    for (int64_t i = 0; i < s.width; ++i) {
      decltype(get(rows)) sum = {};
      for (int64_t t = 0; t < s.tokens; ++t) sum += get(rows + t * s.positions + n) * token[t * s.stride() + i];
      float* to = map + i * s.positions + n;
      put(to, add ? sum * scale + get(to) : sum * scale);
    }
  });
}

inline float exponential(float v) { return std::exp(v); }
inline Vec exponential(Vec v) { return exp_negative(v); }
inline float larger(float a, float b) { return std::max(a, b); }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Runs body(offset in tokens, in maps, in probabilities) for every head of every image.
template <class Body>
void for_heads(const Sizes& s, Body body) {
  for_tasks(s.batch * s.heads, s.batch * s.stride() * s.positions > SERIAL_FLOATS, [&](int64_t task) {
    const int64_t image = task / s.heads, head = task % s.heads;
    body((image * s.tokens * s.heads + head) * s.width, task * s.width * s.positions, task * s.tokens * s.positions);
  });
}

}  // namespace

// out = softmax(scale query map) map^T, the softmax over the positions; `weights` [batch, heads, tokens, positions].
static Tensors attend_map(const Tensor& Query, const Tensor& Map, int64_t heads) {
  const Sizes s(Map, Query, heads);
  const float *query = floats("query", Query, s.token_shape()), *map = floats("map", Map);
  Tensor Out = empty_like(Query), Weights = empty({s.batch, s.heads, s.tokens, s.positions});
  float *out = Out.data<float>(), *weights = Weights.data<float>();
  for_heads(s, [=, &s](int64_t token, int64_t plane, int64_t row) {
    project(s, s.scale, query + token, map + plane, weights + row);
    float kept[2];
    for (int64_t t = 0; t < s.tokens; ++t) softmax(weights + row + t * s.positions, nullptr, s.positions, kept);
    gather(s, 1.f, weights + row, map + plane, out + token);
  });
  return {Out, Weights};
}

static Tensors attend_map_gradient(const Tensor& Query, const Tensor& Map, const Tensor& Weights, const Tensor& GradOut,
                                   int64_t heads) {
  const Sizes s(Map, Query, heads);
  const float *query = floats("query", Query, s.token_shape()), *map = floats("map", Map);
  const float* weights = floats("weights", Weights, {s.batch, s.heads, s.tokens, s.positions});
  const float* grad = floats("grad", GradOut, s.token_shape());
  Tensor GradQuery = empty_like(Query), GradMap = empty_like(Map);
  float *grad_query = GradQuery.data<float>(), *grad_map = GradMap.data<float>();
  for_heads(s, [=, &s](int64_t token, int64_t plane, int64_t row) {
    float* changes = scratch(s.tokens * s.positions);
    project(s, 1.f, grad + token, map + plane, changes);
    for (int64_t t = 0; t < s.tokens; ++t) {
      const float* weight = weights + row + t * s.positions;
      float* change = changes + t * s.positions;
      Vec means = {};
      for_vectors(s.positions, [&](int64_t n, auto get, auto) { means += get(weight + n) * get(change + n); });
      const float mean = total(means);
      for_positions(s.positions, [=](int64_t n, auto get, auto put) {
        put(change + n, get(weight + n) * (get(change + n) - mean));
      });
    }
    gather(s, s.scale, changes, map + plane, grad_query + token);
    spread(s, s.scale, query + token, changes, false, grad_map + plane);
    spread(s, 1.f, grad + token, weights + row, true, grad_map + plane);
  });
  return {GradQuery, GradMap};
}

OPERATOR(attend_map, attend_map, .Inputs({"Query", "Map"}).Outputs({"Out", "Weights"}).Attrs({"heads: int64_t"}));
GRADIENT(
    attend_map, attend_map_gradient,
    .Inputs({"Query", "Map", "Weights", Grad("Out")}).Outputs({Grad("Query"), Grad("Map")}).Attrs({"heads: int64_t"}));

// out = value^T softmax(scale key map), the softmax over the tokens.
static Tensors attend_tokens(const Tensor& Map, const Tensor& Key, const Tensor& Value, int64_t heads) {
  const Sizes s(Map, Key, heads);
  const float *map = floats("map", Map), *key = floats("key", Key, s.token_shape());
  const float* value = floats("value", Value, s.token_shape());
  Tensor Out = empty_like(Map), Weights = empty({s.batch, s.heads, s.tokens, s.positions});
  float *out = Out.data<float>(), *weights = Weights.data<float>();
  for_heads(s, [=, &s](int64_t token, int64_t plane, int64_t row) {
    float* rows = weights + row;
    project(s, s.scale, key + token, map + plane, rows);
    for_positions(s.positions, [=](int64_t n, auto get, auto put) {
      auto highest = get(rows + n);
      for (int64_t t = 1; t < s.tokens; ++t) highest = larger(highest, get(rows + t * s.positions + n));
      decltype(highest) sum = {};
      for (int64_t t = 0; t < s.tokens; ++t) {
        const auto weight = exponential(get(rows + t * s.positions + n) - highest);
        put(rows + t * s.positions + n, weight);
        sum += weight;
      }
      for (int64_t t = 0; t < s.tokens; ++t) put(rows + t * s.positions + n, get(rows + t * s.positions + n) / sum);
    });
    spread(s, 1.f, value + token, rows, false, out + plane);
  });
  return {Out, Weights};
}

static Tensors attend_tokens_gradient(const Tensor& Map, const Tensor& Key, const Tensor& Value, const Tensor& Weights,
                                      const Tensor& GradOut, int64_t heads) {
  const Sizes s(Map, Key, heads);
  const float *map = floats("map", Map), *key = floats("key", Key, s.token_shape());
  const float *value = floats("value", Value, s.token_shape()), *grad = floats("grad", GradOut, Map.shape());
  const float* weights = floats("weights", Weights, {s.batch, s.heads, s.tokens, s.positions});
  Tensor GradMap = empty_like(Map), GradKey = empty_like(Key), GradValue = empty_like(Value);
  float *grad_map = GradMap.data<float>(), *grad_key = GradKey.data<float>(), *grad_value = GradValue.data<float>();
  for_heads(s, [=, &s](int64_t token, int64_t plane, int64_t row) {
    const float* rows = weights + row;
    float* changes = scratch(s.tokens * s.positions);
    project(s, 1.f, value + token, grad + plane, changes);
    for_positions(s.positions, [=](int64_t n, auto get, auto put) {
      decltype(get(rows)) mean = {};
      for (int64_t t = 0; t < s.tokens; ++t)
        mean += get(rows + t * s.positions + n) * get(changes + t * s.positions + n);
      for (int64_t t = 0; t < s.tokens; ++t) {
        float* change = changes + t * s.positions + n;
        put(change, get(rows + t * s.positions + n) * (get(change) - mean));
      }
    });
    spread(s, s.scale, key + token, changes, false, grad_map + plane);
    gather(s, s.scale, changes, map + plane, grad_key + token);
    gather(s, 1.f, rows, grad + plane, grad_value + token);
  });
  return {GradMap, GradKey, GradValue};
}

OPERATOR(attend_tokens, attend_tokens,
         .Inputs({"Map", "Key", "Value"}).Outputs({"Out", "Weights"}).Attrs({"heads: int64_t"}));
GRADIENT(attend_tokens, attend_tokens_gradient,
         .Inputs({"Map", "Key", "Value", "Weights", Grad("Out")})
             .Outputs({Grad("Map"), Grad("Key"), Grad("Value")})
             .Attrs({"heads: int64_t"}));
