// The token mixer of an iFormer block as one operator, with products of operands rounded to bfloat16.
//
// y = x + share[image] scale mixer(norm(x)) of channels-last maps (Si et al., "Inception Transformer", 2022, figure 3).
// Its branches read and write slices of channels: nothing is transposed, split or concatenated. All that is kept for
// the gradient is rounded to bfloat16, but for queries, keys and values. Sums are added in an order that depends on the
// shapes alone, so that the number of threads changes no bit.

#include <cmath>
#include <cstdint>
#include <vector>

#include "activations.h"
#include "attention.h"
#include "branch.h"
#include "map.h"

#ifdef HYBRID_BFLOAT16

using namespace bfloat16;

namespace {

struct Best {
  Vec value;
  IVec place;
};

Rows rows_at(int32_t* memory, int64_t columns) { return {reinterpret_cast<uint16_t*>(memory), columns}; }

struct Mixer : Branch {
  int64_t half, low, fused, heads, pool;
  Map map, small;  // of the attending channels: pooled
  const float *weight1, *depthwise1, *weight2, *bias2, *weight_qkv, *bias_qkv, *depthwise_fuse, *weight_out, *bias_out;

  Mixer(const Tensor& X, const Tensor& NormWeight, const Tensor& NormBias, const Tensor& Weight1,
        const Tensor& Depthwise1, const Tensor& Weight2, const Tensor& Bias2, const Tensor& WeightQkv,
        const MaybeTensor& BiasQkv, const Tensor& DepthwiseFuse, const Tensor& WeightOut, const Tensor& BiasOut,
        const MaybeTensor& Scale, const MaybeTensor& Share, int64_t heads, int64_t pool, float epsilon)
      : Branch(X, NormWeight, NormBias, {}, Scale, Share, epsilon), heads(heads), pool(pool) {
    const Shape shape = sizes("x", X, 4);
    require(shape.size() == 4 && heads > 0 && pool > 0, "the mixer takes [batch, height, width, channels]");
    low = sizes("qkv weight", WeightQkv, 2)[0], half = (columns - low) / 2, fused = 4 * half + low;
    require(half > 0 && half % 8 == 0 && low % 2 == 0 && low % heads == 0 && columns == 2 * half + low, columns,
            " channels of which ", low, " attend have no mixer of ", heads, " heads");
    map = {shape[0], shape[1], shape[2]};
    small = {shape[0], (shape[1] + pool - 1) / pool, (shape[2] + pool - 1) / pool};
    weight1 = floats("weight1", Weight1, {2 * half, half}), weight2 = floats("weight2", Weight2, {2 * half, half});
    depthwise1 = floats("depthwise1", Depthwise1, {2 * half, 1, 3, 3}), bias2 = floats("bias2", Bias2, {2 * half});
    weight_qkv = floats("qkv weight", WeightQkv, {low, 3 * low}), bias_qkv = floats("qkv bias", BiasQkv, {3 * low});
    depthwise_fuse = floats("fuse", DepthwiseFuse, {fused, 1, 3, 3});
    weight_out = floats("weight", WeightOut, {columns, fused}), bias_out = floats("bias", BiasOut, {columns});
  }

  int64_t small_rows() const { return small.rows(); }
  float attention_scale() const { return 1.f / std::sqrt(float(low / heads)); }
  AttentionShape attention() const { return packed_attention(map.batch, small.pixels(), heads, low / heads); }

  // What is kept for the gradient, in numbers of 4 bytes: norm, conv1's and depthwise1's results, the pooled, its
  // product, the pooled attending channels, all branches, the fused; places of maxima; queries, keys and values; and
  // what attention keeps.
  Pieces kept_pieces() const {
    return Pieces({rows * columns / 2, rows * half, rows * half, rows * half / 2, rows * half, small_rows() * low / 2,
                   rows * fused / 2, rows * fused / 2, rows * half / 4, small_rows() * 3 * low,
                   small_rows() * heads * 2});
  }

  struct Kept {
    Rows norm, first, convolved, pooled, second, attending, all, fused;
    uint8_t* places;
    float *qkv, *softmax;
  };
  Kept kept_of(int32_t* memory) const {
    const Pieces p = kept_pieces();
    float* at = reinterpret_cast<float*>(memory);
    const Rows norm = rows_at(p.at(at, 0), columns);
    return {norm,
            rows_at(p.at(at, 1), 2 * half),
            rows_at(p.at(at, 2), 2 * half),
            rows_at(p.at(at, 3), half),
            rows_at(p.at(at, 4), 2 * half),
            pool > 1 ? rows_at(p.at(at, 5), low) : norm.from(0, 2 * half),
            rows_at(p.at(at, 6), fused),
            rows_at(p.at(at, 7), fused),
            p.at<uint8_t>(at, 8),
            p.at<float>(at, 9),
            p.at<float>(at, 10)};
  }

