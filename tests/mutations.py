"""Finds what to break in a kernel file, and writes the file with all of these faults in it, asleep.

A fault wakes when the program is told its number: so one build holds them all. In the bodies of device functions:

    barrier   __syncthreads, __syncwarp, a named barrier, a fence, a wait for an mbarrier: gone
    copy      cp.async or wgmma: a commit gone, a wait that lets one group more be in flight
    guard     a comparison, or a name that stands for one, taken for what lets everything pass: false in a || b and
              where what follows leaves, else true; of an `if` that does not leave, either. Not equalities, nor what
              ends a loop
    clamp     min(a, b) or max(a, b): only a, or only b

Edits only insert text, so that faults may lie within each other.
"""

import re
import zlib
from collections import Counter
from dataclasses import dataclass

TOKEN = re.compile(r"\w+|::|->|&&|\|\||[-+*/%&|^=!<>]=|<<|>>|\+\+|--|\S")
DEVICE = {"__global__", "__device__", "PTX_FN"}
GONE = re.compile(
    r"(?P<barrier>__sync(threads|warp)|__threadfence(_\w+)?|barrier_\w+|mbarrier_wait|(wgmma_)?fence(_\w+)?)"
    r"|(?P<copy>(cp_async|wgmma)_commit)"
)
WAITS = {"cp_async_wait", "wgmma_wait"}
CLOSES = {"(": ")", "[": "]", "{": "}"}
ENDS = {"&&", "||", ";", ",", "?", ":", "=", "+=", "-=", "|=", "&=", "return"}  # of an operand of && || ?:
LEAVES = {"return", "continue", "break"}


@dataclass(frozen=True)
class Mutant:
    file: str
    kind: str
    was: str  # the text that changes
    becomes: str
    line: int
    text: str  # of the line
    number: int  # stays while the line does, wherever it moves
    edits: tuple  # (place, order, text to insert)

    def __str__(self):
        return f"{self.file}:{self.line} {self.kind}: {self.was} -> {self.becomes}"


def instrumented(source, mutants):
    """The text with all these mutants in it, asleep."""
    pieces, at = ['#include "cuda/mutant.h"\n#line 1\n'], 0
    for place, _, text in sorted(edit for m in mutants for edit in m.edits):
        pieces += [source[at:place], text]
        at = place
    return "".join(pieces) + source[at:]


def find(file, source):
    """The mutants of a file's text, in the order of their places."""
    return Finder(file, source).found


