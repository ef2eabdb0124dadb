// Batches of images through a pipeline of transforms: uint8 [H, W, 3] in, normalised float32 [3, H', W'] out.
//
// What the classes of datasets/transforms.py do, bit by bit: the draws are numpy's, the pixels those of cv2 and
// Pillow. An image stays in the cache from its first step to its last. The file is compiled without contraction of
// products and sums, which would change last bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#if defined(__AVX512VBMI__)
#include <immintrin.h>
#endif

#include "numpy_random.h"
#include "randaugment.h"

namespace {

// A program is a list of steps: code, number of arguments, arguments.
enum Step { RESIZE = 1, RESIZED_CROP, PADDED_CROP, FLIP, RANDAUGMENT, JITTER, ROTATION, NORMALIZE, ERASING };

constexpr int ATTEMPTS = 10, COEFFICIENT_BITS = 11, OPERATION_NUMBERS = 6;

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// a / b, rounded as a division is, given 1 / b (Markstein, IA-64 and Elementary Functions, 2000).
inline float divide(float a, float b, float inverse) {
  const float near = a * inverse;
  return __builtin_fmaf(__builtin_fmaf(-b, near, a), inverse, near);
}
#else
inline float multiply_add(float a, float b, float c) { return a * b + c; }

inline float divide(float a, float b, float) { return a / b; }
#endif

struct Source {
  const uint8_t* bytes;  // first byte of the box
  int64_t height, width, row_bytes;
};

// Where the outputs of one axis lie in the input: the lower of two neighbours and both weights.
struct Axis {
  std::vector<int32_t> lower;
  std::vector<int16_t> weights[2];

  void fit(int64_t in, int64_t out, bool clamp) {
    lower.resize(out);
    for (auto& each : weights) each.resize(out);
    const double scale = 1. / (double(out) / double(in));
    for (int64_t i = 0; i < out; ++i) {
      float place = float((double(i) + 0.5) * scale - 0.5);
      int64_t first = int64_t(std::floor(place));
      place -= float(first);
      if (clamp && first < 0) place = 0, first = 0;
      if (clamp && first >= in - 1) place = 0, first = in - 1;
      lower[i] = int32_t(first);
      weights[0][i] = int16_t(std::lrint((1.f - place) * (1 << COEFFICIENT_BITS)));
      weights[1][i] = int16_t(std::lrint(place * (1 << COEFFICIENT_BITS)));
    }
  }
};

// Keeps what a thread needs for one image, from call to call.
struct Workshop {
  std::vector<Pixel> memory[2];
  Axis horizontal, vertical;
  std::vector<int16_t> rows[2];  // a source row scaled horizontally, plane by plane, in 15 bits
  int64_t row_held[2];
  std::vector<int32_t> places;

