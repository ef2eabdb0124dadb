// Attention between a few tokens and the positions of a map, float32, and its gradients.
//
// Queries, keys and values are a map as it is, [batch, heads * width, positions], and tokens, [batch, tokens,
// heads * width]: nothing is transposed. A head of an image belongs to one thread, so that the number of threads
// changes no bit. All products run along the positions.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "slices.h"
#include "softmax.h"
#include "vectors.h"

namespace {

struct Sizes {
  int64_t batch, heads, tokens, width, positions;
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

// Runs body(offset in tokens, in maps, in probabilities) for every head of every image; 1 where memory ran out, else 0.
template <class Body>
int for_heads(const Sizes& s, Body body) {
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{0};
#pragma omp parallel if (s.batch * s.stride() * s.positions > SERIAL_FLOATS)
  for (int64_t task; (task = next++) < s.batch * s.heads;) failed |= guarded([&] {
      const int64_t image = task / s.heads, head = task % s.heads;
      body((image * s.tokens * s.heads + head) * s.width, task * s.width * s.positions,
           task * s.tokens * s.positions);
    });
  return failed;
}

}  // namespace

// out = softmax(scale query map) map^T, the softmax over the positions; `weights` [batch, heads, tokens, positions].
extern "C" int attend_map_forward(int64_t batch, int64_t heads, int64_t tokens, int64_t width, int64_t positions,
                                  float scale, const float* query, const float* map, float* weights, float* out) {
  const Sizes s{batch, heads, tokens, width, positions};
  return for_heads(s, [=, &s](int64_t token, int64_t plane, int64_t row) {
    project(s, scale, query + token, map + plane, weights + row);
    float kept[2];
    for (int64_t t = 0; t < tokens; ++t) softmax(weights + row + t * positions, nullptr, positions, kept);
    gather(s, 1.f, weights + row, map + plane, out + token);
  });
}

extern "C" int attend_map_backward(int64_t batch, int64_t heads, int64_t tokens, int64_t width, int64_t positions,
                                   float scale, const float* query, const float* map, const float* weights,
                                   const float* grad, float* grad_query, float* grad_map) {
  const Sizes s{batch, heads, tokens, width, positions};
  return for_heads(s, [=, &s](int64_t token, int64_t plane, int64_t row) {
    float* changes = scratch(tokens * positions);
    project(s, 1.f, grad + token, map + plane, changes);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* weight = weights + row + t * positions;
      float* change = changes + t * positions;
      Vec means = {};
      for_vectors(positions, [&](int64_t n, auto get, auto) { means += get(weight + n) * get(change + n); });
      const float mean = total(means);
      for_positions(positions,
                    [=](int64_t n, auto get, auto put) { put(change + n, get(weight + n) * (get(change + n) - mean)); });
    }
    gather(s, scale, changes, map + plane, grad_query + token);
    spread(s, scale, query + token, changes, false, grad_map + plane);
    spread(s, 1.f, grad + token, weights + row, true, grad_map + plane);
  });
}

// out = value^T softmax(scale key map), the softmax over the tokens.
extern "C" int attend_tokens_forward(int64_t batch, int64_t heads, int64_t tokens, int64_t width, int64_t positions,
                                     float scale, const float* map, const float* key, const float* value,
                                     float* weights, float* out) {
  const Sizes s{batch, heads, tokens, width, positions};
  return for_heads(s, [=, &s](int64_t token, int64_t plane, int64_t row) {
    float* rows = weights + row;
    project(s, scale, key + token, map + plane, rows);
    for_positions(positions, [=](int64_t n, auto get, auto put) {
      auto highest = get(rows + n);
      for (int64_t t = 1; t < tokens; ++t) highest = larger(highest, get(rows + t * positions + n));
      decltype(highest) sum = {};
      for (int64_t t = 0; t < tokens; ++t) {
        const auto weight = exponential(get(rows + t * positions + n) - highest);
        put(rows + t * positions + n, weight);
        sum += weight;
      }
      for (int64_t t = 0; t < tokens; ++t) put(rows + t * positions + n, get(rows + t * positions + n) / sum);
    });
    spread(s, 1.f, value + token, rows, false, out + plane);
  });
}

extern "C" int attend_tokens_backward(int64_t batch, int64_t heads, int64_t tokens, int64_t width, int64_t positions,
                                      float scale, const float* map, const float* key, const float* value,
                                      const float* weights, const float* grad, float* grad_map, float* grad_key,
                                      float* grad_value) {
  const Sizes s{batch, heads, tokens, width, positions};
  return for_heads(s, [=, &s](int64_t token, int64_t plane, int64_t row) {
    const float* rows = weights + row;
    float* changes = scratch(tokens * positions);
    project(s, 1.f, value + token, grad + plane, changes);
    for_positions(positions, [=](int64_t n, auto get, auto put) {
      decltype(get(rows)) mean = {};
      for (int64_t t = 0; t < tokens; ++t) mean += get(rows + t * positions + n) * get(changes + t * positions + n);
      for (int64_t t = 0; t < tokens; ++t) {
        float* change = changes + t * positions + n;
        put(change, get(rows + t * positions + n) * (get(change) - mean));
      }
    });
    spread(s, scale, key + token, changes, false, grad_map + plane);
    gather(s, scale, changes, map + plane, grad_key + token);
    gather(s, 1.f, rows, grad + plane, grad_value + token);
  });
}
