"""Patches of vLLM 0.32.0. Each is idempotent and says why it exists and when it can go."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

_MARK = "_ascend_plugin_patch"


def apply_patches() -> None:
    """Apply every patch; safe to call more than once and in every process."""
    _refuse_out_of_vocabulary_prompts()
    _explain_a_missing_mtp_layer()
    _show_counters_of_several_servers()


def apply_worker_patches() -> None:
    """Apply the patches of code that only workers load; safe to call more than once."""
    _keep_kv_scales_from_models()
    _rotate_views_on_cpus()
    _draft_from_the_next_token_of_a_chunk()
    _draw_nothing_for_unfinished_prompts()
    _multiply_by_weights_as_they_lie()


def apply_npu_patches() -> None:
    """Apply the patches that only workers of NPUs need; safe to call more than once."""
    from .compat_npu import apply

    apply()


def _refuse_out_of_vocabulary_prompts() -> None:
    """Refuse prompt ids beyond the model's vocabulary as a request error.

    Why: ``BaseRenderer.validate_token_ids`` checks nothing without a tokenizer
    (``skip_tokenizer_init``), and with one it allows the larger of the tokenizer's and the model's
    vocabulary. An id beyond the embedding table then kills the worker, and with it every other
    request.
    Remove when: vLLM checks ids against the model's embedding table by itself.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.base import BaseRenderer

    original: Callable[..., None] = BaseRenderer.validate_token_ids
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def validate_token_ids(
        self: Any, token_ids: Sequence[int], *, parameter: str | None = None
    ) -> None:
        original(self, token_ids, parameter=parameter)
        # Multimodal models use placeholder ids outside the vocabulary that are never embedded.
        if not token_ids or self.model_config.is_multimodal_model:
            return
        vocabulary = self.model_config.get_vocab_size()
        worst = next((t for t in (min(token_ids), max(token_ids)) if not 0 <= t < vocabulary), None)
        if worst is not None:
            raise VLLMValidationError(
                f"Token id {worst} is out of vocabulary: the model has ids 0 to "
                f"{vocabulary - 1}. Tokenize the prompt with the model's own tokenizer.",
                parameter=parameter or "prompt_token_ids",
                value=worst,
            )

    setattr(validate_token_ids, _MARK, True)
    BaseRenderer.validate_token_ids = validate_token_ids


def _explain_a_missing_mtp_layer() -> None:
    """Say what is wrong when ``{"method": "mtp"}`` is asked of a model without such a layer.

    Why: vLLM says "Unsupported speculative method: 'mtp'", as if it did not know the method; or, if
    the configuration says that there are no such layers, it divides by their number.
    Remove when: it names the model and what it lacks.
    """
    from vllm.config.speculative import SpeculativeConfig

    original: Callable[[Any], None] = SpeculativeConfig.__post_init__
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        try:
            original(self)
        except (NotImplementedError, ZeroDivisionError) as error:
            if self.method != "mtp" or self.draft_model_config is None:
                raise
            raise ValueError(
                f"--speculative-config asks for method 'mtp', and {self.model} "
                f"({', '.join(self.target_model_config.architectures)}) has no MTP layer. Train "
                "one with 'ascend-plugin mtp train' (dense models), or use method 'ngram', which "
                "needs none."
            ) from error

    setattr(__post_init__, _MARK, True)
    SpeculativeConfig.__post_init__ = __post_init__


def _keep_kv_scales_from_models() -> None:
    """Leave out static int8 KV scales when a model loads its weights.

    Why: ``ascend_plugin.attention.kv_quantisation`` reads them from the files. vLLM's models have
    no parameters for them: ModelSlim's names end in a KeyError, those of compressed-tensors are
    loaded into scalars of fp8 caches.
    Remove when: vLLM loads int8 KV scales per channel by itself.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from .kv_cache.checkpoint import is_int8_scheme, is_kv_scale

    original: Callable[..., Iterator[tuple[str, Any]]] = DefaultModelLoader.get_all_weights
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def get_all_weights(self: Any, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
        scheme = is_int8_scheme(getattr(model_config.hf_config, "quantization_config", None))
        for name, tensor in original(self, model_config, model):
            if not is_kv_scale(name, scheme):
                yield name, tensor

    setattr(get_all_weights, _MARK, True)
    DefaultModelLoader.get_all_weights = get_all_weights


def _rotate_views_on_cpus() -> None:
    """Rotate queries and keys that are views of wider rows in plain torch.

    Why: the C++ operator behind ``RotaryEmbedding.forward_cpu`` takes the heads of a token for
    neighbours. Latent attention (MLA) gives it views ``[tokens, heads, rotary_dim]`` of wider
    rows, in which it rotates other elements: wrong answers that depend on the batch, and
    overwritten latents. Only eager models call it.
    Remove when: vLLM's CPU operator follows the strides of heads and tokens.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    original: Callable[..., Any] = RotaryEmbedding.forward_cpu
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        # Rows of all heads in one dimension may be views: their stride is followed.
        if all(x is None or x.dim() == 2 or x.is_contiguous() for x in (query, key)):
            return original(self, positions, query, key)
        return self.forward_native(positions, query, key)

    setattr(forward_cpu, _MARK, True)
    RotaryEmbedding.forward_cpu = forward_cpu


