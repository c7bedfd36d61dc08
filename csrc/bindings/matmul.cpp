#include "ops/matmul.h"

#include "bindings/args.h"
#include "bindings/register.h"
#include "ops/grouped_matmul.h"

namespace kimi {
namespace {

// Float32 matrices, the last two axes of an array: one of the two is contiguous, what comes before may be strided.
template <class... Dims>
FloatMatrix matrix(const Args& a, const char* name, const Tensor& t, Dims&... dims) {
  const float* data = a.placed<const float>(name, t, dims...);
  const int row = t.ndim - 2, column = t.ndim - 1;
  const bool rows = t.shape[column] <= 1 || t.stride[column] == 1;
  a.require(rows || t.shape[row] <= 1 || t.stride[row] == 1, "neither of the last two axes of ", name,
            " is contiguous");
  return {data, rows ? t.stride[row] : t.stride[column], !rows};
}

template <class On>
void matmul(On on, Tensor a, Tensor b, Tensor out, bool symmetric) {
  const Args args("matmul", on);
  Dim B{"B"}, M{"M"}, K{"K"}, N{"N"};
  MatmulParams p{};
  const auto take = [&](auto&... batch) {  // B, or nothing
    p.a = matrix(args, "a", a, batch..., M, K);
    p.b = matrix(args, "b", b, batch..., K, N);
    p.out = args.strided<float>("out", out, batch..., M, N);
  };
  if (a.ndim == 3) {
    take(B);
    p.a_stride_b = a.stride[0], p.b_stride_b = b.stride[0], p.out_stride_b = out.stride[0];
  } else {
    take();
    B.size = 1;
  }
  args.require(!symmetric || M.size == N.size, "symmetric, but out is ", M.size, " by ", N.size);
  args.check_apart("out", out, "a", a);
  args.check_apart("out", out, "b", b);
  p.out_stride = out.stride[out.ndim - 2];
  p.B = B, p.M = M, p.K = K, p.N = N, p.symmetric = symmetric;
  KIMI_RUN_CPU(on, matmul, p);
}

template <class On>
void grouped_matmul(On on, Tensor a, Tensor b, Tensor offsets, Tensor out) {
  const Args args("grouped_matmul", on);
  Dim E{"E"}, M{"M"}, K{"K"}, N{"N"};
  GroupedMatmulParams p{};
  p.sum_rows = b.ndim == 2;
  p.a = p.sum_rows ? matrix(args, "a", a, K, M) : matrix(args, "a", a, M, K);
  p.b = p.sum_rows ? matrix(args, "b", b, M, N) : matrix(args, "b", b, E, K, N);
  Dim E1{"E + 1", p.sum_rows ? -1 : E.size + 1};
  p.offsets = args.dense<const int32_t>("offsets", offsets, E1);
  args.require(E1.size > 0, "offsets is empty, expected [E + 1]");
  E.size = E1.size - 1;
  check_offsets(args, p.offsets, E, M);
  p.out = p.sum_rows ? args.strided<float>("out", out, E, K, N) : args.strided<float>("out", out, M, N);
  args.check_apart("out", out, "a", a);
  args.check_apart("out", out, "b", b);
  p.b_stride_e = b.stride[0], p.out_stride_e = out.stride[0], p.out_stride = out.stride[out.ndim - 2];
  p.E = E, p.M = M, p.K = K, p.N = N;
  KIMI_RUN_CPU(on, grouped_matmul, p);
}

}  // namespace

void register_matmul(nb::module_& m) {
  KIMI_DEFINE_CPU(m, matmul);
  KIMI_DEFINE_CPU(m, grouped_matmul);
}

}  // namespace kimi
