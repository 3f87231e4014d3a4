// Products of rows with a packed weight. Each output is one sum in the order of the inputs, so that a row has the same bits whatever
// the other rows are and whichever thread multiplies it.
#pragma once
#include "kernels.hpp"
#include "vectors.hpp"

namespace {

using headstart::kBlock;
using headstart::kStep;
using headstart::Linear;

constexpr int kGroups = kBlock / kLanes;    // of 16 outputs in a block
constexpr int64_t kHalves = kStep / 2;      // inputs in a step of bf16
constexpr int64_t kPart = 512;              // bytes of inputs that all rows are multiplied with before the next ones: these weights stay in L1
constexpr int64_t kMostRows = 256;          // rows whose sums are kept at a time
constexpr int64_t kAhead = 8192;            // bytes of weight that are fetched ahead

INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

constexpr int kTogether = 6;  // rows whose sums of 64 outputs fit in the registers

// sums [rows, 64] += x [rows, depth] times `depth` inputs of a block. `stride`: between the rows of x.
template <int rows>
INLINE void multiply(const float* x, int64_t stride, const float* weight, int64_t depth, float* sums) {
  Vec sum[rows][kGroups];
  for (int row = 0; row < rows; row++)
    for (int group = 0; group < kGroups; group++) sum[row][group] = load(sums + row * kBlock + group * kLanes);
  for (int64_t k = 0; k < depth; k++, weight += kBlock) {
    for (int group = 0; group < kGroups; group++) prefetch((const char*)(weight + group * kLanes) + kAhead);
    for (int row = 0; row < rows; row++) {
      Vec factor = splat(x[row * stride + k]);
      for (int group = 0; group < kGroups; group++) sum[row][group] += factor * load(weight + group * kLanes);
    }
  }
  for (int row = 0; row < rows; row++)
    for (int group = 0; group < kGroups; group++) store(sums + row * kBlock + group * kLanes, sum[row][group]);
}

// sums + the products of 4 bytes of each output's weight and the same 4 bytes of input.
#if defined(__AVX512BF16__)
INLINE Vec add_products(Vec sums, const BFloat16* two, const char* weights) {
  return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(load_raw<int32_t>(two)), load_raw<__m512bh>(weights));
}
INLINE Ints add_products(Ints sums, const uint8_t* four, const char* weights) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(load_raw<int32_t>(four)), load_raw<__m512i>(weights));
}
#else
INLINE Vec add_products(Vec sums, const BFloat16* two, const char* weights) {
  Ints both = load_raw<Ints>(weights);
  sums += splat(to_float(two[0])) * (Vec)(both << 16);
  return sums + splat(to_float(two[1])) * (Vec)(both & (int32_t)0xffff0000);
}
#endif

// sums [rows, 64] += x [rows, depth] times `depth` inputs of a block of a bf16 or int8 weight, in steps.
template <int rows, class T, class Sums, class Sum>
INLINE void multiply_steps(const T* x, int64_t stride, const char* weight, int64_t depth, Sum* sums) {
  constexpr int64_t kInputs = kStep / sizeof(T), kFew = 4 / sizeof(T);
  Sums sum[rows][kGroups];
  for (int row = 0; row < rows; row++)
    for (int group = 0; group < kGroups; group++) sum[row][group] = load_raw<Sums>(sums + row * kBlock + group * kLanes);
  for (int64_t k = 0; k < depth; k += kInputs, weight += kStep * kBlock) {
    for (int few = 0; few < kStep / 4; few++) {
      for (int group = 0; group < kGroups; group++) prefetch(weight + (group * kLanes + few) * 64 + kAhead);
      for (int row = 0; row < rows; row++)
        for (int group = 0; group < kGroups; group++)
          sum[row][group] = add_products(sum[row][group], x + row * stride + k + kFew * few, weight + (group * kLanes + few) * 64);
    }
  }
  for (int row = 0; row < rows; row++)
    for (int group = 0; group < kGroups; group++) store_raw(sums + row * kBlock + group * kLanes, sum[row][group]);
}
template <int rows>
INLINE void multiply(const BFloat16* x, int64_t stride, const BFloat16* weight, int64_t depth, float* sums) {
  multiply_steps<rows, BFloat16, Vec>(x, stride, (const char*)weight, depth, sums);
}
#if defined(__AVX512BF16__)
template <int rows>
INLINE void multiply(const uint8_t* x, int64_t stride, const uint8_t* weight, int64_t depth, int32_t* sums) {
  multiply_steps<rows, uint8_t, Ints>(x, stride, (const char*)weight, depth, sums);
}
#endif

