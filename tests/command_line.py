"""Running the `latentdiff` command in this process."""

import pytest

from latentdiff.commands.cli import main


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error message of a command that must end with status 2 and print nothing else."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err
