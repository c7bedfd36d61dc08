#include "ops/mla_decode.h"

#include "core/parallel.h"
#include "cpu/attend.h"

namespace kimi::cpu {
namespace {

// A split is a whole number of the model's key blocks: as few as let kFewSplits cover the context, at most kLongSplit
// keys. Longer ones where there would be over kMaxPieces pieces of work.
constexpr int64_t kKeyBlock = 48, kLongSplit = 4 * kKeyBlock, kFewSplits = 8, kMaxPieces = 64;
static_assert(kMaxMlaDecodeWidth * kLanes <= kScratch && kMaxMlaDecodeWidth <= kPanel);

// The heads of a sequence's queries fill strips. Strips of a group share the rows they read; the keys are cut into
// splits that are attended apart and merged afterwards. Depends on the call's shapes and longest sequence alone,
// never on the number of threads.
struct Pieces {
  int64_t rows;                   // queries of a sequence, those of its heads of all its tokens
  int strips, group;              // of a sequence, of a group
  int64_t groups, splits, split;  // of a sequence; keys of a split
  int64_t most_splits;            // that sequences of up to max_seq_len keys have

  explicit Pieces(const MlaDecodeParams<float>& p) {
    int64_t longest = 0;
    for (int b = 0; b < p.B; b++) longest = std::max<int64_t>(longest, p.seq_lens[b]);
    rows = int64_t(p.Q) * p.N;
    strips = int((rows + kLanes - 1) / kLanes);
    group = strips_in_scratch(p.C + p.R);
    groups = (strips + group - 1) / group;
    const int64_t most = std::max<int64_t>(1, kMaxPieces / std::max<int64_t>(1, p.B * groups));
    const int64_t blocks = (longest + kFewSplits * kKeyBlock - 1) / (kFewSplits * kKeyBlock);
    split = std::max(std::clamp(blocks * kKeyBlock, kKeyBlock, kLongSplit), (longest + most - 1) / most);
    splits = (longest + split - 1) / split;
    most_splits = std::min(most, std::max(kFewSplits, (p.max_seq_len + kLongSplit - 1) / kLongSplit));
  }

  int count(int strip) const { return int(std::min<int64_t>(kLanes, rows - int64_t(strip) * kLanes)); }
};

State state_at(const MlaDecodeParams<float>& p, const Pieces& pieces, int64_t b, int64_t split, int strip) {
  return {p.workspace + ((b * pieces.splits + split) * pieces.strips + strip) * State::size(p.C), p.C};
}

// Strips [first, first + pieces.group) of sequence b over one split, from empty states.
struct Group {
  const MlaDecodeParams<float>& p;
  const Pieces& pieces;
  int64_t b, begin, n_keys;
  int first, n_strips;
  Strip strips[kMaxStrips];

  Group(const MlaDecodeParams<float>& call, const Pieces& cut, int64_t sequence, int64_t split, int strip)
      : p(call), pieces(cut), b(sequence), begin(split * cut.split), first(strip) {
    n_keys = std::min<int64_t>(p.seq_lens[b] - begin, pieces.split);
    n_strips = std::min(pieces.group, pieces.strips - first);
    for (int i = 0; i < n_strips; i++) {
      Strip& s = strips[i];
      s.state = state_at(p, pieces, b, split, first + i);
      s.state.clear(p.C);
      const int64_t row = (first + i) * kLanes;
      for (int r = 0; r < kLanes; r++)
        s.limit[r] = row + r < pieces.rows ? p.seq_lens[b] - (p.Q - 1 - (row + r) / p.N) - begin : 0;
    }
  }

  template <class Element>
  const Element* row(int64_t j) const {
    const int position = int(begin + j), page = p.page_table[b * p.max_pages + position / p.page_size];
    const int64_t slot = int64_t(page) * p.page_size + position % p.page_size;
    return static_cast<const Element*>(p.cache) + slot * (p.C + p.R);
  }
};

void load_row(const Kernels&, const float* row, int n, float* out) { std::copy_n(row, n, out); }
void load_row(const Kernels& k, const bf16* row, int n, float* out) { k.widen(row, out, n); }

template <class Element>
void attend_floats(const Kernels& k, Group& group) {
  alignas(64) float q[kScratch];
  const int width = group.p.C + group.p.R;
  for (int i = 0; i < group.n_strips; i++) {
    const int strip = group.first + i, count = group.pieces.count(strip);
    float* strip_q = q + i * width * kLanes;
    if (count < kLanes) std::fill_n(strip_q, width * kLanes, 0.0f);
    k.attention->transpose(group.p.q + (group.b * group.pieces.rows + strip * kLanes) * width, width, count, width,
                           strip_q, kLanes);
    group.strips[i].q = strip_q;
  }
  attend(k, group.strips, group.n_strips, {width, width, 0, group.p.C}, group.p.scale, group.n_keys,
         [&](int64_t j, float* out) { load_row(k, group.row<Element>(j), width, out); });
}

// In integers a row has two parts, the value and the rest of the key, each with a scale of its own: the rest may be far
// larger. Both are filled up to whole steps.
constexpr int in_steps(int n) { return (n + kIntegerStep - 1) / kIntegerStep * kIntegerStep; }
constexpr int runs_of(int n) { return (n + kIntegerRun - 1) / kIntegerRun; }

struct Part {
  int n, at;         // numbers, from the first in the row
  int inputs, q_at;  // the same as integers
  int run_at;        // its first run
};

struct Parts {
  Part part[2];
  int inputs, runs;

