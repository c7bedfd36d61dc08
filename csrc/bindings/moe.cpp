#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <vector>

#include "bindings/args.h"
#include "bindings/register.h"
#include "cuda/sm90/grouped_gemm_int4.h"
#include "ops/fused_moe.h"
#include "ops/gemm_int4.h"
#include "ops/grouped_gemm.h"
#include "ops/moe_permute.h"
#include "ops/topk_sigmoid.h"

namespace kimi {
namespace {

std::string numbered(const char* name, size_t e) { return name + ("[" + std::to_string(e) + "]"); }

// Pointers to one projection of every expert. The Python side keeps the arrays alive, and for experts on a GPU puts the
// pointers there too.
struct ExpertTable {
  Device device = Device::Cpu;
  int device_index = 0;
  const uint64_t* placed = nullptr;  // on the GPU: addresses() as they lie there
  std::vector<const void*> weight;
  std::vector<const bf16*> scale;  // empty: bf16 weights
  Dim n_out{"out"}, n_in{"in"};

  ExpertTable(const std::vector<Tensor>& weights, const std::vector<Tensor>& scales) {
    check(!weights.empty(), "ExpertWeights: weights is empty, expected one array per expert");
    device = weights[0].device, device_index = weights[0].device_index;
    const Args a("ExpertWeights", device, device_index);
    a.require(scales.empty() || scales.size() == weights.size(), "scales has ", scales.size(), " arrays, expected ",
              weights.size());
    if (scales.empty())
      for (size_t e = 0; e < weights.size(); e++)
        weight.push_back(a.dense<const bf16>(numbered("weights", e).c_str(), weights[e], n_out, n_in));
    else
      add_int4(a, weights, scales);
  }

  void add_int4(const Args& a, const std::vector<Tensor>& packed, const std::vector<Tensor>& scales) {
    Dim words{"in / 8"}, groups{"in / 32"};
    for (size_t e = 0; e < packed.size(); e++) {
      weight.push_back(a.dense<const int32_t>(numbered("packed", e).c_str(), packed[e], n_out, words));
      groups.size = words.size * 8 / kInt4Group;
      scale.push_back(a.dense<const bf16>(numbered("scales", e).c_str(), scales[e], n_out, groups));
    }
    n_in.size = words.size * 8;
    a.require(n_in.size % kInt4Group == 0, "packed has in = ", n_in.size, ", expected a multiple of ", kInt4Group);
  }

  // Of the weights, then of the scales.
  std::vector<uint64_t> addresses() const {
    std::vector<uint64_t> all;
    for (const void* w : weight) all.push_back(reinterpret_cast<uint64_t>(w));
    for (const bf16* s : scale) all.push_back(reinterpret_cast<uint64_t>(s));
    return all;
  }

  // addresses: int64, on the GPU of the weights.
  void place(Tensor addresses) {
    Dim entries{"entries", int64_t(weight.size() + scale.size())};
    const Args a("ExpertWeights", device, device_index);
    placed = reinterpret_cast<const uint64_t*>(a.dense<const int64_t>("addresses", addresses, entries));
  }

