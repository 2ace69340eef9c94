"""Only what is printed outside survives."""

import os

from search.quiet import native_stdout_discarded


def test_native_output_inside_is_dropped_and_after_is_kept(capfd):
    with native_stdout_discarded():
        os.write(1, b"noise")
    os.write(1, b"result")
    assert capfd.readouterr().out == "result"
