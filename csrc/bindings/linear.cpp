#include <nanobind/stl/optional.h>

#include <optional>

#include "bindings/args.h"
#include "bindings/register.h"
#include "ops/batched_gemm.h"
#include "ops/dequantize_int4.h"
#include "ops/gelu.h"
#include "ops/gemm.h"
#include "ops/gemm_int4.h"
#include "ops/gemm_int8.h"
#include "ops/silu_and_mul.h"
#include "ops/silu_and_mul_backward.h"

namespace kimi {
namespace {

template <class On>
void gemm(On on, Tensor x, Tensor weight, Tensor out) {
  const Args a("gemm", on);
  Dim T{"T"}, in{"in"}, n_out{"out"};
  GemmParams p{};
  p.x = a.strided<const float>("x", x, T, in);
  p.weight = a.dense<const bf16>("weight", weight, n_out, in);
  p.out = a.strided<float>("out", out, T, n_out);
  a.check_apart("out", out, "x", x);
  p.x_stride = x.stride[0], p.out_stride = out.stride[0];
  p.T = T, p.n_in = in, p.n_out = n_out;
  KIMI_RUN_CPU(on, gemm, p);
}

template <class On>
void batched_gemm(On on, Tensor x, Tensor weight, Tensor out, bool transpose_weight) {
  const Args a("batched_gemm", on);
  Dim T{"T"}, N{"N"}, in{"in"}, n_out{"out"};
  BatchedGemmParams p{};
  p.x = a.strided<const float>("x", x, T, N, in);
  p.weight = a.strided<const bf16>("weight", weight, N, transpose_weight ? in : n_out, transpose_weight ? n_out : in);
  p.out = a.strided<float>("out", out, T, N, n_out);
  a.require(weight.shape[1] <= 1 || weight.stride[1] == weight.shape[2], "the rows of weight[n] are not contiguous");
  a.check_apart("out", out, "x", x);
  p.x_stride_t = x.stride[0], p.x_stride_n = x.stride[1];
  p.weight_stride_n = weight.stride[0];
  p.out_stride_t = out.stride[0], p.out_stride_n = out.stride[1];
  p.T = T, p.N = N, p.n_in = in, p.n_out = n_out, p.transpose_weight = transpose_weight;
  KIMI_RUN_CPU(on, batched_gemm, p);
}

// Binds in / 8 or in / 32 to the `in` of argument `name`, which must be a whole number of groups.
Dim part_of(const Args& a, const char* name, const Dim& in, int divisor) {
  a.require(in.size % kInt4Group == 0, name, " has in = ", in.size, ", expected a multiple of ", kInt4Group);
  return {"in / " + std::to_string(divisor), in.size / divisor};
}

template <class On>
void gemm_int4(On on, Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor out) {
  using Activation = typename On::Activation;
  const Args a("gemm_int4", on);
  Dim T{"T"}, in{"in"}, n_out{"out"};
  GemmInt4Params<Activation> p{};
  p.x = a.strided<const Activation>("x", x, T, in);
  Dim words = part_of(a, "x", in, 8), groups = part_of(a, "x", in, kInt4Group);
  p.weight_packed = a.dense<const int32_t>("weight_packed", weight_packed, n_out, words);
  p.weight_scale = a.dense<const bf16>("weight_scale", weight_scale, n_out, groups);
  p.out = a.strided<Activation>("out", out, T, n_out);
  a.check_apart("out", out, "x", x);
  p.x_stride = x.stride[0], p.out_stride = out.stride[0];
  p.T = T, p.n_in = in, p.n_out = n_out;
  KIMI_RUN(on, gemm_int4, p);
}

template <class On>
void gemm_int8(On on, Tensor x, Tensor weight, Tensor weight_scale, Tensor out, Tensor workspace) {
  const Args a("gemm_int8", on);
  Dim T{"T"}, N{"N"}, in{"in"}, n_out{"out"};
  GemmInt8Params p{};
  const auto take = [&](auto&... heads) {  // N, or nothing
    p.x = a.strided<const float>("x", x, T, heads..., in);
    Dim groups = part_of(a, "x", in, kInt8Group);
    p.weight = a.dense<const int8_t>("weight", weight, heads..., n_out, in);
    p.weight_scale = a.dense<const bf16>("weight_scale", weight_scale, heads..., n_out, groups);
    p.out = a.strided<float>("out", out, T, heads..., n_out);
  };
  if (x.ndim == 3) {
    take(N);
    p.x_stride_n = x.stride[1], p.out_stride_n = out.stride[1];
  } else {
    take();
    N.size = 1;
  }
  a.check_apart("out", out, "x", x);
  p.x_stride_t = x.stride[0], p.out_stride_t = out.stride[0];
  p.T = T, p.N = N, p.n_in = in, p.n_out = n_out;
  Dim floats{"gemm_int8_workspace", int64_t(cpu::gemm_int8_workspace(p))};
  p.workspace = a.dense<float>("workspace", workspace, floats);
  KIMI_RUN_CPU(on, gemm_int8, p);
}

template <class On>
void quantize_int8(On on, Tensor weight, Tensor quantized, Tensor weight_scale) {
  const Args a("quantize_int8", on);
  Dim n_out{"out"}, in{"in"};
  QuantizeInt8Params p{};
  p.weight = a.dense<const bf16>("weight", weight, n_out, in);
  Dim groups = part_of(a, "weight", in, kInt8Group);
  p.quantized = a.dense<int8_t>("quantized", quantized, n_out, in);
  p.weight_scale = a.dense<bf16>("weight_scale", weight_scale, n_out, groups);
  p.n_out = n_out, p.n_in = in;
  KIMI_RUN_CPU(on, quantize_int8, p);
}

template <class On>
void dequantize_int4(On on, Tensor weight_packed, Tensor weight_scale, Tensor out) {
  const Args a("dequantize_int4", on);
  Dim n_out{"out"}, in{"in"};
  DequantizeInt4Params p{};
  p.out = a.dense<bf16>("out", out, n_out, in);
  Dim words = part_of(a, "weight_packed", in, 8), groups = part_of(a, "weight_packed", in, kInt4Group);
  p.weight_packed = a.dense<const int32_t>("weight_packed", weight_packed, n_out, words);
  p.weight_scale = a.dense<const bf16>("weight_scale", weight_scale, n_out, groups);
  p.n_out = n_out, p.n_in = in;
  KIMI_RUN(on, dequantize_int4, p);
}

template <class On>
void quantize_int4(On on, Tensor weight, Tensor weight_packed, Tensor weight_scale) {
  const Args a("quantize_int4", on);
  Dim n_out{"out"}, in{"in"};
  QuantizeInt4Params p{};
  p.weight = a.dense<const float>("weight", weight, n_out, in);
  Dim words = part_of(a, "weight", in, 8), groups = part_of(a, "weight", in, kInt4Group);
  p.weight_packed = a.dense<int32_t>("weight_packed", weight_packed, n_out, words);
  p.weight_scale = a.dense<bf16>("weight_scale", weight_scale, n_out, groups);
  p.n_out = n_out, p.n_in = in;
  KIMI_RUN(on, quantize_int4, p);
}

template <class On>
void silu_and_mul(On on, Tensor x, Tensor out) {
  using Activation = typename On::Activation;
  const Args a("silu_and_mul", on);
  Dim T{"T"}, two_I{"2 I"};
  SiluAndMulParams<Activation> p{};
  p.x = a.strided<const Activation>("x", x, T, two_I);
  a.require(two_I.size % 2 == 0, "the last axis of x has ", two_I.size, " elements, expected an even number");
  Dim I{"I", two_I.size / 2};
  p.out = a.strided<Activation>("out", out, T, I);
  a.check_apart("out", out, "x", x);
  p.x_stride = x.stride[0], p.out_stride = out.stride[0];
  p.T = T, p.I = I;
  KIMI_RUN(on, silu_and_mul, p);
}

template <class On>
void silu_and_mul_backward(On on, Tensor x, Tensor dout, Tensor out) {
  const Args a("silu_and_mul_backward", on);
  Dim T{"T"}, two_I{"2 I"};
  SiluAndMulBackwardParams p{};
  p.x = a.strided<const float>("x", x, T, two_I);
  a.require(two_I.size % 2 == 0, "the last axis of x has ", two_I.size, " elements, expected an even number");
  Dim I{"I", two_I.size / 2};
  p.dout = a.strided<const float>("dout", dout, T, I);
  p.out = a.strided<float>("out", out, T, two_I);
  a.check_apart("out", out, "x", x), a.check_apart("out", out, "dout", dout);
  p.x_stride = x.stride[0], p.dout_stride = dout.stride[0], p.out_stride = out.stride[0];
  p.T = T, p.I = I;
  KIMI_RUN_CPU(on, silu_and_mul_backward, p);
}

template <class On>
void gelu(On on, Tensor x, std::optional<Tensor> bias, Tensor out, bool tanh) {
  using Activation = typename On::Activation;
  const Args a("gelu", on);
  Dim T{"T"}, I{"I"};
  GeluParams<Activation> p{};
  p.x = a.strided<const Activation>("x", x, T, I);
  if (bias) p.bias = a.dense<const bf16>("bias", *bias, I);
  p.out = a.strided<Activation>("out", out, T, I);
  p.x_stride = x.stride[0], p.out_stride = out.stride[0];
  p.T = T, p.I = I, p.tanh = tanh;
  KIMI_RUN(on, gelu, p);
}

}  // namespace

void register_linear(nb::module_& m) {
  KIMI_DEFINE_CPU(m, gemm);
  KIMI_DEFINE_CPU(m, batched_gemm);
  KIMI_DEFINE(m, gemm_int4);
  KIMI_DEFINE_CPU(m, gemm_int8);
  KIMI_DEFINE_CPU(m, quantize_int8);
  KIMI_DEFINE(m, dequantize_int4);
  KIMI_DEFINE(m, quantize_int4);
  KIMI_DEFINE(m, silu_and_mul);
  KIMI_DEFINE_CPU(m, silu_and_mul_backward);
  KIMI_DEFINE(m, gelu);
}

}  // namespace kimi
