"""Python's subinterpreters, in which torch hangs or crashes."""

import ctypes


def refuse_subinterpreters() -> None:
    """Raises ImportError in one; to be called before torch is imported."""
    current, main = (
        ctypes.pythonapi.PyInterpreterState_Get,
        ctypes.pythonapi.PyInterpreterState_Main,
    )
    current.restype = main.restype = ctypes.c_void_p
    if current() != main():
        raise ImportError(
            "at_fused does not run in a subinterpreter: torch does not; use a process"
        )
