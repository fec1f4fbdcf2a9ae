"""Short notation for the operators that are put into a graph after it was traced."""

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir


class Ops(ir.tape.Tape):
    """Operators by name, ``ops.Concat(a, b, axis=1)``; a number, list or array among the inputs becomes a constant."""

    def __getattr__(self, name: str) -> Any:
        return partial(self._add, name)

    def contrib(self, name: str, *inputs: Any, **attributes: Any) -> ir.Value:
        """The same for one of ONNX Runtime's own operators."""
        return self._add(name, *inputs, **attributes, domain="com.microsoft", version=1)

    def _add(
        self, name: str, *inputs: Any, domain: str = "", version: int | None = None, **attributes: Any
    ) -> ir.Value:
        values = [x if isinstance(x, ir.Value) else self.Constant(value=ir.tensor(np.array(x))) for x in inputs]
        return self.op(name, values, attributes, domain=domain, version=version)

    def loop(self, count: ir.Value, body: ir.Graph, carried: list[ir.Value]) -> list[ir.Value]:
        """Repeat ``body`` at most ``count`` times, while its first output is true; returns its other outputs."""
        begin = self.Constant(value=ir.tensor(np.array(True)))
        n_outputs = len(body.outputs) - 1
        return list(self.op_multi_out("Loop", [count, begin, *carried], {"body": body}, num_outputs=n_outputs))
