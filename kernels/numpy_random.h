// numpy.random.default_rng([...]) in C++: the same numbers, draw by draw (numpy 2, Generator over PCG64).
//
// Only what the transforms of images draw: uniform, integers below a bound, shuffles. Sources: O'Neill, PCG, 2014
// (XSL-RR 128/64) and her seed_seq alternative, from which numpy's SeedSequence comes; Lemire, Fast Random Integer
// Generation in an Interval, 2019.

#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

class NumpyRandom {
 public:
  // `words` are the entropy, each of it below 2^32: one word for each number of the list.
  NumpyRandom(const uint32_t* words, int count) {
    uint32_t pool[POOL], multiplier = 0x43b0d7e5u;
    for (int i = 0; i < POOL; ++i) pool[i] = hashed(i < count ? words[i] : 0, multiplier);
    for (int source = 0; source < POOL; ++source)
      for (int target = 0; target < POOL; ++target)
        if (source != target) pool[target] = mixed(pool[target], hashed(pool[source], multiplier));
    for (int source = POOL; source < count; ++source)
      for (int target = 0; target < POOL; ++target)
        pool[target] = mixed(pool[target], hashed(words[source], multiplier));

    uint64_t seeds[4] = {};
    multiplier = 0x8b51f9ddu;
    for (int i = 0; i < 8; ++i) {
      uint32_t value = pool[i % POOL] ^ multiplier;
      multiplier *= 0x58f38dedu;
      value *= multiplier;
      value ^= value >> 16;
      seeds[i / 2] |= uint64_t(value) << 32 * (i % 2);
    }
    increment_ = (wide(seeds[2], seeds[3]) << 1) | 1;
    state_ = increment_ + wide(seeds[0], seeds[1]);
    advance();
  }

  // In [0, 1).
  double random() { return double(next64() >> 11) * (1.0 / 9007199254740992.0); }

  double uniform(double low, double high) { return low + (high - low) * random(); }

  // In [0, bound), for bounds from 1 to below 2^32.
  int64_t integers(int64_t bound) {
    if (bound == 1) return 0;
    const uint32_t range = uint32_t(bound);
    uint64_t product = uint64_t(next32()) * range;
    if (uint32_t(product) < range) {
      const uint32_t threshold = (0u - range) % range;
      while (uint32_t(product) < threshold) product = uint64_t(next32()) * range;
    }
    return int64_t(product >> 32);
  }

  template <class Item>
  void shuffle(Item* items, int count) {
    for (int i = count - 1; i > 0; --i) std::swap(items[i], items[interval(uint32_t(i))]);
  }

 private:
  typedef unsigned __int128 Wide;
  static constexpr int POOL = 4;

  static Wide wide(uint64_t high, uint64_t low) { return (Wide(high) << 64) | low; }

  static uint32_t hashed(uint32_t value, uint32_t& multiplier) {
    value ^= multiplier;
    multiplier *= 0x931e8875u;
    value *= multiplier;
    return value ^ (value >> 16);
  }

  static uint32_t mixed(uint32_t x, uint32_t y) {
    const uint32_t result = x * 0xca01f9ddu - y * 0x4973f715u;
    return result ^ (result >> 16);
  }

  // In [0, last]: numpy's other way of drawing them, by refusing those of the next power of two.
  uint32_t interval(uint32_t last) {
    uint32_t mask = last;
    for (int bits = 1; bits < 32; bits *= 2) mask |= mask >> bits;
    uint32_t value;
    do value = next32() & mask;
    while (value > last);
    return value;
  }

  void advance() { state_ = state_ * wide(0x2360ed051fc65da4u, 0x4385df649fccf645u) + increment_; }

  uint64_t next64() {
    advance();
    const uint64_t folded = uint64_t(state_ >> 64) ^ uint64_t(state_);
    const int turn = int(state_ >> 122);
    return (folded >> turn) | (folded << (-turn & 63));
  }

  uint32_t next32() {  // the two halves of a draw, the lower one first; next64 leaves a waiting half alone
    if (waiting_) {
      waiting_ = false;
      return half_;
    }
    const uint64_t value = next64();
    waiting_ = true;
    half_ = uint32_t(value >> 32);
    return uint32_t(value);
  }

  Wide state_ = 0, increment_ = 0;
  uint32_t half_ = 0;
  bool waiting_ = false;
};
