// The best children of several lines of logits, their chances, and whether a truncation admits them: two passes over each line.
// A line is cut into parts, always at the same columns, so that results do not depend on the number of threads.
#pragma once
#include "kernels.hpp"
#include "vectors.hpp"

namespace {

using headstart::Choice;
using headstart::kMostChildren;

constexpr int64_t kColumns = 1 << 13;  // of a part
typedef double Doubles __attribute__((vector_size(64)));

// The k columns of highest score, best first; of equal scores, the lower column comes first.
struct Best {
  float scores[kMostChildren];
  int64_t columns[kMostChildren];
  int k, count;

  float least() const { return count == k ? scores[k - 1] : -__builtin_inff(); }
  // Columns must come in ascending order. Minus infinity and nan are never among the best.
  void offer(float score, int64_t column) {
    if (!(score > least())) return;
    int at = count < k ? count++ : k - 1;
    for (; at > 0 && score > scores[at - 1]; at--) scores[at] = scores[at - 1], columns[at] = columns[at - 1];
    scores[at] = score, columns[at] = column;
  }
  // Fill up with the lowest columns of the others, whose scores are minus infinity.
  void fill() {
    for (int64_t column = 0; count < k; column++) {
      bool is_new = true;
      for (int i = 0; i < count; i++) is_new &= columns[i] != column;
      if (is_new) scores[count] = -__builtin_inff(), columns[count++] = column;
    }
  }
};

struct Part {
  Best best;
  float largest;  // logit
  double mass;    // of e^((score - best score) / divisor)
  double total;   // of e^((logit - largest logit) / temperature)
  double larger_mass[kMostChildren];  // of logits that come before a child's
  int64_t larger[kMostChildren];      // how many they are
};

struct Line {
  Part all;  // of the whole line
  float scaled[kMostChildren], lowest;  // (logit - largest logit) / temperature of the children, and the least of them
};

struct Choosing {
  const Choice& choice;
  int64_t num_parts;
  Part* parts;  // [lines, num_parts]
  Line* lines;
};

// What one line reads.
template <class T>
struct Reader {
  const T* logits;
  const float* noise;  // null: none
  const int64_t* ids;
  float temperature;

  Vec logit(int64_t column, int count) const { return load_some(logits + column, count); }
  Vec score(int64_t column, int count, Vec logit) const {
    return noise ? (Vec)_mm512_fmadd_ps((__m512)splat(temperature), (__m512)noise_at(column, count), (__m512)logit) : logit;
  }
  Vec noise_at(int64_t column, int count) const {
    if (!ids) return load_some(noise + column, count);
    float values[kLanes] = {};
    for (int lane = 0; lane < count; lane++) values[lane] = noise[ids[column + lane]];
    return load(values);
  }
};

template <class T>
static Reader<T> reader_of(const Choice& c, int64_t line) {
  int64_t row = c.rows[line];
  return {(const T*)c.logits + line * c.stride, c.noise ? c.noise + row * c.vocab : nullptr, c.ids, c.temperatures[row]};
}
INLINE int lanes_at(int64_t column, int64_t end) { return end - column < kLanes ? (int)(end - column) : kLanes; }
INLINE uint32_t first_lanes(int count) { return (1u << count) - 1; }
INLINE Doubles low_half(Vec x) { return (Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)); }
INLINE Doubles high_half(Vec x) { return (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1)); }
INLINE double sum(Doubles x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}
INLINE float divisor_of(float temperature) { return temperature > 1.17549435e-38f ? temperature : 1.17549435e-38f; }
static bool is_truncated(const Choice& c, int64_t row) {
  return c.top_p && c.temperatures[row] > 0 && (c.top_k[row] > 0 || c.top_p[row] < __builtin_inf() || c.min_p[row] > 0);
}

// First pass: the best scores and the largest logit of a part.
template <class T>
static void find_best(const Choice& c, int64_t line, int64_t first, int64_t last, Part& part) {
  Reader<T> reader = reader_of<T>(c, line);
  Best best;
  best.k = (int)c.k, best.count = 0;
  Vec largest = splat(-__builtin_inff()), least = largest;
  for (int64_t column = first; column < last; column += kLanes) {
    int count = lanes_at(column, last);
    Vec logit = reader.logit(column, count), score = reader.score(column, count, logit);
    uint32_t better = _mm512_cmp_ps_mask((__m512)score, (__m512)least, _CMP_GT_OQ) & first_lanes(count);
    Vec larger = vmax(logit, largest);
    largest = count == kLanes ? larger : (Vec)_mm512_mask_mov_ps((__m512)largest, first_lanes(count), (__m512)larger);
    if (!better) continue;
    float scores[kLanes];
    store(scores, score);
    for (; better; better &= better - 1) best.offer(scores[__builtin_ctz(better)], column + __builtin_ctz(better));
    least = splat(best.least());
  }
  part.best = best;
  part.largest = ::largest(largest);
}

