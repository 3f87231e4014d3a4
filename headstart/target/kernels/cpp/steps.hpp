// A forward of several steps in one call: products, norms, attention and sums, from values [nodes, width] to values.
#pragma once
#include <string.h>

#include "kernels.hpp"

namespace headstart {

enum StepKind : int32_t { kTake = 0, kJoin = 1, kProduct = 2, kRmsNorm = 3, kAdd = 4, kAttend = 5, kMlp = 6 };

// A value of a forward. Each step writes one.
struct Value {
  void* memory;  // [nodes, width]
  int64_t width;
};

struct Step {
  const void* module;  // Linear, weight of a norm, AttentionLayer, or the first Linear of an MLP
  const void* second;  // Attention of an attention step, without what differs between forwards; second Linear of an MLP
  int32_t kind, out, left, right, extra;  // values; `right` and `extra` are room for what an attention or an MLP makes on its way
  int32_t source;      // of kTake: number of the table and of its indices
  float eps;
};

constexpr int kSources = 4;  // states of parents, embeddings of tokens, cosines and sines of positions

struct Forward {
  const Step* steps;
  const Value* values;
  const void* tables[kSources];      // [any, width]
  const int64_t* indices[kSources];  // [nodes] the line of each node
  const int64_t *rows, *prefixes, *starts;  // as in Attention
  const int32_t* paths;
  int64_t num_steps, num_rows, nodes;
  int32_t dtype, cos, sin;  // cos and sin: values
};

static void take(const char* table, const int64_t* indices, int64_t nodes, int64_t bytes, char* out) {
  for (int64_t node = 0; node < nodes; node++) memcpy(out + node * bytes, table + indices[node] * bytes, bytes);
}
static void join(const char* left, int64_t left_bytes, const char* right, int64_t right_bytes, int64_t nodes, char* out) {
  for (int64_t node = 0; node < nodes; node++, out += left_bytes + right_bytes) {
    memcpy(out, left + node * left_bytes, left_bytes);
    memcpy(out + left_bytes, right + node * right_bytes, right_bytes);
  }
}

static void attend(const Kernels& kernels, const AttentionLayer* layer, Attention* attention, const void* x, int64_t nodes,
                   const void* cos, const void* sin, void* states, void* y) {
  kernels.linear(layer->input, x, nodes, states);
  kernels.prepare(layer, attention, nodes, cos, sin, states);
  int64_t bytes = attention->dtype == kBFloat16 ? 2 : 4, width = layer->input->outputs;
  auto* first = static_cast<const char*>(states);
  attention->query = first;
  attention->key = first + attention->heads * attention->key_dim * bytes;
  attention->value = first + (attention->heads + attention->kv_heads) * attention->key_dim * bytes;
  attention->query_node = attention->key_node = attention->value_node = width;
  attention->query_head = attention->key_head = attention->key_dim;
  attention->value_head = attention->value_dim;
  kernels.attention(attention);
  kernels.linear(layer->output, attention->out, nodes, y);
}

static void run_step(const Kernels& kernels, const Forward& f, const Step& step) {
  const Value *left = f.values + step.left, *right = f.values + step.right, *out = f.values + step.out;
  int64_t bytes = f.dtype == kBFloat16 ? 2 : 4;
  switch (step.kind) {
    case kTake: return take((const char*)f.tables[step.source], f.indices[step.source], f.nodes, out->width * bytes, (char*)out->memory);
    case kJoin:
      return join((const char*)left->memory, left->width * bytes, (const char*)right->memory, right->width * bytes, f.nodes,
                  (char*)out->memory);
    case kProduct: return kernels.linear((const Linear*)step.module, left->memory, f.nodes, out->memory);
    case kRmsNorm: return kernels.norm(f.dtype, left->memory, f.nodes, left->width, (const float*)step.module, step.eps, out->memory);
    case kAdd: return kernels.add(f.dtype, left->memory, right->memory, f.nodes * out->width, out->memory);
    case kMlp:
      kernels.linear((const Linear*)step.module, left->memory, f.nodes, right->memory);
      return kernels.linear((const Linear*)step.second, right->memory, f.nodes, out->memory);
    case kAttend: {
      Attention attention = *(const Attention*)step.second;
      attention.rows = f.rows, attention.prefixes = f.prefixes, attention.starts = f.starts, attention.paths = f.paths;
      attention.num_rows = f.num_rows, attention.nodes = f.nodes, attention.out = f.values[step.extra].memory;
      attend(kernels, (const AttentionLayer*)step.module, &attention, left->memory, f.nodes, f.values[f.cos].memory,
             f.values[f.sin].memory, right->memory, out->memory);
    }
  }
}

}  // namespace headstart
