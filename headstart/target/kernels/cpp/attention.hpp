// Tree attention of a few nodes over a KV cache. Every node adds its positions one after the other, wherever their slots are, so that
// it has the same bits whether an ancestor is committed or a draft, and whatever else is in the forest.
#pragma once
#include "kernels.hpp"
#include "vectors.hpp"

namespace {

using headstart::Attention;

constexpr int64_t kMostQueries = 16;  // of one piece of work: nodes times heads that share keys

// Some queries of one row that read the same keys and values.
struct Piece {
  const int64_t* row;        // first node, last node, first slot, slot of the first node
  int64_t kv_head, first, last;  // numbers among the row's queries: head in the group * nodes + node
};

struct Query {
  int64_t node, head;
  int64_t lowest, prefix, end;  // positions it sees: [lowest, end); of these, [0, prefix) are at the slots of that number
  const int32_t* path;
};

static Query query_of(const Attention& a, const Piece& piece, int64_t number) {
  int64_t nodes = piece.row[1] - piece.row[0], group = a.heads / a.kv_heads;
  Query q;
  q.node = piece.row[0] + number % nodes;
  q.head = piece.kv_head * group + number / nodes;
  q.prefix = a.prefixes[q.node];
  q.path = a.paths + a.starts[q.node];
  q.end = q.prefix + a.starts[q.node + 1] - a.starts[q.node];
  q.lowest = a.lowest ? a.lowest[q.node] : 0;
  return q;
}

// The sums of 16 vectors, in one vector.
INLINE Vec sums_of(Vec v[kLanes]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
  const __m512i high = _mm512_setr_epi32(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  const __m512i low2 = _mm512_setr_epi32(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  const __m512i high2 = _mm512_setr_epi32(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  __m512 a[8], b[4];
  for (int i = 0; i < 8; i++) {
    __m512 x = (__m512)v[2 * i], y = (__m512)v[2 * i + 1];
    a[i] = _mm512_add_ps(_mm512_permutex2var_ps(x, low, y), _mm512_permutex2var_ps(x, high, y));
  }
  for (int i = 0; i < 4; i++)
    b[i] = _mm512_add_ps(_mm512_permutex2var_ps(a[2 * i], low2, a[2 * i + 1]), _mm512_permutex2var_ps(a[2 * i], high2, a[2 * i + 1]));
  // b[i]: 4 parts of 4 lanes; lane 4 p + j is part p of vector 4 i + j
  __m512 c0 = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
  __m512 c1 = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
  return (Vec)_mm512_add_ps(_mm512_shuffle_f32x4(c0, c1, 0x88), _mm512_shuffle_f32x4(c0, c1, 0xdd));
}

// The products of a query with 16 keys, one behind the other.
template <class T>
INLINE Vec dots(const float* query, const T* keys, int64_t dim) {
  Vec sums[kLanes] = {};
  for (int64_t i = 0; i < dim; i += kLanes) {
    Vec part = load(query + i);
    for (int lane = 0; lane < kLanes; lane++) sums[lane] += part * load(keys + lane * dim + i);
  }
  return sums_of(sums);
}

// out += weights * values, one position after the other.
template <int count, class T>
INLINE void add_some_values(const float* weights, const T* values, int64_t dim, int from, int to, float* out) {
  Vec sum[count];
  for (int i = 0; i < count; i++) sum[i] = load(out + i * kLanes);
  for (int lane = from; lane < to; lane++)
    for (int i = 0; i < count; i++) sum[i] += weights[lane] * load(values + lane * dim + i * kLanes);
  for (int i = 0; i < count; i++) store(out + i * kLanes, sum[i]);
}
template <class T>
INLINE void add_values(const float* weights, const T* values, int64_t dim, int from, int to, float* out) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= dim; i += 4 * kLanes) add_some_values<4>(weights, values + i, dim, from, to, out + i);
  for (; i < dim; i += kLanes) add_some_values<1>(weights, values + i, dim, from, to, out + i);
}

// Where the keys or values of 16 positions are, one behind the other: in the seat itself, or, for the path of a tree, copied.
template <class T>
INLINE const T* rows_of(const T* seat, int64_t dim, const Query& q, int64_t block, T* copies) {
  if (block + kLanes <= q.prefix) return seat + block * dim;
  for (int lane = 0; lane < kLanes; lane++) {
    int64_t position = block + lane < q.end ? block + lane : q.end - 1;
    int64_t slot = position < q.prefix ? position : q.path[position - q.prefix];
    memcpy(copies + lane * dim, seat + slot * dim, dim * sizeof(T));
  }
  return copies;
}

// 16 rows in fp32, where several queries read them.
template <class T>
INLINE void widen(const T* rows, int64_t dim, float* to) {
  for (int64_t i = 0; i < kLanes * dim; i += kLanes) store(to + i, load(rows + i));
}

// Softmax of the scores of one query, not yet divided by their sum, which is returned.
static float weigh(const Attention& a, const Query& q, float* scores, int64_t first, int64_t last) {
  constexpr Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec hidden = splat(-__builtin_inff());
  Vec top = hidden, total = {};
  for (int64_t block = first; block < last; block += kLanes) {
    Ints position = lanes + (int32_t)block;
    Vec score = load(scores + block - first);
    if (a.softcap > 0) score = tanh(score / a.softcap) * a.softcap;
    score = choose((position >= (int32_t)q.lowest) & (position < (int32_t)q.end), score, hidden);
    store(scores + block - first, score);
    top = vmax(top, score);
  }
  float most = largest(top);
  if (a.sinks && a.sinks[q.head] > most) most = a.sinks[q.head];
  for (int64_t block = first; block < last; block += kLanes) {
    Vec weight = exp(load(scores + block - first) - most);
    store(scores + block - first, weight);
    total += weight;
  }
  return sum(total) + (a.sinks ? exp(splat(a.sinks[q.head] - most))[0] : 0.0f);
}

// The attention of the queries of one piece. `fixed`: the width of keys and values where it is known, for faster code; else 0.
template <class T, int64_t fixed>
static void attend(const Attention& a, const Piece& piece) {
  Query queries[kMostQueries];
  int64_t count = piece.last - piece.first, first = INT64_MAX, last = 0, shared = INT64_MAX;
  for (int64_t i = 0; i < count; i++) {
    Query q = queries[i] = query_of(a, piece, piece.first + i);
    first = q.lowest < first ? q.lowest : first;
    last = q.end > last ? q.end : last;
    shared = q.prefix < shared ? q.prefix : shared;
  }
  if (count == 1) shared = 0;
  first -= first % kLanes;  // blocks are the same for every node of a text
  int64_t length = (last - first + kLanes - 1) / kLanes * kLanes, dim = fixed ? fixed : a.key_dim, wide = fixed ? fixed : a.value_dim;
  int64_t most = dim > wide ? dim : wide;
  auto* memory = (float*)headstart::scratch(headstart::kScores, 4 * (count * (length + dim + wide) + 2 * kLanes * most));
  float *scores = memory, *scaled = scores + count * length, *out = scaled + count * dim, *widened = out + count * wide;
  T* copies = (T*)(widened + kLanes * most);
  for (int64_t i = 0; i < count; i++) {
    const T* query = (const T*)a.query + queries[i].head * a.query_head + queries[i].node * a.query_node;
    for (int64_t d = 0; d < dim; d += kLanes) store(scaled + i * dim + d, load(query + d) * a.scaling);
  }
  memset(out, 0, 4 * count * wide);
  const T* keys = (const T*)a.keys + piece.kv_head * a.keys_head + piece.row[2] * dim;
  const T* values = (const T*)a.values + piece.kv_head * a.values_head + piece.row[2] * wide;
  for (int64_t block = first; block < last; block += kLanes) {
    bool is_shared = block + kLanes <= shared;
    if (is_shared) widen(keys + block * dim, dim, widened);
    for (int64_t i = 0; i < count; i++) {
      if (block >= queries[i].end || block + kLanes <= queries[i].lowest) continue;
      Vec score = is_shared ? dots(scaled + i * dim, widened, dim)
                            : dots(scaled + i * dim, rows_of(keys, dim, queries[i], block, copies), dim);
      store(scores + i * length + block - first, score);
    }
  }
  float totals[kMostQueries];
  for (int64_t i = 0; i < count; i++) {
    int64_t from = queries[i].lowest - queries[i].lowest % kLanes;
    totals[i] = weigh(a, queries[i], scores + i * length + from - first, from, queries[i].end);
  }
  for (int64_t block = first; block < last; block += kLanes) {
    bool is_shared = block + kLanes <= shared;
    if (is_shared) widen(values + block * wide, wide, widened);
    for (int64_t i = 0; i < count; i++) {
      const Query& q = queries[i];
      int from = (int)(q.lowest > block ? q.lowest - block : 0), to = (int)(q.end - block < kLanes ? q.end - block : kLanes);
      if (from >= to) continue;
      const float* weights = scores + i * length + block - first;
      if (is_shared) add_values(weights, widened, wide, from, to, out + i * wide);
      else add_values(weights, rows_of(values, wide, q, block, copies), wide, from, to, out + i * wide);
    }
  }
  for (int64_t i = 0; i < count; i++) {
    T* to = (T*)a.out + (queries[i].node * a.heads + queries[i].head) * wide;
    for (int64_t d = 0; d < wide; d += kLanes) store(to + d, load(out + i * wide + d) / totals[i]);
  }
}

template <class T>
static void attend_of(const Attention& a, const Piece& piece) {
  bool is_square = a.key_dim == a.value_dim;
  if (is_square && a.key_dim == 64) attend<T, 64>(a, piece);
  else if (is_square && a.key_dim == 128) attend<T, 128>(a, piece);
  else attend<T, 0>(a, piece);
}

// Write the keys and values of this forward's nodes behind those of their rows.
template <class T>
static void write_nodes(const Attention& a) {
  for (int64_t head = 0; head < a.kv_heads; head++)
    for (int64_t row = 0; row < a.num_rows; row++) {
      const int64_t* r = a.rows + 4 * row;
      for (int64_t node = r[0]; node < r[1]; node++) {
        int64_t slot = r[2] + r[3] + node - r[0];
        memcpy((T*)a.keys + head * a.keys_head + slot * a.key_dim, (const T*)a.key + head * a.key_head + node * a.key_node,
               a.key_dim * sizeof(T));
        memcpy((T*)a.values + head * a.values_head + slot * a.value_dim,
               (const T*)a.value + head * a.value_head + node * a.value_node, a.value_dim * sizeof(T));
      }
    }
}

struct Pieces {
  const Attention& attention;
  const Piece* pieces;
};

static void attend_piece(void* context, int64_t number) {
  auto& all = *(const Pieces*)context;
  if (all.attention.dtype == headstart::kBFloat16) attend_of<BFloat16>(all.attention, all.pieces[number]);
  else attend_of<float>(all.attention, all.pieces[number]);
}

// Pieces of about equal size, several for each thread where there are enough queries.
static void attention(const Attention* a) {
  if (a->dtype == headstart::kBFloat16) write_nodes<BFloat16>(*a);
  else write_nodes<float>(*a);
  int64_t group = a->heads / a->kv_heads, num_pieces = 0, all = 0;
  for (int64_t row = 0; row < a->num_rows; row++) all += (a->rows[4 * row + 1] - a->rows[4 * row]) * a->heads;
  int64_t most = all / (4 * headstart::num_threads()) + 1;
  most = most < kMostQueries ? most : kMostQueries;
  auto* pieces = (Piece*)headstart::scratch(headstart::kRows, (all / most + a->num_rows * a->kv_heads + 1) * sizeof(Piece));
  for (int64_t row = 0; row < a->num_rows; row++)
    for (int64_t head = 0; head < a->kv_heads; head++) {
      const int64_t* r = a->rows + 4 * row;
      int64_t queries = (r[1] - r[0]) * group;
      for (int64_t first = 0; first < queries; first += most)
        pieces[num_pieces++] = {r, head, first, first + most < queries ? first + most : queries};
    }
  Pieces shared{*a, pieces};
  headstart::share_out(num_pieces, attend_piece, &shared);
}

}  // namespace
