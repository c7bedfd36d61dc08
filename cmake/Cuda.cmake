# KIMI_CUDA=AUTO builds the CUDA kernels if there is an nvcc, of the system or of PyPI's wheels, ON insists, OFF leaves
# them out. KIMI_EMULATOR builds them for the host too, as the extension _E, for tests on machines without a GPU.
set(KIMI_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
option(KIMI_EMULATOR "Build the emulator of the CUDA kernels" OFF)

file(GLOB KIMI_CUDA_SOURCES CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu)
file(GLOB KIMI_SM90_SOURCES CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/sm90/*.cu)

# nvcc of the wheels nvidia-cuda-nvcc, -crt, -runtime, -cccl and nvidia-nvvm lies beside the Python packages.
if(NOT KIMI_CUDA STREQUAL OFF)
  include(CheckLanguage)
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    file(GLOB KIMI_NVCC_FOLDERS ${Python_SITEARCH}/nvidia/cu*/bin)
    find_program(KIMI_NVCC nvcc HINTS ${KIMI_NVCC_FOLDERS} /usr/local/cuda/bin)
    if(KIMI_NVCC)
      set(CMAKE_CUDA_COMPILER ${KIMI_NVCC})
    endif()
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(KIMI_WITH_CUDA ON)
  elseif(KIMI_CUDA STREQUAL ON)
    message(FATAL_ERROR "KIMI_CUDA=ON, but there is no nvcc; pip install nvidia-cuda-nvcc nvidia-cuda-cccl, or set CUDACXX")
  endif()
endif()

function(kimi_add_kernels name architectures)
  add_library(${name} STATIC ${ARGN})
  set_target_properties(${name} PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_ARCHITECTURES "${architectures}"
    POSITION_INDEPENDENT_CODE ON)
  set_property(TARGET ${name} PROPERTY CXX_STANDARD)  # CUDA's too, and CMake 3.25 does not know that nvcc 13 takes 20
  target_include_directories(${name} PRIVATE csrc)
  target_compile_options(${name} PRIVATE -std=c++20 -Xfatbin=-compress-all -Werror=all-warnings
    -Xcompiler=-Wall,-Wextra)
endfunction()

if(KIMI_WITH_CUDA)
  enable_language(CUDA)
  # the virtual architecture last: PTX for chips that came after
  kimi_add_kernels(kimi_cuda "80-real;86-real;89-real;90a-real;120-real;120-virtual" ${KIMI_CUDA_SOURCES})
  if(KIMI_SM90_SOURCES)
    kimi_add_kernels(kimi_cuda_sm90 90a-real ${KIMI_SM90_SOURCES})
    target_link_libraries(kimi_cuda PUBLIC kimi_cuda_sm90)
  endif()
  target_compile_definitions(kimi_cuda INTERFACE KIMI_CUDA)
endif()

if(KIMI_EMULATOR)
  add_subdirectory(csrc/cuda/emu)
endif()
