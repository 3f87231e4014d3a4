// The functions that Python calls, the choice of instructions, and what threads share. Compiled for any processor.
#include <stdlib.h>
#include <string.h>

#include "kernels.hpp"
#include "pool.hpp"
#include "steps.hpp"
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
    buffers.bytes[use] = (bytes + bytes / 2 + 63) / 64 * 64;  // more than is asked for: a context grows a little at a time
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
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
// Linux gives matrix registers to a process that asks for them.
bool has_amx() {
#if defined(__linux__)
  uint32_t eax, ebx, ecx, edx;
  __asm__("cpuid" : "=a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx) : "a"(7), "c"(0));
  constexpr uint32_t kAll = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  return has_avx512_bf16() && (edx & kAll) == kAll && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
const Level kLevels[] = {{"amx", &headstart_amx, has_amx},
                         {"avx512_bf16", &headstart_avx512_bf16, has_avx512_bf16},
                         {"avx512", &headstart_avx512, has_avx512}};

std::atomic<const Kernels*> current{nullptr};
const Kernels& kernels() { return *current.load(std::memory_order_relaxed); }

// Where an input of a packed output is. fp32 weights have one input in a step, others 64 bytes of them, in fours of bytes.
template <class T>
int64_t place(int64_t output, int64_t input, int64_t inputs) {
  constexpr int64_t kFew = 4 / sizeof(T), kInputs = sizeof(T) == 4 ? 1 : headstart::kStep / sizeof(T);
  int64_t block = output / headstart::kBlock, lane = output % headstart::kBlock;
  if (sizeof(T) == 4) return (block * inputs + input) * headstart::kBlock + lane;
  int64_t steps = (inputs + kInputs - 1) / kInputs;
  int64_t four = ((block * steps + input / kInputs) * 4 + lane / 16) * 16 + input % kInputs / kFew;
  return (four * 16 + lane % 16) * kFew + input % kFew;
}

template <class T>
void pack(T* plain, int64_t outputs, int64_t inputs, int64_t first, T* packed, bool is_back) {
  for (int64_t output = 0; output < outputs; output++)
    for (int64_t input = 0; input < inputs; input++) {
      T& one = plain[output * inputs + input];
      T& other = packed[place<T>(first + output, input, inputs)];
      if (is_back) one = other;
      else other = one;
    }
}

// Each piece of work is a group of 16 outputs.
struct Packing {
  int64_t bytes;
  void* plain;
  int64_t outputs, inputs, first, stride;
  void* packed;
  bool is_back;
  void operator()(int64_t group) const {
    int64_t rows = outputs - group * 16 < 16 ? outputs - group * 16 : 16, at = first + group * stride;
    char* from = static_cast<char*>(plain) + group * 16 * inputs * bytes;
    if (bytes == 4) pack((float*)from, rows, inputs, at, (float*)packed, is_back);
    else if (bytes == 2) pack((uint16_t*)from, rows, inputs, at, (uint16_t*)packed, is_back);
    else pack((int8_t*)from, rows, inputs, at, (int8_t*)packed, is_back);
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
      static const int registered = pthread_atfork(nullptr, nullptr, forget_threads);  // once, whichever thread comes first
      (void)registered;
#endif
      current = level.kernels;
      return level.name;
    }
  return nullptr;
}

EXPORTED void headstart_threads(int64_t threads) { headstart::pool.resize(threads); }

// Copy a plain weight [outputs, inputs] of values of some bytes to a packed one, or back. Its outputs go to the packed outputs
// first, first + 1, ..., first + 15, first + stride, and so on.
EXPORTED void headstart_pack(int64_t bytes, void* plain, int64_t outputs, int64_t inputs, int64_t first, int64_t stride, void* packed,
                    int64_t is_back) {
  Packing packing{bytes, plain, outputs, inputs, first, stride, packed, is_back != 0};
  headstart::pool.run((outputs + 15) / 16, packing);
}

EXPORTED void headstart_linear(const Linear* linear, const void* x, int64_t rows, void* y) { kernels().linear(linear, x, rows, y); }

// down(activation(gate(x)) * value(x)); `between` has room for [rows, outputs of `up`].
EXPORTED void headstart_mlp(const Linear* up, const Linear* down, const void* x, int64_t rows, void* between, void* y) {
  kernels().linear(up, x, rows, between);
  kernels().linear(down, between, rows, y);
}

EXPORTED void headstart_norm(int64_t dtype, const void* x, int64_t rows, int64_t width, const float* weight, float eps, void* y) {
  kernels().norm(static_cast<int32_t>(dtype), x, rows, width, weight, eps, y);
}

EXPORTED void headstart_children(const headstart::Choice* choice) { kernels().choose(choice); }

EXPORTED void headstart_attention(const Attention* attention) { kernels().attention(attention); }

// x [nodes, inputs] -> y [nodes, outputs]. Queries, keys and values go to `states` [nodes, outputs of the input product], and the
// attention's output to `attention->out`. cos, sin: [nodes, rope_width].
EXPORTED void headstart_attention_layer(const headstart::AttentionLayer* layer, Attention* attention, const void* x, int64_t nodes,
                                        const void* cos, const void* sin, void* states, void* y) {
  headstart::attend(kernels(), layer, attention, x, nodes, cos, sin, states, y);
}

EXPORTED void headstart_forward(const headstart::Forward* forward) {
  for (int64_t step = 0; step < forward->num_steps; step++) headstart::run_step(kernels(), *forward, forward->steps[step]);
}

}  // extern "C"
