# Read by CMake when llama.cpp's project begins.

# The Python binding forces llama.cpp's common library on, which nothing here links to.
set(LLAMA_BUILD_COMMON OFF)
# A wheel holds no links, so a library with versions in its name would be in it three times; CUDA's has 60 MB for one GPU.
if(UNIX AND NOT APPLE)
    set(CMAKE_PLATFORM_NO_VERSIONED_SONAME ON)
endif()

# Our sources take the place of functions of llama.cpp's; what they do not serve they hand on to these, which get names
# of their own.
function(edge_replace file)
    set_source_files_properties(
        ${llama.cpp_SOURCE_DIR}/ggml/src/ggml-cpu/${file}
        TARGET_DIRECTORY ggml-cpu
        PROPERTIES COMPILE_DEFINITIONS "${ARGN}")
endfunction()

function(edge_sources)
    target_sources(ggml-cpu PRIVATE
        ${EDGE_CSRC}/products.cpp ${EDGE_CSRC}/weights.cpp ${EDGE_CSRC}/graph.cpp ${EDGE_CSRC}/attention.cpp
        ${EDGE_CSRC}/pages.cpp)
    edge_replace(amx/mmq.cpp
        ggml_backend_amx_mul_mat=edge_upstream_mul_mat
        ggml_backend_amx_desired_wsize=edge_upstream_desired_wsize)
    edge_replace(ggml-cpu.c ggml_cpu_extra_compute_forward=edge_extra_compute_forward)
    edge_replace(ggml-cpu.cpp
        ggml_graph_compute=edge_graph_compute
        ggml_backend_cpu_repack_buffer_type=edge_buffer_type)
    edge_replace(amx/amx.cpp ggml_aligned_malloc=edge_aligned_malloc)
    edge_replace(repack.cpp ggml_backend_buft_alloc_buffer=edge_alloc_buffer)
    if(TARGET llama AND LINUX)
        set_source_files_properties(
            ${llama.cpp_SOURCE_DIR}/src/llama-kv-cache.cpp
            TARGET_DIRECTORY llama
            PROPERTIES COMPILE_DEFINITIONS ggml_backend_buffer_clear=edge_buffer_clear)
    endif()
    edge_replace(ops.cpp ggml_compute_forward_flash_attn_ext=edge_upstream_flash_attn_ext)
    if(MINGW AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        # Windows' GCC moves vectors as if the stack were aligned for them, which it is to 16 bytes only.
        target_compile_options(ggml-cpu PRIVATE -Wa,-muse-unaligned-vector-move)
    endif()
endfunction()

set(EDGE_CSRC ${CMAKE_CURRENT_LIST_DIR})
# Not with MSVC, nor clang in its manner: they know neither GNU's assembly nor the attributes that are written here.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang" AND NOT MSVC)
    cmake_language(DEFER CALL edge_sources)
endif()