  // Calls body(row of the pooled map, row of the map, share of it) for all rows of the map, those of a window together.
  template <class Begin, class Body>
  void windows(Begin begin, Body body) const {
    for_tasks(small_rows(), true, [&](int64_t row) {
      const int64_t image = row / small.pixels(), y = row % small.pixels() / small.width * pool;
      const int64_t x = row % small.width * pool, below = std::min(y + pool, map.height),
                    right = std::min(x + pool, map.width);
      begin(row);
      for (int64_t i = y; i < below; ++i)
        for (int64_t j = x; j < right; ++j)
          body(row, image * map.pixels() + i * map.width + j, 1.f / ((below - y) * (right - x)));
    });
  }

  void forward(const Kept& k, float* y) const {
    const PackedWeight first(weight1, half, 2 * half, true), second(weight2, half, 2 * half, true);
    const PackedWeight qkv(weight_qkv, low, 3 * low, false), out(weight_out, fused, columns, true);
    const Pieces pieces({first.size(), second.size(), qkv.size(), out.size(), small_rows() * low});
    float* memory = scratch<Branch>(pieces.size);
    const PackedWeight* weights[] = {&first, &second, &qkv, &out};
    for (int i = 0; i < 4; ++i) weights[i]->pack(pieces.at(memory, i));
    float* mixed = pieces.at<float>(memory, 4);
    for_tasks(blocks(), true, [&](int64_t block) { normalise(block, k.norm.from(block * block_rows)); });
    // High frequencies: a product and a depthwise convolution, and maxima and a product.
    product_of_rows(rows, k.norm, first, pieces.at(memory, 0),
                    [&](int64_t row, int64_t rows, int64_t column, int64_t count, const float* sums) {
                      for (int64_t r = row; r < row + rows; ++r, sums += COLUMNS)
                        k.first.store(r, column, load_two(sums, 32), count);
                    });
    map.convolve(
        2 * half, depthwise1,
        [&](int64_t row, int64_t c, int64_t count) { return load_one(k.first.at + row * 2 * half + c, count); },
        [&](int64_t row, int64_t c, int64_t count, int64_t rows, const float* sums) {
          for (int64_t r = row; r < row + rows; ++r, sums += LANES) {
            store_one(k.convolved.at + r * 2 * half + c, load(sums), count);
            store_one(k.all.at + r * fused + c, RoundedGelu::value(load(sums)), count);
          }
        });
    for (int64_t c = 0; c < half; c += LANES) {
      const int64_t count = half - c;
      map.around(
          Best{Vec{} - INFINITY, IVec{}},
          [&](Best& best, int64_t neighbour, int32_t tap) {
            const Vec v = load_one(k.norm.at + neighbour * columns + half + c, count);
            best.place = v > best.value ? IVec{} + tap : best.place;
            best.value = v > best.value ? v : best.value;
          },
          [&](const Best& best, int64_t row) {
            store_one(k.pooled.at + row * half + c, best.value, count);
            _mm512_mask_cvtepi32_storeu_epi8(k.places + row * half + c, bfloat16::first(count), (__m512i)best.place);
          });
    }
    product_of_rows(rows, k.pooled, second, pieces.at(memory, 1),
                    [&](int64_t row, int64_t rows, int64_t column, int64_t count, const float* sums) {
                      const Two b = load_two(bias2 + column, count);
                      for (int64_t r = row; r < row + rows; ++r, sums += COLUMNS) {
                        const Two v{load(sums) + b.low, load(sums + 16) + b.high};
                        k.second.store(r, column, v, count);
                        k.all.store(r, 2 * half + column, {RoundedGelu::value(v.low), RoundedGelu::value(v.high)},
                                    count);
                      }
                    });
    // Low frequencies: attention between average pooling and upsampling.
    if (pool > 1)
      windows([&](int64_t row) { std::fill_n(mixed + row * low, low, 0.f); },
              [&](int64_t row, int64_t from, float share) {
                for (int64_t c = 0; c < low; c += 32) {
                  const Two v = k.norm.load(from, 2 * half + c, low - c);
                  add(mixed + row * low + c, {v.low * share, v.high * share}, low - c);
                }
              });
    for (int64_t row = 0; pool > 1 && row < small_rows(); ++row)
      for (int64_t c = 0; c < low; c += 32)
        k.attending.store(row, c, load_two(mixed + row * low + c, low - c), low - c);
    product_of_rows(small_rows(), k.attending, qkv, pieces.at(memory, 2),
                    [&](int64_t row, int64_t rows, int64_t column, int64_t count, const float* sums) {
                      const Two b = bias_qkv ? load_two(bias_qkv + column, count) : Two{};
                      for (int64_t r = row; r < row + rows; ++r, sums += COLUMNS)
                        store_two(k.qkv + r * 3 * low + column, {load(sums) + b.low, load(sums + 16) + b.high}, count);
                    });
    attend(attention(), attention_scale(), k.qkv, k.qkv + low, k.qkv + 2 * low, nullptr, true, mixed, k.softmax);
    windows([](int64_t) {},
            [&](int64_t row, int64_t to, float) {
              for (int64_t c = 0; c < low; c += 32)
                k.all.store(to, 4 * half + c, load_two(mixed + row * low + c, low - c), low - c);
            });
    map.convolve(
        fused, depthwise_fuse,
        [&](int64_t row, int64_t c, int64_t count) { return load_one(k.all.at + row * fused + c, count); },
        [&](int64_t row, int64_t c, int64_t count, int64_t rows, const float* sums) {
          for (int64_t r = row; r < row + rows; ++r, sums += LANES)
            store_one(k.fused.at + r * fused + c, load(sums) + load_one(k.all.at + r * fused + c, count), count);
        });
    product_of_rows(rows, k.fused, out, pieces.at(memory, 3),
                    [&](int64_t row, int64_t rows, int64_t column, int64_t count, const float* sums) {
                      finish(y, bias_out, row, rows, column, count, sums);
                    });
  }

