"""Reads a compiled program: its kernels, the bytes they move and its collectives.

The input is the text of an XLA program after all optimizations, as `compiled.as_text()`
returns it. Every instruction that is not free or control flow is a kernel, a fusion is
one. A kernel moves its distinct operands and its results, each once:

- Of an operand that a kernel only slices or gathers from, the part that is read counts.
- Of a result that is updated in place, the update counts.
- On TPUs, copies between the memories are kernels, and arrays in the core's own memory
  ("S(1)" in a layout) move no bytes.

Bytes are those of the elements, without the padding of tiles.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator

# Instructions without a kernel: names, views and tuples of arrays, ends of asynchronous
# instructions.
_FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
}
# Instructions that run a computation once: "call" is how XLA writes a CUDA graph.
_CALLS = {"call", "async-start"}
# Custom calls that only reserve or rename memory.
_FREE_CALLS = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')
# Asynchronous copies: their results are the operand, the copy and a token, in an order
# that differs.
_COPIES = {"copy-start": 0, "slice-start": 1, "dynamic-slice-start": 1}
# Their first operand is read only where the result comes from.
_READS = {"dynamic-slice", "gather", "slice"}
# Instructions that replace a part of their first operand: the operand of the new part.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# The same array under another shape or type.
_VIEWS = {"bitcast", "reshape"}

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^{}]*\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_HEADER = re.compile(r"(ENTRY )?%?(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"(ROOT )?%?(\S+) = (.*)")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ON_CHIP = "S(1)"


@dataclasses.dataclass(frozen=True)
class Array:
    """Describes an array, or a part of one.

    Attributes:
      elements: their number.
      bits: of an element.
      on_chip: whether it is in the memory of a TPU core.
      whole: elements of the whole array.
    """

    elements: int
    bits: int
    on_chip: bool
    whole: int

    @property
    def bytes(self) -> int:
        """The bytes that reading it moves."""
        return 0 if self.on_chip else -(-self.elements * self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Holds what kernels cost.

    Attributes:
      kernels: their number.
      bytes: that they read and write.
      passes: reads and writes of arrays of at least `full_size` elements, where a part
        of an array counts as that fraction; 0 if no size was given.
      collectives: all-reduces and other exchanges between devices; they are not among
        the kernels.
    """

    kernels: int = 0
    bytes: int = 0
    passes: float = 0
    collectives: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Returns the sum of each number."""
        return Counts(
            self.kernels + other.kernels,
            self.bytes + other.bytes,
            self.passes + other.passes,
            self.collectives + other.collectives,
        )

    def __mul__(self, number: int) -> "Counts":
        """Returns `number` times each number."""
        return Counts(
            self.kernels * number,
            self.bytes * number,
            self.passes * number,
            self.collectives * number,
        )


@dataclasses.dataclass(frozen=True)
class Block:
    """Holds the counts of a sequence of kernels, and of the loops and branches in it.

    Attributes:
      counts: of the kernels outside loops and branches.
      loops: (number of iterations, body) of each loop; the number is None if the
        compiler does not know it. A loop's condition is not counted.
      branches: the alternatives of each conditional.
    """

    counts: Counts
    loops: tuple[tuple[int | None, "Block"], ...] = ()
    branches: tuple[tuple["Block", ...], ...] = ()

    def total(self) -> Counts:
        """Returns the counts with all iterations and the dearest branches.

        A loop of unknown length counts as one iteration. The dearest branch is the one
        that moves most bytes.
        """
        total = self.counts
        for trips, body in self.loops:
            total += body.total() * (1 if trips is None else trips)
        for alternatives in self.branches:
            totals = [block.total() for block in alternatives]
            total += max(totals, key=lambda counts: (counts.bytes, counts.kernels))
        return total

    def parts(self, name: str = "entry") -> Iterator[tuple[str, Counts]]:
        """Yields the name and the counts of this block and of all blocks in it."""
        yield name, self.counts
        for i, (trips, body) in enumerate(self.loops):
            number = "?" if trips is None else trips
            prefix = "" if name == "entry" else f"{name}, "
            yield from body.parts(f"{prefix}loop {i + 1} ×{number}")
        for i, alternatives in enumerate(self.branches):
            for j, block in enumerate(alternatives):
                prefix = "" if name == "entry" else f"{name}, "
                yield from block.parts(f"{prefix}conditional {i + 1} branch {j}")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    # A parameter's number, or a constant, as text.
    arguments: str
    attributes: str
    is_root: bool

    def called(self, *keys: str) -> tuple[str, ...]:
        """Returns the names of computations under these attributes, in their order."""
        names: list[str] = []
        for key in keys:
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
            if match:
                names += _NAME.findall(match[1])
        return tuple(names)


# The instructions of a computation, by name.
_Instructions = dict[str, _Instruction]


def read(text: str, full_size: int | None = None) -> Block:
    """Returns the counts of a compiled program.

    Args:
      text: of the program.
      full_size: elements of an array whose reads and writes are counted as passes.

    Raises:
      ValueError: the text has no entry computation.

    >>> block = read('''
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   %x = f32[8]{0} parameter(0)
    ...   ROOT %sine = f32[8]{0} sine(%x)
    ... }
    ... ''', full_size=8)
    >>> block.counts
    Counts(kernels=1, bytes=64, passes=2.0, collectives=0)
    """
    return _Reader(text, full_size).block()


class _Reader:
    """Holds the computations of a program, by name."""

    def __init__(self, text: str, full_size: int | None):
        self._full_size = full_size
        self._computations: dict[str, _Instructions] = {}
        self._entry = ""
        instructions: _Instructions = {}
        for line in text.splitlines():
            line = _COMMENT.sub("", line).strip()
            header = _HEADER.fullmatch(line)
            if header:
                instructions = self._computations[header[2]] = {}
                if header[1]:
                    self._entry = header[2]
            elif match := _INSTRUCTION.fullmatch(line):
                instruction = _parse(*match.groups())
                instructions[instruction.name] = instruction
        if not self._entry:
            raise ValueError("the text has no ENTRY computation: is it compiled HLO?")
        self._num_read = functools.cache(self._find_num_read)

    def block(self, name: str = "") -> Block:
        """Returns the counts of a computation; of the entry by default."""
        counts = Counts()
        loops: list[tuple[int | None, Block]] = []
        branches: list[tuple[Block, ...]] = []
        instructions = self._computations[name or self._entry]
        for instruction in instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                trips = _TRIPS.search(instruction.attributes)
                (body,) = instruction.called("body")
                loops.append((int(trips[1]) if trips else None, self.block(body)))
            elif opcode == "conditional":
                names = instruction.called(
                    "branch_computations", "false_computation", "true_computation"
                )
                branches.append(tuple(self.block(branch) for branch in names))
            elif opcode in _CALLS:
                (callee,) = instruction.called("to_apply", "calls")
                called = self.block(callee)
                counts += called.counts
                loops += called.loops
                branches += called.branches
            else:
                counts += self._instruction_counts(instruction, instructions)
        return Block(counts, tuple(loops), tuple(branches))

    def _instruction_counts(
        self, instruction: _Instruction, instructions: _Instructions
    ) -> Counts:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return Counts()
        if opcode.removesuffix("-start") in _COLLECTIVES:
            return Counts(collectives=1)
        if _FREE_CALLS.search(instruction.attributes):
            return Counts()
        arrays = self._traffic(instruction, instructions)
        passes = 0.0
        if self._full_size:
            for array in arrays:
                if array.bytes and array.whole >= self._full_size:
                    passes += array.elements / array.whole
        return Counts(
            kernels=1,
            bytes=sum(array.bytes for array in arrays),
            passes=passes,
            collectives=self._collectives_inside(instruction),
        )

    def _collectives_inside(self, instruction: _Instruction) -> int:
        """Returns the number of collectives that are fused into a kernel."""
        total = 0
        for name in instruction.called("calls"):
            for inner in self._computations[name].values():
                total += inner.opcode.removesuffix("-start") in _COLLECTIVES
                total += self._collectives_inside(inner)
        return total

    def _traffic(
        self, instruction: _Instruction, instructions: _Instructions
    ) -> list[Array]:
        """Returns the arrays, or parts of arrays, that a kernel reads and writes."""
        parts_read: dict[str, list[Array]] = {}
        for number, operand in enumerate(instruction.operands):
            arrays = instructions[operand].results if operand in instructions else ()
            elements = self._num_read_of_operand(instruction, number, instructions)
            # A tuple as an operand, which is rare, is read as a whole.
            parts = list(arrays)
            if elements is not None:
                parts = [_part(array, elements) for array in arrays]
            # An operand that appears twice is read as far as its largest part.
            previous = parts_read.get(operand, [])
            if _num_elements(parts) >= _num_elements(previous):
                parts_read[operand] = parts
        written = self._written(instruction, instructions)
        return [*itertools.chain.from_iterable(parts_read.values()), *written]

    def _num_read_of_operand(
        self, instruction: _Instruction, number: int, instructions: _Instructions
    ) -> int | None:
        """Returns how many elements of an operand are read; None for all of them."""
        opcode = instruction.opcode
        if opcode in _COPIES and number == 0:
            return instruction.results[_COPIES[opcode]].elements
        if opcode in _READS and number == 0:
            return _num_elements(instruction.results)
        if opcode in _UPDATES and number == 0:
            # The new part replaces the old one; a scatter reads the old one first.
            if opcode == "dynamic-update-slice":
                return 0
            update = instruction.operands[_UPDATES[opcode]]
            return _num_elements(instructions[update].results)
        if opcode == "fusion":
            (computation,) = instruction.called("calls")
            return self._num_read(computation, number)
        return None

    def _find_num_read(self, computation: str, number: int) -> int | None:
        """Returns how many elements of a parameter a fusion reads; None for all."""
        instructions = self._computations[computation]
        names = {
            name
            for name, instruction in instructions.items()
            if instruction.opcode == "parameter"
            and int(instruction.arguments) == number
        }
        total = 0
        # Definitions come before uses, so one pass finds the views of views, too.
        for name, instruction in instructions.items():
            for position, operand in enumerate(instruction.operands):
                if operand not in names:
                    continue
                if instruction.opcode in _VIEWS and not instruction.is_root:
                    names.add(name)
                    continue
                elements = self._num_read_of_operand(
                    instruction, position, instructions
                )
                if elements is None:
                    return None
                total += elements
        return total

    def _written(
        self, instruction: _Instruction, instructions: _Instructions
    ) -> list[Array]:
        """Returns the results of a kernel, or the parts that it writes."""
        results = list(instruction.results)
        if instruction.opcode in _COPIES:
            return [results[_COPIES[instruction.opcode]]]
        if instruction.opcode in _UPDATES:
            update = instruction.operands[_UPDATES[instruction.opcode]]
            return list(instructions[update].results)
        if instruction.opcode != "fusion":
            return results
        (computation,) = instruction.called("calls")
        inner = self._computations[computation]
        (root,) = [item for item in inner.values() if item.is_root]
        outputs = [root]
        if root.opcode == "tuple":
            outputs = [inner[name] for name in root.operands]
        if len(outputs) != len(results):
            return results
        written = []
        for result, output in zip(results, outputs):
            while output.opcode in _VIEWS:
                output = inner[output.operands[0]]
            if output.opcode in _UPDATES:
                new_part = inner[output.operands[_UPDATES[output.opcode]]]
                result = _part(result, _num_elements(new_part.results))
            written.append(result)
        return written


def _parse(root: str | None, name: str, definition: str) -> _Instruction:
    """Returns the instruction of a line, without the comments in it."""
    shape, rest = _split_shape(definition)
    opcode, _, rest = rest.partition("(")
    end = _closing(rest, 1)
    arguments = rest[: end - 1]
    return _Instruction(
        name=name,
        opcode=opcode.strip(),
        results=tuple(_arrays(shape)),
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments,
        attributes=rest[end:],
        is_root=bool(root),
    )


def _split_shape(definition: str) -> tuple[str, str]:
    """Returns the shape, which may be a tuple, and the rest of a definition."""
    if definition.startswith("("):
        end = _closing(definition[1:], 1) + 1
        return definition[:end], definition[end:].lstrip()
    shape, _, rest = definition.partition(" ")
    return shape, rest


def _closing(text: str, depth: int) -> int:
    """Returns the position after the parenthesis that closes `depth` open ones."""
    for position, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return position + 1
    raise ValueError(f"a parenthesis is not closed: {text[:80]!r}")


def _arrays(shape: str) -> Iterator[Array]:
    """Yields the arrays of a shape, such as `(f32[8]{0}, pred[8]{0})`."""
    for dtype, sizes, layout in _ARRAY.findall(shape):
        elements = 1
        for size in filter(None, sizes.split(",")):
            elements *= int(size)
        yield Array(elements, _bits(dtype), _ON_CHIP in layout, elements)


def _bits(dtype: str) -> int:
    """Returns the bits of an element.

    >>> [_bits(name) for name in ("f32", "bf16", "pred", "f8e4m3fn", "c64", "token")]
    [32, 16, 8, 8, 64, 0]
    """
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


def _num_elements(arrays: Iterable[Array]) -> int:
    return sum(array.elements for array in arrays)


def _part(array: Array, elements: int) -> Array:
    return dataclasses.replace(array, elements=min(elements, array.elements))
