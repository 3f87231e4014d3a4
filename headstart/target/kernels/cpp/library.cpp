// The functions that Python calls, the choice of instructions, and what threads share. Compiled for any processor.
#include <stdlib.h>
#include <string.h>

#include "kernels.hpp"
#include "pool.hpp"
#if defined(__linux__)
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace headstart {

Pool& pool = *new Pool;  // never deleted: its threads outlive everything

void share_out(int64_t pieces, void (*piece)(void*, int64_t), void* context) { pool.run(pieces, piece, context); }
int num_threads() { return pool.size(); }

namespace {

// Memory of one thread that only grows.
struct Buffers {
  char* memory[kUses] = {};
  int64_t bytes[kUses] = {};
  ~Buffers() {
    for (char* each : memory) free(each);
  }
};

}  // namespace

void* scratch(Use use, int64_t bytes) {
  static thread_local Buffers buffers;
  if (bytes > buffers.bytes[use]) {
    free(buffers.memory[use]);
    buffers.bytes[use] = (bytes + 63) / 64 * 64;
    buffers.memory[use] = static_cast<char*>(aligned_alloc(64, buffers.bytes[use]));
    if (!buffers.memory[use]) abort();
  }
  return buffers.memory[use];
}

}  // namespace headstart

using headstart::Attention;
using headstart::Kernels;
using headstart::Linear;

extern const Kernels headstart_avx512, headstart_avx512_bf16, headstart_amx;

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
  bool (*is_there)();
};

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Linux gives matrix registers to a process that asks for them.
bool has_amx() {
#if defined(__linux__)
  uint32_t eax, ebx, ecx, edx;
  __asm__("cpuid" : "=a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx) : "a"(7), "c"(0));
  constexpr uint32_t kBf16 = 1u << 22, kTile = 1u << 24;
  return has_avx512_bf16() && (edx & kBf16) && (edx & kTile) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
const Level kLevels[] = {{"amx", &headstart_amx, has_amx},
                         {"avx512_bf16", &headstart_avx512_bf16, has_avx512_bf16},
                         {"avx512", &headstart_avx512, has_avx512}};

const Level* current = nullptr;

template <class T>
void pack(const T* from, int64_t outputs, int64_t inputs, int64_t stride, int64_t first, T* to, bool is_back) {
  constexpr bool is_float = sizeof(T) == 4;
  int64_t steps = (inputs + headstart::kDepth - 1) / headstart::kDepth;
  for (int64_t output = 0; output < outputs; output++) {
    int64_t at = first + output / 16 * stride + output % 16;  // in the packed weight; `stride`: between groups of 16
    int64_t block = at / headstart::kBlock, lane = at % headstart::kBlock;
    for (int64_t input = 0; input < inputs; input++) {
      int64_t place = is_float ? (block * inputs + input) * headstart::kBlock + lane
                               : (((block * steps + input / 32) * 4 + lane / 16) * 16 + input % 32 / 2) * 32 + lane % 16 * 2 + input % 2;
      T* packed = to + place;
      T* plain = const_cast<T*>(from) + output * inputs + input;
      if (is_back) *plain = *packed;
      else *packed = *plain;
    }
  }
}

struct Packing {
  int64_t bytes;
  const void* from;
  int64_t outputs, inputs, stride, first;
  void* to;
  bool is_back;
  void operator()(int64_t group) const {
    int64_t rows = outputs - group * 16 < 16 ? outputs - group * 16 : 16;
    int64_t at = first + group * stride;
    auto* plain = static_cast<const char*>(from) + group * 16 * inputs * bytes;
    if (bytes == 4) pack((const float*)plain, rows, inputs, stride, at, (float*)to, is_back);
    else if (bytes == 2) pack((const uint16_t*)plain, rows, inputs, stride, at, (uint16_t*)to, is_back);
    else pack((const int8_t*)plain, rows, inputs, stride, at, (int8_t*)to, is_back);
  }
};

void forget_threads() { headstart::pool.forget_threads(); }

}  // namespace

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// Choose the best set of instructions that this processor has, or the one of that name. Returns its name; null where there is none.
EXPORTED const char* headstart_choose(const char* name) {
  for (const Level& level : kLevels)
    if ((!name || strcmp(name, level.name) == 0) && level.is_there()) {
#if defined(__linux__)
      if (!current) pthread_atfork(nullptr, nullptr, forget_threads);
#endif
      current = &level;
      return level.name;
    }
  return nullptr;
}

EXPORTED void headstart_threads(int64_t threads) { headstart::pool.resize(static_cast<int>(threads)); }

// Copy a plain weight [outputs, inputs] of values of some bytes to a packed one, or back. Its outputs go to the packed outputs
// first, first + 1, ..., first + 15, first + stride, and so on.
EXPORTED void headstart_pack(int64_t bytes, void* plain, int64_t outputs, int64_t inputs, int64_t first, int64_t stride, void* packed,
                    int64_t is_back) {
  Packing packing{bytes, plain, outputs, inputs, stride, first, packed, is_back != 0};
  headstart::pool.run((outputs + 15) / 16, packing);
}

EXPORTED void headstart_linear(const Linear* linear, const void* x, int64_t rows, void* y) { current->kernels->linear(linear, x, rows, y); }

// down(activation(gate(x)) * value(x)); `between` has room for [rows, outputs of `up`].
EXPORTED void headstart_mlp(const Linear* up, const Linear* down, const void* x, int64_t rows, void* between, void* y) {
  current->kernels->linear(up, x, rows, between);
  current->kernels->linear(down, between, rows, y);
}

EXPORTED void headstart_norm(int64_t dtype, const void* x, int64_t rows, int64_t width, const float* weight, float eps, void* y) {
  current->kernels->norm(static_cast<int32_t>(dtype), x, rows, width, weight, eps, y);
}

EXPORTED void headstart_attention(const Attention* attention) { current->kernels->attention(attention); }

// x [nodes, inputs] -> y [nodes, outputs]. Queries, keys and values go to `states` [nodes, outputs of the input product], and the
// attention's output to `attention->out`. cos, sin: [nodes, rope_width].
EXPORTED void headstart_attention_layer(const headstart::AttentionLayer* layer, Attention* attention, const void* x, int64_t nodes,
                                        const void* cos, const void* sin, void* states, void* y) {
  const Kernels& kernels = *current->kernels;
  kernels.linear(layer->input, x, nodes, states);
  kernels.prepare(layer, attention, nodes, cos, sin, states);
  int64_t bytes = attention->dtype == headstart::kBFloat16 ? 2 : 4, width = layer->input->outputs;
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

}  // extern "C"
