// The part of oneDNN's C interface that is used here. Paddle's wheel carries the library (3.6), but not its headers.

#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <vector>

typedef struct dnnl_object* dnnl_handle;
struct dnnl_argument {
  int index;
  dnnl_handle memory;
};

extern "C" {
int dnnl_engine_create(dnnl_handle* made, int kind, size_t index);
int dnnl_stream_create(dnnl_handle* made, dnnl_handle engine, unsigned flags);
int dnnl_memory_desc_create_with_tag(dnnl_handle* made, int axes, const int64_t* sizes, int type, int tag);
int dnnl_memory_desc_create_with_strides(dnnl_handle* made, int axes, const int64_t* sizes, int type,
                                         const int64_t* strides);
int dnnl_memory_desc_destroy(dnnl_handle);
int dnnl_memory_desc_equal(dnnl_handle, dnnl_handle);
size_t dnnl_memory_desc_get_size(dnnl_handle);
int dnnl_memory_create(dnnl_handle* made, dnnl_handle layout, dnnl_handle engine, void* at);
int dnnl_memory_destroy(dnnl_handle);
int dnnl_primitive_attr_create(dnnl_handle* made);
int dnnl_primitive_attr_set_scratchpad_mode(dnnl_handle, int mode);
int dnnl_convolution_forward_primitive_desc_create(dnnl_handle* made, dnnl_handle engine, int kind, int algorithm,
                                                   dnnl_handle x, dnnl_handle weight, dnnl_handle bias, dnnl_handle y,
                                                   const int64_t* strides, const int64_t* dilations,
                                                   const int64_t* before, const int64_t* after, dnnl_handle attributes);
int dnnl_convolution_backward_data_primitive_desc_create(dnnl_handle* made, dnnl_handle engine, int algorithm,
                                                         dnnl_handle x, dnnl_handle weight, dnnl_handle y,
                                                         const int64_t* strides, const int64_t* dilations,
                                                         const int64_t* before, const int64_t* after,
                                                         dnnl_handle forward, dnnl_handle attributes);
int dnnl_reorder_primitive_desc_create(dnnl_handle* made, dnnl_handle from, dnnl_handle from_engine, dnnl_handle to,
                                       dnnl_handle to_engine, dnnl_handle attributes);
dnnl_handle dnnl_primitive_desc_query_md(dnnl_handle, int what, int index);
int dnnl_primitive_desc_destroy(dnnl_handle);
int dnnl_primitive_create(dnnl_handle* made, dnnl_handle recipe);
int dnnl_primitive_destroy(dnnl_handle);
int dnnl_primitive_execute(dnnl_handle, dnnl_handle stream, int count, const dnnl_argument*);
}

namespace onednn {

enum Type { BFLOAT16 = 2, FLOAT32 = 3 };
enum Query { X = 129, DIFF_X, WEIGHT, Y = 133, DIFF_Y, SCRATCH = 136 };
enum Index { AT_X = 1, AT_Y = 17, AT_WEIGHT = 33, AT_BIAS = 41, AT_SCRATCH = 80, AT_DIFF_X = 129, AT_DIFF_Y = 145 };
constexpr int CPU = 1, IN_ORDER = 1, ANY = 1, FORWARD_TRAINING = 64, DIRECT = 1, SCRATCH_OF_USER = 1;

using Handle = std::shared_ptr<dnnl_object>;
using Sizes = std::vector<int64_t>;

inline void check(int status) {
  if (status) throw std::logic_error("oneDNN refused a convolution");
}

// What a function of oneDNN makes.
template <class... Parameters, class... Arguments>
Handle made(int (*destroy)(dnnl_handle), int (*create)(dnnl_handle*, Parameters...), Arguments... arguments) {
  dnnl_handle handle = nullptr;
  check(create(&handle, arguments...));
  return {handle, destroy};
}

inline int keep(dnnl_handle) { return 0; }

inline dnnl_handle engine() {
  static const Handle cpu = made(keep, dnnl_engine_create, CPU, 0);
  return cpu.get();
}

// Attributes of primitives that take their scratch memory from the caller: oneDNN's own belongs to one thread.
inline dnnl_handle own_scratch() {
  static const Handle attributes = [] {
    const Handle fresh = made(keep, dnnl_primitive_attr_create);
    check(dnnl_primitive_attr_set_scratchpad_mode(fresh.get(), SCRATCH_OF_USER));
    return fresh;
  }();
  return attributes.get();
}

// The layout that oneDNN likes best.
inline Handle any(const Sizes& sizes, int type) {
  return made(dnnl_memory_desc_destroy, dnnl_memory_desc_create_with_tag, int(sizes.size()), sizes.data(), type, ANY);
}

// Paddle's layout, float32.
inline Handle plain(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t axis = sizes.size() - 1; axis > 0; --axis) strides[axis - 1] = strides[axis] * sizes[axis];
  return made(dnnl_memory_desc_destroy, dnnl_memory_desc_create_with_strides, int(sizes.size()), sizes.data(),
              int(FLOAT32), strides.data());
}

// A layout that belongs to a recipe.
inline Handle layout(const Handle& recipe, Query what) {
  return {recipe, dnnl_primitive_desc_query_md(recipe.get(), what, 0)};
}

// Room for a tensor, in whole cache lines.
inline int64_t floats_of(const Handle& layout) { return (dnnl_memory_desc_get_size(layout.get()) + 63) / 64 * 16; }

struct Argument {
  int index;
  const Handle& layout;
  const void* at;
};

// Runs a primitive; arguments without a layout are left out. Results are written to, though const, as oneDNN has it.
inline void execute(const Handle& primitive, std::initializer_list<Argument> arguments) {
  static thread_local const Handle stream = made(keep, dnnl_stream_create, engine(), IN_ORDER);
  std::vector<Handle> memories;
  std::vector<dnnl_argument> list;
  for (const Argument& argument : arguments) {
    if (!argument.layout) continue;
    memories.push_back(
        made(dnnl_memory_destroy, dnnl_memory_create, argument.layout.get(), engine(), const_cast<void*>(argument.at)));
    list.push_back({argument.index, memories.back().get()});
  }
  check(dnnl_primitive_execute(primitive.get(), stream.get(), int(list.size()), list.data()));
}

// A tensor's layout in Paddle and in oneDNN, and what brings one into the other; nothing where they are the same.
struct Operand {
  Handle from, to, reorder;
  int64_t floats = 0;  // of the one in oneDNN, where there are two

  Operand() = default;
  Operand(const Handle& plain, const Handle& packed, bool result)
      : from(result ? packed : plain), to(result ? plain : packed) {
    if (dnnl_memory_desc_equal(from.get(), to.get())) return;
    const Handle recipe = made(dnnl_primitive_desc_destroy, dnnl_reorder_primitive_desc_create, from.get(), engine(),
                               to.get(), engine(), own_scratch());
    reorder = made(dnnl_primitive_destroy, dnnl_primitive_create, recipe.get());
    floats = floats_of(packed);
  }
  void change(const void* at, const void* changed) const { execute(reorder, {{AT_X, from, at}, {AT_Y, to, changed}}); }
};

}  // namespace onednn
