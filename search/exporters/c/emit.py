"""The text of NAME.h and NAME.c."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from search.exporters.c.fast import plan_fast
from search.exporters.c.literals import Constants, as_input, as_output, float_text, scalars, type_of
from search.exporters.c.memory import cache_lines, lay_out, rounded
from search.exporters.c.network import (
    Conv,
    Copy,
    Network,
    Operation,
    Part,
    Pool,
    Product,
    Relu,
    Sum,
    Value,
)

STATE_BYTES = 64  # of an x86 build: which kernels are in use


@dataclass(frozen=True, slots=True)
class Source:
    """Generated text, and the memory that it claims.

    Attributes:
        ram_bytes: static memory of the portable build.
        x86_ram_bytes: of a build with x86 kernels, repacked weights included.
        constant_bytes: of all constant arrays (alignment between them apart).
    """

    header: str
    code: str
    ram_bytes: int
    x86_ram_bytes: int
    constant_bytes: int


def emit(network: Network, name: str) -> Source:
    """C source of `network`; every public name begins with `name`."""
    return _Emitter(network, name).source()


@dataclass
class _Emitter:
    network: Network
    name: str
    constants: Constants = field(default_factory=Constants)
    body: list[str] = field(default_factory=list)
    repacking: list[str] = field(default_factory=list)

    def source(self) -> Source:
        layout = lay_out(self.network)
        self.offsets = layout.offsets
        convs = [op for op in self.network.operations if isinstance(op, Conv)]
        row_bytes = max((2 * c.row_length for c in convs), default=0)
        self.row_at = rounded(layout.n_bytes)
        ram = rounded(self.row_at + row_bytes)
        self.fast = plan_fast(self.network)
        padded = max((f.padded_bytes for f in self.fast.values()), default=0)
        self.padded_at = cache_lines(ram)
        at = cache_lines(self.padded_at + padded)
        self.fast_at = {}
        for index, plan in self.fast.items():
            self.fast_at[index] = at
            at += plan.n_bytes
        state_at = at
        x86_ram = state_at + STATE_BYTES
        for index, operation in enumerate(self.network.operations):
            self._operation(index, operation)
        return Source(
            self._header(ram, x86_ram),
            self._code(ram, x86_ram, state_at),
            ram,
            x86_ram,
            self.constants.n_bytes,
        )

    # text

    def _header(self, ram: int, x86_ram: int) -> str:
        guard = f"{self.name.upper()}_H"
        lines = [
            f"/* {self.name}: an integer-only network, exported by bitfront. */",
            f"#ifndef {guard}",
            f"#define {guard}",
            "",
            "#include <stdint.h>",
            "",
            "#if !defined(BITFRONT_PORTABLE) && defined(__GNUC__) && defined(__x86_64__)",
            f"#define {self.name.upper()}_RAM_BYTES {x86_ram}",
            "#else",
            f"#define {self.name.upper()}_RAM_BYTES {ram}",
            "#endif",
            "",
        ]
        for number, value in enumerate(self.network.inputs):
            shape = " x ".join(str(n) for n in value.sizes)
            lies = " x ".join(str(n) for n in value.lies)
            lines += [
                f"/* Input {number}: {shape}, lies as {lies};"
                f" value = {float_text(value.codes.scale)} * (code - {value.codes.zero_point}). */",
                f"#define {self.name.upper()}_INPUT_{number}_SIZE {value.n}",
                f"{value.type}_t *{self.name}_input_{number}(void);",
                f"void {self.name}_quantize_input_{number}(const float *x);",
            ]
        for number, value in enumerate(self.network.outputs):
            shape = " x ".join(str(n) for n in value.sizes)
            lines += [
                f"/* Output {number}: {shape};"
                f" value = {float_text(value.codes.scale)} * (code - {value.codes.zero_point}). */",
                f"#define {self.name.upper()}_OUTPUT_{number}_SIZE {value.n}",
                f"const {value.type}_t *{self.name}_output_{number}(void);",
            ]
        lines += [
            "",
            "/* Call once, before anything else: chooses kernels up to a level (0 portable,",
            "   1 AVX2, 2 AVX-512 VNNI; 9: what the processor has), and returns the level. */",
            f"int {self.name}_init(int level);",
            "/* One inference, from the inputs to the outputs. An input is used up by it. */",
            f"void {self.name}_run(void);",
            "",
            "#endif",
            "",
        ]
        return "\n".join(lines)

    def _code(self, ram: int, x86_ram: int, state_at: int) -> str:
        name = self.name
        lines = [
            f'#include "{name}.h"',
            '#include "bitfront_kernels.h"',
            "#if !defined(BITFRONT_PORTABLE) && defined(__GNUC__) && defined(__x86_64__)",
            '#include "bitfront_x86.h"',
            "#define BF_X86 1",
            "#else",
            "#define BF_X86 0",
            "#endif",
            "",
            *self.constants.lines,
            "",
            "#if BF_X86",
            f"static uint8_t arena[{x86_ram}] __attribute__((aligned(64)));",
            f"#define LEVEL (*(int32_t *)(void *)(arena + {state_at}))",
            "#else",
            f"static union {{ uint8_t bytes[{ram}]; int32_t aligned; }} memory;",
            "#define arena memory.bytes",
            "#endif",
            "",
        ]
        for number, value in enumerate(self.network.inputs):
            is_plain = value.order == tuple(range(len(value.sizes)))
            outer = 1 if is_plain else value.sizes[0]
            inner = value.n // outer
            lines += [
                f"{value.type}_t *{name}_input_{number}(void)",
                "{",
                f"    return ({value.type}_t *)(void *){self._at(value)};",
                "}",
                "",
                f"void {name}_quantize_input_{number}(const float *x)",
                "{",
                f"    bf_quantize({self._at(value)}, {as_output(value)}, x, "
                f"{float_text(value.codes.scale)}f, {outer}, {inner});",
                "}",
                "",
            ]
        for number, value in enumerate(self.network.outputs):
            lines += [
                f"const {value.type}_t *{name}_output_{number}(void)",
                "{",
                f"    return (const {value.type}_t *)(const void *){self._at(value)};",
                "}",
                "",
            ]
        lines += [
            f"int {name}_init(int level)",
            "{",
            "#if BF_X86",
            "    const int present = bf_level();",
            "    LEVEL = level < present ? level : present;",
            "    if (LEVEL > 0) {",
            *self.repacking,
            "    }",
            "    return LEVEL;",
            "#else",
            "    (void)level;",
            "    return 0;",
            "#endif",
            "}",
            "",
            f"void {name}_run(void)",
            "{",
            *self.body,
            "}",
            "",
        ]
        return "\n".join(lines)

    def _at(self, value: Value) -> str:
        return f"(arena + {self.offsets[value.buffer]})"

    # operations

    def _operation(self, index: int, operation: Operation) -> None:
        self.body.append(f"    /* {operation.name.replace('*/', '')} */")
        if isinstance(operation, Conv):
            self._conv(index, operation)
        elif isinstance(operation, Sum):
            self._sum(index, operation)
        elif isinstance(operation, Product):
            self._product(operation)
        elif isinstance(operation, Pool):
            self._pool(index, operation)
        elif isinstance(operation, Part):
            self._part(operation)
        elif isinstance(operation, Copy):
            self._copy(index, operation)
        else:
            assert isinstance(operation, Relu)
            self.body.append(
                f"    bf_relu({self._at(operation.target)}, {self._at(operation.source)}, "
                f"{as_input(operation.source)}, {operation.target.n});"
            )

    def _conv(self, index: int, op: Conv) -> None:
        rows = op.rows
        data = self.constants.array("uint8", f"w{index}", rows.data or b"\0")
        blocks = [
            f"{{{b.kind}, {b.n_rows}, {b.factor}, {b.addend}, {b.row_bytes}, {b.offset}}}"
            for b in rows.blocks
        ]
        text = f"static const bf_block b{index}[] = {{{', '.join(blocks)}}};"
        self.constants.add(text, 24 * len(blocks))
        addends = (
            self.constants.array("int16", f"a{index}", rows.addends) if rows.addends else "NULL"
        )
        is_plain = bool((rows.order == np.arange(len(rows.order))).all())
        order = "NULL" if is_plain else self.constants.array("uint16", f"p{index}", rows.order)
        constants = self.constants.rescaling(index, op.rescale, rows.order)
        n_shared = 1 if op.rescale.shift.size == 1 else 0
        r = op.rescale
        numbers: list[int | Sequence[int]] = [
            type_of(op.source), type_of(op.target), op.source.codes.zero_point, r.zero_point, r.low,
            r.high, op.sizes, op.out_sizes, op.kernel, op.stride, op.padding, op.dilation,
            op.spread, op.channels, op.out_channels, op.groups, len(rows.blocks), n_shared,
            int(op.bits == 64), int(not rows.fits_int8), rows.depth,
        ]  # fmt: skip
        n_numbers = sum(1 if isinstance(n, int) else len(n) for n in numbers)
        text = ", ".join(
            str(n) if isinstance(n, int) else "{" + ", ".join(str(k) for k in n) + "}"
            for n in numbers
        )
        self.constants.add(f"static const bf_conv c{index} = {{{text}}};", 4 * n_numbers)
        literal = f"{data}, b{index}, {addends}, {order}, {constants}"
        where = f"{self._at(op.source)}, {self._at(op.target)}"
        lines = [
            "    {",
            f"        const bf_rows rows = bf_rows_of({literal});",
            f"        bf_convolve(&c{index}, &rows, {where}, "
            f"(int16_t *)(void *)(arena + {self.row_at}));",
            "    }",
        ]
        if index in self.fast:
            self._repack(index, literal)
            lines = [
                "#if BF_X86",
                "    if (LEVEL > 0)",
                f"        bf_fast(&c{index}, LEVEL, {where}, arena + {self.padded_at}, "
                f"arena + {self.fast_at[index]});",
                "    else",
                "#endif",
                *lines,
            ]
        self.body += lines

    def _repack(self, index: int, literal: str) -> None:
        self.repacking += [
            "        {",
            f"            const bf_rows rows = bf_rows_of({literal});",
            f"            bf_repack(&c{index}, &rows, "
            f"(int16_t *)(void *)(arena + {self.row_at}), arena + {self.fast_at[index]});",
            "        }",
        ]

    def _sum(self, index: int, op: Sum) -> None:
        constants = self.constants.rescaling(index, op.rescale, None)
        pointers = ", ".join(self._at(v) for v in op.sources)
        types = ", ".join(f"{{{type_of(v)}, {v.codes.zero_point}}}" for v in op.sources)
        sets = max(op.rescale.shift.size, op.rescale.offset.size)
        where = f"{self._at(op.target)}, {as_output(op.target, op.rescale)}, {len(op.sources)}, "
        where += f"sources, from, {op.target.n}"
        is_narrow = all(v.type in ("uint8", "int8") for v in (*op.sources, op.target))
        fast = [
            "#if BF_X86",
            "        if (LEVEL > 0)",
            f"            bf_sum_fast(LEVEL, {where}, {constants});",
            "        else",
            "#endif",
        ]
        self.body += [
            "    {",
            f"        const void *const sources[] = {{{pointers}}};",
            f"        const bf_in from[] = {{{types}}};",
            *(fast if is_narrow and sets == 1 else ()),
            f"        bf_sum({where}, {op.inner}, {sets}, {constants});",
            "    }",
        ]

    def _product(self, op: Product) -> None:
        a, b = op.sources
        self.body.append(
            f"    bf_product({self._at(op.target)}, {as_output(op.target, op.rescale)}, "
            f"{self._at(a)}, {as_input(a)}, {self._at(b)}, {as_input(b)}, {op.target.n}, "
            f"{scalars(op.rescale)});"
        )

    def _part(self, op: Part) -> None:
        self.body.append(
            f"    bf_part({self._at(op.target)}, {as_output(op.target, op.rescale)}, "
            f"{self._at(op.source)}, {as_input(op.source)}, {op.outer}, {op.inner}, {op.pitch}, "
            f"{op.offset}, {scalars(op.rescale)});"
        )

    def _copy(self, index: int, op: Copy) -> None:
        tables: list[int] = []
        triples: list[int] = []
        for axis in op.axes:
            triples += [axis.count, axis.stride, len(tables) if axis.table else -1]
            tables += [-(2**31) if t is None else t for t in axis.table]
        axes = self.constants.array("int32", f"x{index}", triples)
        table = self.constants.array("int32", f"t{index}", tables) if tables else "NULL"
        self.body.append(
            f"    bf_copy({self._at(op.target)}, {self._at(op.source)}, {as_input(op.source)}, "
            f"{op.start}, {len(op.axes)}, {axes}, {table});"
        )

    def _pool(self, index: int, op: Pool) -> None:
        tables: list[int] = []
        places = []
        for window in op.windows:
            places.append(-1 if window is None else len(tables))
            if window is not None:
                tables += [*window[0].tolist(), *window[1].tolist()]
        table = self.constants.array("int32", f"t{index}", tables) if tables else "NULL"
        kind = f"BF_POOL_{op.kind.upper()}"
        lists = ["{" + ", ".join(str(n) for n in part) + "}"
                 for part in (op.sizes, op.out_sizes, op.step, places)]  # fmt: skip
        self.constants.add(f"static const bf_pool q{index} = {{{kind}, {', '.join(lists)}}};", 68)
        sets, constants = 0, "NULL, NULL, NULL"
        if op.rescale is not None:
            constants = self.constants.rescaling(index, op.rescale, None)
            sets = op.rescale.shift.size
        self.body.append(
            f"    bf_pools(&q{index}, {table}, {self._at(op.source)}, {as_input(op.source)}, "
            f"{self._at(op.target)}, {as_output(op.target, op.rescale)}, {sets}, {constants});"
        )
