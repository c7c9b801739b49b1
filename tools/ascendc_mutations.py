"""Finds what can be broken in an AscendC kernel: the mutants of ``ascendc_mutants.py``.

The sources are read as text, with comments blanked: the kernels are in one style (clang-format, one
statement per line or call), and a parser of C++ would be a dependency for little. A mutant wraps
pieces of the text in calls of ``ascendc_mutant.h``, which break it when the environment names its
number; so one library, compiled once, holds all mutants of a kernel.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Kinds of mutants, and what each does.
SYNCHRONISATION = {
    "flag": "a SetFlag and its WaitFlag are removed",
    "barrier": "a PipeBarrier is removed",
    "cross_flag": "a CrossCoreSetFlag and its CrossCoreWaitFlag are removed",
    "sync_all": "a SyncAll is removed",
    "queue": "EnQue and DeQue of a queue hand the tensor on without their event",
    "free": "a FreeTensor is removed",
}
ADDRESSING = {
    "alignment": "a tensor begins one element later",
    "bound": "a loop's end, a copy's or an instruction's count is one more or one less",
    "stride": "a stride or gap of a copy is one more or one less",
}
KINDS = SYNCHRONISATION | ADDRESSING

_PREFIX = r"(?:AscendC::)?"
_TEMPLATE = r"(?:<(?P<template>[^<>;(){}]*)>)?"
_COPIES = r"DataCopyPad|DataCopy|LoadData|LoadDataWithTranspose|Fixpipe|Mmad"
_COUNTED = (
    r"Adds|Muls|Maxs|Mins|Add|Sub|Mul|Div|Max|Min|Exp|Ln|Abs|Cast|Duplicate|ReduceSum|ReduceMax|"
    r"Axpy|And|Or|ShiftRight|ShiftLeft|Gather|CreateVecIndex|Compare|CompareScalar|Compares|Select"
)
_BLOCK_TYPES = r"DataCopyParams|DataCopyExtParams"
_BOUND_FIELDS = "blockCount|blockLen|nValue|dValue|repeatTimes|nSize|mSize|m|n|k"
_STRIDE_FIELDS = "srcStride|dstStride|srcDValue|dstNzC0Stride|dstNzNStride|dstGap|dstFracGap"

#: The header that every file of a kernel with mutants includes.
HEADER = "ascendc_mutant.h"
HEADER_TEXT = r"""#pragma once
#include <cstdlib>
#include <deque>
#include <map>
#include <type_traits>
#include <utility>

#include "kernel_operator.h"

extern "C" __attribute__((visibility("default"))) inline int ascendc_mutant_reached = 0;

