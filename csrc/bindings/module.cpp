#include <nanobind/nanobind.h>

#include "bindings/register.h"
#include "core/check.h"

#if defined(KIMI_EMULATOR)
#define KIMI_MODULE _E
#else
#define KIMI_MODULE _C
#endif

NB_MODULE(KIMI_MODULE, m) {
  nanobind::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const kimi::TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    }
  });
  kimi::register_norm(m);
  kimi::register_linear(m);
  kimi::register_matmul(m);
  kimi::register_attention(m);
  kimi::register_moe(m);
  kimi::register_sampling(m);
  kimi::register_runtime(m);
}