  Picture picture(int which, int64_t height, int64_t width) {
    memory[which].resize(height * width + 1);
    memory[which][height * width] = 0;
    return {height, width, memory[which].data()};
  }
};

Pixel packed(const uint8_t* p) { return Pixel(p[0]) | Pixel(p[1]) << 8 | Pixel(p[2]) << 16; }

void scale_row(Workshop& shop, const Source& in, int64_t y, int64_t width, int16_t* row) {
  const uint8_t* line = in.bytes + y * in.row_bytes;
  const int32_t* lower = shop.horizontal.lower.data();
  const int16_t *left = shop.horizontal.weights[0].data(), *right = shop.horizontal.weights[1].data();
  for (int64_t x = 0; x < width; ++x) {
    const uint8_t *a = line + 3 * lower[x], *b = line + 3 * std::min<int64_t>(lower[x] + 1, in.width - 1);
    for (int c = 0; c < 3; ++c) row[c * width + x] = int16_t((a[c] * left[x] + b[c] * right[x]) >> 4);
  }
}

// cv2.resize, INTER_LINEAR.
void resize(Workshop& shop, const Source& in, Picture out) {
  const int64_t width = out.width;
  if (in.height == out.height && in.width == width) {
    for (int64_t y = 0; y < out.height; ++y)
      for (int64_t x = 0; x < width; ++x) out.pixels[y * width + x] = packed(in.bytes + y * in.row_bytes + 3 * x);
    return;
  }
  if (in.height == 2 * out.height && in.width == 2 * width) {  // to the half: means of four, as cv2 has it
    for (int64_t y = 0; y < out.height; ++y)
      for (int64_t x = 0; x < width; ++x) {
        const uint8_t *a = in.bytes + 2 * y * in.row_bytes + 6 * x, *b = a + in.row_bytes;
        uint8_t means[3];
        for (int c = 0; c < 3; ++c) means[c] = uint8_t((a[c] + a[c + 3] + b[c] + b[c + 3] + 2) >> 2);
        out.pixels[y * width + x] = packed(means);
      }
    return;
  }
  shop.horizontal.fit(in.width, width, true);
  shop.vertical.fit(in.height, out.height, false);
  for (int k = 0; k < 2; ++k) {
    shop.rows[k].resize(3 * width);
    shop.row_held[k] = -1;
  }
  for (int64_t y = 0; y < out.height; ++y) {
    const int16_t* rows[2];
    for (int k = 0; k < 2; ++k) {
      const int64_t wanted = std::clamp<int64_t>(shop.vertical.lower[y] + k, 0, in.height - 1);
      const int slot = int(wanted % 2);
      if (shop.row_held[slot] != wanted) {
        scale_row(shop, in, wanted, width, shop.rows[slot].data());
        shop.row_held[slot] = wanted;
      }
      rows[k] = shop.rows[slot].data();
    }
    const int upper = shop.vertical.weights[0][y], lower = shop.vertical.weights[1][y];
    const int16_t *a = rows[0], *b = rows[1];
    Pixel* line = out.pixels + y * width;
    for (int64_t x = 0; x < width; ++x) {
      Pixel pixel = 0;
      for (int c = 0; c < 3; ++c) {
        const int sum = ((upper * a[c * width + x]) >> 16) + ((lower * b[c * width + x]) >> 16);
        pixel |= Pixel((sum + 2) >> 2) << (8 * c);
      }
      line[x] = pixel;
    }
  }
}

// A box of the share and the ratio of two draws, as often as it takes to satisfy `fits`; false where none does.
template <class Fits>
bool draw_box(NumpyRandom& random, const double* arguments, int64_t area, bool ratio_is_width, int64_t& height,
              int64_t& width, Fits fits) {
  for (int attempt = 0; attempt < ATTEMPTS; ++attempt) {
    const double target = random.uniform(arguments[0], arguments[1]) * double(area);
    const double ratio = std::exp(random.uniform(arguments[2], arguments[3]));
    const double long_side = std::nearbyint(std::sqrt(target * ratio));
    const double short_side = std::nearbyint(std::sqrt(target / ratio));
    width = int64_t(ratio_is_width ? long_side : short_side);
    height = int64_t(ratio_is_width ? short_side : long_side);
    if (fits(height, width)) return true;
  }
  return false;
}

Source resized_crop_box(NumpyRandom& random, const double* arguments, const Source& in) {
  int64_t h, w, top, left;
  const auto fits = [&](int64_t high, int64_t wide) {
    return 0 < wide && wide <= in.width && 0 < high && high <= in.height;
  };
  if (draw_box(random, arguments, in.height * in.width, true, h, w, fits)) {
    top = random.integers(in.height - h + 1);
    left = random.integers(in.width - w + 1);
  } else {
    w = std::min<int64_t>(in.width, std::max<int64_t>(int64_t(std::nearbyint(in.height * arguments[5])), 1));
    h = std::min<int64_t>(in.height, std::max<int64_t>(int64_t(std::nearbyint(in.width / arguments[4])), 1));
    top = (in.height - h) / 2;
    left = (in.width - w) / 2;
  }
  return {in.bytes + top * in.row_bytes + 3 * left, h, w, in.row_bytes};
}

void padded_crop(NumpyRandom& random, int64_t padding, Picture in, Picture out) {
  const int64_t top = random.integers(2 * padding + 1) - padding, left = random.integers(2 * padding + 1) - padding;
  const int64_t start = std::clamp<int64_t>(-left, 0, in.width);
  const int64_t end = std::clamp<int64_t>(in.width - left, start, in.width);
  for (int64_t y = 0; y < in.height; ++y) {
    Pixel* line = out.pixels + y * in.width;
    if (y + top < 0 || y + top >= in.height) {
      std::fill_n(line, in.width, 0);
      continue;
    }
    std::fill_n(line, start, 0);
    std::copy(in.pixels + (y + top) * in.width + left + start, in.pixels + (y + top) * in.width + left + end,
              line + start);
    std::fill(line + end, line + in.width, 0);
  }
}

// The same table for all channels, and for the unused byte of each pixel.
void apply_table(Picture image, const uint8_t* table) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(image.pixels);
  const int64_t count = image.size() * int64_t(sizeof(Pixel));
  int64_t i = 0;
#if defined(__AVX512VBMI__)
  __m512i parts[4];
  for (int k = 0; k < 4; ++k) parts[k] = _mm512_loadu_si512(table + 64 * k);
  for (; i + 64 <= count; i += 64) {
    const __m512i values = _mm512_loadu_si512(bytes + i);
    const __m512i low = _mm512_permutex2var_epi8(parts[0], values, parts[1]);
    const __m512i high = _mm512_permutex2var_epi8(parts[2], values, parts[3]);
    _mm512_storeu_si512(bytes + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(values), low, high));
  }
