# SPDX-License-Identifier: Apache-2.0
#
# Adds the CUDA kernels to the library `kernels`, as LBE_CUDA says:
#
#   AUTO      where there is a CUDA compiler that works; one line says why not
#   ON        or fail
#   OFF       never
#   EMULATED  compiled as C++, to run on the CPU: for tests
#
# A compiler decides, not a GPU: the libraries serve machines with and without one.

set(LBE_CUDA "AUTO" CACHE STRING "CUDA kernels: AUTO, ON, OFF or EMULATED (tests)")
set_property(CACHE LBE_CUDA PROPERTY STRINGS AUTO ON OFF EMULATED)
option(LBE_CUDA_REPORT "Print what resources every CUDA kernel uses" OFF)

# What `lbe_ops info` says: the targets, or "no".
set(LBE_CUDA_TARGETS "no")

# The first has all kernels and is compiled for every architecture.
set(cuda_sources "${CMAKE_CURRENT_LIST_DIR}/launch.cu"
    "${CMAKE_CURRENT_LIST_DIR}/cuda_system.cc")
set(cuda_oldest_toolkit 12.3)
# Of these, the ones that the toolkit knows; the newest as PTX, too, for GPUs to come.
set(cuda_machines 75 80 86 89 90 100 120)

# `why_not`: why the CUDA compiler cannot be used, or nothing. Then `compiler` is its
# path and `known` are the architectures that it knows, oldest first.
function(try_cuda_compiler why_not compiler known)
  set(${why_not} "" PARENT_SCOPE)
  if(CMAKE_CUDA_COMPILER)
    set(nvcc "${CMAKE_CUDA_COMPILER}")
  elseif(DEFINED ENV{CUDACXX})
    set(nvcc "$ENV{CUDACXX}")
  else()
    find_program(LBE_NVCC nvcc PATHS /usr/local/cuda/bin)
    mark_as_advanced(LBE_NVCC)
    set(nvcc "${LBE_NVCC}")
    if(NOT nvcc)
      set(${why_not} "no nvcc in PATH, CUDACXX or /usr/local/cuda/bin" PARENT_SCOPE)
      return()
    endif()
  endif()
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE version
    ERROR_VARIABLE version RESULT_VARIABLE failed)
  if(failed OR NOT version MATCHES "release ([0-9]+\\.[0-9]+)")
    string(REGEX MATCH "[^\n]*" line "${version}")
    set(${why_not} "${nvcc} --version fails (${failed}): ${line}" PARENT_SCOPE)
    return()
  endif()
  if(CMAKE_MATCH_1 VERSION_LESS cuda_oldest_toolkit)
    set(${why_not} "${nvcc} is CUDA ${CMAKE_MATCH_1}, and ${cuda_oldest_toolkit} or \
newer is needed" PARENT_SCOPE)
    return()
  endif()
  # Compiled and linked with the C++ compiler: this nvcc may not take so new a one, or
  # have no static runtime.
  set(trial "${CMAKE_BINARY_DIR}/cuda_trial")
  file(WRITE "${trial}.cu" "#include <cmath>\n#include <cstdint>\n"
    "__global__ void Kernel() {}\nvoid Launch() { Kernel<<<1, 1>>>(); }\n")
  execute_process(
    COMMAND "${nvcc}" -ccbin "${CMAKE_CXX_COMPILER}" -std=c++17 -shared -cudart=static
      -Xcompiler=-fPIC -o "${trial}.so" "${trial}.cu"
    OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE failed)
  if(failed)
    string(REGEX MATCH "[^\n]*([Ee]rror|unsupported|cannot)[^\n]*" line "${output}")
    set(${why_not} "${nvcc} with ${CMAKE_CXX_COMPILER} ${CMAKE_CXX_COMPILER_VERSION} \
fails: ${line}" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE listed)
  string(REGEX MATCHALL "[0-9]+" listed "${listed}")
  list(SORT listed COMPARE NATURAL)
  set(${compiler} "${nvcc}" PARENT_SCOPE)
  set(${known} "${listed}" PARENT_SCOPE)
endfunction()

