"""Bad checkpoints: each gives one message that says what is wrong, and leaves no file."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

from blockffn.cli import main
from blockffn.convert import convert_checkpoint
from blockffn.errors import BlockffnError

DECO: dict[str, Any] = {"family": "deco", "norm": "simple", "attention": "gqa", "n_head": 4, "n_head_kv": 2}
ROUTER = "model.layers.1.mlp.router_proj.weight"
INDEX = "model.safetensors.index.json"


def set_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in values.items():
            config.pop(key, None) if value is ... else config.update({key: value})
        (folder / "config.json").write_text(json.dumps(config))

    return change


def set_tensor(name: str, value: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Path], None]:
    """Change, add or (None) remove one tensor of model.safetensors."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors.get(name, torch.ones(3))).contiguous()
        save_file(tensors, folder / "model.safetensors")

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        ((folder / name).write_bytes(content) if isinstance(content, bytes) else (folder / name).write_text(content))
        and None
    )


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


def edit_index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def truncate(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def duplicate(folder: Path) -> None:
    first, second = (folder / f"model-0000{k}-of-00003.safetensors" for k in (1, 2))
    save_file(load_file(first) | load_file(second), second)


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never run",))


def dangerous_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Attack()}, 2))


def nan(values: torch.Tensor) -> torch.Tensor:
    values = values.clone()
    values.view(-1)[5] = float("nan")
    return values


def inf(values: torch.Tensor) -> torch.Tensor:
    values = values.clone()
    values.view(-1)[-1] = float("inf")
    return values


def bomb(path: Path, member: str, compression: int = zipfile.ZIP_DEFLATED) -> None:
    """A torch archive with one member of 100 MB; compressed it takes 0.1 MB."""
    with zipfile.ZipFile(path, "w", compression) as archive, archive.open(member, "w", force_zip64=True) as stream:
        for _ in range(100):
            stream.write(bytes(1_000_000))