  template <class On>
  ExpertWeights view(const On&, const Args& a, const char* name) const {
    a.check_place(name, device, device_index);
    const int E = int(weight.size());
    if constexpr (kOnCpu<On>) return {weight.data(), scale.empty() ? nullptr : scale.data(), E, n_out, n_in};
    const auto* pointers = reinterpret_cast<const void* const*>(placed);
    return {pointers, scale.empty() ? nullptr : reinterpret_cast<const bf16* const*>(pointers + E), E, n_out, n_in};
  }
};

template <class On>
void topk_sigmoid(On on, Tensor logits, Tensor bias, Tensor weights, Tensor ids, Tensor workspace,
                  float routed_scaling_factor, bool norm_topk_prob) {
  const Args a("topk_sigmoid", on);
  Dim T{"T"}, E{"E"}, K{"top_k"};
  TopkSigmoidParams p{};
  p.logits = a.strided<const float>("logits", logits, T, E);
  p.bias = a.dense<const float>("bias", bias, E);
  p.weights = a.dense<float>("weights", weights, T, K);
  p.ids = a.dense<int32_t>("ids", ids, T, K);
  p.workspace = a.dense<float>("workspace", workspace, T, E);
  a.require(K.size >= 1 && K.size <= E.size, "top_k is ", K.size, ", expected 1 to E = ", E.size);
  p.logits_stride = logits.stride[0];
  p.T = T, p.E = E, p.K = K, p.routed_scaling_factor = routed_scaling_factor, p.norm_topk_prob = norm_topk_prob;
  KIMI_RUN(on, topk_sigmoid, p);
}

// Every entry of a [n] array lies in [-1, limit).
void check_indices(const Args& a, const char* name, const int32_t* values, int64_t n, int64_t limit) {
  for (int64_t i = 0; i < n; i++)
    a.require(values[i] >= -1 && values[i] < limit, name, " holds ", values[i], ", expected -1 <= value < ", limit);
}

template <class On>
void moe_permute(On on, Tensor x, Tensor topk_ids, Tensor permuted, Tensor offsets, Tensor inverse) {
  using Activation = typename On::Activation;
  const Args a("moe_permute", on);
  Dim T{"T"}, H{"H"}, K{"K"}, E1{"num_experts + 1"};
  MoePermuteParams<Activation> p{};
  p.x = a.strided<const Activation>("x", x, T, H);
  p.topk_ids = a.dense<const int32_t>("topk_ids", topk_ids, T, K);
  Dim M{"T * K", T.size * K.size};
  p.permuted = a.dense<Activation>("permuted", permuted, M, H);
  p.offsets = a.dense<int32_t>("offsets", offsets, E1);
  p.inverse = a.dense<int32_t>("inverse", inverse, T, K);
  if constexpr (kOnCpu<On>) check_indices(a, "topk_ids", p.topk_ids, M.size, E1.size - 1);
  p.x_stride = x.stride[0];
  p.T = T, p.H = H, p.K = K, p.E = E1 - 1;
  KIMI_RUN(on, moe_permute, p);
}

template <class On>
void moe_unpermute(On on, Tensor y, Tensor topk_weights, Tensor inverse, Tensor out) {
  using Activation = typename On::Activation;
  const Args a("moe_unpermute", on);
  Dim M{"M"}, T{"T"}, H{"H"}, K{"K"};
  MoeUnpermuteParams<Activation> p{};
  p.y = a.dense<const Activation>("y", y, M, H);
  p.topk_weights = a.dense<const float>("topk_weights", topk_weights, T, K);
  p.inverse = a.dense<const int32_t>("inverse", inverse, T, K);
  p.out = a.strided<Activation>("out", out, T, H);
  a.check_apart("out", out, "y", y);
  if constexpr (kOnCpu<On>) check_indices(a, "inverse", p.inverse, T.size * K.size, M.size);
  p.out_stride = out.stride[0];
  p.M = M, p.T = T, p.H = H, p.K = K;
  KIMI_RUN(on, moe_unpermute, p);
}

template <class On>
GroupedGemmParams<typename On::Activation> grouped_gemm_params(On on, const Args& a, Tensor x,
                                                               const ExpertTable& experts, Tensor offsets, Tensor out) {
  using Activation = typename On::Activation;
  GroupedGemmParams<Activation> p{};
  p.experts = experts.view(on, a, "experts");
  Dim M{"M"}, in{"in", p.experts.n_in}, n_out{"out", p.experts.n_out}, E1{"E + 1", p.experts.E + 1};
  p.x = a.strided<const Activation>("x", x, M, in);
  p.offsets = a.dense<const int32_t>("offsets", offsets, E1);
  if constexpr (kOnCpu<On>) check_offsets(a, p.offsets, p.experts.E, M);
  p.out = a.strided<Activation>("out", out, M, n_out);
  a.check_apart("out", out, "x", x);
  p.x_stride = x.stride[0], p.out_stride = out.stride[0], p.M = M;
  return p;
}

template <class On>
void grouped_gemm(On on, Tensor x, const ExpertTable& experts, Tensor offsets, Tensor out) {
  const Args a("grouped_gemm", on);
  check_type(experts.scale.empty(), "grouped_gemm: experts hold INT4 weights, expected bfloat16");
  const auto p = grouped_gemm_params(on, a, x, experts, offsets, out);
  KIMI_RUN(on, grouped_gemm, p);
}

template <class On>
void grouped_gemm_int4(On on, Tensor x, const ExpertTable& experts, Tensor offsets, Tensor out, bool sm90) {
  const Args a("grouped_gemm_int4", on);
  check_type(!experts.scale.empty(), "grouped_gemm_int4: experts hold bfloat16 weights, expected INT4");
  const auto p = grouped_gemm_params(on, a, x, experts, offsets, out);
  if constexpr (kOnCpu<On>) {
    if (sm90) throw std::runtime_error("grouped_gemm_int4: sm90 names a CUDA kernel, x is a NumPy array");
  } else if (sm90) {
    return cuda::sm90::grouped_gemm_int4(p, on.stream);
  }
  KIMI_RUN(on, grouped_gemm_int4, p);
}

void check_experts(const Args& a, const char* name, const ExpertWeights& w, int64_t E, int64_t n_out, int64_t n_in) {
  a.require(w.E == E && w.n_out == n_out && w.n_in == n_in, name, " has shape [", w.E, ", ", w.n_out, ", ", w.n_in,
            "], expected [", E, ", ", n_out, ", ", n_in, "]");
}

// workspace None: returns the number of floats it must hold.
template <class On>
size_t fused_moe(On on, Tensor x, Tensor topk_weights, Tensor topk_ids, const ExpertTable& gate, const ExpertTable& up,
                 const ExpertTable& down, Tensor out, std::optional<Tensor> workspace, int digits, bool accumulate) {
  using Activation = typename On::Activation;
  const Args a("fused_moe", on);
  Dim T{"T"}, H{"H"}, K{"K"};
  FusedMoeParams<Activation> p{};
  p.x = a.strided<const Activation>("x", x, T, H);
  p.topk_weights = a.dense<const float>("topk_weights", topk_weights, T, K);
  p.topk_ids = a.dense<const int32_t>("topk_ids", topk_ids, T, K);
  p.gate = gate.view(on, a, "gate"), p.up = up.view(on, a, "up"), p.down = down.view(on, a, "down");
  check_experts(a, "gate", p.gate, p.gate.E, p.gate.n_out, H.size);
  check_experts(a, "up", p.up, p.gate.E, p.gate.n_out, H.size);
  check_experts(a, "down", p.down, p.gate.E, H.size, p.gate.n_out);
  if constexpr (kOnCpu<On>) {
    check_indices(a, "topk_ids", p.topk_ids, T.size * K.size, p.gate.E);
  } else {
    a.require(!p.gate.scale == !p.up.scale, "gate and up differ, one is INT4 and one bfloat16");
    a.require(digits == 0, "activations are integers, which are for the CPU; expected float32");
  }
  p.out = a.strided<Activation>("out", out, T, H);
  a.check_apart("out", out, "x", x);
  p.x_stride = x.stride[0], p.out_stride = out.stride[0];
  p.T = T, p.H = H, p.I = p.gate.n_out, p.K = K, p.E = p.gate.E, p.digits = digits;
  p.accumulate = accumulate;
  Dim floats{"floats", int64_t(KIMI_WORKSPACE(fused_moe, p))};
  if (!workspace) return size_t(floats.size);
  p.workspace = a.dense<float>("workspace", *workspace, floats);
  KIMI_RUN(on, fused_moe, p);
  return 0;
}

}  // namespace

void register_moe(nb::module_& m) {
  nb::class_<ExpertTable>(m, "ExpertTable")
      .def(nb::init<const std::vector<Tensor>&, const std::vector<Tensor>&>())
      .def("addresses", &ExpertTable::addresses)
      .def("place", &ExpertTable::place)
      .def_prop_ro("shape",
                   [](const ExpertTable& t) { return nb::make_tuple(t.weight.size(), t.n_out.size, t.n_in.size); });
  KIMI_DEFINE(m, topk_sigmoid);
  KIMI_DEFINE(m, moe_permute);
  KIMI_DEFINE(m, moe_unpermute);
  KIMI_DEFINE(m, grouped_gemm);
  KIMI_DEFINE(m, grouped_gemm_int4);
  KIMI_DEFINE(m, fused_moe);
}

}  // namespace kimi
