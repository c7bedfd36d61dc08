# KIMI_CUDA=AUTO builds the CUDA kernels if there is an nvcc, of the system or of PyPI's wheels, ON insists, OFF leaves
# them out. KIMI_EMULATOR builds them for the host too, as the extension _E, for tests on machines without a GPU.
set(KIMI_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
option(KIMI_EMULATOR "Build the emulator of the CUDA kernels" OFF)

file(GLOB KIMI_CUDA_SOURCES CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu)
file(GLOB KIMI_SM90_SOURCES CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/sm90/*.cu)

# pip's isolated builds keep the folders of the environment that pip installs into; nvcc of the wheels lies there.
if(NOT KIMI_CUDA STREQUAL OFF)
  if(CMAKE_CUDA_COMPILER)
    set(KIMI_NVCC ${CMAKE_CUDA_COMPILER})
  elseif(DEFINED ENV{CUDACXX})
    set(KIMI_NVCC $ENV{CUDACXX})
  else()
    file(GLOB KIMI_NVCC_FOLDERS ${Python_SITEARCH}/nvidia/cu*/bin)
    find_program(KIMI_NVCC nvcc HINTS ${KIMI_NVCC_FOLDERS} PATHS /usr/local/cuda/bin)
  endif()
  if(KIMI_NVCC)
    execute_process(COMMAND ${KIMI_NVCC} --version OUTPUT_VARIABLE KIMI_NVCC_SAYS ERROR_QUIET)
  endif()
  if(KIMI_NVCC_SAYS MATCHES "release ([0-9.]+)" AND CMAKE_MATCH_1 VERSION_GREATER_EQUAL 12.8)  # the first with sm_120
    set(KIMI_WITH_CUDA ON)
    message(STATUS "CUDA kernels: by ${KIMI_NVCC}, release ${CMAKE_MATCH_1}")
  elseif(KIMI_CUDA STREQUAL ON)
    message(FATAL_ERROR "KIMI_CUDA=ON needs nvcc 12.8 or newer, found: ${KIMI_NVCC}. "
      "pip install nvidia-cuda-nvcc nvidia-cuda-cccl, or set CUDACXX")
  else()
    message(STATUS "CUDA kernels: none, without nvcc 12.8 or newer; built for the CPU alone")
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
  set(CMAKE_CUDA_COMPILER ${KIMI_NVCC})
  string(REGEX REPLACE "bin/nvcc$" "lib" KIMI_CUDA_LIBRARIES ${KIMI_NVCC})
  if(EXISTS ${KIMI_CUDA_LIBRARIES}/libcudart_static.a)  # of the wheels; nvcc of those of CUDA 13.0 looks into lib64
    set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} -L${KIMI_CUDA_LIBRARIES}")
  endif()
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
