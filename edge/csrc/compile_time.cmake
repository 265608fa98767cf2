# Read by CMake after build.cmake. What no decoding step runs is compiled with -O1: a sixth of the build's time.
function(edge_compile_time)
    set(hot llama-batch.cpp llama-context.cpp llama-graph.cpp llama-kv-cache.cpp llama-kv-cache-iswa.cpp
        llama-vocab.cpp unicode.cpp)
    # A source's options follow its target's. Options of a source would take the models out of their unity build.
    target_compile_options(llama PRIVATE -O1)
    list(TRANSFORM hot PREPEND ${llama.cpp_SOURCE_DIR}/src/)
    set_source_files_properties(${hot} TARGET_DIRECTORY llama PROPERTIES COMPILE_OPTIONS -O3)
    set(cold gguf.cpp ggml-backend-meta.cpp ggml-opt.cpp)
    list(TRANSFORM cold PREPEND ${llama.cpp_SOURCE_DIR}/ggml/src/)
    set_source_files_properties(${cold} TARGET_DIRECTORY ggml-base PROPERTIES COMPILE_OPTIONS -O1)
endfunction()

if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    cmake_language(DEFER CALL edge_compile_time)
endif()
