"""The prefetch instruction for compiled loops: the hardware cannot predict which rows of a large table come next."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _prefetch(_: Any, array: Any, place: Any) -> Any:
    """Prefetch the cache line of array[place] for writing; an index past the end does no harm."""

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


prefetch: Any = intrinsic(_prefetch)  # prefetch(array, index), callable from compiled loops only
