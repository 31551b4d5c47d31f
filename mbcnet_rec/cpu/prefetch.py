"""The processor's own instruction that asks for memory before a compiled loop reads it: rows of a large table lie where no pattern tells."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _prefetch(_: Any, array: Any, place: Any) -> Any:
    """Ask for the cache line of array[place], to be written to; the place need not exist."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0])
        line = builder.bitcast(builder.gep(numbers.data, [arguments[1]]), cgutils.voidptr_t)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [line.type, number, number, number])
        write, keep_in_all_caches, data = number(1), number(3), number(1)
        builder.call(
            builder.module.declare_intrinsic("llvm.prefetch", [line.type], kind),
            [line, write, keep_in_all_caches, data],
        )
        return context.get_dummy_value()

    return types.void(array, place), code


prefetch: Any = intrinsic(_prefetch)  # of an array and a place, in compiled loops alone
