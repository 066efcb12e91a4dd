# SPDX-License-Identifier: Apache-2.0
#
# lbe_ops/libxla_ops.so: how XLA compiles the ops. Included by CMakeLists.txt, which
# has found TensorFlow (tensorflow_version, _include, _library, _definitions).

set(LBE_XLA "AUTO" CACHE STRING
    "How XLA compiles the ops (jit_compile=True): AUTO (where the headers are), ON, OFF")
if(NOT LBE_XLA)
  message(STATUS "Without XLA (jit_compile=True): LBE_XLA=${LBE_XLA}")
  return()
endif()

# Headers of TensorFlow include two packages that its wheel does not ship.
find_path(highwayhash_include highwayhash/highwayhash.h)
find_path(farmhash_include farmhash.h)
set(missing "")
if(NOT highwayhash_include OR NOT farmhash_include)
  set(missing "sudo apt-get install -y libhighwayhash-dev libfarmhash-dev")
elseif(NOT EXISTS "${tensorflow_include}/xla/hlo/builder/xla_builder.h")
  set(missing "a newer TensorFlow, since ${tensorflow_version} lacks a header")
endif()
if(missing AND LBE_XLA STREQUAL "AUTO")
  message(STATUS "Without XLA (jit_compile=True), which needs: ${missing}")
  return()
elseif(missing)
  message(FATAL_ERROR "LBE_XLA=${LBE_XLA} needs: ${missing}")
endif()

add_library(xla_ops SHARED cc/xla_ops.cc cc/xla_custom_call.cc)
target_include_directories(xla_ops PRIVATE cc)
target_include_directories(xla_ops SYSTEM PRIVATE "${tensorflow_include}"
  "${highwayhash_include}" "${farmhash_include}")
target_compile_definitions(xla_ops PRIVATE
  "LBE_TENSORFLOW_VERSION=\"${tensorflow_version}\"")
# Custom calls came later than the rest (TensorFlow 2.20); plain HLO without.
if(EXISTS "${tensorflow_include}/xla/ffi/api/ffi.h")
  target_compile_definitions(xla_ops PRIVATE LBE_XLA_FFI)
endif()
target_compile_options(xla_ops PRIVATE ${tensorflow_definitions} -DNDEBUG -Wall)
target_link_directories(xla_ops PRIVATE "${tensorflow_library}")
target_link_libraries(xla_ops PRIVATE kernels Threads::Threads
  -l:libtensorflow_framework.so.2 -l:libtensorflow_cc.so.2)
set_target_properties(xla_ops PROPERTIES
  LIBRARY_OUTPUT_DIRECTORY "${LBE_OUTPUT_DIR}/lbe_ops" SKIP_BUILD_RPATH ON)