template <class T, class Sum>
INLINE void multiply_together(int64_t rows, const T* x, int64_t stride, const T* weight, int64_t depth, Sum* sums) {
  switch (rows) {
    case 1: return multiply<1>(x, stride, weight, depth, sums);
    case 2: return multiply<2>(x, stride, weight, depth, sums);
    case 3: return multiply<3>(x, stride, weight, depth, sums);
    case 4: return multiply<4>(x, stride, weight, depth, sums);
    case 5: return multiply<5>(x, stride, weight, depth, sums);
    default: return multiply<kTogether>(x, stride, weight, depth, sums);
  }
}

// sums [rows, 64] += x times a part of a block, for any number of rows, in groups of almost equal size.
template <class T, class Sum>
static void multiply_rows(int64_t rows, const T* x, int64_t stride, const T* weight, int64_t depth, Sum* sums, bool) {
  int64_t times = (rows + kTogether - 1) / kTogether;
  for (int64_t turn = 0, first = 0; turn < times; turn++) {
    int64_t last = rows * (turn + 1) / times;
    multiply_together(last - first, x + first * stride, stride, weight, depth, sums + first * kBlock);
    first = last;
  }
}

#if defined(__AMX_BF16__)
constexpr int64_t kTileRows = 16;

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums of `rows` rows, 4 the input, 5 to 7 weights.
static void shape_tiles(int64_t rows) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; tile++) {
    shapes.bytes[tile] = 64;
    shapes.rows[tile] = tile < 5 ? rows : kTileRows;
  }
  __asm__ __volatile__("ldtilecfg %0" ::"m"(shapes));
}

// With matrix registers: 16 rows take as long as one, as long as memory is slower than they are.
template <bool is_int8>
static void multiply_tiles(const char* x, int64_t stride, const char* weight, int64_t depth, void* sums, bool is_first) {
  constexpr int64_t kTile = kStep * kBlock / 4, kRow = kBlock * 4;
  char* out = (char*)sums;
  if (is_first) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  } else {
    _tile_loadd(0, out, kRow); _tile_loadd(1, out + 64, kRow); _tile_loadd(2, out + 128, kRow); _tile_loadd(3, out + 192, kRow);
  }
#define MULTIPLY(sum, tile)              \
  if constexpr (is_int8)                 \
    _tile_dpbssd(sum, 4, tile);          \
  else                                   \
    _tile_dpbf16ps(sum, 4, tile)
  for (int64_t k = 0; k < depth; k += kStep, weight += kStep * kBlock) {
    for (int64_t line = 0; line < kStep * kBlock; line += 64) prefetch(weight + kAhead + line);
    _tile_loadd(4, x + k, stride);
    _tile_loadd(5, weight, 64);
    MULTIPLY(0, 5);
    _tile_loadd(6, weight + kTile, 64);
    MULTIPLY(1, 6);
    _tile_loadd(7, weight + 2 * kTile, 64);
    MULTIPLY(2, 7);
    _tile_loadd(5, weight + 3 * kTile, 64);
    MULTIPLY(3, 5);
  }
#undef MULTIPLY
  _tile_stored(0, out, kRow); _tile_stored(1, out + 64, kRow); _tile_stored(2, out + 128, kRow); _tile_stored(3, out + 192, kRow);
}

