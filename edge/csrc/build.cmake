# Read by CMake when llama.cpp's project begins.

# The Python binding forces llama.cpp's common library on, which nothing here links to.
set(LLAMA_BUILD_COMMON OFF)

# products.cpp takes the place of llama.cpp's products with weights repacked for AMX; what it does not serve it hands
# to these, under names of their own.
function(edge_products)
    target_sources(ggml-cpu PRIVATE ${EDGE_CSRC}/products.cpp)
    set_source_files_properties(
        ${llama.cpp_SOURCE_DIR}/ggml/src/ggml-cpu/amx/mmq.cpp
        TARGET_DIRECTORY ggml-cpu
        PROPERTIES COMPILE_DEFINITIONS
        "ggml_backend_amx_mul_mat=edge_upstream_mul_mat;ggml_backend_amx_desired_wsize=edge_upstream_desired_wsize")
endfunction()
set(EDGE_CSRC ${CMAKE_CURRENT_LIST_DIR})
cmake_language(DEFER CALL edge_products)