#endif
  for (; i < count; ++i) bytes[i] = table[bytes[i]];
}

// Paddle's saturation: a blend with a grey whose weights take the channels for blue, green, red.
void saturate(Picture image, float alpha, float rest) {
  for (int64_t i = 0; i < image.size(); ++i) {
    const Pixel p = image.pixels[i];
    const float r = float(channel(p, 0)), g = float(channel(p, 1)), b = float(channel(p, 2));
    const float grey = multiply_add(b, 0.299f, multiply_add(r, 0.114f, g * 0.587f)) * rest;
    const auto level = [&](float v) { return Pixel(int(std::min(std::max(v * alpha + grey, 0.f), 255.f))); };
    image.pixels[i] = level(r) | level(g) << 8 | level(b) << 16;
  }
}

void jitter(NumpyRandom& random, const double* strengths, Picture image) {
  int order[4] = {0, 1, 2, 3};  // brightness, contrast, saturation, hue
  random.shuffle(order, 4);
  for (const int which : order) {
    if (which == 3 || strengths[which] == 0) continue;
    double factor = random.uniform(std::max(0., 1 - strengths[which]), 1 + strengths[which]);
    if (which == 2) {
      factor = random.uniform(std::max(0., 1 - factor), 1 + factor);
      saturate(image, float(factor), float(1 - factor));
      continue;
    }
    const int middle = which == 0 ? 0 : 74;
    uint8_t table[256];
    for (int v = 0; v < 256; ++v) table[v] = uint8_t(std::min(std::max((v - middle) * factor + middle, 0.), 255.));
    apply_table(image, table);
  }
}

// cv2.warpAffine, INTER_NEAREST, with the inverse of cv2.getRotationMatrix2D about (width / 2, height / 2).
void rotate(Workshop& shop, double degrees, Picture in, Picture out) {
  const double angle = degrees * (3.1415926535897932384626433832795 / 180);
  const double c = std::cos(angle), s = std::sin(angle);
  const double middle_x = float(in.width / 2.0), middle_y = float(in.height / 2.0);
  double m[6] = {c, s, (1 - c) * middle_x - s * middle_y, -s, c, s * middle_x + (1 - c) * middle_y};
  double d = m[0] * m[4] - m[1] * m[3];
  d = d != 0 ? 1. / d : 0;
  const double a11 = m[4] * d, a22 = m[0] * d;
  m[0] = a11;
  m[1] *= -d;
  m[3] *= -d;
  m[4] = a22;
  const double b1 = -m[0] * m[2] - m[1] * m[5], b2 = -m[3] * m[2] - m[4] * m[5];
  m[2] = b1;
  m[5] = b2;

  const float across[2] = {float(m[0]), float(m[3])}, down[2] = {float(m[1]), float(m[4])};
  const float start[2] = {float(m[2]), float(m[5])};
  const int32_t width = int32_t(out.width), height = int32_t(out.height), black = int32_t(in.size());
  shop.places.resize(width);
  int32_t* places = shop.places.data();
  for (int32_t y = 0; y < height; ++y) {
    const float row_x = float(y) * down[0] + start[0], row_y = float(y) * down[1] + start[1];
    for (int32_t x = 0; x < width; ++x) {
      const int32_t from_x = int32_t(std::nearbyint(multiply_add(across[0], float(x), row_x)));
      const int32_t from_y = int32_t(std::nearbyint(multiply_add(across[1], float(x), row_y)));
      const bool inside = (uint32_t(from_x) < uint32_t(width)) & (uint32_t(from_y) < uint32_t(height));
      places[x] = inside ? from_y * width + from_x : black;
    }
    Pixel* line = out.pixels + int64_t(y) * width;
    for (int32_t x = 0; x < width; ++x) line[x] = in.pixels[places[x]];
  }
}