namespace ascendc_mutant {

/// The number of the mutant that this process tests.
inline const int chosen = [] {
  const char* text = std::getenv("ASCENDC_MUTANT");
  return text ? std::atoi(text) : -1;
}();

inline bool Off(int id) {
  if (id != chosen) return false;
  ascendc_mutant_reached = 1;
  return true;
}

/// A number, one more or one less when the mutant is on; anything else as it is.
template <class T>
auto Nudge(T&& value, int id, int change)
    -> std::conditional_t<std::is_integral_v<std::decay_t<T>>, std::decay_t<T>, T&&> {
  if constexpr (std::is_integral_v<std::decay_t<T>>) {
    return static_cast<std::decay_t<T>>(value + (Off(id) ? change : 0));
  } else {
    return std::forward<T>(value);
  }
}

/// Tensors that go around their queue.
inline std::map<const void*, std::deque<AscendC::LocalTensor<uint8_t>>> stash;

template <class Q, class T>
bool Put(Q& queue, const AscendC::LocalTensor<T>& tensor) {
  stash[&queue].push_back(tensor.template ReinterpretCast<uint8_t>());
  return true;
}

template <class T, class Q>
AscendC::LocalTensor<T> Take(Q& queue) {
  auto tensor = stash[&queue].at(0);
  stash[&queue].pop_front();
  return tensor.template ReinterpretCast<T>();
}

}  // namespace ascendc_mutant
"""


@dataclass(frozen=True, slots=True)
class Wrap:
    """Put ``before`` and ``after`` around characters ``start`` to ``end``; ``@`` is the number."""

    start: int
    end: int
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """One way to break a kernel.

    Attributes:
        kind: of :data:`KINDS`.
        path: the file, relative to the folder of the kernels.
        line: of the first change.
        what: the changed text, for people.
        wraps: what changes.
    """

    kind: str
    path: Path
    line: int
    what: str
    wraps: tuple[Wrap, ...]


def instrument(source: str, mutants: Sequence[tuple[int, Mutant]]) -> str:
    """Return the text of a file with mutants in it, each by its number.

    Wraps nest: two at the same place are in order of their numbers, the first outside.
    """
    pieces = []
    for number, mutant in mutants:
        for wrap in mutant.wraps:
            before, after = (text.replace("@", str(number)) for text in (wrap.before, wrap.after))
            pieces.append(((wrap.start, 1, -wrap.end, number), before))
            pieces.append(((wrap.end, 0, -wrap.start, -number), after))
    out, at = [], 0
    for key, text in sorted(pieces):
        out += [source[at : key[0]], text]
        at = key[0]
    # Errors of the compiler keep the lines of the original.
    return f'#include "{HEADER}"\n#line 1\n' + "".join(out) + source[at:]


@dataclass(frozen=True, slots=True)
class Call:
    """A call in the source: ``object.name<template>(arguments)``, without what follows it."""

    start: int
    end: int
    name: str
    template: str
    object: str
    arguments: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A file: its text, and the same with comments and literals blanked."""

    path: Path
    text: str
    code: str

    @classmethod
    def read(cls, root: Path, path: Path) -> Source:
        """Read a file below ``root``."""
        text = (root / path).read_text(encoding="utf-8")
        return cls(path, text, blank(text))

    def line(self, at: int) -> int:
        """Return the line of a position, from 1."""
        return self.text.count("\n", 0, at) + 1

    def mutant(self, kind: str, wraps: Iterable[Wrap], change: str) -> Mutant:
        """Make a mutant of this file."""
        ordered = tuple(sorted(wraps, key=lambda wrap: wrap.start))
        first = ordered[0]
        what = f"{self.text[first.start : first.end]}: {change}"
        return Mutant(kind, self.path, self.line(first.start), " ".join(what.split()), ordered)


def blank(text: str) -> str:
    """Replace comments, literals and preprocessor lines by spaces; positions and lines stay."""
    pattern = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|^[ \t]*#(?:[^\n\\]|\\.|\\\n)*"
    return re.sub(
        pattern,
        lambda match: re.sub(r"[^\n]", " ", match[0]),
        text,
        flags=re.DOTALL | re.MULTILINE,
    )


def files_of(root: Path, kernel: str) -> list[Path]:
    """Return a kernel's file and the headers of ``root`` that it includes, directly or not."""
    found: list[Path] = []
    waiting = [Path(f"{kernel}.cpp")]
    while waiting:
        path = waiting.pop(0)
        if path in found or not (root / path).is_file():
            continue
        found.append(path)
        text = (root / path).read_text(encoding="utf-8")
        waiting += [path.parent / name for name in re.findall(r'#include "([^"]+)"', text)]
    return found


def mutants_of(root: Path, kernel: str) -> list[Mutant]:
    """Return every mutant of a kernel, in order of kind, file and line."""
    sources = [Source.read(root, path) for path in files_of(root, kernel)]
    helpers: dict[str, Helper] = {}
    for source in sources:
        helpers |= _helpers(source)
    found: list[Mutant] = []
    for source in sources:
        found += _flags(source, helpers)
        found += _removals(source)
        found += _queues(source)
        found += _alignments(source)
        found += _bounds_and_strides(source)
    kinds = list(KINDS)
    return sorted(found, key=lambda each: (kinds.index(each.kind), str(each.path), each.line))


def calls(code: str, names: str) -> Iterator[Call]:
    """Yield the calls of functions whose name matches the expression ``names``."""
    pattern = rf"(?P<object>(?:[\w\[\]]+(?:\.|->))*)(?:template )?\b{_PREFIX}"
    pattern += rf"(?P<name>{names})\b{_TEMPLATE}\("
    for match in re.finditer(pattern, code):
        arguments, end = _arguments(code, match.end())
        yield Call(
            match.start(),
            end,
            match["name"],
            (match["template"] or "").strip(),
            re.sub(r"(\.|->)$", "", match["object"]),
            arguments,
        )


