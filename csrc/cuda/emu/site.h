// Where a kernel waits, for messages and for checking that threads agree.
#pragma once

#include <cstring>
#include <string>

namespace kimi::emu {

struct Site {
  const char* file;
  int line;
  bool operator==(const Site& o) const { return line == o.line && (file == o.file || !std::strcmp(file, o.file)); }
  std::string str() const { return std::string(file ? file : "?") + ":" + std::to_string(line); }
};

// As the last parameters of a function: where it is called from.
#define EMU_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMU_HERE (::kimi::emu::Site{file, line})

}  // namespace kimi::emu
