"""Short notation for the operators that are put into a graph after it was traced."""

from typing import Any

import numpy as np
import onnx_ir as ir


class Ops(ir.tape.Tape):
    """Operators by name, ``ops.Concat(a, b, axis=1)``; a number, list or array among the inputs becomes a constant."""

    def __getattr__(self, name: str) -> Any:
        def add(*inputs: Any, **attributes: Any) -> ir.Value:
            values = [x if isinstance(x, ir.Value) else self.Constant(value=ir.tensor(np.array(x))) for x in inputs]
            return self.op(name, values, attributes)

        return add

    def loop(self, count: ir.Value, body: ir.Graph, carried: list[ir.Value]) -> list[ir.Value]:
        """Repeat ``body`` at most ``count`` times, while its first output is true; returns its other outputs."""
        begin = self.Constant(value=ir.tensor(np.array(True)))
        n_outputs = len(body.outputs) - 1
        return list(self.op_multi_out("Loop", [count, begin, *carried], {"body": body}, num_outputs=n_outputs))
