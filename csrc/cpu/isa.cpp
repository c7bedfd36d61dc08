// Picks the table once, at first use. Built without instruction-set flags.
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>

#include "core/check.h"
#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

// Fills what `table` leaves null, from the member at byte `first` on, from `lower`. All of them are pointers of one
// size.
template <class Table>
Table fill(const Table& table, const Table& lower, size_t first = 0) {
  Table filled = table;
  for (size_t at = first; at < sizeof table; at += sizeof(void*)) {
    void* member;
    std::memcpy(&member, reinterpret_cast<const char*>(&table) + at, sizeof member);
    if (!member)
      std::memcpy(reinterpret_cast<char*>(&filled) + at, reinterpret_cast<const char*>(&lower) + at, sizeof member);
  }
  return filled;
}

// An instruction set's table and those it points to, without gaps.
struct Tables {
  Kernels all;
  GemmKernels gemm;
  QuantizedKernels quantized;
  Int8Kernels int8;
  AttentionKernels attention;
  IntegerAttentionKernels integer_attention;

  void set(const Kernels& table, const Kernels& lower) {
    all = fill(table, lower, offsetof(Kernels, sum_squares));
    gemm = fill(*all.gemm, *lower.gemm), quantized = fill(*all.quantized, *lower.quantized);
    int8 = fill(*all.int8, *lower.int8), attention = fill(*all.attention, *lower.attention);
    integer_attention = fill(*all.integer_attention, *lower.integer_attention);
    all.gemm = &gemm, all.quantized = &quantized, all.int8 = &int8, all.attention = &attention;
    all.integer_attention = &integer_attention;
  }
};

#if KIMI_EMULATE_ISA  // the sources of both are compiled for AVX2
bool has_avx512() { return true; }
bool has_amx() { return true; }
#elif KIMI_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
bool has_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, for all threads of the process
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Isas {
  static constexpr int kMax = 4;
  Tables tables[kMax];
  const char* names[kMax + 1] = {};
  int count = 0;
  const Kernels* active = nullptr;

  void add(const Kernels& table) {
    tables[count].set(table, count ? tables[count - 1].all : table);
    names[count] = table.name;
    count++;
  }

  bool select(const char* name) {
    for (int i = 0; i < count; i++)
      if (!std::strcmp(name, names[i])) return active = &tables[i].all, true;
    return false;
  }

  Isas() {
    add(scalar_kernels);
#if KIMI_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      add(avx2_kernels);
      if (has_avx512()) {
        add(avx512_kernels);
        if (has_amx()) add(amx_kernels);
      }
    }
#endif
    active = &tables[count - 1].all;
    if (const char* wanted = std::getenv("KIMI_ISA")) {
      std::string all;
      for (int i = 0; i < count; i++) all += std::string(i ? ", " : "") + names[i];
      check(select(wanted), "KIMI_ISA is \"", wanted, "\", expected one of: ", all);
    }
  }
};

Isas& isas() {
  static Isas instance;
  return instance;
}

}  // namespace

const Kernels& kernels() { return *isas().active; }
const char* const* supported_isas() { return isas().names; }
bool set_isa(const char* name) { return isas().select(name); }

}  // namespace kimi::cpu
