#include "bindings/args.h"
#include "bindings/register.h"
#include "ops/top_k_top_p_sample.h"

namespace kimi {
namespace {

void check_settings(const Args& a, const TopKTopPSampleParams& p) {
  for (int b = 0; b < p.B; b++) {
    a.require(p.uniform[b] >= 0 && p.uniform[b] < 1, "uniform[", b, "] is ", p.uniform[b], ", expected 0 <= u < 1");
    a.require(p.temperature[b] >= 0 && p.temperature[b] < 1e30f, "temperature[", b, "] is ", p.temperature[b],
              ", expected a finite number >= 0");
    a.require(p.top_k[b] >= 0, "top_k[", b, "] is ", p.top_k[b], ", expected >= 0 (0 keeps all)");
    a.require(p.top_p[b] > 0 && p.top_p[b] <= 1, "top_p[", b, "] is ", p.top_p[b], ", expected 0 < top_p <= 1");
    a.require(p.min_p[b] >= 0 && p.min_p[b] <= 1, "min_p[", b, "] is ", p.min_p[b], ", expected 0 <= min_p <= 1");
  }
}

template <class On>
void top_k_top_p_sample(On on, Tensor logits, Tensor uniform, Tensor temperature, Tensor top_k, Tensor top_p,
                        Tensor min_p, Tensor probabilities, Tensor order, Tensor ids) {
  const Args a("top_k_top_p_sample", on);
  Dim B{"B"}, V{"V"};
  TopKTopPSampleParams p{};
  p.logits = a.strided<const float>("logits", logits, B, V);
  p.uniform = a.dense<const float>("uniform", uniform, B);
  p.temperature = a.dense<const float>("temperature", temperature, B);
  p.top_k = a.dense<const int32_t>("top_k", top_k, B);
  p.top_p = a.dense<const float>("top_p", top_p, B);
  p.min_p = a.dense<const float>("min_p", min_p, B);
  p.probabilities = a.dense<float>("probabilities", probabilities, B, V);
  p.order = a.dense<int32_t>("order", order, B, V);
  p.ids = a.dense<int32_t>("ids", ids, B);
  p.logits_stride = logits.stride[0];
  p.B = B, p.V = V;
  if constexpr (kOnCpu<On>) check_settings(a, p);
  KIMI_RUN(on, top_k_top_p_sample, p);
  if constexpr (kOnCpu<On>)
    for (int b = 0; b < p.B; b++) a.require(p.ids[b] >= 0, "logits[", b, "] has no finite largest value");
}

}  // namespace

void register_sampling(nb::module_& m) { KIMI_DEFINE(m, top_k_top_p_sample); }

}  // namespace kimi
