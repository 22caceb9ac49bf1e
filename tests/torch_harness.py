"""The torch reference behind lm_eval's own class for torch models: what our class is compared with.

The tokenizer is sentencepiece on the tokenizer.model of the checkpoint, without any code of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece
import torch
from lm_eval.models.huggingface import HFLM
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel, PreTrainedTokenizer
from transformers.modeling_outputs import CausalLMOutput

from blockffn.training.model import ReferenceModel


class TorchModel(PreTrainedModel, GenerationMixin):
    """The reference as transformers see a model: token ids [texts, tokens] to logits [texts, tokens, vocabulary]."""

    config_class = LlamaConfig
    main_input_name = "input_ids"

    def __init__(self, config: LlamaConfig, reference: ReferenceModel) -> None:
        super().__init__(config)
        self.reference = reference
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # transformers ask a model for its device and type
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=torch.stack([self.reference.forward(text.tolist()).logits for text in input_ids]))

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Take what `generate` gives to every model."""

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> None:
        """Cache nothing."""

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


class Pieces(PreTrainedTokenizer):
    """sentencepiece as transformers see a tokenizer."""

    def __init__(self, file: Path, **kwargs: Any) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return int(self.pieces.vocab_size())

    def get_vocab(self) -> dict[str, int]:
        return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)}

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.pieces.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.pieces.id_to_piece(index))

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:  # type: ignore[override]
        return [1] * add_special_tokens + list(self.pieces.encode(text))

    def decode(self, token_ids: Any, **_: Any) -> Any:
        if not isinstance(token_ids, int) and len(token_ids) and not isinstance(token_ids[0], int):
            return [self.decode([int(token) for token in text]) for text in token_ids]
        if isinstance(token_ids, int):
            return {1: "<s>", 2: "</s>"}.get(token_ids) or str(self.pieces.decode([token_ids]))
        return str(self.pieces.decode(list(token_ids)))

    def __call__(self, text: list[str], **_: Any) -> Any:  # type: ignore[override]
        (one,) = text
        ids = torch.tensor([self.encode(one)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def torch_harness(checkpoint: Path, max_length: int) -> HFLM:
    """Return lm_eval's class for torch models on the reference of a checkpoint."""
    reference = ReferenceModel.from_checkpoint(checkpoint)
    config = LlamaConfig(vocab_size=reference.config.n_vocab, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model = TorchModel(config, reference)
    return HFLM(pretrained=model, tokenizer=Pieces(checkpoint / "tokenizer.model"), max_length=max_length, batch_size=1)
