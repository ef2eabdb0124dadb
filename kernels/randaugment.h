// The operations of RandAugment as Pillow computes them, bit by bit, on packed images.
//
// A packed image is uint32 [H, W], red | green << 8 | blue << 16, and one pixel more, which is black.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef uint32_t Pixel;

struct Picture {
  int64_t height, width;
  Pixel* pixels;
  int64_t size() const { return height * width; }
};

static inline int channel(Pixel pixel, int c) { return (pixel >> (8 * c)) & 255; }

enum Operation {
  IDENTITY,
  AFFINE,
  BRIGHTNESS,
  COLOR,
  CONTRAST,
  SHARPNESS,
  POSTERIZE,
  SOLARIZE,
  AUTOCONTRAST,
  EQUALIZE
};

// Image.blend: from `first` towards `second`, and beyond where share > 1.
static inline int blend(int first, int second, float share) {
  const float mixed = float(first) + share * float(second - first);
  return int(std::min(std::max(mixed, 0.f), 255.f));
}

static inline int luma(Pixel p) {
  return (channel(p, 0) * 19595 + channel(p, 1) * 38470 + channel(p, 2) * 7471 + 0x8000) >> 16;
}

static inline Pixel blend_pixels(Pixel first, Pixel second, float share) {
  return Pixel(blend(channel(first, 0), channel(second, 0), share)) |
         Pixel(blend(channel(first, 1), channel(second, 1), share)) << 8 |
         Pixel(blend(channel(first, 2), channel(second, 2), share)) << 16;
}

typedef uint8_t Tables[3][256];

static inline void apply_tables(Picture image, const Tables& tables) {
  for (int64_t i = 0; i < image.size(); ++i) {
    const Pixel p = image.pixels[i];
    image.pixels[i] =
        Pixel(tables[0][channel(p, 0)]) | Pixel(tables[1][channel(p, 1)]) << 8 | Pixel(tables[2][channel(p, 2)]) << 16;
  }
}

template <class Value>
void fill_tables(Tables& tables, Value value) {
  for (auto& table : tables)
    for (int v = 0; v < 256; ++v) table[v] = uint8_t(value(v));
}

// Nearest pixel at an affine map of the output's coordinates, in Pillow's 16.16 numbers; black outside.
static inline void transform_affine(Picture in, Picture out, const double* a) {
  const auto fixed = [](double v) { return int64_t(std::floor(v * 65536.0 + 0.5)); };
  const int64_t across_x = fixed(a[0]), across_y = fixed(a[3]), down_x = fixed(a[1]), down_y = fixed(a[4]);
  int64_t row_x = fixed(a[2] + a[0] * 0.5 + a[1] * 0.5), row_y = fixed(a[5] + a[3] * 0.5 + a[4] * 0.5);
  for (int64_t y = 0; y < out.height; ++y, row_x += down_x, row_y += down_y)
    for (int64_t x = 0; x < out.width; ++x) {
      const int64_t from_x = (row_x + x * across_x) >> 16, from_y = (row_y + x * across_y) >> 16;
      const bool inside = from_x >= 0 && from_x < in.width && from_y >= 0 && from_y < in.height;
      out.pixels[y * out.width + x] = in.pixels[inside ? from_y * in.width + from_x : in.size()];
    }
}

// Blends with the image smoothed by [1 1 1; 1 5 1; 1 1 1] / 13; its edges are not smoothed.
static inline void sharpen(Picture in, Picture out, float share) {
  std::copy_n(in.pixels, in.size(), out.pixels);
  for (int64_t y = 1; y + 1 < in.height; ++y)
    for (int64_t x = 1; x + 1 < in.width; ++x) {
      const Pixel* p = in.pixels + y * in.width + x;
      Pixel smooth = 0;
      for (int c = 0; c < 3; ++c) {
        int sum = 4 * channel(*p, c);
        for (int64_t row = -1; row <= 1; ++row)
          for (int64_t column = -1; column <= 1; ++column) sum += channel(p[row * in.width + column], c);
        smooth |= Pixel((2 * sum + 13) / 26) << (8 * c);
      }
      out.pixels[y * in.width + x] = blend_pixels(smooth, *p, share);
    }
}

static inline void autocontrast_table(const int64_t* counts, uint8_t* table) {
  int low = 0, high = 255;
  while (low < 255 && !counts[low]) ++low;
  while (high > 0 && !counts[high]) --high;
  if (high <= low) return;
  const double scale = 255.0 / (high - low), offset = -low * scale;
  for (int v = 0; v < 256; ++v) table[v] = uint8_t(std::clamp(int(v * scale + offset), 0, 255));
}

static inline void equalize_table(const int64_t* counts, int64_t pixels, uint8_t* table) {
  int last = 255;
  while (last > 0 && !counts[last]) --last;
  const int64_t step = (pixels - counts[last]) / 255;
  if (!step) return;
  int64_t sum = step / 2;
  for (int v = 0; v < 256; sum += counts[v++]) table[v] = uint8_t(std::min<int64_t>(sum / step, 255));
}

// Applies an operation with its numbers; returns where the result is: in `image`, or in `other`.
static inline Picture randaugment(Picture image, Picture other, Operation operation, const double* numbers) {
  const float share = float(numbers[0]);
  Tables tables;
  switch (operation) {
    case IDENTITY: return image;
    case AFFINE: transform_affine(image, other, numbers); return other;
    case BRIGHTNESS: fill_tables(tables, [=](int v) { return blend(0, v, share); }); break;
    case COLOR:
      for (int64_t i = 0; i < image.size(); ++i)
        image.pixels[i] = blend_pixels(Pixel(luma(image.pixels[i])) * 0x010101u, image.pixels[i], share);
      return image;
    case CONTRAST: {
      int64_t sum = 0;
      for (int64_t i = 0; i < image.size(); ++i) sum += luma(image.pixels[i]);
      const int mean = int(double(sum) / double(image.size()) + 0.5);
      fill_tables(tables, [=](int v) { return blend(mean, v, share); });
      break;
    }
    case SHARPNESS: sharpen(image, other, share); return other;
    case POSTERIZE: fill_tables(tables, [=](int v) { return v & ~((1 << (8 - int(numbers[0]))) - 1); }); break;
    case SOLARIZE: fill_tables(tables, [=](int v) { return v < numbers[0] ? v : 255 - v; }); break;
    default: {
      int64_t counts[3][256] = {};
      for (int64_t i = 0; i < image.size(); ++i)
        for (int c = 0; c < 3; ++c) ++counts[c][channel(image.pixels[i], c)];
      fill_tables(tables, [](int v) { return v; });
      for (int c = 0; c < 3; ++c) {
        if (operation == AUTOCONTRAST)
          autocontrast_table(counts[c], tables[c]);
        else
          equalize_table(counts[c], image.size(), tables[c]);
      }
    }
  }
  apply_tables(image, tables);
  return image;
}