// The larger logits of 16: those above a child's, and equal ones before it.
INLINE void count_larger(const Choice& c, const Line& line, Vec scaled, Vec mass, int64_t column, uint32_t real, Doubles (*sums)[2],
                         int64_t* counts) {
  for (int child = 0; child < c.k; child++) {
    __m512 own = (__m512)splat(line.scaled[child]);
    int64_t before = line.all.best.columns[child] - column;  // how many of the lanes come before the child
    uint32_t lower = before <= 0 ? 0 : before >= kLanes ? 0xffff : first_lanes((int)before);
    uint32_t mask = _mm512_cmp_ps_mask((__m512)scaled, own, _CMP_GT_OQ) | (_mm512_cmp_ps_mask((__m512)scaled, own, _CMP_EQ_OQ) & lower);
    mask &= real;
    counts[child] += __builtin_popcount(mask);
    Vec chosen = (Vec)_mm512_maskz_mov_ps(mask, (__m512)mass);
    sums[child][0] += low_half(chosen), sums[child][1] += high_half(chosen);
  }
}

// Second pass: the masses of a part.
template <class T>
static void add_masses(const Choice& c, int64_t number, int64_t first, int64_t last, const Line& line, Part& part) {
  Reader<T> reader = reader_of<T>(c, number);
  int64_t row = c.rows[number];
  bool is_cut = is_truncated(c, row);
  float best = line.all.best.scores[0], divisor = c.divisors[c.num_divisors == 1 ? 0 : row], temperature = divisor_of(reader.temperature);
  Doubles mass[2] = {}, total[2] = {}, sums[kMostChildren][2];
  for (int child = 0; child < c.k; child++) sums[child][0] = sums[child][1] = Doubles{}, part.larger[child] = 0;
  for (int64_t column = first; column < last; column += kLanes) {
    int count = lanes_at(column, last);
    uint32_t real = first_lanes(count);
    Vec logit = reader.logit(column, count);
    Vec term = exp((reader.score(column, count, logit) - best) / divisor);
    if (count < kLanes) term = (Vec)_mm512_maskz_mov_ps(real, (__m512)term);
    mass[0] += low_half(term), mass[1] += high_half(term);
    if (!is_cut) continue;
    Vec scaled = (logit - line.all.largest) / temperature, own = exp(scaled);
    if (count < kLanes) own = (Vec)_mm512_maskz_mov_ps(real, (__m512)own);
    total[0] += low_half(own), total[1] += high_half(own);
    if (_mm512_cmp_ps_mask((__m512)scaled, (__m512)splat(line.lowest), _CMP_GE_OQ) & real)
      count_larger(c, line, scaled, own, column, real, sums, part.larger);
  }
  part.mass = sum(mass[0] + mass[1]), part.total = sum(total[0] + total[1]);
  for (int child = 0; child < c.k; child++) part.larger_mass[child] = sum(sums[child][0] + sums[child][1]);
}

// The best of all parts of a line.
template <class T>
static void join_best(const Choosing& work, int64_t number) {
  const Choice& c = work.choice;
  Line& line = work.lines[number];
  const Part* parts = work.parts + number * work.num_parts;
  Best& best = line.all.best;
  best = parts[0].best, line.all.largest = parts[0].largest;
  for (int64_t p = 1; p < work.num_parts; p++) {
    for (int i = 0; i < parts[p].best.count; i++) best.offer(parts[p].best.scores[i], parts[p].best.columns[i]);
    line.all.largest = parts[p].largest > line.all.largest ? parts[p].largest : line.all.largest;
  }
  best.fill();
  const T* logits = (const T*)c.logits + number * c.stride;
  float temperature = divisor_of(c.temperatures[c.rows[number]]);
  line.lowest = __builtin_inff();
  for (int child = 0; child < c.k; child++) {
    line.scaled[child] = (to_float(logits[best.columns[child]]) - line.all.largest) / temperature;
    line.lowest = line.scaled[child] < line.lowest ? line.scaled[child] : line.lowest;
  }
}

