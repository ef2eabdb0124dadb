// The feed-forward branch of a Transformer block as one operator, with products of operands rounded to bfloat16.
//
// y = x kept + share[image] scale (act(norm(x) w1 + b1) w2 + b2), with GELU or StarReLU, and the norm of rows or of
// images. Rows go through all of it in blocks that stay in cache. Only the hidden layer before its activation is kept
// for the gradient, rounded to bfloat16. Sums, norms and what Paddle sees are float32. Sums are added in an order that
// depends on the shapes alone, so that the number of threads changes no bit.

#include <cstdint>
#include <vector>

#include "activations.h"
#include "branch.h"

#ifdef HYBRID_BFLOAT16

using namespace bfloat16;

namespace {

// Activations as both passes use them; `learned` are sums for the gradients of StarReLU's scale and bias.
struct PlainGelu : RoundedGelu {
  void sum(Vec, Vec, Vec*) const {}
};

struct StarRelu {
  float scale, bias;
  Vec value(Vec x) const { return scale * square(x) + bias; }
  void both(Vec x, Vec& y, Vec& slope) const { y = value(x), slope = x > 0.f ? 2.f * scale * x : Vec{}; }
  void sum(Vec x, Vec grad, Vec* learned) const { learned[0] += grad * square(x), learned[1] += grad; }
  static Vec square(Vec x) { return x > 0.f ? x * x : Vec{}; }
};

struct FeedForward : Branch {
  int64_t hidden;
  const float *star_scale, *star_bias;
  const float *weight1, *bias1, *weight2, *bias2;
  bool transposed;

  FeedForward(const Tensor& X, const Tensor& NormWeight, const Tensor& NormBias, const Tensor& Weight1,
              const MaybeTensor& Bias1, const Tensor& Weight2, const MaybeTensor& Bias2, const MaybeTensor& Kept,
              const MaybeTensor& Scale, const MaybeTensor& Share, const MaybeTensor& StarScale,
              const MaybeTensor& StarBias, bool transposed, bool of_images, float epsilon)
      : Branch(X, NormWeight, NormBias, Kept, Scale, Share, epsilon, of_images), transposed(transposed) {
    hidden = sizes("weight1", Weight1, 2)[transposed ? 0 : 1];
    const Shape wide{columns, hidden}, tall{hidden, columns};
    weight1 = floats("weight1", Weight1, transposed ? tall : wide), bias1 = floats("bias1", Bias1, {hidden});
    weight2 = floats("weight2", Weight2, transposed ? wide : tall), bias2 = floats("bias2", Bias2, {columns});
    star_scale = floats("star scale", StarScale, {1}), star_bias = floats("star bias", StarBias, {1});
    require(!star_scale == !star_bias, "StarReLU has a scale and a bias");
  }

  template <class Body>
  void with_activation(Body body) const {
    star_scale ? body(StarRelu{*star_scale, *star_bias}) : body(PlainGelu());
  }

  // `before` is the hidden layer before its activation.
  template <class Activation>
  void forward(Activation act, const Rows& before, float* y) const {
    const PackedWeight first(weight1, columns, hidden, transposed), second(weight2, hidden, columns, transposed);
    const Pieces shared({first.size(), second.size()});
    float* memory = scratch<Branch>(shared.size);
    const Right right1 = first.pack(shared.at(memory, 0)), right2 = second.pack(shared.at(memory, 1));
    const int64_t narrow = pitch_of_rows(columns), wide = pitch_of_rows(hidden);
    const Pieces own({block_rows * narrow, block_rows * wide});
    for_tasks(blocks(), true, [&](int64_t block) {
      float* memory = scratch(own.size);
      const Rows in{own.at<uint16_t>(memory, 0), 2 * narrow}, inside{own.at<uint16_t>(memory, 1), 2 * wide};
      const int64_t from = block * block_rows, count = rows_of(block);
      normalise(block, in);
      multiply(count, hidden, columns, in.left(), right1, 0, panels_of(hidden),
               [&](int64_t row, int64_t rows, int64_t column, int64_t count, const float* sums) {
                 const Two bias = bias1 ? load_two(bias1 + column, count) : Two{};
                 for (int64_t r = row; r < row + rows; ++r, sums += COLUMNS) {
                   const __m512i h = rounded({load(sums) + bias.low, load(sums + 16) + bias.high});
                   store_rounded(before.at + (from + r) * before.pitch + column, h, count);
                   const Two v = widened(h);
                   inside.store(r, column, {act.value(v.low), act.value(v.high)}, 32);
                 }
               });
      multiply(count, columns, hidden, inside.left(), right2, 0, panels_of(columns),
               [&](int64_t row, int64_t rows, int64_t column, int64_t count, const float* sums) {
                 finish(y, bias2, from + row, rows, column, count, sums);
               });
    });
  }

