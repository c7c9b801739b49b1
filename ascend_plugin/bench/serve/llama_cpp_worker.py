"""llama.cpp in one process: ``python -m ascend_plugin.bench.serve.llama_cpp_worker``.

It is called through the C interface that llama-cpp-python binds: its high-level class decodes one
sequence at a time.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ascend_plugin.bench.serve import messages
from ascend_plugin.bench.serve.answering import answer_commands

#: llama.cpp rounds the length of a sequence up to this.
_LENGTH_MULTIPLE = 256


class Engine:
    """A model, and a cache with a stream of its own for each sequence."""

    def __init__(self, command: messages.LoadGguf) -> None:
        """Load the model and allocate the cache.

        Raises:
            SystemExit: llama.cpp refuses the file, or it does not know the prompts' tokens.
        """
        import llama_cpp

        self._lib: Any = llama_cpp
        self._lib.llama_backend_init()
        parameters = self._lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(command.path.encode(), parameters)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {command.path}: choose another --gguf.")
        vocabulary = self._lib.llama_model_get_vocab(self._model)
        self._vocabulary = int(self._lib.llama_vocab_n_tokens(vocabulary))
        if self._vocabulary < command.vocabulary:
            raise SystemExit(
                f"{command.path} has {self._vocabulary} token ids and the prompts are drawn from "
                f"{command.vocabulary}: choose the --gguf of the same model as --model."
            )
        self._context = self._make_context(command)
        self._step_tokens = command.max_num_batched_tokens
        self._batch = self._lib.llama_batch_init(self._step_tokens, 0, 1)
        self._tokens: list[list[int]] = []
        self._lengths: list[int] = []

    def _make_context(self, command: messages.LoadGguf) -> Any:
        """Return a context with flash attention and a cache of float16."""
        lib = self._lib
        parameters = lib.llama_context_default_params()
        length = -(-command.max_model_len // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        parameters.n_ctx = length * command.max_num_seqs
        parameters.n_seq_max = command.max_num_seqs
        # One buffer for all sequences would make each of them look at the others' tokens.
        parameters.kv_unified = False
        parameters.n_batch = command.max_num_batched_tokens
        parameters.n_threads = parameters.n_threads_batch = command.threads
        parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.type_k = parameters.type_v = lib.GGML_TYPE_F16
        context = lib.llama_init_from_model(self._model, parameters)
        if not context:
            raise SystemExit(
                f"llama.cpp cannot allocate {parameters.n_ctx} tokens for {command.path}: lower "
                "--batch or --context."
            )
        return context

    def describe(self, seconds: float) -> messages.Loaded:
        """Return what runs."""
        return messages.Loaded(
            platform=f"llama_cpp {self._lib.__version__}",
            attention=["flash attention, float16 cache"],
            execution="llama_decode",
            kernels=self._lib.llama_print_system_info().decode().strip(),
            threads=int(self._lib.llama_n_threads(self._context)),
            seconds=round(seconds, 1),
        )

    def prefill(self, command: messages.Prefill) -> messages.Prefilled:
        """Run the prompts one after the other; each ends with its first token."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._tokens, self._lengths, first = [], [], []
        start = time.perf_counter()
        for sequence, prompt in enumerate(command.prompts):
            for begin in range(0, len(prompt), self._step_tokens):
                chunk = prompt[begin : begin + self._step_tokens]
                end = begin + len(chunk)
                for row, token in enumerate(chunk):
                    last = begin + row + 1 == len(prompt)
                    self._put(row, token, begin + row, sequence, last)
                self._run(len(chunk))
            self._lengths.append(end)
            self._tokens.append([self._best(len(chunk) - 1)])
            first.append(time.perf_counter() - start)
        return messages.Prefilled(first)

    def decode(self, command: messages.Decode) -> messages.Decoded:
        """Run steps of all sequences together, each with its likeliest token."""
        start = time.perf_counter()
        for _ in range(command.steps):
            for sequence, tokens in enumerate(self._tokens):
                self._put(sequence, tokens[-1], self._lengths[sequence], sequence, True)
                self._lengths[sequence] += 1
            self._run(len(self._tokens))
            for sequence, tokens in enumerate(self._tokens):
                tokens.append(self._best(sequence))
        return messages.Decoded(time.perf_counter() - start)

    def finish(self) -> messages.Finished:
        """Return what was generated."""
        return messages.Finished(self._tokens)

    def _put(self, row: int, token: int, position: int, sequence: int, logits: bool) -> None:
        batch = self._batch
        batch.token[row] = token
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = logits

    def _run(self, rows: int) -> None:
        self._batch.n_tokens = rows
        status = self._lib.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode of {rows} tokens returned {status}")

    def _best(self, row: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())


class Worker:
    """Runs commands in order."""

    def __init__(self) -> None:
        """Wait for ``LoadGguf``."""
        self._engine: Engine | None = None

    def run(self, command: messages.Command) -> messages.Answer:
        """Return the answer to one command."""
        if isinstance(command, messages.LoadGguf):
            start = time.perf_counter()
            self._engine = Engine(command)
            return self._engine.describe(time.perf_counter() - start)
        assert self._engine is not None, "the first command must be LoadGguf"
        if isinstance(command, messages.Prefill):
            return self._engine.prefill(command)
        if isinstance(command, messages.Decode):
            return self._engine.decode(command)
        assert isinstance(command, messages.Finish), f"{command} is not for llama.cpp"
        return self._engine.finish()


if __name__ == "__main__":
    answer_commands(Worker().run)