if(LBE_CUDA STREQUAL "EMULATED")
  add_library(cuda_kernels OBJECT ${cuda_sources})
  set(cuda_emulation "${CMAKE_SOURCE_DIR}/tests/cuda_emulation.h")
  set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX
    OBJECT_DEPENDS "${cuda_emulation}")
  target_compile_options(cuda_kernels PRIVATE -ffp-contract=off -fno-strict-aliasing
    -Wno-unknown-pragmas)
  add_library(cuda_runtime INTERFACE)
  target_compile_definitions(cuda_runtime INTERFACE LBE_CUDA_EMULATION)
  target_compile_options(cuda_runtime INTERFACE "SHELL:-include \"${cuda_emulation}\"")
  target_link_libraries(cuda_kernels PRIVATE cuda_runtime)
  set(LBE_CUDA_TARGETS "emulated on the CPU, for tests")
elseif(LBE_CUDA)
  try_cuda_compiler(why_not nvcc known)
  if(why_not)
    if(LBE_CUDA STREQUAL "AUTO")
      message(STATUS "Without CUDA: ${why_not}")
      return()
    endif()
    message(FATAL_ERROR "LBE_CUDA=${LBE_CUDA}, but ${why_not}")
  endif()

  if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(chosen)
    foreach(machine ${cuda_machines})
      if(machine IN_LIST known)
        list(APPEND chosen ${machine})
      endif()
    endforeach()
    list(GET known 0 oldest)
    if(oldest GREATER 75)
      list(PREPEND chosen ${oldest})
      list(REMOVE_DUPLICATES chosen)
    endif()
    list(POP_BACK chosen newest)
    list(TRANSFORM chosen APPEND "-real")
    set(CMAKE_CUDA_ARCHITECTURES ${chosen} ${newest})
  endif()

  set(CMAKE_CUDA_COMPILER "${nvcc}")
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
  # Without contraction and with subnormal numbers as zero, as on the CPU: the same
  # bits. All architectures at once, as far as there are cores.
  add_library(cuda_kernels OBJECT ${cuda_sources})
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
    # A sixth of the size. Older toolkits serve drivers that cannot unpack this.
    set(pack --compress-mode=size)
  endif()
  set(cuda_flags -ftz=true -fmad=false
      -Xcompiler=-ffp-contract=off --threads=0 ${pack}
      $<$<BOOL:${LBE_CUDA_REPORT}>:-Xptxas=-v>)
  target_compile_options(cuda_kernels PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_flags}>")
  add_library(cuda_runtime INTERFACE)
  # The driver is looked for at run time, so that the libraries load without one. The
  # runtime's symbols stay inside: a process may hold another version of it.
  target_link_libraries(cuda_runtime INTERFACE CUDA::cudart_static)
  target_link_libraries(cuda_kernels PRIVATE CUDA::cudart_static)  # for its headers
  target_link_options(cuda_runtime INTERFACE
    "LINKER:--exclude-libs,libcudart_static.a:libculibos.a")

  set(targets ${CMAKE_CUDA_ARCHITECTURES})
  if(targets MATCHES "^(all|all-major|native)$")
    string(TOUPPER "${targets}" which)
    string(REPLACE "-" "_" which "${which}")
    set(targets ${CMAKE_CUDA_ARCHITECTURES_${which}})
  endif()
  list(TRANSFORM targets REPLACE "^([0-9]+[af]?)$" "\\1-real;\\1-virtual")
  list(TRANSFORM targets REPLACE "^(.*)-real$" "sm_\\1")
  list(TRANSFORM targets REPLACE "^(.*)-virtual$" "compute_\\1")
  list(JOIN targets " " targets)
  # What DescribeCuda compares a GPU with.
  target_compile_definitions(cuda_kernels PRIVATE "LBE_CUDA_ARCHITECTURES=\"${targets}\"")
  set(LBE_CUDA_TARGETS "CUDA ${CMAKE_CUDA_COMPILER_VERSION}: ${targets}")
  message(STATUS "With ${LBE_CUDA_TARGETS}")
else()
  return()
endif()

target_include_directories(cuda_kernels PRIVATE cc)
target_compile_definitions(cuda_kernels PRIVATE LBE_CUDA)
target_sources(kernels PRIVATE $<TARGET_OBJECTS:cuda_kernels>)
# Seen by whatever calls the kernels.
target_compile_definitions(kernels PUBLIC LBE_CUDA)
target_link_libraries(kernels PUBLIC cuda_runtime)