  template <class Activation>
  void backward(Activation act, const Rows& before, const float* grad, float* grad_x, float* grad_norm_weight,
                float* grad_norm_bias, float* grad_weight1, float* grad_bias1, float* grad_weight2, float* grad_bias2,
                float* grad_kept, float* grad_scale, float* grad_star_scale, float* grad_star_bias) const {
    const PackedWeight second(weight2, columns, hidden, !transposed), first(weight1, hidden, columns, !transposed);
    const int64_t group = 8 * block_rows, narrow = pitch_of_rows(columns), wide = pitch_of_rows(hidden);
    const Pieces shared({second.size(), first.size(), group * narrow, group * narrow, group * wide, group * wide});
    float* memory = scratch<Branch>(shared.size);
    const Right right2 = second.pack(shared.at(memory, 0)), right1 = first.pack(shared.at(memory, 1));
    const Rows branches{shared.at<uint16_t>(memory, 2), 2 * narrow}, norms{shared.at<uint16_t>(memory, 3), 2 * narrow};
    const Rows insides{shared.at<uint16_t>(memory, 4), 2 * wide}, changes{shared.at<uint16_t>(memory, 5), 2 * wide};
    const int64_t size = SUMS * columns + hidden + 2;
    std::vector<float> partial(blocks() * size, 0.f), of_rows(images ? 2 * rows : 0);
    const Pieces own({block_rows * narrow, block_rows * pitch_of_pairs(columns)});
    for (int64_t start = 0; start < rows; start += group) {
      const int64_t here = std::min(group, rows - start);
      for_tasks((here + block_rows - 1) / block_rows, true, [&](int64_t task) {
        float* memory = scratch(own.size);
        const Rows scaled{own.at<uint16_t>(memory, 0), 2 * narrow};
        float* back = own.at<float>(memory, 1);
        const int64_t inside = task * block_rows, from = start + inside, block = from / block_rows,
                      count = rows_of(block);
        const int64_t pitch = pitch_of_pairs(columns);
        float* sums_of_block = &partial[block * size];
        Vec learned[2] = {};
        normalise(block, norms.from(inside));
        open(block, grad, sums_of_block, branches.from(inside), scaled);
        multiply(count, hidden, columns, (scale ? scaled : branches.from(inside)).left(), right2, 0, panels_of(hidden),
                 [&](int64_t row, int64_t rows, int64_t column, int64_t count, const float* sums) {
                   Two bias{};
                   for (int64_t r = row; r < row + rows; ++r, sums += COLUMNS) {
                     const Two h = before.load(from + r, column, count);
                     Two y, slope;
                     act.both(h.low, y.low, slope.low);
                     act.both(h.high, y.high, slope.high);
                     act.sum(h.low, load(sums), learned);
                     act.sum(h.high, load(sums + 16), learned);
                     slope = {slope.low * load(sums), slope.high * load(sums + 16)};
                     bias = {bias.low + slope.low, bias.high + slope.high};
                     insides.store(inside + r, column, y, 32);
                     changes.store(inside + r, column, slope, 32);
                   }
                   add(sums_of_block + SUMS * columns + column, bias, count);
                 },
                 [&](int64_t row, int64_t rows, int64_t column) { before.fetch(from + row, rows, column); });
        multiply(count, columns, hidden, changes.from(inside).left(), right1, 0, panels_of(columns),
                 [&](int64_t row, int64_t rows, int64_t column, int64_t, const float* sums) {
                   for (int64_t r = row; r < row + rows; ++r, sums += COLUMNS)
                     store_two(back + r * pitch + column, load_two(sums, 32), 32);
                 });
        for (int i = 0; i < 2; ++i) sums_of_block[size - 2 + i] = total(learned[i]);
        close(
            block, grad, sums_of_block, grad_x,
            [&](int64_t r, int64_t c, int64_t count) { return load_two(back + r * pitch + c, count); }, of_rows.data());
      });
      if (transposed) {
        product_over_rows(hidden, columns, here, changes, norms, start, grad_weight1);
        product_over_rows(columns, hidden, here, branches, insides, start, grad_weight2);
      } else {
        product_over_rows(columns, hidden, here, norms, changes, start, grad_weight1);
        product_over_rows(hidden, columns, here, insides, branches, start, grad_weight2);
      }
    }
    close_images(of_rows, grad_x);
    const std::vector<double> sums = totals(partial, size);
    write(sums, weight2, bias2, hidden, transposed, grad_norm_weight, grad_norm_bias, grad_kept, grad_scale,
          grad_weight2, grad_bias2);
    for (int64_t i = 0; bias1 && i < hidden; ++i) grad_bias1[i] = float(sums[SUMS * columns + i]);
    if (star_scale) *grad_star_scale = float(sums[size - 2]), *grad_star_bias = float(sums[size - 1]);
  }
};

}  // namespace

