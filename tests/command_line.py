"""Running the command line in this process."""

from __future__ import annotations

from lowbitq import cli


def run(capsys, *arguments):
    """Exit code, standard output and the lines of standard error."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse's way to end
        code = exit.code or 0
    out, err = capsys.readouterr()
    return code, out, err.splitlines()