# (identifier, options of write_checkpoint, damage, options of convert_checkpoint, parts of the message)
Case = tuple[str, dict[str, Any], Callable[[Path], None] | None, dict[str, Any], list[str]]
SHARDED = {"fmt": "safetensors_sharded"}
CASES: list[Case] = [
    ("no config", {}, remove("config.json"), {}, ["config.json", "file not found"]),
    ("broken config", {}, write("config.json", '{"ffn_type": '), {}, ["config.json", "not valid JSON"]),
    ("config is a list", {}, write("config.json", "[]"), {}, ["expected a JSON object", "list"]),
    ("no weights", {}, remove("model.safetensors"), {}, ["no weights found", "*.safetensors"]),
    ("no tokenizer", {"with_tokenizer": False}, None, {}, ["no tokenizer found", "tokenizer.model"]),
    ("broken tokenizer", {}, truncate("tokenizer.model"), {}, ["tokenizer.model", "not a complete SentencePiece"]),
    ("ordinary MiniCPM", {}, set_config(ffn_type=...), {}, ["ordinary MiniCPM", "convert_hf_to_gguf.py"]),
    ("other architecture", {}, set_config(architectures=["LlamaForCausalLM"], ffn_type=...), {},
     ["'LlamaForCausalLM'"]),
    ("ours by key only", {}, set_config(architectures=["LlamaForCausalLM"]), {},
     ["architectures", "'LlamaForCausalLM'"]),
    ("unknown ffn_type", {}, set_config(ffn_type="block_liner"), {}, ["ffn_type", "did you mean block_linear?"]),
    ("unknown norm", {}, set_config(norm_after_router="rsm"), {}, ["norm_after_router", "rms, sum, none", "'rsm'"]),
    ("norm against tensors", {}, set_config(norm_after_router="sum"), {},
     ["expected rms", "router_norm.weight", "'sum'"]),
    ("router activation", {}, set_config(router_act="sigmoid"), {}, ["router_act", "one of relu", "'sigmoid'"]),
    ("unknown activation", {}, set_config(hidden_act="geglu"), {}, ["hidden_act", "silu", "'geglu'"]),
    ("scale_emb missing", {}, set_config(scale_emb=...), {}, ["scale_emb", "carries weight", "original configuration"]),
    ("misspelt key", {}, set_config(dim_model_bas=32), {"dim_model_base": ...}, ["dim_model_base", "found nothing"]),
    ("misspelt optional key", {}, set_config(norm_scal=2.0, norm_scale=...), {},
     ["norm_scal", "did you mean norm_scale?"]),
    ("text for a number", {}, set_config(num_experts="7"), {}, ["num_experts", "an integer >= 1", "'7'"]),
    ("negative number", {}, set_config(expert_size=-32), {}, ["expert_size", "an integer >= 1", "-32"]),
    ("zero eps", {}, set_config(rms_norm_eps=0), {}, ["rms_norm_eps", "a positive number", "found 0"]),
    ("heads do not divide", {}, set_config(num_attention_heads=3), {}, ["num_attention_heads", "divisor", "found 3"]),
    ("too few layers", {}, set_config(num_hidden_layers=1), {}, ["num_hidden_layers", "expected 2", "found 1"]),
    ("attention type", {}, set_config(attention_type="vanilla"), {}, ["attention_type", "expected mla", "'vanilla'"]),
    ("biases", {}, set_config(attention_bias=True), {}, ["attention_bias", "found True"]),
    ("rope kind", {}, set_config(rope_scaling={"type": "yarn", "factor": 2.0}), {}, ["rope_scaling.type", "'yarn'"]),
    ("rope factor", {}, set_config(rope_scaling={"type": "linear", "factor": 0.5}), {}, ["rope_scaling.factor", "0.5"]),
    ("rope form", {}, set_config(rope_scaling=4), {}, ["rope_scaling", "an object with type and factor", "found 4"]),
    ("eos id", {}, set_config(eos_token_id="</s>"), {}, ["eos_token_id", "token id", "'</s>'"]),
    ("expert count", {}, set_config(num_experts=8), {}, ["router_proj.weight", "[8, 64]", "[7, 64]"]),
    ("expert size", {}, set_config(expert_size=16), {}, ["up_proj", "[112, 64]", "[224, 64]"]),
    ("vocabulary size", {}, set_config(vocab_size=600), {}, ["embed_tokens", "[600, 64]", "[512, 64]"]),
    ("missing tensor", {}, set_tensor(ROUTER, None), {}, ["tensor missing", ROUTER]),
    ("missing expert tensor", {}, set_tensor("model.layers.0.mlp.up_proj", None), {},
     ["tensor missing", "mlp.up_proj"]),
    ("leftover tensor", {}, set_tensor("model.layers.0.mlp.extra", lambda t: t), {},
     ["mlp.extra", "nothing in this model"]),
    ("wrong shape", {}, set_tensor(ROUTER, lambda t: t[:, :63]), {}, [ROUTER, "[7, 64]", "[7, 63]"]),
    ("integer weights", {}, set_tensor(ROUTER, lambda t: t.to(torch.int8)), {}, [ROUTER, "I8", "unquantized"]),
    ("head missing", {}, set_tensor("lm_head.weight", None), {}, ["tensor missing", "lm_head.weight"]),
    ("tied but different", {}, set_config(tie_word_embeddings=True), {},
     ["tie_word_embeddings", "lm_head.weight differs"]),
    ("nan", {}, set_tensor(ROUTER, nan), {}, ["ffn_gate_inp", ROUTER, "NaN or Inf"]),
    ("nan in bf16", {"dtype": "bf16"}, set_tensor("model.layers.0.mlp.down_proj", nan), {"outtype": "bf16"},
     ["NaN or Inf"]),
    ("inf in f16", {"dtype": "f16"}, set_tensor("model.layers.0.mlp.up_proj", inf), {"outtype": "f16"},
     ["up_proj", "Inf"]),
    ("f16 overflow", {}, set_tensor("lm_head.weight", lambda t: t * 1e6), {"outtype": "f16"},
     ["output.weight", "65504", "bf16"]),
    ("truncated safetensors", {}, truncate("model.safetensors"), {}, ["model.safetensors", "not a complete"]),
    ("lfs pointer", {}, write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), {},
     ["Git LFS pointer"]),
    ("missing shard", SHARDED, remove("model-00002-of-00003.safetensors"), {}, [INDEX, "model-00002", "missing"]),
    ("missing shard, no index", SHARDED,
     lambda d: (remove(INDEX)(d), remove("model-00002-of-00003.safetensors")(d)) and None, {},
     ["model-00002", "missing"]),
    ("shard not in index", SHARDED, write("model-00004-of-00003.safetensors", b"x"), {}, ["model-00004", "not listed"]),
    ("tensor not in index", SHARDED, edit_index(lambda m: m.pop(ROUTER) and None), {}, [ROUTER, "not listed"]),
    ("tensor in another shard", SHARDED,
     edit_index(lambda m: m.update({ROUTER: next(f for f in m.values() if f != m[ROUTER])})), {},
     [ROUTER, "expected in"]),
    ("tensor twice", SHARDED, duplicate, {}, ["is also in", "model-00001-of-00003.safetensors"]),
    ("index without map", SHARDED, write(INDEX, "{}"), {}, [INDEX, "weight_map"]),
    ("index leaves the folder", SHARDED, write(INDEX, '{"weight_map": {"a": "../b.safetensors"}}'), {},
     ["same folder"]),
    ("pickle with code", {"fmt": "pickle"}, dangerous_pickle, {}, ["refused", "run code", "safetensors"]),
    ("truncated pickle", {"fmt": "pickle"}, truncate("pytorch_model.bin"), {}, ["pytorch_model.bin", "not a complete"]),
    ("pickled list", {"fmt": "pickle"}, lambda d: torch.save([1], d / "pytorch_model.bin"), {}, ["state dict", "list"]),
    ("nested pickle", {"fmt": "pickle"}, lambda d: torch.save({"model": {}}, d / "pytorch_model.bin"), {},
     ["model", "dict"]),
    ("two training files", {"layout": "bmtrain"}, lambda d: torch.save({}, d / "b.pt"), {},
     ["one training file", "b.pt"]),
    ("too many tokens", {"n_vocab": 500}, None, {}, ["at most 500 tokens", "found 512"]),
    ("token twice", {"n_vocab": 520}, write("added_tokens.json", '{"<s>": 513}'), {}, ["both '<s>'", "1 and 513"]),
    ("eos text unknown", {}, write("tokenizer_config.json", '{"eos_token": "<end>"}'), {}, ["eos_token", "'<end>'"]),
    ("add_bos text", {}, write("tokenizer_config.json", '{"add_bos_token": "yes"}'), {}, ["add_bos_token", "'yes'"]),
    ("bos id too large", {}, set_config(bos_token_id=512), {}, ["bos_token_id", "below 512", "found 512"]),
    ("outtype", {}, None, {"outtype": "q4_k_m"}, ["--outtype", "f32, f16, bf16, q8_0, auto", "'q4_k_m'"]),
    ("layout", {}, None, {"layout": "experts"}, ["--layout", "did you mean expert?"]),
    ("remoe routing", {"family": "remoe"}, set_config(moe_routing_strategy="topk"), {},
     ["moe_routing_strategy", "'topk'"]),
    ("remoe shared", {"family": "remoe"}, set_config(num_shared_experts=8), {}, ["num_shared_experts", "fewer than"]),
    ("vanilla width", {"family": "vanilla"}, set_config(intermediate_size=5760), {}, ["[5760, 64]", "[96, 64]"]),
    ("deco eps", DECO, set_config(norm_epsilon=0), {}, ["norm_epsilon", "a positive number", "found 0"]),
    ("deco layers", DECO, set_config(num_layers=3), {},
     ["the tensors show 2", "num_layers = 3", "num_hidden_layers = 32"]),
    ("deco layer kinds", DECO, set_config(moe_layer_freq=[1, 1]), {}, ["moe_layer_freq", "layer 0", "expected 0"]),
    ("deco layer count", DECO, set_config(moe_layer_freq="[0]+[1]*2"), {}, ["moe_layer_freq", "2 entries"]),
    ("deco layer class", DECO, set_config(use_blockffn=False), {}, ["use_blockffn", "found False"]),
    ("deco scales", DECO, set_config(use_mup=True), {}, ["use_mup", "found True"]),
    ("deco unclear scales", DECO, set_config(use_mup=..., scale_emb=12), {}, ["use_mup", "beside scale_emb"]),
    ("deco activation", DECO, set_config(expert_act_func="norm_gelu"), {}, ["expert_act_func", "norm_silu_nomean"]),
    ("deco norm", DECO, set_config(router_norm_type="softmax"), {}, ["router_norm_type", "simple, null, rms, normal"]),
    ("deco norm missing", DECO, set_config(router_norm_type=...), {}, ["router_norm_type", "found nothing"]),
    ("deco bias method", DECO, set_config(moe_router_enable_expert_bias=True, moe_expert_bias_apply_method="abs"), {},
     ["moe_expert_bias_apply_method", "base, rms", "'abs'"]),
    ("deco bias missing", DECO, set_config(moe_router_enable_expert_bias=True), {}, ["tensor missing", "expert_bias"]),
    ("deco bias unclaimed", {**DECO, "bias": "base"}, set_config(moe_router_enable_expert_bias=False), {},
     ["expert_bias"]),
    ("deco fixed factor", DECO, set_config(router_norm_fixed=True), {},
     ["router_norm.weight", "nothing in this model"]),
    ("deco other class", DECO, set_config(architectures=["LlamaForCausalLM"]), {},
     ["BlockFFNForCausalLM (DECO), found"]),
    ("deco norm weights", DECO, set_config(layernorm_zero_centered_gamma=True), {},
     ["layernorm_zero_centered_gamma", "not part of these models", "found True"]),
    ("deco rotation", DECO, set_config(rotary_interleaved=True), {}, ["rotary_interleaved", "found True"]),
    ("deco soft cap", DECO, set_config(final_logit_softcapping=30.0), {}, ["final_logit_softcapping", "found 30.0"]),
    ("deco score on input", DECO, set_config(moe_apply_probs_on_input=True), {}, ["moe_apply_probs_on_input"]),
    ("deco rope base", DECO, set_config(rotary_base=500000), {},
     ["rotary_base = 500000", "rope_theta = 10000", "contradict"]),
    ("deco scalar factor", DECO, set_config(router_norm_scalar=True), {}, ["router_norm.weight", "[1]", "[7]"]),
    ("deco fixed without value", {**DECO, "router_fixed": True}, set_config(router_norm_init_var=...), {},
     ["router_norm_init_var", "found nothing"]),
    ("deco norm weight missing", DECO, set_tensor("model.layers.1.mlp.expert_act.rms_norm.weight", None), {},
     ["tensor missing", "expert_act.rms_norm.weight", "[32]"]),
    ("deco norm weight unclaimed", DECO, set_config(expert_act_func="silu"), {},
     ["expert_act.rms_norm.weight", "nothing in this model"]),
    ("deco shared width", DECO, set_config(moe_shared_expert_intermediate_size=128), {},
     ["shared_experts.gate_proj", "[128, 64]", "[48, 64]"]),
    ("deco shared unclaimed", DECO, set_config(moe_shared_expert_intermediate_size=...), {},
     ["shared_experts", "nothing in this model"]),
    ("deco bias unstated", {**DECO, "bias": "base"}, set_config(moe_router_enable_expert_bias=...), {},
     ["moe_router_enable_expert_bias", "found nothing"]),
    ("odd rotary width", {"rope": 15}, None, {}, ["15 rotary dimensions", "even number"]),
    ("odd head size", {**DECO, "n_embd": 60}, None, {}, ["15 rotary dimensions", "even number"]),
    ("too many experts", {"n_expert": 1025, "expert_dim": 1}, None, {}, ["at most 1024 experts", "found 1025"]),
    ("deco head count", DECO, set_config(num_attention_heads=3), {},
     ["num_attention_heads", "a divisor of 64, the rows of q_proj", "found 3"]),
    *((f"other meaning {key}", {}, set_config(**{key: value}), {}, [key, "not part of these models", f"found {value}"])
      for key, value in (("sliding_window", 4096), ("partial_rotary_factor", 0.5), ("softmax_scale", 0.1),
                         ("attn_logit_softcapping", 50.0), ("embedding_multiplier", 12.0), ("logits_scaling", 8.0),
                         ("mlp_bias", True), ("qk_norm", True))),
    ("other meaning in training", {"layout": "bmtrain"}, set_config(sliding_window=4096), {}, ["sliding_window"]),
    ("kinds of layers", {}, set_config(layer_types=["full_attention", "sliding_attention"]), {},
     ["layer_types", "full_attention for every layer"]),
    ("rope parameters", {}, set_config(rope_parameters={"rope_type": "yarn", "factor": 2.0}), {},
     ["rope_parameters.rope_type", "default, linear, dynamic", "'yarn'"]),
    ("rope parameters, deco", DECO, set_config(rope_parameters={"rope_type": "llama3", "factor": 2.0}), {},
     ["rope_parameters.rope_type", "'llama3'"]),
    ("rope by layer", {}, set_config(rope_parameters={"full_attention": {"rope_theta": 1e4}}), {},
     ["rope_parameters.full_attention", "one setting for all layers"]),
    ("rope partial", {}, set_config(rope_parameters={"partial_rotary_factor": 0.5}), {},
     ["rope_parameters.partial_rotary_factor", "found 0.5"]),
    ("rope without kind", {}, set_config(rope_scaling={"factor": 4.0}), {},
     ["rope_scaling.rope_type", "found nothing"]),
    ("rope kinds", {}, set_config(rope_scaling={"factor": 4.0, "type": "linear", "rope_type": "dynamic"}), {},
     ["rope_scaling.type", "expected 'dynamic'", "found 'linear'"]),
    ("rope bases", {}, set_config(rope_theta=1e4, rope_parameters={"rope_theta": 5e5}), {},
     ["rope_theta = 10000", "rope_parameters.rope_theta = 500000", "contradict"]),
    ("rope objects", {}, set_config(rope_scaling={"type": "linear", "factor": 4.0},
     rope_parameters={"type": "linear", "factor": 2.0}), {}, ["rope_scaling and rope_parameters contradict"]),
    ("rope length", {},
     set_config(rope_parameters={"type": "dynamic", "factor": 2, "original_max_position_embeddings": 128}), {},
     ["original_max_position_embeddings", "max_position_embeddings = 256", "found 128"]),
    ("absurd layers", {}, lambda d: (set_tensor("model.layers.2999999.x", lambda t: t)(d),
     set_config(num_hidden_layers=3000000)(d)) and None, {}, ["3 layers", "nothing of layer 2", "2999999"]),
    ("absurd layers, deco", DECO, set_tensor("model.layers.99999999999999999999999.x", lambda t: t), {},
     ["3 layers", "nothing of layer 2"]),
    ("no layer number", {}, set_tensor("model.layers.\u00b2.x", lambda t: t), {}, ["\u00b2", "nothing in this model"]),
    ("no layers", {}, set_config(num_hidden_layers=3000000), {}, ["expected 2", "found 3000000"]),
    *((f"value {key} {value}", {}, set_config(**{key: value}), {"dry_run": True}, [key, expected])
      for key, value, expected in (("max_position_embeddings", 10**12, "up to 2147483647"),
                                   ("scale_emb", 1e300, "float32 can hold"),
                                   ("rms_norm_eps", 1e-60, "float32 can hold"),
                                   ("dim_model_base", float("nan"), "float32 can hold"))),
    ("derived value", {}, set_config(dim_model_base=1.2e-38), {"dry_run": True}, ["blockffn.logit_scale", "float32"]),
    ("negative eos", {}, write("generation_config.json", '{"eos_token_id": -5}'), {"dry_run": True},
     ["generation_config.json", "eos_token_id", "found -5"]),
    ("text that is no Unicode", {}, write("tokenizer_config.json", '{"chat_template": "\\ud800"}'), {"dry_run": True},
     ["tokenizer.chat_template", "valid Unicode"]),
    ("nested brackets", {}, write("config.json", "[" * 100_000), {}, ["config.json", "not valid JSON"]),
    ("digits", {}, write("config.json", '{"ffn_type": ' + "9" * 10_000 + "}"), {}, ["config.json", "not valid JSON"]),
    ("template in Latin-1", {}, write("chat_template.jinja", b"\xe4"), {}, ["chat_template.jinja", "UTF-8"]),
    ("index is a list", SHARDED, write(INDEX, "[]"), {}, [INDEX, "weight_map"]),
    ("index of other files", SHARDED, write(INDEX, '{"weight_map": {"a": "config.json"}}'), {},
     [INDEX, "'config.json'", "*.safetensors"]),
    ("tied head in eight bits", {"tied": True}, lambda d: save_file(load_file(d / "model.safetensors") |
     {"lm_head.weight": torch.ones(512, 64).to(torch.float8_e4m3fn)}, d / "model.safetensors"), {},
     ["lm_head.weight", "F8_E4M3", "unquantized"]),
    ("pickle key", {"fmt": "pickle"}, lambda d: torch.save({5: torch.ones(3)}, d / "pytorch_model.bin"), {},
     ["expected the names of tensors", "5"]),
    *((f"pickle tensor {found}", {"fmt": "pickle"},
       lambda d, value=value: torch.save({"a": value}, d / "pytorch_model.bin"), {}, ["'a'", found])
      for found, value in (("sparse", torch.eye(3).to_sparse()), ("meta", torch.ones(3, device="meta")),
                           ("expand", torch.ones(1).expand(10**12)))),
    ("pickle that inflates", {"fmt": "pickle"}, lambda d: bomb(d / "pytorch_model.bin", "archive/data.pkl"), {},
     ["refused", "archive/data.pkl", "inflates to 100000000 bytes"]),
    ("pickle with large names", {"fmt": "pickle"},
     lambda d: bomb(d / "pytorch_model.bin", "archive/data.pkl", zipfile.ZIP_STORED), {},
     ["refused", "at most 67108864 bytes", "100000000"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "damage", "convert", "parts"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_bad_checkpoint(
    tmp_path: Path,
    options: dict[str, Any],
    damage: Callable[[Path], None] | None,
    convert: dict[str, Any],
    parts: list[str],
) -> None:
    source = write_checkpoint(tmp_path / "source", **options)
    if ... in convert.values():
        set_config(**convert)(source)
        convert = {}
    if damage is not None:
        damage(source)
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(BlockffnError) as caught:
        convert_checkpoint(source, target / "model.gguf", **convert)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "outfile", "parts"),
    [
        ("no/such/folder", "m.gguf", ["no such folder"]),
        ("config.json", "m.gguf", ["expected a checkpoint folder, found a file"]),
        (".", ".", ["expected a file name, found a folder"]),
        (".", "missing/m.gguf", ["missing: no such folder"]),
    ],
)
def test_bad_paths(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    outfile: str,
    parts: list[str],
) -> None:
    """Through the command line: exit code 1, one line, no traceback."""
    monkeypatch.chdir(write_checkpoint(tmp_path))
    before = sorted(tmp_path.iterdir())
    assert main(["convert", source, "--outfile", outfile]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(part in error for part in parts), error
    assert sorted(tmp_path.iterdir()) == before


def test_the_source_is_never_overwritten(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path)
    before = (source / "model.safetensors").read_bytes()
    with pytest.raises(BlockffnError, match=r"expected a file to write, found model\.safetensors of the checkpoint"):
        convert_checkpoint(source, source / "model.safetensors")
    assert (source / "model.safetensors").read_bytes() == before


def test_hub_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        raise ConnectionError("network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(BlockffnError, match=r"SparseLLM/Nothing.*network is unreachable.*download the folder"):
        convert_checkpoint("SparseLLM/Nothing", tmp_path / "m.gguf")


def test_hub_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    source = write_checkpoint(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(source))
    report = convert_checkpoint("SparseLLM/Tiny", tmp_path / "m.gguf")
    assert report.name == "Tiny"


def test_wrong_usage(tmp_path: Path) -> None:
    for wrong in (["--outtype", "q4"], ["--split-max-size", "2T"], ["--verify", "--dry-run"]):
        with pytest.raises(SystemExit) as caught:
            main(["convert", str(tmp_path), "--outfile", "m.gguf", *wrong])
        assert caught.value.code == 2
