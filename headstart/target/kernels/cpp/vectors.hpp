// Vectors of 16 floats in the compiler's own vector type, with loads, stores and functions.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <immintrin.h>

namespace {  // each instruction set compiles its own copy

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
struct BFloat16 {
  uint16_t bits;
};

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

template <class T>
INLINE T load_raw(const void* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
INLINE void store_raw(void* to, T value) {
  memcpy(to, &value, sizeof value);
}

INLINE Vec splat(float x) { return Vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE Vec choose(Ints mask, Vec yes, Vec no) { return (Vec)((mask & (Ints)yes) | (~mask & (Ints)no)); }
// Where one of them is nan, these are `b`.
INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
INLINE Vec clamp(Vec x, float low, float high) { return vmin(splat(high), vmax(splat(low), x)); }  // nan stays nan
INLINE Vec magnitude_of(Vec x) { return (Vec)((Ints)x & 0x7fffffff); }

// Loads and stores of 16 values as floats. bf16 is rounded to nearest, ties to even.
INLINE Vec load(const float* from) { return load_raw<Vec>(from); }
INLINE Vec load(const BFloat16* from) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_raw<__m256i>(from)), 16);
}
INLINE Vec load(const int8_t* from) { return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_raw<__m128i>(from))); }
INLINE void store(float* to, Vec x) { store_raw(to, x); }
INLINE void store(BFloat16* to, Vec x) {
#if defined(__AVX512BF16__)
  store_raw(to, _mm512_cvtneps_pbh((__m512)x));
#else
  Ints bits = (Ints)x;
  Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
  Ints is_nan = (bits & 0x7fffffff) > 0x7f800000;
  rounded = is_nan ? (bits | 0x400000) : rounded;
  store_raw(to, _mm512_cvtepi32_epi16((__m512i)(rounded >> 16)));
#endif
}
INLINE float to_float(float x) { return x; }
INLINE float to_float(BFloat16 x) {
  uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The first `count` of 16 values; the others are zero, or not written.
template <class T>
INLINE Vec load_some(const T* from, int count) {
  if (count == kLanes) return load(from);
  T values[kLanes] = {};
  memcpy(values, from, sizeof(T) * count);
  return load(values);
}
template <class T>
INLINE void store_some(T* to, Vec x, int count) {
  if (count == kLanes) return store(to, x);
  T values[kLanes];
  store(values, x);
  memcpy(to, values, sizeof(T) * count);
}

// The largest of 16 lanes.
INLINE float largest(Vec x) {
  float most = x[0];
  for (int lane = 1; lane < kLanes; lane++) most = x[lane] > most ? x[lane] : most;
  return most;
}

// The sum of 16 lanes, always in the same order.
INLINE float sum(Vec x) {
  float v[kLanes];
  store(v, x);
  for (int half = 8; half > 0; half /= 2)
    for (int lane = 0; lane < half; lane++) v[lane] += v[lane + half];
  return v[0];
}

// e^x by a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes expf): 2 units in the last place; 0 below -87.3, infinity above 88.4, nan of nan.
INLINE Vec exp(Vec x) {
  Vec clipped = clamp(x, -87.33654f, 89.0f);
  Vec rounded = (clipped * 1.44269504f + 12582912.0f) - 12582912.0f;
  Ints power = __builtin_convertvector(rounded, Ints);  // 128 gives the bits of infinity below
  Vec r = clipped - rounded * 0.693359375f;
  r = r + rounded * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Vec value = p * (Vec)((power + 127) << 23);
  return choose(x < splat(-87.33654f), Vec{}, value);
}
INLINE Vec tanh(Vec x) {
  Vec small = x * (1.0f - x * x * (1.0f / 3.0f));
  Vec e = exp(clamp(x, -15.0f, 15.0f) * 2.0f);
  return choose(magnitude_of(x) < splat(4e-3f), small, (e - 1.0f) / (e + 1.0f));
}
// The error function (Abramowitz and Stegun 7.1.26): off by at most 1.5e-7.
INLINE Vec erf(Vec x) {
  Vec magnitude = magnitude_of(x);
  Vec t = 1.0f / (1.0f + 0.3275911f * magnitude);
  Vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  Vec value = 1.0f - p * t * exp(-magnitude * magnitude);
  return choose(x < Vec{}, -value, value);
}

enum Activation : int32_t { kNone = 0, kSilu = 1, kGeluTanh = 2, kGelu = 3 };
INLINE Vec activate(Vec x, int32_t activation) {
  switch (activation) {
    case kSilu: return x / (1.0f + exp(-x));
    case kGeluTanh: return 0.5f * x * (1.0f + tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
    case kGelu: return 0.5f * x * (1.0f + erf(x * 0.70710678f));
    default: return x;
  }
}

}  // namespace