template <class T>
static void multiply_rows_in_tiles(int64_t rows, const T* x, int64_t stride, const T* weight, int64_t depth, void* sums, bool is_first) {
  int64_t groups = (rows + kTileRows - 1) / kTileRows, bytes = sizeof(T);
  for (int64_t group = 0, first = 0, shaped = 0; group < groups; group++) {
    int64_t last = rows * (group + 1) / groups;
    if (last - first != shaped) shape_tiles(shaped = last - first);
    multiply_tiles<sizeof(T) == 1>((const char*)(x + first * stride), stride * bytes, (const char*)weight, depth * bytes,
                                   (float*)sums + first * kBlock, is_first);
    first = last;
  }
}
static void multiply_rows(int64_t rows, const BFloat16* x, int64_t stride, const BFloat16* weight, int64_t depth, float* sums,
                          bool is_first) {
  multiply_rows_in_tiles(rows, x, stride, weight, depth, sums, is_first);
}
static void multiply_rows(int64_t rows, const int8_t* x, int64_t stride, const int8_t* weight, int64_t depth, int32_t* sums,
                          bool is_first) {
  multiply_rows_in_tiles(rows, x, stride, weight, depth, sums, is_first);
}
using Byte = int8_t;
constexpr int kZero = 0;  // of a byte of input
#else
using Byte = uint8_t;
constexpr int kZero = 128;
#endif

// The sums of one block for some rows: [rows, 64]. T: of weight and input.
template <class T, class Sum>
static void block_sums(const Linear& linear, int64_t block, const T* x, int64_t rows, int64_t stride, Sum* sums) {
#if defined(__AMX_BF16__)
  int64_t part = rows > kTileRows ? kPart / (int64_t)sizeof(T) : stride;
#else
  int64_t part = rows > kTogether ? kPart / (int64_t)sizeof(T) : stride;
#endif
  for (int64_t row = 0; row < rows; row++)
    for (int64_t group = 0; group < kGroups; group++)
      store_raw(sums + row * kBlock + group * kLanes,
                sizeof(T) == 1 && kZero ? load_raw<Ints>(linear.offsets + block * kBlock + group * kLanes) : Ints{});
  for (int64_t first = 0; first < stride; first += part) {
    int64_t depth = stride - first < part ? stride - first : part;
    multiply_rows(rows, x + first, stride, (const T*)linear.weight + (block * stride + first) * kBlock, depth, sums, first == 0);
  }
}

// The inputs of an int8 weight: two rows of bytes, high and low, and a scale for each row.
struct Bytes {
  Byte* values;  // [2 * rows, stride]: the high bytes of all rows, then the low ones
  float* scales;
};

// The values from `i` on, zeros behind the last one.
template <class T>
INLINE Vec load_up_to(const T* x, int64_t i, int64_t width) {
  return i < width ? load_some(x + i, (int)(width - i < kLanes ? width - i : kLanes)) : Vec{};
}

// A row with nan or infinity gets the scale nan, and so do all its products.
template <class T>
static void split_row(const T* x, int64_t width, int64_t stride, Byte* high, Byte* low, float* scale) {
  constexpr float kLargest = 127 * 128, kTiny = 1e-30f;  // a row of smaller values is zero
  Vec top = {}, nothing = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    Vec value = load_up_to(x, i, width);
    top = vmax(top, magnitude_of(value));
    nothing += value * 0.0f;
  }
  float most = largest(top);
  *scale = most / kLargest + sum(nothing);
  float factor = most > kTiny ? kLargest / most : 0.0f;
  for (int64_t i = 0; i < stride; i += kLanes) {
    __m512i value = _mm512_cvtps_epi32((__m512)(load_up_to(x, i, width) * factor));
    __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(64)), 7);
    __m512i lower = _mm512_sub_epi32(value, _mm512_slli_epi32(upper, 7));
    __m512i zero = _mm512_set1_epi32(kZero);
    store_raw(high + i, _mm512_cvtepi32_epi8(_mm512_add_epi32(upper, zero)));
    store_raw(low + i, _mm512_cvtepi32_epi8(_mm512_add_epi32(lower, zero)));
  }
}

