// Products of rows with a packed weight. Each output is one sum in the order of the inputs, so that a row has the same bits whatever
// the other rows are and whichever thread multiplies it.
#pragma once
#include "kernels.hpp"
#include "vectors.hpp"

namespace {

using headstart::kBlock;
using headstart::kDepth;
using headstart::Linear;

constexpr int kGroups = kBlock / kLanes;    // of 16 outputs in a block
constexpr int64_t kStep = kDepth * kBlock;  // values in a step of a packed bf16 weight
constexpr int64_t kPart = 256;              // inputs that all rows are multiplied with before the next ones: these weights stay in L1
constexpr int64_t kMostRows = 256;          // rows whose sums are kept at a time
constexpr int64_t kAhead = 8192;            // bytes of weight that are fetched ahead

INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

#if defined(__AVX512F__)
constexpr int kWide = 4, kTogether = 6;  // groups of outputs and rows whose sums fit in the registers
#else
constexpr int kWide = 1, kTogether = 5;
#endif

// sums [rows, 64] += x [rows, depth] times `depth` inputs of kWide groups of a block. `stride`: between the rows of x.
template <int rows>
INLINE void multiply(const float* x, int64_t stride, const float* weight, int64_t depth, float* sums) {
  Vec sum[rows][kWide];
  for (int row = 0; row < rows; row++)
    for (int group = 0; group < kWide; group++) sum[row][group] = load(sums + row * kBlock + group * kLanes);
  for (int64_t k = 0; k < depth; k++, weight += kBlock) {
    for (int group = 0; group < kWide; group++) prefetch((const char*)(weight + group * kLanes) + kAhead);
    for (int row = 0; row < rows; row++) {
      Vec factor = splat(x[row * stride + k]);
      for (int group = 0; group < kWide; group++) sum[row][group] += factor * load(weight + group * kLanes);
    }
  }
  for (int row = 0; row < rows; row++)
    for (int group = 0; group < kWide; group++) store(sums + row * kBlock + group * kLanes, sum[row][group]);
}

// The same for bf16, in steps of 32 inputs.
template <int rows>
INLINE void multiply(const BFloat16* x, int64_t stride, const BFloat16* weight, int64_t depth, float* sums) {
  Vec sum[rows][kWide];
  for (int row = 0; row < rows; row++)
    for (int group = 0; group < kWide; group++) sum[row][group] = load(sums + row * kBlock + group * kLanes);
  for (int64_t k = 0; k < depth; k += kDepth, weight += kStep) {
    for (int pair = 0; pair < kDepth / 2; pair++) {
      const BFloat16* weights[kWide];
      for (int group = 0; group < kWide; group++) {
        weights[group] = weight + group * kStep / kGroups + pair * 2 * kLanes;
        prefetch((const char*)weights[group] + kAhead);
      }
      for (int row = 0; row < rows; row++) {
        const BFloat16* two = x + row * stride + k + 2 * pair;
#if defined(__AVX512BF16__)
        __m512bh factor = (__m512bh)_mm512_set1_epi32(load_raw<int32_t>(two));
        for (int group = 0; group < kWide; group++)
          sum[row][group] = (Vec)_mm512_dpbf16_ps((__m512)sum[row][group], factor, load_raw<__m512bh>(weights[group]));
#else
        Vec even = splat(to_float(two[0])), odd = splat(to_float(two[1]));
        for (int group = 0; group < kWide; group++) {
          Ints both = load_raw<Ints>(weights[group]);
          sum[row][group] += even * (Vec)(both << 16);
          sum[row][group] += odd * (Vec)(both & (int32_t)0xffff0000);
        }
#endif
      }
    }
  }
  for (int row = 0; row < rows; row++)
    for (int group = 0; group < kWide; group++) store(sums + row * kBlock + group * kLanes, sum[row][group]);
}

template <class T>
INLINE void multiply_together(int64_t rows, const T* x, int64_t stride, const T* weight, int64_t depth, float* sums) {
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
template <class T>
static void multiply_rows(int64_t rows, const T* x, int64_t stride, const T* weight, int64_t depth, float* sums) {
  constexpr int64_t kApart = sizeof(T) == 2 ? kStep / kGroups : kLanes;  // between groups of outputs in the weight
  int64_t times = (rows + kTogether - 1) / kTogether;
  for (int64_t turn = 0, first = 0; turn < times; turn++) {
    int64_t last = rows * (turn + 1) / times;
    for (int64_t group = 0; group < kGroups; group += kWide)
      multiply_together(last - first, x + first * stride, stride, weight + group * kApart, depth,
                        sums + first * kBlock + group * kLanes);
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

// For bf16 with matrix registers: 16 rows take as long as one, as long as memory is slower than they are.
static void multiply_tiles(const BFloat16* x, int64_t stride, const BFloat16* weight, int64_t depth, float* sums, bool is_first) {
  if (is_first) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kBlock * 4); _tile_loadd(1, sums + 16, kBlock * 4);
    _tile_loadd(2, sums + 32, kBlock * 4); _tile_loadd(3, sums + 48, kBlock * 4);
  }
  for (int64_t k = 0; k < depth; k += kDepth, weight += kStep) {
    for (int line = 0; line < kStep * 2; line += 64) prefetch((const char*)weight + kAhead + line);
    _tile_loadd(4, x + k, stride * 2);
    _tile_loadd(5, weight, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, weight + kStep / 4, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, weight + kStep / 2, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, weight + kStep * 3 / 4, 64);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, sums, kBlock * 4); _tile_stored(1, sums + 16, kBlock * 4);
  _tile_stored(2, sums + 32, kBlock * 4); _tile_stored(3, sums + 48, kBlock * 4);
}

static void multiply_rows(int64_t rows, const BFloat16* x, int64_t stride, const BFloat16* weight, int64_t depth, float* sums,
                          bool is_first) {
  int64_t groups = (rows + kTileRows - 1) / kTileRows;
  for (int64_t group = 0, first = 0, shaped = 0; group < groups; group++) {
    int64_t last = rows * (group + 1) / groups;
    if (last - first != shaped) shape_tiles(shaped = last - first);
    multiply_tiles(x + first * stride, stride, weight, depth, sums + first * kBlock, is_first);
    first = last;
  }
}
#endif

// A part of an int8 weight as bf16, which holds every int8.
INLINE void widen(const int8_t* from, int64_t count, BFloat16* to) {
  typedef int8_t Bytes __attribute__((vector_size(16)));
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    prefetch(from + i + kAhead / 2);
    Vec low = __builtin_convertvector(load_raw<Bytes>(from + i), Vec);
    Vec high = __builtin_convertvector(load_raw<Bytes>(from + i + kLanes), Vec);
#if defined(__AVX512BF16__)
    store_raw(to + i, _mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
    store_raw(to + i, __builtin_convertvector((Ints)low >> 16, Halves));  // exact: the lower half is zero
    store_raw(to + i + kLanes, __builtin_convertvector((Ints)high >> 16, Halves));
#endif
  }
}

// The sums of one block for some rows: [rows, 64].
template <class T>
static void block_sums(const Linear& linear, int64_t block, const T* x, int64_t rows, int64_t stride, float* sums) {
  int64_t inputs = stride;
  int64_t part = rows > 16 || linear.is_int8 ? kPart : inputs;
#if !defined(__AMX_BF16__)
  if (rows > kTogether || kWide < kGroups) part = kPart;
  bool has_tiles = false;
#else
  bool has_tiles = sizeof(T) == 2;
#endif
  if (!has_tiles) memset(sums, 0, sizeof(float) * rows * kBlock);
  for (int64_t first = 0; first < inputs; first += part) {
    int64_t depth = inputs - first < part ? inputs - first : part;
    int64_t offset = (block * inputs + first) * kBlock;
    const T* weight = (const T*)linear.weight + offset;
    if constexpr (sizeof(T) == 2) {
      if (linear.is_int8) {
        auto* widened = (BFloat16*)headstart::scratch(headstart::kWeights, kPart * kBlock * 2);
        widen((const int8_t*)linear.weight + offset, depth * kBlock, widened);
        weight = widened;
      }
    }
#if defined(__AMX_BF16__)
    if constexpr (sizeof(T) == 2) {
      multiply_rows(rows, x + first, stride, weight, depth, sums, first == 0);
      continue;
    }
#endif
    multiply_rows(rows, x + first, stride, weight, depth, sums);
  }
}

// Scale, bias and activation of a block's sums, rounded once.
template <class T>
static void finish_block(const Linear& linear, int64_t block, int64_t rows, const float* sums, T* y) {
  int64_t width = linear.is_gated ? kBlock / 2 : kBlock, outputs = linear.outputs;
  for (int64_t row = 0; row < rows; row++) {
    Vec values[kGroups];
    for (int group = 0; group < kGroups; group++) {
      int64_t at = block * kBlock + group * kLanes;
      values[group] = load(sums + row * kBlock + group * kLanes);
      if (linear.scale) values[group] *= load(linear.scale + at);
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
  T* y;
};

template <class T>
static void multiply_block(void* context, int64_t block) {
  auto& product = *(const Product<T>*)context;
  auto* sums = (float*)headstart::scratch(headstart::kSums, kMostRows * kBlock * 4);
  for (int64_t first = 0; first < product.rows; first += kMostRows) {
    int64_t rows = product.rows - first < kMostRows ? product.rows - first : kMostRows;
    block_sums(product.linear, block, product.x + first * product.stride, rows, product.stride, sums);
    finish_block(product.linear, block, rows, sums, product.y + first * product.linear.outputs);
  }
#if defined(__AMX_BF16__)
  _tile_release();
#endif
}

template <class T>
static void linear_of(const Linear& linear, const T* x, int64_t rows, T* y) {
  int64_t stride = linear.inputs;
  if (sizeof(T) == 2 && stride % kDepth) {  // the last step reads further: let it read zeros
    stride += kDepth - stride % kDepth;
    auto* padded = (T*)headstart::scratch(headstart::kInput, rows * stride * sizeof(T));
    for (int64_t row = 0; row < rows; row++) {
      memcpy(padded + row * stride, x + row * linear.inputs, linear.inputs * sizeof(T));
      memset(padded + row * stride + linear.inputs, 0, (stride - linear.inputs) * sizeof(T));
    }
    x = padded;
  }
  Product<T> product{linear, x, rows, stride, y};
  int64_t width = linear.is_gated ? kBlock / 2 : kBlock;
  headstart::share_out((linear.outputs + width - 1) / width, multiply_block<T>, &product);
}

static void linear(const Linear* linear, const void* x, int64_t rows, void* y) {
  if (linear->dtype == headstart::kBFloat16) linear_of(*linear, (const BFloat16*)x, rows, (BFloat16*)y);
  else linear_of(*linear, (const float*)x, rows, (float*)y);
}

}  // namespace
