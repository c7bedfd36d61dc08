// Picks the table once, at first use. Built without instruction-set flags.
#include <cstddef>
#include <cstdlib>
#include <cstring>

#include "core/check.h"
#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

// Fills what `table` leaves null from `lower`. All members but the name are pointers of one size.
Kernels fill(const Kernels& table, const Kernels& lower) {
  constexpr size_t kFirst = offsetof(Kernels, sum_squares), kStep = sizeof table.sum_squares;
  Kernels filled = table;
  for (size_t at = kFirst; at < sizeof table; at += kStep) {
    void* function;
    std::memcpy(&function, reinterpret_cast<const char*>(&table) + at, kStep);
    if (!function)
      std::memcpy(reinterpret_cast<char*>(&filled) + at, reinterpret_cast<const char*>(&lower) + at, kStep);
  }
  return filled;
}

struct Isas {
  static constexpr int kMax = 3;
  Kernels tables[kMax];
  const char* names[kMax + 1] = {};
  int count = 0;
  const Kernels* active = nullptr;

  void add(const Kernels& table) {
    tables[count] = count ? fill(table, tables[count - 1]) : table;
    names[count] = table.name;
    count++;
  }

  bool select(const char* name) {
    for (int i = 0; i < count; i++)
      if (!std::strcmp(name, names[i])) return active = &tables[i], true;
    return false;
  }

  Isas() {
    add(scalar_kernels);
#if KIMI_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      add(avx2_kernels);
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) add(avx512_kernels);
    }
#endif
    active = &tables[count - 1];
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