  void sum_rows(int64_t rows, int64_t columns, const Rows& x, float* to) const {
    std::vector<double> sums(columns, 0.0);
    std::vector<float> part(columns);
    const int64_t block = block_of(rows);
    for (int64_t start = 0; start < rows; start += block) {
      std::fill(part.begin(), part.end(), 0.f);
      for (int64_t r = start; r < std::min(start + block, rows); ++r)
        for (int64_t c = 0; c < columns; c += 32) add(&part[c], x.load(r, c, columns - c), columns - c);
      for (int64_t c = 0; c < columns; ++c) sums[c] += part[c];
    }
    std::copy(sums.begin(), sums.end(), to);
  }

  // `grads` in the order of the operator's inputs, without the share.
  void backward(const Kept& k, const float* grad, float* const* grads) const {
    const PackedWeight out(weight_out, columns, fused, false), qkv(weight_qkv, 3 * low, low, true);
    const PackedWeight second(weight2, 2 * half, half, false), first(weight1, 2 * half, half, false);
    const Pieces pieces({out.size(), qkv.size(), second.size(), first.size(), rows * columns / 2, rows * columns / 2,
                         rows * fused / 2, rows * fused / 2, rows * half, rows * half / 2, small_rows() * low,
                         small_rows() * 3 * low, small_rows() * 3 * low / 2, small_rows() * low / 2});
    float* memory = scratch<Branch>(pieces.size);
    const PackedWeight* weights[] = {&out, &qkv, &second, &first};
    for (int i = 0; i < 4; ++i) weights[i]->pack(pieces.at(memory, i));
    const Rows before = rows_at(pieces.at(memory, 4), columns), after = rows_at(pieces.at(memory, 5), columns);
    const Rows grad_fused = rows_at(pieces.at(memory, 6), fused), grad_all = rows_at(pieces.at(memory, 7), fused);
    const Rows grad_first = rows_at(pieces.at(memory, 8), 2 * half), grad_pooled = rows_at(pieces.at(memory, 9), half);
    float *grad_mixed = pieces.at<float>(memory, 10), *grad_qkv = pieces.at<float>(memory, 11);
    const Rows rounded_qkv = rows_at(pieces.at(memory, 12), 3 * low),
               grad_attending = rows_at(pieces.at(memory, 13), low);
    const int64_t size = SUMS * columns;
    std::vector<float> partial(blocks() * size, 0.f);
    for_tasks(blocks(), true, [&](int64_t block) {
      open(block, grad, &partial[block * size], before.from(block * block_rows), after.from(block * block_rows));
    });
    const auto store_to = [](const Rows& to) {
      return [=](int64_t row, int64_t rows, int64_t column, int64_t count, const float* sums) {
        for (int64_t r = row; r < row + rows; ++r, sums += COLUMNS) to.store(r, column, load_two(sums, 32), count);
      };
    };
    product_over_rows(columns, fused, rows, before, k.fused, false, grads[10]);
    product_of_rows(rows, scale ? after : before, out, pieces.at(memory, 0), store_to(grad_fused));
    map.convolve_back(
        fused, depthwise_fuse,
        [&](int64_t row, int64_t c, int64_t count, float*) { return load_one(k.all.at + row * fused + c, count); },
        [&](int64_t row, int64_t c, int64_t count) { return load_one(grad_fused.at + row * fused + c, count); },
        [&](int64_t row, int64_t c, int64_t count, int64_t rows, const float* sums, const float*) {
          for (int64_t r = row; r < row + rows; ++r, sums += LANES) {
            Vec v = load(sums) + load_one(grad_fused.at + r * fused + c, count);
            if (c < 4 * half)  // the activations; a vector is on one side of each border
              v *= RoundedGelu::slope(c < 2 * half ? load_one(k.convolved.at + r * 2 * half + c, count)
                                                   : load_one(k.second.at + r * 2 * half + c - 2 * half, count));
            store_one(grad_all.at + r * fused + c, v, count);
          }
        },
        grads[9]);
    const Rows norm = after;  // its gradient
    map.convolve_back(
        2 * half, depthwise1,
        [&](int64_t row, int64_t c, int64_t count, float*) { return load_one(k.first.at + row * 2 * half + c, count); },
        [&](int64_t row, int64_t c, int64_t count) { return load_one(grad_all.at + row * fused + c, count); },
        [&](int64_t row, int64_t c, int64_t count, int64_t rows, const float* sums, const float*) {
          for (int64_t r = row; r < row + rows; ++r, sums += LANES)
            store_one(grad_first.at + r * 2 * half + c, load(sums), count);
        },
        grads[4]);
    product_over_rows(2 * half, half, rows, grad_first, k.norm, false, grads[3]);
    product_of_rows(rows, grad_first, first, pieces.at(memory, 3), store_to(norm));
    const Rows grad_second = grad_all.from(0, 2 * half);
    product_over_rows(2 * half, half, rows, grad_second, k.pooled, false, grads[5]);
    sum_rows(rows, 2 * half, grad_second, grads[6]);
    product_of_rows(rows, grad_second, second, pieces.at(memory, 2), store_to(grad_pooled));
    for (int64_t c = 0; c < half; c += LANES) {
      const int64_t count = half - c;
      map.around(
          Vec{},
          [&](Vec& sum, int64_t neighbour, int32_t tap) {  // as its neighbour sees it, this one is at 8 - tap
            const __m128i places = _mm_maskz_loadu_epi8(bfloat16::first(count), k.places + neighbour * half + c);
            const Vec grad = load_one(grad_pooled.at + neighbour * half + c, count);
            sum += (IVec)_mm512_cvtepu8_epi32(places) == 8 - tap ? grad : Vec{};
          },
          [&](const Vec& sum, int64_t row) { store_one(norm.at + row * columns + half + c, sum, count); });
    }
    windows([&](int64_t row) { std::fill_n(grad_mixed + row * low, low, 0.f); },
            [&](int64_t row, int64_t from, float) {
              for (int64_t c = 0; c < low; c += 32)
                add(grad_mixed + row * low + c, grad_all.load(from, 4 * half + c, low - c), low - c);
            });
    attend_back(attention(), attention_scale(), k.qkv, k.qkv + low, k.qkv + 2 * low, nullptr, true, k.softmax,
                grad_mixed, grad_qkv, grad_qkv + low, grad_qkv + 2 * low, nullptr);
    for_tasks(small_rows(), true, [&](int64_t row) {
      for (int64_t c = 0; c < 3 * low; c += 32)
        rounded_qkv.store(row, c, load_two(grad_qkv + row * 3 * low + c, 3 * low - c), 3 * low - c);
    });
    product_over_rows(low, 3 * low, small_rows(), k.attending, rounded_qkv, false, grads[7]);
    if (bias_qkv) sum_rows(small_rows(), 3 * low, rounded_qkv, grads[8]);
    product_of_rows(small_rows(), rounded_qkv, qkv, pieces.at(memory, 1),
                    store_to(pool > 1 ? grad_attending : norm.from(0, 2 * half)));
    if (pool > 1)
      windows([](int64_t) {},
              [&](int64_t row, int64_t to, float share) {
                for (int64_t c = 0; c < low; c += 32) {
                  const Two v = grad_attending.load(row, c, low - c);
                  norm.store(to, 2 * half + c, {v.low * share, v.high * share}, low - c);
                }
              });
    for_tasks(blocks(), true, [&](int64_t block) {
      close(block, grad, &partial[block * size], grads[0],
            [&](int64_t r, int64_t c, int64_t count) { return norm.load(block * block_rows + r, c, count); });
    });
    write(totals(partial, size), weight_out, bias_out, fused, true, grads[1], grads[2], nullptr, grads[12], grads[10],
          grads[11]);
  }
};

}  // namespace