// x [batch, ..., columns]; weights [columns, hidden] and [hidden, columns], or transposed; share [batch, 1, ...].
static Tensors feed_forward(const Tensor& X, const Tensor& NormWeight, const Tensor& NormBias, const Tensor& Weight1,
                            const MaybeTensor& Bias1, const Tensor& Weight2, const MaybeTensor& Bias2,
                            const MaybeTensor& Kept, const MaybeTensor& Scale, const MaybeTensor& Share,
                            const MaybeTensor& StarScale, const MaybeTensor& StarBias, bool transposed, bool of_images,
                            float epsilon) {
  const FeedForward f(X, NormWeight, NormBias, Weight1, Bias1, Weight2, Bias2, Kept, Scale, Share, StarScale, StarBias,
                      transposed, of_images, epsilon);
  Tensor Y = empty_like(X), Hidden = empty({f.rows, f.hidden}, paddle::DataType::BFLOAT16);
  f.with_activation(
      [&](auto act) { f.forward(act, {static_cast<uint16_t*>(Hidden.data()), f.hidden}, Y.data<float>()); });
  return {Y, Hidden};
}

static Tensors feed_forward_gradient(const Tensor& X, const Tensor& NormWeight, const Tensor& NormBias,
                                     const Tensor& Weight1, const MaybeTensor& Bias1, const Tensor& Weight2,
                                     const MaybeTensor& Bias2, const MaybeTensor& Kept, const MaybeTensor& Scale,
                                     const MaybeTensor& Share, const MaybeTensor& StarScale,
                                     const MaybeTensor& StarBias, const Tensor& Hidden, const Tensor& GradY,
                                     bool transposed, bool of_images, float epsilon) {
  const FeedForward f(X, NormWeight, NormBias, Weight1, Bias1, Weight2, Bias2, Kept, Scale, Share, StarScale, StarBias,
                      transposed, of_images, epsilon);
  require(Hidden.dtype() == paddle::DataType::BFLOAT16 && Hidden.shape() == Shape({f.rows, f.hidden}) &&
              is_contiguous(Hidden),
          "hidden is not what the forward pass gave");
  Tensors grads{empty_like(X),
                empty_like(NormWeight),
                empty_like(NormBias),
                empty_like(Weight1),
                Tensor(),
                empty_like(Weight2),
                Tensor(),
                Tensor(),
                Tensor(),
                Tensor(),
                Tensor()};
  const auto like = [&](int i, const MaybeTensor& of) {
    return of ? (grads[i] = empty_like(*of)).data<float>() : nullptr;
  };
  const Rows before{static_cast<uint16_t*>(const_cast<void*>(Hidden.data())), f.hidden};
  const float* grad = floats("grad", GradY, X.shape());
  float *bias1 = like(4, Bias1), *bias2 = like(6, Bias2), *kept = like(7, Kept), *scale = like(8, Scale);
  float *star_scale = like(9, StarScale), *star_bias = like(10, StarBias);
  f.with_activation([&](auto act) {
    f.backward(act, before, grad, grads[0].data<float>(), grads[1].data<float>(), grads[2].data<float>(),
               grads[3].data<float>(), bias1, grads[5].data<float>(), bias2, kept, scale, star_scale, star_bias);
  });
  return grads;
}

OPERATOR(feed_forward, feed_forward,
         .Inputs({"X", "NormWeight", "NormBias", "Weight1", Optional("Bias1"), "Weight2", Optional("Bias2"),
                  Optional("Kept"), Optional("Scale"), Optional("Share"), Optional("StarScale"), Optional("StarBias")})
             .Outputs({"Y", "Hidden"})
             .Attrs({"transposed: bool", "of_images: bool", "epsilon: float"}));
GRADIENT(feed_forward, feed_forward_gradient,
         .Inputs({"X", "NormWeight", "NormBias", "Weight1", Optional("Bias1"), "Weight2", Optional("Bias2"),
                  Optional("Kept"), Optional("Scale"), Optional("Share"), Optional("StarScale"), Optional("StarBias"),
                  "Hidden", Grad("Y")})
             .Outputs({Grad("X"), Grad("NormWeight"), Grad("NormBias"), Grad("Weight1"), Grad(Optional("Bias1")),
                       Grad("Weight2"), Grad(Optional("Bias2")), Grad(Optional("Kept")), Grad(Optional("Scale")),
                       Grad(Optional("StarScale")), Grad(Optional("StarBias"))})
             .Attrs({"transposed: bool", "of_images: bool", "epsilon: float"}));
#endif
