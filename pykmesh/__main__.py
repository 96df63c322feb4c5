"""`python -m pykmesh`, which `pykmesh` is."""

from __future__ import annotations

import signal


def start() -> None:
    """Runs the command line. Ctrl-C while it is still being loaded ends it without a word."""
    has_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if has_default:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pykmesh.cli.main import main  # noqa: PLC0415  (most of the time goes here)

    if has_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main(prog_name="pykmesh")


if __name__ == "__main__":
    start()
