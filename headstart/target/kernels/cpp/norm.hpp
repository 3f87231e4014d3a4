// RMS norms of rows, x / sqrt(mean(x^2) + eps) * weight, and sums, both rounded once.
#pragma once
#include "kernels.hpp"
#include "vectors.hpp"

namespace {

struct Norm {
  int32_t dtype;
  const void* x;
  int64_t rows, width;
  const float* weight;
  float eps;
  void* y;
};

constexpr int64_t kNormValues = 1 << 14;  // in one piece of work

template <class T>
static void norm_row(const T* x, int64_t width, const float* weight, float eps, T* y) {
  int64_t whole = width - width % kLanes;
  int rest = (int)(width - whole);
  Vec squares = {};
  for (int64_t i = 0; i < whole; i += kLanes) squares += load(x + i) * load(x + i);
  if (rest) squares += load_some(x + whole, rest) * load_some(x + whole, rest);
  float factor = 1.0f / __builtin_sqrtf(sum(squares) / (float)width + eps);
  for (int64_t i = 0; i < whole; i += kLanes) store(y + i, load(x + i) * factor * load(weight + i));
  if (rest) store_some(y + whole, load_some(x + whole, rest) * factor * load_some(weight + whole, rest), rest);
}

static void norm_rows(void* context, int64_t piece) {
  auto& norm = *(const Norm*)context;
  int64_t each = kNormValues / norm.width + 1, first = piece * each;
  int64_t last = first + each < norm.rows ? first + each : norm.rows;
  for (int64_t row = first; row < last; row++) {
    int64_t at = row * norm.width;
    if (norm.dtype == headstart::kBFloat16)
      norm_row((const BFloat16*)norm.x + at, norm.width, norm.weight, norm.eps, (BFloat16*)norm.y + at);
    else
      norm_row((const float*)norm.x + at, norm.width, norm.weight, norm.eps, (float*)norm.y + at);
  }
}

static void norm(int32_t dtype, const void* x, int64_t rows, int64_t width, const float* weight, float eps, void* y) {
  Norm norm{dtype, x, rows, width, weight, eps, y};
  int64_t each = kNormValues / width + 1;
  headstart::share_out((rows + each - 1) / each, norm_rows, &norm);
}

template <class T>
static void add_values(const T* left, const T* right, int64_t count, T* y) {
  int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store(y + i, load(left + i) + load(right + i));
  int rest = (int)(count - whole);
  if (rest) store_some(y + whole, load_some(left + whole, rest) + load_some(right + whole, rest), rest);
}

// Of few nodes: not worth a second thread.
static void add(int32_t dtype, const void* left, const void* right, int64_t count, void* y) {
  if (dtype == headstart::kBFloat16) add_values((const BFloat16*)left, (const BFloat16*)right, count, (BFloat16*)y);
  else add_values((const float*)left, (const float*)right, count, (float*)y);
}

}  // namespace
