"""A small BlockFFN training file, for tests that change single values of it; OUT stands for the folder of the run."""

BLOCKFFN = """
[run]
out = "OUT"
seed = 5
threads = 1
log_every = 2
eval_every = 4
eval_sequences = 2
save_every = 4
[corpus]
vocab_size = 320
[model]
name = "test"
family = "blockffn"
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
max_position_embeddings = 64
tie_word_embeddings = true
num_experts = 7
dim_expert = 4
q_lora_rank = 6
kv_lora_rank = 5
qk_nope_head_dim = 4
qk_rope_head_dim = 2
scale_emb = 12.0
scale_depth = 1.4
dim_model_base = 8
[optimizer]
kind = "muon"
learning_rate = 2e-2
steps = 12
warmup_steps = 2
decay_steps = 4
sequence_length = 24
batch_sequences = 4
micro_sequences = 2
[objective]
locality = 2e-3
chunk = 5e-2
chunk_size = 8
chunk_window = 3
"""
