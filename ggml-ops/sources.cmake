# What the patched upstream tree compiles from this folder (BLOCKFFN_OPS_DIR); see patches/0002-build-our-files.patch.
set(BLOCKFFN_GGML_SOURCES ggml-expert-ops.c)  # into ggml-base
set(BLOCKFFN_CPU_SOURCES barrier.c flash-attn.cpp flash-attn-op.cpp flash-attn-stages.cpp relu-router.cpp union-ffn.cpp union-ffn-ref.cpp token-tiles.cpp tile-general.cpp tile-x86.cpp
                         tile-x86-q4.cpp tile-x86-float.cpp tile-blocks-32.cpp tile-blocks-256.cpp tile-arm.cpp)  # into ggml-cpu
set(BLOCKFFN_LLAMA_SOURCES blockffn-load.cpp blockffn-model.cpp blockffn-graph.cpp blockffn-eagle.cpp blockffn-stats.cpp
                           blockffn-times.cpp blockffn-dial.cpp context-batch-invariant.cpp kv-cache-pack.cpp kv-cache-order.cpp)  # into libllama

list(TRANSFORM BLOCKFFN_GGML_SOURCES  PREPEND ${BLOCKFFN_OPS_DIR}/ggml/)
list(TRANSFORM BLOCKFFN_CPU_SOURCES   PREPEND ${BLOCKFFN_OPS_DIR}/cpu/)
list(TRANSFORM BLOCKFFN_LLAMA_SOURCES PREPEND ${BLOCKFFN_OPS_DIR}/llama/)

# GCC tunes for AMD's Zen 3 and 4 in a way that costs the attention kernel a sixth of its speed there (GCC 12, Zen 4)
if (CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    set_source_files_properties(${BLOCKFFN_OPS_DIR}/cpu/flash-attn-stages.cpp PROPERTIES COMPILE_OPTIONS -mtune=generic)
endif()

# GCC's own header of AVX512 sets these off 800 times in upstream's files: its _mm512_undefined_* are meant to be undefined
if (CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    foreach (file arch/x86/repack.cpp llamafile/sgemm.cpp tiled/tiled-kernel.cpp ops.cpp vec.cpp)
        set_source_files_properties(ggml-cpu/${file} PROPERTIES COMPILE_OPTIONS "-Wno-maybe-uninitialized;-Wno-uninitialized")
    endforeach()
endif()
