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
  int strips, group;              // of a sequence, of a group
  int64_t groups, splits, split;  // of a sequence; keys of a split
  int64_t most_splits;            // that sequences of up to max_seq_len keys have

  explicit Pieces(const MlaDecodeParams<float>& p) {
    int64_t longest = 0;
    for (int b = 0; b < p.B; b++) longest = std::max<int64_t>(longest, p.seq_lens[b]);
    strips = int((int64_t(p.Q) * p.N + kLanes - 1) / kLanes);
    group = strips_in_scratch(p.C + p.R);
    groups = (strips + group - 1) / group;
    const int64_t most = std::max<int64_t>(1, kMaxPieces / std::max<int64_t>(1, p.B * groups));
    const int64_t blocks = (longest + kFewSplits * kKeyBlock - 1) / (kFewSplits * kKeyBlock);
    split = std::max(std::clamp(blocks * kKeyBlock, kKeyBlock, kLongSplit), (longest + most - 1) / most);
    splits = (longest + split - 1) / split;
    most_splits = std::min(most, std::max(kFewSplits, (p.max_seq_len + kLongSplit - 1) / kLongSplit));
  }
};

State state_at(const MlaDecodeParams<float>& p, const Pieces& pieces, int64_t b, int64_t split, int strip) {
  return {p.workspace + ((b * pieces.splits + split) * pieces.strips + strip) * State::size(p.C), p.C};
}

void load_row(const Kernels&, const float* row, int n, float* out) { std::copy_n(row, n, out); }
void load_row(const Kernels& k, const bf16* row, int n, float* out) { k.widen(row, out, n); }

// Strips [first, first + pieces.group) of sequence b over one split.
template <class Element>
void attend_group(const Kernels& k, const MlaDecodeParams<float>& p, const Pieces& pieces, int64_t b, int64_t split,
                  int first) {
  alignas(64) float q[kScratch];
  Strip strips[kMaxStrips];
  const int width = p.C + p.R, n_strips = std::min(pieces.group, pieces.strips - first);
  const int64_t begin = split * pieces.split, end = std::min<int64_t>(p.seq_lens[b], begin + pieces.split);
  for (int i = 0; i < n_strips; i++) {
    Strip& s = strips[i];
    const int64_t row = (first + i) * kLanes, rows = int64_t(p.Q) * p.N;
    const int count = int(std::min<int64_t>(kLanes, rows - row));
    float* strip_q = q + i * width * kLanes;
    if (count < kLanes) std::fill_n(strip_q, width * kLanes, 0.0f);
    k.attention->transpose(p.q + (b * rows + row) * width, width, count, width, strip_q, kLanes);
    s.q = strip_q;
    s.state = state_at(p, pieces, b, split, first + i);
    s.state.clear(p.C);
    for (int r = 0; r < kLanes; r++) s.limit[r] = r < count ? p.seq_lens[b] - (p.Q - 1 - (row + r) / p.N) - begin : 0;
  }
  const int32_t* pages = p.page_table + b * p.max_pages;
  const auto* cache = static_cast<const Element*>(p.cache);
  attend(k, strips, n_strips, {width, width, 0, p.C}, p.scale, end - begin, [&](int64_t j, float* out) {
    const int64_t position = begin + j;
    const int64_t slot = int64_t(pages[position / p.page_size]) * p.page_size + position % p.page_size;
    load_row(k, cache + slot * width, width, out);
  });
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
  const int64_t row = strip * kLanes, rows = int64_t(p.Q) * p.N;
  const int lanes = int(std::min<int64_t>(kLanes, rows - row));
  k.attention->transpose(out, kLanes, count, lanes, p.out + (b * rows + row) * p.C + begin, p.C);
  if (begin == 0)
    for (int r = 0; r < lanes; r++) p.lse[b * rows + row + r] = log_sum_exp(maximum[r], sum[r]);
}

}  // namespace

size_t mla_decode_workspace(const MlaDecodeParams<float>& p) {
  const Pieces pieces(p);
  return size_t(p.B * pieces.most_splits * pieces.strips * State::size(p.C));
}

void mla_decode(const MlaDecodeParams<float>& p) {
  const Kernels& k = kernels();
  const Pieces pieces(p);
  parallel_for(p.B * pieces.splits * pieces.groups, 1, [&](int64_t item, int64_t) {
    const int64_t b = item / (pieces.splits * pieces.groups), split = item / pieces.groups % pieces.splits;
    const auto attend_strips = p.cache_dtype == DType::F32 ? attend_group<float> : attend_group<bf16>;
    attend_strips(k, p, pieces, b, split, int(item % pieces.groups) * pieces.group);
  });
  const int64_t columns = (p.C + kColumns - 1) / kColumns;
  parallel_for(p.B * pieces.strips * columns, 1, [&](int64_t item, int64_t) {
    const int64_t b = item / (pieces.strips * columns), strip = item / columns % pieces.strips;
    combine(k, p, pieces, b, int(strip), int(item % columns) * kColumns);
  });
}

}  // namespace kimi::cpu
