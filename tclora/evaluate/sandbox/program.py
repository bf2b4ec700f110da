"""What runs in the program's sandbox: the program, then its functions as the tests call them."""

import sys
import traceback
from types import ModuleType

from tclora.evaluate.sandbox.peer import OPERATIONS, GoneError, Peer
from tclora.evaluate.sandbox.values import send

_WIRE = 3


def main(text: str) -> None:
    """Run a program, then serve the calls of its tests until they end."""
    sys.set_int_max_str_digits(0)
    module = sys.modules["program"] = ModuleType("program")  # dataclasses look themselves up there
    names = vars(module)
    try:
        exec(compile(text, "<program>", "exec"), names)  # noqa: S102
    except BaseException:  # whatever a program ends with
        send(_WIRE, {"failed": traceback.format_exc(limit=-3)[-2000:]})
        return
    send(_WIRE, {"failed": None})
    try:
        Peer(_WIRE, OPERATIONS, root=names, trusted=False).serve()
    except GoneError:
        return
