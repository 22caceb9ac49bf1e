"""The model class of lm_eval: log-likelihoods, rolling log-likelihoods and generated texts of a GGUF file.

    $ blockffn eval lm-eval --model blockffn --model_args pretrained=model.gguf --tasks arc_easy

    >>> from lm_eval import simple_evaluate                                     # doctest: +SKIP
    >>> import blockffn.eval.harness.model                                      # doctest: +SKIP
    >>> simple_evaluate(model="blockffn", model_args="pretrained=model.gguf", tasks=["arc_easy"])  # doctest: +SKIP

lm_eval 0.4.13 finds models by a registry that this module adds to. `--use_cache` keeps each request as it is answered.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from blockffn.errors import BlockffnError
from blockffn.eval.harness.scorer import LEAVES, Scorer
from blockffn.eval.progress import Progress
from blockffn.eval.spec_bench.prompts import TEMPLATE, template

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

NAME = "blockffn"
KNOWN = (
    "pretrained", "n_ctx", "n_threads", "ffn", "exact", "draft", "batch_size", "add_bos_token", "max_gen_toks",
    "think_end_token", "seed", "parallel",
)  # fmt: skip
IGNORED = ("device", "max_batch_size")  # the harness gives them to every model
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


class BlockffnLM(TemplateLM):
    """A GGUF file as the harness sees it.

    pretrained: the file. n_ctx, n_threads, ffn, exact: as in blockffn.Llama. draft: drafter of generated texts.
    batch_size: texts that are evaluated side by side; 1, which lm_eval gives where nobody says, and "auto" take 32.
    add_bos_token: None does as the file says. max_gen_toks: of a generated text where a task does not say.
    think_end_token: text up to it is not part of an answer. parallel: as batch_size, and 1 means 1.
    Errors: BlockffnError for any request that fails; none is left out.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        ffn: str = "union",
        exact: bool = False,
        draft: str | None = None,
        add_bos_token: bool | None = None,
        max_gen_toks: int = 256,
        think_end_token: str | None = None,
        seed: int = 0,
        parallel: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        for name in others:
            if name not in IGNORED:
                near = difflib.get_close_matches(name, KNOWN, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise BlockffnError(f"--model_args: unknown argument {name!r}; {hint}known: {', '.join(KNOWN)}")
        import blockffn

        self.llm = blockffn.Llama(
            str(pretrained), n_ctx=n_ctx, n_threads=n_threads, ffn=ffn, exact=exact, drafter=draft
        )
        usual = str(batch_size) == "1" or str(batch_size).startswith("auto")
        self.batch_size = parallel or (LEAVES if usual else int(batch_size))
        self.max_gen_toks, self.think_end_token, self.seed = max_gen_toks, think_end_token, seed
        self.add_bos_token = self.llm._model.add_bos_token() if add_bos_token is None else add_bos_token
        self._scorer: Scorer | None = None
        self._formatters: dict[bool, Any] = {}

    def close(self) -> None:
        """Free the model."""
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None
        self.llm.close()

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return len(self.llm.input_ids)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.llm.token_eos())

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: begin of text, or end of text where there is none."""
        bos = int(self.llm.token_bos())
        return bos if bos >= 0 else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """What tells the tokenizer and template apart in caches of requests."""
        return Path(self.llm.model_path).name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; special tokens in it are recognised, a begin-of-text token is not doubled."""
        bos = int(self.llm.token_bos())
        add = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add and add_special_tokens is None and bos >= 0 and string.startswith(self._text(bos)):
            add = False
        return list(self.llm.tokenize(string.encode(), add_bos=bool(add and bos >= 0), special=True))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template of the file, which the results keep; None where none is applied."""
        if chat_template is False or chat_template is None:
            return None
        return str(self._formatter(True).template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text. Errors: BlockffnError where the file has no template."""
        return str(self._formatter(add_generation_prompt)(messages=cast(Any, chat_history)).prompt)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the results say about the model."""
        from blockffn.eval.environment import environment

        path, where = Path(self.llm.model_path), environment()
        return {
            "model_file": path.name,
            "model_bytes": path.stat().st_size,
            "model_n_ctx": self.max_length,
            "model_ffn": self.llm.ffn,
            "model_chat_template": bool(self.llm.metadata.get(TEMPLATE)),
            "blockffn_version": where["version"],
            "blockffn_commit": where["commit"],
        }

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows of the context where it is longer."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owner: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text)
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[number] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to the first of its stop sequences."""
        from blockffn.eval.harness.generation import Job, generate

        jobs = [self._job(number, *request.args) for number, request in enumerate(requests)]
        found: list[str] = [""] * len(requests)
        with Progress(len(requests), "text", quiet=disable_tqdm) as progress:
            for number, text in generate(self.llm, cast("Sequence[Job]", jobs), self.batch_size, self.seed):
                found[number] = postprocess_generated_text(text, jobs[number].stop, self.think_end_token)
                self.cache_hook.add_partial("generate_until", requests[number].args, found[number])
                progress.step()
        return found

    def _job(self, number: int, context: str, arguments: dict[str, Any]) -> Any:
        from blockffn.eval.harness.generation import Job

        options = cast("dict[str, Any]", normalize_gen_kwargs(arguments, self.max_gen_toks))
        stop = handle_stop_sequences(options.pop("until"), self._text(self.eot_token_id))
        limit = options.pop("max_gen_toks")
        options.pop("do_sample", None)
        unknown = sorted(set(options) - set(SAMPLING))
        if unknown:
            raise BlockffnError(
                f"generation argument {unknown[0]!r} is not known: expected until, max_gen_toks, do_sample, "
                + ", ".join(SAMPLING)
            )
        if limit >= self.max_length:
            raise BlockffnError(
                f"max_gen_toks {limit} leaves no room for a prompt in a context of {self.max_length}; raise n_ctx in "
                "--model_args or lower max_gen_toks in --gen_kwargs"
            )
        tokens = self.tok_encode(context)[-(self.max_length - limit) :]
        sampling = {SAMPLING[name]: value for name, value in options.items()}
        return Job(number, tokens, limit, tuple(word for word in stop if word), sampling)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        if self._scorer is None:
            self._scorer = Scorer(self.llm, self.batch_size)
        with Progress(len(requests), "request", quiet=disable_tqdm) as progress:

            def done(number: int, result: tuple[float, bool]) -> None:
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], result)
                progress.step()

            return self._scorer.score([(context, rest) for _, context, rest in requests], done)

    def _formatter(self, add_generation_prompt: bool) -> Any:
        if add_generation_prompt not in self._formatters:
            found = template(self.llm, cure="leave out --apply_chat_template")
            found.add_generation_prompt = add_generation_prompt
            self._formatters[add_generation_prompt] = found
        return self._formatters[add_generation_prompt]

    def _text(self, token: int) -> str:
        return self.llm.detokenize([token], special=True).decode("utf-8", errors="replace")


model_registry.register(NAME, target=BlockffnLM)
