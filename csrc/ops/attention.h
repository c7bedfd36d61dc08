// Attention without a mask over packed sequences: each token sees all tokens of its sequence and no others.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace kimi {

constexpr int kMaxAttentionWidth = 1024;  // of D

template <class Activation>
struct AttentionParams {
  const Activation* q;  // [T, N, D]
  int64_t q_stride_t, q_stride_n;
  const Activation* k;  // [T, N, D]
  int64_t k_stride_t, k_stride_n;
  const Activation* v;  // [T, N, D]
  int64_t v_stride_t, v_stride_n;
  const int32_t* cu_seqlens;  // [B + 1]
  Activation* out;            // [T, N, D]
  int B, T, N, D;
  float scale;
};

namespace cpu {
void attention(const AttentionParams<float>& p);
}  // namespace cpu
namespace cuda {
void attention(const AttentionParams<bf16>& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
