# One object library per instruction set: only those files see its flags. KIMI_EMULATE_ISA compiles those of AVX-512 and
# AMX for AVX2, over csrc/cpu/emu, for tests on machines without them.
option(KIMI_EMULATE_ISA "Emulate AVX-512 and AMX with AVX2" OFF)
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
  set(KIMI_AVX2 -mavx2 -mfma -mf16c)
  set(KIMI_AVX512 ${KIMI_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni)
  kimi_add_isa(avx2 ${KIMI_AVX2})
  if(KIMI_EMULATE_ISA)
    foreach(name avx512 amx)
      kimi_add_isa(${name} ${KIMI_AVX2} -O1 -Wno-psabi)  # vectors of 64 bytes are passed in memory
      target_include_directories(kimi_isa_${name} SYSTEM PRIVATE csrc/cpu/emu)  # for #include_next
    endforeach()
    target_compile_definitions(kimi_cpu PRIVATE KIMI_EMULATE_ISA=1)
  else()
    kimi_add_isa(avx512 ${KIMI_AVX512})
    kimi_add_isa(amx ${KIMI_AVX512} -mamx-tile -mamx-int8)
  endif()
  target_compile_definitions(kimi_cpu PRIVATE KIMI_X86=1)
endif()
