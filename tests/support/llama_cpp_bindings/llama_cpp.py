"""Stands for llama-cpp-python, whose building takes CI too long: the functions that are called.

Its model's next token depends on every token of the sequence with its position, so that a token of
another sequence, at another position or twice shows. Put this folder on ``PYTHONPATH``.
"""

import ctypes
from types import SimpleNamespace

__version__ = "0.0.0"
LLAMA_FLASH_ATTN_TYPE_ENABLED = 1
GGML_TYPE_F16 = 1
VOCABULARY = 97

_Logits = ctypes.c_float * VOCABULARY


def next_token(tokens):
    """Return what follows the tokens of a sequence."""
    return sum((position + 3) * token for position, token in enumerate(tokens)) % VOCABULARY


def llama_backend_init():
    pass


def llama_model_default_params():
    return SimpleNamespace(n_gpu_layers=-1)


def llama_model_load_from_file(path, parameters):
    assert parameters.n_gpu_layers == 0
    with open(path, "rb") as file:
        return SimpleNamespace() if file.read(4) == b"GGUF" else None


def llama_model_get_vocab(model):
    return model


def llama_vocab_n_tokens(vocabulary):
    return VOCABULARY


def llama_context_default_params():
    return SimpleNamespace(n_ctx=512, n_batch=2048, n_seq_max=1, kv_unified=True)


def llama_init_from_model(model, parameters):
    assert parameters.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_ENABLED
    assert parameters.type_k == parameters.type_v == GGML_TYPE_F16
    assert not parameters.kv_unified
    return SimpleNamespace(parameters=parameters, sequences={}, logits={})


def llama_n_threads(context):
    assert context.parameters.n_threads == context.parameters.n_threads_batch
    return context.parameters.n_threads


def llama_print_system_info():
    return b"CPU : NONE = 1"


def llama_get_memory(context):
    return context


def llama_memory_clear(memory, data):
    memory.sequences.clear()


def llama_batch_init(tokens, embedding, sequences):
    return SimpleNamespace(
        n_tokens=0,
        token=[0] * tokens,
        pos=[0] * tokens,
        n_seq_id=[0] * tokens,
        seq_id=[[0] * sequences for _ in range(tokens)],
        logits=[False] * tokens,
    )


def llama_decode(context, batch):
    if batch.n_tokens > context.parameters.n_batch:
        return -1
    room = context.parameters.n_ctx // context.parameters.n_seq_max
    context.logits = {}
    for row in range(batch.n_tokens):
        assert batch.n_seq_id[row] == 1
        tokens = context.sequences.setdefault(batch.seq_id[row][0], [])
        if batch.pos[row] != len(tokens) or len(tokens) == room:
            return 1
        tokens.append(batch.token[row])
        if batch.logits[row]:
            logits = _Logits()
            logits[next_token(tokens)] = 1.0
            context.logits[row] = logits
    return 0


def llama_get_logits_ith(context, row):
    return ctypes.cast(context.logits[row], ctypes.POINTER(ctypes.c_float))
