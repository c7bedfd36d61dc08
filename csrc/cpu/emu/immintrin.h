// The intrinsics of AVX-512 and AMX that cpu/isa/ uses, in plain C++, so that its files run where there is only AVX2:
// with KIMI_EMULATE_ISA this folder comes before the compiler's own. Each follows the operation in Intel's manual.
// Declared in the namespace that uses them, they are found before the compiler's. Slow, for tests alone.
//
// What the manual forbids ends the program, and so do an unaligned address where it must be aligned, tiles that are
// used without a configuration, and a configuration over one that was not released. What is undefined is filled with
// 0xa5.
#pragma once
#include_next <immintrin.h>
#ifndef __OPTIMIZE__
#error "without optimisation the compiler's intrinsics are macros, which come before these"
#endif

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace kimi::cpu {
namespace {

namespace emu {

typedef int8_t i8 __attribute__((vector_size(64)));
typedef uint8_t u8 __attribute__((vector_size(64)));
typedef int16_t i16 __attribute__((vector_size(64)));
typedef uint16_t u16 __attribute__((vector_size(64)));
typedef int32_t i32 __attribute__((vector_size(64)));
typedef uint32_t u32 __attribute__((vector_size(64)));

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated intrinsics: %s\n", what);
  std::abort();
}

// The vector of lane(i) for all i.
template <class V, class Lane>
__m512i lanes(Lane lane) {
  V v{};
  for (unsigned i = 0; i < sizeof(V) / sizeof v[0]; i++) v[i] = lane(i);
  return (__m512i)v;
}
template <class V>
V read(const void* at) {
  V v;
  std::memcpy(&v, at, sizeof v);
  return v;
}
inline void aligned(const void* at) { require(reinterpret_cast<uintptr_t>(at) % 64 == 0, "unaligned address"); }

// Of each quarter, 128 bits, `half` of a and of b, element by element in turn.
template <class V>
__m512i interleave(__m512i a, __m512i b, int half) {
  constexpr int n = 16 / sizeof(V{}[0]);
  return lanes<V>([=, x = (V)a, y = (V)b](int i) {
    const int from = i / n * n + half * n / 2 + i % n / 2;
    return i % 2 ? y[from] : x[from];
  });
}

struct Tile {
  int rows, row_bytes;
  uint8_t at[16][64];
};
thread_local bool tiles_configured = false;
thread_local Tile tiles[8];

inline Tile& tile(int i) {
  require(i >= 0 && i < 8, "there are eight tiles");
  require(tiles_configured && tiles[i].rows > 0, "the tile is not configured");
  return tiles[i];
}

}  // namespace emu

// Memory.

inline __m512 _mm512_loadu_ps(const void* at) { return emu::read<__m512>(at); }
inline __m512i _mm512_loadu_si512(const void* at) { return emu::read<__m512i>(at); }
inline __m512 _mm512_load_ps(const void* at) { return emu::aligned(at), emu::read<__m512>(at); }
inline __m512i _mm512_load_si512(const void* at) { return emu::aligned(at), emu::read<__m512i>(at); }
inline void _mm512_storeu_ps(void* at, __m512 a) { std::memcpy(at, &a, sizeof a); }
inline void _mm512_store_si512(void* at, __m512i a) { emu::aligned(at), std::memcpy(at, &a, sizeof a); }

// Constants and casts.

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512i _mm512_set1_epi8(char a) { return (__m512i)(emu::i8{} + int8_t(a)); }
inline __m512i _mm512_set1_epi32(int a) { return (__m512i)(emu::i32{} + a); }
inline __m512 _mm512_set1_ps(float a) { return (__m512)_mm512_set1_epi32(emu::read<int>(&a)); }
template <class... Ints>  // from the highest lane to the lowest; the compiler's setr is a macro of it
__m512i _mm512_set_epi32(Ints... a) {
  static_assert(sizeof...(a) == 16);
  const int values[] = {a...};
  return emu::lanes<emu::i32>([&](int i) { return values[15 - i]; });
}
inline __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
inline __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
inline __m512i _mm512_castsi128_si512(__m128i a) {
  __m512i v = _mm512_set1_epi8(char(0xa5));
  std::memcpy(&v, &a, sizeof a);
  return v;
}

// Integers.

inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((emu::u32)a + (emu::u32)b); }
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return (__m512i)((emu::u32)a - (emu::u32)b); }
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_max_epu32(__m512i a, __m512i b) {
  return emu::lanes<emu::u32>([x = (emu::u32)a, y = (emu::u32)b](int i) { return x[i] > y[i] ? x[i] : y[i]; });
}
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) { return n > 31 ? __m512i{} : (__m512i)((emu::u32)a << n); }
inline __m512i _mm512_srai_epi32(__m512i a, unsigned n) { return (__m512i)((emu::i32)a >> (n > 31 ? 31 : n)); }
inline __m512i _mm512_srli_epi16(__m512i a, unsigned n) { return n > 15 ? __m512i{} : (__m512i)((emu::u16)a >> n); }

inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {  // bytes, a unsigned and b signed
  emu::u32 total = (emu::u32)sum;
  for (int j = 0; j < 32; j += 8)
    total += ((emu::u32)a >> j & 255) * (emu::u32)((emu::i32)((emu::u32)b << (24 - j)) >> 24);
  return (__m512i)total;
}
inline __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {  // signed words
  emu::u32 total = (emu::u32)sum;
  for (int j = 0; j < 32; j += 16)
    total +=
        (emu::u32)((emu::i32)((emu::u32)a << (16 - j)) >> 16) * (emu::u32)((emu::i32)((emu::u32)b << (16 - j)) >> 16);
  return (__m512i)total;
}
inline int _mm512_reduce_add_epi32(__m512i a) {
  uint32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += ((emu::u32)a)[i];
  return int(sum);
}
inline unsigned _mm512_reduce_max_epu32(__m512i a) {
  uint32_t most = 0;
  for (int i = 0; i < 16; i++) most = ((emu::u32)a)[i] > most ? ((emu::u32)a)[i] : most;
  return most;
}

// Order of lanes.

inline __m512i _mm512_inserti32x4(__m512i a, __m128i b, int quarter) {
  std::memcpy(reinterpret_cast<char*>(&a) + quarter % 4 * 16, &b, sizeof b);
  return a;
}
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return emu::interleave<emu::u32>(a, b, 0); }
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return emu::interleave<emu::u32>(a, b, 1); }
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return emu::interleave<__m512i>(a, b, 0); }
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return emu::interleave<__m512i>(a, b, 1); }
inline __m512i _mm512_permutexvar_epi32(__m512i index, __m512i a) {
  return emu::lanes<emu::u32>([at = (emu::u32)index, x = (emu::u32)a](int i) { return x[at[i] % 16]; });
}
inline __m512i _mm512_permutex2var_epi32(__m512i a, __m512i index, __m512i b) {
  return emu::lanes<emu::u32>([at = (emu::u32)index, x = (emu::u32)a, y = (emu::u32)b](int i) {
    return at[i] & 16 ? y[at[i] % 16] : x[at[i] % 16];
  });
}
inline __m512 _mm512_permute_ps(__m512 a, int control) {
  return (__m512)emu::lanes<__m512>([=](int i) { return a[i / 4 * 4 + (control >> i % 4 * 2 & 3)]; });
}

// Conversions.

inline __m512i _mm512_cvtepi8_epi16(__m256i a) {
  int8_t x[32];
  std::memcpy(x, &a, sizeof x);
  return emu::lanes<emu::i16>([&](int i) { return x[i]; });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  uint16_t x[16];
  std::memcpy(x, &a, sizeof x);
  return emu::lanes<emu::u32>([&](int i) { return x[i]; });
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
  uint8_t x[16];
  for (int i = 0; i < 16; i++) x[i] = uint8_t(((emu::u32)a)[i]);
  return emu::read<__m128i>(x);
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) { return __builtin_convertvector((emu::i32)a, __m512); }
inline __m512i _mm512_maskz_cvtps_epi32(__mmask16 keep, __m512 a) {  // to nearest even; what does not fit is -2^31
  return emu::lanes<emu::i32>([=](int i) {
    const bool fits = a[i] >= -0x1p31f && a[i] < 0x1p31f;
    return !(keep >> i & 1) ? 0 : fits ? int32_t(std::nearbyintf(a[i])) : INT32_MIN;
  });
}

// Floats.

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  __m512 v;
  for (int half = 0; half < 64; half += 32) {
    const auto of = [half](const __m512& x) { return emu::read<__m256>(reinterpret_cast<const char*>(&x) + half); };
    const __m256 sum = _mm256_fmadd_ps(of(a), of(b), of(c));
    std::memcpy(reinterpret_cast<char*>(&v) + half, &sum, sizeof sum);
  }
  return v;
}
inline float _mm512_reduce_add_ps(__m512 a) {  // by halves, as the compiler has it
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; i++) a[i] = a[i + n] + a[i];
  return a[0];
}

// Tiles.

inline void _tile_release() {
  emu::tiles_configured = false;
  std::memset(emu::tiles, 0, sizeof emu::tiles);
}
inline void _tile_loadconfig(const void* config) {
  const auto* const byte = static_cast<const uint8_t*>(config);
  emu::require(!emu::tiles_configured, "the thread's tiles are configured already");
  emu::require(byte[0] == 1 && byte[1] == 0, "palette 1 and first row 0");
  for (int i = 2; i < 64; i++) emu::require(i / 8 == 2 || i / 8 == 3 || i / 8 == 6 || byte[i] == 0, "reserved is zero");
  _tile_release();
  for (int i = 0; i < 8; i++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, byte + 16 + 2 * i, 2);
    emu::tiles[i].rows = byte[48 + i], emu::tiles[i].row_bytes = row_bytes;
    emu::require(emu::tiles[i].rows <= 16 && row_bytes <= 64, "a tile has up to 16 rows of 64 bytes");
    emu::require((emu::tiles[i].rows == 0) == (row_bytes == 0), "rows without bytes");
  }
  emu::tiles_configured = true;
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud

inline void _tile_zero(int i) { std::memset(emu::tile(i).at, 0, sizeof emu::tile(i).at); }
inline void _tile_loadd(int i, const void* base, int64_t stride) {
  _tile_zero(i);
  for (int r = 0; r < emu::tile(i).rows; r++)
    std::memcpy(emu::tile(i).at[r], static_cast<const char*>(base) + r * stride, emu::tile(i).row_bytes);
}
inline void _tile_stored(int i, void* base, int64_t stride) {
  for (int r = 0; r < emu::tile(i).rows; r++)
    std::memcpy(static_cast<char*>(base) + r * stride, emu::tile(i).at[r], emu::tile(i).row_bytes);
}
// sums[m][n] += sum_k a[m][k] * b[k / 4][n][k % 4], a signed and b unsigned
inline void _tile_dpbsud(int sums, int a, int b) {
  emu::Tile &to = emu::tile(sums), &x = emu::tile(a), &y = emu::tile(b);
  emu::require(sums != a && a != b && b != sums, "three tiles");
  emu::require(to.row_bytes % 4 == 0 && x.row_bytes % 4 == 0 && y.row_bytes % 4 == 0, "rows of whole double words");
  emu::require(to.rows == x.rows && to.row_bytes == y.row_bytes && x.row_bytes == 4 * y.rows, "shapes of a product");
  for (int m = 0; m < to.rows; m++) {
    __m512i sum = emu::read<__m512i>(to.at[m]);  // beyond row_bytes b is zero
    for (int k = 0; k < y.rows; k++)
      sum = _mm512_dpbusd_epi32(sum, emu::read<__m512i>(y.at[k]), _mm512_set1_epi32(emu::read<int>(x.at[m] + 4 * k)));
    std::memcpy(to.at[m], &sum, sizeof sum);
  }
}

}  // namespace
}  // namespace kimi::cpu