def _arguments(code: str, begin: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Split what follows an opening parenthesis at its commas; return also where it closes."""
    spans, depth, at, start = [], 0, begin, begin
    while depth >= 0 and at < len(code):
        character = code[at]
        depth += (character in "([{") - (character in ")]}")
        if depth < 0 or (depth == 0 and character == ","):
            if code[start:at].strip():
                spans.append(_trim(code, start, at))
            start = at + 1
        at += 1
    return tuple(spans), at


def _trim(code: str, start: int, end: int) -> tuple[int, int]:
    text = code[start:end]
    return start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())


def _statement(code: str, call: Call) -> Wrap | None:
    """Return what removes a call that is a statement of its own."""
    match = re.compile(r"\s*;").match(code, call.end)
    before = code[: call.start].rstrip()
    if match is None or (before and before[-1] not in ";{})"):
        return None
    return Wrap(call.start, match.end(), "{ if (!ascendc_mutant::Off(@)) { ", " } }")


@dataclass(frozen=True, slots=True)
class Helper:
    """A function that does nothing but synchronise: its calls are what is removed, not its body."""

    kind: str
    begin: int
    end: int


def _helpers(source: Source) -> dict[str, Helper]:
    """Return the functions that only synchronise."""
    found = {}
    for match in re.finditer(r"\b(\w+)\s*\([^(){};]*\)\s*\{([^{}]*)\}", source.code):
        body = [part.strip() for part in match[2].split(";") if part.strip()]
        flags = [part for part in body if re.match(rf"{_PREFIX}(Set|Wait)Flag\b", part)]
        barriers = [part for part in body if re.match(rf"{_PREFIX}PipeBarrier\b", part)]
        events = [part for part in body if "EventID" in part]
        whole = len(flags) + len(barriers) + len(events) == len(body)
        if whole and body and (barriers or len(flags) == 2):
            kind = "flag" if flags else "barrier"
            found[match[1]] = Helper(kind, match.start(2), match.end(2))
    return found


def _flags(source: Source, helpers: dict[str, Helper]) -> Iterator[Mutant]:
    """Pair flags by event and id, in order; one without a partner goes alone."""
    own = _helpers(source).values()
    for kind, prefix in (("flag", ""), ("cross_flag", "CrossCore")):
        waiting: dict[tuple[str, str], list[list[Wrap]]] = defaultdict(lambda: [[], []])
        for call in calls(source.code, f"{prefix}(?:Set|Wait)Flag"):
            wrap = _statement(source.code, call)
            if wrap is None or any(each.begin <= call.start < each.end for each in own):
                continue
            name = "".join(source.code[slice(*span)] for span in call.arguments)
            # Cross-core flags name the pipe only where they are set.
            key = (call.template if not prefix else "", name)
            waiting[key]["Wait" in call.name].append(wrap)
        for sets, waits in waiting.values():
            for at in range(max(len(sets), len(waits))):
                yield source.mutant(kind, sets[at : at + 1] + waits[at : at + 1], "removed")
    names = "|".join(sorted(helpers))
    for call in calls(source.code, names) if names else ():
        wrap = _statement(source.code, call)
        if wrap is not None:
            yield source.mutant(helpers[call.name].kind, [wrap], "removed")


def _removals(source: Source) -> Iterator[Mutant]:
    own = _helpers(source).values()
    names = {"PipeBarrier": "barrier", "SyncAll": "sync_all", "FreeTensor": "free"}
    for call in calls(source.code, "|".join(names)):
        wrap = _statement(source.code, call)
        inside = any(each.begin <= call.start < each.end for each in own)
        if wrap is not None and not inside:
            yield source.mutant(names[call.name], [wrap], "removed")


def _queues(source: Source) -> Iterator[Mutant]:
    """Replace every EnQue and DeQue of one queue by a hand-over without an event.

    A queue that a function got as an argument has two names; those of which a file has only one
    side are taken together.
    """
    sites: dict[str, list[Wrap]] = defaultdict(list)
    for call in calls(source.code, "EnQue|DeQue"):
        inner = "".join(source.text[slice(*span)] for span in call.arguments)
        if call.name == "EnQue":
            broken = f"ascendc_mutant::Put({call.object}, {inner})"
        else:
            broken = f"ascendc_mutant::Take<{call.template}>({call.object})"
        before = f"(ascendc_mutant::Off(@) ? {broken} : "
        sites[call.object].append(Wrap(call.start, call.end, before, ")"))
    sided = {name: {"Put(" in wrap.before for wrap in wraps} for name, wraps in sites.items()}
    halves = [name for name in sites if len(sided[name]) == 1]
    groups = [[name] for name in sites if name not in halves] + ([halves] if halves else [])
    for names in groups:
        wraps = [wrap for name in names for wrap in sites[name]]
        yield source.mutant("queue", wraps, f"no event from EnQue to DeQue of {', '.join(names)}")


def _alignments(source: Source) -> Iterator[Mutant]:
    """Move each tensor that a copy or an instruction is given at an offset."""
    seen: set[int] = set()
    for call in calls(source.code, f"{_COPIES}|{_COUNTED}|WholeReduceMax|WholeReduceSum"):
        for start, end in call.arguments:
            match = re.match(r"[\w.]+(?:\(\))?\[", source.code[start:end])
            opening = start + match.end() if match else 0
            if opening and opening not in seen:
                seen.add(opening)
                _, closing = _arguments(source.code, opening)
                yield source.mutant("alignment", [_nudge(opening, closing - 1, "+ 1")], "+ 1")


def _bounds_and_strides(source: Source) -> Iterator[Mutant]:
    for start, end in _loop_ends(source.code):
        yield from _one_off(source, "bound", start, end)
    for call in calls(source.code, f"DataCopy|{_COUNTED}"):
        if len(call.arguments) > 1 and not _is_structure(source.code, call):
            yield from _one_off(source, "bound", *call.arguments[-1])
    for call in calls(source.code, rf"(?:{_BLOCK_TYPES})(?: \w+)?"):
        single = source.text[slice(*call.arguments[0])] == "1" if call.arguments else False
        for at, span in enumerate(call.arguments[: 2 if single else 4]):  # one block has no gap
            yield from _one_off(source, "bound" if at < 2 else "stride", *span)
    for kind, fields in (("bound", _BOUND_FIELDS), ("stride", _STRIDE_FIELDS)):
        for match in re.finditer(rf"\.(?:{fields}) = ([^;{{}}]+);", source.code):
            yield from _one_off(source, kind, match.start(1), match.end(1))


def _loop_ends(code: str) -> Iterator[tuple[int, int]]:
    """Yield the right sides of ``i < n`` in the heads of loops."""
    for match in re.finditer(r"\bfor \([^;]*;[^;]*? <=? ([^;]+?)(?: &&[^;]*)?;", code):
        yield match.start(1), match.end(1)


def _is_structure(code: str, call: Call) -> bool:
    """Say whether the last argument is no count: a structure, or a mode."""
    text = code[slice(*call.arguments[-1])]
    if re.match(r"\w*(?:Params|Info|Mode|MODE)\b|\{", text) or "::" in text.split("(")[0]:
        return True
    declared = rf"\w*Params(?:<\w+>|V\d+)?&? {re.escape(text)}\b" if text.isidentifier() else "$^"
    return re.search(declared, code) is not None


def _one_off(source: Source, kind: str, start: int, end: int) -> Iterator[Mutant]:
    """Yield the mutants in which an expression is one more, and one less."""
    text = source.text[start:end]
    if re.fullmatch(r"(?:const )?[\w:<>]+[&*]? \w+", text):
        return  # a parameter: a function of that name is declared here
    for change in ("+ 1", "- 1"):
        if text == "0" and change == "- 1":
            continue  # no such gap, and as an unsigned number no such count
        yield source.mutant(kind, [_nudge(start, end, change)], change)


def _nudge(start: int, end: int, change: str) -> Wrap:
    return Wrap(start, end, "ascendc_mutant::Nudge(", f", @, {change})")
