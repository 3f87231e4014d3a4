// Queries and keys of the nodes, made ready for attention in place: a norm per head where there is one, then rotary embedding.
#pragma once
#include "kernels.hpp"
#include "norm.hpp"
#include "vectors.hpp"

namespace {

// x1 cos1 - x2 sin1, x2 cos2 + x1 sin2, for the halves x1 and x2 of the first `width` values.
template <class T>
INLINE void rotate(T* x, const T* cos, const T* sin, int64_t width) {
  int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    int count = (int)(half - i < kLanes ? half - i : kLanes);
    Vec x1 = load_some(x + i, count), x2 = load_some(x + half + i, count);
    Vec y1 = x1 * load_some(cos + i, count) - x2 * load_some(sin + i, count);
    Vec y2 = x2 * load_some(cos + half + i, count) + x1 * load_some(sin + half + i, count);
    store_some(x + i, y1, count);
    store_some(x + half + i, y2, count);
  }
}

template <class T>
struct Rope {
  const headstart::AttentionLayer& layer;
  int64_t heads, kv_heads, dim;
  const T *cos, *sin;
  T* states;
};

template <class T>
static void prepare_node(void* context, int64_t node) {
  auto& rope = *(const Rope<T>*)context;
  const auto& layer = rope.layer;
  T* states = rope.states + node * layer.input->outputs;
  for (int64_t head = 0; head < rope.heads + rope.kv_heads; head++) {
    T* x = states + head * rope.dim;
    const float* norm = head < rope.heads ? layer.query_norm : layer.key_norm;
    if (norm) norm_row(x, rope.dim, norm, layer.eps, x);
    rotate(x, rope.cos + node * layer.rope_width, rope.sin + node * layer.rope_width, layer.rope_width);
  }
}

static void prepare(const headstart::AttentionLayer* layer, const headstart::Attention* a, int64_t nodes, const void* cos,
                    const void* sin, void* states) {
  if (a->dtype == headstart::kBFloat16) {
    Rope<BFloat16> rope{*layer, a->heads, a->kv_heads, a->key_dim, (const BFloat16*)cos, (const BFloat16*)sin, (BFloat16*)states};
    headstart::share_out(nodes, prepare_node<BFloat16>, &rope);
  } else {
    Rope<float> rope{*layer, a->heads, a->kv_heads, a->key_dim, (const float*)cos, (const float*)sin, (float*)states};
    headstart::share_out(nodes, prepare_node<float>, &rope);
  }
}

}  // namespace
