// What the compiled kernels take. One table of functions is compiled for each set of instructions.
#pragma once
#include <cstdint>

namespace headstart {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1 };
constexpr int64_t kBlock = 64;  // outputs of one block of a packed weight
constexpr int64_t kStep = 64;   // bytes of inputs in one step of a packed bf16 or int8 weight: 32 or 64 inputs

// A packed weight: blocks of 64 outputs, one after the other, padded with zeros.
//   fp32   [blocks, inputs, 64]
//   bf16   [blocks, inputs / 32, 4, 16, 16, 2]   step, group of 16 outputs, pair of inputs, output, input of the pair
//   int8   [blocks, inputs / 64, 4, 16, 16, 4]   step, group of 16 outputs, four inputs, output, input of the four
// An int8 weight is multiplied with inputs of 15 bits: row / scale = 128 high + low, both int8, with one scale for each row.
// A gated weight holds the gate and the value of 32 outputs in each block, by turns of 16.
struct Linear {
  const void* weight;
  const float* scale;      // [blocks * 64], or null where the weight is not int8
  const int32_t* offsets;  // [blocks * 64] -128 times the sum of an output's int8 weights
  const float* bias;   // [blocks * 64], or null
  int64_t inputs;
  int64_t outputs;     // without padding; of a gated weight, the number of its products
  int32_t dtype;       // of input and output
  int32_t is_int8;
  int32_t is_gated;
  int32_t activation;  // of the gate
};

// The attention of all rows in one layer.
struct Attention {
  const void* query;  // [heads, nodes, key_dim], strides below, as keys and values of the nodes: in elements
  const void* key;    // [kv_heads, nodes, key_dim]
  const void* value;  // [kv_heads, nodes, value_dim]
  void* keys;         // [kv_heads, slots, key_dim]
  void* values;       // [kv_heads, slots, value_dim]
  void* out;          // [nodes, heads, value_dim]
  const float* sinks;  // [heads] or null
  // Per row: first node, last node, first slot, slot of the first node. Per node: number of leading slots that it sees, its path.
  const int64_t* rows;      // [num_rows, 4]
  const int64_t* prefixes;  // [nodes] slots [0, prefix) of its seat are at positions 0, 1, 2, and so on
  const int64_t* starts;    // [nodes + 1] into `paths`
  const int32_t* paths;     // slots of the seat at the positions after the prefix
  const int64_t* lowest;    // [nodes] first position that is seen, or null for all
  int64_t query_head, query_node, key_head, key_node, value_head, value_node, keys_head, values_head;
  int64_t num_rows, nodes, heads, kv_heads, key_dim, value_dim;
  float scaling, softcap;  // softcap 0: none
  int32_t dtype;
};

// A whole attention layer: queries, keys and values in one product, norms of heads, rotary embedding, attention, output product.
struct AttentionLayer {
  const Linear* input;   // its outputs: queries of all heads, then keys, then values
  const Linear* output;
  const float* query_norm;  // [key_dim] or null
  const float* key_norm;
  int64_t rope_width;  // how many values of a head are rotated, in halves
  float eps;           // of the norms
};

constexpr int kMostChildren = 64;  // of one line

// The children that lines of logits give. Score: logit + temperature * noise. Of equal scores, the lower column is better.
struct Choice {
  const void* logits;  // [lines, width], `stride` values from one line to the next
  const int64_t* rows;        // [lines] the row of each line, by which the next ones are read
  const float* noise;         // [rows, vocab], or null for none
  const float* temperatures;  // [rows] 0: greedy, without truncation
  const float* divisors;      // [num_divisors] one for each row, or one for all: chance = softmax(score / divisor)
  const int64_t* top_k;       // [rows] 0: off; null, with the next two: no truncation
  const double* top_p;        // [rows] infinity: off
  const float* min_p;         // [rows] 0: off
  const int64_t* ids;         // [width] the token of each column, or null: the column itself
  int64_t* tokens;            // [lines, k] best first
  float* chances;             // [lines, k] 0 for tokens that the truncation leaves out
  int64_t lines, width, stride, vocab, num_divisors, k;  // k at most kMostChildren and at most the width
  int32_t dtype;
};

// The kernels of one set of instructions. Code that is compiled for several sets must not share inline functions, or the linker
// would take any of them: between those files there are plain functions only.
struct Kernels {
  void (*linear)(const Linear*, const void* x, int64_t rows, void* y);
  void (*norm)(int32_t dtype, const void* x, int64_t rows, int64_t width, const float* weight, float eps, void* y);
  void (*attention)(const Attention*);
  void (*prepare)(const AttentionLayer*, const Attention*, int64_t nodes, const void* cos, const void* sin, void* states);
  void (*choose)(const Choice*);
  void (*add)(int32_t dtype, const void* left, const void* right, int64_t count, void* y);  // left + right, rounded once
};

// Run pieces 0 to `pieces` - 1 on several threads, see pool.hpp.
void share_out(int64_t pieces, void (*piece)(void* context, int64_t number), void* context);
int num_threads();
// Memory of this thread, aligned to 64 bytes, valid until the next call with the same `use`.
enum Use { kSums, kInput, kScales, kScores, kRows, kChoices, kHeap, kUses };
void* scratch(Use use, int64_t bytes);

}  // namespace headstart