def _draft_from_the_next_token_of_a_chunk() -> None:
    """Give a draft layer the token that follows a chunk of a prompt, not the prompt's last.

    Why: while a prompt is prefilled in chunks, the draft layer's key and value of a chunk's last
    position are made from the hidden state there and the embedding of the next token.
    ``prepare_next_token_ids_padded`` takes the last token that the request has instead. The wrong
    key stays for good, also in the prefix cache: fewer drafts are accepted, more with every chunk.
    Remove when: it takes the token at the end of what is scheduled, as
    ``prepare_next_token_ids_cpu`` does.
    """
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    prepare: Callable[..., Any] = SpecDecodeBaseProposer.prepare_next_token_ids_padded
    propose: Callable[..., Any] = GPUModelRunner.propose_draft_token_ids
    if getattr(prepare, _MARK, False):
        return

    @functools.wraps(propose)
    def propose_draft_token_ids(self: Any, scheduler_output: Any, *args: Any, **kw: Any) -> Any:
        self.drafter.scheduled_tokens = scheduler_output.num_scheduled_tokens
        return propose(self, scheduler_output, *args, **kw)

    @functools.wraps(prepare)
    def prepare_next_token_ids_padded(
        self: Any, sampled_token_ids: Any, requests: Any, gpu_input_batch: Any, mask: Any
    ) -> Any:
        ends = gpu_input_batch.num_tokens_no_spec.copy()
        scheduled = getattr(self, "scheduled_tokens", {})
        for i, name in enumerate(gpu_input_batch.req_ids):
            end = int(gpu_input_batch.num_computed_tokens_cpu[i]) + scheduled.get(name, 0)
            if end < requests[name].num_tokens:
                ends[i] = end + 1
        batch = types.SimpleNamespace(
            num_reqs=gpu_input_batch.num_reqs,
            req_ids=gpu_input_batch.req_ids,
            vocab_size=gpu_input_batch.vocab_size,
            num_tokens_no_spec=ends,
        )
        return prepare(self, sampled_token_ids, requests, batch, mask)

    setattr(prepare_next_token_ids_padded, _MARK, True)
    SpecDecodeBaseProposer.prepare_next_token_ids_padded = prepare_next_token_ids_padded
    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids


def _draw_nothing_for_unfinished_prompts() -> None:
    """Leave the generator of a seeded request alone until its prompt is read.

    Why: while a prompt is prefilled in chunks, a token is drawn after each of them and thrown away,
    and the generator is set back by what such a draw takes of CUDA's. Those of a CPU have no such
    number: the engine died of a seeded request with a long prompt ("CPU Generator does not use
    offset"). Without its generator the row is drawn from the common one, which does no harm.
    Remove when: ``_bookkeeping_sync`` no longer calls ``set_offset``.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original: Callable[..., Any] = GPUModelRunner.sample_tokens
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        generators = self.input_batch.generators
        unfinished = self.discard_request_mask.np[: self.input_batch.num_reqs]
        aside = {i: generators.pop(i) for i in list(generators) if unfinished[i]}
        try:
            return original(self, grammar_output)
        finally:
            generators.update(aside)

    setattr(sample_tokens, _MARK, True)
    GPUModelRunner.sample_tokens = sample_tokens


def _show_counters_of_several_servers() -> None:
    """Add the plugin's counters where several API servers share their metrics.

    Why: with ``--api-server-count`` above 1, ``/metrics`` shows only what ``prometheus_client``
    finds in its own files; collectors of the process, such as the plugin's, are left out.
    Remove when: vLLM or prometheus_fastapi_instrumentator offers a place to add collectors.
    """
    from prometheus_client.multiprocess import MultiProcessCollector

    original: Callable[[Any], Iterable[Any]] = MultiProcessCollector.collect
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def collect(self: Any) -> Iterable[Any]:
        from .metrics_folder import FOLDER_VARIABLE

        yield from original(self)
        if os.environ.get(FOLDER_VARIABLE):
            from .kv_cache.metrics import KVCacheCollector
            from .spec_decode.metrics import DraftCollector

            yield from KVCacheCollector().collect()
            yield from DraftCollector().collect()

    setattr(collect, _MARK, True)
    MultiProcessCollector.collect = collect  # type: ignore[method-assign]


def _multiply_by_weights_as_they_lie() -> None:
    """Run layers without quantisation on ``dense_matmul`` where nothing compiles the model.

    Why: vLLM packs each weight for ``onednn_mm``, which is slow at few rows, cannot be called
    without Python, and makes a second copy of tied embeddings. Models that Inductor compiles keep
    vLLM's path: it fuses and packs by itself.
    Remove when: vLLM lets a platform choose the product of ``UnquantizedLinearMethod``.
    """
    from vllm.model_executor.layers import utils

    original: Callable[..., None] = utils.dispatch_cpu_unquantized_gemm
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        from .worker.cpu_linear import serve_layer

        if not serve_layer(layer):
            original(layer, remove_weight)

    setattr(dispatch_cpu_unquantized_gemm, _MARK, True)
    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm
