# What the patched upstream tree compiles from this folder (BLOCKFFN_OPS_DIR); see patches/0002-build-our-files.patch.
set(BLOCKFFN_CPU_SOURCES flash-attn.cpp relu-router.cpp token-tiles.cpp union-ffn.cpp union-ffn-ref.cpp union-ffn-general.cpp union-ffn-x86.cpp
                         union-ffn-x86-q4.cpp union-ffn-x86-q8.cpp union-ffn-x86-q6.cpp union-ffn-x86-float.cpp union-ffn-arm.cpp)  # into ggml-cpu
set(BLOCKFFN_LLAMA_SOURCES blockffn-load.cpp blockffn-model.cpp blockffn-graph.cpp blockffn-eagle.cpp blockffn-stats.cpp)  # into libllama

list(TRANSFORM BLOCKFFN_CPU_SOURCES   PREPEND ${BLOCKFFN_OPS_DIR}/)
list(TRANSFORM BLOCKFFN_LLAMA_SOURCES PREPEND ${BLOCKFFN_OPS_DIR}/)
