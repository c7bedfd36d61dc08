#pragma once

namespace kimi {

using Stream = void*;  // a cudaStream_t; null is the default stream

}  // namespace kimi