// Scale, bias and activation of a block's sums, rounded once.
// sums: [rows, 64]; of an int8 weight [2 * rows, 64], high and low. scales: of the rows, or null.
template <class T>
static void finish_block(const Linear& linear, int64_t block, int64_t rows, const void* sums, const float* scales, T* y) {
  int64_t width = linear.is_gated ? kBlock / 2 : kBlock, outputs = linear.outputs;
  for (int64_t row = 0; row < rows; row++) {
    Vec values[kGroups];
    for (int group = 0; group < kGroups; group++) {
      int64_t at = block * kBlock + group * kLanes;
      if (scales) {
        const int32_t* high = (const int32_t*)sums + row * kBlock + group * kLanes;
        Vec upper = (Vec)_mm512_cvtepi32_ps(load_raw<__m512i>(high)), lower = (Vec)_mm512_cvtepi32_ps(load_raw<__m512i>(high + rows * kBlock));
        values[group] = (upper * 128.0f + lower) * (load(linear.scale + at) * scales[row]);
      } else {
        values[group] = load((const float*)sums + row * kBlock + group * kLanes);
      }
      if (linear.bias) values[group] += load(linear.bias + at);
    }
    if (linear.is_gated)
      for (int group = 0; group < kGroups; group += 2)
        values[group / 2] = activate(values[group], linear.activation) * values[group + 1];
    for (int64_t group = 0; group < width / kLanes; group++) {
      int64_t at = block * width + group * kLanes, left = outputs - at;
      if (left >= kLanes) store(y + row * outputs + at, values[group]);
      else if (left > 0) store_some(y + row * outputs + at, values[group], (int)left);
    }
  }
}

template <class T>
struct Product {
  const Linear& linear;
  const T* x;
  int64_t rows, stride;
  Bytes bytes;  // of an int8 weight
  T* y;
};

template <class T>
static void multiply_block(void* context, int64_t block) {
  auto& product = *(const Product<T>*)context;
  auto* sums = (float*)headstart::scratch(headstart::kSums, 2 * kMostRows * kBlock * 4);
  if (product.linear.is_int8) {
#if defined(__AVX512BF16__)
    block_sums(product.linear, block, (const Byte*)product.bytes.values, 2 * product.rows, product.stride, (int32_t*)sums);
    finish_block(product.linear, block, product.rows, sums, product.bytes.scales, product.y);
#endif
  } else {
    block_sums(product.linear, block, product.x, product.rows, product.stride, sums);
    finish_block(product.linear, block, product.rows, sums, nullptr, product.y);
  }
#if defined(__AMX_BF16__)
  _tile_release();
#endif
}

template <class T>
static void split_rows(void* context, int64_t row) {
  auto& product = *(const Product<T>*)context;
  Byte* high = product.bytes.values + row * product.stride;
  split_row(product.x + row * product.linear.inputs, product.linear.inputs, product.stride, high,
            high + product.rows * product.stride, product.bytes.scales + row);
}

// At most kMostRows rows.
template <class T>
static void linear_of(const Linear& linear, const T* x, int64_t rows, T* y) {
  int64_t step = linear.is_int8 ? kStep : sizeof(T) == 2 ? kHalves : 1, stride = (linear.inputs + step - 1) / step * step;
  Product<T> product{linear, x, rows, stride, {}, y};
  if (linear.is_int8) {
    product.bytes.values = (Byte*)headstart::scratch(headstart::kInput, 2 * rows * stride);
    product.bytes.scales = (float*)headstart::scratch(headstart::kScales, rows * 4);
    headstart::share_out(rows, split_rows<T>, &product);
  } else if (stride > linear.inputs) {  // the last step reads further: let it read zeros
    auto* padded = (T*)headstart::scratch(headstart::kInput, rows * stride * sizeof(T));
    for (int64_t row = 0; row < rows; row++) {
      memcpy(padded + row * stride, x + row * linear.inputs, linear.inputs * sizeof(T));
      memset(padded + row * stride + linear.inputs, 0, (stride - linear.inputs) * sizeof(T));
    }
    product.x = padded;
  }
  int64_t width = linear.is_gated ? kBlock / 2 : kBlock;
  headstart::share_out((linear.outputs + width - 1) / width, multiply_block<T>, &product);
}

template <class T>
static void linear_in_turns(const Linear& linear, const T* x, int64_t rows, T* y) {
  for (int64_t first = 0; first < rows; first += kMostRows) {
    int64_t count = rows - first < kMostRows ? rows - first : kMostRows;
    linear_of(linear, x + first * linear.inputs, count, y + first * linear.outputs);
  }
}

static void linear(const Linear* linear, const void* x, int64_t rows, void* y) {
  if (linear->dtype == headstart::kBFloat16) linear_in_turns(*linear, (const BFloat16*)x, rows, (BFloat16*)y);
  else linear_in_turns(*linear, (const float*)x, rows, (float*)y);
}

}  // namespace