  explicit Parts(const MlaDecodeParams<float>& p) {
    part[0] = {p.C, 0, in_steps(p.C), 0, 0};
    part[1] = {p.R, p.C, in_steps(p.R), part[0].inputs, runs_of(p.C)};
    inputs = part[0].inputs + part[1].inputs, runs = runs_of(p.C) + runs_of(p.R);
  }
};

// A strip of queries as integers, in the workspace.
struct IntegerQueries {
  float* scale;  // [runs][kLanes]
  int16_t* q;    // [inputs / 2][kLanes][2]

  IntegerQueries(float* at, const Parts& parts) : scale(at), q(reinterpret_cast<int16_t*>(at + parts.runs * kLanes)) {}
  static int64_t size(const Parts& parts) { return (parts.runs + parts.inputs / 2) * kLanes; }
};

// Behind the states.
IntegerQueries integer_queries(const MlaDecodeParams<float>& p, const Pieces& pieces, const Parts& parts, int64_t b,
                               int strip) {
  const int64_t states = p.B * pieces.splits * pieces.strips * State::size(p.C);
  return {p.workspace + states + (b * pieces.strips + strip) * IntegerQueries::size(parts), parts};
}

void quantize_queries(const Kernels& k, const MlaDecodeParams<float>& p, const Pieces& pieces, int64_t b, int strip) {
  alignas(64) float run[kIntegerRun * kLanes];
  float ones[kIntegerRun];
  std::fill_n(ones, kIntegerRun, 1.0f);
  const Parts parts(p);
  const IntegerQueries queries = integer_queries(p, pieces, parts, b, strip);
  const int width = p.C + p.R, count = pieces.count(strip);
  for (const Part& part : parts.part)
    for (int begin = 0; begin < part.n; begin += kIntegerRun) {
      const int n = std::min(kIntegerRun, part.n - begin);
      if (count < kLanes || n % kIntegerStep) std::fill_n(run, in_steps(n) * kLanes, 0.0f);
      k.attention->transpose(p.q + (b * pieces.rows + strip * kLanes) * width + part.at + begin, width, count, n, run,
                             kLanes);
      float* scale = queries.scale + (part.run_at + begin / kIntegerRun) * kLanes;
      k.integer_attention->quantize_lanes(run, ones, in_steps(n), queries.q + (part.q_at + begin) * kLanes, scale);
      for (int r = 0; r < kLanes; r++) scale[r] *= p.scale * kLog2E;
    }
}

struct IntegerPanel {
  const Kernels& k;
  const Group& group;
  const Parts parts{group.p};
  const int keys_at_once = std::min(kIntegerKeys, kPanel / parts.inputs / 2 * 2);
  const int64_t pair_stride = 2 * (parts.part[0].inputs + kIntegerStep);  // a power of two would use two sets of L1
  float scale[2][kIntegerKeys];                                           // [part][key]
  const bf16 *row[2][kIntegerKeys], *next[2][kIntegerKeys];               // of this block and the one behind it
  alignas(64) int16_t rows[kPanel];                                       // [key][inputs]
  alignas(64) int16_t pairs[kPanel + kIntegerKeys * kIntegerStep];        // [key / 2][pair_stride]: of the values

  IntegerPanel(const Kernels& table, const Group& of) : k(table), group(of) { find(0); }

  int block() const { return keys_at_once; }

  // Of a run's last block the next one is that of the next run.
  void find(int64_t begin) {
    for (int j = 0; j < keys_at_once; j++) {
      const bf16* at = group.row<bf16>(std::min(begin + j, group.p.seq_lens[group.b] - 1 - group.begin));
      next[0][j] = at, next[1][j] = at + parts.part[1].at;
    }
  }

  // A few rows at a time, which stay in L1 from the look for the largest to the rounding.
  void fill(int64_t begin, int keys) {
    constexpr int kFew = 8;
    float factor[2][kIntegerKeys];
    for (int few = 0; few < keys; few += kFew)
      for (int h = 0; h < 2; h++) {
        const int end = std::min(few + kFew, keys), n = parts.part[h].n;
        for (int j = few; j < end; j++) {
          row[h][j] = next[h][j];
          const float largest = k.integer_attention->largest(row[h][j], n);
          scale[h][j] = largest * (1 / kRowLimit), factor[h][j] = kRowLimit / largest;
        }
        if (end % 2) row[h][end] = row[h][end - 1], factor[h][end] = 0;
        for (int j = few; j < end; j += 2) {
          int16_t* const to = rows + j * parts.inputs + parts.part[h].q_at;
          int16_t* const both[2] = {to, to + parts.inputs};
          k.integer_attention->quantize_rows(&row[h][j], &factor[h][j], n, both,
                                             h ? nullptr : pairs + j / 2 * pair_stride);
        }
      }
    find(begin + keys_at_once);
  }

