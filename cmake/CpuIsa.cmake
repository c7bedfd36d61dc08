# One object library per instruction set: only those files see its flags.
file(GLOB KIMI_CPU_SOURCES CONFIGURE_DEPENDS csrc/core/*.cpp csrc/cpu/*.cpp)
add_library(kimi_cpu STATIC ${KIMI_CPU_SOURCES})
target_link_libraries(kimi_cpu PUBLIC kimi_options Threads::Threads)

function(kimi_add_isa name)
  file(GLOB sources CONFIGURE_DEPENDS csrc/cpu/isa/${name}.cpp csrc/cpu/isa/${name}_*.cpp)
  add_library(kimi_isa_${name} OBJECT ${sources})
  target_link_libraries(kimi_isa_${name} PRIVATE kimi_options)
  target_compile_options(kimi_isa_${name} PRIVATE ${ARGN})
  target_sources(kimi_cpu PRIVATE $<TARGET_OBJECTS:kimi_isa_${name}>)
endfunction()

kimi_add_isa(scalar)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  kimi_add_isa(avx2 -mavx2 -mfma -mf16c)
  kimi_add_isa(avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mavx2 -mfma -mf16c)
  target_compile_definitions(kimi_cpu PRIVATE KIMI_X86=1)
endif()
