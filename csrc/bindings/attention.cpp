#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>

#include "bindings/args.h"
#include "bindings/register.h"
#include "ops/append_mla_cache.h"
#include "ops/attention.h"
#include "ops/mla_decode.h"
#include "ops/mla_prefill.h"
#include "ops/mla_prefill_backward.h"
#include "ops/rope.h"

namespace kimi {
namespace {

// What lies on the GPU is not read here: there, kernels turn an index out of range into NaN or skip it.
void check_positions(const Args& a, const int32_t* positions, int T, int P) {
  for (int t = 0; t < T; t++)
    a.require(positions[t] >= 0 && positions[t] < P, "positions[", t, "] is ", positions[t],
              ", expected 0 <= position < ", P);
}

void check_slots(const Args& a, const int64_t* slots, int T, int64_t num_slots) {
  for (int t = 0; t < T; t++)
    a.require(slots[t] >= 0 && slots[t] < num_slots, "slots[", t, "] is ", slots[t], ", expected 0 <= slot < ",
              num_slots);
}

template <class On>
void rope(On on, Tensor x, Tensor cos, Tensor sin, Tensor positions, Tensor out) {
  using Activation = typename On::Activation;
  const Args a("rope", on);
  Dim T{"T"}, N{"N"}, R{"R"}, P{"P"};
  RopeParams<Activation> p{};
  p.x = a.strided<const Activation>("x", x, T, N, R);
  a.require(R.size % 2 == 0, "the last axis of x has ", R.size, " elements, expected an even number");
  Dim half{"R / 2", R.size / 2};
  p.cos = a.dense<const float>("cos", cos, P, half);
  p.sin = a.dense<const float>("sin", sin, P, half);
  p.positions = a.dense<const int32_t>("positions", positions, T);
  if constexpr (kOnCpu<On>) check_positions(a, p.positions, T, P);
  p.out = a.strided<Activation>("out", out, T, N, R);
  p.x_stride_t = x.stride[0], p.x_stride_n = x.stride[1];
  p.out_stride_t = out.stride[0], p.out_stride_n = out.stride[1];
  p.T = T, p.N = N, p.R = R, p.P = P;
  KIMI_RUN(on, rope, p);
}

// The latent cache [pages, page_size, C + R] in either of its dtypes, bf16 alone on the GPU; Void is const for reading.
template <class On, class Void>
Void* cache_data(const Args& a, const Tensor& cache, Dim& pages, Dim& page_size, Dim& width) {
  constexpr bool kRead = std::is_const_v<Void>;
  using Float = std::conditional_t<kRead, const float, float>;
  using Bf16 = std::conditional_t<kRead, const bf16, bf16>;
  if (kOnCpu<On> && cache.dtype == DType::F32) return a.dense<Float>("cache", cache, pages, page_size, width);
  check_type(cache.dtype == DType::BF16, a.op(), ": cache is ", a.type_of(cache), ", expected bfloat16",
             kOnCpu<On> ? " or float32" : "");
  return a.dense<Bf16>("cache", cache, pages, page_size, width);
}

template <class On>
void append_mla_cache(On on, Tensor latent, Tensor k_pe, Tensor cache, Tensor slots) {
  using Activation = typename On::Activation;
  const Args a("append_mla_cache", on);
  Dim T{"T"}, C{"C"}, R{"R"}, pages{"pages"}, page_size{"page_size"};
  AppendMlaCacheParams<Activation> p{};
  p.latent = a.strided<const Activation>("latent", latent, T, C);
  p.k_pe = a.strided<const Activation>("k_pe", k_pe, T, R);
  Dim width{"C + R", C.size + R.size};
  p.cache = cache_data<On, void>(a, cache, pages, page_size, width);
  p.slots = a.dense<const int64_t>("slots", slots, T);
  p.num_slots = pages.size * page_size.size;
  if constexpr (kOnCpu<On>) check_slots(a, p.slots, T, p.num_slots);
  p.latent_stride = latent.stride[0], p.k_pe_stride = k_pe.stride[0];
  p.cache_dtype = cache.dtype;
  p.T = T, p.C = C, p.R = R;
  KIMI_RUN(on, append_mla_cache, p);
}

template <class On>
void fused_append_mla_cache(On on, Tensor kv, Tensor weight, Tensor cos, Tensor sin, Tensor positions, Tensor cache,
                            Tensor slots, float eps) {
  using Activation = typename On::Activation;
  const Args a("fused_append_mla_cache", on);
  Dim T{"T"}, C{"C"}, P{"P"}, width{"C + R"}, pages{"pages"}, page_size{"page_size"};
  FusedAppendMlaCacheParams<Activation> p{};
  p.kv = a.strided<const Activation>("kv", kv, T, width);
  p.weight = a.dense<const bf16>("weight", weight, C);
  const int64_t R = width.size - C.size;
  a.require(R >= 0 && R % 2 == 0, "kv has C + R = ", width.size, ", weight has C = ", C.size,
            ", expected an even R >= 0");
  Dim half{"R / 2", R / 2};
  p.cos = a.dense<const float>("cos", cos, P, half);
  p.sin = a.dense<const float>("sin", sin, P, half);
  p.positions = a.dense<const int32_t>("positions", positions, T);
  p.cache = cache_data<On, void>(a, cache, pages, page_size, width);
  p.slots = a.dense<const int64_t>("slots", slots, T);
  p.num_slots = pages.size * page_size.size;
  if constexpr (kOnCpu<On>) {
    check_positions(a, p.positions, T, P);
    check_slots(a, p.slots, T, p.num_slots);
  }
  p.kv_stride = kv.stride[0], p.cache_dtype = cache.dtype;
  p.T = T, p.C = C, p.R = int(R), p.P = P, p.eps = eps;
  KIMI_RUN(on, fused_append_mla_cache, p);
}

// cu_seqlens starts at 0, never falls and ends at `total`.
void check_cu_seqlens(const Args& a, const char* name, const int32_t* cu_seqlens, int B, int64_t total) {
  a.require(cu_seqlens[0] == 0, name, "[0] is ", cu_seqlens[0], ", expected 0");
  for (int b = 0; b < B; b++)
    a.require(cu_seqlens[b] <= cu_seqlens[b + 1], name, " falls from ", cu_seqlens[b], " to ", cu_seqlens[b + 1]);
  a.require(cu_seqlens[B] == total, name, " ends at ", cu_seqlens[B], ", expected ", total);
}

// What mla_prefill and its gradient are given alike.
template <class On, class Params>
struct MlaPrefillArgs {
  using Activation = typename On::Activation;
  Dim T{"T"}, S{"S"}, N{"N"}, key_dim{"Dn + R"}, R{"R"}, kv_dim{"Dn + Dv"}, Dv{"Dv"};
  Params p{};