class Finder:
    def __init__(self, file, source):
        self.file, self.source, self.found, self.times = file, source, [], Counter()
        blank = re.sub(  # comments, strings and preprocessor lines
            r'//[^\n]*|"(?:\\.|[^"\\\n])*"|^[ \t]*#[^\n]*', lambda m: " " * len(m[0]), source, flags=re.M
        )
        matches = list(TOKEN.finditer(blank))
        self.tokens, self.places = [m[0] for m in matches], [m.span() for m in matches]
        self.pair, open_ = {}, []  # bracket <-> its other
        self.around = []  # of each token, the bracket that is open there
        for i, token in enumerate(self.tokens):
            if token in CLOSES.values():
                other = open_.pop()
                self.pair[i], self.pair[other] = other, i
            self.around.append(open_[-1] if open_ else None)
            if token in CLOSES:
                open_.append(i)
        end = 0
        for i, token in enumerate(self.tokens):
            if token in DEVICE and i >= end:
                start = self.next(i, {"{", ";"})
                if self.tokens[start] == "{":
                    end = self.pair[start]
                    self.search(start + 1, end)

    def next(self, i, wanted):
        """The first of the wanted tokens from i on, at the depth of i."""
        while self.tokens[i] not in wanted:
            i = self.pair[i] + 1 if self.tokens[i] in CLOSES else i + 1
        return i

    def text(self, first, last):
        return " ".join(self.source[self.places[first][0] : self.places[last - 1][1]].split())

    def add(self, kind, first, last, becomes, before, after):
        """A mutant of the tokens first .. last; %s of `before` says whether it is awake."""
        start, end = self.places[first][0], self.places[last - 1][1]
        line = self.source.count("\n", 0, start)
        key = (self.file, self.source.splitlines()[line].strip(), self.text(first, last), becomes)
        self.times[key] += 1
        number = zlib.crc32(repr((*key, self.times[key])).encode())
        # of edits at one place, the wider mutant's is the outer one, then the later
        edits = (
            (start, (start - end, number), before % f"::kimi::mutant({number}u)"),
            (end, (end - start, -number), after),
        )
        self.found.append(Mutant(self.file, kind, key[2], becomes, line + 1, key[1], number, edits))

    def search(self, start, end):
        terms = set()
        for i in range(start, end):
            token, after = self.tokens[i], self.tokens[i + 1]
            first = i - 2 if self.tokens[i - 1] == "::" else i
            if after == "(" and (gone := GONE.fullmatch(token)):
                self.add(gone.lastgroup, first, self.pair[i + 1] + 1, "nothing", "(%s ? void() : void(", "))")
            elif token in WAITS:
                last = self.next(i, {"("})
                loose = f"{self.text(first, i + 2)}({self.text(i + 2, last - 1)}) + 1>()"
                self.add("copy", first, last + 2, loose, f"(%s ? {loose} : ", ")")
            elif token in ("min", "max") and after == "(":
                for argument in self.arguments(i + 1):
                    if not re.fullmatch(r"[\d~u]+", argument):
                        self.add("clamp", i, self.pair[i + 1] + 1, argument, f"(%s ? ({argument}) : ", ")")
            elif self.compares(i) or token in ("&&", "||", "?"):
                terms.add(self.operand(i - 1))
                if token in ("&&", "||"):
                    terms.add(self.operand(i + 1))
            elif token == "if" and after == "(":
                terms.add(self.operand(self.pair[i + 1] - 1))
        for first, last in sorted(terms):
            for value in self.values(first, last):
                self.add("guard", first, last, value, "(%s || (" if value == "true" else "(!%s && (", "))")

    def arguments(self, opening):
        first, close = opening + 1, self.pair[opening]
        while first < close:
            last = self.next(first, {",", ")"})
            yield self.text(first, last)
            first = last + 1

    def compares(self, i):
        """Whether token i is a comparison of order. The brackets of a template have no spaces around them."""
        start, end = self.places[i]
        return self.tokens[i] in ("<", "<=", ">", ">=") and self.source[start - 1] + self.source[end] in ("  ", " \n")

    def operand(self, i):
        """(first, last) of the operand of && || ?: in which token i is."""
        first = self.pair[i] if self.tokens[i] in (")", "]") else i
        while self.tokens[first - 1] not in (ENDS | {"(", "[", "{", "}"}):
            first = self.pair[first - 1] if self.tokens[first - 1] in (")", "]") else first - 1
        last = self.pair[i] if self.tokens[i] in ("(", "[") else i
        while self.tokens[last + 1] not in (ENDS | {")", "]", "}", "{"}):
            last = self.pair[last + 1] if self.tokens[last + 1] in ("(", "[") else last + 1
        return first, last + 1

    def values(self, first, last):
        """What to take the term for, if it is one that guards something."""
        tokens, before, after = self.tokens[first:last], self.tokens[first - 1], self.tokens[last]
        opening = self.around[first]
        keyword = self.tokens[opening - 1]
        statement = first
        while self.tokens[statement - 1] not in (";", "{", "}"):
            statement -= 1
        declared = self.tokens[statement + (self.tokens[statement] == "static")]
        if {declared, keyword, self.tokens[opening - 2]} & {"constexpr", "static_assert"}:
            return ()
        compares = any(self.compares(i) and self.around[i] == opening for i in range(first, last))
        name = re.fullmatch(r"!?[a-z]\w*((\.|->)\w+|\[.*\])*", "".join(tokens))
        joined = {before, after} & {"&&", "||"}
        condition = keyword == "if" and self.tokens[opening] == "("
        if not compares and not (name and (joined or after == "?" or condition)):
            return ()
        if condition:
            close = self.pair[opening]
            body = close + 1 + (self.tokens[close + 1] == "{")
            if self.tokens[body] in LEAVES:
                return ("false",)
            if not joined and after != "?":
                return ("true", "false")
        if keyword in ("for", "while") and not joined:
            return ()
        return ("false",) if joined == {"||"} else ("true",)