  void scores(int strip, int keys, float* out) const {
    const IntegerQueries queries = integer_queries(group.p, group.pieces, parts, group.b, group.first + strip);
    for (int h = 0; h < 2; h++) {
      const Part& part = parts.part[h];
      k.integer_attention->scores(queries.q + part.q_at * kLanes, queries.scale + part.run_at * kLanes,
                                  rows + part.q_at, parts.inputs, scale[h], keys, part.inputs, h == 1,
                                  strip ? nullptr : next[h], out);
    }
  }

  void add_values(const float* weights, int keys, const float* factor, float* out) const {
    alignas(64) int16_t integers[kIntegerKeys * kLanes];
    float d[kLanes];
    k.integer_attention->quantize_lanes(weights, scale[0], keys, integers, d);
    k.integer_attention->add_values(integers, d, pairs, pair_stride, (keys + 1) / 2, group.p.C, factor, out);
  }
};

void attend_integers(const Kernels& k, Group& group) {
  IntegerPanel panel(k, group);
  attend(k, group.strips, group.n_strips, group.n_keys, panel);
}

// Columns [begin, begin + count) of a strip: sum_i weight_i out_i / sum_i weight_i sum_i over the splits, where the
// weights are to the maxima what those of keys are to their scores.
constexpr int kColumns = 64;

void combine(const Kernels& k, const MlaDecodeParams<float>& p, const Pieces& pieces, int64_t b, int strip, int begin) {
  float weights[kMaxPieces * kLanes], maximum[kLanes], sum[kLanes] = {}, factor[kLanes], out[kColumns * kLanes] = {};
  const int splits = int(pieces.splits), count = std::min(kColumns, p.C - begin);
  std::fill_n(maximum, kLanes, -kInfinity);
  for (int i = 0; i < splits; i++) std::copy_n(state_at(p, pieces, b, i, strip).maximum, kLanes, weights + i * kLanes);
  k.attention->soften(weights, splits, maximum, sum, factor);
  std::fill_n(sum, kLanes, 0.0f);
  for (int i = 0; i < splits; i++) {
    const State part = state_at(p, pieces, b, i, strip);
    const float* weight = weights + i * kLanes;
    for (int r = 0; r < kLanes; r++) sum[r] += weight[r] * part.sum[r];
    for (int c = 0; c < count; c++)
      for (int r = 0; r < kLanes; r++) out[c * kLanes + r] += weight[r] * part.out[(begin + c) * kLanes + r];
  }
  for (int c = 0; c < count; c++)
    for (int r = 0; r < kLanes; r++) out[c * kLanes + r] /= sum[r] == 0.0f ? 1.0f : sum[r];
  const int64_t row = b * pieces.rows + strip * kLanes;
  const int lanes = pieces.count(strip);
  k.attention->transpose(out, kLanes, count, lanes, p.out + row * p.C + begin, p.C);
  if (begin == 0)
    for (int r = 0; r < lanes; r++) p.lse[row + r] = log_sum_exp(maximum[r], sum[r]);
}

}  // namespace

size_t mla_decode_workspace(const MlaDecodeParams<float>& p) {
  const Pieces pieces(p);
  const int64_t queries = p.integers ? IntegerQueries::size(Parts(p)) : 0;
  return size_t(p.B * pieces.strips * (pieces.most_splits * State::size(p.C) + queries));
}

void mla_decode(const MlaDecodeParams<float>& p) {
  const Kernels& k = kernels();
  const Pieces pieces(p);
  if (p.integers)
    parallel_for(p.B * pieces.strips, 1, [&](int64_t item, int64_t) {
      quantize_queries(k, p, pieces, item / pieces.strips, int(item % pieces.strips));
    });
  parallel_for(p.B * pieces.splits * pieces.groups, 1, [&](int64_t item, int64_t) {
    const int64_t b = item / (pieces.splits * pieces.groups), split = item / pieces.groups % pieces.splits;
    Group group(p, pieces, b, split, int(item % pieces.groups) * pieces.group);
    const auto attend_group = p.integers                    ? attend_integers
                              : p.cache_dtype == DType::F32 ? attend_floats<float>
                                                            : attend_floats<bf16>;
    if (group.n_keys > 0) attend_group(k, group);
  });
  const int64_t columns = (p.C + kColumns - 1) / kColumns;
  parallel_for(p.B * pieces.strips * columns, 1, [&](int64_t item, int64_t) {
    const int64_t b = item / (pieces.strips * columns), strip = item / columns % pieces.strips;
    combine(k, p, pieces, b, int(strip), int(item % columns) * kColumns);
  });
}

}  // namespace kimi::cpu