void normalize(Picture image, const double* arguments, float* __restrict out) {
  const int64_t size = image.size();
  const Pixel* pixels = image.pixels;
  for (int c = 0; c < 3; ++c) {
    const float mean = float(arguments[c]), deviation = float(arguments[3 + c]), inverse = 1.f / deviation;
    float* plane = out + c * size;
    for (int64_t i = 0; i < size; ++i) {
      const float share = divide(float(int32_t((pixels[i] >> (8 * c)) & 255)), 255.f, 1.f / 255.f);
      plane[i] = divide(share - mean, deviation, inverse);
    }
  }
}

void erase(NumpyRandom& random, const double* arguments, int64_t height, int64_t width, float* out) {
  if (random.random() >= arguments[0]) return;
  int64_t h, w;
  const auto fits = [&](int64_t high, int64_t wide) { return high < height && wide < width; };
  if (!draw_box(random, arguments + 1, height * width, false, h, w, fits)) return;
  const int64_t top = random.integers(height - h + 1), left = random.integers(width - w + 1);
  for (int c = 0; c < 3; ++c)
    for (int64_t y = top; y < top + h; ++y) std::fill_n(out + (c * height + y) * width + left, w, 0.f);
}

void transform(Workshop& shop, const Source& source, NumpyRandom& random, const double* program, int64_t length,
               int64_t height, int64_t width, float* out) {
  Picture image = shop.picture(0, height, width), other = shop.picture(1, height, width);
  for (const double *step = program, *end = program + length; step < end; step += 2 + int64_t(step[1])) {
    const double* arguments = step + 2;
    switch (int(step[0])) {
      case RESIZE: resize(shop, source, image); break;
      case RESIZED_CROP: resize(shop, resized_crop_box(random, arguments, source), image); break;
      case PADDED_CROP:
        padded_crop(random, int64_t(arguments[0]), image, other);
        std::swap(image, other);
        break;
      case FLIP:
        if (random.random() < arguments[0])
          for (int64_t y = 0; y < height; ++y) std::reverse(image.pixels + y * width, image.pixels + (y + 1) * width);
        break;
      case RANDAUGMENT: {  // of each operation: its code, whether it has a direction, numbers forward and backward
        constexpr int each = 2 + 2 * OPERATION_NUMBERS;
        const int64_t choices = (int64_t(step[1]) - 1) / each;
        for (int k = 0; k < int(arguments[0]); ++k) {
          const double* chosen = arguments + 1 + random.integers(choices) * each;
          const bool backward = chosen[1] != 0 && random.integers(2);
          const double* numbers = chosen + 2 + (backward ? OPERATION_NUMBERS : 0);
          const Picture result = randaugment(image, other, Operation(int(chosen[0])), numbers);
          if (result.pixels != image.pixels) std::swap(image, other);
        }
        break;
      }
      case JITTER: jitter(random, arguments, image); break;
      case ROTATION:
        rotate(shop, random.uniform(-arguments[0], arguments[0]), image, other);
        std::swap(image, other);
        break;
      case NORMALIZE: normalize(image, arguments, out); break;
      case ERASING: erase(random, arguments, height, width, out); break;
    }
  }
}

}  // namespace

// Transforms `count` images, uint8 [rows, columns, 3] without gaps, to `out`, float32 [count, 3, height, width].
// The draws for image i are those of default_rng([*place, indices[i]]). One thread; callers may be many.
extern "C" int augment_batch(int64_t count, const uint8_t* const* images, int64_t rows, int64_t columns,
                             const int64_t* indices, const int64_t* place, int64_t places, const double* program,
                             int64_t length, int64_t height, int64_t width, float* out) {
  try {
    static thread_local Workshop shop;
    std::vector<uint32_t> entropy(place, place + places);
    entropy.push_back(0);
    for (int64_t i = 0; i < count; ++i) {
      entropy.back() = uint32_t(indices[i]);
      NumpyRandom random(entropy.data(), int(entropy.size()));
      const Source source{images[i], rows, columns, 3 * columns};
      transform(shop, source, random, program, length, height, width, out + i * 3 * height * width);
    }
    return 0;
  } catch (...) {
    return 1;
  }
}