// The mass of the `most` largest logits of a line: a heap keeps them, the least at its root.
template <class T>
static double mass_of_largest(const Choice& c, int64_t number, int64_t most, float largest, float temperature) {
  const T* logits = (const T*)c.logits + number * c.stride;
  float* heap = (float*)headstart::scratch(headstart::kHeap, most * sizeof(float));
  for (int64_t i = 0; i < most; i++) heap[i] = -__builtin_inff();
  for (int64_t column = 0; column < c.width; column += kLanes) {
    int count = lanes_at(column, c.width);
    Vec logit = load_some(logits + column, count);
    uint32_t better = _mm512_cmp_ps_mask((__m512)logit, (__m512)splat(heap[0]), _CMP_GT_OQ) & first_lanes(count);
    for (; better; better &= better - 1) {
      float value = logit[__builtin_ctz(better)];
      if (!(value > heap[0])) continue;
      int64_t at = 0;
      for (int64_t child; (child = 2 * at + 1) < most; at = child) {
        if (child + 1 < most && heap[child + 1] < heap[child]) child++;
        if (!(heap[child] < value)) break;
        heap[at] = heap[child];
      }
      heap[at] = value;
    }
  }
  double mass = 0;
  for (int64_t i = 0; i < most; i += kLanes) {
    int count = lanes_at(i, most);
    Vec terms = exp((load_some(heap + i, count) - largest) / temperature);
    for (int lane = 0; lane < count; lane++) mass += terms[lane];
  }
  return mass;
}

// The children of a line, from the masses of its parts.
template <class T>
static void finish(const Choosing& work, int64_t number) {
  const Choice& c = work.choice;
  Line& line = work.lines[number];
  int64_t row = c.rows[number];
  Part& all = line.all;
  all.mass = all.total = 0;
  for (int child = 0; child < c.k; child++) all.larger_mass[child] = 0, all.larger[child] = 0;
  for (const Part* part = work.parts + number * work.num_parts; part < work.parts + (number + 1) * work.num_parts; part++) {
    all.mass += part->mass, all.total += part->total;
    for (int child = 0; child < c.k; child++)
      all.larger_mass[child] += part->larger_mass[child], all.larger[child] += part->larger[child];
  }
  bool is_cut = is_truncated(c, row);
  double limit = __builtin_inf();
  if (is_cut && c.top_p[row] < limit) {
    bool is_few = c.top_k[row] > 0 && c.top_k[row] < c.width;
    limit = c.top_p[row] * (is_few ? mass_of_largest<T>(c, number, c.top_k[row], all.largest, divisor_of(c.temperatures[row])) : all.total);
  }
  float divisor = c.divisors[c.num_divisors == 1 ? 0 : row];
  for (int child = 0; child < c.k; child++) {
    bool is_inside = !is_cut || (all.larger_mass[child] < limit && (c.top_k[row] == 0 || all.larger[child] < c.top_k[row]) &&
                                 (c.min_p[row] == 0 || exp(splat(line.scaled[child]))[0] >= c.min_p[row]));
    float chance = exp(splat((all.best.scores[child] - all.best.scores[0]) / divisor))[0] / (float)all.mass;
    int64_t at = number * c.k + child, column = all.best.columns[child];
    c.chances[at] = is_inside ? chance : 0;
    c.tokens[at] = c.ids ? c.ids[column] : column;
  }
}

template <class T, bool is_first>
static void choose_part(void* context, int64_t piece) {
  auto& work = *(const Choosing*)context;
  int64_t line = piece / work.num_parts, first = piece % work.num_parts * kColumns;
  int64_t last = first + kColumns < work.choice.width ? first + kColumns : work.choice.width;
  if (is_first) find_best<T>(work.choice, line, first, last, work.parts[piece]);
  else add_masses<T>(work.choice, line, first, last, work.lines[line], work.parts[piece]);
}

// A line of one part is chosen from at once.
template <class T>
static void choose_line(void* context, int64_t line) {
  auto& work = *(const Choosing*)context;
  choose_part<T, true>(context, line);
  join_best<T>(work, line);
  choose_part<T, false>(context, line);
  finish<T>(work, line);
}

template <class T>
static void choose_lines(Choosing& work) {
  int64_t lines = work.choice.lines;
  if (work.num_parts == 1) return headstart::share_out(lines, choose_line<T>, &work);
  headstart::share_out(lines * work.num_parts, choose_part<T, true>, &work);
  for (int64_t line = 0; line < lines; line++) join_best<T>(work, line);
  headstart::share_out(lines * work.num_parts, choose_part<T, false>, &work);
  for (int64_t line = 0; line < lines; line++) finish<T>(work, line);
}

static void choose_children(const Choice* choice) {
  int64_t num_parts = (choice->width + kColumns - 1) / kColumns;
  auto* lines = (Line*)headstart::scratch(headstart::kChoices, choice->lines * (sizeof(Line) + num_parts * sizeof(Part)));
  Choosing work{*choice, num_parts, (Part*)(lines + choice->lines), lines};
  if (choice->dtype == headstart::kBFloat16) choose_lines<BFloat16>(work);
  else choose_lines<float>(work);
}

}  // namespace