  MlaPrefillArgs(const Args& a, const Tensor& q, const Tensor& kv, const Tensor& k_pe, const Tensor& cu_seqlens_q,
                 const Tensor& cu_seqlens_k, const Tensor& causal_offsets, float scale) {
    p.q = a.strided<const Activation>("q", q, T, N, key_dim);
    p.kv = a.strided<const Activation>("kv", kv, S, N, kv_dim);
    p.k_pe = a.strided<const Activation>("k_pe", k_pe, S, R);
    const int64_t Dn = key_dim.size - R.size;
    a.require(Dn >= 1 && kv_dim.size > Dn, "q has Dn + R = ", key_dim.size, ", k_pe has R = ", R.size,
              ", kv has Dn + Dv = ", kv_dim.size, ", expected Dn >= 1 and Dv >= 1");
    Dv.size = kv_dim.size - Dn;
    Dim B1{"B + 1"};
    p.cu_seqlens_q = a.dense<const int32_t>("cu_seqlens_q", cu_seqlens_q, B1);
    a.require(B1.size >= 1, "cu_seqlens_q is empty, expected [B + 1]");
    Dim B{"B", B1.size - 1};
    p.cu_seqlens_k = a.dense<const int32_t>("cu_seqlens_k", cu_seqlens_k, B1);
    p.causal_offsets = a.dense<const int32_t>("causal_offsets", causal_offsets, B);
    if constexpr (kOnCpu<On>) {
      a.require(key_dim.size + Dv.size <= cpu::kMaxMlaPrefillWidth,
                "q and kv have Dn + R + Dv = ", key_dim.size + Dv.size, ", expected at most ",
                cpu::kMaxMlaPrefillWidth);
      check_cu_seqlens(a, "cu_seqlens_q", p.cu_seqlens_q, B, T.size);
      check_cu_seqlens(a, "cu_seqlens_k", p.cu_seqlens_k, B, S.size);
    }
    p.q_stride_t = q.stride[0], p.q_stride_n = q.stride[1];
    p.kv_stride_s = kv.stride[0], p.kv_stride_n = kv.stride[1], p.k_pe_stride = k_pe.stride[0];
    p.B = B, p.T = T, p.S = S, p.N = N, p.Dn = int(Dn), p.R = R, p.Dv = Dv, p.scale = scale;
  }
};

template <class On>
void mla_prefill(On on, Tensor q, Tensor kv, Tensor k_pe, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                 Tensor causal_offsets, Tensor out, Tensor lse, std::optional<Tensor> max_logits, float scale,
                 bool continue_state) {
  using Activation = typename On::Activation;
  const Args a("mla_prefill", on);
  MlaPrefillArgs<On, MlaPrefillParams<Activation>> given(a, q, kv, k_pe, cu_seqlens_q, cu_seqlens_k, causal_offsets,
                                                         scale);
  auto& p = given.p;
  p.out = a.dense<Activation>("out", out, given.T, given.N, given.Dv);
  p.lse = a.dense<float>("lse", lse, given.T, given.N);
  if (max_logits) p.max_logits = a.dense<float>("max_logits", *max_logits, given.T, given.N);
  p.continue_state = continue_state;
  KIMI_RUN(on, mla_prefill, p);
}

// workspace None: returns the number of floats it must hold.
template <class On>
size_t mla_prefill_backward(On on, Tensor q, Tensor kv, Tensor k_pe, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                            Tensor causal_offsets, Tensor out, Tensor lse, Tensor dout, Tensor dq, Tensor dkv,
                            Tensor dk_pe, std::optional<Tensor> workspace, float scale) {
  const Args a("mla_prefill_backward", on);
  MlaPrefillArgs<OnCpu, MlaPrefillBackwardParams> given(a, q, kv, k_pe, cu_seqlens_q, cu_seqlens_k, causal_offsets,
                                                        scale);
  auto& [T, S, N, key_dim, R, kv_dim, Dv, p] = given;
  p.out = a.dense<const float>("out", out, T, N, Dv);
  p.lse = a.dense<const float>("lse", lse, T, N);
  p.dout = a.dense<const float>("dout", dout, T, N, Dv);
  p.dq = a.dense<float>("dq", dq, T, N, key_dim);
  p.dkv = a.dense<float>("dkv", dkv, S, N, kv_dim);
  p.dk_pe = a.dense<float>("dk_pe", dk_pe, S, R);
  Dim floats{"floats", int64_t(cpu::mla_prefill_backward_workspace(p))};
  if (!workspace) return size_t(floats.size);
  p.workspace = a.dense<float>("workspace", *workspace, floats);
  KIMI_RUN_CPU(on, mla_prefill_backward, p);
  return 0;
}

template <class On>
void attention(On on, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor out, float scale) {
  using Activation = typename On::Activation;
  const Args a("attention", on);
  Dim T{"T"}, N{"N"}, D{"D"}, B1{"B + 1"};
  AttentionParams<Activation> p{};
  p.q = a.strided<const Activation>("q", q, T, N, D);
  a.require(D.size >= 1 && D.size <= kMaxAttentionWidth, "q has D = ", D.size, ", expected 1 to ", kMaxAttentionWidth);
  p.k = a.strided<const Activation>("k", k, T, N, D);
  p.v = a.strided<const Activation>("v", v, T, N, D);
  p.cu_seqlens = a.dense<const int32_t>("cu_seqlens", cu_seqlens, B1);
  a.require(B1.size >= 1, "cu_seqlens is empty, expected [B + 1]");
  p.B = int(B1.size - 1);
  if constexpr (kOnCpu<On>) check_cu_seqlens(a, "cu_seqlens", p.cu_seqlens, p.B, T.size);
  p.out = a.dense<Activation>("out", out, T, N, D);
  a.check_apart("out", out, "q", q), a.check_apart("out", out, "k", k), a.check_apart("out", out, "v", v);
  p.q_stride_t = q.stride[0], p.q_stride_n = q.stride[1];
  p.k_stride_t = k.stride[0], p.k_stride_n = k.stride[1];
  p.v_stride_t = v.stride[0], p.v_stride_n = v.stride[1];
  p.T = T, p.N = N, p.D = D, p.scale = scale;
  KIMI_RUN(on, attention, p);
}

// The pages that hold a sequence's tokens must exist; entries behind them are never read.
void check_pages(const Args& a, const MlaDecodeParams<float>& p) {
  for (int b = 0; b < p.B; b++) {
    const int64_t used = (int64_t(p.seq_lens[b]) + p.page_size - 1) / std::max(1, p.page_size);
    a.require(p.seq_lens[b] >= 0 && used <= p.max_pages && (p.page_size > 0 || p.seq_lens[b] == 0), "seq_lens[", b,
              "] is ", p.seq_lens[b], ", expected 0 to ", int64_t(p.max_pages) * p.page_size);
    for (int64_t i = 0; i < used; i++) {
      const int32_t page = p.page_table[int64_t(b) * p.max_pages + i];
      a.require(page >= 0 && page < p.pages, "page_table[", b, ", ", i, "] is ", page, ", expected 0 <= page < ",
                p.pages);
    }
  }
}

// workspace None: returns the number of floats it must hold.
template <class On>
size_t mla_decode(On on, Tensor q, Tensor cache, Tensor page_table, Tensor seq_lens, Tensor out, Tensor lse,
                  std::optional<Tensor> workspace, float scale, bool integers) {
  using Activation = typename On::Activation;
  const Args a("mla_decode", on);
  Dim B{"B"}, Q{"Q"}, N{"N"}, C{"kv_lora_rank"}, width{"C + R"}, pages{"pages"}, page_size{"page_size"},
      max_pages{"max_pages"};
  MlaDecodeParams<Activation> p{};
  p.q = a.dense<const Activation>("q", q, B, Q, N, width);
  p.cache = cache_data<On, const void>(a, cache, pages, page_size, width);
  p.page_table = a.dense<const int32_t>("page_table", page_table, B, max_pages);
  p.seq_lens = a.dense<const int32_t>("seq_lens", seq_lens, B);
  p.out = a.dense<Activation>("out", out, B, Q, N, C);
  a.require(C.size >= 1 && C.size <= width.size, "kv_lora_rank is ", C.size, ", expected 1 to the cache's width ",
            width.size);
  p.lse = a.dense<float>("lse", lse, B, Q, N);
  p.cache_dtype = cache.dtype;
  p.B = B, p.Q = Q, p.N = N, p.C = C, p.R = int(width.size - C.size);
  p.pages = pages, p.page_size = page_size, p.max_pages = max_pages;
  p.scale = scale, p.integers = integers;
  if constexpr (kOnCpu<On>) {
    check_type(!integers || cache.dtype == DType::BF16, a.op(),
               ": activations are integers, which are for a bfloat16 cache; expected float32");
    a.require(width.size <= cpu::kMaxMlaDecodeWidth, "cache has C + R = ", width.size, ", expected at most ",
              cpu::kMaxMlaDecodeWidth);
    check_pages(a, p);
  } else {
    a.require(!integers, "activations are integers, which are for the CPU; expected float32");
  }
  p.max_seq_len = int(std::min<int64_t>(INT_MAX, max_pages.size * page_size.size));
  Dim floats{"floats", int64_t(KIMI_WORKSPACE(mla_decode, p))};
  if (!workspace) return size_t(floats.size);
  p.workspace = a.dense<float>("workspace", *workspace, floats);
  KIMI_RUN(on, mla_decode, p);
  return 0;
}

}  // namespace

void register_attention(nb::module_& m) {
  KIMI_DEFINE(m, rope);
  KIMI_DEFINE(m, append_mla_cache);
  KIMI_DEFINE(m, fused_append_mla_cache);
  KIMI_DEFINE(m, attention);
  KIMI_DEFINE(m, mla_prefill);
  KIMI_DEFINE_CPU(m, mla_prefill_backward);
  KIMI_DEFINE(m, mla_decode);
}

}  // namespace kimi