// x [batch, height, width, channels]; 1×1 convolutions' weights are [outputs, inputs], that of qkv [inputs, outputs].
static Tensors inception_mixer(const Tensor& X, const Tensor& NormWeight, const Tensor& NormBias, const Tensor& Weight1,
                               const Tensor& Depthwise1, const Tensor& Weight2, const Tensor& Bias2,
                               const Tensor& WeightQkv, const MaybeTensor& BiasQkv, const Tensor& DepthwiseFuse,
                               const Tensor& WeightOut, const Tensor& BiasOut, const MaybeTensor& Scale,
                               const MaybeTensor& Share, int64_t heads, int64_t pool, float epsilon) {
  const Mixer m(X, NormWeight, NormBias, Weight1, Depthwise1, Weight2, Bias2, WeightQkv, BiasQkv, DepthwiseFuse,
                WeightOut, BiasOut, Scale, Share, heads, pool, epsilon);
  Tensor Y = empty_like(X), Kept = empty({m.kept_pieces().size}, paddle::DataType::INT32);
  m.forward(m.kept_of(Kept.data<int32_t>()), Y.data<float>());
  return {Y, Kept};
}

static Tensors inception_mixer_gradient(const Tensor& X, const Tensor& NormWeight, const Tensor& NormBias,
                                        const Tensor& Weight1, const Tensor& Depthwise1, const Tensor& Weight2,
                                        const Tensor& Bias2, const Tensor& WeightQkv, const MaybeTensor& BiasQkv,
                                        const Tensor& DepthwiseFuse, const Tensor& WeightOut, const Tensor& BiasOut,
                                        const MaybeTensor& Scale, const MaybeTensor& Share, const Tensor& Kept,
                                        const Tensor& GradY, int64_t heads, int64_t pool, float epsilon) {
  const Mixer m(X, NormWeight, NormBias, Weight1, Depthwise1, Weight2, Bias2, WeightQkv, BiasQkv, DepthwiseFuse,
                WeightOut, BiasOut, Scale, Share, heads, pool, epsilon);
  require(Kept.dtype() == paddle::DataType::INT32 && is_contiguous(Kept) && Kept.numel() == m.kept_pieces().size,
          "what was kept is not what the forward pass gave");
  Tensors grads;
  std::vector<float*> at;
  const auto like = [&](const MaybeTensor& of) {
    grads.push_back(of ? empty_like(*of) : Tensor());
    at.push_back(of ? grads.back().data<float>() : nullptr);
  };
  for (const Tensor* each : {&X, &NormWeight, &NormBias, &Weight1, &Depthwise1, &Weight2, &Bias2, &WeightQkv})
    like(*each);
  like(BiasQkv);
  for (const Tensor* each : {&DepthwiseFuse, &WeightOut, &BiasOut}) like(*each);
  like(Scale);
  m.backward(m.kept_of(const_cast<int32_t*>(Kept.data<int32_t>())), floats("grad", GradY, X.shape()), at.data());
  return grads;
}

#define INPUTS                                                                                                  \
  "X", "NormWeight", "NormBias", "Weight1", "Depthwise1", "Weight2", "Bias2", "WeightQkv", Optional("BiasQkv"), \
      "DepthwiseFuse", "WeightOut", "BiasOut", Optional("Scale"), Optional("Share")

OPERATOR(inception_mixer, inception_mixer,
         .Inputs({INPUTS}).Outputs({"Y", "Kept"}).Attrs({"heads: int64_t", "pool: int64_t", "epsilon: float"}));
GRADIENT(inception_mixer, inception_mixer_gradient,
         .Inputs({INPUTS, "Kept", Grad("Y")})
             .Outputs({Grad("X"), Grad("NormWeight"), Grad("NormBias"), Grad("Weight1"), Grad("Depthwise1"),
                       Grad("Weight2"), Grad("Bias2"), Grad("WeightQkv"), Grad(Optional("BiasQkv")),
                       Grad("DepthwiseFuse"), Grad("WeightOut"), Grad("BiasOut"), Grad(Optional("Scale"))})
             .Attrs({"heads: int64_t", "pool: int64_t", "epsilon: float"}));
#endif
